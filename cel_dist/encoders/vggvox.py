"""VGGVox: VGG-M for log-mel features."""

import torch
from torch import Tensor, nn

from cel_dist.encoders.initialisation import initialise_convolutions
from cel_dist.encoders.pooling import build_pooling
from cel_dist.encoders.registry import register_encoder
from cel_dist.errors import CelError

_LAST_CHANNELS = 512
# Below this number of bands the poolings leave nothing of them.
_MIN_MELS = 16


class ConvLayer(nn.Sequential):
    """Convolution, batch norm, ReLU; kernel, stride and padding are (over the bands, over time)."""

    def __init__(
        self,
        in_channels: int,
        channels: int,
        kernel: tuple[int, int],
        stride: tuple[int, int] = (1, 1),
        padding: tuple[int, int] = (1, 1),
    ) -> None:
        super().__init__(
            nn.Conv2d(in_channels, channels, kernel, stride=stride, padding=padding, bias=False),
            nn.BatchNorm2d(channels),
            nn.ReLU(),
        )


@register_encoder("vggvox", source="Nagrani et al. 2017, arXiv 1706.08612; VGG-M-40, arXiv 2003.11982", pooling="tap")
class VggVox(nn.Module):
    """VGG-M-40: VGGVox with log-mel features in place of a spectrogram (Chung et al. 2020, arXiv 2003.11982, section
    4.2; Nagrani et al. 2017, table 3).

    Features [B, M, F] to embeddings [B, embedding_dim] that are not normalised. Five convolutions of 96, 256, 384, 256
    and 256 filters with three maximum poolings between them, then fc6, a convolution over all bands that are left, the
    pooling over time, and fc7. Kernels, strides and what lies beyond the bands' ends are as published. Over time every
    layer is padded by half its kernel, so that short segments keep a frame, too: one in 32 of the features is left.

    >>> VggVox()(torch.randn(2, 40, 182)).shape
    torch.Size([2, 512])

    Raises:
        CelError: fewer than 16 mel bands.
    """

    def __init__(self, embedding_dim: int = 512, *, pooling: str = "tap", num_mels: int = 40) -> None:
        super().__init__()
        if num_mels < _MIN_MELS:
            raise CelError(f"encoder 'vggvox' takes {_MIN_MELS} mel bands or more, not {num_mels}; set num_mels to 40")
        self.embedding_dim = embedding_dim
        self.conv1 = ConvLayer(1, 96, (5, 7), stride=(1, 2), padding=(2, 3))
        self.layers = nn.Sequential(
            nn.MaxPool2d((1, 3), stride=(1, 2), padding=(0, 1)),
            ConvLayer(96, 256, (5, 5), stride=(2, 2), padding=(1, 2)),
            nn.MaxPool2d((3, 3), stride=(2, 2), padding=(1, 1)),
            ConvLayer(256, 384, (3, 3)),
            ConvLayer(384, 256, (3, 3)),
            ConvLayer(256, 256, (3, 3)),
            nn.MaxPool2d((3, 3), stride=(2, 2), padding=(0, 1)),
        )
        self.fc6 = ConvLayer(256, _LAST_CHANNELS, (_bands_left(num_mels), 1), padding=(0, 0))
        self.pooling, pooled_channels = build_pooling(pooling, _LAST_CHANNELS)
        self.fc7 = nn.Linear(pooled_channels, embedding_dim)
        initialise_convolutions(self)

    def forward(self, features: Tensor) -> Tensor:
        """Embed features [B, M, F] as [B, embedding_dim], in the dtype of autocast, else in that of the parameters."""
        # A single channel leaves the memory format ambiguous, so it is fixed behind the first layer.
        x = self.conv1(features.unsqueeze(1)).contiguous(memory_format=torch.channels_last)
        frames = self.fc6(self.layers(x)).squeeze(2).transpose(1, 2)
        embeddings: Tensor = self.fc7(self.pooling(frames))
        return embeddings


def _bands_left(num_mels: int) -> int:
    """Rows of the map that fc6 spans: 4 of 40 bands, as published, 9 of 80."""
    rows = (num_mels + 2 * 1 - 5) // 2 + 1
    rows = (rows + 2 * 1 - 3) // 2 + 1
    return (rows - 3) // 2 + 1
