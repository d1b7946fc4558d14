"""Simple synthetic music: chords, a melody and a beat, with a timbre for each piece."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cel_dist.corpus import SAMPLE_RATE_HZ

_MAJOR, _MINOR = (0, 2, 4, 5, 7, 9, 11), (0, 2, 3, 5, 7, 8, 10)
# Chord roots as degrees of the scale; common endings and turnarounds.
_PROGRESSIONS = ((0, 4, 5, 3), (0, 3, 4, 0), (5, 3, 0, 4), (0, 5, 1, 4), (1, 4, 0, 0))

Wave = NDArray[np.float64]


@dataclass(frozen=True)
class _Instrument:
    harmonics: NDArray[np.float64]
    attack_seconds: float
    decay_seconds: float
    vibrato: float

    def play(self, frequency_hz: float, num_samples: int) -> Wave:
        time = np.arange(num_samples) / SAMPLE_RATE_HZ
        phase = 2 * np.pi * frequency_hz * time + self.vibrato * np.sin(2 * np.pi * 5.5 * time)
        # Partials above the Nyquist frequency would fold back as false tones.
        tone = np.zeros(num_samples)
        for k, amplitude in enumerate(self.harmonics, start=1):
            if k * frequency_hz < SAMPLE_RATE_HZ / 2:
                tone += amplitude * np.sin(k * phase)
        envelope = np.minimum(time / self.attack_seconds, 1) * np.exp(-time / self.decay_seconds)
        release = np.minimum((num_samples - np.arange(num_samples)) / 200, 1)
        note: Wave = tone * envelope * release
        return note


def draw_music(rng: np.random.Generator, num_samples: int) -> Wave:
    """Draw a piece of music; [num_samples] at 16 kHz, of any level.

    >>> draw_music(np.random.default_rng(0), 16_000).shape
    (16000,)
    """
    beat = int(SAMPLE_RATE_HZ * 60 / rng.uniform(70, 160))
    scale, tonic_hz = (_MAJOR if rng.random() < 0.5 else _MINOR), 110 * 2 ** rng.uniform(0, 1)
    progression = _PROGRESSIONS[rng.integers(len(_PROGRESSIONS))]
    pad, lead = _draw_instrument(rng, sustained=True), _draw_instrument(rng, sustained=rng.random() < 0.5)
    with_drums = rng.random() < 0.6
    wave = np.zeros(num_samples + 4 * beat)

    def pitch_hz(degree: int) -> float:
        octave, step = divmod(degree, len(scale))
        return float(tonic_hz * 2 ** (octave + scale[step] / 12))

    for number, start in enumerate(range(0, num_samples, beat)):
        root = progression[number // 4 % 4]
        if number % 4 == 0:
            for degree in (root, root + 2, root + 4):
                wave[start : start + 4 * beat] += 0.3 * pad.play(pitch_hz(degree), 4 * beat)
        if rng.random() < 0.8:
            length = beat * int(rng.integers(1, 3))
            wave[start : start + length] += 0.5 * lead.play(pitch_hz(root + int(rng.integers(5, 15))), length)
        if with_drums:
            wave[start : start + beat] += _drum(rng, beat, low=number % 2 == 0)
    return wave[:num_samples]


def _draw_instrument(rng: np.random.Generator, *, sustained: bool) -> _Instrument:
    harmonics = rng.uniform(0.2, 1, 8) / np.arange(1, 9) ** rng.uniform(0.7, 2)
    return _Instrument(
        harmonics=harmonics / harmonics.sum(),
        attack_seconds=rng.uniform(0.02, 0.15) if sustained else 0.005,
        decay_seconds=rng.uniform(1.5, 5) if sustained else rng.uniform(0.15, 0.5),
        vibrato=rng.uniform(0, 0.3) if sustained else 0.0,
    )


def _drum(rng: np.random.Generator, num_samples: int, *, low: bool) -> Wave:
    time = np.arange(num_samples) / SAMPLE_RATE_HZ
    if low:
        body, decay_seconds = 0.7 * np.sin(2 * np.pi * 60 * time + 8 * np.exp(-time / 0.03)), 0.12
    else:
        body, decay_seconds = 0.3 * rng.standard_normal(num_samples), 0.05
    sound: Wave = body * np.exp(-time / decay_seconds)
    return sound
