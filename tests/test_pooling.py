"""Poolings, beside what a few frames give by hand."""

import math

import pytest
import torch
from torch import Tensor

from cel_dist.encoders import (
    AttentiveStatisticsPooling,
    SelfAttentivePooling,
    StatisticsPooling,
    TemporalAveragePooling,
)
from cel_dist.encoders.pooling import POOLINGS, build_pooling
from cel_dist.errors import CelError

# Two channels over four frames: means 3 and 0, deviations sqrt(5) and 2.
FRAMES = torch.tensor([[[0.0, 2.0], [2.0, -2.0], [4.0, 2.0], [6.0, -2.0]]])


def with_weights(pooling: torch.nn.Module, **weights: list) -> torch.nn.Module:
    """The pooling with these parameters, by name with `__` for a dot, and all others 0."""
    with torch.no_grad():
        for name, parameter in pooling.named_parameters():
            parameter.copy_(torch.tensor(weights.get(name.replace(".", "__"), 0.0)))
    return pooling


def test_temporal_average_pooling_is_the_mean() -> None:
    torch.testing.assert_close(TemporalAveragePooling(2)(FRAMES), torch.tensor([[3.0, 0.0]]))


def test_statistics_pooling_is_mean_and_deviation() -> None:
    torch.testing.assert_close(StatisticsPooling(2)(FRAMES), torch.tensor([[3.0, 0.0, math.sqrt(5), 2.0]]))


def test_a_deviation_far_from_0_keeps_its_digits() -> None:
    pooled = StatisticsPooling(2)(FRAMES + 5000)
    torch.testing.assert_close(pooled[:, 2:], torch.tensor([[math.sqrt(5), 2.0]]), rtol=1e-5, atol=0)


def test_self_attentive_pooling_of_equal_frames_returns_that_frame() -> None:
    frame = torch.randn(2, 1, 16)
    torch.testing.assert_close(SelfAttentivePooling(16)(frame.expand(2, 9, 16)), frame[:, 0])


def test_self_attentive_pooling_follows_its_attention() -> None:
    pooling = with_weights(SelfAttentivePooling(2), hidden__weight=[[1.0, 0], [0, 1]], context=[[40.0], [0]])
    pooled = pooling(torch.tensor([[[3.0, 1.0], [-3.0, 7.0]]]))
    torch.testing.assert_close(pooled, torch.tensor([[3.0, 1.0]]))


def test_attentive_statistics_without_attention_are_plain_ones() -> None:
    for global_context in (False, True):
        pooling = with_weights(AttentiveStatisticsPooling(2, 3, global_context))
        torch.testing.assert_close(pooling(FRAMES), StatisticsPooling(2)(FRAMES))


def test_attentive_statistics_are_weighted_by_the_softmax_of_each_channel() -> None:
    # The first channel attends by log(3) tanh(second), which is +-log(3) t; the second one not at all.
    pooling = with_weights(
        AttentiveStatisticsPooling(2, 1), hidden__weight=[[0.0, 1.0]], attention__weight=[[math.log(3)], [0.0]]
    )
    power = 3 ** math.tanh(2)
    high, low = power / (2 * power + 2 / power), (1 / power) / (2 * power + 2 / power)
    mean = 0 * high + 2 * low + 4 * high + 6 * low
    variance = high * (mean**2 + (4 - mean) ** 2) + low * ((2 - mean) ** 2 + (6 - mean) ** 2)
    expected = torch.tensor([[mean, 0.0, math.sqrt(variance), 2.0]])
    torch.testing.assert_close(pooling(FRAMES), expected)


def test_the_global_context_is_mean_and_deviation_of_the_utterance() -> None:
    pooling = with_weights(
        AttentiveStatisticsPooling(1, 1, global_context=True),
        hidden__weight=[[1.0]],
        context__weight=[[-1.0, 0.0]],
        attention__weight=[[1.0]],
    )
    # Minus the mean: a shift of the frames leaves the weights as they are.
    frames = torch.tensor([[[1.0], [2.0], [4.0]]])
    torch.testing.assert_close(pooling(frames + 10) - pooling(frames), torch.tensor([[10.0, 0.0]]), rtol=0, atol=1e-5)
    weights = torch.softmax(torch.tanh(frames - frames.mean()), dim=1)
    torch.testing.assert_close(pooling(frames)[0, 0], (weights * frames).sum())
    with torch.no_grad():
        pooling.context.weight.copy_(torch.tensor([[0.0, -1.0]]))
    weights = torch.softmax(torch.tanh(frames - frames.std(correction=0)), dim=1)
    torch.testing.assert_close(pooling(frames)[0, 0], (weights * frames).sum())


@pytest.mark.parametrize("name", POOLINGS)
def test_gradients_of_equal_frames_and_of_one_frame_are_finite(name: str) -> None:
    pooling, out_channels = build_pooling(name, 4, global_context=True)
    for num_frames in (1, 9):
        frames = torch.randn(2, 1, 4).expand(2, num_frames, 4).clone().requires_grad_()
        pooled = pooling(frames)
        assert pooled.shape == (2, out_channels)
        pooled.square().sum().backward()
        assert torch.isfinite(frames.grad).all()


@pytest.mark.parametrize("name", POOLINGS)
def test_gradients_are_those_of_the_formula(name: str) -> None:
    torch.manual_seed(0)
    pooling = build_pooling(name, 3, global_context=True)[0].double()
    frames = torch.randn(2, 5, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(pooling, (frames,))


@pytest.mark.parametrize("name", ["tap", "stats", "asp"])
def test_under_autocast_weights_and_sums_are_fp32(name: str) -> None:
    frames: Tensor = 1000 + torch.randn(1, 400, 4)
    pooling, _ = build_pooling(name, 4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        pooled = pooling(frames)
    assert pooled.dtype == torch.float32
    torch.testing.assert_close(pooled[:, :4], frames.mean(dim=1), rtol=0, atol=0.5)


def test_self_attention_is_no_wider_than_512() -> None:
    assert SelfAttentivePooling(2560).hidden.weight.shape == (512, 2560)
    assert SelfAttentivePooling(128).hidden.weight.shape == (128, 128)


def test_an_unknown_pooling_is_answered_with_the_known_ones() -> None:
    with pytest.raises(CelError, match="unknown pooling 'mean'; known poolings: tap, sap, stats, asp"):
        build_pooling("mean", 4)
