"""The training loop."""

import logging
import math
import os
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from cel_dist.config import Config
from cel_dist.config_file import dump_config
from cel_dist.data.files import atomic_write, sole_writer
from cel_dist.description import EncoderDescription, ModelDescription, Provenance
from cel_dist.distributed import World
from cel_dist.engine import Engine
from cel_dist.errors import CelError, RunError
from cel_dist.evaluation import Evaluation, evaluate
from cel_dist.evaluation.embed import raised_together
from cel_dist.model import SpeakerModel
from cel_dist.process_group import process_group
from cel_dist.tracking import Tracker
from cel_dist.training.batches import Batches, TrainBatch
from cel_dist.training.checkpoint import CheckpointStore
from cel_dist.training.objective import initial_encoder, new_encoder, new_objective
from cel_dist.training.preflight import Checked, preflight
from cel_dist.training.records import Interval, Records, writing
from cel_dist.training.result import TrainResult
from cel_dist.training.schedule import learning_rate, num_steps
from cel_dist.training.start import Start, find_start, signature
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
    """
    world = World.from_environment()
    checked = preflight(config, world.size, resume)
    if checked.start.result is not None:
        logger.info("%s", checked.start.result.nothing_to_do())
        return checked.start.result
    torch.set_num_threads(config.train.threads or max(1, _num_cores() // world.local_size))
    with process_group(world, config.engine) as (device, watchdog), _sole_run(config.run.dir, world):
        return Trainer(config, world, device, resume, checked, watchdog).train()


@contextmanager
def _sole_run(run_dir: Path, world: World) -> Iterator[None]:
    """Make the run folder, and hold it against other runs."""
    with ExitStack() as held:
        with raised_together(world), writing(run_dir):
            if world.is_main:
                run_dir.mkdir(parents=True, exist_ok=True)
                held.enter_context(sole_writer(run_dir, "cel train"))
        yield


def _num_cores() -> int:
    """Cores that this process may use: in a container or a batch job, often not all that the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class Trainer:
    """One rank's part of a run: everything is built here, then `train` runs the loop."""

    def __init__(
        self, config: Config, world: World, device: torch.device, resume: str, checked: Checked, watchdog: Watchdog
    ) -> None:
        self.config, self.world, self.device, self.watchdog = config, world, device, watchdog
        self.run_dir = config.run.dir
        self.config_text = dump_config(config)
        self.plan = checked.plan
        self.batches = Batches(config, checked, world, device)
        with raised_together(world):
            # Again, because another run may have written into the folder before this one held it.
            start = find_start(config, steps_per_epoch=self.plan.steps_per_epoch, num_ranks=world.size, resume=resume)
            encoder = initial_encoder(config) if start.checkpoint is None else new_encoder(config)
        objective = new_objective(config, encoder, torch.distributed.group.WORLD, device.type == "cuda")
        self.engine = Engine(objective, config, world, device)
        self.evaluated = new_encoder(config).to(device)

        self.total_steps = num_steps(config, self.plan.steps_per_epoch)
        self.state = start.state
        self.checkpoints = CheckpointStore(
            self.run_dir / "checkpoints",
            world,
            config.checkpoint.keep_last,
            signature(config, steps_per_epoch=self.plan.steps_per_epoch, num_ranks=world.size),
            self.config_text,
        )
        if start.checkpoint is not None:
            self.engine.load(start.checkpoint)
            self.batches.seek(self.state.step)
        self.checkpoints.retire_after(self.state.step)
        self.records: Records | None = None
        self.tracker: Tracker | None = None
        with raised_together(world):
            if world.is_main:
                self._open_records()
                self._announce(start)

    def train(self) -> TrainResult:
        """Run the loop to its end."""
        begin = time.perf_counter()
        first_step, step_seconds = self.state.step, 0.0
        status: Literal["FINISHED", "FAILED", "KILLED"] = "FAILED"
        try:
            if self._is_evaluation_missing():
                self._validate()
                if self.state.step > 0:
                    self._save_checkpoint()
            interval = Interval()
            while self.state.step < self.total_steps:
                step_begin = time.perf_counter()
                self.train_step(interval)
                step_seconds += time.perf_counter() - step_begin
                if self.state.step % self.config.train.log_every == 0 or self.state.step == self.total_steps:
                    self._record_interval(interval)
                    interval = Interval()
                # The checkpoint comes first: a validation that fails must not cost what was trained.
                if is_saved := self._is_checkpoint_due():
                    self._save_checkpoint()
                if self._is_evaluation_due():
                    improved = self._validate()
                    if is_saved:
                        self.checkpoints.update(self.state)
                    elif improved:
                        self._save_checkpoint()
            trained = (self.state.step - first_step) * self.config.train.batch_size
            speed = trained / step_seconds if trained else None
            result = self._finish(time.perf_counter() - begin, speed)
            status = "FINISHED"
            return result
        except KeyboardInterrupt:
            status = "KILLED"
            raise
        finally:
            self.batches.close()
            if self.tracker:
                self.tracker.finish(status)

    def train_step(self, interval: Interval) -> None:
        """Fetch and augment, forward and backward, check, update."""
        with raised_together(self.world):
            self.watchdog.at(self.state.step + 1, "waiting for data")
            batch = next(self.batches)
            # Before the ranks wait for each other, so that one that still waits for data is seen to be behind.
            self.watchdog.at(self.state.step + 1, "computing")
        try:
            output = self.engine.forward_backward(batch.features, batch.ids)
        except CelError as error:
            # Embeddings of no use, on any rank; all ranks hear of them alike.
            raise self._stopped(batch, str(error)) from None
        gradient_norm = self.engine.gradient_norm()
        num_faults = self._check_finite(output.loss, gradient_norm, batch)
        self.engine.step(
            learning_rate(
                self.config.optim,
                step=self.state.step,
                steps_per_epoch=self.plan.steps_per_epoch,
                total_steps=self.total_steps,
            )
        )
        self.state.step += 1
        interval.add(
            output,
            gradient_norm,
            utterances=self.config.train.batch_size,
            waited=batch.waited,
            faults=num_faults,
            false_negatives=batch.false_negatives,
        )

    def _check_finite(self, loss: Tensor, gradient_norm: Tensor, batch: TrainBatch) -> int:
        """Stop all ranks, before the optimizer is touched, if the loss or the gradient of one of them is not finite.

        Returns:
            The utterances of the global batch that could not be read.
        """
        values = torch.stack(
            [loss.detach().double(), gradient_norm.double(), loss.new_tensor(batch.num_faults).double()]
        )
        # A sum is finite only where every term is.
        torch.distributed.all_reduce(values)
        sum_of_losses, sum_of_norms, num_faults = values.tolist()
        mean_loss, mean_norm = sum_of_losses / self.world.size, sum_of_norms / self.world.size
        if math.isfinite(mean_loss) and math.isfinite(mean_norm):
            return int(num_faults)
        raise self._stopped(batch, f"loss {mean_loss}, gradient norm {mean_norm}")

    def _stopped(self, batch: TrainBatch, reason: str) -> RunError:
        last = self.checkpoints.last()
        advice = (
            f"the last good state is {last}; go on from it in another run.dir, with --resume {last} and"
            if last
            else "no checkpoint was written yet; start again with"
        )
        return RunError(
            f"step {self.state.step + 1} (epoch {batch.epoch}): {reason}; nothing was updated and {advice} a lower "
            "optim.lr, optim.clip_norm, or train.precision=fp32",
            said_by=0,
        )

    def _is_evaluation_due(self) -> bool:
        epoch_ends = self.state.step % (self.config.eval.every_epochs * self.plan.steps_per_epoch) == 0
        # Beyond the end is a run whose train.max_steps was lowered.
        return epoch_ends or self.state.step >= self.total_steps

    def _is_checkpoint_due(self) -> bool:
        return self.state.step % self.config.checkpoint.every_steps == 0 or self.state.step == self.total_steps

    def _is_evaluation_missing(self) -> bool:
        """Whether the step that the run begins with was still to be evaluated."""
        if self.state.step == 0:
            return self.config.eval.at_start and self.config.eval.trials is not None
        return self._is_evaluation_due() and self.state.evaluated_step != self.state.step

    def _validate(self) -> bool:
        """Evaluate on the validation list; returns whether this is the best model so far.

        Without a list the last model is the best, and nothing is measured.
        """
        if self.config.eval.trials is None or self.config.eval.root is None:
            if self.state.step >= self.total_steps:
                self._save_best(self._model(), None)
            return False
        self.watchdog.at(self.state.step + 1, "evaluating", alone=True)
        model = self._model()
        result = evaluate(model, self.config.eval.trials, self.config.eval.root, world=self.world)
        self.state.evaluated_step = self.state.step
        if self.state.step == 0:
            self.state.first_eer = result.eer
        is_best = self.state.best_eer is None or result.eer < self.state.best_eer
        if is_best:
            self.state.best_eer, self.state.best_step = result.eer, self.state.step
            self._save_best(model, result)
        with raised_together(self.world):
            if self.records:
                self.records.write_evaluation(
                    step=self.state.step, epoch=self._epoch(), eer=result.eer, min_dcf=result.min_dcf["0.05"]
                )
        return is_best and self.state.step > 0

    def _save_best(self, model: SpeakerModel, result: Evaluation | None) -> None:
        with raised_together(self.world):
            if not self.world.is_main:
                return
            if result is not None:
                result.write_scores(self.run_dir / "evaluation")
                model = model.calibrate(result.threshold, result.calibration)
                model.description.training.metrics = {"eer": result.eer, "min_dcf": result.min_dcf["0.05"]}
            model.save(self.run_dir / "model")

    def _save_checkpoint(self) -> None:
        self.watchdog.at(self.state.step + 1, "writing a checkpoint", alone=True)
        self.checkpoints.save(self.engine, self._model(), self.state)

    def _model(self) -> SpeakerModel:
        """A plain copy of the encoder as it is now, on every rank."""
        self.evaluated.load_state_dict(self.engine.encoder_state())
        description = ModelDescription(
            encoder=EncoderDescription(name=self.config.encoder.name, embedding_dim=self.config.encoder.embedding_dim),
            training=Provenance(
                config=self.config.model_dump(mode="json"),
                step=self.state.step,
                epoch=self.state.step / self.plan.steps_per_epoch,
                utterances=self.state.step * self.config.train.batch_size,
                versions={name: version(name) for name in ("cel_dist", "torch", "deepspeed")},
            ),
        )
        return SpeakerModel(self.evaluated, description)

    def _epoch(self) -> int:
        return self.state.step // self.plan.steps_per_epoch

    def _record_interval(self, interval: Interval) -> None:
        scalars = self.engine.loss_scalars()
        rate = learning_rate(
            self.config.optim,
            step=self.state.step - 1,
            steps_per_epoch=self.plan.steps_per_epoch,
            total_steps=self.total_steps,
        )
        with raised_together(self.world):
            if self.records:
                values = {**interval.summary(), **scalars, "lr": rate}
                if self.batches.false_negatives.expected is not None:
                    values["false_negatives_expected"] = self.batches.false_negatives.expected
                self.records.write_interval(step=self.state.step, epoch=self._epoch(), values=values)

    def _open_records(self) -> None:
        with writing(self.run_dir), atomic_write(self.run_dir / "config.yaml") as file:
            file.write(self.config_text.encode())
        self.tracker = Tracker.start(self.config, self.run_dir)
        self.tracker.log_params(self.config)
        self.tracker.log_artifact(self.run_dir / "config.yaml")
        self.records = Records(self.run_dir, self.tracker, self.state)

    def _announce(self, start: Start) -> None:
        for remark in start.remarks:
            logger.warning("%s", remark)
        logger.info(
            "%d utterances (%d shorter than two segments, %d of them left out: data.short=%s), %d steps an epoch, "
            "%d ranks x %d utterances on %s, from step %d to %d",
            len(self.plan),
            self.plan.num_short,
            self.plan.num_dropped,
            self.config.data.short,
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
            if self.world.is_main and self.tracker:
                self._conclude(result, self.tracker)
        return result

    def _conclude(self, result: TrainResult, tracker: Tracker) -> None:
        """Summary and report come before MLflow is asked to take the model: a failure there leaves the run whole."""
        # Plots and templates take a second to import, which the start of a run need not wait for.
        from cel_dist.report import PLOTS

        report = self._write_outcome(result)
        sample = 0.1 * np.random.default_rng(0).standard_normal(self.config.segment_samples)
        try:
            result.model_uri = tracker.log_model(
                self.run_dir / "model", sample.astype(np.float32), self.config.tracking.register_as
            )
        except (CelError, RunError) as error:
            logger.warning("%s", error)
        if result.model_uri:
            report = self._write_outcome(result)
        tracker.log_artifact(report)
        tracker.log_artifact(self.run_dir / PLOTS)

    def _write_outcome(self, result: TrainResult) -> Path:
        from cel_dist.report import write_report

        with writing(self.run_dir):
            result.write(self.run_dir)
        return write_report(self.run_dir)
