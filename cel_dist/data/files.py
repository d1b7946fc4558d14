"""Files that are whole or absent: atomic replacement, one writer a folder, and what a failed write becomes."""

import fcntl
import hashlib
import os
import socket
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from cel_dist.errors import CelError, RunError

_CHUNK_BYTES = 1 << 20


@contextmanager
def atomic_write(path: Path) -> Iterator[IO[bytes]]:
    """A binary file that appears as `path`, complete and on disk, when the block ends, and not at all if it raises.

    The temporary file is `.NAME.HOST.PID.tmp` in the same folder; only a killed process leaves one behind. Processes of
    several machines may write into one folder.
    """
    temporary = path.with_name(f".{path.name}.{socket.gethostname()}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync(path.parent)


def write_files(folder: Path, contents: Mapping[str, tuple[str, Iterable[bytes]]], what: str) -> dict[str, Path]:
    """Write files into a folder, which is made; each is whole or absent.

    Args:
        folder: where to.
        contents: by kind, the name of the file and the pieces of its content.
        what: what they are together, for the message.

    Returns:
        Their paths by kind.

    Raises:
        RunError: the folder cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, pieces in contents.values():
            with atomic_write(folder / name) as stream:
                stream.writelines(pieces)
    except OSError as error:
        raise RunError(f"cannot write {what} to {folder}: {error.strerror}; check space and permissions") from error
    return {kind: folder / name for kind, (name, _) in contents.items()}


def leftovers(folder: Path) -> list[Path]:
    """Temporary files of `atomic_write` that a killed process left in `folder`."""
    return sorted(folder.glob(".*.tmp"))


@contextmanager
def sole_writer(folder: Path, writer: str = "cel prepare") -> Iterator[None]:
    """Hold the folder's lock, so that two runs never write into it at once. The system frees it when the process ends.

    Args:
        folder: must exist.
        writer: the command that writes it, for the message.

    Raises:
        RunError: another process holds the lock.
    """
    with open(folder / ".lock", "wb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RunError(f"another '{writer}' is writing {folder}; wait for it to end, then run again") from None
        yield


@contextmanager
def writing_into(folder: Path) -> Iterator[None]:
    """Turn a full disk, a quota or a refused permission within the block into a RunError that says how to go on."""
    try:
        yield
    except OSError as error:
        raise RunError(
            f"cannot write {folder}: {(error.strerror or str(error)).lower()}; nothing half-written is left, put that "
            "right and run the same command again, it continues where it stopped"
        ) from None


def require_folder_or_nothing(out: Path) -> None:
    """Raise CelError if `out`, or what it is to lie in, is there and is not a folder, or cannot be written into: before
    the work whose outcome would have no place."""
    there = next((path for path in (out, *out.parents) if path.exists()), None)
    if there is not None and not there.is_dir():
        raise CelError(f"{there} is a file; give a folder to write into")
    if there is not None and not os.access(there, os.W_OK | os.X_OK):
        raise CelError(f"cannot write into {there}: it is read-only for this user; give another folder, or change that")


def sha256_of(path: Path) -> str:
    """SHA-256 of the file's bytes in hexadecimal."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on disk. A rename survives a power cut only after its folder
    was synced."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
