"""What the residual networks share: a chain of stages, and the way around a block."""

from collections.abc import Callable, Iterable

from torch import nn


def residual_stages(
    block: Callable[[int, int, int], nn.Module], in_channels: int, stages: Iterable[tuple[int, int, int]]
) -> nn.Sequential:
    """Stages of blocks behind each other.

    Args:
        block: makes one of input channels, output channels and stride.
        in_channels: of the first stage.
        stages: of each its channels, its number of blocks and the stride of the first of them.
    """
    chain = nn.Sequential()
    for channels, num_blocks, stride in stages:
        blocks = [block(in_channels, channels, stride), *(block(channels, channels, 1) for _ in range(num_blocks - 1))]
        chain.append(nn.Sequential(*blocks))
        in_channels = channels
    return chain


def shortcut(in_channels: int, channels: int, stride: int) -> nn.Module:
    """The way around a block: a 1x1 convolution where its ends differ in shape, else nothing (He et al. 2016, arXiv
    1512.03385, option B)."""
    if stride == 1 and in_channels == channels:
        return nn.Identity()
    return nn.Sequential(nn.Conv2d(in_channels, channels, 1, stride=stride, bias=False), nn.BatchNorm2d(channels))
