"""Shards on disk: WebDataset tars, the manifest that says what they must hold, and the index for random access.

    OUT/train-000000.tar    000000000.json, 000000000.wav, 000000001.json, ...
    OUT/train-000001.tar
    OUT/index.npz           where the audio of each sample lies: shard, offset, size, samples; and who speaks
    OUT/manifest.json       totals, and bytes and sha256 of every shard; written last

The tars are plain ustar archives in the layout of webdataset, which reads them. It does not write them: importing
webdataset imports torch, in every worker process of a preparation.

The manifest is the authority. A cut tar reads as a short one without any error, so nothing here trusts a tar to say
how much it holds.
"""

import json
import re
from collections import deque
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, NonNegativeFloat, NonNegativeInt

from cel_dist.data.archive import Entry, ShardFaultError, TarWriter, entries, opened_tar
from cel_dist.data.audio import SAMPLE_RATE, AudioFormat
from cel_dist.data.files import atomic_write
from cel_dist.data.index import ShardRows
from cel_dist.data.manifests import FolderManifest
from cel_dist.errors import CelError

MANIFEST_NAME = "manifest.json"
_UTTERANCES_AHEAD = 8
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

    The bytes depend on nothing but the utterances: times and owners are fixed. A thread writes, digests and lets the
    disk begin, while the caller's one makes the next utterance.

    Args:
        path: the tar to write.
        utterances: consumed one at a time, so memory holds a few utterances, not a shard.
        audio_format: suffix of the audio members.
    """
    written: list[Entry] = []
    with atomic_write(path) as file:
        tar = TarWriter(file)
        with ThreadPoolExecutor(1, "shard") as pool:
            waiting: deque[Future[Entry]] = deque()
            try:
                for utterance in utterances:
                    waiting.append(pool.submit(_add, tar, utterance, audio_format))
                    if len(waiting) > _UTTERANCES_AHEAD:
                        written.append(waiting.popleft().result())
                written += [entry.result() for entry in waiting]
            finally:
                pool.shutdown(cancel_futures=True)
        digest = tar.end()
        rows = index_rows(written)
        record = ShardRecord(
            name=path.name,
            samples=len(rows.samples),
            bytes=file.tell(),
            seconds=int(rows.samples.sum()) / SAMPLE_RATE,
            sha256=digest,
        )
    return record, rows


def _add(tar: TarWriter, utterance: Utterance, audio_format: AudioFormat) -> Entry:
    description: dict[str, object] = {"path": utterance.path, "seconds": utterance.samples / SAMPLE_RATE}
    if utterance.speaker is not None:
        description["speaker"] = utterance.speaker
    tar.add(f"{utterance.key}.json", json.dumps(description).encode())
    audio = tar.add(f"{utterance.key}.{audio_format}", utterance.audio)
    return Entry(utterance.key, audio_format, audio, utterance.samples, utterance.speaker)


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
