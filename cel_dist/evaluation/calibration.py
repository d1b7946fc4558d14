"""Scores to probabilities."""

import hashlib

import numpy as np
from numpy.typing import ArrayLike, NDArray

from cel_dist.description import Calibration
from cel_dist.errors import CelError
from cel_dist.evaluation.trials import Trials

Floats = NDArray[np.float64]

_RIDGE = 1e-4
"""Penalty on the slopes per standard deviation of what they multiply. It hardly moves the fit of overlapping classes,
and keeps the slopes finite where they do not overlap."""


def fit_calibration(scores: ArrayLike, labels: ArrayLike, seconds: ArrayLike | None = None) -> Calibration:
    """Logistic regression of the label on the score, with both classes weighing the same (equal priors).

    With `seconds` the logarithm of the shorter duration is a second regressor (a quality measure: Mandasari et al.
    2013, doi 10.1109/TASL.2013.2279332): short utterances give distances of another size, and the sum is what the
    score would be worth at a usual duration. Minimises Cllr (Brümmer and du Preez 2006, doi 10.1016/j.csl.2005.08.001)
    plus a small ridge, by Newton's method with step halving.

    Args:
        scores: [M] finite scores.
        labels: [M] 1 for target and 0 for non-target trials, at least one of each.
        seconds: [M] duration of the shorter utterance of each trial. Default: durations do not count.

    Raises:
        CelError: a duration is not positive.

    >>> calibration = fit_calibration([-1.2, -1.0, -0.8, -0.4], [0, 1, 0, 1])
    >>> calibration.slope > 0
    True
    """
    values = np.asarray(scores, dtype=np.float64)
    targets = np.asarray(labels) == 1
    columns = [values]
    reference = 1.0
    if seconds is not None:
        durations = np.asarray(seconds, dtype=np.float64)
        if not (durations > 0).all():
            raise CelError(f"the duration of trial {int(np.argmin(durations))} is not positive; check its audio")
        reference = float(np.exp(np.log(durations).mean()))
        columns.append(np.log(durations / reference))
    regressors = np.stack(columns, axis=1)
    centres, spreads = regressors.mean(axis=0), regressors.std(axis=0)
    # What is the same in all trials tells nothing; rounding leaves a trace of a spread.
    tells = spreads > 1e-12 * np.maximum(np.abs(centres), 1)
    slopes = np.zeros(len(columns))
    offset = 0.0
    if tells.any():
        point = _minimise((regressors[:, tells] - centres[tells]) / spreads[tells], targets)
        slopes[tells] = point[:-1] / spreads[tells]
        offset = float(point[-1] - slopes @ centres)
    if seconds is None:
        return Calibration(slope=float(slopes[0]), offset=offset)
    return Calibration(
        slope=float(slopes[0]),
        offset=offset,
        quality="duration",
        duration_slope=float(slopes[1]),
        reference_seconds=reference,
    )


def fingerprint(trials: Trials) -> str:
    """SHA-256 of the trials, names, labels and order, in hexadecimal: the same list has the same one."""
    digest = hashlib.sha256("\n".join(trials.files).encode())
    for column in (trials.labels, trials.enrol, trials.test):
        digest.update(column.tobytes())
    return digest.hexdigest()


def _minimise(regressors: Floats, targets: NDArray[np.bool_]) -> Floats:
    """Slopes and offset [R + 1] for standardised regressors [M, R]."""
    weights = np.where(targets, 0.5 / targets.sum(), 0.5 / (~targets).sum())
    design = np.column_stack([regressors, np.ones(len(regressors))])
    size = design.shape[1]
    signs = np.where(targets, 1.0, -1.0)
    ridge = np.diag([_RIDGE] * (size - 1) + [0.0])

    def cost(point: Floats) -> float:
        return float(weights @ np.logaddexp(0, -signs * (design @ point)) + 0.5 * point @ ridge @ point)

    point, current = np.zeros(size), float(np.log(2))
    for _ in range(100):
        probabilities = _sigmoid(design @ point)
        gradient = design.T @ (weights * (probabilities - targets)) + ridge @ point
        curvature = (design * (weights * probabilities * (1 - probabilities))[:, None]).T @ design + ridge
        # The offset has no ridge; far out its curvature may underflow, and a tiny one keeps the system solvable.
        step = np.linalg.solve(curvature + 1e-12 * np.eye(size), gradient)
        length = 1.0
        while cost(point - length * step) > current and length > 1e-8:
            length /= 2
        point = point - length * step
        previous, current = current, cost(point)
        if previous - current < 1e-14:
            break
    return point


def _sigmoid(x: Floats) -> Floats:
    return 0.5 + 0.5 * np.tanh(0.5 * x)
