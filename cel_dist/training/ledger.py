"""What the host knows of the steps that it gave to the device: it follows them a step behind."""

import time
from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from cel_dist.config import Config
from cel_dist.distributed import World
from cel_dist.errors import RunError
from cel_dist.evaluation.embed import raised_together
from cel_dist.losses import LossOutput
from cel_dist.training.agreement import Agreed, Agreement, describe_batch
from cel_dist.training.batches import TrainBatch
from cel_dist.training.checkpoint import TrainState
from cel_dist.training.checkpoint_store import CheckpointStore
from cel_dist.training.records import SKIPPED, Interval, Records


class LaunchedStep(NamedTuple):
    """A step that the device was given.

    Attributes:
        step: its number, counted from 1.
        batch: what it was given.
        failure: why this rank had no batch, so that the one before stands there once more; None if it had one.
        output: its losses.
        gradient_norm: scalar.
        problem: says what was wrong with its embeddings, where the loss knows.
        agreement: what the ranks agreed on.
    """

    step: int
    batch: TrainBatch
    failure: Exception | None
    output: LossOutput
    gradient_norm: Tensor
    problem: Callable[[], str | None]
    agreement: Agreement


class Ledger:
    """Enters steps when the host hears what became of them: into the state of the run, the interval, and the record of
    skipped batches. All ranks call its methods alike.

    Args:
        config: the run.
        world: rank and size.
        state: of the run; its counts of skipped steps are kept here.
        checkpoints: what a run that is given up can go on from.
        records: of rank 0.

    Attributes:
        interval: the steps since the last record.
        is_stopping: whether a rank was asked to end.
    """

    def __init__(
        self, config: Config, world: World, state: TrainState, checkpoints: CheckpointStore, records: Records | None
    ) -> None:
        self._config, self._world, self._state = config, world, state
        self._checkpoints, self._records = checkpoints, records
        self._open: LaunchedStep | None = None
        self._ended: float | None = None
        self.interval = Interval()
        self.is_stopping = False

    def begin_step(self) -> None:
        """A step begins. Its time counts from here, unless one before it is still to be heard of."""
        if self._open is None:
            self.interval.begin_step()

    def enter(self, launched: LaunchedStep) -> None:
        """Take note of a step, and hear of the one before. Raises as `settle`."""
        # What is over before it is heard of, as all steps on a CPU, must not pass its time on to the next one.
        ended = time.perf_counter() if launched.agreement.is_there else None
        self.settle()
        self._open, self._ended = launched, ended

    def settle(self) -> None:
        """Wait for what became of the last step.

        Raises:
            RunError: a rank had no batch, or too many steps in a row were skipped.
            CelError: as for a rank that had no batch.
        """
        launched, self._open = self._open, None
        if launched is None:
            return
        batch = launched.batch
        agreed = launched.agreement.read()
        ended = time.perf_counter() if self._ended is None else self._ended
        self.is_stopping = self.is_stopping or agreed.num_stopping > 0
        if agreed.num_failed:
            with raised_together(self._world):
                if launched.failure is not None:
                    raise launched.failure
        if not agreed.is_finite:
            self._skip(launched, agreed, ended)
            return
        self._state.skipped_in_a_row = 0
        self.interval.add(
            launched.output,
            launched.gradient_norm,
            utterances=self._config.train.batch_size,
            waited=batch.waited,
            ended=ended,
            faults=agreed.num_faults,
            false_negatives=batch.false_negatives,
        )

    def take_interval(self) -> Interval:
        """The steps since the last record, for the next one; a new interval begins."""
        interval, self.interval = self.interval, Interval()
        return interval

    def _skip(self, launched: LaunchedStep, agreed: Agreed, ended: float) -> None:
        """Enter a batch whose loss or gradient is not finite, so that it changed nothing.

        Raises:
            RunError: too many of them in a row.
        """
        self.interval.add_skipped(waited=launched.batch.waited, ended=ended, faults=agreed.num_faults)
        reason = launched.problem() or f"loss {agreed.loss}, gradient norm {agreed.gradient_norm}"
        described = describe_batch(launched.batch, self._world)
        self._state.skipped += 1
        self._state.skipped_in_a_row += 1
        step, epoch = launched.step, launched.batch.epoch
        if self._records:
            self._records.write_skipped(step=step, epoch=epoch, reason=reason, batch=described)
        if self._state.skipped_in_a_row <= self._config.train.max_skipped_steps:
            return
        self._checkpoints.wait()
        last = self._checkpoints.last()
        advice = (
            f"the last good state is {last}; go on from it in another run.dir, with --resume {last} and"
            if last
            else "no checkpoint was written yet; start again with"
        )
        raise RunError(
            f"step {step} (epoch {epoch}): {reason}; the last {self._state.skipped_in_a_row} batches were skipped, "
            f"their samples are in {self._config.run.dir / SKIPPED}, and {advice} a lower optim.lr, optim.clip_norm, "
            "or train.precision=fp32",
            said_by=0,
        )
