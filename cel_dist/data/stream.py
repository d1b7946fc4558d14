"""This rank's segments, read from the shards in the order of the plan."""

import math
import multiprocessing
import multiprocessing.connection
from collections.abc import Iterator
from dataclasses import dataclass, replace
from multiprocessing.process import BaseProcess
from typing import Any

import torch
import torch.utils.data
from torch import Tensor

from cel_dist.data.folder import ShardFolder
from cel_dist.data.plan import BatchPlan, PlannedBatch
from cel_dist.data.pool import deaf_to_schedulers, end_with_parent
from cel_dist.data.reader import SampleFault, SegmentReader
from cel_dist.errors import RunError


@dataclass(frozen=True)
class SegmentBatch:
    """This rank's part of a global batch.

    Attributes:
        epoch: epoch of the batch.
        step: step of the batch in its epoch.
        ids: [B] int64, what a row is to the loss: its utterance in self-supervised training, else its class.
        utterances: [B, V] int64, place in the index of the utterance that each view was cut from.
        segments: [B, V, T] int16.
        faults: utterances that could not be read. In the place of each is another one of its row, or else the row has
            another one of the global batch in its place, with its id and utterances.
    """

    epoch: int
    step: int
    ids: Tensor
    utterances: Tensor
    segments: Tensor
    faults: tuple[SampleFault, ...] = ()

    def pin_memory(self) -> "SegmentBatch":
        """The same in page-locked memory, which a GPU copies from while the host goes on."""
        return replace(self, ids=self.ids.pin_memory(), segments=self.segments.pin_memory())


class _PlannedBatches:
    """First stage of the pipeline: the plan's batches from a position on, without end, cut to this worker."""

    def __init__(self, plan: BatchPlan, epoch: int, step: int) -> None:
        self._plan, self._epoch, self._step = plan, epoch, step

    def __call__(self) -> Iterator[PlannedBatch]:
        worker = torch.utils.data.get_worker_info()
        first, stride = (worker.id, worker.num_workers) if worker else (0, 1)
        position = self._epoch * self._plan.steps_per_epoch + self._step + first
        while True:
            yield self._plan.batch(*divmod(position, self._plan.steps_per_epoch))
            position += stride


class _ReadOrReport:
    """Second stage: reads, and hands a failure on as a value, because a raised one arrives wrapped in a traceback."""

    def __init__(self, reader: SegmentReader, rows: slice) -> None:
        self._reader, self._rows = reader, rows

    def __call__(self, batches: Iterator[PlannedBatch]) -> Iterator[SegmentBatch | RunError]:
        for planned in batches:
            try:
                read = self._reader.read(planned, self._rows)
            except RunError as error:
                yield error
                return
            ids, utterances, segments = map(torch.from_numpy, (read.ids, read.utterances, read.segments))
            yield SegmentBatch(planned.epoch, planned.step, ids, utterances, segments, read.faults)


def _pinned(batch: SegmentBatch | RunError) -> SegmentBatch | RunError:
    return batch if isinstance(batch, RunError) else batch.pin_memory()


def _begin_reader(number: int) -> None:
    end_with_parent()


class SegmentStream:
    """Endless iterator over this rank's batches. Its whole state is the position of the next one.

    Args:
        shards: what `cel prepare` wrote.
        plan: the order of all epochs.
        rows: the rows of every global batch that belong to this rank.
        num_workers: reader processes, which live as long as the stream; 0 reads in this process. Any number gives the
            same batches in the same order.
        prefetch_bytes: about how much the reader processes may read ahead; each is at least one batch ahead.
        max_fault_rate: share of this rank's utterances of an epoch that may be unreadable.
        pinned: hand out batches in page-locked memory, for a GPU.
    """

    def __init__(
        self,
        shards: ShardFolder,
        plan: BatchPlan,
        rows: slice,
        num_workers: int = 0,
        *,
        prefetch_bytes: int = 64 << 20,
        max_fault_rate: float = 0.001,
        pinned: bool = False,
    ) -> None:
        self._plan, self._rows, self._num_workers = plan, rows, num_workers
        self._shards, self._pinned = shards, pinned
        self._reader = SegmentReader(shards, plan)
        num_rows = len(range(*rows.indices(plan.batch_size)))
        # Segments of int16.
        batch_bytes = 2 * plan.num_views * plan.segment_samples * num_rows
        self._prefetch_batches = max(1, prefetch_bytes // (batch_bytes * max(num_workers, 1)))
        self._drawn_per_epoch = num_rows * plan.utterances_per_row * plan.steps_per_epoch
        self._allowed_faults = math.ceil(max_fault_rate * self._drawn_per_epoch)
        self._epoch = self._step = 0
        self._faults_of_epoch = 0
        self._has_begun = False
        self._batches: Iterator[SegmentBatch | RunError] | None = None
        self._readers: list[BaseProcess] = []

    def state_dict(self) -> dict[str, int]:
        """Epoch and step of the batch that comes next."""
        return {"epoch": self._epoch, "step": self._step}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue with the batch at `state`."""
        self._epoch, self._step = state["epoch"], state["step"]
        self._faults_of_epoch = 0
        self.close()

    def __iter__(self) -> "SegmentStream":
        return self

    def __next__(self) -> SegmentBatch:
        """The next batch.

        Raises:
            RunError: more utterances of the epoch than allowed could not be read, a reader process died, or nothing can
                be read before something on this machine is put right.
        """
        if self._batches is None:
            others = set(multiprocessing.active_children())
            with deaf_to_schedulers():
                self._batches = iter(self._loader())
            self._readers = [child for child in multiprocessing.active_children() if child not in others]
        try:
            batch = next(self._batches)
        except (RuntimeError, ConnectionError, EOFError) as error:
            # What torch raises depends on what the reader was about when it died; its end may be told a moment later.
            multiprocessing.connection.wait([reader.sentinel for reader in self._readers], timeout=1)
            dead = [reader for reader in self._readers if not reader.is_alive()]
            if not dead:
                raise
            named = ", ".join(f"{reader.pid} (exit code {reader.exitcode})" for reader in dead)
            self.close()
            if not self._has_begun and dead[0].exitcode == 1:
                raise RunError(
                    f"reader process {named} could not start; a program of your own must be a file and begin its work "
                    "under 'if __name__ == \"__main__\":', or set data.workers=0"
                ) from None
            raise RunError(
                f"reader process {named} died ({type(error).__name__}), often for want of memory or room in /dev/shm; "
                "run the same command again, with fewer data.workers or a lower data.prefetch_mib"
            ) from None
        if isinstance(batch, RunError):
            self.close()
            raise batch
        assert (batch.epoch, batch.step) == (self._epoch, self._step), "readers out of step"
        self._has_begun = True
        self._count(batch)
        epochs, self._step = divmod(self._step + 1, self._plan.steps_per_epoch)
        self._epoch += epochs
        return batch

    def close(self) -> None:
        """End the reader processes."""
        # They hold nothing that must be put away; asked politely, one in the middle of a download takes its time.
        for reader in self._readers:
            reader.kill()
        for reader in self._readers:
            reader.join(timeout=5)
        self._batches, self._readers = None, []

    def _count(self, batch: SegmentBatch) -> None:
        if batch.step == 0:
            self._faults_of_epoch = 0
        self._faults_of_epoch += len(batch.faults)
        if self._faults_of_epoch > self._allowed_faults:
            self.close()
            raise RunError(
                f"{self._faults_of_epoch} utterances of epoch {batch.epoch} could not be read, data.max_fault_rate "
                f"allows {self._allowed_faults} of the {self._drawn_per_epoch} of a rank; the last: "
                f"{batch.faults[-1]}; run 'cel check {self._shards.location}'"
            )

    def _loader(self) -> Any:
        import webdataset

        pipeline = webdataset.DataPipeline(
            _PlannedBatches(self._plan, self._epoch, self._step), _ReadOrReport(self._reader, self._rows)
        )
        if self._num_workers == 0:
            return map(_pinned, pipeline) if self._pinned else pipeline
        # A forked reader would inherit the locks of this process's threads, and a spawned one imports torch anew. The
        # server has imported it, runs no thread, and forks readers in no time.
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["webdataset", __name__])
        return torch.utils.data.DataLoader(
            pipeline,
            batch_size=None,
            num_workers=self._num_workers,
            prefetch_factor=self._prefetch_batches,
            multiprocessing_context=context,
            worker_init_fn=_begin_reader,
            # A thread of its own pins what the readers send.
            pin_memory=self._pinned,
        )
