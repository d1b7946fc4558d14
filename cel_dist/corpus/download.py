"""Downloading a public corpus, so that what lies under its name is whole.

OUT/.ARCHIVE.part        what came of an archive; the next download goes on from there
OUT/.unpacking-SUBSET/   what is being unpacked; removed, and begun anew, by the next download
OUT/CORPUS/SUBSET/       renamed to this when all of it is there and torchaudio can open it
"""

import hashlib
import io
import logging
import os
import re
import shutil
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from cel_dist.corpus.catalogue import PublicCorpus, RemoteFile, count_utterances, remote_files
from cel_dist.data.files import require_folder_or_nothing, sole_writer, sync
from cel_dist.data.progress import Progress
from cel_dist.data.remote import RemoteError, RemoteFolder, is_remote
from cel_dist.errors import CelError, RunError

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

# A first answer comes at once or not at all; a transfer of many hours may have to wait for a line to come back.
FIRST_ANSWER_SECONDS = 8.0
PATIENCE_SECONDS = 120.0
_CHUNK_BYTES = 1 << 20
_MEGABYTE = 1_000_000

# What a line of the lists looks like. A server that answers with a page says so with the status of a file.
_LIST_LINES = {
    "veri_test.txt": re.compile(r"[01] id1\d{4}/\S+\.wav id1\d{4}/\S+\.wav"),
    "iden_split.txt": re.compile(r"[123] id1\d{4}/\S+\.wav"),
}

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Download:
    """A corpus that is there.

    Attributes:
        path: its folder, or the folder that the lists are in.
        files: the lists; empty for audio.
        utterances: how many torchaudio finds; None for lists.
        reused: nothing was downloaded, because it was there.
    """

    path: Path
    files: tuple[Path, ...]
    utterances: int | None
    reused: bool


def download_corpus(
    corpus: PublicCorpus,
    out: Path,
    *,
    mirror: str | None = None,
    verify: bool = True,
    progress: Progress | None = None,
) -> Download:
    """Download a public corpus and unpack it, or do what an interrupted call left to do.

    Args:
        corpus: of `catalogue.CORPORA`.
        out: folder to write into; several corpora may share it.
        mirror: URL of a folder that has the archive, or the lists, under the published names; default: the published
            place.
        verify: compare an archive with the checksum that torchaudio has of it.
        progress: told the megabytes done and in all, file by file.

    Raises:
        CelError: `out` is a file, or `mirror` is no URL.
        RunError: the network, the server, the disk or a checksum failed.
    """
    require_folder_or_nothing(out)
    if mirror is not None and not is_remote(mirror):
        raise CelError(f"the mirror '{mirror}' is no URL; write https://..., http://... or file:///...")
    with _writing(out):
        out.mkdir(parents=True, exist_ok=True)
        with sole_writer(out, "cel corpus download"):
            files = remote_files(corpus)
            if not corpus.folder:
                return _download_lists(out, files, mirror, progress)
            there = out / corpus.folder
            reused = there.is_dir()
            if not reused:
                [file] = files
                archive = _fetch(file, out, mirror, progress, checksum=file.sha256 if verify else None)
                _unpack(archive, file.name, corpus, out)
                archive.unlink()
            return Download(there, (), count_utterances(corpus, out), reused)


def _download_lists(out: Path, files: list[RemoteFile], mirror: str | None, progress: Progress | None) -> Download:
    paths = tuple(out / file.name for file in files)
    missing = [file for file in files if not (out / file.name).is_file()]
    for file in missing:
        # A list is short, and without a checksum nothing tells whether a beginning is of the same file.
        _part(out, file).unlink(missing_ok=True)
        part = _fetch(file, out, mirror, progress, checksum=None)
        _require_list(part, file)
        os.replace(part, out / file.name)
    sync(out)
    return Download(out, paths, None, reused=not missing)


def _require_list(part: Path, file: RemoteFile) -> None:
    line_form = _LIST_LINES[file.name]
    with open(part, encoding="utf-8", errors="replace") as lines:
        number = 0
        for number, line in enumerate(lines, 1):
            if not line_form.fullmatch(line.strip()):
                part.unlink()
                raise RunError(
                    f"line {number} of what {file.url} sent is not of {file.name} but '{line.strip()[:60]}'; the "
                    "server sent something else, look at it in a browser or give another --mirror"
                )
    if not number:
        part.unlink()
        raise RunError(f"{file.url} is empty; try again later, or give another --mirror")


def _part(out: Path, file: RemoteFile) -> Path:
    return out / f".{file.name}.part"


def _fetch(file: RemoteFile, out: Path, mirror: str | None, progress: Progress | None, *, checksum: str | None) -> Path:
    """The whole file under its temporary name, compared with `checksum` if there is one."""
    folder = RemoteFolder(mirror or file.folder, PATIENCE_SECONDS)
    part = _part(out, file)
    try:
        size = folder.size(file.name, FIRST_ANSWER_SECONDS)
        done = part.stat().st_size if part.exists() else 0
        if done > size:
            part.unlink()
            done = 0
        _require_space(out, size - done, file)
        logger.info("%s/%s: %.1f MB%s", folder.url, file.name, size / _MEGABYTE, _already(done))
        with _Told(part, size, progress) as stream:
            folder.fetch(file.name, size, stream)
            stream.flush()
            os.fsync(stream.fileno())
    except RemoteError as error:
        raise RunError(
            f"{error}; check the network and the address, then run the same command again, it goes on where it stopped "
            "(--mirror URL takes another place)"
        ) from None
    if checksum is not None and _sha256(part) != checksum:
        part.unlink()
        raise RunError(
            f"{folder.url}/{file.name} came whole, but its checksum is not the published one, so it was removed; try "
            "again, or another --mirror (--no-verify takes it as it is)"
        )
    return part


def _already(done: int) -> str:
    return f", {done / _MEGABYTE:.1f} MB of them are here" if done else ""


def _require_space(out: Path, missing_bytes: int, file: RemoteFile) -> None:
    free = shutil.disk_usage(out).free
    if free < missing_bytes:
        raise RunError(
            f"{out} has {free / _MEGABYTE:.0f} MB free, {file.name} needs {missing_bytes / _MEGABYTE:.0f} MB and as "
            "much again to be unpacked; make room, or give another --out"
        )


class _Told(io.BufferedWriter):
    """A file opened for appending that tells how long it is."""

    def __init__(self, path: Path, size: int, progress: Progress | None) -> None:
        super().__init__(open(path, "ab", buffering=0))  # noqa: SIM115 (closed with this object)
        self._size, self._progress = size, progress
        self._tell()

    def write(self, part: "ReadableBuffer") -> int:
        """Write, and tell."""
        written = super().write(part)
        self._tell()
        return written

    def _tell(self) -> None:
        if self._progress is not None:
            self._progress(self.tell() // _MEGABYTE, max(1, self._size // _MEGABYTE))


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def _unpack(archive: Path, name: str, corpus: PublicCorpus, out: Path) -> None:
    """Unpack beside the place where the corpus is to be, see that torchaudio can open it, and rename."""
    staging = out / f".unpacking-{corpus.folder.replace('/', '-')}"
    shutil.rmtree(staging, ignore_errors=True)
    # VCTK's archive has no folder of its own.
    inside = staging / corpus.folder if corpus.kind == "vctk" else staging
    inside.mkdir(parents=True)
    logger.info("unpacking %s", name)
    try:
        if name.endswith(".zip"):
            with zipfile.ZipFile(archive) as zipped:
                zipped.extractall(inside)
        else:
            with tarfile.open(archive) as tar:
                # Refuses names that lead out of the folder, devices, and links to elsewhere.
                tar.extractall(inside, filter="data")
    except (tarfile.TarError, zipfile.BadZipFile, EOFError, zlib.error) as error:
        shutil.rmtree(staging, ignore_errors=True)
        archive.unlink()
        raise RunError(f"{name} cannot be unpacked ({error}), so it was removed; run the same command again") from None
    except OSError:
        # The archive is whole: with room on the disk, the next call only unpacks.
        shutil.rmtree(staging, ignore_errors=True)
        raise
    try:
        count_utterances(corpus, staging)
    except RunError:
        shutil.rmtree(staging, ignore_errors=True)
        archive.unlink()
        raise
    target = out / corpus.folder
    target.parent.mkdir(parents=True, exist_ok=True)
    beside = (staging / corpus.folder).parent
    if beside != staging:
        # Lists of speakers and the licence, which all subsets bring along.
        for extra in beside.iterdir():
            if extra.is_file() and not (target.parent / extra.name).exists():
                os.replace(extra, target.parent / extra.name)
    os.replace(staging / corpus.folder, target)
    sync(target.parent)
    shutil.rmtree(staging)


@contextmanager
def _writing(out: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise RunError(
            f"cannot write {out}: {(error.strerror or str(error)).lower()}; make room or change its permissions and "
            "run the same command again, it goes on where it stopped"
        ) from None
