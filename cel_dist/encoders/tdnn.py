"""TDNN: the x-vector network."""

import torch
from torch import Tensor, nn

from cel_dist.encoders.pooling import build_pooling
from cel_dist.encoders.registry import register_encoder

_CHANNELS = 512
_LAST_CHANNELS = 1500
# Kernel and dilation of the layers frame1 to frame5.
_CONTEXTS = ((5, 1), (3, 2), (3, 3), (1, 1), (1, 1))


class FrameLayer(nn.Module):
    """A convolution over time, ReLU, batch norm; as many frames as before, with zeros beyond both ends.

    Zero is the mean of a band, and of a normalised channel.
    """

    def __init__(self, in_channels: int, channels: int, kernel: int, dilation: int = 1) -> None:
        super().__init__()
        padding = dilation * (kernel // 2)
        self.conv = nn.Conv1d(in_channels, channels, kernel, dilation=dilation, padding=padding)
        self.norm = nn.BatchNorm1d(channels)

    def forward(self, x: Tensor) -> Tensor:
        """Map [B, C, F] to [B, C', F]."""
        y: Tensor = self.norm(torch.relu(self.conv(x)))
        return y


@register_encoder("tdnn", source="Snyder et al. 2018, X-vectors, ICASSP, table 1", pooling="stats")
class Tdnn(nn.Module):
    """The x-vector network up to the layer whose output is the embedding (Snyder et al. 2018, table 1).

    Features [B, M, F] to embeddings [B, embedding_dim] that are not normalised: frame1 to frame5, statistics pooling,
    and the affine part of segment6. What follows in the paper, segment7 and the softmax, is there for training by
    classification and belongs to a loss. 4.2 million parameters with the paper's 24 coefficients and 512 dimensions.

    >>> Tdnn()(torch.randn(2, 40, 182)).shape
    torch.Size([2, 512])
    """

    def __init__(self, embedding_dim: int = 512, *, pooling: str = "stats", num_mels: int = 40) -> None:
        super().__init__()
        self.embedding_dim = embedding_dim
        self.frame_layers = nn.Sequential()
        in_channels = num_mels
        for number, (kernel, dilation) in enumerate(_CONTEXTS, start=1):
            channels = _LAST_CHANNELS if number == len(_CONTEXTS) else _CHANNELS
            self.frame_layers.append(FrameLayer(in_channels, channels, kernel, dilation))
            in_channels = channels
        self.pooling, pooled_channels = build_pooling(pooling, in_channels)
        self.projection = nn.Linear(pooled_channels, embedding_dim)

    def forward(self, features: Tensor) -> Tensor:
        """Embed features [B, M, F] as [B, embedding_dim], in the dtype of autocast, else in that of the parameters."""
        frames = self.frame_layers(features).transpose(1, 2)
        embeddings: Tensor = self.projection(self.pooling(frames))
        return embeddings
