"""Embeddings in two dimensions, to look at."""

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]

_MIN_POINTS = 10
_EXAGGERATION = 12.0
_EXAGGERATED_STEPS = 100
_STEPS = 500


def principal_components(points: ArrayLike) -> Floats:
    """Coordinates [N, 2] of points [N, D] along their two directions of largest variance."""
    centred = np.asarray(points, dtype=np.float64)
    centred = centred - centred.mean(axis=0)
    left, lengths, _ = np.linalg.svd(centred, full_matrices=False)
    coordinates = np.zeros((len(centred), 2))
    axes = min(2, len(lengths))
    coordinates[:, :axes] = left[:, :axes] * lengths[:axes]
    return coordinates


def neighbour_map(points: ArrayLike, perplexity: float = 20.0) -> Floats:
    """Map points [N, D] to [N, 2] so that neighbours stay neighbours: exact t-SNE (van der Maaten and Hinton 2008).

    Distances between far groups mean little in the result. It starts from the principal components, so nothing is drawn
    at random. Time and memory grow with N^2: 1000 points take some seconds. Fewer than 10 points are mapped to their
    principal components.

    Args:
        points: [N, D].
        perplexity: about how many neighbours a point has; at most a third of the points are used.
    """
    values = np.asarray(points, dtype=np.float64)
    start = principal_components(values)
    if len(values) < _MIN_POINTS or not start.any():
        return start
    affinities = _affinities(_squared_distances(values), min(perplexity, (len(values) - 1) / 3))
    return _descend(affinities, 1e-4 * start / start[:, 0].std())


def _squared_distances(points: Floats) -> Floats:
    norms = np.square(points).sum(axis=1)
    squares: Floats = np.maximum(norms[:, None] + norms[None, :] - 2 * points @ points.T, 0)
    return squares


def _affinities(distances: Floats, perplexity: float) -> Floats:
    """Symmetric neighbour probabilities [N, N]; bisection finds each point's width for the wanted perplexity."""
    num = len(distances)
    shifted = distances + np.diag(np.full(num, np.inf))
    shifted -= shifted.min(axis=1, keepdims=True)
    scale = np.median(distances[distances > 0])
    low, high = np.full(num, -40.0), np.full(num, 40.0)
    for _ in range(60):
        middle = (low + high) / 2
        weights = np.exp(-shifted * (np.exp(middle) / scale)[:, None])
        weights /= weights.sum(axis=1, keepdims=True)
        entropy = -(weights * np.log(np.maximum(weights, 1e-300))).sum(axis=1)
        is_too_wide = entropy > np.log(perplexity)
        low, high = np.where(is_too_wide, middle, low), np.where(is_too_wide, high, middle)
    symmetric: Floats = np.maximum((weights + weights.T) / (2 * num), 1e-15)
    return symmetric


def _descend(affinities: Floats, start: Floats) -> Floats:
    """Gradient descent on the Kullback-Leibler divergence, with momentum, gains and early exaggeration."""
    places, velocity, gains = start, np.zeros_like(start), np.ones_like(start)
    rate = max(len(start) / _EXAGGERATION / 4, 50.0)
    for step in range(_STEPS):
        kernel = 1 / (1 + _squared_distances(places))
        np.fill_diagonal(kernel, 0)
        exaggeration = _EXAGGERATION if step < _EXAGGERATED_STEPS else 1.0
        pulls = (exaggeration * affinities - kernel / kernel.sum()) * kernel
        gradient = 4 * (pulls.sum(axis=1)[:, None] * places - pulls @ places)
        is_turning = np.sign(gradient) == np.sign(velocity)
        gains = np.maximum(np.where(is_turning, gains * 0.8, gains + 0.2), 0.01)
        velocity = (0.5 if step < _EXAGGERATED_STEPS else 0.8) * velocity - rate * gains * gradient
        places = places + velocity
        places -= places.mean(axis=0)
    return places
