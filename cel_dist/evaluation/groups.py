"""Errors on parts of a list of trials: by sex, by session, by duration, by age.

A part has target and non-target trials of its own, and so an EER of its own. Which non-targets stand against which
targets decides what such a number means. The parts here follow the NIST evaluations, which are reported by sex, by same
or different telephone number of the target trials and by duration (Sadjadi et al. 2017, The 2016 NIST Speaker
Recognition Evaluation, Interspeech):

    by         part                 target trials                     non-target trials
    sex        female               of women                          of two women
               male                 of men                            of two men
               female and male      of all whose sex is known         of a woman and a man
    session    same session         both sides of one session         all
               different sessions   sides of two sessions             all
    seconds    up to A, A to B,     whose shorter side is so long     whose shorter side is so long
               above B
    age        under 18             of children                       of two children
               18 and above         of adults                         of two adults
               child and adult      of all whose age is known         of a child and an adult

Sessions do not divide non-target trials: two speakers have no session in common, and the names of sessions need not be
unique. So the two parts by session differ in their targets alone. A and B cut the trials of the list into thirds.
"""

from collections.abc import Iterator
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict

from cel_dist.evaluation.metadata import Metadata, name_numbers
from cel_dist.evaluation.trials import Trials
from cel_dist.metrics import eer

MIN_TRIALS = 100
"""Fewest target and fewest non-target trials of a part for an EER: with less, one trial moves it by over a percent."""

ADULT_YEARS = 18.0

Masks: TypeAlias = NDArray[np.bool_]


class Group(BaseModel):
    """Errors on a part of the trials.

    Attributes:
        by: the column that divides the list: `sex`, `session`, `seconds` or `age`; `all` for the whole list.
        name: the part.
        targets, non_targets: numbers of its trials.
        eer: equal error rate of the part, at a threshold of its own; None where it has too few trials of either class.
        false_rejects: share of its targets below the threshold of the whole list; None where there are too few.
        false_accepts: share of its non-targets at or above that threshold; None where there are too few.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    by: str
    name: str
    targets: int
    non_targets: int
    eer: float | None
    false_rejects: float | None
    false_accepts: float | None

    @property
    def label(self) -> str:
        """What the part is called in a table or a picture."""
        subjects = {"all": "", "session": "", "seconds": "shorter side: "}
        return subjects.get(self.by, f"{self.by}: ") + self.name


def errors_by_group(
    scores: NDArray[np.float64],
    trials: Trials,
    metadata: Metadata | None,
    threshold: float,
    *,
    compensated: NDArray[np.float64] | None = None,
    min_trials: int = MIN_TRIALS,
) -> tuple[list[Group], list[str]]:
    """Errors on the whole list and on its parts.

    Args:
        scores: [M].
        trials: M trials.
        metadata: of the files of `trials`; None leaves the whole list only.
        threshold: of the whole list, for the shares of false decisions. A model that is used has one threshold, and
            parts that differ there are treated differently even where their EERs agree.
        compensated: [M], what the threshold is one of, if durations count. Default: `scores`.
        min_trials: fewest trials of a class for a rate.

    Returns:
        The groups, the whole list first, and what is not shown, with the reason, a sentence each.
    """
    targets = trials.labels == 1
    everything = np.ones(len(trials), dtype=bool)
    compared = scores if compensated is None else compensated

    def group(by: str, name: str, own_targets: Masks, own_others: Masks) -> Group:
        chosen = (targets & own_targets) | (~targets & own_others)
        labels, values, decided = trials.labels[chosen], scores[chosen], compared[chosen]
        num_targets = int(labels.sum())
        num_others = len(labels) - num_targets
        has_targets, has_others = num_targets >= max(1, min_trials), num_others >= max(1, min_trials)
        return Group(
            by=by,
            name=name,
            targets=num_targets,
            non_targets=num_others,
            eer=eer(values, labels) if has_targets and has_others else None,
            false_rejects=float((decided[labels == 1] < threshold).mean()) if has_targets else None,
            false_accepts=float((decided[labels == 0] >= threshold).mean()) if has_others else None,
        )

    groups = [group("all", "all trials", everything, everything)]
    not_shown: list[str] = []
    if metadata is None:
        return groups, not_shown
    for by, parts in (("sex", _by_sex), ("session", _by_session), ("seconds", _by_seconds), ("age", _by_age)):
        column = getattr(metadata, by)
        found = [] if column is None else [group(by, *part) for part in parts(column, trials)]
        # A part without a single target or non-target trial of its own is shown too, but not if that is all there is.
        if any(part.targets or part.non_targets for part in found):
            groups += found
        else:
            why = f"the metadata has no column '{by}'" if column is None else f"no value of column '{by}' is known"
            not_shown.append(f"errors by {by}: {why}")
    return groups, not_shown


_Parts: TypeAlias = Iterator[tuple[str, Masks, Masks]]
"""Name, and which of the M trials belong to the part: if they are targets, and if they are non-targets."""


def _by_sex(sex: NDArray[np.str_], trials: Trials) -> _Parts:
    yield from _by_class(sex[trials.enrol], sex[trials.test], [("f", "female"), ("m", "male")], "female and male")


def _by_age(age: NDArray[np.float64], trials: Trials) -> _Parts:
    stage = np.where(np.isnan(age), "", np.where(age < ADULT_YEARS, "child", "adult"))
    names = [("child", f"under {ADULT_YEARS:.0f}"), ("adult", f"{ADULT_YEARS:.0f} and above")]
    yield from _by_class(stage[trials.enrol], stage[trials.test], names, "child and adult")


def _by_class(enrol: NDArray[np.str_], test: NDArray[np.str_], names: list[tuple[str, str]], across: str) -> _Parts:
    for value, name in names:
        both = (enrol == value) & (test == value)
        yield name, both, both
    known = (enrol != "") & (test != "")
    yield across, known, known & (enrol != test)


def _by_session(session: NDArray[np.str_], trials: Trials) -> _Parts:
    numbers = name_numbers(session)
    enrol, test = numbers[trials.enrol], numbers[trials.test]
    known = (enrol >= 0) & (test >= 0)
    if (known & (trials.labels == 1)).any():
        everything = np.ones(len(trials), dtype=bool)
        yield "same session", known & (enrol == test), everything
        yield "different sessions", known & (enrol != test), everything


def _by_seconds(seconds: NDArray[np.float64], trials: Trials) -> _Parts:
    shorter = np.minimum(seconds[trials.enrol], seconds[trials.test])
    known = ~np.isnan(shorter)
    if not known.any():
        return
    # Rounded as they are printed, so that the name of a part says exactly what is in it.
    low, high = (round(float(edge), 2) for edge in np.quantile(shorter[known], (1 / 3, 2 / 3)))
    parts = [(f"up to {low:g} s", known & (shorter <= low))]
    if high > low:
        parts.append((f"{low:g} to {high:g} s", known & (shorter > low) & (shorter <= high)))
    parts.append((f"above {high:g} s", known & (shorter > high)))
    for name, chosen in parts:
        if chosen.any():
            yield name, chosen, chosen
