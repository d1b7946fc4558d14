"""The channel of a recording session: equaliser, band limits, small room, noise floor and level."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import fft, signal

from cel_dist.corpus import SAMPLE_RATE_HZ, rooms

_FILTER_TAPS = 512
_BINS_HZ = fft.rfftfreq(2 * _FILTER_TAPS, 1 / SAMPLE_RATE_HZ)
# Above or below 1 kHz.
_OCTAVES = np.log2(np.maximum(_BINS_HZ, 50) / 1000)


@dataclass(frozen=True)
class Channel:
    """What all utterances of a session share. `apply` adds it to clean speech."""

    response: NDArray[np.float32]
    """[L] impulse response of room and equaliser."""
    noise_response: NDArray[np.float32]
    """[1024] impulse response that colours white noise to the noise floor of the session."""
    snr_db: float
    """Mean power of the speech over that of the noise."""
    level_dbfs: float
    """Mean power of the recording, relative to full scale."""

    def apply(self, speech: NDArray[np.float32], rng: np.random.Generator) -> NDArray[np.int16]:
        """Record speech through the channel.

        Args:
            speech: [T] clean speech at 16 kHz.
            rng: draws the noise of this recording.

        Returns:
            [T] int16. Samples over full scale are clipped, as a recorder does.
        """
        # In the circular convolutions the end wraps into the first samples, unless there is room for the tail.
        size = fft.next_fast_len(len(speech) + len(self.response), real=True)
        recorded = _convolve(speech, self.response, size)[: len(speech)]
        noise = _convolve(rng.standard_normal(len(speech), np.float32), self.noise_response, size)[: len(speech)]
        recorded += noise * (_rms(recorded) / _rms(noise) * 10 ** (-self.snr_db / 20))
        recorded *= 10 ** (self.level_dbfs / 20) / _rms(recorded)
        return np.clip(np.rint(recorded * 32767), -32768, 32767).astype(np.int16)


def draw_channel(rng: np.random.Generator) -> Channel:
    """Draw the channel of one session.

    The equaliser varies by more than the long-term spectra of two voices differ, so that comparing spectra does not
    find the speaker across sessions.
    """
    equaliser = _minimum_phase(_equaliser_db(rng))
    room = rooms.draw_response(rng, t60_seconds=rng.uniform(0.1, 0.3), distance_meters=(0.2, 0.8), max_seconds=0.25)
    noise = _minimum_phase(_noise_db(rng))
    return Channel(
        response=signal.fftconvolve(room, equaliser).astype(np.float32),
        noise_response=signal.fftconvolve(noise, equaliser).astype(np.float32),
        snr_db=float(rng.uniform(18, 36)),
        level_dbfs=float(rng.uniform(-32, -20)),
    )


def _convolve(wave: NDArray[np.float32], response: NDArray[np.float32], size: int) -> NDArray[np.float32]:
    product: NDArray[np.float32] = fft.irfft(fft.rfft(wave, size) * fft.rfft(response, size), size)
    return product


def _rms(wave: NDArray[np.float32]) -> float:
    return float(np.sqrt(np.mean(np.square(wave), dtype=np.float64))) + 1e-12


def _equaliser_db(rng: np.random.Generator) -> NDArray[np.float64]:
    """[bins] gain in dB: a tilt, three broad bells, and the two edges of the band."""
    gain = rng.uniform(-2, 2) * _OCTAVES
    for _ in range(3):
        centre, width = rng.uniform(np.log2(0.15), np.log2(6)), rng.uniform(0.4, 1.2)
        gain += rng.uniform(-5, 5) * np.exp(-0.5 * ((_OCTAVES - centre) / width) ** 2)
    low_edge_hz, high_edge_hz = rng.uniform(40, 200), rng.uniform(4500, 7800)
    gain -= 10 * np.log10(1 + (low_edge_hz / np.maximum(_BINS_HZ, 10)) ** 4)
    gain -= 10 * np.log10(1 + (_BINS_HZ / high_edge_hz) ** 16)
    floored: NDArray[np.float64] = np.maximum(gain, -50)
    return floored


def _noise_db(rng: np.random.Generator) -> NDArray[np.float64]:
    """[bins] spectrum of the noise floor in dB: a tilt and one broad bell."""
    bell = np.exp(-0.5 * (_OCTAVES - rng.uniform(-2, 2.5)) ** 2)
    gain: NDArray[np.float64] = rng.uniform(-6, 1) * _OCTAVES + rng.uniform(-6, 6) * bell
    return gain


def _minimum_phase(gain_db: NDArray[np.float64]) -> NDArray[np.float64]:
    """[bins] dB to the [taps] minimum-phase response with that gain, by folding the real cepstrum.

    Oppenheim and Schafer, Discrete-Time Signal Processing, section on the relation of magnitude and phase.
    """
    size = 2 * _FILTER_TAPS
    cepstrum = fft.irfft(gain_db * (np.log(10) / 20), size)
    cepstrum[1:_FILTER_TAPS] *= 2
    cepstrum[_FILTER_TAPS + 1 :] = 0
    response: NDArray[np.float64] = fft.irfft(np.exp(fft.rfft(cepstrum)), size)[:_FILTER_TAPS]
    return response
