"""Which utterances form a global batch, and where their segments lie: a pure function of (seed, epoch, step)."""

from dataclasses import dataclass
from typing import Literal

import numpy as np

from cel_dist.data.randomness import Purpose, generator
from cel_dist.errors import CelError

ShortPolicy = Literal["drop", "overlap", "repeat"]


@dataclass(frozen=True)
class PlannedBatch:
    """A global batch, or some rows of one.

    Attributes:
        epoch: epoch the batch belongs to, from 0.
        step: number of the batch in its epoch, from 0.
        ids: [K] int64, places of the utterances in the index of the shards.
        starts: [K, 2] int64, first sample of each view's segment. In an utterance that is repeated to make room for two
            segments, a start may lie beyond the end of the audio and counts on into the repetition.
    """

    epoch: int
    step: int
    ids: np.ndarray
    starts: np.ndarray

    def rows(self, rows: slice) -> "PlannedBatch":
        """The same batch, cut to `rows`."""
        return PlannedBatch(self.epoch, self.step, self.ids[rows], self.starts[rows])


class Plan:
    """The order of all epochs over N utterances.

    Every utterance that is long enough appears at most once an epoch. The remainder that does not fill a batch is left
    out of that epoch; the order of the next one leaves out others. Ranks and workers only slice what this class
    returns, so they never change it.

    Args:
        num_samples: [N] int64, length of each utterance in audio samples.
        segment_samples: length T of a segment in audio samples.
        batch_size: utterances K in a global batch.
        short: what happens to utterances shorter than 2 T. `drop` leaves them out. `overlap` lets their two segments
            overlap, no more than they must, and leaves out what is shorter than T. `repeat` repeats their audio until
            two segments fit.
        seed: seed of order and segments.

    Raises:
        CelError: fewer usable utterances than one batch holds.
    """

    def __init__(
        self, num_samples: np.ndarray, *, segment_samples: int, batch_size: int, short: ShortPolicy, seed: int
    ) -> None:
        self.segment_samples = segment_samples
        self.batch_size = batch_size
        self.short = short
        self.seed = seed
        self._num_samples = np.asarray(num_samples, dtype=np.int64)
        is_short = self._num_samples < 2 * segment_samples
        shortest = {"drop": 2 * segment_samples, "overlap": segment_samples, "repeat": 1}[short]
        self._usable = np.flatnonzero(self._num_samples >= shortest)
        self.num_short = int(is_short.sum())
        self.num_dropped = len(self._num_samples) - len(self._usable)
        self.steps_per_epoch = len(self._usable) // batch_size
        if self.steps_per_epoch == 0:
            raise CelError(
                f"train.batch_size={batch_size} is larger than the data: {len(self._usable)} of "
                f"{len(self._num_samples)} utterances are long enough (data.short={short}, two segments are "
                f"{2 * segment_samples / 16000:.2f} s); "
                "lower the batch size, prepare more audio, or set data.short=overlap or repeat"
            )
        self._order: tuple[int, np.ndarray] | None = None

    @property
    def usable(self) -> np.ndarray:
        """[n] int64, ids of the utterances that are drawn."""
        return self._usable

    def __len__(self) -> int:
        """Number of usable utterances."""
        return len(self._usable)

    def batch(self, epoch: int, step: int) -> PlannedBatch:
        """The global batch at a step of an epoch.

        Raises:
            IndexError: the epoch has no such step.
        """
        if not 0 <= step < self.steps_per_epoch:
            raise IndexError(f"step {step} of an epoch of {self.steps_per_epoch} steps")
        ids = self._epoch_order(epoch)[step * self.batch_size : (step + 1) * self.batch_size]
        return PlannedBatch(epoch, step, ids, self._starts(ids, epoch, step))

    def _epoch_order(self, epoch: int) -> np.ndarray:
        if self._order is None or self._order[0] != epoch:
            self._order = (epoch, generator(self.seed, Purpose.ORDER, epoch).permutation(self._usable))
        return self._order[1]

    def _starts(self, ids: np.ndarray, epoch: int, step: int) -> np.ndarray:
        length, segment = self._num_samples[ids], self.segment_samples
        draw = generator(self.seed, Purpose.SEGMENTS, epoch, step)
        fractions = np.sort(draw.random((len(ids), 2)), axis=1)
        second_first = draw.random(len(ids)) < 0.5
        if self.short == "repeat":
            length = length * -(-2 * segment // length)
        # Two sorted points in the slack, the second moved by one segment: uniform over all places without overlap.
        slack = length - 2 * segment
        starts = np.floor(fractions * (np.maximum(slack, 0) + 1)[:, None]).astype(np.int64)
        starts[:, 1] += np.where(slack < 0, length - segment, segment)
        ordered: np.ndarray = np.where(second_first[:, None], starts[:, ::-1], starts)
        return ordered
