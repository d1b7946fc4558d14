"""`export_model`: a model as files for others, checked before they are there."""

import copy
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias

import torch

from cel_dist.data.files import require_folder_or_nothing
from cel_dist.description import DESCRIPTION_FILE
from cel_dist.errors import CelError
from cel_dist.export.files import metadata, require_onnx, run_folder, run_onnx, run_program, write_onnx, write_program
from cel_dist.export.network import not_exportable, traced
from cel_dist.export.parity import Parity
from cel_dist.model import SpeakerModel
from cel_dist.model_folder import BACK_END_FILE, WEIGHTS_FILE, replacing, write_model_files

Format: TypeAlias = Literal["safetensors", "onnx", "torch"]

FORMATS: dict[Format, str] = {"safetensors": WEIGHTS_FILE, "torch": "model.pt2", "onnx": "model.onnx"}
"""The formats and the file of each, in the order in which they are written."""


@dataclass(frozen=True)
class Exported:
    """What was written.

    Attributes:
        folder: that holds the files, `model.json` and, if the model has a back end, `back_end.safetensors`.
        files: the file of each format.
        differences: for each format, the largest difference of any value of an embedding to the model's; see `parity`.
    """

    folder: Path
    files: dict[Format, Path]
    differences: dict[Format, float]


def export_model(
    model: SpeakerModel,
    out: Path,
    formats: Iterable[Format] = ("safetensors", "onnx"),
    *,
    progress: Callable[[int, int], None] | None = None,
) -> Exported:
    """Write a model in one or several formats, each compared with the model on ten lengths before the folder is there.

    ONNX and torch files take waveforms float32 [B, T] at 16 kHz with full scale 1.0, any B >= 1 and T >= 1600, and
    return unit embeddings float32 [B, D]. With `safetensors` the folder is a MODEL of this package. All of it appears
    in one step, or nothing does.

    Args:
        model: is left as it is, on whatever device.
        out: folder, new or of an earlier export in the same formats, which is replaced.
        formats: some of `FORMATS`.
        progress: told the number of formats done and of all.

    Raises:
        CelError: no format, or an unknown one; `out` holds what this export would not write again; the encoder cannot
            be traced or has an operation that ONNX lacks; packages for ONNX are missing.
        RunError: a file gives other embeddings than the model, or cannot be written.
    """
    chosen = _chosen(formats)
    _refuse_loss(out, chosen)
    if "onnx" in chosen:
        require_onnx()
    if model.device.type != "cpu":
        model = SpeakerModel(copy.deepcopy(model.encoder).cpu(), model.description, model.back_end)
    program = traced(model) if set(chosen) - {"safetensors"} else None
    parity = Parity(model)
    properties = metadata(model.description)
    differences: dict[Format, float] = {}
    with replacing(out, "the exported model") as folder:
        write_model_files(
            folder, model.tensors() if "safetensors" in chosen else None, model.description, model.back_end
        )
        for number, name in enumerate(chosen, start=1):
            file = folder / FORMATS[name]
            if name == "safetensors":
                differences[name] = parity.require(run_folder(folder), "model folder")
            elif name == "torch":
                assert program is not None
                write_program(program, file, properties)
                differences[name] = parity.require(run_program(file), "torch program")
            else:
                assert program is not None
                try:
                    write_onnx(program, file, properties)
                except torch.onnx.OnnxExporterError as error:
                    raise not_exportable(model, "ONNX", error) from error
                differences[name] = parity.require(run_onnx(file), "ONNX file")
            if progress:
                progress(number, len(chosen))
    return Exported(out, {name: out / FORMATS[name] for name in chosen}, differences)


def _chosen(formats: Iterable[str]) -> list[Format]:
    given = list(formats)
    unknown = [name for name in given if name not in FORMATS]
    if unknown or not given:
        problem = f"unknown format '{unknown[0]}'" if unknown else "no format to export"
        raise CelError(f"{problem}; choose from {', '.join(FORMATS)}")
    return [name for name in FORMATS if name in given]


def _refuse_loss(out: Path, chosen: Iterable[Format]) -> None:
    """Raise CelError if replacing `out` would remove a file that is not written again."""
    require_folder_or_nothing(out)
    if not out.exists():
        return
    written = {DESCRIPTION_FILE, BACK_END_FILE, *(FORMATS[name] for name in chosen)}
    others = sorted(entry.name for entry in out.iterdir() if entry.name not in written)
    if others:
        raise CelError(
            f"{out} holds files that this export does not write (first {others[0]}) and would replace; give a new "
            "folder, or the same formats as before"
        )
