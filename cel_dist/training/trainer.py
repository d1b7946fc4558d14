"""The training loop."""

import logging
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Literal

import torch

from cel_dist.config import Config
from cel_dist.config_file import dump_config
from cel_dist.data.files import atomic_write, sole_writer
from cel_dist.distributed import World
from cel_dist.engine import Engine
from cel_dist.errors import PreemptedError
from cel_dist.evaluation.embed import raised_together
from cel_dist.evaluation.geometry import sphere_measures
from cel_dist.process_group import process_group
from cel_dist.random_state import seed_all
from cel_dist.tracking import Tracker
from cel_dist.training.agreement import agree
from cel_dist.training.batches import Batches, TrainBatch
from cel_dist.training.checkpoint import SavedRun
from cel_dist.training.checkpoint_store import CheckpointStore
from cel_dist.training.classes import Classes, take_over
from cel_dist.training.conclusion import catch_up, conclude
from cel_dist.training.display import Display
from cel_dist.training.ledger import LaunchedStep, Ledger
from cel_dist.training.memory import advice_on_memory
from cel_dist.training.objective import initial_encoder, new_encoder, new_objective
from cel_dist.training.preflight import Checked, preflight
from cel_dist.training.processor import remark_on_cores, remark_on_precision, settle
from cel_dist.training.profile import StepProfile, named
from cel_dist.training.records import Records, writing
from cel_dist.training.result import TrainResult
from cel_dist.training.resuming import agreed_start, go_on, require_shared
from cel_dist.training.schedule import learning_rate, margin, num_steps
from cel_dist.training.start import Start
from cel_dist.training.stopping import StopRequest, stop_requests
from cel_dist.training.validation import VERSIONS, Validation
from cel_dist.watch import Watchdog

__all__ = ["TrainResult", "Trainer", "initial_encoder", "train"]

logger = logging.getLogger(__name__)


def train(config: Config, resume: str = "auto") -> TrainResult:
    """Train as `config` says, in the world that the environment describes.

    Args:
        config: the run.
        resume: `auto` continues from the newest complete checkpoint of the run folder, if there is one; `none` starts
            from nothing and refuses a folder that holds a run; else the path of a checkpoint, of this run or of
            another one that a new run begins with.

    Returns:
        The outcome; of a run that had already reached its end, the stored one.

    Raises:
        CelError: configuration, data, checkpoint and world do not fit each other.
        RunError: something failed on the way, or another process writes the run folder.
        PreemptedError: the process was asked to end (SIGTERM, SIGUSR1); a checkpoint was written.
    """
    world = World.from_environment()
    checked = preflight(config, world.size, resume)
    if checked.start.result is not None:
        return catch_up(config, checked.start.result) if world.is_main else checked.start.result
    settle(config, world)
    with (
        process_group(world, config.engine) as (device, watchdog),
        _sole_run(config.run.dir, world),
        stop_requests() as request,
        advice_on_memory(config, world),
    ):
        return Trainer(config, world, device, resume, checked, watchdog, request).train()


@contextmanager
def _sole_run(run_dir: Path, world: World) -> Iterator[None]:
    """Make the run folder, and hold it against other runs."""
    with ExitStack() as held:
        with raised_together(world), writing(run_dir):
            if world.is_main:
                run_dir.mkdir(parents=True, exist_ok=True)
                held.enter_context(sole_writer(run_dir, "cel train"))
        require_shared(run_dir, world)
        yield


class Trainer:
    """One rank's part of a run: everything is built here, then `train` runs the loop."""

    def __init__(
        self,
        config: Config,
        world: World,
        device: torch.device,
        resume: str,
        checked: Checked,
        watchdog: Watchdog,
        request: StopRequest,
    ) -> None:
        self.config, self.world, self.device = config, world, device
        self.watchdog, self.request = watchdog, request
        self.run_dir = config.run.dir
        self.config_text = dump_config(config)
        self.plan = checked.plan
        self.batches = Batches(config, checked, world, device)
        self.class_names = names = checked.class_names
        self.signature = checked.signature
        start = agreed_start(config, world, signature=self.signature, resume=resume)
        with raised_together(world):
            encoder = initial_encoder(config) if start.checkpoint is None else new_encoder(config)
        objective = new_objective(config, encoder, torch.distributed.group.WORLD, device.type == "cuda", len(names))
        if start.checkpoint is None and config.head.init:
            with raised_together(world):
                take_over(objective.loss, config, names)
        self.engine = Engine(objective, config, world, device)
        self.validation = Validation(config, world, device, self.plan.steps_per_epoch, checked.manifest_sha256)

        self.total_steps = num_steps(config, self.plan.steps_per_epoch)
        self.state = start.state
        self.checkpoints = CheckpointStore(
            self.run_dir / "checkpoints",
            world,
            device,
            keep_last=config.checkpoint.keep_last,
            config_text=self.config_text,
            newest=start.saved if start.is_own else None,
        )
        self.checkpoints.retire_after(self.state.step)
        seed_all(config.train.seed, world.rank)
        if start.checkpoint is not None and start.saved is not None:
            self.batches.load_state_dict(start.saved.stream)
            go_on(self.engine, start.checkpoint, start.saved, config, world, device)
        self.begun_from = start.begun_from
        self.is_fork = start.checkpoint is not None and not start.is_own
        steps_left = self.total_steps - self.state.step
        self.profile = StepProfile.of(config, steps_left, self.state.step, device) if world.is_main else StepProfile()
        self.display = Display()
        self.records: Records | None = None
        self.tracker: Tracker | None = None
        with raised_together(world):
            if world.is_main:
                self._open_records()
                self._announce(start)
        self.ledger = Ledger(config, world, self.state, self.checkpoints, self.records)
        if start.saved is not None and start.is_own:
            self.ledger.interval.load_state_dict(start.saved.interval)
        self.batch: TrainBatch | None = None
        self.failure: Exception | None = None

    def train(self) -> TrainResult:
        """Run the loop to its end, and on a terminal show how far it is."""
        if not self.world.is_main:
            return self._train()
        size = self.config.train.batch_size
        with self.display.shown(self.state.step, self.total_steps, self.plan.steps_per_epoch, size):
            return self._train()

    def _train(self) -> TrainResult:
        begin = time.perf_counter()
        first_step, step_seconds = self.state.step, 0.0
        status: Literal["FINISHED", "FAILED", "KILLED"] = "FAILED"
        try:
            if self.is_fork:
                self._save_checkpoint()
            if self._is_evaluation_missing():
                self._validate()
            self.profile.start()
            while self.state.step < self.total_steps:
                step_begin = time.perf_counter()
                self.advance()
                step_seconds += time.perf_counter() - step_begin
                self.profile.step()
                # The checkpoint comes first: a validation that fails must not cost what was trained.
                if self._is_checkpoint_due() or self.ledger.is_stopping:
                    self._save_checkpoint()
                if self.ledger.is_stopping and self.state.step < self.total_steps:
                    self._leave()
                if self._is_evaluation_due():
                    self._validate()
            trained = (self.state.step - first_step) * self.config.train.batch_size
            speed = trained / step_seconds if trained else None
            self.checkpoints.settle()
            result = self._finish(time.perf_counter() - begin, speed)
            status = "FINISHED"
            return result
        except (KeyboardInterrupt, PreemptedError):
            status = "KILLED"
            raise
        finally:
            self.profile.close()
            self.batches.close()
            self.checkpoints.close()
            if self.tracker:
                self.tracker.finish(status)

    def advance(self) -> None:
        """A step, and what is told of it: all of the loop but checkpoints and evaluations."""
        self.train_step()
        self.display.at(self.state.step)
        if self._is_record_due() or self._is_checkpoint_due() or self.ledger.is_stopping:
            # What is written and saved is what all steps came to.
            self.ledger.settle()
        if self._is_record_due():
            self._record_interval()

    def train_step(self) -> None:
        """Fetch and augment, forward and backward, agree, update where that was agreed on. Nothing here waits for the
        device; what became of the step is heard of with the next one."""
        self.ledger.begin_step()
        with named("data"):
            self.watchdog.at(self.state.step + 1, "waiting for data")
            batch = self._next_batch()
            # Before the ranks wait for each other, so that one that still waits for data is seen to be behind.
            self.watchdog.at(self.state.step + 1, "computing")
        if self.config.has_margin:
            self.engine.set_margin(self._margin(self.state.step))
        with named("forward and backward"):
            output = self.engine.forward_backward(batch.features, batch.ids)
        with named("agree"):
            gradient_norm = self.engine.gradient_norm()
            agreement = agree(
                output.loss,
                gradient_norm,
                num_faults=batch.num_faults,
                has_failed=self.failure is not None,
                is_stopping=self.request.name is not None,
                world=self.world,
            )
        with named("optimizer"):
            self.engine.step(self._learning_rate(self.state.step), agreement.refused)
        self.state.step += 1
        launched = LaunchedStep(
            self.state.step, batch, self.failure, output, gradient_norm, self.engine.problem(), agreement
        )
        with named("check"):
            self.ledger.enter(launched)

    def _next_batch(self) -> TrainBatch:
        """The next batch of this rank. Where it has none, the one before stands in for it, so that the ranks need not
        wait here for each other: they hear of it with the rest, and refuse the step."""
        if self.batch is None:
            with raised_together(self.world):
                self.batch = next(self.batches)
        elif self.failure is None:
            try:
                self.batch = next(self.batches)
            except Exception as error:
                self.failure = error
        assert self.batch is not None
        return self.batch

    def _leave(self) -> None:
        """End the run as a scheduler asked for, when the checkpoint is on disk."""
        self.checkpoints.settle()
        name = self.request.name or "a request to another rank"
        raise PreemptedError(
            f"ended by {name} after step {self.state.step} of {self.total_steps}; the checkpoint is written, the same "
            "command goes on from it",
            said_by=0,
        )

    def _is_evaluation_due(self) -> bool:
        epoch_ends = self.state.step % (self.config.eval.every_epochs * self.plan.steps_per_epoch) == 0
        # Beyond the end is a run whose train.max_steps was lowered.
        return epoch_ends or self.state.step >= self.total_steps

    def _is_record_due(self) -> bool:
        return self.state.step % self.config.train.log_every == 0 or self.state.step >= self.total_steps

    def _is_checkpoint_due(self) -> bool:
        is_evaluated = self.config.eval.trials is not None and self._is_evaluation_due()
        is_last = self.state.step >= self.total_steps
        return self.state.step % self.config.checkpoint.every_steps == 0 or is_evaluated or is_last

    def _is_evaluation_missing(self) -> bool:
        """Whether the step that the run begins with was still to be evaluated."""
        if self.state.step == 0:
            return self.config.eval.at_start and self.config.eval.trials is not None
        return self._is_evaluation_due() and self.state.evaluated_step != self.state.step

    def _validate(self) -> None:
        if self.config.eval.trials is None and self.state.step < self.total_steps:
            return
        self.watchdog.at(self.state.step + 1, "evaluating", alone=True)
        result = self.validation.evaluate(self.engine, self.state)
        # What is being written may take the last room of a disk, and give it back.
        self.checkpoints.wait()
        self.validation.keep_best(required=self.state.step >= self.total_steps)
        if result is None:
            return
        with raised_together(self.world):
            if self.records:
                self.records.write_evaluation(
                    step=self.state.step,
                    epoch=self._epoch(),
                    eer=result.eer,
                    min_dcf=result.min_dcf["0.05"],
                    values=sphere_measures(result.embeddings, result.trials),
                )
        self.checkpoints.update(self.state)

    def _save_checkpoint(self) -> None:
        self.watchdog.at(self.state.step + 1, "saving a checkpoint", alone=True)
        if self.records:
            self.records.try_to_flush()
        self.validation.keep_best()
        saved = SavedRun(
            state=self.state,
            stream=self.batches.state_dict(),
            interval=self.ledger.interval.state_dict(),
            signature=self.signature,
            num_ranks=self.world.size,
            begun_from=self.begun_from,
            versions=VERSIONS,
            config=self.config,
        )
        weights = self.engine.class_weights()
        classes = None if weights is None else Classes(self.class_names, weights)
        self.checkpoints.save(self.engine, self.validation.model(self.engine, self.state.step), saved, classes)

    def _learning_rate(self, step: int) -> float:
        return learning_rate(
            self.config.optim,
            step=step,
            steps_per_epoch=self.plan.steps_per_epoch,
            total_steps=self.total_steps,
        )

    def _margin(self, step: int) -> float:
        return margin(self.config.head, step=step, steps_per_epoch=self.plan.steps_per_epoch)

    def _epoch(self) -> int:
        return self.state.step // self.plan.steps_per_epoch

    def _record_interval(self) -> None:
        interval = self.ledger.take_interval()
        if interval.is_empty:
            return
        scalars = self.engine.loss_scalars()
        rate = self._learning_rate(self.state.step - 1)
        with raised_together(self.world):
            if self.records:
                values = {**scalars, "lr": rate, "skipped": self.state.skipped}
                rates = self.batches.false_negatives
                if rates is not None and rates.expected is not None:
                    values["false_negatives_expected"] = rates.expected
                self.records.write_interval(step=self.state.step, epoch=self._epoch(), interval=interval, values=values)

    def _open_records(self) -> None:
        with writing(self.run_dir), atomic_write(self.run_dir / "config.yaml") as file:
            file.write(self.config_text.encode())
        self.tracker = Tracker.start(self.config, self.run_dir)
        self.tracker.log_params(self.config)
        self.tracker.log_artifact(self.run_dir / "config.yaml")
        self.records = Records(self.run_dir, self.tracker, self.state, self.total_steps, self.display)

    def _announce(self, start: Start) -> None:
        for remark in start.remarks:
            logger.warning("%s", remark)
        of_cores = remark_on_cores(self.world, self.device)
        if of_cores:
            logger.warning("%s", of_cores)
        of_precision = remark_on_precision(self.config, self.device)
        if of_precision:
            logger.log(*of_precision)
        logger.info(
            "%s, %d steps an epoch, %d ranks x %d utterances on %s, from step %d to %d",
            self.plan.describe(),
            self.plan.steps_per_epoch,
            self.world.size,
            self.config.train.batch_size // self.world.size,
            self.device.type,
            self.state.step,
            self.total_steps,
        )

    def _finish(self, seconds: float, speed: float | None) -> TrainResult:
        result = TrainResult(
            run_dir=str(self.run_dir),
            steps=self.state.step,
            eer=self.state.best_eer,
            eer_before=self.state.first_eer,
            seconds=seconds,
            utterances_per_second=speed,
            model_uri=None,
            report=str(self.run_dir / "report.html"),
        )
        self.watchdog.at(self.state.step + 1, "finishing", alone=True)
        with raised_together(self.world):
            if self.records and self.tracker:
                self.records.flush()
                conclude(self.config, result, self.tracker)
        return result
