"""Which utterances form a global batch, and where their segments lie: a pure function of (seed, epoch, step).

An epoch permutes the shards, takes them by windows of so many, and permutes the utterances inside a window. A rank on a
remote or slow store thus reads few shards at a time, each once an epoch; `cel prepare` has shuffled globally before.
Both permutations are computed, not stored, so that the memory of a plan grows with the number of shards alone.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from cel_dist.data.index import Index
from cel_dist.data.permutation import KeyedPermutation
from cel_dist.data.randomness import Purpose, generator
from cel_dist.errors import CelError

ShortPolicy = Literal["drop", "overlap", "repeat"]
Remainder = Literal["drop", "wrap"]
Integers = npt.NDArray[np.int64]


@dataclass(frozen=True)
class PlannedBatch:
    """A global batch.

    Attributes:
        epoch: epoch the batch belongs to, from 0.
        step: number of the batch in its epoch, from 0.
        ids: [K] int64, what a row is to the loss: the utterance in self-supervised training, the class of its speaker
            in training with labels. Rows of one id are no negatives of each other.
        utterances: [K, V] int64, place in the index of the shards of the utterance that each view is cut from.
        starts: [K, V] int64, first sample of each view's segment. In an utterance that is repeated to make room for
            its segments, a start may lie beyond the end of the audio and counts on into the repetition.
    """

    epoch: int
    step: int
    ids: Integers
    utterances: Integers
    starts: Integers


class BatchPlan(Protocol):
    """What readers and training ask of an order of all epochs; a pure function of (seed, epoch, step)."""

    segment_samples: int
    """Length T of a segment in audio samples."""
    batch_size: int
    """Rows K of a global batch."""
    num_views: int
    """Segments V of a row."""
    utterances_per_row: int
    """Utterances that are drawn for a row: 1, or V where each view has its own."""
    steps_per_epoch: int
    """Global batches of an epoch."""
    num_short: int
    """Utterances in which the segments that are cut from them do not fit without overlap or repetition."""
    num_dropped: int
    """Utterances that are never drawn."""
    cache_remedy: str
    """What to do where a cache cannot hold `max_shards_at_once`, as the end of a sentence."""

    def __len__(self) -> int:
        """Number of utterances that are drawn."""

    def usable(self) -> Integers:
        """[n] int64, places in the index of the utterances that are drawn, ascending."""

    def batch(self, epoch: int, step: int) -> PlannedBatch:
        """The global batch at a step of an epoch. Raises IndexError where the epoch has no such step."""

    def describe(self) -> str:
        """What is drawn and what is left out, for the log."""

    def windows(self, epoch: int, step: int) -> Iterator[list[int]]:
        """The shards that are read together at a step, those that come after them, and so on without end."""

    @property
    def max_shards_at_once(self) -> int:
        """Most shards that are in use, or being made ready, at the same time."""


class _Epoch(NamedTuple):
    """Shards in the order of an epoch [S], the usable utterances before each of them [S + 1], and the same at the
    first shard of every window and at the end [windows + 1]."""

    shards: Integers
    before: Integers
    windows: Integers


class Plan:
    """The order of all epochs over N utterances in S shards.

    Every utterance that is long enough appears at most once an epoch. Ranks and workers only slice what this class
    returns, so they never change it.

    Args:
        index: the utterances. Their lengths and shards are read; who speaks is not.
        segment_samples: length T of a segment in audio samples.
        batch_size: utterances K in a global batch.
        short: what happens to utterances shorter than 2 T. `drop` leaves them out. `overlap` lets their two segments
            overlap, no more than they must, and leaves out what is shorter than T. `repeat` repeats their audio until
            two segments fit.
        seed: seed of order and segments.
        window: shards that are shuffled together.
        remainder: what happens to the end of an epoch that does not fill a batch. `drop` leaves it out of this epoch;
            the order of the next one leaves out others. `wrap` fills the batch up from the beginning of the epoch.

    Raises:
        CelError: fewer usable utterances than one batch holds.
    """

    num_views = 2
    utterances_per_row = 1
    cache_remedy = "raise it, or lower data.window_shards"

    def __init__(
        self,
        index: Index,
        *,
        segment_samples: int,
        batch_size: int,
        short: ShortPolicy,
        seed: int,
        window: int = 16,
        remainder: Remainder = "drop",
    ) -> None:
        self.segment_samples = segment_samples
        self.batch_size = batch_size
        self.short = short
        self.seed = seed
        self._window = window
        self._index = index
        self._shortest = {"drop": 2 * segment_samples, "overlap": segment_samples, "repeat": 1}[short]
        # Shard by shard: a mask over all utterances may be larger than the memory.
        by_shard = [index.samples[part] for part in map(self._shard, range(self.num_shards))]
        self._counts = np.array([np.count_nonzero(part >= self._shortest) for part in by_shard], np.int64)
        self.num_short = sum(int(np.count_nonzero(part < 2 * segment_samples)) for part in by_shard)
        self._num_usable = int(self._counts.sum())
        self.num_dropped = len(index) - self._num_usable
        self.steps_per_epoch = self._num_usable // batch_size
        if self.steps_per_epoch == 0:
            raise CelError(
                f"train.batch_size={batch_size} is larger than the data: {self._num_usable} of "
                f"{len(index)} utterances are long enough (data.short={short}, two segments are "
                f"{2 * segment_samples / 16000:.2f} s); "
                "lower the batch size, prepare more audio, or set data.short=overlap or repeat"
            )
        if remainder == "wrap":
            self.steps_per_epoch = -(-self._num_usable // batch_size)
        self._orders: dict[int, _Epoch] = {}

    @property
    def num_shards(self) -> int:
        """Number of shards S."""
        return len(self._index.shard_starts) - 1

    def usable(self) -> Integers:
        """[n] int64, ids of the utterances that are drawn; made anew at every call."""
        return np.flatnonzero(self._index.samples >= self._shortest)

    def __len__(self) -> int:
        """Number of usable utterances."""
        return self._num_usable

    def describe(self) -> str:
        """What is drawn and what is left out, for the log."""
        return (
            f"{len(self)} utterances ({self.num_short} shorter than two segments, {self.num_dropped} of them left out: "
            f"data.short={self.short})"
        )

    def batch(self, epoch: int, step: int) -> PlannedBatch:
        """The global batch at a step of an epoch.

        Raises:
            IndexError: the epoch has no such step.
        """
        if not 0 <= step < self.steps_per_epoch:
            raise IndexError(f"step {step} of an epoch of {self.steps_per_epoch} steps")
        positions = np.arange(step * self.batch_size, (step + 1) * self.batch_size) % self._num_usable
        ids = self._ids(epoch, positions)
        utterances = np.broadcast_to(ids[:, None], (self.batch_size, self.num_views))
        return PlannedBatch(epoch, step, ids, utterances, self._starts(ids, epoch, step))

    def windows(self, epoch: int, step: int) -> Iterator[list[int]]:
        """The shards of the window that a step begins in, of the next one, and so on through all epochs."""
        position = step * self.batch_size
        while True:
            order = self._order(epoch)
            first = int(np.searchsorted(order.windows, position, side="right")) - 1
            for number in range(first, len(order.windows) - 1):
                yield order.shards[number * self._window : (number + 1) * self._window].tolist()
            epoch, position = epoch + 1, 0

    @property
    def max_shards_at_once(self) -> int:
        """Most shards that a batch lies in, and those of the next window."""
        smallest = max(1, int(np.sort(self._counts)[: self._window].sum()))
        windows = 2 + -(-self.batch_size // smallest)
        return min(windows * self._window, self.num_shards)

    def _ids(self, epoch: int, positions: Integers) -> Integers:
        order = self._order(epoch)
        windows = np.searchsorted(order.windows, positions, side="right") - 1
        places = np.empty_like(positions)
        for number in np.unique(windows).tolist():
            inside = windows == number
            first, end = order.windows[number : number + 2].tolist()
            # Place 0 of the epoch's generator is that of the shards.
            keys = generator(self.seed, Purpose.ORDER, epoch, number + 1)
            places[inside] = first + KeyedPermutation(end - first, keys)(positions[inside] - first)
        slots = np.searchsorted(order.before, places, side="right") - 1
        return self._select(order.shards[slots], places - order.before[slots])

    def _order(self, epoch: int) -> _Epoch:
        if epoch not in self._orders:
            permutation = KeyedPermutation(self.num_shards, generator(self.seed, Purpose.ORDER, epoch))
            shards = permutation(np.arange(self.num_shards))
            before = np.concatenate([[0], np.cumsum(self._counts[shards])])
            windows = np.append(before[: -1 : self._window], before[-1])
            # At the end of an epoch the next one is looked at, too.
            self._orders = {number: order for number, order in self._orders.items() if abs(number - epoch) == 1}
            self._orders[epoch] = _Epoch(shards, before, windows)
        return self._orders[epoch]

    def _select(self, shards: Integers, numbers: Integers) -> Integers:
        """Ids of the usable utterances with these numbers in their shards."""
        ids = self._index.shard_starts[shards] + numbers
        for shard in np.unique(shards[self._counts[shards] < np.diff(self._index.shard_starts)[shards]]).tolist():
            part = self._shard(shard)
            usable = part.start + np.flatnonzero(self._index.samples[part] >= self._shortest)
            inside = shards == shard
            ids[inside] = usable[numbers[inside]]
        return ids

    def _shard(self, shard: int) -> slice:
        return slice(*self._index.shard_starts[shard : shard + 2].tolist())

    def _starts(self, ids: Integers, epoch: int, step: int) -> Integers:
        length, segment = self._index.samples[ids], self.segment_samples
        draw = generator(self.seed, Purpose.SEGMENTS, epoch, step)
        fractions = np.sort(draw.random((len(ids), 2)), axis=1)
        second_first = draw.random(len(ids)) < 0.5
        if self.short == "repeat":
            length = length * -(-2 * segment // length)
        # Two sorted points in the slack, the second moved by one segment: uniform over all places without overlap.
        slack = length - 2 * segment
        starts = np.floor(fractions * (np.maximum(slack, 0) + 1)[:, None]).astype(np.int64)
        starts[:, 1] += np.where(slack < 0, length - segment, segment)
        ordered: Integers = np.where(second_first[:, None], starts[:, ::-1], starts)
        return ordered
