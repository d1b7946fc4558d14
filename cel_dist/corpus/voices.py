"""What makes a synthetic speaker: timbre, accent, formant scale, pitch, intonation and rate."""

import math
from dataclasses import dataclass

import numpy as np
import soxr
from numpy.typing import NDArray

from cel_dist.corpus import SAMPLE_RATE_HZ, espeak
from cel_dist.corpus.randomness import generator

# Variants of the engine that sound human and unlike each other. Whispered, robotic and reverberant ones are left out,
# and of those that differ by a few per cent in one formant only one is kept.
_VARIANTS = (
    *(
        "f1",
        "m3",
        "Andy",
        "belinda",
        "david",
        "m7",
        "aunty",
        "Diogo",
        "Gene",
        "steph",
        "iven3",
        "klatt5",
        "Annie",
        "rob",
    ),
    *("quincy", "shelby", "Michael", "travis", "f3", "m8", "norbert", "Alicia", "Nguyen", "paul", "grandma", "Reed"),
    *("Hugo", "anika", "victor", "john", "f5", "Lee", "boris", "Andrea", "sandro", "miguel", "zac", "Mike"),
)
_ACCENTS = (
    *("en-us", "en", "en-gb-scotland", "en-gb-x-rp"),
    *("en-gb-x-gbclan", "en-gb-x-gbcwmd", "en-029", "en-us-nyc"),
)
# Range of each continuous parameter. The formant scale carries the most identity: 15 % is about the difference between
# the vocal tracts of an average woman and an average man.
_FORMANT_SCALE = (0.87, 1.15)
_PITCH_SCALE = (0.82, 1.22)
_PITCH_RANGE = (25.0, 75.0)
_RATE_WPM = (140.0, 210.0)
# Weight of each parameter's range, in the order above, when two voices are compared, and what another timbre or accent
# adds.
_WEIGHTS = np.array([2.0, 1.0, 0.4, 0.6])
_OTHER_VARIANT = 0.7
_OTHER_ACCENT = 0.2
_CANDIDATES = 48
# Logarithm of the frequency ratio of one step of the engine's pitch parameter, measured on several variants between 20
# and 80.
_LOG_PITCH_STEP = 0.0112


@dataclass(frozen=True)
class Voice:
    """The parameters that all utterances of a speaker share."""

    variant: str
    """Variant of the engine's voice: formant pattern, voicing, breath."""
    accent: str
    """English accent, as the engine names it."""
    formant_scale: float
    """Factor on all formant frequencies; above 1 is a shorter vocal tract."""
    pitch_scale: float
    """Factor on the fundamental frequency of the variant."""
    pitch_range: float
    """Liveliness of the intonation, 0 to 99; 50 is the engine's default."""
    rate_wpm: float
    """Speaking rate in words per minute."""

    def coordinates(self) -> NDArray[np.float64]:
        """[4] the continuous parameters, each in units of its range times its weight."""
        values = (self.formant_scale, self.pitch_scale, self.pitch_range, self.rate_wpm)
        ranges = (_FORMANT_SCALE, _PITCH_SCALE, _PITCH_RANGE, _RATE_WPM)
        unit = [(value - low) / (high - low) for value, (low, high) in zip(values, ranges, strict=True)]
        coordinates: NDArray[np.float64] = np.array(unit) * _WEIGHTS
        return coordinates


@dataclass(frozen=True)
class Delivery:
    """How one utterance differs from the speaker's habit: factors on pitch and rate."""

    pitch: float = 1.0
    rate: float = 1.0


def distance(first: Voice, second: Voice) -> float:
    """How far two voices are from each other: 0 for the same, above 0.7 for two timbres, at most about 4."""
    gap = float(np.linalg.norm(first.coordinates() - second.coordinates()))
    return gap + _OTHER_VARIANT * (first.variant != second.variant) + _OTHER_ACCENT * (first.accent != second.accent)


def draw_voices(count: int, seed: int) -> list[Voice]:
    """Draw speakers that keep their distance from each other.

    Timbres come in turn, so that each is used about equally often. Of a few dozen candidates for the next speaker the
    one furthest from all earlier speakers of that timbre is taken (Mitchell's best-candidate sampling). A longer list
    starts with the shorter one.
    """
    voices: list[Voice] = []
    order = generator(seed, "variants").permutation(len(_VARIANTS))
    for number in range(count):
        variant = _VARIANTS[order[number % len(_VARIANTS)]]
        candidates = _candidates(variant, generator(seed, "voice", number))
        rivals = [voice for voice in voices if voice.variant == variant]
        voices.append(max(candidates, key=lambda voice: min((distance(voice, rival) for rival in rivals), default=0.0)))
    return voices


def speak(voice: Voice, text: str, delivery: Delivery) -> NDArray[np.float32]:
    """Speak a text with a voice; [T] float32 at 16 kHz, within -1 and 1.

    Formants are scaled by playing the engine's output faster or slower. That scales pitch and rate too, so the engine
    is asked for the inverse of both.

    Raises:
        CelError: espeakng_loader is not installed.
        RunError: the engine fails.
    """
    scale = voice.formant_scale
    pitch = round(50 + math.log(voice.pitch_scale * delivery.pitch / scale) / _LOG_PITCH_STEP)
    samples = espeak.speak(
        text,
        voice=f"{voice.accent}+{voice.variant}",
        rate_wpm=round(voice.rate_wpm * delivery.rate / scale),
        pitch=min(max(pitch, 0), 99),
        pitch_range=round(voice.pitch_range),
    )
    wave: NDArray[np.float32] = soxr.resample(
        samples.astype(np.float32) / 32768, espeak.SAMPLE_RATE_HZ * scale, SAMPLE_RATE_HZ, quality="MQ"
    )
    return wave


def _candidates(variant: str, rng: np.random.Generator) -> list[Voice]:
    # Four digits, so that speakers.tsv holds exactly what was spoken.
    def draw(low: float, high: float) -> float:
        return round(float(rng.uniform(low, high)), 4)

    return [
        Voice(
            variant=variant,
            accent=_ACCENTS[rng.integers(len(_ACCENTS))],
            formant_scale=draw(*_FORMANT_SCALE),
            pitch_scale=draw(*_PITCH_SCALE),
            pitch_range=draw(*_PITCH_RANGE),
            rate_wpm=draw(*_RATE_WPM),
        )
        for _ in range(_CANDIDATES)
    ]
