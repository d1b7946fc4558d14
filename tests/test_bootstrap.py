"""Intervals over speakers: weights are copies of speakers, and the intervals are as wide as they have to be."""

import numpy as np
import pytest

from cel_dist.errors import CelError
from cel_dist.evaluation.bootstrap import _WeightedErrors, bootstrap_intervals
from cel_dist.evaluation.trials import Trials
from cel_dist.metrics import RankedTrials, det_points


def scored(
    num_speakers: int, utterances: int, generator: np.random.Generator, spread: float = 0.8
) -> tuple[RankedTrials, Trials, list[str]]:
    """All pairs of some utterances; a speaker's own scores share what makes that voice easy or hard."""
    voices = np.repeat(np.arange(num_speakers), utterances)
    enrol, test = (part.astype(np.int32) for part in np.triu_indices(len(voices), k=1))
    labels = (voices[enrol] == voices[test]).astype(np.int8)
    ease = spread * generator.standard_normal(num_speakers)
    scores = (2 * labels + ease[voices[enrol]] * labels + generator.standard_normal(len(labels))).round(2)
    trials = Trials([f"id{voice}/{place}.wav" for place, voice in enumerate(voices)], labels, enrol, test)
    return RankedTrials(scores, labels), trials, [f"id{voice}" for voice in voices]


def test_a_weighted_replicate_is_the_list_with_speakers_copied():
    generator = np.random.default_rng(0)
    ranked, trials, _ = scored(6, 4, generator)
    scores = np.empty(len(trials))
    scores[ranked.order] = ranked.scores
    voices = np.repeat(np.arange(6), 4)
    first, second = voices[trials.enrol], voices[trials.test]
    counts = np.array([2, 0, 1, 3, 0, 1])
    copies = np.where(trials.labels == 1, counts[first], counts[first] * counts[second])
    copied_scores, copied_labels = np.repeat(scores, copies), np.repeat(trials.labels, copies)
    rate, costs = _WeightedErrors(ranked, first[ranked.order], second[ranked.order]).measure(counts, [0.05, 0.3])
    copied = RankedTrials(copied_scores, copied_labels)
    # Corners of the copied list are among those of the list, which has more of them: never closer than by one step.
    step = np.abs(np.diff(det_points(copied_scores, copied_labels)[1])).max()
    assert rate == pytest.approx(copied.eer, abs=step)
    # Between equal scores of both classes the order decides; copies stand together as their trial stood.
    order = np.repeat(ranked.order, copies[ranked.order])
    accepted = np.concatenate([[0], np.cumsum(trials.labels[order])])
    for cost, prior in zip(costs, (0.05, 0.3), strict=True):
        miss = 1 - accepted / accepted[-1]
        alarm = (np.arange(len(accepted)) - accepted) / (len(order) - accepted[-1])
        expected = (prior * miss + (1 - prior) * alarm).min() / prior
        assert cost == pytest.approx(expected, abs=1e-12)


def test_every_speaker_once_is_the_list_itself():
    ranked, trials, _ = scored(7, 5, np.random.default_rng(1))
    voices = np.repeat(np.arange(7), 5)
    weighted = _WeightedErrors(ranked, voices[trials.enrol][ranked.order], voices[trials.test][ranked.order])
    rate, costs = weighted.measure(np.ones(7, int), [0.01, 0.05])
    assert rate == ranked.eer
    assert costs == [ranked.min_dcf(0.01), ranked.min_dcf(0.05)]


def test_intervals_hold_the_truth_about_as_often_as_they_say():
    # Voices differ, so that intervals over trials, which take each of them for independent, would be far too narrow.
    generator = np.random.default_rng(0)
    truth = scored(200, 4, generator)[0].eer
    found = []
    for _ in range(40):
        ranked, trials, speakers = scored(20, 3, generator)
        found.append(bootstrap_intervals(ranked, trials, speakers, replicates=100).eer)
    held = np.mean([low <= truth <= high for low, high in found])
    assert 0.85 <= held <= 1


def test_intervals_are_repeatable_and_narrow_with_more_speakers():
    generator = np.random.default_rng(0)
    few, many = scored(10, 4, generator), scored(60, 4, generator)
    first = bootstrap_intervals(*few, priors=("0.05",), replicates=200)
    assert first == bootstrap_intervals(*few, priors=("0.05",), replicates=200)
    assert first != bootstrap_intervals(*few, priors=("0.05",), replicates=200, seed=1)
    assert (first.speakers, first.replicates) == (10, 200)
    assert first.eer[0] < few[0].eer < first.eer[1]
    assert first.min_dcf["0.05"][0] < first.min_dcf["0.05"][1]
    other = bootstrap_intervals(*many, replicates=200)
    assert np.diff(other.eer) < np.diff(first.eer)


def test_what_cannot_be_drawn_is_refused():
    ranked, trials, speakers = scored(4, 3, np.random.default_rng(0))
    with pytest.raises(CelError, match="50 replicates"):
        bootstrap_intervals(ranked, trials, speakers, replicates=50)
    with pytest.raises(CelError, match="all utterances are of one speaker, 'x'"):
        bootstrap_intervals(ranked, trials, ["x"] * len(speakers))
    # The fourth utterance is said to be of the first speaker: wrong in three trials of the one and two of the other.
    with pytest.raises(
        CelError, match=r"5 trials contradict .*id0/0\.wav and id1/3\.wav are a non-target trial of one"
    ):
        bootstrap_intervals(ranked, trials, [*speakers[:3], "id0", *speakers[4:]])
    with pytest.raises(CelError, match=r"contradict the speakers: .* are a target trial of two speakers"):
        bootstrap_intervals(ranked, trials, ["other", *speakers[1:]])
