"""Verification metrics: parity with the published scoring, small cases by hand, refusals."""

from pathlib import Path

import numpy as np
import pytest

from cel_dist.errors import CelError
from cel_dist.metrics import RankedTrials, act_dcf, cllr, det_points, eer, eer_threshold, min_dcf


def trials(num_trials: int = 400, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(seed)
    labels = generator.integers(0, 2, num_trials)
    return generator.normal(labels * 1.5, 1.0).round(1), labels


@pytest.mark.parametrize("case", range(4))
def test_metrics_equal_the_published_ones_with_ties_too(shared: Path, case: int) -> None:
    golden = np.load(shared / "golden" / "metrics.npz")
    scores, labels = golden[f"s{case}/scores"], golden[f"s{case}/labels"]
    assert 100 * eer(scores, labels) == pytest.approx(golden[f"s{case}/eer_percent"], abs=1e-10)
    assert min_dcf(scores, labels) == pytest.approx(golden[f"s{case}/min_dcf_p0.05"], abs=1e-12)
    assert min_dcf(scores, labels, p_target=0.01) == pytest.approx(golden[f"s{case}/min_dcf_p0.01"], abs=1e-12)


def test_separated_classes_have_no_errors_and_swapped_ones_only_errors() -> None:
    scores = [0.9, 0.8, 0.3, 0.1]
    assert eer(scores, [1, 1, 0, 0]) == 0.0
    assert min_dcf(scores, [1, 1, 0, 0]) == 0.0
    assert eer(scores, [0, 0, 1, 1]) == 1.0
    assert min_dcf(scores, [0, 0, 1, 1]) == 1.0
    assert 0.3 < eer_threshold(scores, [1, 1, 0, 0]) <= 0.8


def test_min_dcf_follows_prior_and_costs() -> None:
    # One of two targets lies below both non-targets: reject it (miss 1/2) or accept all (false accepts 1).
    scores, labels = [0.9, 0.5, 0.4, 0.1], [1, 0, 0, 1]
    assert min_dcf(scores, labels, p_target=0.2) == pytest.approx(0.2 * 0.5 / 0.2)
    assert min_dcf(scores, labels, p_target=0.2, c_miss=16) == pytest.approx(min(16 * 0.2 * 0.5, 0.8) / 0.8)
    assert min_dcf(scores, labels, p_target=0.2, c_miss=6, c_fa=2) == pytest.approx(6 * 0.2 * 0.5 / (6 * 0.2))


def test_threshold_reproduces_the_operating_point_of_the_eer() -> None:
    scores, labels = trials()
    accepted = scores >= eer_threshold(scores, labels)
    error_rates = accepted[labels == 0].mean(), (~accepted[labels == 1]).mean()
    assert max(error_rates) == pytest.approx(eer(scores, labels), abs=1e-12)


def test_det_points_are_error_rates_at_their_thresholds() -> None:
    scores, labels = trials()
    false_accepts, false_rejects, thresholds = det_points(scores, labels)
    assert (np.diff(false_accepts) >= 0).all()
    assert (np.diff(false_rejects) <= 0).all()
    assert (np.diff(thresholds) < 0).all()
    assert (false_accepts[0], false_rejects[0], false_accepts[-1], false_rejects[-1]) == (0, 1, 1, 0)
    assert np.isfinite(thresholds).all()
    for false_accept, false_reject, threshold in zip(false_accepts, false_rejects, thresholds, strict=True):
        assert (scores[labels == 0] >= threshold).mean() == pytest.approx(false_accept, abs=1e-12)
        assert (scores[labels == 1] < threshold).mean() == pytest.approx(false_reject, abs=1e-12)


def test_order_of_trials_and_monotonic_scaling_do_not_matter_to_the_eer() -> None:
    scores, labels = trials()
    shuffled = np.random.default_rng(1).permutation(len(scores))
    assert eer(scores[shuffled], labels[shuffled]) == eer(scores, labels)
    assert eer(np.exp(scores), labels.astype(bool)) == eer(scores, labels)


@pytest.mark.parametrize(
    ("scores", "labels", "message"),
    [
        ([0.1, 0.2], [1, 1], "all 2 trials are target trials"),
        ([0.1, 0.2], [0, 0], "all 2 trials are non-target trials"),
        ([0.1, float("nan"), float("inf")], [1, 0, 0], "2 scores are not finite, the first at trial 1"),
        ([0.1, 0.2, 0.3], [1, 0], r"\(3,\) and labels \(2,\)"),
        ([0.1, 0.2], [1, 2], "label 2 at trial 1"),
        ([], [], "no trials"),
    ],
)
def test_unusable_trials_are_refused_by_every_metric(scores: list[float], labels: list[int], message: str) -> None:
    for metric in (eer, eer_threshold, min_dcf, det_points, RankedTrials, act_dcf, cllr):
        with pytest.raises(CelError, match=message):
            metric(scores, labels)


def test_trials_that_were_sorted_once_have_all_measures() -> None:
    scores, labels = trials()
    ranked = RankedTrials(scores, labels)
    assert (ranked.eer, ranked.eer_threshold) == (eer(scores, labels), eer_threshold(scores, labels))
    assert ranked.scores.tolist() == scores[ranked.order].tolist()
    assert ranked.is_target.tolist() == (labels[ranked.order] == 1).tolist()
    # The cost at every place in the sorted list, as the definition has it.
    accepted = np.concatenate([[0], np.cumsum(ranked.is_target)])
    miss = 1 - accepted / accepted[-1]
    false_accept = (np.arange(len(accepted)) - accepted) / (labels == 0).sum()
    for prior in (0.001, 0.05, 0.3, 0.9):
        cost = prior * miss + (1 - prior) * false_accept
        assert ranked.min_dcf(prior) == pytest.approx(cost.min() / min(prior, 1 - prior), abs=1e-15)


@pytest.mark.parametrize("shift", [0, 1])
def test_both_ways_of_sorting_give_one_order(shift: int) -> None:
    # Even scores are of targets; the others are odd, or even as well, so that both classes share scores.
    generator = np.random.default_rng(0)
    labels = generator.integers(0, 2, 500)
    scores = 2.0 * generator.integers(-20, 20, 500) + shift * (1 - labels)
    ranked = RankedTrials(scores, labels)
    assert ranked.scores.tolist() == sorted(scores, reverse=True)
    assert ranked.scores.tolist() == scores[ranked.order].tolist()
    assert ranked.is_target.tolist() == (labels[ranked.order] == 1).tolist()


def test_the_convex_hull_keeps_the_points_that_are_best_for_some_prior() -> None:
    scores, labels = trials()
    false_accepts, false_rejects, thresholds = det_points(scores, labels)
    hull = RankedTrials(scores, labels).convex_hull()
    every = set(zip(false_accepts.tolist(), false_rejects.tolist(), thresholds.tolist(), strict=True))
    kept = list(zip(*(part.tolist() for part in hull), strict=True))
    assert set(kept) <= every
    assert (kept[0][:2], kept[-1][:2]) == ((0, 1), (1, 0))
    right, down = np.diff(hull[0]), -np.diff(hull[1])
    assert (down[:-1] * right[1:] > down[1:] * right[:-1]).all(), "the hull is not convex, or has points on a line"
    for prior in np.linspace(0.01, 0.99, 50):
        best = (prior * false_rejects + (1 - prior) * false_accepts).min()
        assert (prior * hull[1] + (1 - prior) * hull[0]).min() == pytest.approx(best, abs=1e-15)


def test_cllr_and_decisions_at_the_bayes_threshold_by_hand() -> None:
    ratios, labels = np.log([4.0, 0.5, 0.25, 2.0]), [1, 1, 0, 0]
    expected = ((np.log2(1.25) + np.log2(3)) / 2 + (np.log2(1.25) + np.log2(3)) / 2) / 2
    assert cllr(ratios, labels) == pytest.approx(expected, abs=1e-12)
    # At 0.25 the threshold is 3: one miss. At 0.5 it is 1: a miss and a false acceptance.
    # At 0.75 it is 1/3: a false acceptance.
    assert act_dcf(ratios, labels, p_target=0.25 + 1e-9) == pytest.approx(0.5, abs=1e-6)
    assert act_dcf(ratios, labels, p_target=0.5) == pytest.approx(0.5 * 0.5 / 0.5 + 0.5 * 0.5 / 0.5)
    assert act_dcf(ratios, labels, p_target=0.75) == pytest.approx(0.25 * 0.5 / 0.25)
    assert act_dcf(ratios, labels, p_target=0.5, c_fa=10) == pytest.approx(0.5 / 0.5)


def test_min_cllr_is_that_of_the_best_monotone_calibration() -> None:
    scores, labels = [3.0, 2.0, 2.0, 1.0, 1.0], [1, 1, 0, 0, 1]
    # Above 2 there are targets only. 2 and 1 have one of each, so that they get one ratio, of (2/3) / (2/2).
    ratio = (2 / 3) / (2 / 2)
    expected = (2 / 3 * np.log2(1 + 1 / ratio) + np.log2(1 + ratio)) / 2
    assert RankedTrials(scores, labels).min_cllr() == pytest.approx(expected, abs=1e-12)
    # A strictly monotone map cannot change it, nor can any calibration be better.
    scores, labels = trials()
    least = RankedTrials(scores, labels).min_cllr()
    assert RankedTrials(np.exp(scores), labels).min_cllr() == pytest.approx(least, abs=1e-12)
    assert least < cllr(1.5 * (scores - 0.75), labels)
    assert RankedTrials([2.0, 1.0], [1, 0]).min_cllr() == 0
    assert RankedTrials([1.0, 2.0], [1, 0]).min_cllr() == 1


@pytest.mark.parametrize(("setting", "value"), [("p_target", 0.0), ("p_target", 1.5), ("c_miss", 0), ("c_fa", -1)])
def test_unusable_costs_are_refused(setting: str, value: float) -> None:
    with pytest.raises(CelError, match=setting):
        min_dcf([0.1, 0.9], [0, 1], **{setting: value})
