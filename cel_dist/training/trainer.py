"""The training loop."""

import json
import logging
import math
import os
import time
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from cel_dist.config import Config, dump_config
from cel_dist.data.augment import Augment
from cel_dist.data.bank import Bank
from cel_dist.data.plan import Plan
from cel_dist.data.shards import ShardFolder
from cel_dist.data.stream import SegmentBatch, SegmentStream
from cel_dist.description import EncoderDescription, ModelDescription, Provenance
from cel_dist.distributed import World
from cel_dist.encoders import build_encoder
from cel_dist.engine import Engine, start_process_group, stop_process_group
from cel_dist.errors import CelError, RunError
from cel_dist.evaluation import Evaluation, evaluate
from cel_dist.features import LogMel
from cel_dist.losses import EquilibriumLoss
from cel_dist.model import SpeakerModel, load_model, load_weights
from cel_dist.tracking import Tracker
from cel_dist.training import SUMMARY
from cel_dist.training.checkpoint import CheckpointStore, TrainState
from cel_dist.training.objective import Objective
from cel_dist.training.records import Interval, Records
from cel_dist.training.schedule import learning_rate

logger = logging.getLogger(__name__)


@dataclass
class TrainResult:
    """Outcome of a run.

    Attributes:
        run_dir: folder of the run.
        steps: optimizer steps taken in all, over every resumption.
        eer: lowest validation EER, a fraction; None without a validation list.
        eer_before: validation EER of the untrained encoder.
        seconds: wall-clock time of this process's part, evaluation included.
        utterances_per_second: utterances trained on per second of training steps, over this process's part.
        model_uri: where MLflow has the best encoder.
        report: the HTML report.
    """

    run_dir: str
    steps: int
    eer: float | None
    eer_before: float | None
    seconds: float
    utterances_per_second: float | None
    model_uri: str | None
    report: str


def train(config: Config, resume: str = "auto") -> TrainResult:
    """Train as `config` says, in the world that the environment describes.

    Args:
        config: the run.
        resume: `auto` continues from the newest complete checkpoint of the run folder, if there is one; `none` starts
            from nothing and refuses a folder that holds a run; else the path of a checkpoint.

    Raises:
        CelError: configuration, data and world do not fit each other.
        RunError: something failed on the way.
    """
    world = World.from_environment()
    world.rows(config.train.batch_size)
    torch.set_num_threads(config.train.threads or max(1, (os.cpu_count() or 1) // world.local_size))
    device = start_process_group(world)
    try:
        return Trainer(config, world, device, resume).train()
    finally:
        stop_process_group()


def initial_encoder(config: Config) -> torch.nn.Module:
    """The encoder with which a run starts: drawn from the seed, the same on all ranks, or taken from `encoder.init`.

    Raises:
        CelError: the encoder is unknown, or `encoder.init` is no model or one of another encoder.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.train.seed)
        encoder = build_encoder(config.encoder.name, embedding_dim=config.encoder.embedding_dim)
    if config.encoder.init:
        description = EncoderDescription(name=config.encoder.name, embedding_dim=config.encoder.embedding_dim)
        load_weights(
            encoder, load_model(config.encoder.init, "cpu").encoder.state_dict(), description, config.encoder.init
        )
    return encoder


class Trainer:
    """One rank's part of a run: everything is built here, then `train` runs the loop."""

    def __init__(self, config: Config, world: World, device: torch.device, resume: str) -> None:
        self.config, self.world, self.device = config, world, device
        self.run_dir = config.run.dir
        self.config_text = dump_config(config)
        self.rows = world.rows(config.train.batch_size)

        shards = ShardFolder.open(config.data.shards)
        self.plan = Plan(
            shards.index.samples,
            segment_samples=config.segment_samples,
            batch_size=config.train.batch_size,
            short=config.data.short,
            seed=config.train.seed,
        )
        bank = Bank.open(config.data.bank) if config.data.bank else None
        self.stream = SegmentStream(shards, self.plan, self.rows, config.data.workers)
        self.augment = Augment(config.augment, bank, config.train.seed)
        self.features = LogMel().to(device)

        encoder = initial_encoder(config)
        loss = EquilibriumLoss(
            similarity=config.loss.similarity,
            pairs=config.loss.pairs,
            t=config.loss.t,
            lambda_s=config.loss.lambda_s,
            lambda_u=config.loss.lambda_u,
            group=torch.distributed.group.WORLD,
        )
        self.engine = Engine(Objective(encoder, loss, config.encoder.views), config, world, device)
        self.evaluated = build_encoder(config.encoder.name, embedding_dim=config.encoder.embedding_dim).to(device)

        epochs_steps = config.train.epochs * self.plan.steps_per_epoch
        self.total_steps = min(epochs_steps, config.train.max_steps or epochs_steps)
        self.checkpoints = CheckpointStore(
            self.run_dir / "checkpoints", world, config.checkpoint.keep_last, self._signature()
        )
        self.state = self._resume(resume)
        self.records: Records | None = None
        self.tracker: Tracker | None = None
        if world.is_main:
            self._open_records()

    def train(self) -> TrainResult:
        """Run the loop to its end."""
        begin = time.perf_counter()
        self._announce()
        first_step, step_seconds = self.state.step, 0.0
        status: Literal["FINISHED", "FAILED", "KILLED"] = "FAILED"
        try:
            if self.state.step == 0 and self.config.eval.at_start:
                self._validate()
            interval = Interval()
            while self.state.step < self.total_steps:
                step_begin = time.perf_counter()
                self.train_step(interval)
                step_seconds += time.perf_counter() - step_begin
                if self.state.step % self.config.train.log_every == 0 or self.state.step == self.total_steps:
                    self._record_interval(interval)
                    interval = Interval()
                improved = self._is_evaluation_due() and self._validate()
                if improved or self._is_checkpoint_due():
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
            self.stream.close()
            if self.tracker:
                self.tracker.finish(status)

    def train_step(self, interval: Interval) -> None:
        """Fetch, augment, forward and backward, check, update."""
        waiting = time.perf_counter()
        batch = next(self.stream)
        waited = time.perf_counter() - waiting

        output = self.engine.forward(self._features(batch))
        self.engine.backward(output.loss)
        gradient_norm = self.engine.gradient_norm()
        self._check_finite(output.loss, gradient_norm, batch)
        self.engine.step(
            learning_rate(
                self.config.optim,
                step=self.state.step,
                steps_per_epoch=self.plan.steps_per_epoch,
                total_steps=self.total_steps,
            )
        )
        self.state.step += 1
        interval.add(output, gradient_norm, utterances=self.config.train.batch_size, waited=waited)

    @torch.no_grad()
    def _features(self, batch: SegmentBatch) -> Tensor:
        segments = batch.segments.to(self.device, non_blocking=True)
        waves = self.augment(
            segments, epoch=batch.epoch, step=batch.step, rows=self.rows, batch_size=self.config.train.batch_size
        )
        features: Tensor = self.features(waves.flatten(0, 1))
        return features.reshape(*waves.shape[:2], *features.shape[1:])

    def _check_finite(self, loss: Tensor, gradient_norm: Tensor, batch: SegmentBatch) -> None:
        # Both are the same on all ranks, so all of them stop, before the optimizer is touched.
        values = loss.item(), gradient_norm.item()
        if all(map(math.isfinite, values)):
            return
        last = self.checkpoints.complete()
        advice = f"the last good state is {last[-1]}" if last else "no checkpoint was written yet"
        raise RunError(
            f"step {self.state.step + 1} (epoch {batch.epoch}): loss {values[0]}, gradient norm {values[1]}; "
            f"nothing was updated and {advice}; lower optim.lr, set optim.clip_norm, or use train.precision=fp32"
        )

    def _is_evaluation_due(self) -> bool:
        epoch_ends = self.state.step % (self.config.eval.every_epochs * self.plan.steps_per_epoch) == 0
        return epoch_ends or self.state.step == self.total_steps

    def _is_checkpoint_due(self) -> bool:
        return self.state.step % self.config.checkpoint.every_steps == 0 or self.state.step == self.total_steps

    def _validate(self) -> bool:
        """Evaluate on the validation list; returns whether this is the best model so far."""
        model = self._model()
        if self.config.eval.trials is None or self.config.eval.root is None:
            if self.world.is_main and self.state.step == self.total_steps:
                model.save(self.run_dir / "model")
            return False
        result = evaluate(model, self.config.eval.trials, self.config.eval.root, world=self.world)
        if self.state.step == 0:
            self.state.first_eer = result.eer
        elif self.state.best_eer is not None and result.eer >= self.state.best_eer:
            self._record({"eer": result.eer, "min_dcf": result.min_dcf["0.05"]})
            return False
        self.state.best_eer, self.state.best_step = result.eer, self.state.step
        self._record({"eer": result.eer, "min_dcf": result.min_dcf["0.05"]})
        if self.world.is_main:
            self._save_best(model, result)
        return self.state.step > 0

    def _save_best(self, model: SpeakerModel, result: Evaluation) -> None:
        best = model.calibrate(result.threshold, result.calibration)
        best.description.training.metrics = {"eer": result.eer, "min_dcf": result.min_dcf["0.05"]}
        best.save(self.run_dir / "model")
        result.write_scores(self.run_dir / "evaluation")

    def _save_checkpoint(self) -> None:
        self.checkpoints.save(self.engine, self._model(), self.state, self.config_text)

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

    def _record(self, values: dict[str, float]) -> None:
        if self.records:
            self.records.write(step=self.state.step, epoch=self.state.step // self.plan.steps_per_epoch, values=values)

    def _record_interval(self, interval: Interval) -> None:
        scalars = self.engine.loss_scalars()
        rate = learning_rate(
            self.config.optim,
            step=self.state.step - 1,
            steps_per_epoch=self.plan.steps_per_epoch,
            total_steps=self.total_steps,
        )
        self._record({**interval.summary(), **scalars, "lr": rate})

    def _signature(self) -> dict[str, object]:
        config = self.config
        signature: dict[str, object] = {
            "encoder.name": config.encoder.name,
            "encoder.embedding_dim": config.encoder.embedding_dim,
            "loss.similarity": config.loss.similarity,
            "engine.zero_stage": config.engine.zero_stage,
            "train.batch_size": config.train.batch_size,
            "steps per epoch": self.plan.steps_per_epoch,
        }
        if config.engine.zero_stage > 0:
            signature["number of ranks"] = self.world.size
        return signature

    def _resume(self, resume: str) -> TrainState:
        complete = self.checkpoints.complete()
        if resume == "none":
            if complete:
                raise CelError(
                    f"{self.run_dir} already holds a run (up to {complete[-1].name}); choose another run.dir, or "
                    "continue it with --resume auto"
                )
            return TrainState()
        if resume != "auto":
            checkpoint = Path(resume)
        elif complete:
            checkpoint = complete[-1]
        else:
            return TrainState()
        state = self.checkpoints.load(self.engine, checkpoint)
        epoch, step = divmod(state.step, self.plan.steps_per_epoch)
        self.stream.load_state_dict({"epoch": epoch, "step": step})
        return state

    def _open_records(self) -> None:
        self.run_dir.mkdir(parents=True, exist_ok=True)
        (self.run_dir / "config.yaml").write_text(self.config_text, encoding="utf-8")
        self.tracker = Tracker.start(self.config, self.run_dir)
        self.tracker.log_params(self.config)
        self.tracker.log_artifact(self.run_dir / "config.yaml")
        self.records = Records(self.run_dir, self.tracker, self.state.step)

    def _announce(self) -> None:
        if not self.world.is_main:
            return
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
        if self.world.is_main and self.tracker:
            # Plots and templates take a second to import, which the start of a run need not wait for.
            from cel_dist.report import write_report

            sample = 0.1 * np.random.default_rng(0).standard_normal(self.config.segment_samples)
            result.model_uri = self.tracker.log_model(
                self.run_dir / "model", sample.astype(np.float32), self.config.tracking.register_as
            )
            (self.run_dir / SUMMARY).write_text(json.dumps(asdict(result), indent=2), encoding="utf-8")
            self.tracker.log_artifact(write_report(self.run_dir))
        return result
