"""Verification metrics: equal error rate, detection cost and the DET curve, from scores and labels."""

from typing import Any

import numpy as np
import numpy.typing as npt

from cel_dist.errors import CelError

Floats = npt.NDArray[np.float64]


def eer(scores: npt.ArrayLike, labels: npt.ArrayLike) -> float:
    """Equal error rate as a fraction: the larger error rate at the corner of the ROC where the two are closest.

    Args:
        scores: [N] scores, larger meaning more alike.
        labels: [N] 1 for a target trial (same speaker), 0 for a non-target trial.

    Raises:
        CelError: no trials, lengths that differ, a score that is not finite, a label that is neither 0 nor 1, or trials
            of one class only.

    >>> eer([0.9, 0.8, 0.7, 0.1], [1, 0, 1, 0])
    0.5
    """
    false_accepts, false_rejects, _ = det_points(scores, labels)
    nearest = np.argmin(np.abs(false_rejects - false_accepts))
    return float(max(false_accepts[nearest], false_rejects[nearest]))


def eer_threshold(scores: npt.ArrayLike, labels: npt.ArrayLike) -> float:
    """Threshold of the operating point of `eer`; scores of at least this are accepted. Raises as `eer`."""
    false_accepts, false_rejects, thresholds = det_points(scores, labels)
    return float(thresholds[np.argmin(np.abs(false_rejects - false_accepts))])


def min_dcf(
    scores: npt.ArrayLike, labels: npt.ArrayLike, p_target: float = 0.05, c_miss: float = 1, c_fa: float = 1
) -> float:
    """Smallest detection cost over all thresholds, divided by that of the better constant decision (NIST SRE).

    min over thresholds of c_miss * p_target * FNR + c_fa * (1 - p_target) * FPR. As in the published scoring, a
    threshold may fall between trials of equal score, in the order in which they come: ties lower the cost a little.

    Args:
        scores: [N] scores, larger meaning more alike.
        labels: [N] 1 for a target trial, 0 for a non-target trial.
        p_target: prior probability of a target trial, between 0 and 1.
        c_miss: cost of rejecting a target, positive.
        c_fa: cost of accepting a non-target, positive.

    Raises:
        CelError: as `eer`, `p_target` is not between 0 and 1, or a cost is not positive.
    """
    if not 0 < p_target < 1:
        raise CelError(f"p_target is {p_target}; give a probability between 0 and 1, both excluded")
    if c_miss <= 0 or c_fa <= 0:
        raise CelError(f"the costs are c_miss={c_miss} and c_fa={c_fa}; give positive ones")
    _, sorted_labels = _sorted_trials(scores, labels)
    # Trials accepted at each threshold, from "nothing" to "everything".
    accepted_targets = np.append(0, np.cumsum(sorted_labels))
    accepted = np.arange(len(accepted_targets))
    miss = 1 - accepted_targets / accepted_targets[-1]
    false_accept = (accepted - accepted_targets) / (accepted[-1] - accepted_targets[-1])
    cost = c_miss * p_target * miss + c_fa * (1 - p_target) * false_accept
    return float(cost.min() / min(c_miss * p_target, c_fa * (1 - p_target)))


def det_points(scores: npt.ArrayLike, labels: npt.ArrayLike) -> tuple[Floats, Floats, Floats]:
    """Corners of the detection error trade-off curve, from "accept nothing" to "accept everything".

    Trials of equal score are accepted together, and points on a straight line between two others are left out: the same
    curve from fewer points. Raises as `eer`.

    Returns:
        false positive rates, false negative rates and thresholds, each [P] float64. A trial is accepted when its score
        is at least the threshold; the first threshold is just above the highest score.
    """
    sorted_scores, sorted_labels = _sorted_trials(scores, labels)
    last_of_ties = np.append(np.flatnonzero(np.diff(sorted_scores)), len(sorted_scores) - 1)
    targets = np.cumsum(sorted_labels)[last_of_ties]
    non_targets = last_of_ties + 1 - targets
    corner = np.ones(len(targets), dtype=bool)
    corner[1:-1] = (np.diff(targets, 2) != 0) | (np.diff(non_targets, 2) != 0)
    false_accepts = np.append(0, non_targets[corner]) / non_targets[-1]
    false_rejects = 1 - np.append(0, targets[corner]) / targets[-1]
    # Just above the highest score rather than infinite: a threshold is stored with the model, and JSON has no infinity.
    thresholds = np.append(np.nextafter(sorted_scores[0], np.inf), sorted_scores[last_of_ties][corner])
    return false_accepts, false_rejects, thresholds


def _sorted_trials(scores: npt.ArrayLike, labels: npt.ArrayLike) -> tuple[Floats, npt.NDArray[np.int64]]:
    """Checked scores and labels in descending order of the score."""
    values = np.asarray(scores, dtype=np.float64)
    classes: npt.NDArray[Any] = np.asarray(labels)
    if values.ndim != 1 or classes.ndim != 1 or len(values) != len(classes):
        raise CelError(f"scores {values.shape} and labels {classes.shape} must be two lists of the same length")
    if len(values) == 0:
        raise CelError("there are no trials to score; check the trials file")
    finite = np.isfinite(values)
    if not finite.all():
        first = int(np.argmin(finite))
        raise CelError(
            f"{np.count_nonzero(~finite)} scores are not finite, the first at trial {first}; check the model"
        )
    targets = classes == 1
    if not np.all(targets | (classes == 0)):
        first = int(np.argmin(targets | (classes == 0)))
        raise CelError(f"label {classes[first]} at trial {first} is neither 1 (target) nor 0 (non-target)")
    if targets.all() or not targets.any():
        kind = "target" if targets[0] else "non-target"
        raise CelError(f"all {len(values)} trials are {kind} trials; error rates need target and non-target trials")
    # Reversing a stable ascending sort fixes the order of ties to that of the published scoring.
    order = np.argsort(values, kind="stable")[::-1]
    return values[order], targets[order].astype(np.int64)
