"""What `benchmarks/data.py` reads: speech-shaped noise as trees of WAV and FLAC, shards of both, noises and rooms."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import soundfile

from cel_dist.data.prepare import prepare
from cel_dist.data.prepare_bank import prepare_bank

SAMPLE_RATE = 16_000
FORMATS = ("wav", "flac")
# Lengths as in VoxCeleb: none below 4 s, 8 s in the mean, few long ones.
LEAST_SECONDS, MEAN_SECONDS, MOST_SECONDS = 4.0, 8.0, 20.0
# The published recipe keeps MUSAN in pieces of this length.
PIECE_SECONDS = 5.0
ROOM_SECONDS = (0.3, 1.2)
SHARD_SAMPLES = 100


@dataclass(frozen=True)
class Corpus:
    """Where so many utterances lie. The trees hold the same ones under the same names but for the suffix."""

    folder: Path
    utterances: int

    def tree(self, audio_format: str) -> Path:
        return self.folder / f"tree_{audio_format}"

    def shards(self, audio_format: str) -> Path:
        return self.folder / "served" / audio_format

    @property
    def served(self) -> Path:
        return self.folder / "served"

    @property
    def pieces(self) -> Path:
        return self.folder / "pieces"

    @property
    def bank(self) -> Path:
        return self.folder / "bank"


def write_corpus(folder: Path, utterances: int, pieces: int) -> Corpus:
    """Make all of it; the same arguments give the same audio."""
    corpus = Corpus(folder, utterances)
    random = np.random.default_rng(0)
    for number in range(utterances):
        seconds = min(LEAST_SECONDS + random.exponential(MEAN_SECONDS - LEAST_SECONDS), MOST_SECONDS)
        audio = speech_shaped(random, seconds)
        for audio_format in FORMATS:
            _write(corpus.tree(audio_format) / f"{number % 20:02d}" / f"{number:05d}.{audio_format}", audio)
    for kind in ("noise", "speech", "music"):
        for number in range(pieces):
            _write(corpus.pieces / kind / f"{number:03d}.wav", speech_shaped(random, PIECE_SECONDS))
    for number in range(pieces):
        _write(corpus.pieces / "rir" / f"{number:03d}.wav", room(random, random.uniform(*ROOM_SECONDS)))
    for audio_format in FORMATS:
        prepare(
            corpus.tree("wav"),
            corpus.shards(audio_format),
            audio_format=audio_format,
            samples_per_shard=min(SHARD_SAMPLES, utterances // 2),
            workers=1,
        )
    prepare_bank(corpus.pieces, corpus.bank, workers=1)
    return corpus


def speech_shaped(random: np.random.Generator, seconds: float) -> np.ndarray:
    """Noise with the spectrum, the syllables and the pauses of speech, int16 [T].

    White noise would leave FLAC nothing to predict, and a sum of sines too much.
    """
    samples = round(seconds * SAMPLE_RATE)
    hz = np.fft.rfftfreq(samples, 1 / SAMPLE_RATE)
    # Level up to 500 Hz, then 9 dB an octave down, and three formants.
    shape = (1 + (hz / 500) ** 2) ** -0.75 * (hz > 80)
    for centre, width in zip(random.uniform([300, 900, 2200], [800, 2000, 3200]), (80, 120, 200), strict=True):
        shape = shape * (1 + 4 / (1 + ((hz - centre) / width) ** 2))
    audio = np.fft.irfft(np.fft.rfft(random.standard_normal(samples)) * shape, samples)
    time = np.arange(samples) / SAMPLE_RATE
    syllables = np.clip(np.sin(2 * np.pi * random.uniform(3, 5) * time + random.uniform(0, 6)) + 0.4, 0.02, None)
    phrases = np.clip(np.sin(2 * np.pi * random.uniform(0.2, 0.5) * time + random.uniform(0, 6)) + 0.8, 0.02, None)
    audio = audio * syllables * np.minimum(phrases, 1)
    level = random.uniform(0.03, 0.08) * 32_768
    return np.clip(np.rint(audio / audio.std() * level), -32_768, 32_767).astype(np.int16)


def room(random: np.random.Generator, seconds: float) -> np.ndarray:
    """A direct sound and a tail that falls by 60 dB in `seconds`, int16 [R]."""
    samples = round(seconds * SAMPLE_RATE)
    tail = random.standard_normal(samples) * np.exp(-6.9 * np.arange(samples) / samples)
    response = 0.2 * tail / np.abs(tail).max()
    response[0] = 0.9
    return np.rint(response * 32_767).astype(np.int16)


def _write(path: Path, audio: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, audio, SAMPLE_RATE, subtype="PCM_16")
