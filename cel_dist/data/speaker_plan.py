"""Global batches of K speakers with M utterances each, for training with labels; pure in (seed, epoch, step).

An epoch takes a random choice of every speaker's utterances, cuts it into groups of M, and deals the groups into
batches in which no speaker comes twice. Speakers are spread over the whole corpus, so all shards are read at any time.

A speaker has at most one group in a batch. So the number of batches is the largest B with sum_s min(g_s, B) >= B K,
where g_s are the groups that speaker s has in an epoch; that so many can be made, `_deal` shows.
"""

from collections.abc import Iterator
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from cel_dist.data.index import Index
from cel_dist.data.plan import Integers, PlannedBatch, Remainder, ShortPolicy
from cel_dist.data.randomness import Purpose, generator
from cel_dist.errors import CelError

TooFew = Literal["repeat", "drop"]
# Arrays over all utterances in half the memory of int64; a corpus of 2^31 utterances would be thousands of years long.
_Small = npt.NDArray[np.int32]


class _Epoch(NamedTuple):
    """The usable utterances [n], by speaker and shuffled inside each; and the groups of the batches: their speakers
    [B, K], by number among those that are drawn, and their numbers among the groups of their speaker [B, K]."""

    utterances: _Small
    speakers: _Small
    numbers: _Small


class SpeakerPlan:
    """The order of all epochs over the labelled utterances of an index; a `BatchPlan`.

    A row of a batch is a speaker, each of its views another utterance of that speaker. In an epoch

    - a speaker of more than `max_segments` utterances has as many of them as make whole groups, others each time;
    - all utterances of the other speakers come, and an incomplete last group is filled up with utterances of its
      speaker that the epoch has already, cut anew: leaving it out would cost those most who have the fewest;
    - where a few speakers talk far more than all others, groups of theirs that would be second ones in a batch are left
      out, others each time.

    Args:
        index: the utterances and their speakers. Those without a speaker are left out.
        segment_samples: length T of a segment in audio samples.
        speakers_per_batch: speakers K in a global batch.
        utterances_per_speaker: utterances M of each of them, at least 1.
        max_segments: most segments of a speaker in an epoch, at least M.
        too_few: what happens to speakers of fewer than M usable utterances. `repeat` cuts several segments from one
            utterance, apart from each other as far as there is room. `drop` leaves these speakers out: they are no
            classes.
        short: what happens to utterances shorter than T. `drop` and `overlap` leave them out; they are the same here,
            where an utterance gives one segment. `repeat` repeats their audio.
        seed: seed of order and segments.
        remainder: what happens to groups that do not fill a batch. `drop` leaves them out of this epoch, others the
            next time. `wrap` adds a batch, for which some speakers have one group more than they would.

    Attributes:
        class_names: the speakers that are drawn, sorted; `PlannedBatch.ids` are places in it.
        num_unlabelled: utterances without a speaker.
        num_speakers_left_out: speakers that are never drawn.
        num_left_out: segments an epoch that were planned and find no place in a batch.

    Raises:
        CelError: no labels, fewer speakers than a batch holds, or `max_segments` below M.
    """

    cache_remedy = (
        "the speakers of a batch lie in any shards, so it must hold all: raise it, or copy the shards to this machine"
    )

    def __init__(
        self,
        index: Index,
        *,
        segment_samples: int,
        speakers_per_batch: int,
        utterances_per_speaker: int,
        max_segments: int = 100,
        too_few: TooFew = "repeat",
        short: ShortPolicy,
        seed: int,
        remainder: Remainder = "drop",
    ) -> None:
        self.segment_samples = segment_samples
        self.batch_size = speakers_per_batch
        self.num_views = self.utterances_per_row = utterances_per_speaker
        self.short = short
        self.seed = seed
        self._index = index
        if max_segments < utterances_per_speaker:
            raise CelError(
                f"labels.max_segments={max_segments} is less than labels.utterances={utterances_per_speaker}, what a "
                "speaker has in one batch; raise it"
            )
        is_labelled = index.speaker >= 0
        is_short = index.samples < segment_samples
        self.num_unlabelled = len(index) - int(np.count_nonzero(is_labelled))
        if self.num_unlabelled == len(index):
            raise CelError(
                "the shards of data.shards do not say who speaks, which training with labels needs; run 'cel prepare' "
                "with --labels FILE (lines 'path speaker'), or with a --recipe that knows the speakers"
            )
        self.num_short = int(np.count_nonzero(is_labelled & is_short))
        usable = np.flatnonzero(is_labelled & (index.samples > 0 if short == "repeat" else ~is_short))
        speaker = index.speaker[usable]
        counts = np.bincount(speaker, minlength=len(index.speaker_names))
        fewest = utterances_per_speaker if too_few == "drop" else 1
        speakers = np.flatnonzero(counts >= fewest)
        if len(speakers) < speakers_per_batch:
            remedy = "prepare more speakers"
            if len(speakers) > 1:
                remedy = f"set train.batch_size={len(speakers) * utterances_per_speaker} or less, or {remedy}"
            raise CelError(
                f"train.batch_size={speakers_per_batch * utterances_per_speaker} with labels.utterances="
                f"{utterances_per_speaker} takes {speakers_per_batch} speakers, and {len(speakers)} of {len(counts)} "
                f"have {fewest} or more utterances that are long enough (a segment is {segment_samples / 16000:.2f} s, "
                f"data.short={short}, labels.too_few={too_few}); {remedy}"
            )
        self.class_names: list[str] = index.speaker_names[speakers].tolist()
        self.num_speakers_left_out = len(counts) - len(speakers)
        by_speaker = np.argsort(speaker, kind="stable")
        self._utterances: _Small = usable[by_speaker[(counts >= fewest)[speaker[by_speaker]]]].astype(np.int32)
        self.num_dropped = len(index) - len(self._utterances)

        # Of the speakers that are drawn: utterances, place of the first of them in `_utterances`, distinct
        # utterances and groups of an epoch.
        self._counts: Integers = counts[speakers].astype(np.int64)
        self._first: Integers = np.cumsum(self._counts) - self._counts
        most_groups = max_segments // utterances_per_speaker
        self._distinct: Integers = np.minimum(self._counts, most_groups * utterances_per_speaker)
        self._groups: Integers = -(-self._distinct // utterances_per_speaker)
        self.steps_per_epoch = _most_batches(self._groups, speakers_per_batch)
        num_groups = int(self._groups.sum())
        if remainder == "wrap" and num_groups > self.steps_per_epoch * speakers_per_batch:
            self.steps_per_epoch += 1
        placed = int(np.minimum(self._groups, self.steps_per_epoch).sum())
        placed = min(placed, self.steps_per_epoch * speakers_per_batch)
        self.num_left_out = (num_groups - placed) * utterances_per_speaker
        self._epochs: dict[int, _Epoch] = {}

    def __len__(self) -> int:
        """Number of utterances that are drawn."""
        return len(self._utterances)

    def usable(self) -> Integers:
        """[n] int64, places in the index of the utterances that are drawn, ascending; made anew at every call."""
        return np.sort(self._utterances).astype(np.int64)

    def describe(self) -> str:
        """What is drawn and what is left out, for the log."""
        return (
            f"{len(self)} utterances of {len(self.class_names)} speakers ({self.num_unlabelled} without a speaker left "
            f"out, {self.num_short} shorter than a segment: data.short={self.short}, {self.num_speakers_left_out} "
            f"speakers left out; an epoch leaves out {self.num_left_out} segments that fill no batch)"
        )

    def batch(self, epoch: int, step: int) -> PlannedBatch:
        """The global batch at a step of an epoch.

        Raises:
            IndexError: the epoch has no such step.
        """
        if not 0 <= step < self.steps_per_epoch:
            raise IndexError(f"step {step} of an epoch of {self.steps_per_epoch} steps")
        order = self._order(epoch)
        draw = generator(self.seed, Purpose.SEGMENTS, epoch, step)
        # Without these two, a rank would see the same speakers all through an epoch, and what fills up a group would
        # always be its last view.
        rows = draw.permutation(self.batch_size)
        views = draw.permuted(np.tile(np.arange(self.num_views), (self.batch_size, 1)), axis=1)
        speakers = order.speakers[step, rows].astype(np.int64)
        numbers = order.numbers[step, rows].astype(np.int64)
        places = (numbers[:, None] * self.num_views + views) % self._distinct[speakers, None]
        utterances = order.utterances[self._first[speakers, None] + places].astype(np.int64)
        return PlannedBatch(epoch, step, speakers.astype(np.int64), utterances, self._starts(utterances, draw))

    def windows(self, epoch: int, step: int) -> Iterator[list[int]]:
        """All shards, again and again: a speaker's utterances lie anywhere."""
        while True:
            yield list(range(self.max_shards_at_once))

    @property
    def max_shards_at_once(self) -> int:
        """The number of shards."""
        return len(self._index.shard_starts) - 1

    def _order(self, epoch: int) -> _Epoch:
        if epoch not in self._epochs:
            draw = generator(self.seed, Purpose.ORDER, epoch)
            speakers = np.repeat(np.arange(len(self._counts)), self._counts)
            shuffled = self._utterances[np.argsort(speakers + draw.random(len(speakers)))]
            # Readers are an epoch ahead for a while.
            self._epochs = {number: order for number, order in self._epochs.items() if abs(number - epoch) == 1}
            self._epochs[epoch] = _Epoch(shuffled, *_deal(self._groups, self.batch_size, self.steps_per_epoch, draw))
        return self._epochs[epoch]

    def _starts(self, utterances: Integers, draw: np.random.Generator) -> Integers:
        """First samples of the segments of rows of utterances [K, V]; those of one utterance lie apart."""
        length, segment = self._index.samples[utterances], self.segment_samples
        fractions = draw.random(utterances.shape)
        phase = draw.random((len(utterances), 1))
        is_same = utterances[:, :, None] == utterances[:, None, :]
        copies = is_same.sum(axis=2)
        # Which of the copies it is, by their random numbers.
        rank = (is_same & (fractions[:, None, :] < fractions[:, :, None])).sum(axis=2)
        # As ranks ascend with the fractions, each is drawn in the slack and moved behind the copies before it.
        slack = length - copies * segment
        apart = np.floor(fractions * (slack + 1)).astype(np.int64) + rank * segment
        evenly = rank * (length - segment) // np.maximum(copies - 1, 1)
        around = np.floor((phase + rank / copies) % 1 * length).astype(np.int64)
        starts: Integers = np.where(length < segment, around, np.where(slack < 0, evenly, apart))
        return starts

    def __getstate__(self) -> dict[str, object]:
        # Another process makes the order of its epoch faster than it would receive it.
        return {**self.__dict__, "_epochs": {}}


def _most_batches(groups: Integers, batch_size: int) -> int:
    """The largest B with sum_s min(g_s, B) >= B K, given g_s [S] and S >= K."""
    low, high = 1, int(groups.sum()) // batch_size
    while low < high:
        middle = (low + high + 1) // 2
        if int(np.minimum(groups, middle).sum()) >= middle * batch_size:
            low = middle
        else:
            high = middle - 1
    return low


def _deal(groups: Integers, batch_size: int, num_batches: int, draw: np.random.Generator) -> tuple[_Small, _Small]:
    """Deal the groups [S] of the speakers into B batches of K, no speaker twice in any.

    As many groups as there are places lie speaker by speaker, at most B of one, in K rows of B. Then every column is a
    batch without duplicates (the wrap-around rule of McNaughton 1959). The columns of each row are shuffled on their
    own, so that speakers meet by chance; only the part of a speaker that is wrapped into the next row avoids the
    columns of the part before.

    Returns:
        speakers and numbers of the groups, int32 [B, K] both.
    """
    dealt = np.minimum(groups, num_batches)
    lacking = batch_size * num_batches - int(dealt.sum())
    if lacking > 0:
        dealt[draw.choice(np.flatnonzero(dealt < num_batches), lacking, replace=False)] += 1
    order = draw.permutation(len(dealt))
    sizes = dealt[order]
    speakers = np.repeat(order.astype(np.int32), sizes)
    numbers = (np.arange(len(speakers)) - np.repeat(np.cumsum(sizes) - sizes, sizes)).astype(np.int32)
    if lacking < 0:
        gone = draw.choice(len(speakers), -lacking, replace=False)
        speakers, numbers = np.delete(speakers, gone), np.delete(numbers, gone)
    table = np.empty((2, num_batches, batch_size), np.int32)
    columns = np.arange(num_batches)
    before = None
    for row, (own, own_numbers) in enumerate(
        zip(speakers.reshape(batch_size, -1), numbers.reshape(batch_size, -1), strict=True)
    ):
        shuffled = draw.permutation(num_batches)
        if before is not None and own[0] == before[-1]:
            is_taken = np.zeros(num_batches, dtype=bool)
            is_taken[columns[before == own[0]]] = True
            head = shuffled[~is_taken[shuffled]][: np.count_nonzero(own == own[0])]
            is_taken[:] = False
            is_taken[head] = True
            shuffled = np.concatenate([head, shuffled[~is_taken[shuffled]]])
        table[0, shuffled, row], table[1, shuffled, row] = own, own_numbers
        before, columns = own, shuffled
    return table[0], table[1]
