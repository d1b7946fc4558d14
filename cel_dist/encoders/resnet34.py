"""ResNet-34 with 32 to 256 filters, over the spectrogram as a picture."""

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from cel_dist.encoders.initialisation import initialise_convolutions
from cel_dist.encoders.pooling import build_pooling
from cel_dist.encoders.registry import register_encoder
from cel_dist.encoders.residual import residual_stages, shortcut


class BasicBlock(nn.Module):
    """Two 3x3 convolutions around a shortcut (He et al. 2016, arXiv 1512.03385, figure 5 left)."""

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride=stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(channels)
        self.shortcut = shortcut(in_channels, channels, stride)

    def forward(self, x: Tensor) -> Tensor:
        """Map [B, C, H, F] to [B, C', H', F']."""
        y = torch.relu(self.norm1(self.conv1(x)))
        return torch.relu(self.norm2(self.conv2(y)) + self.shortcut(x))


@register_encoder("resnet34", source="Zeinali et al. 2019, arXiv 1910.12592; He et al. 2016", pooling="stats")
class ResNet34(nn.Module):
    """ResNet-34 with 32-64-128-256 filters (Zeinali et al. 2019, arXiv 1910.12592, table 2; He et al. 2016).

    Features [B, M, F] to embeddings [B, embedding_dim] that are not normalised. A 3x3 stem of stride 1, no
    squeeze-and-excitation; the pooling sees channels and the bands that are left as one axis, so that a frame keeps the
    place of what it holds in the spectrum. 6.63 million parameters with 80 bands and 256 dimensions.

    >>> ResNet34(256, num_mels=80)(torch.randn(2, 80, 50)).shape
    torch.Size([2, 256])
    """

    # Channels, blocks, stride of the first block. A variant overrides it.
    layout: ClassVar[Sequence[tuple[int, int, int]]] = ((32, 3, 1), (64, 4, 2), (128, 6, 2), (256, 3, 2))

    def __init__(self, embedding_dim: int = 512, *, pooling: str = "stats", num_mels: int = 40) -> None:
        super().__init__()
        self.embedding_dim = embedding_dim
        channels = self.layout[0][0]
        self.stem = nn.Conv2d(1, channels, 3, padding=1, bias=False)
        self.stem_norm = nn.BatchNorm2d(channels)
        self.stages = residual_stages(BasicBlock, channels, self.layout)
        num_bands = num_mels
        for _, _, stride in self.layout:
            num_bands = -(-num_bands // stride)
        self.pooling, pooled_channels = build_pooling(pooling, self.layout[-1][0] * num_bands)
        self.projection = nn.Linear(pooled_channels, embedding_dim)
        initialise_convolutions(self)

    def forward(self, features: Tensor) -> Tensor:
        """Embed features [B, M, F] as [B, embedding_dim], in the dtype of autocast, else in that of the parameters."""
        x = self.stem(features.unsqueeze(1))
        # The single input channel leaves the memory format ambiguous, so it is fixed here; everything behind follows.
        x = torch.relu(self.stem_norm(x.contiguous(memory_format=torch.channels_last)))
        frames = self.stages(x).permute(0, 3, 1, 2).flatten(2)
        embeddings: Tensor = self.projection(self.pooling(frames))
        return embeddings
