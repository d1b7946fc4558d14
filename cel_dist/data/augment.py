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

from cel_dist.config_sections import AugmentSection
from cel_dist.copies import to_device
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

    def rows(self, rows: slice | np.ndarray) -> "Choices":
        """The choices of some of the segments."""
        return Choices(*(getattr(self, name)[rows] for name in self.__dataclass_fields__))


class Augment(nn.Module):
    """Turns segments into augmented float32 ones.

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
            segments: [B, V, T] int16, or float32 on that scale, on the device to work on.
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
        augmented = torch.empty(flat.shape, dtype=torch.float32, device=flat.device)
        for part in self._parts(choices, num_samples, flat.device):
            index = to_device(part, flat.device)
            wet = self._reverberate(flat[index].to(torch.float32), choices.rows(part))
            augmented[index] = self._add_noise(wet, choices.rows(part))
        return augmented.reshape(segments.shape)

    def _parts(self, choices: Choices, num_samples: int, device: torch.device) -> list[np.ndarray]:
        """The rows that are worked on together: on a CPU a few, with rooms of about the same length, which makes the
        FFT of most of them shorter; on a GPU all."""
        rows = np.arange(len(choices.room))
        if device.type != "cpu":
            return [rows]
        if self.config.profile >= 2:
            assert self._bank is not None
            rooms = self._bank.clips("rir")
            rows = np.argsort(rooms.lengths[_pick(choices.room, len(rooms))], kind="stable")
        return np.array_split(rows, -(-len(rows) * num_samples // _CPU_SAMPLES))

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
        filters = to_device(responses, wave.device).to(torch.float32) * amplitude[:, None]
        index = to_device(chosen, wave.device)
        wet = convolve(wave[index], filters)
        return wet if len(chosen) == len(wave) else wave.index_copy(0, index, wet)

    def _add_noise(self, wave: Tensor, choices: Choices) -> Tensor:
        chosen = np.flatnonzero(choices.has_noise)
        if len(chosen) == 0:
            return wave
        crops, levels = self._draw_noise(choices.rows(chosen), wave.shape[1])
        noise, snr_db = to_device(crops, wave.device).to(torch.float32), _to(levels, wave)
        if len(chosen) == len(wave):
            return wave + at_snr(noise, wave, snr_db)
        index = to_device(chosen, wave.device)
        return wave.index_add(0, index, at_snr(noise, wave[index], snr_db))

    def _draw_noise(self, choices: Choices, num_samples: int) -> tuple[np.ndarray, np.ndarray]:
        """Noise for each of n segments, int16 [n, T], and the SNRs in dB [n] at which to add it."""
        assert self._bank is not None
        kinds = _pick(choices.kind, len(self._kinds))
        crops, snr_db = np.empty((len(kinds), num_samples), np.int16), np.empty(len(kinds))
        for number, kind in enumerate(self._kinds):
            rows = np.flatnonzero(kinds == number)
            clips = self._bank.clips(kind)
            crops[rows] = clips.crop(_pick(choices.clip[rows], len(clips)), choices.offset[rows], num_samples)
            snr_db[rows] = _scale(choices.snr[rows], self._ranges[kind])
        return crops, snr_db


def convolve(wave: Tensor, response: Tensor) -> Tensor:
    """Convolve each row of `wave` [n, T] with its row of `response` [n, R]; returns the first T samples, float32."""
    num_samples = wave.shape[-1]
    # An even length with small prime factors: the exact length T + R - 1 may be prime, where an FFT is several times
    # slower, and so it is at odd lengths.
    size = 2 * next_fast_len((num_samples + response.shape[-1]) // 2, real=True)
    spectrum = torch.fft.rfft(wave, size)
    spectrum *= torch.fft.rfft(response, size)
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
    return to_device(values.astype(np.float32), like.device)
