"""Checkpoints as they lie on disk: complete or absent.

    checkpoints/
      step-00001000/
        config.yaml    the run's configuration
        engine/        DeepSpeed's files: encoder, loss parameters, optimizer
        random/        states of the random generators, a file a rank
        model/         the encoder as a model folder that `cel_dist.load_model` reads
        state.json     position of the run, the world and the versions that wrote it, and size and SHA-256 of every
                       other file; written last
      retired-step-00002000/
                       a checkpoint behind one that the run went back to, or a damaged one; no run continues from it by
                       itself

`checkpoint_store` writes them.
"""

import hashlib
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from cel_dist.config import Config
from cel_dist.config_file import load_config
from cel_dist.data.files import sha256_of
from cel_dist.errors import CelError, RunError

STATE = "state.json"
CONFIG = "config.yaml"
MODEL = "model"
RANDOM = "random"
_ANOTHER = "continue from another checkpoint with --resume"


@dataclass
class TrainState:
    """Position of a run.

    Attributes:
        step: batches taken, skipped ones included.
        best_eer: lowest validation EER so far, a fraction.
        best_step: step at which it was reached.
        first_eer: validation EER of the untrained encoder.
        evaluated_step: step of the last evaluation.
        skipped: batches whose loss or gradient was not finite, so that nothing was updated.
        skipped_in_a_row: those since the last update.
    """

    step: int = 0
    best_eer: float | None = None
    best_step: int | None = None
    first_eer: float | None = None
    evaluated_step: int | None = None
    skipped: int = 0
    skipped_in_a_row: int = 0


@dataclass(frozen=True)
class SavedRun:
    """What a checkpoint says of the run that wrote it.

    Attributes:
        state: position.
        stream: state of the stream of batches.
        interval: what was gathered since the last record (`records.Interval`).
        signature: what a run that goes on must agree in besides the configuration.
        num_ranks: ranks that wrote it.
        begun_from: the checkpoint that the run was told to go on from; None if it found its own.
        versions: of the packages that wrote it.
        files: path in the folder to bytes and SHA-256.
        config: configuration.
    """

    state: TrainState
    stream: dict[str, int]
    interval: dict[str, Any]
    signature: dict[str, Any]
    num_ranks: int
    begun_from: str | None
    versions: dict[str, str]
    config: Config
    files: dict[str, tuple[int, str]] = field(default_factory=dict)

    def record(self) -> bytes:
        """The content of `state.json`."""
        record = {
            "state": asdict(self.state),
            "stream": self.stream,
            "interval": self.interval,
            "signature": self.signature,
            "num_ranks": self.num_ranks,
            "begun_from": self.begun_from,
            "versions": self.versions,
            "files": self.files,
        }
        return json.dumps({**record, "sha256": _digest(record)}, indent=2).encode()


def folder_name(step: int) -> str:
    """Name of the checkpoint of a step."""
    return f"step-{step:08d}"


def complete_checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints of the folder `checkpoints` of a run, oldest first."""
    return sorted(path.parent for path in folder.glob(f"step-*/{STATE}"))


def read_checkpoint(checkpoint: Path) -> SavedRun:
    """What a checkpoint says of its run; the files that it lists are not read.

    Raises:
        CelError: it is no complete checkpoint, or what it says is damaged.
        RunError: it cannot be read at the moment, which says nothing about it.
    """
    try:
        record = json.loads((checkpoint / STATE).read_bytes())
        digest = record.pop("sha256", None) if isinstance(record, dict) else None
    except (FileNotFoundError, NotADirectoryError):
        inside = complete_checkpoints(checkpoint) or complete_checkpoints(checkpoint / "checkpoints")
        hint = f"; the newest one in it is {inside[-1]}" if inside else ""
        raise CelError(f"{checkpoint} is no complete checkpoint: it has no {STATE}{hint}") from None
    except ValueError:
        raise CelError(f"{checkpoint / STATE} is damaged: it cannot be read as JSON; {_ANOTHER}") from None
    except OSError as error:
        raise _unreadable(checkpoint / STATE, error) from error
    try:
        if digest != _digest(record):
            raise ValueError("other content than was written")
        state = TrainState(**record["state"])
        parts = {
            name: record[name] for name in ("stream", "interval", "signature", "num_ranks", "begun_from", "versions")
        }
        files = {str(name): (int(size), str(digest)) for name, (size, digest) in record["files"].items()}
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CelError(f"{checkpoint / STATE} is damaged ({type(error).__name__}: {error}); {_ANOTHER}") from None
    return SavedRun(state, config=load_config(checkpoint / CONFIG), files=files, **parts)


def require_whole(checkpoint: Path, saved: SavedRun, *, contents: bool) -> None:
    """Compare the files of a checkpoint with what it says of them.

    Args:
        checkpoint: its folder.
        saved: what `read_checkpoint` returned.
        contents: read and compare all bytes, too, which takes about a second a GB; else sizes alone.

    Raises:
        CelError: a file is missing or another; the first one is named.
        RunError: a file cannot be read at the moment, which says nothing about it.
    """
    for name, (size, digest) in saved.files.items():
        path = checkpoint / name
        try:
            found = path.stat().st_size
            is_same = found == size and (not contents or sha256_of(path) == digest)
        except (FileNotFoundError, NotADirectoryError):
            raise CelError(f"checkpoint {checkpoint} is damaged: {name} is missing") from None
        except OSError as error:
            # A network file system that stumbles must not cost a good checkpoint.
            raise _unreadable(path, error) from error
        if not is_same:
            what = f"has {found} bytes instead of {size}" if found != size else "has other bytes than were written"
            raise CelError(f"checkpoint {checkpoint} is damaged: {name} {what}")


def _unreadable(path: Path, error: OSError) -> RunError:
    reason = (error.strerror or str(error)).lower()
    return RunError(f"cannot read {path}: {reason}; put that right and run the same command again")


def _digest(record: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()
