"""Checkpoints that are complete or absent.

    checkpoints/
      step-00001000/
        config.yaml    the run's configuration
        engine/        DeepSpeed's files
        model/         the encoder as a model folder that `cel_dist.load_model` reads
        state.json     position of the run, and what of data and world the configuration does not say; written last
      retired-step-00002000/
                       a checkpoint behind one that the run went back to; no run continues from it by itself

A checkpoint is written under a hidden name and renamed when all ranks have written their part.
"""

import json
import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cel_dist.config import Config
from cel_dist.config_file import load_config
from cel_dist.data.files import atomic_write, sync
from cel_dist.distributed import World
from cel_dist.engine import Engine
from cel_dist.errors import CelError, RunError
from cel_dist.evaluation.embed import raised_together
from cel_dist.model import SpeakerModel

logger = logging.getLogger(__name__)
STATE = "state.json"
CONFIG = "config.yaml"


@dataclass
class TrainState:
    """Position of a run.

    Attributes:
        step: optimizer steps taken.
        best_eer: lowest validation EER so far, a fraction.
        best_step: step at which it was reached.
        first_eer: validation EER of the untrained encoder.
        evaluated_step: step of the last evaluation.
    """

    step: int = 0
    best_eer: float | None = None
    best_step: int | None = None
    first_eer: float | None = None
    evaluated_step: int | None = None


@dataclass(frozen=True)
class SavedRun:
    """What a checkpoint says of the run that wrote it; `signature` as in `CheckpointStore`."""

    state: TrainState
    signature: dict[str, Any]
    config: Config


def complete_checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints of the folder `checkpoints` of a run, oldest first."""
    return sorted(path.parent for path in folder.glob(f"step-*/{STATE}"))


def read_checkpoint(checkpoint: Path) -> SavedRun:
    """What a checkpoint says of its run; DeepSpeed's files are not read.

    Raises:
        CelError: it is no complete checkpoint, or what it says is damaged.
    """
    try:
        record = json.loads((checkpoint / STATE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise CelError(f"{checkpoint} is no complete checkpoint: it has no readable {STATE}") from None
    try:
        state, signature = TrainState(**record["state"]), dict(record["signature"])
    except (KeyError, TypeError, ValueError) as error:
        raise CelError(
            f"{checkpoint / STATE} is damaged ({type(error).__name__}: {error}); continue from another checkpoint with "
            "--resume"
        ) from None
    return SavedRun(state, signature, load_config(checkpoint / CONFIG))


class CheckpointStore:
    """The checkpoints of a run.

    Args:
        folder: where they lie.
        world: this process's place; all ranks call every method together.
        keep_last: number of newest checkpoints to keep, besides the best one.
        signature: what a run that continues from a checkpoint must agree in besides the configuration.
        config_text: the run's configuration as YAML.
    """

    def __init__(self, folder: Path, world: World, keep_last: int, signature: dict[str, Any], config_text: str) -> None:
        self._folder = folder
        self._world = world
        self._keep_last = keep_last
        self._signature = signature
        self._config_text = config_text

    def save(self, engine: Engine, model: SpeakerModel, state: TrainState) -> Path:
        """Write the checkpoint of `state.step` and remove those that are no longer to be kept.

        Raises:
            RunError: it cannot be written, on any of the ranks. All ranks raise; what was there before stays.
        """
        final = self._path(state)
        temporary = self._folder / f".writing-{final.name}"
        try:
            with self._writing(final):
                if self._world.is_main:
                    shutil.rmtree(temporary, ignore_errors=True)
                    temporary.mkdir(parents=True)
            with self._writing(final):
                engine.save(temporary)
            with self._writing(final):
                if self._world.is_main:
                    self._complete(temporary, final, model, state)
                    self._prune(state)
        except (CelError, RunError):
            if self._world.is_main:
                shutil.rmtree(temporary, ignore_errors=True)
            raise
        return final

    def update(self, state: TrainState) -> None:
        """Note in the checkpoint of `state.step` what an evaluation added to the state. Raises as `save`."""
        final = self._path(state)
        with self._writing(final):
            if self._world.is_main:
                with atomic_write(final / STATE) as file:
                    file.write(self._record(state))
                self._prune(state)

    def last(self) -> Path | None:
        """The newest complete checkpoint."""
        complete = complete_checkpoints(self._folder)
        return complete[-1] if complete else None

    def retire_after(self, step: int) -> None:
        """Take the checkpoints behind `step`, from where the run goes on in another way, out of the row, and remove
        what a killed run left half-written. Raises as `save`."""
        with self._writing(self._folder):
            if not self._world.is_main:
                return
            for unfinished in self._folder.glob(".writing-*"):
                shutil.rmtree(unfinished)
            for path in complete_checkpoints(self._folder):
                if path.name > f"step-{step:08d}":
                    retired = path.with_name(f"retired-{path.name}")
                    shutil.rmtree(retired, ignore_errors=True)
                    os.replace(path, retired)
                    logger.info("%s lies behind step %d, where the run goes on: now %s", path, step, retired.name)

    def _path(self, state: TrainState) -> Path:
        return self._folder / f"step-{state.step:08d}"

    def _record(self, state: TrainState) -> bytes:
        return json.dumps({"state": asdict(state), "signature": self._signature}, indent=2).encode()

    def _complete(self, temporary: Path, final: Path, model: SpeakerModel, state: TrainState) -> None:
        model.save(temporary / "model")
        (temporary / CONFIG).write_text(self._config_text, encoding="utf-8")
        (temporary / STATE).write_bytes(self._record(state))
        for path in [*temporary.rglob("*"), temporary]:
            sync(path)
        if final.exists():
            shutil.rmtree(final)
        os.replace(temporary, final)
        sync(self._folder)

    def _prune(self, state: TrainState) -> None:
        for path in complete_checkpoints(self._folder)[: -self._keep_last]:
            if path.name != f"step-{state.best_step or 0:08d}":
                # The marker goes first: a removal that is cut short must not leave something that looks complete.
                (path / STATE).unlink()
                shutil.rmtree(path)

    @contextmanager
    def _writing(self, target: Path) -> Iterator[None]:
        with raised_together(self._world):
            try:
                yield
            # torch reports a full disk as a RuntimeError, `SpeakerModel.save` as a RunError.
            except (OSError, RuntimeError, RunError) as error:
                reason = " ".join(str(error).split())[:200]
                raise RunError(
                    f"checkpoint {target} cannot be written: {reason}; earlier ones are untouched, make room and run "
                    "the same command again"
                ) from error
