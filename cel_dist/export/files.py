"""The files that run without this package, and how each format is run to see that it does what the model does."""

import importlib.util
import io
import json
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray

from cel_dist import __version__
from cel_dist.description import ModelDescription
from cel_dist.errors import CelError
from cel_dist.features import SAMPLE_RATE
from cel_dist.model import SpeakerModel
from cel_dist.utterance import MAX_WHOLE_SECONDS, MIN_SAMPLES

Embeddings: TypeAlias = NDArray[np.float32]
Run: TypeAlias = Callable[[Embeddings], Embeddings]
"""Waveforms float32 [B, T] at 16 kHz with full scale 1.0 to unit embeddings float32 [B, D]."""

INPUT, OUTPUT = "wave", "embedding"
METADATA_FILE = "metadata.json"
"""Of a `torch.export` program, one of its extra files."""

_ONNX_PACKAGES = ("onnx", "onnxscript", "onnxruntime")


def metadata(description: ModelDescription) -> dict[str, str]:
    """What a file says of itself; all values are strings, as ONNX has them."""
    return {
        "embedding_dim": str(description.encoder.embedding_dim),
        "sample_rate_hz": str(SAMPLE_RATE),
        "full_scale": "1.0",
        "min_samples": str(MIN_SAMPLES),
        "max_whole_samples": str(round(MAX_WHOLE_SECONDS * SAMPLE_RATE)),
        "encoder": description.encoder.name,
        "num_mels": str(description.features.num_mels),
        "cel_dist_version": __version__,
    }


def require_onnx() -> None:
    """Raise CelError if a package that writes or runs ONNX is missing."""
    missing = [name for name in _ONNX_PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise CelError(
            f"--format onnx needs the package {missing[0]}, which is not installed; run pip install 'cel_dist[onnx]', "
            "or choose other formats"
        )


def write_onnx(program: torch.export.ExportedProgram, path: Path, properties: Mapping[str, str]) -> None:
    """Write a program as an ONNX graph from `wave` [batch, samples] to `embedding` [batch, D].

    Args:
        program: from `traced`.
        path: of the file.
        properties: go into `metadata_props`.

    Raises:
        torch.onnx.OnnxExporterError: an operation of the program has no counterpart in ONNX.
    """
    with _without_hints():
        written = torch.onnx.export(
            program,
            dynamic_shapes={INPUT: {0: "batch", 1: "samples"}},
            input_names=[INPUT],
            output_names=[OUTPUT],
            verbose=False,
        )
    assert written is not None
    proto = written.model_proto
    for key, value in properties.items():
        proto.metadata_props.add(key=key, value=value)
    path.write_bytes(proto.SerializeToString())


def run_onnx(path: Path) -> Run:
    """How an ONNX file computes embeddings in ONNX Runtime, on the CPU."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    sessions: list[onnxruntime.InferenceSession] = []

    def run(waves: Embeddings) -> Embeddings:
        # When it is first needed, so that a file that does not load fails like one that does not run.
        session = (
            sessions[0] if sessions else onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        )
        (embeddings,) = session.run([OUTPUT], {INPUT: waves})
        rows: Embeddings = embeddings
        return rows

    return run


def write_program(program: torch.export.ExportedProgram, path: Path, properties: Mapping[str, str]) -> None:
    """Write a program as `torch.export.load` reads it, with `properties` as the extra file `METADATA_FILE`."""
    # By way of memory: torch reports a full disk in words of its own.
    archive = io.BytesIO()
    torch.export.save(program, archive, extra_files={METADATA_FILE: json.dumps(dict(properties))})
    path.write_bytes(archive.getvalue())


def run_program(path: Path) -> Run:
    """How a program computes embeddings, read from its file."""
    module = torch.export.load(path).module()

    def run(waves: Embeddings) -> Embeddings:
        with torch.inference_mode():
            rows: Embeddings = module(torch.from_numpy(waves)).numpy()
        return rows

    return run


def run_folder(folder: Path) -> Run:
    """How a model folder computes embeddings, read again."""
    model = SpeakerModel.load_folder(folder, "cpu")
    return lambda waves: model.embed(list(waves))


@contextmanager
def _without_hints() -> Iterator[None]:
    """Keep the exporter from naming packages that it could use, and what torch will change in itself."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
