"""The global batch as the terms of the loss see it."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cel_dist.errors import CelError
from cel_dist.losses.exchange import Exchange, SharedRows
from cel_dist.losses.precision import Products
from cel_dist.losses.tiles import Own, TileSize

_SMALLEST_LENGTH = 1e-12


class EmbeddingsError(CelError):
    """Embeddings of the global batch that no loss can be computed of: not finite, or of length 0."""


@dataclass(frozen=True)
class GlobalBatch:
    """K rows of W ranks, B of them here.

    Attributes:
        exchange: the ranks.
        rows: the rows of all ranks, pass by pass.
        own: ids and place of this rank's.
        num_rows: B.
        num_views: V.
        products: how matrix products are computed.
        tile: size of the tiles.
    """

    exchange: Exchange
    rows: SharedRows
    own: Own
    num_rows: int
    num_views: int
    products: Products
    tile: TileSize

    @classmethod
    def share(
        cls, x: Tensor, ids: Tensor | None, exchange: Exchange, products: Products, tile: TileSize | None
    ) -> "GlobalBatch":
        """Send this rank's rows x [B, V, D] and sample ids [B] to the others, and take theirs."""
        first = exchange.rank * len(x)
        own_ids = torch.arange(first, first + len(x), device=x.device) if ids is None else ids
        return cls(
            exchange,
            exchange.share(x, ids),
            Own(own_ids, first),
            len(x),
            x.shape[1],
            products,
            tile or TileSize.of(x.device),
        )

    @property
    def num_utterances(self) -> int:
        """K."""
        return self.num_rows * self.exchange.world_size


def faults(x: Tensor) -> Tensor:
    """Number of rows of x [B, V, D] that are not finite, and of those with an embedding of length 0; [2]."""
    lengths = torch.linalg.vector_norm(x, dim=-1)
    infinite = ~lengths.isfinite().all(dim=1)
    empty = (lengths <= _SMALLEST_LENGTH).any(dim=1) & ~infinite
    return torch.stack([infinite.sum(), empty.sum()]).to(x.dtype)


class Findings:
    """What may be wrong with the global batch: counts on the device, equal on all ranks.

    Args:
        counts: all of them 0 where nothing is wrong.
        error: what to say of them, as a list, where something is.
    """

    def __init__(self, counts: Tensor, error: Callable[[list[Any]], CelError]) -> None:
        self._counts, self._error = counts, error

    def poisoned(self, loss: Tensor) -> Tensor:
        """The loss, which is no number where something is wrong; found out on the device."""
        return loss.masked_fill(self._counts.any(), torch.nan)

    def error(self) -> CelError | None:
        """What is wrong; None if nothing is. The host waits for it."""
        counts = self._counts.tolist()
        return self._error(counts) if bool(self._counts.any()) else None

    def check(self) -> None:
        """Raise what is wrong, on all ranks alike."""
        error = self.error()
        if error is not None:
            raise error


def unusable_rows(by_rank: Iterable[Sequence[float]], num_rows: int) -> EmbeddingsError:
    """What to say of the `faults` of all ranks [W, 2], some of which are not 0."""
    found = []
    for rank, (infinite, empty) in enumerate(by_rank):
        if infinite:
            found.append(f"rank {rank} has embeddings that are not finite in {infinite:.0f} of {num_rows} utterances")
        if empty:
            found.append(f"rank {rank} has embeddings of length 0 in {empty:.0f} of {num_rows} utterances")
    remedy = "lower optim.lr, set optim.clip_norm, or look for silent or damaged audio with 'cel check'"
    return EmbeddingsError(f"{'; '.join(found)}; {remedy}")
