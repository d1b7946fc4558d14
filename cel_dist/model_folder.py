"""The files of a model. A model folder holds two to four files and no pickles:

encoder.safetensors    the encoder's parameters and buffers
model.json             `ModelDescription`: what the tensors are, how to score, where they come from
back_end.safetensors   `mean` [D] and `cohort` [K, D] of the back end, if it has any, float32
model_card.md          what `model.json` says, for people; only in models that come from a registry
"""

import os
import secrets
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from safetensors.torch import save as to_safetensors
from torch import Tensor

from cel_dist.back_end import BackEnd
from cel_dist.description import DESCRIPTION_FILE, BackEndDescription, ModelDescription
from cel_dist.errors import CelError, RunError

WEIGHTS_FILE = "encoder.safetensors"
BACK_END_FILE = "back_end.safetensors"
CARD_FILE = "model_card.md"
MODEL_FILES = (WEIGHTS_FILE, DESCRIPTION_FILE, BACK_END_FILE, CARD_FILE)


def write_model_folder(
    folder: str | os.PathLike[str], tensors: Mapping[str, Tensor], description: ModelDescription, back_end: BackEnd
) -> None:
    """Write a model folder in one step: it is there whole, or not at all. An older model there is replaced.

    Args:
        folder: new, or that of an older model.
        tensors: of the encoder, on the CPU and contiguous.
        description: goes into `model.json`.
        back_end: whose arrays are written, if it has any.

    Raises:
        CelError: the folder holds other files than a model.
        RunError: the folder cannot be written.
    """
    refuse_other_content(Path(folder).resolve())
    with replacing(folder, "the model folder") as fresh:
        write_model_files(fresh, tensors, description, back_end)


def write_model_files(
    folder: Path, tensors: Mapping[str, Tensor] | None, description: ModelDescription, back_end: BackEnd
) -> None:
    """Write the files of a model into a folder that is there; arguments as for `write_model_folder`.

    Without `tensors` the folder is no model, but describes one that lies beside it in another format.

    Raises:
        OSError: the folder cannot be written.
    """
    # Not `save_file`, whose files only their owner can read: models are shared.
    if tensors is not None:
        (folder / WEIGHTS_FILE).write_bytes(to_safetensors(dict(tensors), metadata={"format": "pt"}))
    if arrays := _arrays(back_end):
        (folder / BACK_END_FILE).write_bytes(to_safetensors(arrays, metadata={"format": "pt"}))
    (folder / DESCRIPTION_FILE).write_text(description.model_dump_json(indent=2) + "\n", encoding="utf-8")


def copy_model_folder(source: Path, folder: str | os.PathLike[str]) -> None:
    """Copy the files of the model in `source`, as they are, in one step. An older model in `folder` is replaced.

    Raises:
        CelError: the folder holds other files than a model.
        RunError: the folder cannot be written.
    """
    refuse_other_content(Path(folder).resolve())
    with replacing(folder, "the model folder") as fresh:
        for name in MODEL_FILES:
            if (source / name).is_file():
                # Without the permissions, which may be those of a cache.
                shutil.copyfile(source / name, fresh / name)


@contextmanager
def replacing(folder: str | os.PathLike[str], what: str) -> Iterator[Path]:
    """An empty folder that becomes `folder` when the block ends, in the place of an older one; nothing of it, and of
    folders made for it, is left if the block raises.

    Args:
        folder: new or old.
        what: it is, for the message.

    Raises:
        RunError: it cannot be written.
    """
    target = Path(folder).resolve()
    unique = f".{target.name}.{os.getpid()}.{secrets.token_hex(4)}"
    fresh, former = target.with_name(unique + ".new"), target.with_name(unique + ".old")
    made = [parent for parent in fresh.parents if not parent.exists()]
    try:
        fresh.mkdir(parents=True)
        yield fresh
        if target.exists():
            target.replace(former)
        fresh.replace(target)
    except BaseException as error:
        shutil.rmtree(fresh, ignore_errors=True)
        if former.exists():
            former.replace(target)
        for parent in made:
            with suppress(OSError):
                parent.rmdir()
        if isinstance(error, OSError):
            raise RunError(f"cannot write {what} {target}: {error.strerror}; check space and permissions") from error
        raise
    shutil.rmtree(former, ignore_errors=True)


def model_folder_of(source: str | os.PathLike[str], tracking_uri: str | None = None) -> Path | None:
    """The model folder of any MODEL, on this machine; None for a file, which must be a published one.

    Args:
        source: as for `load_model`.
        tracking_uri: where MLflow URIs are looked up. Default: as `cel_dist.tracking.resolve_uri`.

    Raises:
        CelError: nothing is there, or it is no model.
    """
    if is_mlflow_uri(source):
        from cel_dist.tracking import fetch_model

        return fetch_model(str(source), tracking_uri)
    path = Path(source)
    if path.is_file():
        return None
    for folder in (path, path / "model"):
        if (folder / DESCRIPTION_FILE).is_file():
            return folder
    if not path.exists():
        problem = f"there is no model at {path}"
    elif checkpoints := sorted(path.glob(f"checkpoints/*/model/{DESCRIPTION_FILE}")):
        problem = f"the run {path} has no best model yet; its newest checkpoint is {checkpoints[-1].parent.parent}"
    else:
        problem = f"{path} holds no {DESCRIPTION_FILE}, neither itself nor in a sub-folder 'model'"
    raise CelError(
        f"{problem}; give a run, checkpoint or model folder, a published .model file, or an MLflow URI such as "
        "models:/cel@champion"
    )


def is_mlflow_uri(source: str | os.PathLike[str]) -> bool:
    """Whether a MODEL is one of MLflow's.

    >>> is_mlflow_uri("models:/cel@champion"), is_mlflow_uri("runs/cel")
    (True, False)
    """
    return str(source).startswith(("models:/", "runs:/"))


def read_weights(folder: Path) -> dict[str, Tensor]:
    """The tensors of the encoder.

    Raises:
        CelError: the file is missing or damaged.
    """
    return _tensors(folder / WEIGHTS_FILE)


def read_back_end(folder: Path, description: ModelDescription) -> BackEnd:
    """The back end that `description`, of the same folder, describes.

    Raises:
        CelError: its file is missing, damaged, or of another model.
    """
    stored = description.back_end
    if stored is None:
        return BackEnd(scoring=description.scoring)
    path = folder / BACK_END_FILE
    arrays = {name: tensor.float().numpy() for name, tensor in _tensors(path).items()}
    needed = {name for name, wanted in (("mean", stored.mean_subtracted), ("cohort", stored.score_norm)) if wanted}
    dimensions = {"mean": 1, "cohort": 2}
    if arrays.keys() != needed or not all(
        rows.ndim == dimensions[name] and rows.shape[-1] == description.encoder.embedding_dim
        for name, rows in arrays.items()
    ):
        raise CelError(f"{path} is not the back end that {DESCRIPTION_FILE} describes; copy the whole folder again")
    if not all(np.isfinite(rows).all() for rows in arrays.values()):
        raise CelError(f"{path} holds values that are not finite; calibrate the model again")
    return BackEnd(description.scoring, arrays.get("mean"), stored.score_norm, arrays.get("cohort"), stored.top_n)


def described(back_end: BackEnd, cohort: str | None) -> BackEndDescription | None:
    """What `model.json` says of a back end made from the list `cohort`; None for embeddings scored as they are."""
    if back_end.mean is None and back_end.score_norm is None:
        return None
    return BackEndDescription(
        mean_subtracted=back_end.mean is not None,
        score_norm=back_end.score_norm,
        top_n=back_end.top_n,
        cohort=cohort,
    )


def _arrays(back_end: BackEnd) -> dict[str, Tensor]:
    arrays = {"mean": back_end.mean, "cohort": back_end.cohort}
    return {name: torch.from_numpy(np.ascontiguousarray(rows)) for name, rows in arrays.items() if rows is not None}


def _tensors(path: Path) -> dict[str, Tensor]:
    try:
        tensors: dict[str, Tensor] = load_file(path)
    except FileNotFoundError:
        raise CelError(f"{path} is missing; {DESCRIPTION_FILE} alone is no model, copy the whole folder") from None
    except (OSError, SafetensorError) as error:
        raise CelError(f"{path} is damaged ({error}); copy or export the model again") from None
    return tensors


def refuse_other_content(folder: Path) -> None:
    """Raise CelError if a model cannot be written to `folder`, because it is a file or holds other files."""
    if not folder.exists():
        return
    if not folder.is_dir():
        raise CelError(f"{folder} is a file; give a new folder for the model")
    others = sorted(entry.name for entry in folder.iterdir() if entry.name not in MODEL_FILES)
    if others:
        raise CelError(f"{folder} holds other files than a model (first {others[0]}); give a new folder for the model")
