"""What an encoder costs: parameters, and multiply-adds for a segment."""

from typing import NamedTuple

import torch
from torch.utils.flop_counter import FlopCounterMode

from cel_dist.encoders.registry import build_encoder


class Cost(NamedTuple):
    """Size and work of an encoder.

    Attributes:
        parameters: number of trainable values.
        multiply_adds: products that are added up in convolutions and matrix products, one multiplication with its
            addition counted as one, to embed one segment. Batch norm, activations, and sums and products value by value
            are left out, as is common.
    """

    parameters: int
    multiply_adds: int


def encoder_cost(
    name: str, embedding_dim: int = 512, *, pooling: str | None = None, num_mels: int = 40, num_frames: int = 200
) -> Cost:
    """Parameters of an encoder, and multiply-adds for one segment; 200 frames are 2 s. Nothing is computed.

    Args:
        name: registered name.
        embedding_dim: size D of the embedding.
        pooling: as `build_encoder` takes it.
        num_mels: mel bands M of the features.
        num_frames: frames F of the features.

    Raises:
        CelError: as `build_encoder`.

    >>> encoder_cost("fast_resnet34").parameters
    1437078
    """
    # On the meta device tensors have shapes and no values.
    with torch.device("meta"), torch.no_grad():
        encoder = build_encoder(name, embedding_dim, pooling=pooling, num_mels=num_mels).eval()
        with FlopCounterMode(display=False) as counter:
            encoder(torch.empty(1, num_mels, num_frames))
    # It counts a multiplication and an addition as two.
    return Cost(sum(parameter.numel() for parameter in encoder.parameters()), counter.get_total_flops() // 2)
