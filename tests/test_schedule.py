"""The learning rate and the margin, from each of their settings."""

import math

import pytest

from cel_dist.config_sections import HeadSection, OptimSection
from cel_dist.training.schedule import learning_rate, margin

STEPS_PER_EPOCH, TOTAL = 5, 41


def rates(**settings: object) -> list[float]:
    config = OptimSection(lr=0.1, **settings)
    return [
        learning_rate(config, step=step, steps_per_epoch=STEPS_PER_EPOCH, total_steps=TOTAL) for step in range(TOTAL)
    ]


def test_the_step_schedule_decays_after_whole_epochs_as_published():
    assert rates(schedule="step", decay=0.95, decay_epochs=2) == pytest.approx(
        [0.1 * 0.95 ** (step // 10) for step in range(TOTAL)]
    )


def test_the_cosine_falls_from_the_peak_to_zero_at_the_last_step():
    cosine = rates(schedule="cosine", decay=0.5, decay_epochs=1)
    assert cosine == pytest.approx([0.05 * (1 + math.cos(math.pi * step / 40)) for step in range(TOTAL)])
    assert (cosine[0], cosine[-1]) == (0.1, 0.0)


def test_the_cosine_ends_at_min_lr_which_the_step_schedule_ignores():
    bounded = rates(schedule="cosine", min_lr=0.02)
    assert (bounded[0], bounded[20], bounded[-1]) == pytest.approx((0.1, 0.06, 0.02))
    assert rates(schedule="step", min_lr=0.02) == rates(schedule="step")


@pytest.mark.parametrize("schedule", ["step", "cosine"])
def test_warm_up_rises_linearly_to_the_peak(schedule):
    warmed = rates(schedule=schedule, warmup_steps=4)
    assert warmed[:5] == pytest.approx([0.025, 0.05, 0.075, 0.1, 0.1])
    # The cosine begins behind the warm-up and ends where it would without one.
    assert warmed[-1] == pytest.approx(rates(schedule=schedule)[-1])


def test_a_warm_up_longer_than_the_run_does_not_fail():
    config = OptimSection(lr=0.1, schedule="cosine", warmup_steps=10)
    short = [learning_rate(config, step=step, steps_per_epoch=3, total_steps=3) for step in range(3)]
    assert short == pytest.approx([0.01, 0.02, 0.03])


@pytest.mark.parametrize(
    ("first", "last", "expected"),
    [(0, 0, [0.2, 0.2, 0.2, 0.2]), (1, 1, [0, 0, 0.2, 0.2]), (0, 2, [0, 0.05, 0.1, 0.15]), (0.5, 1, [0, 0, 0.2, 0.2])],
)
def test_the_margin_grows_from_one_epoch_to_the_other_and_at_once_where_they_are_one(first, last, expected):
    config = HeadSection(margin=0.2, margin_from_epoch=first, margin_until_epoch=last)
    assert [margin(config, step=step, steps_per_epoch=2) for step in range(4)] == pytest.approx(expected)
