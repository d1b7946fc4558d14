"""Confidence intervals of error rates, from speakers drawn again."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from cel_dist.errors import CelError
from cel_dist.evaluation.lists import speakers_of_files
from cel_dist.evaluation.trials import Trials
from cel_dist.metrics import RankedTrials

LEVEL = 0.95
"""Share of the replicates inside an interval; as much lies below it as above."""

_MAX_DRAWS_A_REPLICATE = 100
_REPLICATES = (100, 1000)
_TRIALS_DRAWN = 100_000_000
"""In all replicates of a validation: seconds of a core, for which the other ranks wait."""

Counts = NDArray[np.int64]
Interval = tuple[float, float]


@dataclass(frozen=True)
class Intervals:
    """95 % intervals of error rates.

    Attributes:
        eer: lower and upper end.
        min_dcf: lower and upper end by prior of a target trial.
        speakers: speakers that were drawn from.
        replicates: how often they were.
        seed: of the draws.
    """

    eer: Interval
    min_dcf: Mapping[str, Interval] = field(default_factory=dict)
    speakers: int = 0
    replicates: int = 0
    seed: int = 0


def bootstrap_intervals(
    ranked: RankedTrials,
    trials: Trials,
    speakers: Sequence[str],
    *,
    priors: Sequence[str] = (),
    replicates: int = 1000,
    seed: int = 0,
) -> Intervals:
    """Percentile intervals of the EER and of minDCF for another choice of speakers from the same population.

    Trials that share a speaker are not independent: a voice that is hard is hard in all of its trials, and an interval
    over trials would be far too narrow (Bolle, Ratha and Pankanti 2004, doi 10.1016/j.cviu.2003.08.002; Poh and Bengio
    2007). So each replicate draws as many speakers as there are, with replacement. A target trial counts as often as
    its speaker was drawn; a non-target trial as often as its two speakers were, multiplied: once for each pair of their
    copies. The trials are not sorted again: the counts become weights in the sorted list.

    Args:
        ranked: the scored trials.
        trials: which utterances they compare, in the order of the list.
        speakers: [N], the speaker of each of `trials.files`.
        priors: of a target trial, as text; the keys of `Intervals.min_dcf`.
        replicates: at least 100; a thousand are good for two digits.
        seed: of the draws; the same seed gives the same intervals.

    Raises:
        CelError: `replicates` is below 100, there are fewer than two speakers, or a label contradicts the speakers.
    """
    check_draws(trials, speakers, replicates)
    names, voices = _numbered(speakers)
    first, second = voices[trials.enrol][ranked.order], voices[trials.test][ranked.order]
    weighted = _WeightedErrors(ranked, first, second)
    generator = np.random.default_rng(seed)
    rates = np.empty(replicates)
    costs = np.empty((replicates, len(priors)))
    values = [float(prior) for prior in priors]
    for replicate in range(replicates):
        rates[replicate], costs[replicate] = weighted.measure(_draw(generator, len(names), weighted), values)
    return Intervals(
        eer=_interval(rates),
        min_dcf={prior: _interval(costs[:, column]) for column, prior in enumerate(priors)},
        speakers=len(names),
        replicates=replicates,
        seed=seed,
    )


def check_draws(trials: Trials, speakers: Sequence[str], replicates: int) -> None:
    """Refuse what `bootstrap_intervals` refuses and what needs no scores: before the embedding, which may take an hour.

    Raises:
        CelError: as `bootstrap_intervals`.
    """
    if replicates < 100:
        raise CelError(
            f"{replicates} replicates say nothing of the ends of an interval; draw at least 100, better 1000"
        )
    names, voices = _numbered(speakers)
    if len(names) < 2:
        raise CelError(
            f"all utterances are of one speaker, '{names[0]}'; give a list of lines 'path speaker' with --speakers"
        )
    wrong = np.flatnonzero((voices[trials.enrol] == voices[trials.test]) != (trials.labels == 1))
    if len(wrong):
        trial = wrong[0]
        enrol, test = trials.files[trials.enrol[trial]], trials.files[trials.test[trial]]
        kind, said = ("target", "two speakers") if trials.labels[trial] else ("non-target", "one speaker")
        raise CelError(
            f"{len(wrong)} trials contradict the speakers: {enrol} and {test} are a {kind} trial of {said}; give a "
            "list of lines 'path speaker' with --speakers"
        )


def validation_intervals(
    scores: NDArray[np.float64], trials: Trials, speakers: NDArray[np.str_] | None = None
) -> Intervals | None:
    """Intervals as `bootstrap_intervals` has them, at the prior 0.05, where nobody was asked who speaks.

    A thousand replicates, fewer of long lists, but at least a hundred.

    Args:
        scores: [M].
        trials: the list.
        speakers: [N], the speaker of each of `trials.files`, "" where unknown. Default: the first folder of its path.

    Returns:
        None where speakers are not known, contradict the labels, or are too few.
    """
    replicates = min(max(_TRIALS_DRAWN // len(trials), _REPLICATES[0]), _REPLICATES[1])
    try:
        names = speakers_of_files(trials.first_paths) if speakers is None else speakers.tolist()
        if "" in names:
            return None
        return bootstrap_intervals(
            RankedTrials(scores, trials.labels), trials, names, priors=("0.05",), replicates=replicates
        )
    except CelError:
        return None


class _WeightedErrors:
    """Error rates of sorted trials in which each speaker counts several times or not at all."""

    def __init__(self, ranked: RankedTrials, first: Counts, second: Counts) -> None:
        targets = ranked.is_target
        # As small as they may be: they are read at random, once a replicate.
        kind = np.uint16 if max(first.max(), second.max()) < 1 << 16 else np.uint32
        self._target = first[targets].astype(kind)
        self._left, self._right = first[~targets].astype(kind), second[~targets].astype(kind)
        self._corners = ranked.corners
        accepted_targets, accepted = ranked.turning_points
        self._turns = (accepted_targets, accepted - accepted_targets)

    def measure(self, counts: Counts, priors: Sequence[float]) -> tuple[float, list[float]]:
        """The EER, and minDCF for each prior."""
        targets, others = self._accepted(counts)
        false_accepts = others[self._corners[1]] / others[-1]
        false_rejects = 1 - targets[self._corners[0]] / targets[-1]
        nearest = np.argmin(np.abs(false_rejects - false_accepts))
        rate = float(max(false_accepts[nearest], false_rejects[nearest]))
        misses, alarms = 1 - targets[self._turns[0]] / targets[-1], others[self._turns[1]] / others[-1]
        costs = [float((p * misses + (1 - p) * alarms).min() / min(p, 1 - p)) for p in priors]
        return rate, costs

    def has_both_classes(self, counts: Counts) -> bool:
        """Whether a draw leaves target and non-target trials."""
        present = counts > 0
        return bool(present[self._target].any()) and bool((present[self._left] & present[self._right]).any())

    def _accepted(self, counts: Counts) -> tuple[Counts, Counts]:
        """Weight of the target, and of the non-target, trials up to each place among their own; 0 for none."""
        # Weights of 32 bits, as a sum of 4 million pairs of counts may pass 2^32.
        small = counts.astype(np.int32)
        targets = np.concatenate([[0], np.cumsum(small[self._target], dtype=np.int64)])
        others = np.concatenate([[0], np.cumsum(small[self._left] * small[self._right], dtype=np.int64)])
        return targets, others


def _draw(generator: np.random.Generator, num_speakers: int, weighted: _WeightedErrors) -> Counts:
    for _ in range(_MAX_DRAWS_A_REPLICATE):
        drawn = generator.integers(0, num_speakers, num_speakers)
        counts: Counts = np.bincount(drawn, minlength=num_speakers)
        # With few speakers a draw may leave one class empty; it has no error rates and is drawn again.
        if weighted.has_both_classes(counts):
            return counts
    raise CelError(f"{num_speakers} speakers are too few for intervals over speakers; leave out --bootstrap")


def _numbered(speakers: Sequence[str]) -> tuple[NDArray[np.str_], Counts]:
    """The speakers, sorted, and the number of each utterance's."""
    return np.unique(np.asarray(speakers, dtype=object).astype(str), return_inverse=True)


def _interval(values: NDArray[np.float64]) -> Interval:
    low, high = np.quantile(values, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)
