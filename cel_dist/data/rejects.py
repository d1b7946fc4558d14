"""Files that a preparation could not use, and the table that names them."""

from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from cel_dist.data.audio import AudioError, Reason, read_audio, require_usable
from cel_dist.data.files import atomic_write

REJECTS_NAME = "rejects.tsv"


class Reject(NamedTuple):
    """One file left out: its path relative to the source, one of the reasons of `AudioError`, and more in one line."""

    path: str
    reason: Reason
    detail: str


def read_usable(source: Path, path: str, min_samples: int) -> npt.NDArray[np.int16] | Reject:
    """The audio of `source / path` as int16 `[T]` at 16 kHz, or why it cannot be used."""
    try:
        samples = read_audio(source / path)
        require_usable(samples, min_samples)
    except AudioError as error:
        return Reject(path, error.reason, error.detail)
    return samples


def write_rejects(folder: Path, rejects: Iterable[Reject]) -> Path:
    """Write `rejects.tsv`, a line of column names and then a line a file, sorted by path, and return its path."""
    target = folder / REJECTS_NAME
    with atomic_write(target) as file:
        for row in [Reject._fields, *sorted(rejects)]:
            line = "\t".join(field.replace("\t", "\\t").replace("\n", "\\n") for field in row)
            # File names need not be UTF-8; surrogateescape carries the bytes of those that are not.
            file.write(line.encode("utf-8", "surrogateescape") + b"\n")
    return target
