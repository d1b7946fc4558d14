"""Scores to probabilities."""

import numpy as np
from numpy.typing import ArrayLike, NDArray

from cel_dist.description import Calibration

_RIDGE = 1e-4
"""Penalty on the slope per standard deviation of the scores. It hardly moves the fit of overlapping classes, and keeps
the slope finite where they do not overlap."""


def fit_calibration(scores: ArrayLike, labels: ArrayLike) -> Calibration:
    """Logistic regression of the label on the score, with both classes weighing the same (equal priors).

    Minimises Cllr (Brümmer and du Preez 2006, doi 10.1016/j.csl.2005.08.001) plus a small ridge, by Newton's method
    with step halving.

    Args:
        scores: [M] finite scores.
        labels: [M] 1 for target and 0 for non-target trials, at least one of each.

    >>> calibration = fit_calibration([-1.2, -1.0, -0.8, -0.4], [0, 1, 0, 1])
    >>> calibration.slope > 0
    True
    """
    values = np.asarray(scores, dtype=np.float64)
    targets = np.asarray(labels) == 1
    centre, spread = values.mean(), values.std()
    if spread == 0:
        return Calibration(slope=0.0, offset=0.0)
    weights = np.where(targets, 0.5 / targets.sum(), 0.5 / (~targets).sum())
    design = np.stack([(values - centre) / spread, np.ones_like(values)], axis=1)
    signs = np.where(targets, 1.0, -1.0)
    ridge = np.diag([_RIDGE, 0.0])

    def cost(point: NDArray[np.float64]) -> float:
        return float(weights @ np.logaddexp(0, -signs * (design @ point)) + 0.5 * point @ ridge @ point)

    point, current = np.zeros(2), float(np.log(2))
    for _ in range(100):
        probabilities = _sigmoid(design @ point)
        gradient = design.T @ (weights * (probabilities - targets)) + ridge @ point
        curvature = (design * (weights * probabilities * (1 - probabilities))[:, None]).T @ design + ridge
        # The offset has no ridge; far out its curvature may underflow, and a tiny one keeps the system solvable.
        step = np.linalg.solve(curvature + 1e-12 * np.eye(2), gradient)
        size = 1.0
        while cost(point - size * step) > current and size > 1e-8:
            size /= 2
        point = point - size * step
        previous, current = current, cost(point)
        if previous - current < 1e-14:
            break
    slope = point[0] / spread
    return Calibration(slope=float(slope), offset=float(point[1] - slope * centre))


def _sigmoid(x: NDArray[np.float64]) -> NDArray[np.float64]:
    return 0.5 + 0.5 * np.tanh(0.5 * x)
