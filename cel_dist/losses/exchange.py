"""How a rank comes by the rows of the others: gathered at once, or block by block around a ring.

Both give the same rows, and a pass over them never sends a gradient: every rank owns its rows, and computes from the
rows of all of them whatever belongs to its own.
"""

import logging
from collections.abc import Iterator
from typing import Literal, NamedTuple, get_args

import psutil
import torch
import torch.distributed as dist
from torch import Tensor

from cel_dist.distributed import World
from cel_dist.errors import CelError

logger = logging.getLogger(__name__)

ExchangeName = Literal["gather", "ring", "auto"]

# Of the memory that is free when `auto` decides, the encoder's activations need the most.
_SHARE_OF_FREE_MEMORY = 0.1


class Block(NamedTuple):
    """Consecutive rows of the global batch.

    Attributes:
        rows: [n, V, D] embeddings, as the encoder gave them.
        ids: [n] int64 sample ids.
        first: position of the first of them in the global batch.
    """

    rows: Tensor
    ids: Tensor
    first: int


class Exchange:
    """The rows of the global batch, as often as they are asked for.

    Args:
        group: the ranks that share the batch; None stands for this process alone.
        how: `gather` keeps all K rows, after one all-gather a step; `ring` keeps three blocks of B rows (the own, the
            one at hand and the one that comes), and every pass costs W - 1 exchanges with the neighbours, which run
            beside the work on the block at hand; `auto` gathers as long as the rows take less than a tenth of the
            memory that is free on every rank.

    Raises:
        CelError: `how` is unknown.
    """

    def __init__(self, group: dist.ProcessGroup | None, how: ExchangeName) -> None:
        if how not in get_args(ExchangeName):
            raise CelError(f"unknown exchange '{how}' of the loss; choose one of {', '.join(get_args(ExchangeName))}")
        self._group = group
        self._how = how
        self._agreed: tuple[torch.Size, torch.dtype, bool] | None = None
        self._ring = how == "ring"

    @property
    def world_size(self) -> int:
        """Number W of ranks that share the batch."""
        return 1 if self._group is None else dist.get_world_size(self._group)

    @property
    def chosen(self) -> Literal["gather", "ring"]:
        """What is used; with `auto`, only after the ranks agreed on it."""
        return "ring" if self._ring else "gather"

    @property
    def rank(self) -> int:
        """This process's place among them."""
        return 0 if self._group is None else dist.get_rank(self._group)

    def agree(self, x: Tensor, has_ids: bool, problem: str = "") -> None:
        """Compare what the ranks bring, and let `auto` decide; a small collective, once per shape and not per step.

        It takes place at the first call, and again when shape, type or the presence of ids is not that of the call
        before. So all ranks must change these together: one that changes them alone later is alone in the collective.

        Args:
            x: [B, V, D] this rank's rows, fp32 or fp64.
            has_ids: whether they come with sample ids.
            problem: why this rank's rows or ids cannot be used; empty if they can.

        Raises:
            CelError: there is a problem, shapes or types differ, or some ranks bring ids and others none; on every
                rank alike and with the ranks named, save for a problem after the first call, which only the ranks
                that have it raise.
        """
        if problem and (self.world_size == 1 or self._agreed is not None):
            raise CelError(problem)
        if self.world_size == 1 or self._agreed == (x.shape, x.dtype, has_ids):
            return
        # Rows that are a problem may have any number of dimensions, and the vectors of all ranks the same length.
        shape = (0, 0, 0) if problem else x.shape
        mine = [bool(problem), *shape, x.dtype == torch.float64, has_ids, _free_bytes(x.device)]
        found = self.gather_vectors(torch.tensor(mine, device=x.device))
        problems, shapes, are_double, with_ids = found[:, 0], found[:, 1:4], found[:, 4], found[:, 5]
        free = int(found[:, 6].min())
        if bool(problems.any()):
            having = ", ".join(str(rank) for rank, some in enumerate(problems.tolist()) if some)
            raise CelError(
                f"rank {having} brings rows or ids that cannot be used" + (f": {problem}" if problem else "")
            )
        if bool((are_double != are_double[0]).any()):
            double = ", ".join(str(rank) for rank, some in enumerate(are_double.tolist()) if some)
            raise CelError(f"rank {double} brings rows of float64 and others of float32; give all ranks the same type")
        if bool((shapes != shapes[0]).any()):
            listed = ", ".join(f"rank {rank} {shape}" for rank, shape in enumerate(shapes.tolist()))
            raise CelError(
                f"the ranks hold rows of different shape [B, V, D]: {listed}; give every rank the same number of "
                "utterances"
            )
        if bool((with_ids != with_ids[0]).any()):
            without = ", ".join(str(rank) for rank, some in enumerate(with_ids.tolist()) if not some)
            raise CelError(f"rank {without} brings no sample ids and others do; pass ids on all ranks or on none")
        if self._how == "auto":
            gathered = self.world_size * x.numel() * x.element_size()
            self._ring = gathered > _SHARE_OF_FREE_MEMORY * free
            if self.rank == 0:
                logger.info(
                    "loss.exchange=auto: %s; the rows of all ranks take %.1f MiB, %.0f MiB are free",
                    self.chosen,
                    gathered / 2**20,
                    free / 2**20,
                )
        self._agreed = (x.shape, x.dtype, has_ids)

    def share(self, x: Tensor, ids: Tensor | None) -> "SharedRows":
        """Make this rank's rows [B, V, D] and ids [B] known to the others; `agree` comes first.

        Without ids every row counts as a sample of its own.
        """
        payload = _pack(x, ids)
        if self.world_size > 1 and not self._ring:
            gathered = payload.new_empty((self.world_size * len(payload), payload.shape[1]))
            _all_gather(gathered, payload, group=self._group)
            payload = gathered
        return SharedRows(payload, x.shape, ids is not None, self._group if self._ring else None)

    def gather_vectors(self, vector: Tensor) -> Tensor:
        """The vectors [n] of all ranks, [W, n]."""
        gathered = vector.new_empty(self.world_size * len(vector))
        if self.world_size > 1:
            _all_gather(gathered, vector, group=self._group)
        else:
            gathered.copy_(vector)
        return gathered.view(self.world_size, -1)

    def total(self, x: Tensor) -> Tensor:
        """Sum of the ranks' tensors, which have one shape; on every rank."""
        return self._reduced(x, dist.ReduceOp.SUM)

    def largest(self, x: Tensor) -> Tensor:
        """The largest of the ranks' numbers at every place of tensors of one shape; on every rank."""
        return self._reduced(x, dist.ReduceOp.MAX)

    def own_rows_of_total(self, x: Tensor) -> Tensor:
        """This rank's B rows of the sum of the ranks' tensors [W B, ...]."""
        if self.world_size == 1:
            return x
        own = x.new_empty((len(x) // self.world_size, *x.shape[1:]))
        _reduce_scatter(own, x.contiguous(), group=self._group)
        return own

    def _reduced(self, x: Tensor, operation: dist.ReduceOp.RedOpType) -> Tensor:
        if self.world_size == 1:
            return x
        reduced = x.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(reduced, operation, group=self._group)
        return reduced


class SharedRows:
    """The rows of the global batch; every iteration is one pass over all blocks. A ring starts with the own block."""

    def __init__(self, payload: Tensor, shape: torch.Size, has_ids: bool, ring: dist.ProcessGroup | None) -> None:
        self._payload = payload
        self._shape = shape
        self._has_ids = has_ids
        self._ring = ring

    def __iter__(self) -> Iterator[Block]:
        if self._ring is None:
            yield self._unpack(self._payload, 0)
            return
        rank, world_size = dist.get_rank(self._ring), dist.get_world_size(self._ring)
        current, coming = self._payload, torch.empty_like(self._payload)
        for turn in range(world_size):
            requests = self._pass_on(current, coming) if turn < world_size - 1 else []
            yield self._unpack(current, (rank - turn) % world_size * len(current))
            for request in requests:
                request.wait()
            # The own rows stay for the next pass, so the third buffer takes their place.
            current, coming = coming, torch.empty_like(current) if turn == 0 else current

    def _pass_on(self, block: Tensor, into: Tensor) -> list[dist.Work]:
        assert self._ring is not None
        rank, world_size = dist.get_rank(self._ring), dist.get_world_size(self._ring)
        right = dist.get_global_rank(self._ring, (rank + 1) % world_size)
        left = dist.get_global_rank(self._ring, (rank - 1) % world_size)
        works: list[dist.Work] = dist.batch_isend_irecv(
            [
                dist.P2POp(dist.isend, block, right, group=self._ring),
                dist.P2POp(dist.irecv, into, left, group=self._ring),
            ]
        )
        return works

    def _unpack(self, payload: Tensor, first: int) -> Block:
        _, num_views, dim = self._shape
        rows = payload[:, : num_views * dim].view(-1, num_views, dim)
        if self._has_ids:
            # A copy in any case: the ids of a single row are contiguous, but may start between two int64.
            bits = payload[:, num_views * dim :].clone(memory_format=torch.contiguous_format)
            ids = bits.view(torch.int64).squeeze(1)
        else:
            ids = torch.arange(first, first + len(payload), device=payload.device)
        return Block(rows, ids, first)


# The newer names of the same collectives; the older ones warn from torch 2.13 on.
_all_gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)
_reduce_scatter = getattr(dist, "reduce_scatter_single", dist.reduce_scatter_tensor)


def _pack(x: Tensor, ids: Tensor | None) -> Tensor:
    """Rows and the bits of their ids side by side, [B, V D + words of an id], so that one collective moves both."""
    rows = x.flatten(1)
    return rows.contiguous() if ids is None else torch.cat([rows, ids[:, None].contiguous().view(x.dtype)], dim=1)


def _free_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return int(psutil.virtual_memory().available) // World.from_environment().local_size
