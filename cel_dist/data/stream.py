"""This rank's segment pairs, read from the shards in the order of the plan."""

import os
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.utils.data
from torch import Tensor

from cel_dist.data.audio import AudioError, read_segment
from cel_dist.data.plan import Plan, PlannedBatch
from cel_dist.data.shards import ShardFolder
from cel_dist.errors import RunError

# Open shards a worker keeps; far below the usual limit of 1024 files a process.
MAX_OPEN_SHARDS = 64
PREFETCH_BATCHES = 2


@dataclass(frozen=True)
class SegmentBatch:
    """This rank's part of a global batch.

    Attributes:
        epoch: epoch of the batch.
        step: step of the batch in its epoch.
        ids: [B] int64, places of the utterances in the index.
        segments: [B, 2, T] int16.
    """

    epoch: int
    step: int
    ids: Tensor
    segments: Tensor


class SegmentReader:
    """Cuts planned segments out of shards on a local file system: one `pread` an utterance, decoding only the
    segments."""

    def __init__(self, shards: ShardFolder, segment_samples: int) -> None:
        self._shards = shards
        self._index = shards.index
        self._segment_samples = segment_samples
        self._open: OrderedDict[int, int] = OrderedDict()

    def read(self, planned: PlannedBatch) -> SegmentBatch:
        """Read the two segments of every utterance of a planned batch.

        Raises:
            RunError: a member cannot be read or decoded; names shard and byte offset, and the command that finds out
                more.
        """
        segments = np.empty((len(planned.ids), 2, self._segment_samples), dtype=np.int16)
        # Reading in the order of the bytes on disk spares a spinning or networked disk the seeks within a batch.
        order = np.lexsort((self._index.offset[planned.ids], self._index.shard[planned.ids]))
        for row in order:
            segments[row] = self._read_pair(int(planned.ids[row]), planned.starts[row])
        return SegmentBatch(planned.epoch, planned.step, torch.from_numpy(planned.ids), torch.from_numpy(segments))

    def _read_pair(self, sample: int, starts: np.ndarray) -> np.ndarray:
        shard = int(self._index.shard[sample])
        offset, size = int(self._index.offset[sample]), int(self._index.size[sample])
        try:
            data = os.pread(self._descriptor(shard), size, offset)
            if len(data) != size:
                raise AudioError("unreadable", f"{len(data)} of {size} bytes are there")
            return np.stack([self._cut(data, int(start), int(self._index.samples[sample])) for start in starts])
        except (OSError, AudioError) as error:
            raise RunError(
                f"shard {self._shards.shard_path(shard)}: the audio at byte {offset} cannot be read ({error}); "
                f"run 'cel check {self._shards.folder}'"
            ) from None

    def _cut(self, data: bytes, start: int, length: int) -> np.ndarray:
        wanted = self._segment_samples
        if start + wanted <= length:
            return read_segment(data, start, wanted)
        # Only the `repeat` policy plans a segment over the end of the audio: it goes round.
        whole = read_segment(data, 0, length)
        return np.take(whole, np.arange(start, start + wanted), mode="wrap")

    def _descriptor(self, shard: int) -> int:
        if shard not in self._open:
            if len(self._open) >= MAX_OPEN_SHARDS:
                os.close(self._open.popitem(last=False)[1])
            self._open[shard] = os.open(self._shards.shard_path(shard), os.O_RDONLY)
        self._open.move_to_end(shard)
        return self._open[shard]

    def __getstate__(self) -> dict[str, Any]:
        # File descriptors mean nothing in a worker process.
        return {**self.__dict__, "_open": OrderedDict()}


class _PlannedRows:
    """First stage of the pipeline: the plan's batches from a position on, without end, cut to this rank and worker."""

    def __init__(self, plan: Plan, rows: slice, epoch: int, step: int) -> None:
        self._plan, self._rows, self._epoch, self._step = plan, rows, epoch, step

    def __call__(self) -> Iterator[PlannedBatch]:
        worker = torch.utils.data.get_worker_info()
        first, stride = (worker.id, worker.num_workers) if worker else (0, 1)
        position = self._epoch * self._plan.steps_per_epoch + self._step + first
        while True:
            epoch, step = divmod(position, self._plan.steps_per_epoch)
            yield self._plan.batch(epoch, step).rows(self._rows)
            position += stride


class _ReadOrReport:
    """Second stage: reads, and hands a failure on as a value, because a raised one arrives wrapped in a traceback."""

    def __init__(self, reader: SegmentReader) -> None:
        self._reader = reader

    def __call__(self, batches: Iterator[PlannedBatch]) -> Iterator[SegmentBatch | RunError]:
        for planned in batches:
            try:
                yield self._reader.read(planned)
            except RunError as error:
                yield error
                return


class SegmentStream:
    """Endless iterator over this rank's batches. Its whole state is the position of the next one.

    Args:
        folder: shards written by `cel prepare`.
        plan: the order of all epochs.
        rows: the rows of every global batch that belong to this rank.
        num_workers: reader processes; 0 reads in this process. Any number gives the same batches in the same order.
    """

    def __init__(self, folder: Path | ShardFolder, plan: Plan, rows: slice, num_workers: int = 0) -> None:
        shards = folder if isinstance(folder, ShardFolder) else ShardFolder.open(folder)
        self._plan, self._rows, self._num_workers = plan, rows, num_workers
        self._reader = SegmentReader(shards, plan.segment_samples)
        self._epoch = self._step = 0
        self._batches: Iterator[SegmentBatch | RunError] | None = None

    def state_dict(self) -> dict[str, int]:
        """Epoch and step of the batch that comes next."""
        return {"epoch": self._epoch, "step": self._step}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue with the batch at `state`."""
        self._epoch, self._step = state["epoch"], state["step"]
        self._batches = None

    def __iter__(self) -> "SegmentStream":
        return self

    def __next__(self) -> SegmentBatch:
        """The next batch.

        Raises:
            RunError: see `SegmentReader.read`.
        """
        if self._batches is None:
            self._batches = iter(self._loader())
        batch = next(self._batches)
        if isinstance(batch, RunError):
            raise batch
        assert (batch.epoch, batch.step) == (self._epoch, self._step), "readers out of step"
        epochs, self._step = divmod(self._step + 1, self._plan.steps_per_epoch)
        self._epoch += epochs
        return batch

    def close(self) -> None:
        """End the reader processes."""
        self._batches = None

    def _loader(self) -> Any:
        import webdataset

        pipeline = webdataset.DataPipeline(
            _PlannedRows(self._plan, self._rows, self._epoch, self._step), _ReadOrReport(self._reader)
        )
        if self._num_workers == 0:
            return pipeline
        return webdataset.WebLoader(
            pipeline,
            batch_size=None,
            num_workers=self._num_workers,
            prefetch_factor=PREFETCH_BATCHES,
            # A forked worker would inherit the threads' locks of torch and of the launcher's collectives.
            multiprocessing_context="spawn",
        )
