"""The arithmetic of the losses: fp32, whatever surrounds them."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


@contextmanager
def full_precision(x: Tensor) -> Iterator[Tensor]:
    """Embeddings in fp32 (fp64 if they come so), with autocast off as long as the context lasts.

    A bf16 cosine near 1 has steps of 1/256, which w = 10 magnifies to 0.04 in the logits.
    """
    with torch.autocast(x.device.type, enabled=False):
        yield x if x.dtype == torch.float64 else x.float()
