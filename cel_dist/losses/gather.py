"""The rows of all ranks as one batch, with a gradient that needs no communication."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from cel_dist.errors import CelError


def gather_rows(x: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """All ranks' rows in rank order, differentiable: one all-gather forward, no collective backward.

    Every rank computes the same loss from the same K rows. The gradient of that loss at this rank's rows is then a
    slice of what the rank has already, and no rank needs to hear of the others. The slice is multiplied by W, because
    the engine averages parameter gradients over the ranks where the global loss has their sum. Parameters behind the
    gather (w and b) get the whole gradient on every rank, which a mean leaves as it is.

    Args:
        x: [B, V, D] this rank's rows, of the same shape and dtype on every rank (`check_equal_rows`).
        group: the ranks that share the batch; None stands for this process alone.

    Returns:
        [K, V, D] with K = W B; `x` itself for a single rank.
    """
    if group is None or dist.get_world_size(group) == 1:
        return x
    rows: Tensor = _GatherRows.apply(x, group)  # type: ignore[no-untyped-call]
    return rows


def check_equal_rows(x: Tensor, group: dist.ProcessGroup | None) -> None:
    """Compare the shapes of all ranks' rows [B, V, D]; a small collective, so once per shape and not once per step.

    Raises:
        CelError: the shapes differ, on every rank alike; ranks and shapes are named.
    """
    if group is None or dist.get_world_size(group) == 1:
        return
    shapes = x.new_empty((dist.get_world_size(group), x.ndim), dtype=torch.int64)
    _all_gather(shapes, torch.tensor([x.shape], device=x.device), group=group)
    if bool((shapes != shapes[0]).any()):
        found = ", ".join(f"rank {rank} {shape}" for rank, shape in enumerate(shapes.tolist()))
        raise CelError(
            f"the ranks hold rows of different shape [B, V, D]: {found}; give every rank the same number of utterances"
        )


# The newer name of the same collective; the older one warns from torch 2.13 on.
_all_gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        world_size = dist.get_world_size(group)
        first = dist.get_rank(group) * len(x)
        ctx.own = slice(first, first + len(x))
        ctx.world_size = world_size
        rows = x.new_empty((world_size * len(x), *x.shape[1:]))
        _all_gather(rows, x.contiguous(), group=group)
        return rows

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad[ctx.own] * ctx.world_size, None
