"""SpecAugment: what is hidden, how much of it, and that it does not depend on the number of ranks."""

import pytest
import torch
from torch import Tensor

from cel_dist.config import AugmentSection
from cel_dist.data.spec_augment import SpecAugment

BATCH, VIEWS, BANDS, FRAMES = 64, 2, 40, 60


def masked(*, seed: int = 0, epoch: int = 0, step: int = 0, rows: slice = slice(0, BATCH), **settings: int) -> Tensor:
    """[B, V, M, F] bool, what is hidden of features that are 1 everywhere."""
    module = SpecAugment(AugmentSection(profile=0, **settings), seed)
    ones = torch.ones(BATCH, VIEWS, BANDS, FRAMES)[rows]
    return module(ones, epoch=epoch, step=step, rows=rows, batch_size=BATCH) == 0


def test_a_time_mask_hides_all_bands_of_some_frames_in_a_row() -> None:
    hidden = masked(time_masks=1, time_mask_frames=12)
    assert torch.equal(hidden.all(dim=2), hidden.any(dim=2))
    frames = hidden.any(dim=2).int()
    widths = frames.sum(dim=-1)
    assert widths.min() == 0
    assert widths.max() == 12
    # One stretch at most: it begins once.
    begins = (torch.diff(frames, prepend=torch.zeros(BATCH, VIEWS, 1), dim=-1) == 1).sum(dim=-1)
    assert begins.max() == 1
    # Each place is hidden now and then, the ends too.
    assert frames.amax(dim=(0, 1)).min() == 1


def test_a_frequency_mask_hides_all_frames_of_some_bands_in_a_row() -> None:
    hidden = masked(freq_masks=1, freq_mask_bands=8)
    assert torch.equal(hidden.all(dim=3), hidden.any(dim=3))
    widths = hidden.any(dim=3).sum(dim=-1)
    assert (widths.min(), widths.max()) == (0, 8)


def test_masks_are_as_many_as_asked_for() -> None:
    few, many = (masked(time_masks=number, time_mask_frames=2).any(dim=2).float().mean() for number in (1, 10))
    assert many > 5 * few


def test_masks_of_both_kinds_go_together() -> None:
    hidden = masked(time_masks=1, freq_masks=1)
    frames, bands = hidden.all(dim=2), hidden.all(dim=3)
    assert frames.any()
    assert bands.any()
    assert torch.equal(hidden, frames[:, :, None, :] | bands[:, :, :, None])


def test_every_segment_has_masks_of_its_own() -> None:
    frames = masked(time_masks=2, time_mask_frames=20).any(dim=2)
    assert not torch.equal(frames[:, 0], frames[:, 1])
    assert len({tuple(row.tolist()) for row in frames.flatten(0, 1)}) > 0.9 * BATCH * VIEWS


def test_masks_depend_on_seed_epoch_and_step_and_not_on_the_rank() -> None:
    settings = {"time_masks": 2, "freq_masks": 2}
    whole = masked(**settings)
    for change in ({"seed": 1}, {"epoch": 1}, {"step": 1}):
        assert not torch.equal(whole, masked(**settings, **change))
    quarters = [masked(rows=slice(first, first + 16), **settings) for first in range(0, BATCH, 16)]
    assert torch.equal(torch.cat(quarters), whole)


def test_without_masks_features_pass_as_they_are() -> None:
    features = torch.randn(BATCH, VIEWS, BANDS, FRAMES)
    module = SpecAugment(AugmentSection(profile=0), 0)
    assert module(features, epoch=0, step=0, rows=slice(0, BATCH), batch_size=BATCH) is features


@pytest.mark.parametrize("frames", [1, 3])
def test_a_mask_that_is_wider_than_the_features_stays_inside(frames: int) -> None:
    module = SpecAugment(AugmentSection(profile=0, time_masks=1, time_mask_frames=50), 0)
    hidden = module(torch.ones(BATCH, 1, 2, frames), epoch=0, step=0, rows=slice(0, BATCH), batch_size=BATCH)
    assert hidden.shape == (BATCH, 1, 2, frames)
