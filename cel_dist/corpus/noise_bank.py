"""The noise and room bank: clips of noise, other voices and music, and room responses, one FLAC file each."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cel_dist.corpus import SAMPLE_RATE_HZ, music, noises, rooms, sentences, voices
from cel_dist.corpus.flac import write_flac
from cel_dist.corpus.randomness import generator
from cel_dist.corpus.voices import Voice

_CLIP_SAMPLES = 6 * SAMPLE_RATE_HZ
# As in the published banks: clips and responses are stored at a fixed peak, and their level is set when they are used.
_CLIP_PEAK = 0.5

NUM_VOICES = 16
"""Speakers that are heard in the bank and nowhere else in the corpus."""
_CLIPS = {"noise": 56, "speech": 32, "music": 16, "rir": 100}


@dataclass(frozen=True)
class BankShare:
    """Some consecutive files of one kind: a piece of work for one process."""

    kind: str
    """noise, speech, music or rir."""
    start: int
    stop: int


def shares(size: int = 8) -> list[BankShare]:
    """The whole bank, cut into shares of at most `size` files."""
    return [
        BankShare(kind, start, min(start + size, count))
        for kind, count in _CLIPS.items()
        for start in range(0, count, size)
    ]


def write_share(bank: Path, share: BankShare, *, seed: int, bank_voices: Sequence[Voice]) -> None:
    """Write `bank/noise/{noise,speech,music}/*.flac` or `bank/rir/*.flac`, 16 kHz mono 16-bit.

    Raises:
        RunError: the speech engine fails.
        OSError: the files cannot be written.
    """
    folder = bank / "rir" if share.kind == "rir" else bank / "noise" / share.kind
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(share.start, share.stop):
        rng = generator(seed, f"bank {share.kind}", number)
        name, wave = _draw(share.kind, number, rng, bank_voices)
        write_flac(folder / f"{name}-{number:03d}.flac", wave)


def _draw(
    kind: str, number: int, rng: np.random.Generator, bank_voices: Sequence[Voice]
) -> tuple[str, NDArray[np.floating[Any]]]:
    """What the file is called, and its [T] samples."""
    if kind == "rir":
        # Uniform in the logarithm: small rooms are as common as halls.
        return "room", rooms.draw_response(rng, t60_seconds=float(np.exp(rng.uniform(np.log(0.15), np.log(1.0)))))
    if kind == "noise":
        name = list(noises.KINDS)[number % len(noises.KINDS)]
        clip = noises.draw_noise(rng, name, _CLIP_SAMPLES)
    elif kind == "music":
        name, clip = "music", music.draw_music(rng, _CLIP_SAMPLES)
    else:
        # Every other clip is a single voice, as in MUSAN; the rest is babble.
        name, num_talkers = ("voice", 1) if number % 2 == 0 else ("babble", int(rng.integers(3, 8)))
        clip = _talk(rng, bank_voices, num_talkers)
    return name, clip * (_CLIP_PEAK / np.abs(clip).max())


def _talk(rng: np.random.Generator, bank_voices: Sequence[Voice], num_talkers: int) -> NDArray[np.float64]:
    """Different people talking at once; each may start in the middle of a sentence."""
    mixture = np.zeros(_CLIP_SAMPLES)
    for place in rng.choice(len(bank_voices), num_talkers, replace=False):
        voice = bank_voices[place]
        text = sentences.compose(rng, round(voice.rate_wpm / 60 * 6))
        talk = voices.speak(voice, text, voices.Delivery())
        turns = np.roll(np.resize(talk, max(len(talk), _CLIP_SAMPLES)), -int(rng.integers(len(talk))))
        mixture += turns[:_CLIP_SAMPLES] / talk.std() * 10 ** rng.uniform(-0.3, 0)
    return mixture
