"""Writing the checkpoints of a run while it goes on.

Saving copies what the checkpoint needs to the CPU, and a thread of every rank writes its part:

    all ranks    copy -> train on
    threads      files of the rank, fsync, SHA-256 -> tell rank 0
    rank 0       model, configuration; all parts there? state.json, fsync, rename, remove old ones
                 a part failed? remove the folder, warn; the checkpoints before it are as they were

Everything is written below a hidden name, and appears under its own when it is whole.
"""

import copy
import json
import logging
import os
import secrets
import shutil
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO

import torch
import torch.distributed as dist

from cel_dist.data.files import atomic_write, sha256_of, sync
from cel_dist.distributed import World
from cel_dist.engine import Engine
from cel_dist.engine_checkpoint import FOLDER
from cel_dist.errors import CelError, RunError
from cel_dist.evaluation.embed import raised_together
from cel_dist.model import SpeakerModel
from cel_dist.process_group import own_store
from cel_dist.random_state import random_state
from cel_dist.training.checkpoint import (
    CONFIG,
    MODEL,
    RANDOM,
    STATE,
    SavedRun,
    TrainState,
    complete_checkpoints,
    folder_name,
)
from cel_dist.training.classes import Classes

logger = logging.getLogger(__name__)

Files = dict[str, tuple[int, str]]
# A rank that is gone does not tell that its part is there. When the run ends, the others have this long.
_PATIENCE_SECONDS = 10.0
_LOOK_SECONDS = 0.1


class CheckpointStore:
    """The checkpoints of a run.

    All ranks call `save`, `settle` and `retire_after` together.

    Args:
        folder: where they lie.
        world: this process's place.
        device: of this rank; its random generator is saved.
        keep_last: number of newest checkpoints to keep, besides the best one.
        config_text: the run's configuration as YAML.
        newest: what the checkpoint of this folder says that the run goes on from, if there is one.
    """

    def __init__(
        self,
        folder: Path,
        world: World,
        device: torch.device,
        *,
        keep_last: int,
        config_text: str,
        newest: SavedRun | None = None,
    ) -> None:
        self._folder = folder
        self._world = world
        self._device = device
        self._keep_last = keep_last
        self._config_text = config_text
        # A connection of its own: one that waits holds up all who share it.
        self._told = own_store("checkpoint") if world.size > 1 else None
        # Ranks of a start before this one may still be writing when their rank 0 is gone.
        names = [secrets.token_hex(4)]
        if world.size > 1:
            dist.broadcast_object_list(names, src=0)
        self._name = names[0]
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._closing = threading.Event()
        self._pending: list[Future[None]] = []
        self._number = 0
        self._saved = newest
        self._failure: RunError | None = None

    def save(self, engine: Engine, model: SpeakerModel, saved: SavedRun, classes: Classes | None = None) -> None:
        """Copy the checkpoint of `saved.state.step`, and have it written while training goes on.

        One copy is held at a time, so this waits for the checkpoint before. One that cannot be written is warned of in
        the log, and costs nothing but itself; `settle` raises where the newest is such.

        Args:
            engine: what trains.
            model: the encoder as it is now; rank 0's is written.
            saved: what the checkpoint says of the run.
            classes: class weights with the names of their speakers; rank 0's are written.
        """
        self.wait()
        self._number += 1
        content = {f"{FOLDER}/{name}": value for name, value in engine.snapshot().items()}
        content[f"{RANDOM}/rank-{self._world.rank:05d}.pt"] = random_state(self._device)
        saved = replace(saved, state=replace(saved.state))
        if self._world.is_main:
            model = SpeakerModel(copy.deepcopy(model.encoder).cpu(), model.description)
            self._begin(self._write_all, self._number, content, model, saved, classes)
        else:
            self._begin(self._write_for_main, self._number, content, self._temporary(saved.state.step))

    def update(self, state: TrainState) -> None:
        """Note in the newest checkpoint, that of `state.step`, what an evaluation added to the state."""
        if self._world.is_main:
            self._begin(self._note, replace(state))

    def wait(self) -> None:
        """Wait until this rank has nothing more to write, whatever became of it."""
        while self._pending:
            self._pending.pop(0).result()

    def settle(self) -> None:
        """Wait until the newest checkpoint is on disk.

        Raises:
            RunError: it could not be written. All ranks raise.
        """
        with raised_together(self._world):
            self.wait()
            if self._failure is not None:
                raise self._failure

    def close(self) -> None:
        """Let what is being written come to its end; parts of ranks that are gone are not waited for."""
        self._closing.set()
        self._thread.shutdown()

    def last(self) -> Path | None:
        """The newest complete checkpoint."""
        complete = complete_checkpoints(self._folder)
        return complete[-1] if complete else None

    def retire_after(self, step: int) -> None:
        """Take the checkpoints after `step`, from where the run goes on in another way, out of the row, and remove
        what a killed run left half-written. Raises RunError on all ranks where that is not possible."""
        with raised_together(self._world):
            if not self._world.is_main:
                return
            try:
                for kind in (".writing-*", ".former-*", ".universal-*"):
                    for unfinished in self._folder.glob(kind):
                        shutil.rmtree(unfinished, ignore_errors=True)
                for path in self._folder.glob("step-*"):
                    if not (path / STATE).exists():
                        # Its removal was cut short.
                        shutil.rmtree(path, ignore_errors=True)
                for path in complete_checkpoints(self._folder):
                    if path.name > folder_name(step):
                        retired = path.with_name(f"retired-{path.name}")
                        shutil.rmtree(retired, ignore_errors=True)
                        os.replace(path, retired)
                        logger.info("%s is later than step %d, where the run goes on: now %s", path, step, retired.name)
            except OSError as error:
                raise RunError(f"cannot change {self._folder}: {error.strerror}; check its permissions") from error

    def _begin(self, function: Callable[..., None], *arguments: Any) -> None:
        self._pending.append(self._thread.submit(function, *arguments))

    def _temporary(self, step: int) -> Path:
        return self._folder / f".writing-{folder_name(step)}-{self._name}"

    def _write_for_main(self, number: int, content: dict[str, Any], folder: Path) -> None:
        """Write this rank's part, and tell rank 0 what became of it."""
        assert self._told is not None
        try:
            told: dict[str, Any] = {"files": _write_files(folder, content)}
        except (OSError, RuntimeError) as error:
            told = {"problem": _reason(error)}
        self._told.set(f"{number}/{self._world.rank}", json.dumps(told))

    def _write_all(
        self, number: int, content: dict[str, Any], model: SpeakerModel, saved: SavedRun, classes: Classes | None
    ) -> None:
        final, temporary = self._folder / folder_name(saved.state.step), self._temporary(saved.state.step)
        problem = None
        files: Files = {}
        try:
            files = _write_files(temporary, content)
            model.save(temporary / MODEL)
            (temporary / CONFIG).write_text(self._config_text, encoding="utf-8")
            written = [temporary / CONFIG, *sorted((temporary / MODEL).iterdir())]
            if classes is not None:
                written.append(classes.write(temporary))
            for path in written:
                files[path.relative_to(temporary).as_posix()] = _sealed(path)
        # torch reports a full disk as a RuntimeError, `SpeakerModel.save` as a RunError.
        except (OSError, RuntimeError, RunError) as error:
            problem = _reason(error)
        # In any case: nothing may be removed that another rank is writing.
        try:
            parts = self._parts(number)
        except RuntimeError as error:
            parts = [{"problem": _reason(error)}]
        problem = problem or next((told["problem"] for told in parts if "problem" in told), None)
        for told in parts:
            files |= {name: (size, digest) for name, (size, digest) in told.get("files", {}).items()}
        self._saved = None
        if problem is None:
            try:
                _require_all(temporary, files)
                saved = replace(saved, files=files)
                _complete(temporary, final, saved)
                self._saved, self._failure = saved, None
            except OSError as error:
                problem = _reason(error)
            else:
                self._prune(saved.state)
        if problem is not None:
            shutil.rmtree(temporary, ignore_errors=True)
            self._failure = RunError(
                f"checkpoint {final} cannot be written: {problem}; earlier ones are untouched, make room and run the "
                "same command again"
            )
            logger.warning(
                "checkpoint %s cannot be written: %s; earlier ones are untouched, and training goes on", final, problem
            )

    def _parts(self, number: int) -> list[dict[str, Any]]:
        """What the other ranks told of their parts."""
        parts: list[dict[str, Any]] = []
        closed_at = None
        for rank in range(1, self._world.size):
            assert self._told is not None
            key = f"{number}/{rank}"
            # Not `wait`, of which torch writes two lines to the log when it takes long.
            while not self._told.check([key]):
                if self._closing.wait(_LOOK_SECONDS):
                    closed_at = closed_at or time.monotonic()
                    if time.monotonic() > closed_at + _PATIENCE_SECONDS:
                        return [*parts, {"problem": f"rank {rank} did not write its part"}]
                    time.sleep(_LOOK_SECONDS)
            parts.append(json.loads(self._told.get(key)))
            self._told.delete_key(key)
        return parts

    def _note(self, state: TrainState) -> None:
        if self._saved is None or self._saved.state.step != state.step:
            return
        path = self._folder / folder_name(state.step) / STATE
        try:
            with atomic_write(path) as file:
                file.write(replace(self._saved, state=state).record())
            self._prune(state)
        except OSError as error:
            # The evaluation is done again, should a run go on from there.
            logger.warning("cannot note the evaluation in %s: %s", path, _reason(error))

    def _prune(self, state: TrainState) -> None:
        for path in complete_checkpoints(self._folder)[: -self._keep_last]:
            if path.name != folder_name(state.best_step or 0):
                try:
                    # The marker goes first: a removal that is cut short must not leave something that looks complete.
                    (path / STATE).unlink()
                    shutil.rmtree(path)
                except OSError as error:
                    # The next start tries again.
                    logger.warning("cannot remove the old checkpoint %s: %s", path, _reason(error))


def _write_files(folder: Path, content: dict[str, Any]) -> Files:
    """Write `content` with `torch.save`, and make sure that it is on disk."""
    files: Files = {}
    folder.mkdir(parents=True, exist_ok=True)
    for name, value in content.items():
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        with path.open("wb") as file:
            save_into(value, file)
        files[name] = _sealed(path)
    return files


def save_into(value: Any, file: BinaryIO) -> None:
    """`torch.save` that raises the OSError of the file. Given a name, torch tells of a full disk in words that do not
    say so; given a file, it may, where the disk has room again for the end."""
    try:
        torch.save(value, file)
    except RuntimeError as error:
        if isinstance(error.__context__, OSError):
            raise error.__context__ from None
        raise


def _sealed(path: Path) -> tuple[int, str]:
    """Wait until a file is on disk; its bytes and their SHA-256."""
    sync(path)
    return path.stat().st_size, sha256_of(path)


def _require_all(folder: Path, files: Files) -> None:
    """Raise OSError unless what all ranks say they wrote is here."""
    for name, (size, _) in files.items():
        path = folder / name
        if not path.exists() or path.stat().st_size != size:
            raise OSError(
                f"{name}, which another rank wrote, is not here as it was written; all nodes must share run.dir"
            )


def _complete(temporary: Path, final: Path, saved: SavedRun) -> None:
    (temporary / STATE).write_bytes(saved.record())
    sync(temporary / STATE)
    for path in [*(path for path in temporary.rglob("*") if path.is_dir()), temporary]:
        sync(path)
    former = final.with_name(f".former-{final.name}")
    if final.exists():
        os.replace(final, former)
    os.replace(temporary, final)
    sync(final.parent)
    shutil.rmtree(former, ignore_errors=True)


def _reason(error: CelError | RunError | OSError | RuntimeError) -> str:
    return " ".join(str(error).split())[:200]
