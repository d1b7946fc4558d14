"""Poolings over time: frames of any number to one vector an utterance.

All take frames [B, F, C] and say in `out_channels` how long their vectors are. Under autocast they weigh and sum in
fp32: bf16 would round the many small weights, and lose a deviation beside its mean.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from cel_dist.errors import CelError

# The smallest variance whose root is taken: below it the gradient of a deviation is 0 instead of growing without bound.
_VARIANCE_FLOOR = 1e-5
# Attention in front of wider maps than this would have more parameters than the network behind it.
_MAX_HIDDEN = 512
_BOTTLENECK = 128


class TemporalAveragePooling(nn.Module):
    """Mean of the frames (TAP; Nagrani et al. 2017, arXiv 1706.08612, section 4.1)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.out_channels = channels

    def forward(self, frames: Tensor) -> Tensor:
        """Pool frames [B, F, C] to [B, C].

        >>> TemporalAveragePooling(1)(torch.tensor([[[1.0], [3.0]]])).item()
        2.0
        """
        return _exact(frames).mean(dim=1)


class SelfAttentivePooling(nn.Module):
    """Mean of the frames weighted by learned attention (SAP; Cai et al. 2018, arXiv 1804.05160, section 3.1).

    With frames x_f: h_f = tanh(W x_f + c), a = softmax over f of <h_f, u>, result sum_f a_f x_f. `hidden` is W and c,
    `context` is u.

    Args:
        channels: size C of a frame.
        hidden_channels: size of h_f. Default: C, at most 512.
    """

    def __init__(self, channels: int, hidden_channels: int | None = None) -> None:
        super().__init__()
        self.out_channels = channels
        hidden_channels = hidden_channels or min(channels, _MAX_HIDDEN)
        self.hidden = nn.Linear(channels, hidden_channels)
        self.context = nn.Parameter(torch.empty(hidden_channels, 1))
        nn.init.xavier_normal_(self.context)

    def forward(self, frames: Tensor) -> Tensor:
        """Pool frames [B, F, C] to [B, C]."""
        # Under autocast the softmax runs in fp32, and so does the sum: bf16 would round the many small weights.
        attention = torch.softmax(torch.tanh(self.hidden(frames)) @ self.context, dim=1)
        return (attention * frames).sum(dim=1)


class StatisticsPooling(nn.Module):
    """Mean and standard deviation of the frames (Snyder et al. 2017, section 3.1; TSP).

    The deviation is that of the frames at hand (divided by F), and at least 0.003; where the frames are all but equal
    it is constant, and so has no gradient.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.out_channels = 2 * channels

    def forward(self, frames: Tensor) -> Tensor:
        """Pool frames [B, F, C] to [B, 2 C]: means, then deviations.

        >>> StatisticsPooling(1)(torch.tensor([[[1.0], [3.0]]])).tolist()
        [[2.0, 1.0]]
        """
        frames = _exact(frames)
        return _mean_and_deviation(frames, 1 / frames.shape[1])


class AttentiveStatisticsPooling(nn.Module):
    """Mean and standard deviation weighted by learned attention of each channel (ASP).

    Okabe et al. 2018, arXiv 1803.10963, equations 3 to 6, with weights of each channel as in Desplanques et al. 2020,
    arXiv 2005.07143, equations 4 to 7: e_f = V tanh(W x_f + c) + k, a = softmax over f of e_f, mean sum_f a_f x_f,
    variance sum_f a_f (x_f - mean)^2. `hidden` is W and c, `attention` is V and k.

    Args:
        channels: size C of a frame.
        hidden_channels: size of the bottleneck of the attention.
        global_context: let the attention see mean and deviation of the whole utterance besides the frame.
    """

    def __init__(self, channels: int, hidden_channels: int = _BOTTLENECK, global_context: bool = False) -> None:
        super().__init__()
        self.out_channels = 2 * channels
        self.hidden = nn.Linear(channels, hidden_channels)
        # Beside the frame's own matrix, not one for all three: what is the same for all frames is multiplied once.
        self.context = nn.Linear(2 * channels, hidden_channels, bias=False) if global_context else None
        self.attention = nn.Linear(hidden_channels, channels)

    def forward(self, frames: Tensor) -> Tensor:
        """Pool frames [B, F, C] to [B, 2 C]: means, then deviations."""
        hidden = self.hidden(frames)
        if self.context is not None:
            exact = _exact(frames)
            hidden = hidden + self.context(_mean_and_deviation(exact, 1 / exact.shape[1]))[:, None]
        weights = torch.softmax(_exact(self.attention(torch.tanh(hidden))), dim=1)
        return _mean_and_deviation(_exact(frames), weights)


_POOLINGS: dict[str, Callable[[int, bool], nn.Module]] = {
    "tap": lambda channels, _: TemporalAveragePooling(channels),
    "sap": lambda channels, _: SelfAttentivePooling(channels),
    "stats": lambda channels, _: StatisticsPooling(channels),
    "asp": lambda channels, global_context: AttentiveStatisticsPooling(channels, global_context=global_context),
}

POOLINGS = tuple(_POOLINGS)
"""Names that `build_pooling` knows."""


def build_pooling(name: str, channels: int, *, global_context: bool = False) -> tuple[nn.Module, int]:
    """A pooling of frames with `channels` channels, and the size of the vectors it gives.

    Args:
        name: one of `POOLINGS`.
        channels: size C of a frame.
        global_context: for `asp`, let the attention see the whole utterance.

    Raises:
        CelError: no pooling has this name.
    """
    if name not in _POOLINGS:
        raise CelError(f"unknown pooling '{name}'; known poolings: {', '.join(POOLINGS)}")
    pooling = _POOLINGS[name](channels, global_context)
    out_channels = pooling.out_channels
    assert isinstance(out_channels, int)
    return pooling, out_channels


def _exact(frames: Tensor) -> Tensor:
    return frames.to(torch.promote_types(frames.dtype, torch.float32))


def _mean_and_deviation(frames: Tensor, weights: Tensor | float) -> Tensor:
    """[B, 2 C] of frames [B, F, C] and weights that sum to 1 over the frames."""
    mean = (weights * frames).sum(dim=1)
    # Of the centred frames: the difference of two large numbers would lose the variance of frames far from 0.
    variance = (weights * (frames - mean[:, None]).square()).sum(dim=1)
    return torch.cat([mean, variance.clamp(min=_VARIANCE_FLOOR).sqrt()], dim=1)
