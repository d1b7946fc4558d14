import numpy as np
import pytest

from cel_dist.training.false_negatives import FalseNegatives


def test_expected_rate_is_the_mean_of_the_rates_of_batches():
    rng = np.random.default_rng(0)
    speaker = np.repeat(np.arange(20), rng.integers(1, 30, 20)).astype(np.int32)
    false_negatives = FalseNegatives(speaker, np.arange(len(speaker)), None)
    rates = [false_negatives.rate(rng.permutation(len(speaker))[:32]) for _ in range(3000)]
    assert np.mean(rates) == pytest.approx(false_negatives.expected, rel=0.02)


def test_utterances_that_are_never_drawn_do_not_count():
    speaker = np.array([0, 0, 0, 1, 2, 3], np.int32)
    assert FalseNegatives(speaker, np.array([2, 3, 4, 5]), None).expected == 0.0


def test_without_labels_only_an_estimate_says_anything():
    unknown = np.full(1000, -1, np.int32)
    assert FalseNegatives(unknown, np.arange(1000), None).expected is None
    estimated = FalseNegatives(unknown, np.arange(1000), 100)
    assert estimated.expected == pytest.approx(9 / 999)
    assert estimated.rate(np.arange(50)) is None
    labelled = np.repeat(np.arange(100), 10).astype(np.int32)
    assert FalseNegatives(labelled, np.arange(1000), None).expected == pytest.approx(9 / 999)
