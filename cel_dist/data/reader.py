"""Segments cut out of shards, reading no more of them than that needs."""

import os
import sys
import tarfile
from collections import OrderedDict
from collections.abc import Container
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from cel_dist.data.audio import WAV_HEADER_BYTES, AudioError, read_segments, wav_header
from cel_dist.data.folder import ShardFolder
from cel_dist.data.plan import BatchPlan, Integers, PlannedBatch
from cel_dist.data.shard_files import ShardUnavailableError
from cel_dist.errors import RunError

Samples = npt.NDArray[np.int16]


class SampleFault(NamedTuple):
    """An utterance that could not be read: its shard, its key if that is known, and why."""

    shard: str
    key: str | None
    reason: str

    def __str__(self) -> str:
        return f"shard {self.shard}{'' if self.key is None else f', sample {self.key}'}: {self.reason}"


@dataclass(frozen=True)
class ReadBatch:
    """Some rows of a planned batch, read.

    Attributes:
        ids: [B] int64, what the rows that were read are to the loss.
        utterances: [B, V] int64, the utterances that were read.
        segments: [B, V, T] int16.
        faults: utterances of the plan that could not be read, and have others in their places; one that several views
            of a row are cut from is there once.
    """

    ids: Integers
    utterances: Integers
    segments: Samples
    faults: tuple[SampleFault, ...]


class SegmentReader:
    """Reads planned batches. It may be handed to other processes: they open the shards again.

    Args:
        shards: where the utterances lie.
        plan: the order in which they will be asked for.

    Raises:
        CelError: the cache has no room for the shards of a batch.
    """

    def __init__(self, shards: ShardFolder, plan: BatchPlan) -> None:
        self._shards, self._plan = shards, plan
        self._files, self._index = shards.files, shards.index
        self._is_wav = shards.manifest.audio_format == "wav"
        self._open: OrderedDict[int, int] = OrderedDict()
        self._expected: list[int] = []
        self._files.require_room(plan.max_shards_at_once, plan.cache_remedy)

    def read(self, planned: PlannedBatch, rows: slice) -> ReadBatch:
        """Read the segments of some rows of a planned batch.

        In the place of an utterance that cannot be read comes another one of its row, so that the row keeps its id, cut
        where the row does not have it yet. In the place of a row of which nothing can be read comes the next one of the
        global batch that can, with its id, by which the loss knows a duplicate. So the global batch is the same for any
        number of ranks.

        Raises:
            RunError: no utterance of the batch can be read, or nothing can before something is put right here.
        """
        self._expect(planned)
        numbers = np.arange(len(planned.ids))[rows]
        ids, utterances = planned.ids[numbers], planned.utterances[numbers]
        segments = np.empty((*utterances.shape, self._plan.segment_samples), dtype=np.int16)
        faults = self._read_rows(utterances, planned.starts[numbers], segments)
        for row in sorted({row for row, _ in faults}):
            if not self._fill(utterances[row], planned.starts[numbers[row]], segments[row], _of_row(faults, row)):
                last = next(iter(_of_row(faults, row).values()))
                ids[row], utterances[row] = self._read_next(planned, int(numbers[row]), segments[row], last)
        return ReadBatch(ids, utterances, segments, tuple(faults[place] for place in sorted(faults)))

    def _expect(self, planned: PlannedBatch) -> None:
        windows = self._plan.windows(planned.epoch, planned.step)
        expected = list(dict.fromkeys([*next(windows), *next(windows)]))
        if expected != self._expected:
            self._files.expect(expected)
            self._expected = expected

    def _read_rows(
        self, utterances: Integers, starts: Integers, segments: Samples
    ) -> dict[tuple[int, int], SampleFault]:
        """Read rows `[n, V]` into `segments` `[n, V, T]`; an utterance that a row has several times, once.

        Returns:
            what could not be read, by row and utterance.
        """
        first_view = (utterances[:, :, None] == utterances[:, None, :]).argmax(axis=2)
        rows, views = np.nonzero(first_view == np.arange(utterances.shape[1]))
        samples = utterances[rows, views]
        # Of short lists, Python's own are the fastest.
        firsts, begins = first_view.tolist(), starts.tolist()
        faults: dict[tuple[int, int], SampleFault] = {}
        # In the order of the bytes: it spares a disk the seeks, and one shard after the other is open.
        for place in np.lexsort((self._index.offset[samples], self._index.shard[samples])).tolist():
            row, view, sample = int(rows[place]), int(views[place]), int(samples[place])
            same = [other for other, first in enumerate(firsts[row]) if first == view]
            parts = [segments[row, other] for other in same]
            fault = self._read_utterance(sample, [begins[row][other] for other in same], parts)
            if fault is not None:
                faults[row, sample] = fault
        return faults

    def _fill(self, utterances: Integers, starts: Integers, segments: Samples, faults: Container[int]) -> bool:
        """Put others of a row's utterances `[V]` into the places of those that could not be read; False if none can."""
        unread = [view for view, sample in enumerate(utterances.tolist()) if sample in faults]
        donors = [view for view in range(len(utterances)) if view not in unread]
        for number, view in enumerate(unread, start=1):
            behind = sorted(donors, key=lambda donor: (donor - view) % len(utterances))
            for donor in behind:
                sample = int(utterances[donor])
                length, wanted = int(self._index.samples[sample]), self._plan.segment_samples
                places = length - wanted + 1 if length >= wanted else length
                # As far from the donor's own segment as from those of the other views that it may stand in for.
                start = (int(starts[donor]) + number * places // (len(unread) + 1)) % places
                if self._read_utterance(sample, [start], [segments[view]]) is None:
                    utterances[view] = sample
                    break
            else:
                return False
        return True

    def _read_next(
        self, planned: PlannedBatch, number: int, segments: Samples, last: SampleFault
    ) -> tuple[int, Integers]:
        """Read the first row behind row `number` that can be read; its id, and its utterances `[V]` as read."""
        for further in range(1, len(planned.ids)):
            other = (number + further) % len(planned.ids)
            utterances, starts = planned.utterances[[other]], planned.starts[[other]]
            faults = self._read_rows(utterances, starts, segments[None])
            if not faults or self._fill(utterances[0], starts[0], segments, _of_row(faults, 0)):
                return int(planned.ids[other]), utterances[0]
            last = next(iter(faults.values()))
        raise RunError(
            f"no utterance of epoch {planned.epoch}, step {planned.step} can be read; the last: {last}; run "
            f"'cel check {self._shards.location}'"
        )

    def _read_utterance(self, sample: int, starts: list[int], segments: list[Samples]) -> SampleFault | None:
        """Read segments `[T]` of an utterance."""
        shard = int(self._index.shard[sample])
        name = self._shards.manifest.shards[shard].name
        offset = int(self._index.offset[sample])
        descriptor = None
        try:
            descriptor = self._descriptor(shard)
            self._cut(descriptor, sample, starts, segments)
        except ShardUnavailableError as error:
            return SampleFault(name, None, str(error))
        except (OSError, AudioError) as error:
            key = None if descriptor is None else _key_before(descriptor, offset)
            return SampleFault(name, key, f"the audio at byte {offset} cannot be read ({error})")
        return None

    def _cut(self, descriptor: int, sample: int, starts: list[int], segments: list[Samples]) -> None:
        offset, size, length = (
            int(column[sample]) for column in (self._index.offset, self._index.size, self._index.samples)
        )
        wanted = self._plan.segment_samples
        # Only the `repeat` policy plans a segment over the end of the audio: it goes round.
        goes_round = max(starts) + wanted > length
        ranges = [(0, length)] if goes_round else [(start, wanted) for start in starts]
        if self._is_wav and size == WAV_HEADER_BYTES + 2 * length:
            # Other WAVs of this size have the same header; where it differs, the index belongs to another tar.
            if _pread(descriptor, WAV_HEADER_BYTES, offset) != wav_header(length):
                raise AudioError("unreadable", "its header is not that of a WAV of the length in the index")
            first = offset + WAV_HEADER_BYTES
            if not goes_round:
                for segment, (start, _) in zip(segments, ranges, strict=True):
                    _read_into(descriptor, segment, first + 2 * start)
                return
            parts = [np.frombuffer(_pread(descriptor, 2 * n, first + 2 * start), "<i2") for start, n in ranges]
        else:
            parts = read_segments(_pread(descriptor, size, offset), ranges)
        if goes_round:
            parts = [np.take(parts[0], np.arange(start, start + wanted), mode="wrap") for start in starts]
        for segment, part in zip(segments, parts, strict=True):
            segment[:] = part

    def _descriptor(self, shard: int) -> int:
        if shard not in self._open:
            if len(self._open) >= self._files.max_open:
                os.close(self._open.popitem(last=False)[1])
            self._open[shard] = self._files.open(shard)
        self._open.move_to_end(shard)
        return self._open[shard]

    def __getstate__(self) -> dict[str, Any]:
        # File descriptors mean nothing in another process.
        return {**self.__dict__, "_open": OrderedDict(), "_expected": []}


def _pread(descriptor: int, size: int, offset: int) -> bytes:
    data = os.pread(descriptor, size, offset)
    _require_all(len(data), size)
    return data


def _of_row(faults: dict[tuple[int, int], SampleFault], row: int) -> dict[int, SampleFault]:
    """The faults of one row, by utterance."""
    return {sample: fault for (number, sample), fault in faults.items() if number == row}


def _read_into(descriptor: int, segment: Samples, offset: int) -> None:
    """Fill `segment` [T] with what lies at `offset`, without a copy between."""
    _require_all(os.preadv(descriptor, [segment.data], offset), segment.nbytes)
    if sys.byteorder == "big":
        segment.byteswap(inplace=True)


def _require_all(found: int, size: int) -> None:
    if found != size:
        raise AudioError("unreadable", f"{found} of {size} bytes are there")


def _key_before(descriptor: int, offset: int) -> str | None:
    """The key in the tar header before a member's data, if that is one."""
    try:
        header = os.pread(descriptor, tarfile.BLOCKSIZE, offset - tarfile.BLOCKSIZE)
        return tarfile.TarInfo.frombuf(header, "utf-8", "surrogateescape").name.partition(".")[0]
    except (OSError, tarfile.HeaderError):
        return None
