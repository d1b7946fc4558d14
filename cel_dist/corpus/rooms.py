"""Simulated rooms: early reflections by the image method, and an exponentially decaying diffuse tail."""

import numpy as np
from numpy.typing import NDArray

from cel_dist.corpus import SAMPLE_RATE_HZ

_SPEED_OF_SOUND = 343.0
# Direct sound arrives here, so that responses of different distances delay speech by the same time.
_DIRECT_SAMPLE = 32
# From here on reflections are too dense to be told apart; the mixing time of a room of ordinary size.
_MIXING_SECONDS = 0.03
_IMAGE_ORDER = 5


def draw_response(
    rng: np.random.Generator,
    *,
    t60_seconds: float,
    distance_meters: tuple[float, float] = (0.3, 2.5),
    max_seconds: float = 0.9,
) -> NDArray[np.float32]:
    """Draw a rectangular room, a source and a microphone in it.

    Args:
        rng: draws size, places and the diffuse tail.
        t60_seconds: time in which the energy decays by 60 dB.
        distance_meters: range of the distance between source and microphone.
        max_seconds: longest response; it ends earlier where 50 dB of decay are reached.

    Returns:
        [L] float32 at 16 kHz: the direct sound at 2 ms with a peak of 0.9, reflections relative to it.
    """
    length = int(min(max_seconds, t60_seconds * 50 / 60 + 0.01) * SAMPLE_RATE_HZ) + _DIRECT_SAMPLE
    response = np.zeros(length)
    delays, gains = _images(rng, t60_seconds, distance_meters)
    places = np.rint(delays * SAMPLE_RATE_HZ).astype(int) + _DIRECT_SAMPLE
    early = (delays < _MIXING_SECONDS) & (places < length)
    np.add.at(response, places[early], gains[early])
    response += _tail(rng, t60_seconds, length, response)
    scaled: NDArray[np.float32] = (response * (0.9 / np.abs(response).max())).astype(np.float32)
    return scaled


def _images(
    rng: np.random.Generator, t60_seconds: float, distance_meters: tuple[float, float]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Delays after the direct sound in seconds, and amplitudes relative to it, of all image sources.

    Allen and Berkley, Image method for efficiently simulating small-room acoustics, JASA 65(4), 1979. The amplitude of
    a wall reflection comes from Sabine's formula, T60 = 0.161 V / (S a), with one absorption for all walls.
    """
    size = rng.uniform([2.5, 2.5, 2.3], [9.0, 7.0, 3.5])
    microphone = rng.uniform(0.3, size - 0.3)
    direction = rng.standard_normal(3)
    away = rng.uniform(*distance_meters) * direction / np.linalg.norm(direction)
    source = np.clip(microphone + away, 0.2, size - 0.2)

    surface = 2 * (size[0] * size[1] + size[1] * size[2] + size[0] * size[2])
    absorption = min(0.161 * float(np.prod(size)) / (surface * t60_seconds), 0.95)
    reflection = np.sqrt(1 - absorption)

    steps = np.arange(-_IMAGE_ORDER, _IMAGE_ORDER + 1)
    order = np.stack(np.meshgrid(steps, steps, steps, indexing="ij"), axis=-1).reshape(-1, 3)
    # In one dimension, image n lies in the n-th mirror of the room: even mirrors are shifted copies, odd ones flipped.
    places = np.where(order % 2 == 0, order * size + source, (order + 1) * size - source)
    distances = np.linalg.norm(places - microphone, axis=1)
    direct = max(float(np.linalg.norm(source - microphone)), 0.1)
    gains = reflection ** np.abs(order).sum(axis=1) * direct / np.maximum(distances, direct)
    return (distances - direct) / _SPEED_OF_SOUND, gains


def _tail(rng: np.random.Generator, t60_seconds: float, length: int, early: NDArray[np.float64]) -> NDArray[np.float64]:
    """Decaying noise that carries on at the level which the early reflections have reached at the mixing time."""
    seconds = (np.arange(length) - _DIRECT_SAMPLE) / SAMPLE_RATE_HZ
    decay = 10 ** (-3 * seconds / t60_seconds)
    reflections = (seconds > 0.002) & (seconds < _MIXING_SECONDS)
    level = np.sqrt(np.sum(early[reflections] ** 2) / np.sum(decay[reflections] ** 2))
    rise = np.clip(seconds / _MIXING_SECONDS, 0, 1) ** 2
    tail: NDArray[np.float64] = rng.standard_normal(length) * level * decay * rise
    return tail
