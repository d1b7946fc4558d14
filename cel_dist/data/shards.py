"""Shards on disk: WebDataset tars, the manifest that says what they must hold, and the index for random access.

    OUT/train-000000.tar    000000000.json, 000000000.wav, 000000001.json, ...
    OUT/train-000001.tar
    OUT/index.npz           where the audio of each sample lies: shard, offset, size, samples; and who speaks
    OUT/manifest.json       totals, and bytes and sha256 of every shard; written last

The tars are plain ustar archives in the layout of webdataset, which reads them; they are written with the standard
library, because importing webdataset imports torch, in every worker process of a preparation.

The manifest is the authority. A cut tar reads as a short one without any error, so nothing here trusts a tar to say
how much it holds.
"""

import io
import json
import re
import tarfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, NonNegativeFloat, NonNegativeInt

from cel_dist.data.archive import Entry, ShardFaultError, entries, opened_tar
from cel_dist.data.audio import SAMPLE_RATE, AudioFormat
from cel_dist.data.files import atomic_write, sha256_of
from cel_dist.data.index import ShardRows
from cel_dist.data.manifests import FolderManifest
from cel_dist.errors import CelError

MANIFEST_NAME = "manifest.json"
_SHARD_NAME = re.compile(r"^[^/.][^/]*\.tar(\.gz|\.bz2|\.xz)?$")


class ShardRecord(BaseModel):
    """What the manifest says of one shard."""

    model_config = ConfigDict(frozen=True)

    name: Annotated[str, Field(pattern=_SHARD_NAME)]
    samples: NonNegativeInt
    bytes: NonNegativeInt
    seconds: NonNegativeFloat
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]

    @property
    def is_compressed(self) -> bool:
        """Whether the tar must be unpacked before a member of it can be read."""
        return not self.name.endswith(".tar")


class Manifest(FolderManifest):
    """`manifest.json`: what a folder of shards holds."""

    file_name = MANIFEST_NAME
    kind = "folder of shards"
    writer = "cel prepare SRC"

    format: Literal["cel_dist.shards"] = "cel_dist.shards"
    version: Literal[1] = 1
    seed: int
    sample_rate: int
    audio_format: AudioFormat
    samples: NonNegativeInt
    seconds: NonNegativeFloat
    rejected: NonNegativeInt
    index_sha256: str | None = None
    """Of the index beside it; older folders do not state it."""
    shards: tuple[ShardRecord, ...]


def shard_paths(folder: Path) -> list[Path]:
    """Every tar in a folder, compressed ones too, sorted."""
    return sorted(path for path in folder.iterdir() if _SHARD_NAME.match(path.name))


class Utterance(NamedTuple):
    """One sample on its way into a shard."""

    key: str
    """Unique over all shards, without dots: WebDataset splits a member's name at the first one."""
    audio: bytes
    """A complete WAV or FLAC file, 16 kHz mono 16-bit."""
    samples: int
    path: str
    """Where it came from, relative to the source folder."""
    speaker: str | None = None


def write_shard(
    path: Path, utterances: Iterable[Utterance], audio_format: AudioFormat
) -> tuple[ShardRecord, ShardRows]:
    """Write one shard, which appears under its name only when it is complete and on disk.

    The bytes depend on nothing but the utterances: times and owners are fixed.

    Args:
        path: the tar to write.
        utterances: consumed one at a time, so memory holds one utterance, not a shard.
        audio_format: suffix of the audio members.
    """
    with atomic_write(path) as file:
        with tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as tar:
            for utterance in utterances:
                description: dict[str, object] = {"path": utterance.path, "seconds": utterance.samples / SAMPLE_RATE}
                if utterance.speaker is not None:
                    description["speaker"] = utterance.speaker
                _add(tar, f"{utterance.key}.json", json.dumps(description).encode())
                _add(tar, f"{utterance.key}.{audio_format}", utterance.audio)
        file.flush()
        # Reading the file back, still in memory, keeps the one definition of an offset in `archive.members`.
        rows = scan_shard(Path(file.name))
        record = ShardRecord(
            name=path.name,
            samples=len(rows.samples),
            bytes=file.tell(),
            seconds=int(rows.samples.sum()) / SAMPLE_RATE,
            sha256=sha256_of(Path(file.name)),
        )
    return record, rows


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    # What a fresh TarInfo leaves at its default, times and owners, is the same for everybody.
    member = tarfile.TarInfo(name)
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))


def scan_shard(path: Path) -> ShardRows:
    """The index rows of a shard, from its headers and JSON members; no audio is read.

    Raises:
        CelError: the shard cannot be opened, is cut at any place, is damaged, or does not hold pairs of members.
    """
    try:
        with opened_tar(path) as descriptor:
            found = list(entries(descriptor))
    except OSError as error:
        raise CelError(f"cannot read shard {path}: {error.strerror}; run 'cel prepare' again") from None
    except ShardFaultError as fault:
        raise CelError(f"shard {path}: {fault}; delete it and run 'cel prepare' again") from None
    return index_rows(found)


def index_rows(found: Sequence[Entry]) -> ShardRows:
    """The index rows of a shard's samples."""
    table = np.array([(entry.audio.offset, entry.audio.size, entry.samples) for entry in found], np.int64)
    offset, size, samples = (np.ascontiguousarray(column) for column in table.reshape(-1, 3).T)
    return ShardRows(offset, size, samples, tuple(entry.speaker for entry in found))
