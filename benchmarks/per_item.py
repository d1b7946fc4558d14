"""The per-item approach, re-created for `benchmarks/data.py`: all the work on one utterance inside `__getitem__`.

An item reads a whole file, decodes all of it, cuts two segments, and, if asked for features, gives each a room by
`scipy.signal.convolve`, adds a noise, and computes the log-mel spectrogram. Rooms and noises are small files that are
read when they are drawn. This is how public loaders of speaker recognition work; the ranges are those of CEL's
published profile 3. Choices that public loaders make differently are made here in favour of speed: int16 instead of
float64, both segments in one call of torchaudio.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
import soundfile
import torch
import torch.utils.data
from scipy import signal
from torch import Tensor
from torch.nn import functional as F
from torchaudio.transforms import MelSpectrogram

SAMPLE_RATE = 16_000
SNR_DB = {"noise": (0.0, 15.0), "speech": (13.0, 20.0), "music": (5.0, 15.0)}
ROOM_GAIN_DB = (-7.0, 3.0)
POWER_FLOOR = 1e-4


class PerItem(torch.utils.data.Dataset):
    """One item: `[2, T]` int16, or `[2, 40, F]` float32 features of augmented segments.

    Args:
        files: the utterances.
        segment_samples: length T of a segment.
        pieces: folder of WAV files below noise/, speech/, music/ and rir/; None leaves the segments as they are cut.
        snr_db: range of the signal-to-noise ratio of each kind of noise.
    """

    def __init__(
        self,
        files: list[str],
        segment_samples: int,
        pieces: Path | None = None,
        snr_db: Mapping[str, tuple[float, float]] = SNR_DB,
    ) -> None:
        self._files = files
        self._segment_samples = segment_samples
        self._random = np.random.default_rng(0)
        self._pieces, self._snr_db = pieces, snr_db
        self._augment = None if pieces is None else PieceAugment(pieces, self._random, snr_db)
        self._features = None if pieces is None else PerItemLogMel()

    def reseed(self, seed: int) -> None:
        """Draw everything from this seed on, as each worker must from one of its own."""
        self._random = np.random.default_rng(seed)
        if self._pieces is not None:
            self._augment = PieceAugment(self._pieces, self._random, self._snr_db)

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, number: int) -> Tensor:
        audio, _ = soundfile.read(self._files[number], dtype="int16")
        segments = two_segments(audio, self._segment_samples, self._random)
        if self._augment is None or self._features is None:
            return torch.from_numpy(segments)
        augmented = np.stack([self._augment(segment.astype(np.float64)) for segment in segments])
        return self._features(torch.from_numpy(augmented.astype(np.float32)))


def two_segments(audio: np.ndarray, samples: int, random: np.random.Generator) -> np.ndarray:
    """Two segments that do not overlap, in random order: int16 `[2, T]`."""
    first, second = np.sort(random.integers(0, len(audio) - 2 * samples + 1, 2))
    segments = np.stack([audio[first : first + samples], audio[second + samples : second + 2 * samples]])
    return segments[::-1].copy() if random.random() < 0.5 else segments


class Piece(NamedTuple):
    """A noise of the length of a segment, and the SNR it is to be added at."""

    audio: np.ndarray
    snr_db: float


class PieceAugment:
    """A room and a noise for one segment [T] on int16 scale, drawn anew at every call."""

    def __init__(
        self, pieces: Path, random: np.random.Generator, snr_db: Mapping[str, tuple[float, float]] = SNR_DB
    ) -> None:
        self._random = random
        self._snr_db = snr_db
        self._noises = {kind: _files_below(pieces / kind) for kind in snr_db}
        self._rooms = _files_below(pieces / "rir")

    def __call__(self, segment: np.ndarray) -> np.ndarray:
        response, _ = soundfile.read(self._any_of(self._rooms))
        gain = 10 ** (0.1 * self._random.uniform(*ROOM_GAIN_DB))
        response = gain * response / np.sqrt(np.sum(response**2))
        wet = signal.convolve(segment, response, mode="full")[: len(segment)]
        noise = self._draw_noise(len(segment))
        speech_power = np.mean(wet**2) + POWER_FLOOR
        noise_power = np.mean(noise.audio**2) + POWER_FLOOR
        return wet + np.sqrt(speech_power / noise_power * 10 ** (-0.1 * noise.snr_db)) * noise.audio

    def _draw_noise(self, samples: int) -> Piece:
        kind = self._any_of(list(self._snr_db))
        audio, _ = soundfile.read(self._any_of(self._noises[kind]), dtype="int16")
        if len(audio) < samples:
            audio = np.pad(audio, (0, samples - len(audio)), "wrap")
        start = self._random.integers(0, len(audio) - samples + 1)
        return Piece(audio[start : start + samples].astype(np.float64), self._random.uniform(*self._snr_db[kind]))

    def _any_of(self, values: list[str]) -> str:
        return values[self._random.integers(len(values))]


class PerItemLogMel:
    """The published front end for the segments [V, T] of one item: `[V, 40, F]`."""

    def __init__(self) -> None:
        self._mel = MelSpectrogram(SAMPLE_RATE, n_fft=512, win_length=400, hop_length=160, n_mels=40)

    def __call__(self, segments: Tensor) -> Tensor:
        return F.instance_norm(torch.log(self._mel(segments) + 1e-6))


def per_item_loader(
    tree: Path, segment_samples: int, batch_size: int, pieces: Path | None = None
) -> torch.utils.data.DataLoader:
    """Batches of items in random order, read in this process."""
    dataset = PerItem(_files_below(tree), segment_samples, pieces)
    return torch.utils.data.DataLoader(dataset, batch_size, shuffle=True, generator=torch.Generator().manual_seed(0))


def _files_below(folder: Path) -> list[str]:
    return sorted(str(path) for path in folder.rglob("*.*"))
