"""What can be measured of one utterance: levels, clipping, silence, bandwidth, and a fingerprint."""

import hashlib
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from cel_dist.data.audio import SAMPLE_RATE

Samples = npt.NDArray[np.int16]

FINGERPRINT_SECONDS = 10.0
"""The fingerprint is of the beginning of an utterance, so long."""

_FULL_SCALE = 32_768.0
_FLOOR_DB = -120.0
_FRAME = 400
# Below the loud frames of the utterance by so much, or below this level at all: nobody speaks.
_BELOW_SPEECH_DB, _SILENCE_DB = 35.0, -65.0
# Flat tops: so many equal samples in a row at the utterance's own extreme, which must not be tiny.
_FLAT_RUN, _FLAT_FROM = 3, 3_277
_SPECTRUM = 512
_SPECTRUM_SECONDS = 60
_TELEPHONE_HZ, _VOICE_HZ = 4_300.0, (300.0, 3_400.0)
# Of a power spectrum: what a resampler leaves of the voice, and how far rounding to 16 bit reaches above its mean.
_GONE, _ABOVE_ROUNDING, _LOUD_ENOUGH = 1e-5, 6.0, 1e3
# Haitsma and Kalker, "A highly robust audio fingerprinting system" (2002): signs of differences between neighbouring
# bands and times. Frames are long against their distance, so that a copy which begins elsewhere meets similar frames.
_PRINT_FRAME, _PRINT_HOP, _PRINT_FFT, _PRINT_BANDS = 5_920, 1_024, 8_192, 33
_PRINT_HZ = (300.0, 3_400.0)


@dataclass(frozen=True)
class Measurement:
    """One utterance.

    Attributes:
        rms_db: level about the mean, dB of full scale.
        peak_db: largest sample, dB of full scale.
        clipped: share of the samples that stand in runs of three or more at the utterance's own extreme, if that is
            above -20 dB: what a converter or a gain cut off, also when the level was lowered later. Lossy coding hides
            it.
        silence: share of frames of 25 ms that are 35 dB below the loud ones (95th percentile), or below -65 dB.
        padding: share of the samples that are zero (or one bit) without a break from the beginning, or to the end.
        offset: mean, as a share of full scale.
        is_narrow: nothing is left above 4.3 kHz, as of telephone audio at another rate; a hint, taken from the first
            minute.
        digest: [2] uint64, of the samples: equal audio has equal digests.
        words: [n] uint32, a fingerprint word every 64 ms of the first 10 s; 0 where nothing can be told.
    """

    rms_db: float
    peak_db: float
    clipped: float
    silence: float
    padding: float
    offset: float
    is_narrow: bool
    digest: npt.NDArray[np.uint64]
    words: npt.NDArray[np.uint32]


def measure(samples: Samples, *, with_words: bool = True) -> Measurement:
    """Measure an utterance, int16 [T] at 16 kHz, T > 0; `with_words` makes its fingerprint, which takes longest."""
    mean = float(samples.mean(dtype=np.float64))
    power = float(np.einsum("i,i->", samples, samples, dtype=np.float64)) / len(samples) - mean**2
    extreme = max(int(samples.max()), -int(samples.min()))
    return Measurement(
        rms_db=_db(power / _FULL_SCALE**2),
        peak_db=_db((extreme / _FULL_SCALE) ** 2),
        clipped=_clipped(samples),
        silence=_silence(samples, mean),
        padding=_padding(samples),
        offset=mean / _FULL_SCALE,
        is_narrow=_is_narrow(samples),
        digest=np.frombuffer(hashlib.blake2b(samples.tobytes(), digest_size=16).digest(), np.uint64),
        words=fingerprint(samples) if with_words else np.zeros(0, np.uint32),
    )


def _db(power: float) -> float:
    return max(_FLOOR_DB, 10.0 * float(np.log10(max(power, 1e-30))))


def _clipped(samples: Samples) -> float:
    at_extreme = 0
    for extreme in (int(samples.max()), int(samples.min())):
        if abs(extreme) < _FLAT_FROM:
            continue
        places = np.flatnonzero(samples == extreme)
        begins = np.flatnonzero(np.diff(places, prepend=-2) > 1)
        runs = np.diff(begins, append=len(places))
        at_extreme += int(runs[runs >= _FLAT_RUN].sum())
    return at_extreme / len(samples)


def _silence(samples: Samples, mean: float) -> float:
    frames = samples[: len(samples) // _FRAME * _FRAME].reshape(-1, _FRAME)
    if len(frames) == 0:
        return 0.0
    # Without a copy of an hour of audio as fp64.
    squares = np.einsum("ij,ij->i", frames, frames, dtype=np.float64)
    power = squares / _FRAME - 2 * mean * frames.mean(axis=1, dtype=np.float64) + mean**2
    levels = 10.0 * np.log10(np.maximum(power / _FULL_SCALE**2, 1e-12))
    limit = max(float(np.percentile(levels, 95)) - _BELOW_SPEECH_DB, _SILENCE_DB)
    return float((levels < limit).mean())


def _padding(samples: Samples) -> float:
    heard = (samples > 1) | (samples < -1)
    if not heard.any():
        return 1.0
    return float(heard.argmax() + heard[::-1].argmax()) / len(samples)


def _is_narrow(samples: Samples) -> bool:
    usable = samples[: _SPECTRUM_SECONDS * SAMPLE_RATE]
    frames = usable[: len(usable) // _SPECTRUM * _SPECTRUM].reshape(-1, _SPECTRUM).astype(np.float32)
    if len(frames) == 0:
        return False
    window = np.hanning(_SPECTRUM).astype(np.float32)
    power = np.square(np.abs(np.fft.rfft((frames - frames.mean(axis=1, keepdims=True)) * window))).mean(axis=0)
    hertz = np.fft.rfftfreq(_SPECTRUM, 1 / SAMPLE_RATE)
    voice = float(power[(hertz >= _VOICE_HZ[0]) & (hertz <= _VOICE_HZ[1])].mean())
    # Rounding to whole numbers is noise of a variance of 1/12.
    rounding = float(np.square(window).sum()) / 12
    # The last bins are where every resampler cuts.
    high = power[(hertz >= _TELEPHONE_HZ) & (hertz <= 7_500)]
    limit = max(voice * _GONE, rounding * _ABOVE_ROUNDING)
    return bool(voice > _LOUD_ENOUGH * limit / _ABOVE_ROUNDING and (high > limit).mean() < 0.05)


def _band_edges() -> npt.NDArray[np.int64]:
    hertz = np.geomspace(*_PRINT_HZ, _PRINT_BANDS + 1)
    return np.rint(hertz * _PRINT_FFT / SAMPLE_RATE).astype(np.int64)


def fingerprint(samples: Samples) -> npt.NDArray[np.uint32]:
    """Words of 32 bits [n], one every 64 ms of the first 10 s of int16 [T], that a gain does not change.

    A bit says whether the difference between two neighbouring bands grew since the frame before. Where a frame has
    next to no energy, the word is 0.

    >>> noise = np.random.default_rng(0).normal(0, 1000, 32000).astype(np.int16)
    >>> bool((fingerprint(noise) == fingerprint(2 * noise)).all())
    True
    """
    usable = samples[: int(FINGERPRINT_SECONDS * SAMPLE_RATE)]
    if len(usable) < _PRINT_FRAME + _PRINT_HOP:
        return np.zeros(0, np.uint32)
    frames = np.lib.stride_tricks.sliding_window_view(usable, _PRINT_FRAME)[::_PRINT_HOP]
    window = np.hanning(_PRINT_FRAME).astype(np.float32)
    spectra = np.fft.rfft(frames * window, _PRINT_FFT, axis=1)
    energy = np.square(spectra.real) + np.square(spectra.imag)
    bands = np.add.reduceat(energy, _band_edges(), axis=1)[:, :_PRINT_BANDS]
    # [n, 32]
    rises = np.diff(np.diff(bands, axis=1), axis=0) > 0
    words = np.packbits(rises, axis=1).view(">u4").astype(np.uint32).ravel()
    loud = bands.sum(axis=1)
    return np.where(loud[1:] > 1e-4 * loud.max(), words, np.uint32(0))
