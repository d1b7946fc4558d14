"""Checkpoints that are complete or absent.

    checkpoints/
      step-00001000/
        state.json     position of the run, versions, encoder and world it was written with; written last
        engine/        DeepSpeed's files
        model/         the encoder as a model folder that `cel_dist.load_model` reads

A checkpoint is written under a hidden name and renamed when all ranks have written their part.
"""

import json
import logging
import os
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist

from cel_dist.data.files import sync
from cel_dist.distributed import World
from cel_dist.engine import Engine
from cel_dist.errors import CelError, RunError
from cel_dist.model import SpeakerModel

logger = logging.getLogger(__name__)
STATE = "state.json"


@dataclass
class TrainState:
    """Position of a run.

    Attributes:
        step: optimizer steps taken.
        best_eer: lowest validation EER so far, a fraction.
        best_step: step at which it was reached.
        first_eer: validation EER of the untrained encoder.
    """

    step: int = 0
    best_eer: float | None = None
    best_step: int | None = None
    first_eer: float | None = None


class CheckpointStore:
    """The checkpoints of a run.

    Args:
        folder: where they lie.
        world: this process's place; all ranks call `save` and `load` together.
        keep_last: number of newest checkpoints to keep, besides the best one.
        signature: what a checkpoint must agree in with the run that continues from it: encoder, loss and engine
            settings.
    """

    def __init__(self, folder: Path, world: World, keep_last: int, signature: dict[str, Any]) -> None:
        self._folder = folder
        self._world = world
        self._keep_last = keep_last
        self._signature = signature

    def save(self, engine: Engine, model: SpeakerModel, state: TrainState, config_text: str) -> Path:
        """Write the checkpoint of `state.step` and remove those that are no longer to be kept."""
        final = self._folder / f"step-{state.step:08d}"
        temporary = self._folder / f".writing-{final.name}"
        if self._world.is_main:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
        self._barrier()
        try:
            engine.save(temporary)
        except OSError as error:
            raise RunError(f"checkpoint {final} cannot be written: {error}; earlier ones are untouched") from error
        self._barrier()
        if self._world.is_main:
            self._complete(temporary, final, model, state, config_text)
            self._prune(state)
        self._barrier()
        return final

    def complete(self) -> list[Path]:
        """Complete checkpoints, oldest first."""
        return sorted(path.parent for path in self._folder.glob(f"step-*/{STATE}"))

    def load(self, engine: Engine, checkpoint: Path) -> TrainState:
        """Restore the engine from a checkpoint and return the position.

        Raises:
            CelError: the checkpoint is of another encoder, loss, number of ranks or ZeRO stage; names the difference.
            RunError: it cannot be read.
        """
        try:
            saved = json.loads((checkpoint / STATE).read_text())
        except (OSError, ValueError):
            raise CelError(f"{checkpoint} is no complete checkpoint: it has no readable {STATE}") from None
        for key, wanted in self._signature.items():
            found = saved["signature"].get(key)
            if found != wanted:
                raise CelError(
                    f"checkpoint {checkpoint} was written with {key}={found}, this run has {key}={wanted}; change the "
                    "configuration, or start a new run in another run.dir (encoder.init takes a trained encoder over)"
                )
        engine.load(checkpoint)
        return TrainState(**saved["state"])

    def _complete(self, temporary: Path, final: Path, model: SpeakerModel, state: TrainState, config_text: str) -> None:
        model.save(temporary / "model")
        (temporary / "config.yaml").write_text(config_text, encoding="utf-8")
        record = {"state": asdict(state), "signature": self._signature}
        (temporary / STATE).write_text(json.dumps(record, indent=2), encoding="utf-8")
        for path in [*temporary.rglob("*"), temporary]:
            sync(path)
        if final.exists():
            shutil.rmtree(final)
        os.replace(temporary, final)
        sync(self._folder)

    def _prune(self, state: TrainState) -> None:
        for path in self.complete()[: -self._keep_last]:
            if path.name != f"step-{state.best_step or 0:08d}":
                # The marker goes first: a removal that is cut short must not leave something that looks complete.
                (path / STATE).unlink()
                shutil.rmtree(path)

    def _barrier(self) -> None:
        if self._world.size > 1:
            dist.barrier()
