"""Synthetic noises: coloured, modulated, impulsive and harmonic."""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from scipy import fft, signal

from cel_dist.corpus import SAMPLE_RATE_HZ

Wave = NDArray[np.float64]


def draw_noise(rng: np.random.Generator, kind: str, num_samples: int) -> Wave:
    """Draw a noise of one of the `KINDS`; [num_samples] at 16 kHz, of any level.

    >>> draw_noise(np.random.default_rng(0), "hum", 16_000).shape
    (16000,)
    """
    return KINDS[kind](rng, num_samples)


def coloured(rng: np.random.Generator, num_samples: int, slope_db: float) -> Wave:
    """Gaussian noise whose spectral density falls by `slope_db` an octave (0 white, 3 pink, 6 brown)."""
    size = fft.next_fast_len(num_samples, real=True)
    frequencies = np.maximum(fft.rfftfreq(size, 1 / SAMPLE_RATE_HZ), 40)
    spectrum = fft.rfft(rng.standard_normal(size)) * (frequencies / 1000) ** (-slope_db / 6.02)
    wave: Wave = fft.irfft(spectrum, size)[:num_samples]
    return wave


def _steady(rng: np.random.Generator, num_samples: int) -> Wave:
    return coloured(rng, num_samples, rng.uniform(-3, 9))


def _surging(rng: np.random.Generator, num_samples: int) -> Wave:
    """Wind, surf, passing cars: the level wanders slowly over 20 dB."""
    knots = rng.uniform(-20, 0, max(4, num_samples // int(rng.uniform(4_000, 16_000))))
    level_db = np.interp(np.linspace(0, len(knots) - 1, num_samples), np.arange(len(knots)), knots)
    wave: Wave = coloured(rng, num_samples, rng.uniform(1, 8)) * 10 ** (level_db / 20)
    return wave


def _throbbing(rng: np.random.Generator, num_samples: int) -> Wave:
    """Engines, rotors and fans: noise that beats at a constant rate."""
    beat = np.sin(2 * np.pi * rng.uniform(4, 30) * np.arange(num_samples) / SAMPLE_RATE_HZ + rng.uniform(0, 6.28))
    wave: Wave = coloured(rng, num_samples, rng.uniform(2, 7)) * (1 + rng.uniform(0.4, 1) * beat) ** 2
    return wave


def _hum(rng: np.random.Generator, num_samples: int) -> Wave:
    """Mains and machinery: harmonics of a steady tone over a noise floor."""
    phase = 2 * np.pi * rng.choice([50, 60, rng.uniform(70, 400)]) * np.arange(num_samples) / SAMPLE_RATE_HZ
    fall = rng.uniform(0.5, 1.5)
    floor = coloured(rng, num_samples, rng.uniform(0, 5))
    wave: Wave = floor / floor.std() * rng.uniform(0.1, 0.6)
    for k in range(1, 13):
        wave += np.sin(k * phase + rng.uniform(0, 6.28)) * rng.uniform(0.2, 1) / k**fall
    return wave


def _impulses(rng: np.random.Generator, num_samples: int) -> Wave:
    """Clicks, knocks, footsteps and typing: decaying resonant bursts at random times."""
    wave = 0.01 * rng.standard_normal(num_samples)
    decay = np.exp(-np.arange(3_200) / rng.uniform(30, 600))
    low = rng.uniform(100, 3000)
    band = signal.butter(2, [low, min(low * rng.uniform(1.5, 4), 7500)], "bandpass", fs=SAMPLE_RATE_HZ, output="sos")
    for start in rng.integers(0, num_samples, rng.integers(4, 16) * num_samples // SAMPLE_RATE_HZ):
        burst = signal.sosfilt(band, rng.standard_normal(len(decay)) * decay) * rng.uniform(0.2, 1)
        room = min(len(burst), num_samples - start)
        wave[start : start + room] += burst[:room]
    return wave


def _crackle(rng: np.random.Generator, num_samples: int) -> Wave:
    """Fire, rain on a roof, old records: many tiny clicks through a resonance."""
    clicks = rng.standard_normal(num_samples) ** 3 * (rng.random(num_samples) < rng.uniform(0.002, 0.05))
    centre = rng.uniform(600, 5000)
    band = signal.butter(1, [centre / 1.6, min(centre * 1.6, 7800)], "bandpass", fs=SAMPLE_RATE_HZ, output="sos")
    floor = coloured(rng, num_samples, rng.uniform(0, 6))
    crackle = signal.sosfilt(band, clicks)
    wave: Wave = crackle / crackle.std() + floor / floor.std() * rng.uniform(0.05, 0.5)
    return wave


def _siren(rng: np.random.Generator, num_samples: int) -> Wave:
    """Alarms, sirens and birds: tones that glide or repeat."""
    time = np.arange(num_samples) / SAMPLE_RATE_HZ
    swing = np.sin(2 * np.pi * rng.uniform(0.3, 6) * time)
    contour = swing if rng.random() < 0.6 else np.sign(swing)
    frequency_hz = rng.uniform(500, 2500) * 2 ** (rng.uniform(0.05, 0.7) * contour)
    phase = 2 * np.pi * np.cumsum(frequency_hz) / SAMPLE_RATE_HZ
    gate = np.clip(3 * np.sin(2 * np.pi * rng.uniform(0.5, 4) * time) + rng.uniform(0, 3), 0, 1)
    tone: Wave = (np.sin(phase) + rng.uniform(0, 0.5) * np.sin(2 * phase)) * gate
    return tone + 0.05 * coloured(rng, num_samples, 3)


KINDS: dict[str, Callable[[np.random.Generator, int], Wave]] = {
    "steady": _steady,
    "surging": _surging,
    "throbbing": _throbbing,
    "hum": _hum,
    "impulses": _impulses,
    "crackle": _crackle,
    "siren": _siren,
}
"""The kinds of noise by name."""
