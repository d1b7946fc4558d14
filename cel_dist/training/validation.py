"""Evaluation of the encoder during training, and the best model so far."""

import copy
import logging
from collections.abc import Mapping
from contextlib import nullcontext
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import nn

from cel_dist.code_version import code_version
from cel_dist.config import Config
from cel_dist.description import MeasuredOn, Provenance
from cel_dist.distributed import World
from cel_dist.engine import Engine
from cel_dist.errors import RunError
from cel_dist.evaluation import Evaluation, diagnose, evaluate
from cel_dist.evaluation.bootstrap import validation_intervals
from cel_dist.evaluation.embed import raised_together
from cel_dist.evaluation.metadata import Metadata
from cel_dist.evaluation.trials import Trials
from cel_dist.model import SpeakerModel
from cel_dist.network import describe
from cel_dist.tracking.connection import redacted
from cel_dist.training.checkpoint import TrainState
from cel_dist.training.objective import new_encoder

logger = logging.getLogger(__name__)
VERSIONS = {name: version(name) for name in ("cel_dist", "torch", "deepspeed")}
_PRIOR = "0.05"


class Validation:
    """The validation list of a run and its best model.

    All ranks call its methods together.

    Args:
        config: the run.
        world: rank and size.
        device: where embeddings are computed.
        steps_per_epoch: of the run's data.
        data_sha256: of the manifests of these, for the model's provenance.
    """

    def __init__(
        self,
        config: Config,
        world: World,
        device: torch.device,
        steps_per_epoch: int,
        data_sha256: Mapping[str, str] | None = None,
    ) -> None:
        self._config, self._world = config, world
        self._data_sha256 = dict(data_sha256 or {})
        self._run_dir: Path = config.run.dir
        self._steps_per_epoch = steps_per_epoch
        self._best: tuple[SpeakerModel, Evaluation | None] | None = None
        self._metadata_is_read = False
        self._metadata: Metadata | None = None
        self._encoder: nn.Module = new_encoder(config).to(device)

    def model(self, engine: Engine, step: int) -> SpeakerModel:
        """A plain copy of the encoder as it is after `step`; the next call overwrites it."""
        self._encoder.load_state_dict(engine.encoder_state())
        config = self._config
        training = Provenance(
            config=_without_passwords(config.model_dump(mode="json")),
            step=step,
            epoch=step / self._steps_per_epoch,
            utterances=step * config.train.batch_size,
            data_sha256=self._data_sha256,
            # Only rank 0 writes models.
            code=code_version() if self._world.is_main else None,
            versions=VERSIONS,
        )
        return SpeakerModel(self._encoder, describe(config, training))

    def evaluate(self, engine: Engine, state: TrainState) -> Evaluation | None:
        """Evaluate on the validation list, and note the outcome in `state`; `keep_best` is to follow.

        Returns:
            What was measured. None without a list: then the model is the best because it is the last.

        Raises:
            CelError: audio of the list cannot be used. All ranks raise.
        """
        model = self.model(engine, state.step)
        if self._config.eval.trials is None or self._config.eval.root is None:
            self._best = (model, None)
            return None
        result = evaluate(model, self._config.eval.trials, self._config.eval.root, world=self._world)
        self._read_metadata(result.trials)
        state.evaluated_step = state.step
        if state.step == 0:
            state.first_eer = result.eer
        if state.best_eer is None or result.eer < state.best_eer:
            state.best_eer, state.best_step = result.eer, state.step
            self._best = (model, result)
        return result

    def _read_metadata(self, trials: Trials) -> None:
        """What rank 0 needs for diagnostics, once."""
        if self._config.eval.metadata is None or self._metadata_is_read:
            return
        with raised_together(self._world):
            if self._world.is_main:
                self._metadata = Metadata.read(self._config.eval.metadata, trials.files)
                self._metadata.check(trials)
        self._metadata_is_read = True

    def keep_best(self, *, required: bool = False) -> None:
        """Write the model that was evaluated last, if it is the best so far and was not written yet.

        Where that fails, rank 0 warns, and the next call tries again.

        Args:
            required: raise then instead, on all ranks.

        Raises:
            RunError: the model folder cannot be written.
        """
        best = self._best
        with raised_together(self._world) if required else nullcontext():
            if best is None or not self._world.is_main:
                return
            try:
                self._write(*best)
            except RunError as error:
                if required:
                    raise
                logger.warning("%s; it is tried again with the next checkpoint", error)
                # The encoder's copy is used again.
                self._best = (SpeakerModel(copy.deepcopy(best[0].encoder), best[0].description), best[1])
            else:
                self._best = None

    def _write(self, model: SpeakerModel, result: Evaluation | None) -> None:
        if result is not None:
            result.write_scores(self._run_dir / "evaluation")
            if self._metadata is not None:
                diagnose(result, self._metadata).write(self._run_dir / "evaluation")
            model = model.calibrate(result.threshold, result.calibration)
            self._note(result, model.description.training)
        model.save(self._run_dir / "model")

    def _note(self, result: Evaluation, training: Provenance) -> None:
        """What was measured, with intervals where it is known who speaks."""
        voices = None if self._metadata is None else self._metadata.speaker
        intervals = validation_intervals(result.scores, result.trials, voices)
        training.metrics = {"eer": result.eer, "min_dcf": result.min_dcf[_PRIOR]}
        training.intervals = {} if intervals is None else {"eer": intervals.eer, "min_dcf": intervals.min_dcf[_PRIOR]}
        training.measured_on = MeasuredOn(
            trials=result.calibration.trials or "",
            trials_sha256=result.calibration.trials_sha256 or "",
            num_trials=len(result.trials),
            speakers=None if intervals is None else intervals.speakers,
            replicates=None if intervals is None else intervals.replicates,
        )


def _without_passwords(settings: Any) -> Any:
    """Settings as a model may hand them on: addresses of servers may have a password in them."""
    if isinstance(settings, dict):
        return {name: _without_passwords(value) for name, value in settings.items()}
    return redacted(settings) if isinstance(settings, str) else settings
