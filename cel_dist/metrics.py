"""Verification metrics: equal error rate, detection costs, the DET curve and Cllr, from scores and labels."""

from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from cel_dist.errors import CelError

Floats = npt.NDArray[np.float64]
Counts = npt.NDArray[np.int64]


class RankedTrials:
    """Scored trials in descending order of the score, sorted once for all measures of them.

    Four million trials take about a second and 350 MB. The functions of this module that take scores and labels make
    one of these; make it yourself for more than one measure.

    Args:
        scores: [M] scores, larger meaning more alike.
        labels: [M] 1 for a target trial (same speaker), 0 for a non-target trial.

    Attributes:
        scores: float64 [M], from the highest to the lowest.
        is_target: bool [M], in the order of `scores`. Equal scores come in the reverse of their order in the list, as
            in the published scoring.

    Raises:
        CelError: no trials, lengths that differ, a score that is not finite, a label that is neither 0 nor 1, or trials
            of one class only.

    >>> ranked = RankedTrials([0.9, 0.8, 0.7, 0.1], [1, 0, 1, 0])
    >>> ranked.eer, ranked.min_dcf(p_target=0.5)
    (0.5, 0.5)
    """

    def __init__(self, scores: npt.ArrayLike, labels: npt.ArrayLike) -> None:
        values, targets = _checked(scores, labels)
        self._values = values
        # Two plain sorts cost a quarter of one that gives the order. They tell it all unless both classes share scores.
        own, others = np.sort(values[targets]), np.sort(values[~targets])
        below = np.searchsorted(others, own)
        shared = others[np.minimum(below, len(others) - 1)] == own
        self.scores: Floats
        self.is_target: npt.NDArray[np.bool_]
        if shared.any():
            self.scores, self.is_target = values[self.order], targets[self.order]
            return
        ascending = np.zeros(len(values), dtype=bool)
        ascending[below + np.arange(len(own))] = True
        merged = np.empty(len(values))
        merged[ascending], merged[~ascending] = own, others
        self.scores, self.is_target = merged[::-1], ascending[::-1]

    @cached_property
    def order(self) -> Counts:
        """The trials in the order of `scores`, int64 [M]."""
        # Reversing a stable ascending sort fixes the order of ties to that of the published scoring.
        return np.argsort(self._values, kind="stable")[::-1]

    @property
    def eer(self) -> float:
        """Equal error rate as a fraction: the larger error rate at the corner of the ROC where the two are closest."""
        false_accepts, false_rejects, _ = self.det_points
        nearest = np.argmin(np.abs(false_rejects - false_accepts))
        return float(max(false_accepts[nearest], false_rejects[nearest]))

    @property
    def eer_threshold(self) -> float:
        """Threshold of the operating point of `eer`; scores of at least this are accepted."""
        false_accepts, false_rejects, thresholds = self.det_points
        return float(thresholds[np.argmin(np.abs(false_rejects - false_accepts))])

    def min_dcf(self, p_target: float = 0.05, c_miss: float = 1, c_fa: float = 1) -> float:
        """As the function `min_dcf`."""
        _check_costs(p_target, c_miss, c_fa)
        targets, accepted = self.turning_points
        miss = 1 - targets / targets[-1]
        false_accept = (accepted - targets) / (accepted[-1] - targets[-1])
        cost = c_miss * p_target * miss + c_fa * (1 - p_target) * false_accept
        return float(cost.min() / min(c_miss * p_target, c_fa * (1 - p_target)))

    @cached_property
    def turning_points(self) -> tuple[Counts, Counts]:
        """Accepted target trials, and accepted trials, where a cost can be smallest: both int64 [P].

        These are "nothing", "everything", and every place where a target trial was accepted last and a non-target trial
        would come next: to stop within a run of targets, or to go into a run of non-targets, only costs more.
        """
        ends = np.flatnonzero(self.is_target[:-1] & ~self.is_target[1:]) + 1
        accepted = np.concatenate([[0], ends, [len(self.is_target)]])
        return np.append(0, self._accepted_targets[accepted[1:] - 1]), accepted

    @cached_property
    def corners(self) -> tuple[Counts, Counts]:
        """Accepted target and non-target trials at the corners of the DET curve, int64 [P]: see `det_points`."""
        last, targets, non_targets = self._ties
        corner = np.ones(len(last), dtype=bool)
        corner[1:-1] = (np.diff(targets, 2) != 0) | (np.diff(non_targets, 2) != 0)
        return np.append(0, targets[corner]), np.append(0, non_targets[corner])

    @cached_property
    def det_points(self) -> tuple[Floats, Floats, Floats]:
        """As the function `det_points`."""
        return self._operating_points(*self.corners)

    def convex_hull(self) -> tuple[Floats, Floats, Floats]:
        """The operating points that are best for some prior and costs: the vertices of the convex hull of the ROC.

        A few hundred for millions of trials. Found by isotonic regression of the labels on the scores (Fawcett and
        Niculescu-Mizil 2007, doi 10.1007/s10994-007-5011-0).

        Returns:
            false positive rates, false negative rates and thresholds, each float64 [P], as `det_points` has them.
        """
        return self._operating_points(*self._hull)

    def min_cllr(self) -> float:
        """Smallest `cllr` of any calibration that keeps the order of the scores, in bits.

        The best such calibration gives all trials between two vertices of the convex hull of the ROC their ratio of
        error rates (Brümmer and du Preez 2006, section 6).
        """
        targets, non_targets = (np.diff(counts) / counts[-1] for counts in self._hull)
        with np.errstate(divide="ignore", invalid="ignore"):
            costs = np.where(targets > 0, targets * np.log2(1 + non_targets / targets), 0) + np.where(
                non_targets > 0, non_targets * np.log2(1 + targets / non_targets), 0
            )
        return float(costs.sum() / 2)

    @cached_property
    def _accepted_targets(self) -> Counts:
        return np.cumsum(self.is_target, dtype=np.int64)

    @cached_property
    def _ties(self) -> tuple[Counts, Counts, Counts]:
        """Of each group of equal scores: its last trial; targets, and non-targets, accepted with it. int64 [G]."""
        last = np.append(np.flatnonzero(self.scores[1:] != self.scores[:-1]), len(self.scores) - 1)
        targets = self._accepted_targets[last]
        return last, targets, last + 1 - targets

    @cached_property
    def _hull(self) -> tuple[Counts, Counts]:
        from scipy.optimize import isotonic_regression

        # The vertices are among the corners, which are fewer than the trials.
        targets, non_targets = self.corners
        sizes = np.diff(targets + non_targets)
        shares = np.diff(targets) / sizes
        vertices = isotonic_regression(shares, weights=sizes, increasing=False).blocks
        return targets[vertices], non_targets[vertices]

    def _operating_points(self, targets: Counts, non_targets: Counts) -> tuple[Floats, Floats, Floats]:
        # Just above the highest score rather than infinite: a threshold is stored with the model, and JSON has no
        # infinity.
        above = np.nextafter(self.scores[0], np.inf)
        thresholds = np.append(above, self.scores[targets[1:] + non_targets[1:] - 1])
        return non_targets / non_targets[-1], 1 - targets / targets[-1], thresholds


def eer(scores: npt.ArrayLike, labels: npt.ArrayLike) -> float:
    """Equal error rate as a fraction: the larger error rate at the corner of the ROC where the two are closest.

    Args:
        scores: [M] scores, larger meaning more alike.
        labels: [M] 1 for a target trial (same speaker), 0 for a non-target trial.

    Raises:
        CelError: no trials, lengths that differ, a score that is not finite, a label that is neither 0 nor 1, or trials
            of one class only.

    >>> eer([0.9, 0.8, 0.7, 0.1], [1, 0, 1, 0])
    0.5
    """
    return RankedTrials(scores, labels).eer


def eer_threshold(scores: npt.ArrayLike, labels: npt.ArrayLike) -> float:
    """Threshold of the operating point of `eer`; scores of at least this are accepted. Raises as `eer`."""
    return RankedTrials(scores, labels).eer_threshold


def min_dcf(
    scores: npt.ArrayLike, labels: npt.ArrayLike, p_target: float = 0.05, c_miss: float = 1, c_fa: float = 1
) -> float:
    """Smallest detection cost over all thresholds, divided by that of the better constant decision (NIST SRE).

    min over thresholds of c_miss * p_target * FNR + c_fa * (1 - p_target) * FPR. As in the published scoring, a
    threshold may fall between trials of equal score, in the order in which they come: ties lower the cost a little.

    Args:
        scores: [M] scores, larger meaning more alike.
        labels: [M] 1 for a target trial, 0 for a non-target trial.
        p_target: prior probability of a target trial, between 0 and 1.
        c_miss: cost of rejecting a target, positive.
        c_fa: cost of accepting a non-target, positive.

    Raises:
        CelError: as `eer`, `p_target` is not between 0 and 1, or a cost is not positive.
    """
    _check_costs(p_target, c_miss, c_fa)
    return RankedTrials(scores, labels).min_dcf(p_target, c_miss, c_fa)


def det_points(scores: npt.ArrayLike, labels: npt.ArrayLike) -> tuple[Floats, Floats, Floats]:
    """Corners of the detection error trade-off curve, from "accept nothing" to "accept everything".

    Trials of equal score are accepted together, and points on a straight line between two others are left out: the same
    curve from fewer points. Raises as `eer`.

    Returns:
        false positive rates, false negative rates and thresholds, each [P] float64. A trial is accepted when its score
        is at least the threshold; the first threshold is just above the highest score.
    """
    return RankedTrials(scores, labels).det_points


def act_dcf(
    log_likelihood_ratios: npt.ArrayLike,
    labels: npt.ArrayLike,
    p_target: float = 0.05,
    c_miss: float = 1,
    c_fa: float = 1,
) -> float:
    """Detection cost of the decisions that calibrated scores make by themselves, normalised as `min_dcf`.

    A trial is accepted at the Bayes threshold, log(c_fa (1 - p_target) / (c_miss p_target)), or above.

    Args:
        log_likelihood_ratios: [M], natural logarithm of how much likelier the score is for one speaker than for two.
        labels: [M] 1 for a target trial, 0 for a non-target trial.
        p_target: prior probability of a target trial, between 0 and 1.
        c_miss: cost of rejecting a target, positive.
        c_fa: cost of accepting a non-target, positive.

    Raises:
        CelError: as `min_dcf`.

    >>> act_dcf([4.0, 1.0, -1.0, -4.0], [1, 1, 0, 0], p_target=0.5), act_dcf([4.0, 1.0, -1.0, -4.0], [1, 1, 0, 0])
    (0.0, 0.5)
    """
    _check_costs(p_target, c_miss, c_fa)
    ratios, targets = _checked(log_likelihood_ratios, labels)
    accepted = ratios >= np.log(c_fa * (1 - p_target)) - np.log(c_miss * p_target)
    cost = c_miss * p_target * (~accepted)[targets].mean() + c_fa * (1 - p_target) * accepted[~targets].mean()
    return float(cost / min(c_miss * p_target, c_fa * (1 - p_target)))


def cllr(log_likelihood_ratios: npt.ArrayLike, labels: npt.ArrayLike) -> float:
    """Cost of the log-likelihood ratio in bits: 0 for ratios that are right and sure, 1 for those that say nothing.

    Mean of log2(1 + 1/LR) over target and of log2(1 + LR) over non-target trials, half of each: Brümmer and du Preez
    2006 (doi 10.1016/j.csl.2005.08.001), equation 9. What lies above `RankedTrials.min_cllr` is lost by calibration.

    Args:
        log_likelihood_ratios: [M], natural logarithms.
        labels: [M] 1 for a target trial, 0 for a non-target trial.

    Raises:
        CelError: as `eer`.

    >>> cllr([0.0, 0.0], [1, 0])
    1.0
    """
    ratios, targets = _checked(log_likelihood_ratios, labels)
    bits = np.logaddexp(0, np.where(targets, -ratios, ratios)) / np.log(2)
    return float((bits[targets].mean() + bits[~targets].mean()) / 2)


def _check_costs(p_target: float, c_miss: float, c_fa: float) -> None:
    if not 0 < p_target < 1:
        raise CelError(f"p_target is {p_target}; give a probability between 0 and 1, both excluded")
    if c_miss <= 0 or c_fa <= 0:
        raise CelError(f"the costs are c_miss={c_miss} and c_fa={c_fa}; give positive ones")


def _checked(scores: npt.ArrayLike, labels: npt.ArrayLike) -> tuple[Floats, npt.NDArray[np.bool_]]:
    """Scores as float64, and which trials are target trials."""
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
    targets: npt.NDArray[np.bool_] = classes == 1
    if not np.all(targets | (classes == 0)):
        first = int(np.argmin(targets | (classes == 0)))
        raise CelError(f"label {classes[first]} at trial {first} is neither 1 (target) nor 0 (non-target)")
    if targets.all() or not targets.any():
        kind = "target" if targets[0] else "non-target"
        raise CelError(f"all {len(values)} trials are {kind} trials; error rates need target and non-target trials")
    return values, targets
