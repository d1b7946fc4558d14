"""A bounded folder of whole, verified shards on a disk of this machine, shared by all processes of it.

CACHE/SHA256.tar     a shard, named by the sha256 of what was downloaded
CACHE/SHA256.part    the beginning of one; the next download of it goes on from there
CACHE/SHA256.failed  why the last download of it failed
CACHE/lock           held by the one process that downloads

Only locks of the system are used, so that a killed process leaves none behind: the downloader holds an exclusive one on
`lock`, and every reader a shared one on each shard it has open, which keeps the shard from being removed.
"""

import errno
import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

from cel_dist.data.archive import ShardFaultError, unpack
from cel_dist.data.files import sha256_of, sync
from cel_dist.data.remote import RemoteError, RemoteFolder
from cel_dist.data.shards import ShardRecord
from cel_dist.errors import RunError

_POLL_SECONDS = 0.1


class _Held(NamedTuple):
    """A file of the cache: when it was last opened, its size, and where it is."""

    used: float
    bytes: int
    path: Path


class ShardCache:
    """The cache of this machine.

    Args:
        folder: on a local disk; made when something is put in.
        limit_bytes: most that its shards may take together.
    """

    def __init__(self, folder: Path, limit_bytes: int) -> None:
        self.folder = folder
        self.limit_bytes = limit_bytes

    def open(self, record: ShardRecord) -> int | None:
        """A descriptor of a shard, which stays in the cache while it is open; None if it is not there."""
        path = self._path(record)
        try:
            descriptor = os.open(path, os.O_RDONLY)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise RunError(
                f"cannot read the cache {self.folder}: {str(error.strerror).lower()}; change its permissions, or set "
                "data.cache_dir to another folder"
            ) from None
        fcntl.flock(descriptor, fcntl.LOCK_SH)
        if os.fstat(descriptor).st_nlink == 0:
            # It was removed between the two lines above.
            os.close(descriptor)
            return None
        # The order of removal is that of the last opening. Where nothing can be written, nothing is removed.
        with suppress(OSError):
            os.utime(path)
        return descriptor

    def fetch(self, record: ShardRecord, plain_bytes: int, remote: RemoteFolder) -> None:
        """Put a shard in, unless it is there. One process of the machine at a time does so; the others wait, and if it
        fails, fail with it.

        Args:
            record: of the manifest.
            plain_bytes: size of the shard as a plain tar.
            remote: where it comes from.

        Raises:
            RemoteError: it cannot be had, or is not what the manifest says.
            RunError: the cache cannot be written, or has no room.
        """
        patience = time.monotonic() + remote.patience_seconds
        failure = self._path(record).with_suffix(".failed")
        begun = time.time()
        while True:
            with writing_cache(self.folder), self.sole_downloader():
                if self._path(record).exists():
                    return
                if failure.exists() and failure.stat().st_mtime > begun:
                    # Another process tried while this one waited. Each trying for itself would take as long again.
                    raise RemoteError(failure.read_text())
                if self._make_room(record, plain_bytes):
                    try:
                        self._download(record, remote)
                    except RemoteError as error:
                        failure.write_text(str(error))
                        raise
                    failure.unlink(missing_ok=True)
                    return
            if time.monotonic() > patience:
                raise RunError(
                    f"the cache {self.folder} is full of shards in use ({self.limit_bytes / 2**30:.3g} GiB) and has no "
                    f"room for {record.name}; raise data.cache_gib or lower data.window_shards"
                )
            time.sleep(_POLL_SECONDS)

    def _path(self, record: ShardRecord) -> Path:
        return self.folder / f"{record.sha256}.tar"

    def _part(self, record: ShardRecord) -> Path:
        return self.folder / f"{record.sha256}.part"

    @contextmanager
    def sole_downloader(self) -> Iterator[None]:
        """Wait until no other process of the machine downloads, and keep the others from it."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with open(self.folder / "lock", "ab") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def _download(self, record: ShardRecord, remote: RemoteFolder) -> None:
        part = self._part(record)
        for _ in range(2):
            self._complete(part, record, remote)
            if sha256_of(part) == record.sha256:
                break
            # A part from before the shard was replaced, or damaged on the way: once more from the beginning.
            part.unlink()
        else:
            raise RemoteError(
                f"{remote.url}/{record.name} came whole, but its sha256 is not the one in the manifest; upload it again"
            )
        if record.is_compressed:
            part = self._unpacked(part, record, remote)
        sync(part)
        os.replace(part, self._path(record))
        sync(self.folder)

    def _complete(self, part: Path, record: ShardRecord, remote: RemoteFolder) -> None:
        if part.exists() and part.stat().st_size > record.bytes:
            part.unlink()
        while True:
            try:
                with open(part, "ab") as file:
                    remote.fetch(record.name, record.bytes, file)
                return
            except OSError as error:
                # The disk may be smaller than the limit. Without the shard that was longest unused it may do.
                if error.errno != errno.ENOSPC or not self._remove_oldest(sparing=part):
                    raise

    def _unpacked(self, part: Path, record: ShardRecord, remote: RemoteFolder) -> Path:
        unpacked = part.with_suffix(".unpacked.part")
        while True:
            try:
                with open(unpacked, "wb") as plain:
                    unpack(part, Path(record.name).suffix, plain)
            except ShardFaultError as error:
                unpacked.unlink()
                raise RemoteError(f"{remote.url}/{record.name} {error}") from None
            except OSError as error:
                unpacked.unlink()
                if error.errno != errno.ENOSPC or not self._remove_oldest(sparing=part):
                    raise
            else:
                part.unlink()
                return unpacked

    def _make_room(self, record: ShardRecord, plain_bytes: int) -> bool:
        """Remove what was longest unused until a shard fits; whether that was possible."""
        part = self._part(record)
        # While it is unpacked, a compressed one is there in both forms.
        needed = plain_bytes + (record.bytes if record.is_compressed else 0)
        while sum(held.bytes for held in self._held() if held.path != part) + needed > self.limit_bytes:
            if not self._remove_oldest(sparing=part):
                return False
        return True

    def _held(self) -> list[_Held]:
        found = []
        for path in (*self.folder.glob("*.tar"), *self.folder.glob("*.part")):
            status = path.stat()
            found.append(_Held(status.st_mtime, status.st_size, path))
        return found

    def _remove_oldest(self, sparing: Path) -> bool:
        others = (held.path for held in sorted(self._held()) if held.path != sparing)
        return any(_remove_unless_open(path) for path in others)


def _remove_unless_open(path: Path) -> bool:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        path.unlink()
    except BlockingIOError:
        return False
    finally:
        os.close(descriptor)
    return True


@contextmanager
def writing_cache(folder: Path) -> Iterator[None]:
    """Turn a full disk or a refused permission within the block into a RunError."""
    try:
        yield
    except OSError as error:
        raise RunError(
            f"cannot write the cache {folder}: {(error.strerror or str(error)).lower()}; make room there, or set "
            "data.cache_dir to a folder on another disk of this machine"
        ) from None
