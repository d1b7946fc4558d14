"""The utterances of one synthetic speaker: text, delivery, voice, channel, file."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from cel_dist.corpus import SAMPLE_RATE_HZ, sentences, voices
from cel_dist.corpus.channel import Channel, draw_channel
from cel_dist.corpus.flac import write_flac
from cel_dist.corpus.randomness import generator
from cel_dist.corpus.voices import Voice

NUM_SESSIONS = 2
# Two training segments of 29 040 samples need 3.63 s.
MIN_SECONDS = 3.8
MAX_SECONDS = 7.0
_TARGET_SECONDS = (3.6, 4.6)
_FADE_SAMPLES = 400
# Everyday variation of one person's voice: the standard deviations of the logarithm of a session's and an utterance's
# factor on pitch, and of an utterance's factor on rate.
_SESSION_PITCH, _UTTERANCE_PITCH, _UTTERANCE_RATE = 0.02, 0.025, 0.05


@dataclass(frozen=True)
class Speaker:
    """A speaker of the corpus: a piece of work for one process."""

    number: int
    """Place in the corpus; keys all that is drawn for the speaker."""
    name: str
    """Folder of the speaker."""
    split: str
    """train, validation or test."""
    voice: Voice


@dataclass(frozen=True)
class Recording:
    """A written utterance."""

    path: str
    """Relative to the folder of the speech: `<speaker>/<session>/<utterance>.flac`."""
    speaker: str
    session: str
    split: str
    num_samples: int


def record_speaker(speech: Path, speaker: Speaker, *, utterances: int, seed: int) -> list[Recording]:
    """Write all utterances of a speaker, 16 kHz mono 16-bit FLAC, the sessions one after the other.

    Every file is a pure function of (seed, speaker number, utterance number) and of the number of utterances, which
    says where one session ends.

    Raises:
        RunError: the speech engine fails.
        OSError: a file cannot be written.
    """
    recordings = []
    for session in range(NUM_SESSIONS):
        channel = draw_channel(generator(seed, "channel", speaker.number, session))
        pitch = float(np.exp(_SESSION_PITCH * generator(seed, "session", speaker.number, session).standard_normal()))
        folder = speech / speaker.name / f"s{session + 1}"
        folder.mkdir(parents=True)
        for number in range(session * utterances // NUM_SESSIONS, (session + 1) * utterances // NUM_SESSIONS):
            rng = generator(seed, "utterance", speaker.number, number)
            wave = _record(speaker.voice, channel, pitch, rng)
            path = folder / f"{speaker.name}-s{session + 1}-{number:03d}.flac"
            write_flac(path, wave)
            recordings.append(
                Recording(path.relative_to(speech).as_posix(), speaker.name, folder.name, speaker.split, len(wave))
            )
    return recordings


def _record(voice: Voice, channel: Channel, session_pitch: float, rng: np.random.Generator) -> NDArray[np.int16]:
    delivery = voices.Delivery(
        pitch=session_pitch * float(np.exp(_UTTERANCE_PITCH * rng.standard_normal())),
        rate=float(np.exp(_UTTERANCE_RATE * rng.standard_normal())),
    )
    num_words = round(voice.rate_wpm / 60 * rng.uniform(*_TARGET_SECONDS))
    text = sentences.compose(rng, num_words)
    speech = voices.speak(voice, text, delivery)
    # Words differ in length and variants in tempo, so a text may come out short. A longer one is then read instead.
    while len(speech) < MIN_SECONDS * SAMPLE_RATE_HZ:
        text = f"{text} {sentences.compose(rng, 3)}"
        speech = voices.speak(voice, text, delivery)
    if len(speech) > MAX_SECONDS * SAMPLE_RATE_HZ:
        speech = speech[: int(MAX_SECONDS * SAMPLE_RATE_HZ)].copy()
        speech[-_FADE_SAMPLES:] *= np.linspace(1, 0, _FADE_SAMPLES, dtype=np.float32)
    return channel.apply(speech, rng)
