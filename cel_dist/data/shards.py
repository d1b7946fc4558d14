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
import os
import tarfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field, NonNegativeFloat, NonNegativeInt

from cel_dist.data.archive import ShardFaultError, entries
from cel_dist.data.audio import SAMPLE_RATE, AudioFormat
from cel_dist.data.files import atomic_write, sha256_of
from cel_dist.data.manifests import FolderManifest
from cel_dist.errors import CelError

MANIFEST_NAME = "manifest.json"
INDEX_NAME = "index.npz"


class ShardRecord(BaseModel):
    """What the manifest says of one shard."""

    model_config = ConfigDict(frozen=True)

    name: Annotated[str, Field(pattern=r"^[^/]+\.tar$")]
    samples: NonNegativeInt
    bytes: NonNegativeInt
    seconds: NonNegativeFloat
    sha256: str


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
    shards: tuple[ShardRecord, ...]


@dataclass(frozen=True)
class ShardRows:
    """One shard's rows of the index: `offset`, `size` (bytes of the audio member) and `samples`, int64 `[n]` each, and
    `[n]` speakers, None where unknown."""

    offset: npt.NDArray[np.int64]
    size: npt.NDArray[np.int64]
    samples: npt.NDArray[np.int64]
    speakers: tuple[str | None, ...]


@dataclass(frozen=True)
class Index:
    """Where the audio of each of the N samples lies, in shard order, and who speaks.

    Attributes:
        shard: int32 `[N]`, position of the shard in `Manifest.shards`.
        offset: int64 `[N]`, first byte of the audio member in its tar.
        size: int64 `[N]`, bytes of the audio member (a complete WAV or FLAC file).
        samples: int64 `[N]`, length of the audio in samples.
        speaker: int32 `[N]`, position in `speaker_names`, -1 where the speaker is unknown. For what is measured, never
            for what self-supervised training draws.
        speaker_names: text `[S]`, sorted.
    """

    shard: npt.NDArray[np.int32]
    offset: npt.NDArray[np.int64]
    size: npt.NDArray[np.int64]
    samples: npt.NDArray[np.int64]
    speaker: npt.NDArray[np.int32]
    speaker_names: npt.NDArray[np.str_]

    def __len__(self) -> int:
        return len(self.shard)

    @classmethod
    def from_shards(cls, rows: Sequence[ShardRows]) -> "Index":
        """Join the rows of the manifest's shards, given in its order."""
        empty = [np.zeros(0, np.int64)]
        spoken = [speaker for part in rows for speaker in part.speakers]
        names = sorted({speaker for speaker in spoken if speaker is not None})
        codes: dict[str | None, int] = {name: code for code, name in enumerate(names)}
        return cls(
            np.repeat(np.arange(len(rows), dtype=np.int32), [len(part.offset) for part in rows]),
            np.concatenate([part.offset for part in rows] or empty),
            np.concatenate([part.size for part in rows] or empty),
            np.concatenate([part.samples for part in rows] or empty),
            np.array([codes.get(speaker, -1) for speaker in spoken], np.int32),
            np.array(names, np.str_),
        )

    def rows(self, part: slice) -> ShardRows:
        """The rows at some places, all of one shard."""
        names = self.speaker_names.tolist()
        speakers = tuple(None if code < 0 else names[code] for code in self.speaker[part].tolist())
        return ShardRows(self.offset[part], self.size[part], self.samples[part], speakers)

    @classmethod
    def load(cls, folder: Path) -> "Index":
        """Read the index of `folder`. One without speakers, as of audio without labels, has them all unknown.

        Raises:
            CelError: it is missing, damaged or not an index.
        """
        path = folder / INDEX_NAME
        try:
            with np.load(path, allow_pickle=False) as arrays:
                places = {name: arrays[name] for name in _PLACES}
                speaker, names = (arrays.get(name) for name in _SPEAKERS)
            dtypes = tuple(array.dtype for array in places.values())
            shapes = {array.shape for array in places.values()}
            num_samples = len(places["shard"])
            if dtypes != (np.int32, np.int64, np.int64, np.int64) or shapes != {(num_samples,)}:
                raise ValueError("its arrays have other types or lengths")
            if speaker is None or names is None:
                speaker, names = np.full(num_samples, -1, np.int32), np.zeros(0, np.str_)
            elif not _are_speakers(speaker, names, num_samples):
                raise ValueError("its speakers are not codes of sorted names")
        except Exception as error:
            # numpy and zipfile raise half a dozen types for a damaged file; all of them mean the same here.
            raise CelError(f"cannot read the index {path} ({error}); delete it and run 'cel prepare' again") from None
        return cls(**places, speaker=speaker, speaker_names=names)

    def save(self, folder: Path) -> None:
        """Write the index into `folder`, atomically; the speakers only if there are any."""
        kept = _PLACES + _SPEAKERS if len(self.speaker_names) else _PLACES
        with atomic_write(folder / INDEX_NAME) as file:
            np.savez(file, **{name: getattr(self, name) for name in kept})


_PLACES = ("shard", "offset", "size", "samples")
_SPEAKERS = ("speaker", "speaker_names")


def _are_speakers(speaker: npt.NDArray[np.int32], names: npt.NDArray[np.str_], num_samples: int) -> bool:
    if speaker.dtype != np.int32 or speaker.shape != (num_samples,) or names.dtype.kind != "U" or names.ndim != 1:
        return False
    codes_fit = num_samples == 0 or (speaker.min() >= -1 and speaker.max() < len(names))
    return bool(codes_fit and (names[:-1] < names[1:]).all())


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
        with open(path, "rb") as file:
            found = list(entries(file.fileno()))
    except OSError as error:
        raise CelError(f"cannot read shard {path}: {error.strerror}; run 'cel prepare' again") from None
    except ShardFaultError as fault:
        raise CelError(f"shard {path}: {fault}; delete it and run 'cel prepare' again") from None
    table = np.array([(entry.audio.offset, entry.audio.size, entry.samples) for entry in found], np.int64).reshape(
        -1, 3
    )
    offset, size, samples = (np.ascontiguousarray(column) for column in table.T)
    return ShardRows(offset, size, samples, tuple(entry.speaker for entry in found))


@dataclass(frozen=True)
class ShardFolder:
    """A finished folder of shards whose files, manifest and index agree in number and size."""

    folder: Path
    manifest: Manifest
    index: Index

    @classmethod
    def open(cls, folder: str | Path) -> "ShardFolder":
        """Open a folder written by `cel prepare` after a check that reads no audio: one `stat` a shard.

        Raises:
            CelError: the manifest or the index is missing or foreign, they contradict each other, or a shard is missing
                or has another size. The message names the shard, both numbers and the remedy.
        """
        folder = Path(folder)
        if not folder.is_dir():
            raise CelError(f"there is no folder of shards at {folder}; write one with 'cel prepare SRC --out {folder}'")
        manifest = Manifest.load(folder)
        opened = cls(folder, manifest, Index.load(folder))
        for problem in opened.disagreements():
            raise CelError(f"{problem}; run 'cel check {folder}' for every fault, or 'cel prepare' again")
        return opened

    def shard_path(self, shard: int) -> Path:
        """Path of the shard that `Index.shard` calls `shard`."""
        return self.folder / self.manifest.shards[shard].name

    def disagreements(self) -> Iterator[str]:
        """What manifest, index and sizes on disk contradict each other in, one line each."""
        yield from self.index_disagreements()
        for number, record in enumerate(self.manifest.shards):
            try:
                size = os.stat(self.shard_path(number)).st_size
            except OSError as error:
                yield f"shard {record.name} in {self.folder}: {str(error.strerror).lower()}"
                continue
            if size != record.bytes:
                yield f"shard {record.name} in {self.folder} has {size} bytes, the manifest says {record.bytes}"

    def index_disagreements(self) -> Iterator[str]:
        """What manifest and index contradict each other or themselves in, one line each; looks at no shard."""
        manifest, index = self.manifest, self.index
        if manifest.sample_rate != SAMPLE_RATE:
            yield f"the manifest of {self.folder} says {manifest.sample_rate} Hz, this version reads {SAMPLE_RATE} Hz"
        stated = sum(record.samples for record in manifest.shards)
        if stated != manifest.samples:
            yield f"the manifest of {self.folder} says {manifest.samples} samples, its shards add up to {stated}"
        if len(index) != manifest.samples:
            yield f"the index of {self.folder} holds {len(index)} samples, the manifest says {manifest.samples}"
            return
        last = len(manifest.shards) - 1
        if len(index) and (index.shard.min() < 0 or index.shard.max() > last or (np.diff(index.shard) < 0).any()):
            yield f"the index of {self.folder} is not in the order of the manifest's {last + 1} shards"
            return
        counts = np.bincount(index.shard, minlength=last + 1)
        ends = np.zeros(last + 1, np.int64)
        np.maximum.at(ends, index.shard, index.offset + index.size)
        for number, record in enumerate(manifest.shards):
            if counts[number] != record.samples:
                yield f"shard {record.name}: {counts[number]} samples in the index, {record.samples} in the manifest"
            if ends[number] > record.bytes:
                yield f"shard {record.name}: the index reaches byte {ends[number]}, the manifest says {record.bytes}"
