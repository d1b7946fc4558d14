"""The arithmetic of the losses: fp32, whatever surrounds them, and matrix products as exact as asked for."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal, get_args

import torch
from torch import Tensor

from cel_dist.errors import CelError

MatmulName = Literal["fp32", "tf32", "bf16"]


@contextmanager
def full_precision(x: Tensor) -> Iterator[Tensor]:
    """Embeddings in fp32 (fp64 if they come so), with autocast off as long as the context lasts.

    A bf16 cosine near 1 has steps of 1/256, which w = 10 magnifies to 0.04 in the logits.
    """
    with torch.autocast(x.device.type, enabled=False):
        yield x if x.dtype == torch.float64 else x.float()


class Products:
    """Matrix products of tiles, accumulated in fp32; fp64 stays fp64 whatever is asked for.

    Args:
        matmul: `fp32`; `tf32` rounds the factors to 10 bits of mantissa on the GPUs that can, and is fp32 elsewhere;
            `bf16` rounds them to 7 bits everywhere.

    Raises:
        CelError: `matmul` is unknown.
    """

    def __init__(self, matmul: MatmulName) -> None:
        if matmul not in get_args(MatmulName):
            raise CelError(f"unknown precision '{matmul}' of matrix products; choose one of fp32, tf32, bf16")
        self._matmul = matmul

    @contextmanager
    def active(self) -> Iterator[None]:
        """Let fp32 products of this process use tf32, or not, as long as the context lasts."""
        before = torch.backends.cuda.matmul.fp32_precision
        torch.backends.cuda.matmul.fp32_precision = "tf32" if self._matmul == "tf32" else "ieee"
        try:
            yield
        finally:
            torch.backends.cuda.matmul.fp32_precision = before

    def rounded(self, factor: Tensor) -> Tensor:
        """A factor as the products take it; rounding it once serves all tiles that it meets."""
        if self._matmul != "bf16" or factor.dtype == torch.float64:
            return factor
        # Only GPUs multiply bf16 into fp32. Elsewhere rounded factors in fp32 give the same products.
        return factor.bfloat16() if factor.is_cuda else factor.bfloat16().float()

    def inner(self, a: Tensor, b: Tensor, out: Tensor) -> Tensor:
        """[n, m] inner products of rounded rows [n, d] and [m, d], written to `out`."""
        if a.dtype == torch.bfloat16:
            return torch.mm(a, b.mT, out_dtype=torch.float32, out=out)
        return torch.mm(a, b.mT, out=out)

    def add_weighted(self, total: Tensor, weights: Tensor, rows: Tensor) -> None:
        """Add weights [n, m] times rounded rows [m, d] to a total [n, d], in place."""
        if rows.dtype == torch.bfloat16:
            total += torch.mm(weights.bfloat16(), rows, out_dtype=torch.float32)
        else:
            total.addmm_(self.rounded(weights), rows)
