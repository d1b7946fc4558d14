"""The tar of a shard: written, and read without trust; whatever tar readers pass over in silence is a fault here."""

import bz2
import gzip
import hashlib
import json
import lzma
import os
import tarfile
import tempfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, NamedTuple

from cel_dist.data.audio import SAMPLE_RATE

_BLOCK = tarfile.BLOCKSIZE
_SYNC_BYTES = 16 << 20
# Headers of POSIX and GNU tar that say more about the member behind them: webdataset's writer makes one a member.
_EXTENSIONS = (tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.GNUTYPE_LONGNAME)
_OPENERS: dict[str, Callable[..., Any]] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}


class ShardFaultError(Exception):
    """A shard that is not a whole tar of samples; the message says what and at which byte, not in which shard."""


class Member(NamedTuple):
    """One member of a tar: its name, the first byte of its data and how many there are."""

    name: str
    offset: int
    size: int


class TarWriter:
    """A plain ustar archive, written and digested in one go, of the bytes that `tarfile` writes.

    `tarfile` copies a member in pieces of 16 KiB, which takes longer than all else that is done to it; a digest would
    read the archive again.

    Args:
        file: open for writing, empty.
    """

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._digest = hashlib.sha256()
        self._offset = 0
        self._synced = 0

    def add(self, name: str, data: bytes) -> Member:
        """Append a member. What a fresh TarInfo leaves at its default, times and owners, is the same for everybody."""
        header = tarfile.TarInfo(name)
        header.size = len(data)
        self._write(header.tobuf(tarfile.USTAR_FORMAT))
        member = Member(name, self._offset, len(data))
        self._write(data)
        self._write(bytes(-len(data) % _BLOCK))
        if self._offset - self._synced >= _SYNC_BYTES:
            # The disk works while more is made, and the end need not wait for all of it.
            self._file.flush()
            os.fsync(self._file.fileno())
            self._synced = self._offset
        return member

    def end(self) -> str:
        """Write the end-of-archive mark; returns SHA-256 of the archive in hexadecimal."""
        self._write(bytes(2 * _BLOCK))
        self._write(bytes(-self._offset % tarfile.RECORDSIZE))
        return self._digest.hexdigest()

    def _write(self, data: bytes) -> None:
        self._file.write(data)
        self._digest.update(data)
        self._offset += len(data)


def members(descriptor: int) -> Iterator[Member]:
    """Walk the members of an uncompressed tar, noticing whatever the tar readers pass over in silence.

    Args:
        descriptor: an open file.

    Raises:
        ShardFaultError: the archive is cut (in a header, in a member, before the end-of-archive mark), a header is
            damaged, or a member is not a plain file.
    """
    total = os.fstat(descriptor).st_size
    position = 0
    stated: dict[str, str] = {}
    while True:
        header = os.pread(descriptor, _BLOCK, position)
        if not header:
            raise ShardFaultError(f"cut at byte {position}: no end-of-archive mark")
        if len(header) < _BLOCK:
            raise ShardFaultError(f"cut in the header at byte {position}")
        if not any(header):
            break
        try:
            info = tarfile.TarInfo.frombuf(header, "utf-8", "surrogateescape")
        except tarfile.HeaderError as error:
            raise ShardFaultError(f"damaged header at byte {position} ({error})") from None
        offset = position + _BLOCK
        extends = info.type in _EXTENSIONS
        if not (info.isreg() or extends):
            raise ShardFaultError(f"member {info.name!r} at byte {position} is not a plain file")
        if not extends:
            info.name, info.size = stated.get("path", info.name), int(stated.get("size", info.size))
        if offset + info.size > total:
            raise ShardFaultError(
                f"cut in member {info.name!r} at byte {total}, {offset + info.size - total} bytes short"
            )
        if extends:
            stated |= _extended(info.type, os.pread(descriptor, info.size, offset), position)
        else:
            yield Member(info.name, offset, info.size)
            stated = {}
        position = offset + -(-info.size // _BLOCK) * _BLOCK
    end = position
    while block := os.pread(descriptor, 1 << 16, end):
        if any(block):
            raise ShardFaultError(f"data after the end-of-archive mark at byte {position}")
        end += len(block)
    if end - position < 2 * _BLOCK:
        raise ShardFaultError(f"cut in the end-of-archive mark at byte {total}")


def _extended(kind: bytes, data: bytes, position: int) -> dict[str, str]:
    """What a header of POSIX or GNU tar says of the member behind it, as far as it matters here."""
    if kind == tarfile.GNUTYPE_LONGNAME:
        return {"path": data.rstrip(b"\0").decode("utf-8", "surrogateescape")}
    found = {}
    while data.strip(b"\0"):
        # A record is "LENGTH KEY=VALUE\n", its own length first.
        digits, _, _ = data.partition(b" ")
        try:
            record, data = data[len(digits) + 1 : int(digits) - 1], data[int(digits) :]
        except ValueError:
            raise ShardFaultError(f"damaged header at byte {position} (extended)") from None
        key, equals, value = record.partition(b"=")
        if not equals or int(digits) <= len(digits):
            raise ShardFaultError(f"damaged header at byte {position} (extended)")
        if key in (b"path", b"size"):
            found[key.decode()] = value.decode("utf-8", "surrogateescape")
    return {} if kind == tarfile.XGLTYPE else found


class Entry(NamedTuple):
    """One sample found in a shard."""

    key: str
    audio_format: str
    audio: Member
    samples: int
    """Length that the sample's JSON states."""
    speaker: str | None
    """Speaker that it names, if it does."""


def unpack(packed: Path, suffix: str, plain: IO[bytes]) -> None:
    """Write the tar inside a compressed file.

    Args:
        packed: the compressed file.
        suffix: `.gz`, `.bz2` or `.xz`, whatever the file is called.
        plain: where the tar goes.

    Raises:
        ShardFaultError: the file is cut or damaged.
        OSError: it cannot be read, or `plain` cannot be written.
    """
    with _OPENERS[suffix](packed, "rb") as stream:
        while True:
            try:
                block = stream.read(1 << 20)
            except (EOFError, lzma.LZMAError, gzip.BadGzipFile, zlib.error) as error:
                raise ShardFaultError(f"cannot be unpacked: {error}") from None
            except OSError as error:
                # bz2 has no exception of its own for damage.
                if error.errno is not None:
                    raise
                raise ShardFaultError(f"cannot be unpacked: {error}") from None
            if not block:
                return
            plain.write(block)


@contextmanager
def opened_tar(path: Path) -> Iterator[int]:
    """A descriptor of a shard as a plain tar, unpacked into a temporary file if need be. Raises as `unpack` does."""
    if path.suffix not in _OPENERS:
        with open(path, "rb") as file:
            yield file.fileno()
        return
    with tempfile.TemporaryFile() as plain:
        unpack(path, path.suffix, plain)
        plain.flush()
        yield plain.fileno()


def entries(descriptor: int) -> Iterator[Entry]:
    """Walk the samples of a shard: two members each, `KEY.json` and `KEY.wav` or `KEY.flac`, beside each other.

    Raises:
        ShardFaultError: as `members` does, or the members do not pair up, or a JSON does not state the seconds, or a
            speaker that is not text.
    """
    pending: dict[str, Member] = {}
    key = ""
    for member in members(descriptor):
        stem, _, suffix = member.name.partition(".")
        if pending and stem != key:
            raise ShardFaultError(f"sample {key} has no {'audio' if 'json' in pending else 'json'} member")
        if suffix not in ("json", "wav", "flac"):
            raise ShardFaultError(f"member {member.name!r} is not KEY.json, KEY.wav or KEY.flac")
        if suffix in pending:
            raise ShardFaultError(f"member {member.name!r} is there twice")
        key = stem
        pending[suffix] = member
        if len(pending) == 2:
            if "json" not in pending:
                raise ShardFaultError(f"sample {key} has two audio members and no json")
            text = pending.pop("json")
            ((audio_format, audio),) = pending.items()
            yield Entry(key, audio_format, audio, *_stated(descriptor, text))
            pending = {}
    if pending:
        raise ShardFaultError(f"sample {key} has no {'audio' if 'json' in pending else 'json'} member")


def _stated(descriptor: int, member: Member) -> tuple[int, str | None]:
    """Length in samples and speaker that a JSON member states."""
    try:
        description = json.loads(os.pread(descriptor, member.size, member.offset))
        samples = round(description["seconds"] * SAMPLE_RATE)
    except (ValueError, KeyError, TypeError, OverflowError):
        raise ShardFaultError(f"{member.name} does not state 'seconds'") from None
    speaker = description.get("speaker")
    if not isinstance(speaker, str | None):
        raise ShardFaultError(f"{member.name} states the speaker {speaker!r}, which is not text")
    return samples, speaker
