"""Augmentation on the training device: rooms by FFT convolution, noise at an SNR, for a whole batch at once.

Ranges and profiles are those of the published recipe (Mun et al. 2020, section 4). What differs is that every choice
comes from a generator placed at (seed, epoch, step), so that no two epochs repeat each other's and a resumed run
repeats its own.
"""

from dataclasses import dataclass

import numpy as np
import torch
from scipy.fft import next_fast_len
from torch import Tensor, nn

from cel_dist.config import AugmentSection
from cel_dist.data.bank import Bank
from cel_dist.data.randomness import Purpose, generator
from cel_dist.errors import CelError

ADDITIVE = ("noise", "speech", "music")
# Profile 2 gives a room to this share of the segments and noise to the others.
ROOM_SHARE = 0.25
# Samples that a CPU works on at once. For larger batches the allocator asks the system for memory anew at every call,
# which costs as much as the arithmetic; with fewer, preparing the FFT would cost as much as the FFT.
_CPU_SAMPLES = 1 << 20
# Keeps the level of digital silence finite, as in the published implementation.
POWER_FLOOR = 1e-4


@dataclass(frozen=True)
class Choices:
    """What happens to each of n segments; uniform numbers in [0, 1) where a bank or a range still has to be applied."""

    has_room: np.ndarray
    has_noise: np.ndarray
    kind: np.ndarray
    clip: np.ndarray
    offset: np.ndarray
    snr: np.ndarray
    room: np.ndarray
    gain: np.ndarray

    @classmethod
    def draw(cls, profile: int, num_segments: int, seed: int, epoch: int, step: int) -> "Choices":
        """Draw for all segments of a global batch."""
        numbers = generator(seed, Purpose.AUGMENTATION, epoch, step).random((7, num_segments))
        room = {0: numbers[0] < 0, 1: numbers[0] < 0, 2: numbers[0] < ROOM_SHARE, 3: numbers[0] >= 0}[profile]
        noise = {0: numbers[0] < 0, 1: numbers[0] >= 0, 2: ~room, 3: numbers[0] >= 0}[profile]
        return cls(room, noise, *numbers[1:])

    def rows(self, rows: slice) -> "Choices":
        """The choices of some of the segments."""
        return Choices(*(getattr(self, name)[rows] for name in self.__dataclass_fields__))


class Augment(nn.Module):
    """Turns int16 segments into augmented float32 ones.

    Args:
        config: profile and ranges.
        bank: noise and rooms; None only for profile 0.
        seed: seed of all choices.

    Raises:
        CelError: the bank lacks rooms or noise that the profile uses.
    """

    def __init__(self, config: AugmentSection, bank: Bank | None, seed: int) -> None:
        super().__init__()
        self.config = config
        self.seed = seed
        self._bank = bank
        self._ranges = {
            "noise": config.noise_snr_db,
            "speech": config.speech_snr_db,
            "music": config.music_snr_db,
        }
        available = set(bank.categories) if bank else set()
        self._kinds = [kind for kind in ADDITIVE if kind in available]
        if config.profile >= 1 and not self._kinds:
            raise CelError(f"augment.profile={config.profile} needs noise, speech or music in data.bank; it holds none")
        if config.profile >= 2 and "rir" not in available:
            raise CelError(f"augment.profile={config.profile} needs room responses (rir) in data.bank; it holds none")

    def forward(self, segments: Tensor, *, epoch: int, step: int, rows: slice, batch_size: int) -> Tensor:
        """Augment this rank's rows of a global batch.

        Args:
            segments: [B, V, T] int16, on the device to work on.
            epoch: epoch of the batch.
            step: step of the batch in its epoch.
            rows: the rows that these segments are of the global batch; the choices of a row depend on its place there,
                not on the rank that holds it.
            batch_size: utterances K of the global batch.

        Returns:
            [B, V, T] float32 on int16 scale.
        """
        if self.config.profile == 0:
            return segments.to(torch.float32)
        num_views, num_samples = segments.shape[1:]
        flat = segments.reshape(-1, num_samples)
        choices = Choices.draw(self.config.profile, batch_size * num_views, self.seed, epoch, step).rows(
            slice(rows.start * num_views, rows.stop * num_views)
        )
        at_once = max(1, _CPU_SAMPLES // num_samples) if segments.device.type == "cpu" else len(flat)
        augmented = torch.empty(flat.shape, dtype=torch.float32, device=segments.device)
        for first in range(0, len(flat), at_once):
            part = slice(first, first + at_once)
            wet = self._reverberate(flat[part].to(torch.float32), choices.rows(part))
            augmented[part] = self._add_noise(wet, choices.rows(part))
        return augmented.reshape(segments.shape)

    def _reverberate(self, wave: Tensor, choices: Choices) -> Tensor:
        chosen = np.flatnonzero(choices.has_room)
        if len(chosen) == 0:
            return wave
        assert self._bank is not None
        rooms = self._bank.clips("rir")
        # What a response holds behind the length of the segment falls behind its end too.
        responses = rooms.padded(_pick(choices.room[chosen], len(rooms)), max_samples=wave.shape[1])
        gain_db = _scale(choices.gain[chosen], self.config.rir_gain_db)
        amplitude = _to(10.0 ** (0.1 * gain_db) / 32768.0, wave)
        filters = torch.from_numpy(responses).to(wave.device).to(torch.float32) * amplitude[:, None]
        index = torch.from_numpy(chosen).to(wave.device)
        wet = convolve(wave[index], filters)
        return wet if len(chosen) == len(wave) else wave.index_copy(0, index, wet)

    def _add_noise(self, wave: Tensor, choices: Choices) -> Tensor:
        assert self._bank is not None
        kinds = _pick(choices.kind, len(self._kinds))
        noisy = wave.clone()
        for number, kind in enumerate(self._kinds):
            chosen = np.flatnonzero(choices.has_noise & (kinds == number))
            if len(chosen) == 0:
                continue
            clips = self._bank.clips(kind)
            crops = clips.crop(_pick(choices.clip[chosen], len(clips)), choices.offset[chosen], wave.shape[1])
            noise = torch.from_numpy(crops).to(wave.device).to(torch.float32)
            index = torch.from_numpy(chosen).to(wave.device)
            snr_db = _to(_scale(choices.snr[chosen], self._ranges[kind]), wave)
            noisy.index_add_(0, index, at_snr(noise, wave[index], snr_db))
        return noisy


def convolve(wave: Tensor, response: Tensor) -> Tensor:
    """Convolve each row of `wave` [n, T] with its row of `response` [n, R]; returns the first T samples, float32."""
    num_samples = wave.shape[-1]
    # A length with small prime factors: the exact length T + R - 1 may be prime, where an FFT is several times slower.
    size = next_fast_len(num_samples + response.shape[-1] - 1, real=True)
    spectrum = torch.fft.rfft(wave, size) * torch.fft.rfft(response, size)
    wet: Tensor = torch.fft.irfft(spectrum, size)[..., :num_samples]
    return wet


def at_snr(noise: Tensor, speech: Tensor, snr_db: Tensor) -> Tensor:
    """Scale each row of `noise` [n, T] so that `speech` [n, T] is `snr_db` [n] above it in mean power."""
    speech_power = speech.square().mean(dim=-1) + POWER_FLOOR
    noise_power = noise.square().mean(dim=-1) + POWER_FLOOR
    factor = torch.sqrt(speech_power / noise_power * 10.0 ** (-snr_db / 10.0))
    scaled: Tensor = noise * factor[:, None]
    return scaled


def _pick(fraction: np.ndarray, count: int) -> np.ndarray:
    return (fraction * count).astype(np.int64)


def _scale(fraction: np.ndarray, bounds: tuple[float, float]) -> np.ndarray:
    low, high = bounds
    return low + fraction * (high - low)


def _to(values: np.ndarray, like: Tensor) -> Tensor:
    return torch.from_numpy(values.astype(np.float32)).to(like.device)
