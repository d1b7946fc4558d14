"""The index of a folder of shards: where the audio of each sample lies, so that any of them can be read at once.

It is memory-mapped: all processes of a node share one copy, and a process that needs a part of it reads that part.
"""

import struct
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from cel_dist.data.files import atomic_write
from cel_dist.errors import CelError

INDEX_NAME = "index.npz"
_PLACES = ("shard", "offset", "size", "samples")
_SPEAKERS = ("speaker", "speaker_names")


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
        folder: where it was loaded from; other processes load it there again. None if it is in memory only.
    """

    shard: npt.NDArray[np.int32]
    offset: npt.NDArray[np.int64]
    size: npt.NDArray[np.int64]
    samples: npt.NDArray[np.int64]
    speaker: npt.NDArray[np.int32]
    speaker_names: npt.NDArray[np.str_]
    folder: Path | None = None

    def __len__(self) -> int:
        return len(self.shard)

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        # Pickling a memory map would copy all of it into the pickle.
        if self.folder is not None:
            # Verified once is enough: every reader process comes by here.
            return Index.load, (self.folder, False)
        return Index, tuple(getattr(self, name) for name in _PLACES + _SPEAKERS)

    @cached_property
    def shard_starts(self) -> npt.NDArray[np.int64]:
        """int64 `[shards + 1]`, the place of each shard's first sample, and N."""
        num_shards = int(self.shard[-1]) + 1 if len(self) else 0
        return np.searchsorted(self.shard, np.arange(num_shards + 1)).astype(np.int64)

    def shard_ends(self, num_shards: int) -> npt.NDArray[np.int64]:
        """int64 `[num_shards]`, the first byte behind the last audio of each shard; 0 for one without samples."""
        ends = np.zeros(num_shards, np.int64)
        np.maximum.at(ends, self.shard, self.offset + self.size)
        return ends

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
    def load(cls, folder: Path, verify: bool = True) -> "Index":
        """Map the index of `folder`. One without speakers, as of audio without labels, has them all unknown.

        Raises:
            CelError: it is missing, damaged or not an index.
        """
        path = folder / INDEX_NAME
        try:
            arrays = _mapped(path, verify)
            places = {name: arrays[name] for name in _PLACES}
            speaker, names = (arrays.get(name) for name in _SPEAKERS)
            dtypes = tuple(array.dtype for array in places.values())
            shapes = {array.shape for array in places.values()}
            num_samples = len(places["shard"])
            if dtypes != tuple(map(np.dtype, ("i4", "i8", "i8", "i8"))) or shapes != {(num_samples,)}:
                raise ValueError("its arrays have other types or lengths")
            if speaker is None or names is None:
                speaker, names = np.broadcast_to(np.int32(-1), num_samples), np.zeros(0, np.str_)
            elif not _are_speakers(speaker, names, num_samples):
                raise ValueError("its speakers are not codes of sorted names")
        except Exception as error:
            # numpy and zipfile raise half a dozen types for a damaged file; all of them mean the same here.
            raise CelError(f"cannot read the index {path} ({error}); delete it and run 'cel prepare' again") from None
        return cls(**places, speaker=speaker, speaker_names=names, folder=folder)

    def save(self, folder: Path) -> None:
        """Write the index into `folder`, atomically; the speakers only if there are any."""
        kept = _PLACES + _SPEAKERS if len(self.speaker_names) else _PLACES
        with atomic_write(folder / INDEX_NAME) as file:
            np.savez(file, **{name: getattr(self, name) for name in kept})


def _mapped(path: Path, verify: bool) -> dict[str, npt.NDArray[Any]]:
    """The arrays of an uncompressed `.npz`, mapped read-only; `verify` compares the checksums in it."""
    arrays: dict[str, npt.NDArray[Any]] = {}
    with zipfile.ZipFile(path) as archive:
        damaged = archive.testzip() if verify else None
        if damaged is not None:
            raise ValueError(f"the checksum of its {damaged} is wrong")
        members = archive.infolist()
    with open(path, "rb") as file:
        for member in members:
            if member.compress_type != zipfile.ZIP_STORED:
                raise ValueError("it is compressed")
            # The local header has 30 bytes, the last four the lengths of what follows before the data.
            file.seek(member.header_offset + 26)
            file.seek(sum(struct.unpack("<HH", file.read(4))), 1)
            major, _ = np.lib.format.read_magic(file)
            read_header = np.lib.format.read_array_header_1_0 if major == 1 else np.lib.format.read_array_header_2_0
            shape, _, dtype = read_header(file)
            name = member.filename.removesuffix(".npy")
            empty = 0 in shape or dtype.itemsize == 0
            # A plain view: slices of np.memmap itself cost ten times those of an array.
            arrays[name] = (
                np.zeros(shape, dtype) if empty else np.memmap(path, dtype, "r", file.tell(), shape).view(np.ndarray)
            )
    return arrays


def _are_speakers(speaker: npt.NDArray[np.int32], names: npt.NDArray[np.str_], num_samples: int) -> bool:
    if speaker.dtype != np.int32 or speaker.shape != (num_samples,) or names.dtype.kind != "U" or names.ndim != 1:
        return False
    codes_fit = num_samples == 0 or (speaker.min() >= -1 and speaker.max() < len(names))
    return bool(codes_fit and (names[:-1] < names[1:]).all())
