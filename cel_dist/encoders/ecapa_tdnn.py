"""ECAPA-TDNN: emphasised channel attention, propagation and aggregation (Desplanques et al. 2020, arXiv 2005.07143)."""

import torch
from torch import Tensor, nn

from cel_dist.encoders.pooling import build_pooling
from cel_dist.encoders.registry import register_encoder
from cel_dist.encoders.tdnn import FrameLayer

_SCALE = 8
_BOTTLENECK = 128
_AGGREGATED_CHANNELS = 1536
_DILATIONS = (2, 3, 4)
_SOURCE = "Desplanques et al. 2020, arXiv 2005.07143"


class Res2Layer(nn.Module):
    """Dilated convolutions over parts of the channels, each of which sees the outcome of the one before it.

    Res2Net (Gao et al. 2019, arXiv 1904.01169, equation 1): of 8 parts the first stays as it is.
    """

    def __init__(self, channels: int, dilation: int) -> None:
        super().__init__()
        width = channels // _SCALE
        self.parts = nn.ModuleList(FrameLayer(width, width, 3, dilation) for _ in range(_SCALE - 1))

    def forward(self, x: Tensor) -> Tensor:
        """Map [B, C, F] to [B, C, F]."""
        first, *others = x.chunk(_SCALE, dim=1)
        outputs = [first]
        for layer, part in zip(self.parts, others, strict=True):
            outputs.append(layer(part if len(outputs) == 1 else part + outputs[-1]))
        return torch.cat(outputs, dim=1)


class ChannelGate(nn.Module):
    """Squeeze-and-excitation over time (section 3.2, equations 2 and 3)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.squeeze = nn.Linear(channels, _BOTTLENECK)
        self.excite = nn.Linear(_BOTTLENECK, channels)

    def forward(self, x: Tensor) -> Tensor:
        """Gate [B, C, F] channel by channel."""
        gates = torch.sigmoid(self.excite(torch.relu(self.squeeze(x.mean(dim=2)))))
        return x * gates[:, :, None]


class SeRes2Block(nn.Module):
    """The SE-Res2Block of figure 1: two 1x1 convolutions around a Res2 layer, gates, and a shortcut."""

    def __init__(self, channels: int, dilation: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            FrameLayer(channels, channels, 1),
            Res2Layer(channels, dilation),
            FrameLayer(channels, channels, 1),
            ChannelGate(channels),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Map [B, C, F] to [B, C, F]."""
        y: Tensor = self.layers(x) + x
        return y


class EcapaTdnn(nn.Module):
    """ECAPA-TDNN of any number of channels (figure 2).

    Features [B, M, F] to embeddings [B, embedding_dim] that are not normalised. Each block sees the sum of what all
    before it gave (section 3.3), a 1x1 convolution joins the outputs of the three, and the attention of the pooling
    sees the whole utterance (section 3.1). Both the pooled statistics and the embedding pass a batch norm, which takes
    two rows or more in training. The paper's embeddings have 192 dimensions and its features 80 coefficients.

    Args:
        channels: filters C of the blocks.
        embedding_dim: size D of the embedding.
        pooling: `asp` is the paper's, with the context of the utterance.
        num_mels: mel bands M.
    """

    def __init__(self, channels: int, embedding_dim: int, *, pooling: str = "asp", num_mels: int = 40) -> None:
        super().__init__()
        self.embedding_dim = embedding_dim
        self.stem = FrameLayer(num_mels, channels, 5)
        self.blocks = nn.ModuleList(SeRes2Block(channels, dilation) for dilation in _DILATIONS)
        self.aggregation = nn.Conv1d(channels * len(_DILATIONS), _AGGREGATED_CHANNELS, 1)
        self.pooling, pooled_channels = build_pooling(pooling, _AGGREGATED_CHANNELS, global_context=True)
        self.pooling_norm = nn.BatchNorm1d(pooled_channels)
        self.projection = nn.Linear(pooled_channels, embedding_dim)
        self.embedding_norm = nn.BatchNorm1d(embedding_dim)

    def forward(self, features: Tensor) -> Tensor:
        """Embed features [B, M, F] as [B, embedding_dim], in the dtype of autocast, else in that of the parameters."""
        total = self.stem(features)
        outputs = []
        for block in self.blocks:
            outputs.append(block(total))
            total = total + outputs[-1]
        frames = torch.relu(self.aggregation(torch.cat(outputs, dim=1))).transpose(1, 2)
        embeddings: Tensor = self.embedding_norm(self.projection(self.pooling_norm(self.pooling(frames))))
        return embeddings


@register_encoder("ecapa_tdnn_512", source=_SOURCE, pooling="asp", min_rows=2)
class EcapaTdnn512(EcapaTdnn):
    """ECAPA-TDNN with 512 channels; 6.2 million parameters with 80 bands and 192 dimensions.

    >>> EcapaTdnn512(192)(torch.randn(2, 40, 50)).shape
    torch.Size([2, 192])
    """

    def __init__(self, embedding_dim: int = 192, *, pooling: str = "asp", num_mels: int = 40) -> None:
        super().__init__(512, embedding_dim, pooling=pooling, num_mels=num_mels)


@register_encoder("ecapa_tdnn_1024", source=_SOURCE, pooling="asp", min_rows=2)
class EcapaTdnn1024(EcapaTdnn):
    """ECAPA-TDNN with 1024 channels; 14.7 million parameters with 80 bands and 192 dimensions."""

    def __init__(self, embedding_dim: int = 192, *, pooling: str = "asp", num_mels: int = 40) -> None:
        super().__init__(1024, embedding_dim, pooling=pooling, num_mels=num_mels)
