"""Which audio files a preparation is about: those of a tree, or those that a list names."""

import errno
import hashlib
import os
import posixpath
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path

from cel_dist.data.audio import AUDIO_SUFFIXES
from cel_dist.errors import CelError


def find_audio(source: Path) -> list[str]:
    """`audio_below`, for whom there must be some.

    Raises:
        CelError: as `audio_below`, or there is no audio.
    """
    found = audio_below(source)
    if not found:
        raise CelError(f"no audio below {source}; looked for files that end in {', '.join(sorted(AUDIO_SUFFIXES))}")
    return found


def audio_below(source: Path) -> list[str]:
    """Every audio file below `source`, by suffix, as sorted POSIX paths relative to it.

    Links to folders are followed; a folder that is reached twice, as by a link to its own parent, is read once.

    Raises:
        CelError: `source` is not a folder, or cannot be read.
    """
    require_folder(source)
    found: list[str] = []
    seen: set[tuple[int, int]] = set()
    pending = [""]
    while pending:
        folder = pending.pop()
        path = source / folder
        try:
            status = os.stat(path)
            if (status.st_dev, status.st_ino) in seen:
                continue
            seen.add((status.st_dev, status.st_ino))
            with os.scandir(path) as scan:
                entries = {entry.name: _is_folder(entry) for entry in sorted(scan, key=lambda entry: entry.name)}
        except OSError as error:
            place = error.filename or path
            raise CelError(f"cannot read the folder {place}: {error.strerror}; change its permissions or SRC") from None
        pending += reversed([posixpath.join(folder, name) for name, is_folder in entries.items() if is_folder])
        found += [
            posixpath.join(folder, name)
            for name, is_folder in entries.items()
            if os.path.splitext(name)[1].lower() in AUDIO_SUFFIXES and not is_folder
        ]
    return sorted(found)


def _is_folder(entry: "os.DirEntry[str]") -> bool:
    try:
        return entry.is_dir()
    except OSError as error:
        if error.errno == errno.ELOOP:
            # A link to itself leads nowhere, as one to a file that is gone.
            return False
        raise


def read_list(list_file: Path, source: Path) -> list[str]:
    """The files that a list names, in its order, as POSIX paths relative to `source`.

    One path a line; blank lines and lines that begin with `#` are passed over.

    Raises:
        CelError: the list cannot be read or is empty, or names a file twice, outside of `source`, or that is not there.
    """
    require_folder(source)
    lines: dict[str, int] = {}
    for number, line in _lines(list_file):
        path = _relative(line, list_file, number)
        if path in lines:
            raise CelError(f"{list_file} names {path} in line {lines[path]} and again in line {number}; remove one")
        lines[path] = number
    if not lines:
        raise CelError(f"the list {list_file} names no file; write one path, relative to {source}, a line")
    # os.path, not pathlib: a list may name a million files.
    missing = [path for path in lines if not os.path.isfile(os.path.join(source, path))]
    if missing:
        raise CelError(
            f"{len(missing)} of the {len(lines)} files in {list_file} do not exist, the first is {missing[0]} in line "
            f"{lines[missing[0]]}; paths are relative to {source}"
        )
    return list(lines)


def read_labels(labels_file: Path, paths: Sequence[str]) -> list[str]:
    """The speaker of each of `paths`, from lines `path speaker`. Lines about other files are passed over.

    Raises:
        CelError: the file cannot be read, a line has no speaker, a file has two, or one of `paths` has none.
    """
    speakers: dict[str, str] = {}
    for number, line in _lines(labels_file):
        words = line.rsplit(maxsplit=1)
        if len(words) < 2:
            raise CelError(f"line {number} of {labels_file} is not 'path speaker' but '{line}'; add the speaker")
        path, speaker = _relative(words[0], labels_file, number), words[1]
        if speakers.setdefault(path, speaker) != speaker:
            raise CelError(f"{labels_file} gives {path} the speakers {speakers[path]} and {speaker} (line {number})")
    missing = [path for path in paths if path not in speakers]
    if missing:
        raise CelError(
            f"{len(missing)} of the {len(paths)} files have no speaker in {labels_file}, the first is {missing[0]}; "
            "add them, or name the files to prepare with --list"
        )
    return [speakers[path] for path in paths]


def stamp(source: Path, paths: Sequence[str]) -> str:
    """A digest of the sizes and times of change of `paths`, by which a rerun notices that one was replaced.

    One `stat` a file; a file that is not there has a stamp too.
    """
    digest = hashlib.sha256()
    for path in paths:
        try:
            # os.path, not pathlib: a preparation may be about a million files.
            status = os.stat(os.path.join(source, path))
            digest.update(struct.pack("<qq", status.st_size, status.st_mtime_ns))
        except OSError:
            digest.update(struct.pack("<qq", -1, 0))
    return digest.hexdigest()


def require_folder(source: Path) -> None:
    """Raise CelError if `source` is not a folder."""
    if not source.is_dir():
        raise CelError(f"there is no folder {source}; give the folder that holds the audio")


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    try:
        # File names need not be UTF-8; surrogateescape carries the bytes of those that are not.
        text = path.read_text(encoding="utf-8-sig", errors="surrogateescape")
    except OSError as error:
        raise CelError(f"cannot read {path}: {error.strerror}; give a text file with one path a line") from None
    for number, line in enumerate(text.split("\n"), 1):
        stripped = line.strip()
        if stripped and not stripped.startswith("#"):
            yield number, stripped


def _relative(path: str, list_file: Path, number: int) -> str:
    normal = posixpath.normpath(path)
    if normal.startswith(("/", "../")) or normal == "..":
        raise CelError(f"line {number} of {list_file} leaves the source folder: {path}; write paths relative to it")
    return normal
