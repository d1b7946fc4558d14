"""Drawing verification trials from any labelled list of utterances."""

import itertools
import math
import os
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from cel_dist.errors import CelError

# Above this share of all possible pairs, drawing pairs until they are new takes longer than listing them all.
_DENSE = 0.25


class Utterance(NamedTuple):
    """An utterance as far as trials are concerned."""

    path: str
    speaker: str
    session: str


class Trial(NamedTuple):
    """A comparison of two utterances; label 1 for the same speaker, 0 for two speakers."""

    label: int
    enrol: str
    test: str


_Pair = tuple[Utterance, Utterance]


def draw_trials(
    utterances: Sequence[Utterance], *, num_target: int, num_nontarget: int, seed: int, cross_session: bool = True
) -> list[Trial]:
    """Draw trials that are all different, in random order; no file meets itself.

    Target trials are spread evenly over the speakers; non-target trials are drawn evenly from all pairs of utterances.

    Args:
        utterances: the files to pair, with distinct paths.
        num_target: trials of one speaker.
        num_nontarget: trials of two speakers.
        seed: same arguments and seed, same trials.
        cross_session: the two utterances of a target trial come from different sessions. So do those of a non-target
            trial, wherever the session labels allow it, lest the session label gives the answer away.

    Raises:
        CelError: fewer trials of a kind are possible than asked for, or a path occurs twice.
    """
    if len({utterance.path for utterance in utterances}) < len(utterances):
        raise CelError("the list of utterances for the trials names a file twice; remove the repeated lines")
    rng = np.random.default_rng(seed)
    targets = _draw_targets(utterances, num_target, rng, cross_session)
    nontargets = _draw_nontargets(utterances, num_nontarget, rng, cross_session)
    pairs = [(1, *pair) for pair in targets] + [(0, *pair) for pair in nontargets]
    swap = rng.random(len(pairs)) < 0.5
    return [
        Trial(pairs[i][0], pairs[i][1 + swap[i]].path, pairs[i][2 - swap[i]].path) for i in rng.permutation(len(pairs))
    ]


def count_target_pairs(utterances: Iterable[Utterance], *, cross_session: bool = True) -> int:
    """Number of distinct target trials, the order of the two files aside."""
    speakers = Counter(utterance.speaker for utterance in utterances)
    sessions = (
        Counter((utterance.speaker, utterance.session) for utterance in utterances) if cross_session else Counter()
    )
    return _pairs(speakers.values()) - _pairs(sessions.values())


def count_nontarget_pairs(utterances: Sequence[Utterance], *, cross_session: bool = True) -> int:
    """Number of distinct non-target trials, the order of the two files aside.

    With `cross_session`, of two sessions; but all of them where the session labels allow no such pair, as where all
    speakers have one session of the same name: there the label says nothing.
    """
    everything = _pairs([len(utterances)]) - count_target_pairs(utterances, cross_session=False)
    same_session = _pairs(Counter(u.session for u in utterances).values()) - _pairs(
        Counter((u.speaker, u.session) for u in utterances).values()
    )
    return everything - same_session if cross_session and everything > same_session else everything


def write_trials(path: Path, trials: Sequence[Trial]) -> None:
    """Write `label enrol test` lines; the file appears whole or not at all.

    Tabs separate the columns if a name holds white space, else blanks. Names must not hold tabs or line breaks.
    """
    blank = all(len(name.split()) == 1 for trial in trials for name in (trial.enrol, trial.test))
    separator = " " if blank else "\t"
    lines = (f"{separator.join((str(trial.label), trial.enrol, trial.test))}\n" for trial in trials)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_text("".join(lines), encoding="utf-8")
    os.replace(temporary, path)


def _draw_targets(
    utterances: Sequence[Utterance], count: int, rng: np.random.Generator, cross_session: bool
) -> list[_Pair]:
    possible = count_target_pairs(utterances, cross_session=cross_session)
    if possible < count:
        kind = "pairs of one speaker's utterances from different sessions" if cross_session else "pairs of one speaker"
        raise CelError(
            f"{count} target trials asked for, but there are {possible} {kind}; ask for fewer or add utterances"
        )
    by_speaker: dict[str, list[Utterance]] = defaultdict(list)
    for utterance in utterances:
        by_speaker[utterance.speaker].append(utterance)
    queues = []
    for own in by_speaker.values():
        pairs = [
            (first, second)
            for first, second in itertools.combinations(own, 2)
            if not cross_session or first.session != second.session
        ]
        queues.append([pairs[i] for i in rng.permutation(len(pairs))[:count]])
    order = [queues[i] for i in rng.permutation(len(queues))]
    rounds = itertools.zip_longest(*order)
    return list(itertools.islice((pair for turn in rounds for pair in turn if pair is not None), count))


def _draw_nontargets(
    utterances: Sequence[Utterance], count: int, rng: np.random.Generator, cross_session: bool
) -> list[_Pair]:
    everything = count_nontarget_pairs(utterances, cross_session=False)
    across = count_nontarget_pairs(utterances)
    # Where the session labels do not allow as many, they are ignored.
    by_session = cross_session and everything > across >= count
    possible = across if by_session else everything
    if possible < count:
        raise CelError(
            f"{count} non-target trials asked for, but there are {possible} pairs of two speakers' utterances; ask for "
            "fewer or add utterances"
        )

    def allowed(first: Utterance, second: Utterance) -> bool:
        return first.speaker != second.speaker and not (by_session and first.session == second.session)

    if count > _DENSE * possible:
        pairs = [pair for pair in itertools.combinations(utterances, 2) if allowed(*pair)]
        return [pairs[i] for i in rng.permutation(len(pairs))[:count]]
    places: set[tuple[int, int]] = set()
    drawn: list[_Pair] = []
    while len(drawn) < count:
        low, high = sorted(int(place) for place in rng.integers(len(utterances), size=2))
        if (low, high) not in places and allowed(utterances[low], utterances[high]):
            places.add((low, high))
            drawn.append((utterances[low], utterances[high]))
    return drawn


def _pairs(counts: Iterable[int]) -> int:
    return sum(math.comb(count, 2) for count in counts)
