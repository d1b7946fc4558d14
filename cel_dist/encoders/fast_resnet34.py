"""Fast ResNet-34: the published encoder of CEL."""

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from cel_dist.encoders.initialisation import initialise_convolutions
from cel_dist.encoders.pooling import build_pooling
from cel_dist.encoders.registry import register_encoder
from cel_dist.encoders.residual import residual_stages, shortcut

_REDUCTION = 8


class SqueezeExcitation(nn.Module):
    """Scales channels by gates computed from their means (Hu et al. 2018, arXiv 1709.01507)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.squeeze = nn.Linear(channels, channels // _REDUCTION)
        self.excite = nn.Linear(channels // _REDUCTION, channels)

    def forward(self, x: Tensor) -> Tensor:
        """Gate a map [B, C, H, F] channel by channel."""
        # Not `mean`: of bf16 on a CPU it makes an fp32 copy of the whole map, and its gradient is a map in another
        # memory format than that of x, which is slow to add. The numbers are the same.
        means = x.sum(dim=(2, 3)) / (x.shape[2] * x.shape[3])
        gates = torch.sigmoid(self.excite(torch.relu(self.squeeze(means))))
        return x * gates[:, :, None, None]


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions with squeeze-and-excitation around a shortcut.

    As published, the first convolution is followed by ReLU and then by batch norm, not the other way round.
    """

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride=stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(channels)
        self.gate = SqueezeExcitation(channels)
        self.shortcut = shortcut(in_channels, channels, stride)

    def forward(self, x: Tensor) -> Tensor:
        """Map [B, C, H, F] to [B, C', H', F']."""
        y = self.norm1(torch.relu(self.conv1(x)))
        y = self.gate(self.norm2(self.conv2(y)))
        return torch.relu(y + self.shortcut(x))


@register_encoder("fast_resnet34", source="Chung et al. 2020, arXiv 2003.11982", pooling="sap")
class FastResNet34(nn.Module):
    """Fast ResNet-34 with self-attentive pooling (Chung et al. 2020, arXiv 2003.11982; CEL, Mun et al. 2020).

    Features [B, M, F] to embeddings [B, embedding_dim] that are not normalised. 16-32-64-128 filters,
    squeeze-and-excitation with reduction 8, a 7x7 stem of stride 2 over the mel bands and 1 over time; 1 437 078
    parameters with 512 dimensions. The mel bands are averaged in front of the pooling, so that any number of them has
    the same parameters.

    >>> FastResNet34()(torch.randn(2, 40, 182)).shape
    torch.Size([2, 512])
    """

    # Channels, blocks, stride of the first block. A variant overrides it.
    layout: ClassVar[Sequence[tuple[int, int, int]]] = ((16, 3, 1), (32, 4, 2), (64, 6, 2), (128, 3, 1))

    def __init__(self, embedding_dim: int = 512, *, pooling: str = "sap", num_mels: int = 40) -> None:
        super().__init__()
        self.embedding_dim = embedding_dim
        channels = self.layout[0][0]
        self.stem = nn.Conv2d(1, channels, 7, stride=(2, 1), padding=3, bias=False)
        self.stem_norm = nn.BatchNorm2d(channels)
        self.stages = residual_stages(ResidualBlock, channels, self.layout)
        self.pooling, pooled_channels = build_pooling(pooling, self.layout[-1][0])
        self.projection = nn.Linear(pooled_channels, embedding_dim)
        initialise_convolutions(self)

    def forward(self, features: Tensor) -> Tensor:
        """Embed features [B, M, F] as [B, embedding_dim], in the dtype of autocast, else in that of the parameters."""
        x = self.stem(features.unsqueeze(1))
        # The single input channel leaves the memory format ambiguous, so it is fixed here; everything behind follows.
        # The weights stay contiguous, because DeepSpeed flattens them and their gradients.
        x = torch.relu(self.stem_norm(x.contiguous(memory_format=torch.channels_last)))
        x = self.stages(x)
        frames = x.mean(dim=2).transpose(1, 2)
        embeddings: Tensor = self.projection(self.pooling(frames))
        return embeddings
