"""Sums over all pairs of this rank's rows and the rows of the global batch, without ever holding the pairs.

Two passes over the blocks of the global batch make every loss of this package:

- `negative_logsumexp` gives each own anchor the log-sum-exp of its logits against all keys, and if asked the mean of
  the keys under the softmax, which is the gradient at the anchor. The running sums are rescaled when a larger logit
  comes (online softmax; Milakov and Gimelshein 2018, arXiv 1805.02867).
- `pulled` adds up what all anchors of the batch pull at each own key with, when their log-sum-exps are known. It is
  the gradient at the key, so no gradient has to be sent.

Pairs of equal sample ids are no negatives and are left out of both.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from cel_dist.losses.exchange import SharedRows
from cel_dist.losses.precision import Products

Map = Callable[[Tensor], Tensor]
"""From rows [n, V, D] of any rank to the vectors of those rows that a loss compares."""


class TileSize(NamedTuple):
    """Largest number of anchors and keys in a tile."""

    rows: int
    columns: int

    @classmethod
    def of(cls, device: torch.device) -> "TileSize":
        """Tiles large enough that starting an operation costs little beside it, on a CPU and even more on a GPU."""
        return cls(8192, 8192) if device.type == "cuda" else cls(1024, 2048)


class Own(NamedTuple):
    """This rank's place in the global batch: ids [B] of its samples, and the position of the first."""

    ids: Tensor
    first: int


class Comparison(NamedTuple):
    """Logits <anchor, key> + bias(key) of own anchors against the keys of all rows.

    Attributes:
        anchors: [R B, d], times the scale of the logits; anchor r B + i belongs to own row i.
        keys: rows [n, V, D] to keys [n, d].
        bias: keys to [n], None for no bias.
        floor: logits below it are raised to it, and then pull at nothing.
        bounded: logits are known to lie within +-40, so that their exponentials need no shift in fp32.
        meets_itself: an own row is compared with its own key too; otherwise equal ids leave it out.
    """

    anchors: Tensor
    keys: Map
    bias: Map | None = None
    floor: float | None = None
    bounded: bool = False
    meets_itself: bool = False


class Softmax:
    """The softmax of each anchor's logits over the keys met so far.

    Args:
        comparison: what is compared.
        with_mean: keep the mean of the keys too.

    Attributes:
        largest: [R B] largest logit; the smallest number for anchors that met nothing. Not kept for bounded logits.
    """

    def __init__(self, comparison: Comparison, with_mean: bool) -> None:
        anchors = comparison.anchors
        self.comparison = comparison
        self.largest = anchors.new_full((len(anchors),), torch.finfo(anchors.dtype).min)
        self._total = torch.zeros_like(self.largest)
        self._kept = torch.zeros_like(self.largest)
        self._weighted = torch.zeros_like(anchors) if with_mean else None

    def add(self, logits: Tensor, rows: slice, keys: Tensor, products: Products) -> None:
        """Take in the logits [n, m] of anchors `rows` against rounded keys [m, d]; overwrites the logits."""
        raised = None
        if self.comparison.floor is not None:
            raised = logits < self.comparison.floor
            logits.masked_fill_(raised & ~logits.isneginf(), self.comparison.floor)
        if not self.comparison.bounded:
            logits -= self._rescale(rows, logits.amax(dim=1))[:, None]
        weights = logits.exp_()
        self._total[rows] += weights.sum(dim=1)
        if raised is not None:
            weights.masked_fill_(raised, 0.0)
            self._kept[rows] += weights.sum(dim=1)
        if self._weighted is not None:
            products.add_weighted(self._weighted[rows], weights, keys)

    def logsumexp(self) -> Tensor:
        """[R B]; -inf for an anchor that met nothing."""
        return self._total.log() + (0.0 if self.comparison.bounded else self.largest)

    def mean(self) -> Tensor:
        """[R B, d] mean of the keys under the softmax; keys whose logits are raised to the floor count as 0."""
        assert self._weighted is not None
        return self._weighted / self._divisor()[:, None]

    def kept(self) -> Tensor:
        """[R B] share of the softmax whose logits are not raised to the floor."""
        return torch.ones_like(self._kept) if self.comparison.floor is None else self._kept / self._divisor()

    def _rescale(self, rows: slice, peaks: Tensor) -> Tensor:
        largest = torch.maximum(self.largest[rows], peaks)
        shrink = (self.largest[rows] - largest).exp_()
        self._total[rows] *= shrink
        self._kept[rows] *= shrink
        if self._weighted is not None:
            self._weighted[rows] *= shrink[:, None]
        self.largest[rows] = largest
        return largest

    def _divisor(self) -> Tensor:
        # Nothing was met where the total is 0, and 0 / tiny is the right mean of nothing.
        return self._total.clamp(min=torch.finfo(self._total.dtype).tiny)


Biases = tuple[Tensor | None, Tensor | None]
"""Biases of weights: of the own key [B], and of the anchor, [R, K] over the rows of the global batch; None for 0."""


class Pull(NamedTuple):
    """Weights exp(<own key, anchor> + biases) with which the anchors of all rows pull at own keys.

    Attributes:
        keys: [B, d] of this rank, times the scale of the logits.
        anchors: rows [n, V, D] to anchors [R n, d]; row i's are i, n + i, ...
        biases: one for each term of the weight.
        floor: logits below it do not pull.
    """

    keys: Tensor
    anchors: Map
    biases: tuple[Biases] | tuple[Biases, Biases]
    floor: float | None = None


class Pulled(NamedTuple):
    """What `pulled` adds up for every own key: weights times anchors [B, d], and the weights alone [B]."""

    vectors: Tensor
    mass: Tensor


def negative_logsumexp(
    comparisons: Sequence[tuple[Comparison, bool]], rows: SharedRows, own: Own, products: Products, size: TileSize
) -> tuple[list[Softmax], Tensor]:
    """One pass over the global batch for several comparisons; the flag of each says whether it keeps the mean.

    Returns:
        The softmax of every comparison, and the number of pairs (own row, row of the batch) of equal sample ids, an
        int64 scalar on the device.
    """
    results = [Softmax(comparison, with_mean) for comparison, with_mean in comparisons]
    memory = _TileMemory()
    rounded = [products.rounded(comparison.anchors) for comparison, _ in comparisons]
    sorted_ids = own.ids.sort().values
    num_same = own.ids.new_zeros(())
    for tile in _tiles(rows, size.columns):
        num_same += _num_same(sorted_ids, tile.ids)
        # Terms that compare with the same vectors share them.
        vectors = {keys: keys(tile.rows) for keys in {result.comparison.keys for result in results}}
        for result, anchors in zip(results, rounded, strict=True):
            keys = vectors[result.comparison.keys]
            bias = result.comparison.bias(keys) if result.comparison.bias else None
            keys = products.rounded(keys)
            for some in _slices(len(anchors), size.rows):
                logits = memory.tile(some.stop - some.start, len(keys), of=result.largest)
                products.inner(anchors[some], keys, out=logits)
                if bias is not None:
                    logits += bias
                _exclude(logits, own, some, tile, memory, but_itself=result.comparison.meets_itself)
                result.add(logits, some, keys, products)
    return results, num_same


def pulled(pulls: Sequence[Pull], rows: SharedRows, own: Own, products: Products, size: TileSize) -> list[Pulled]:
    """One more pass over the global batch: what every own key is pulled at with."""
    results = [Pulled(torch.zeros_like(pull.keys), torch.zeros_like(pull.keys[:, 0])) for pull in pulls]
    rounded = [products.rounded(pull.keys) for pull in pulls]
    memory, memory_of_sum = _TileMemory(), _TileMemory()
    for tile in _tiles(rows, size.columns):
        for pull, result, keys in zip(pulls, results, rounded, strict=True):
            anchors = products.rounded(pull.anchors(tile.rows))
            biases = [
                (of_key, None if of_anchor is None else of_anchor[:, tile.columns].flatten())
                for of_key, of_anchor in pull.biases
            ]
            for some in _slices(len(keys), size.rows):
                logits = memory.tile(some.stop - some.start, len(anchors), of=result.mass)
                products.inner(keys[some], anchors, out=logits)
                raised = None
                if pull.floor is not None:
                    raised = logits < pull.floor
                    logits.clamp_(min=pull.floor)
                _exclude(logits, own, some, tile, memory)
                biases_of_some = [(None if k is None else k[some], a) for k, a in biases]
                weights = _weights(logits, biases_of_some, memory_of_sum)
                if raised is not None:
                    weights.masked_fill_(raised, 0.0)
                products.add_weighted(result.vectors[some], weights, anchors)
                result.mass[some] += weights.sum(dim=1)
    return results


def _weights(logits: Tensor, biases: Sequence[Biases], memory: "_TileMemory") -> Tensor:
    """Sum over one or two terms of exp(logits + biases); overwrites the logits."""
    if len(biases) == 1:
        return _add(logits, biases[0]).exp_()
    first = memory.tile(len(logits), logits.shape[1], of=logits).copy_(logits)
    _add(first, biases[0]).exp_()
    return _add(logits, biases[1]).exp_().add_(first)


def _add(logits: Tensor, biases: Biases) -> Tensor:
    """Add the biases to a tile's logits, in place."""
    of_key, of_anchor = biases
    if of_key is not None:
        logits += of_key[:, None]
    if of_anchor is not None:
        logits += of_anchor
    return logits


class _TileMemory:
    """Memory for a tile of a type, used over and over: a CPU would pay for a new one with a page fault every 4 KiB."""

    def __init__(self) -> None:
        self._numbers: dict[torch.dtype, Tensor] = {}

    def tile(self, num_rows: int, num_columns: int, of: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """[num_rows, num_columns] numbers of the device of `of`, and of its type or another one, not set; the tile of
        that type before is overwritten."""
        count, dtype = num_rows * num_columns, dtype or of.dtype
        numbers = self._numbers.get(dtype)
        if numbers is None or len(numbers) < count:
            numbers = self._numbers[dtype] = of.new_empty(count, dtype=dtype)
        return numbers[:count].view(num_rows, num_columns)


class _Tile(NamedTuple):
    rows: Tensor
    ids: Tensor
    columns: slice


def _tiles(shared: SharedRows, num_columns: int) -> Iterator[_Tile]:
    for block in shared:
        for some in _slices(len(block.rows), num_columns):
            columns = slice(block.first + some.start, block.first + some.stop)
            yield _Tile(block.rows[some], block.ids[some], columns)


def _num_same(sorted_ids: Tensor, ids: Tensor) -> Tensor:
    """Number of pairs of equal ids."""
    after = torch.searchsorted(sorted_ids, ids, right=True)
    return (after - torch.searchsorted(sorted_ids, ids)).sum()


def _exclude(logits: Tensor, own: Own, some: slice, tile: _Tile, memory: _TileMemory, but_itself: bool = False) -> None:
    """Set pairs of equal ids to -inf, among them every row with itself unless that is wanted; rows and columns may each
    repeat for several vectors a row.

    A mask of all pairs, because a list of the few that are equal has a length that the host would have to wait for.
    """
    num_repeats = -(-some.stop // len(own.ids))
    num_columns = len(tile.ids)
    same = memory.tile(len(logits), num_columns, of=logits, dtype=torch.bool)
    torch.eq(own.ids.repeat(num_repeats)[some, None], tile.ids, out=same)
    if but_itself:
        device = logits.device
        places = torch.arange(own.first, own.first + len(own.ids), device=device).repeat(num_repeats)[some, None]
        same &= places != torch.arange(tile.columns.start, tile.columns.stop, device=device)
    logits.view(len(logits), -1, num_columns).masked_fill_(same[:, None], -torch.inf)


def _slices(length: int, size: int) -> Iterator[slice]:
    for start in range(0, length, size):
        yield slice(start, min(start + size, length))
