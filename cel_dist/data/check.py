"""Full verification of what `cel prepare` wrote: every byte is read, every member decoded."""

import os
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import NamedTuple

from cel_dist.data.archive import Entry, ShardFaultError, entries, opened_tar
from cel_dist.data.audio import AudioFormat, stored_form_fault
from cel_dist.data.bank import BANK_NAME, Bank, BankManifest, category_path
from cel_dist.data.files import leftovers, sha256_of
from cel_dist.data.folder import index_disagreements
from cel_dist.data.index import INDEX_NAME, Index, ShardRows
from cel_dist.data.pool import run_jobs
from cel_dist.data.progress import Progress
from cel_dist.data.shards import MANIFEST_NAME, Manifest, ShardRecord, shard_paths
from cel_dist.errors import CelError


class Fault(NamedTuple):
    """Something wrong: the file, the sample in it where there is one, and what is wrong."""

    shard: str
    key: str | None
    reason: str

    def __str__(self) -> str:
        return f"{self.shard}{'' if self.key is None else f' sample {self.key}'}: {self.reason}"


class _ShardCheck(NamedTuple):
    folder: Path
    record: ShardRecord
    audio_format: AudioFormat
    rows: ShardRows | None


def check(folder: str | Path, *, workers: int | None = None, progress: Progress | None = None) -> list[Fault]:
    """Every fault of a folder of shards or of a bank, whichever `folder` is; empty if it is whole.

    `workers` and `progress` are those of `check_shards` and `check_bank`.

    Raises:
        CelError: `folder` is neither.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise CelError(f"there is no folder {folder}; give one that 'cel prepare' wrote")
    if (folder / BANK_NAME).exists():
        return check_bank(folder, workers=workers, progress=progress)
    return check_shards(folder, workers=workers, progress=progress)


def check_shards(folder: str | Path, *, workers: int | None = None, progress: Progress | None = None) -> list[Fault]:
    """Every fault of a folder of shards.

    Checked are: manifest against index against files; sha256 and structure of every tar; that each audio member lies
    where the index says, has the speaker that the index says, is 16 kHz mono 16-bit, and decodes to the length that
    index and JSON state; that no key occurs twice; that no temporary file and no unlisted shard lies about.

    Args:
        folder: what `cel prepare` wrote.
        workers: processes; default: the cores that this process may use.
        progress: called with the number of shards done and in all.

    Raises:
        CelError: the folder holds nothing that `cel prepare` writes.
    """
    folder = Path(folder)
    faults = [Fault(path.name, None, "left by an interrupted run") for path in leftovers(folder)]
    tars = {path.name for path in shard_paths(folder)}
    try:
        manifest = Manifest.load(folder)
    except CelError as error:
        if not tars and not faults and not (folder / MANIFEST_NAME).exists():
            raise
        return [*faults, Fault(MANIFEST_NAME, None, str(error))]
    listed = {record.name for record in manifest.shards}
    faults += [Fault(name, None, "not in the manifest") for name in sorted(tars - listed)]
    index, index_faults = _load_index(folder, manifest)
    faults += index_faults
    jobs = list(_shard_checks(folder, manifest, index))
    shard_of_key: dict[str, str] = {}
    with closing(run_jobs(check_shard, jobs, len(jobs), workers)) as results:
        for done, (job, (shard_faults, keys)) in enumerate(zip(jobs, results, strict=True), 1):
            faults += shard_faults
            for key in keys:
                first = shard_of_key.setdefault(key, job.record.name)
                if first != job.record.name:
                    faults.append(Fault(job.record.name, key, f"its key is in {first} too"))
            if progress is not None:
                progress(done, len(jobs))
    return faults


def _load_index(folder: Path, manifest: Manifest) -> tuple[Index | None, list[Fault]]:
    try:
        index = Index.load(folder)
    except CelError as error:
        return None, [Fault(INDEX_NAME, None, str(error))]
    if manifest.index_sha256 not in (None, sha256_of(folder / INDEX_NAME)):
        return None, [Fault(INDEX_NAME, None, "its sha256 is not the one in the manifest")]
    problems = list(index_disagreements(str(folder), manifest, index))
    return (None if problems else index), [Fault(INDEX_NAME, None, problem) for problem in problems]


def _shard_checks(folder: Path, manifest: Manifest, index: Index | None) -> Iterator[_ShardCheck]:
    first = 0
    for record in manifest.shards:
        # The index is in shard order, so that a shard's rows are one slice.
        part = slice(first, first + record.samples)
        rows = None if index is None else index.rows(part)
        yield _ShardCheck(folder, record, manifest.audio_format, rows)
        first += record.samples


def check_shard(job: _ShardCheck) -> tuple[list[Fault], list[str]]:
    """The faults of one shard, and the keys found in it."""
    name = job.record.name
    faults: list[Fault] = []
    keys: list[str] = []
    path = job.folder / name
    try:
        size = path.stat().st_size
        if size != job.record.bytes:
            faults.append(Fault(name, None, f"has {size} bytes, the manifest says {job.record.bytes}"))
        elif sha256_of(path) != job.record.sha256:
            faults.append(Fault(name, None, "its sha256 is not the one in the manifest"))
        with opened_tar(path) as descriptor:
            for number, entry in enumerate(entries(descriptor)):
                keys.append(entry.key)
                reason = _entry_fault(job, number, entry, descriptor)
                if reason is not None:
                    faults.append(Fault(name, entry.key, reason))
    except OSError as error:
        return [*faults, Fault(name, None, f"cannot be read: {(error.strerror or str(error)).lower()}")], keys
    except ShardFaultError as error:
        faults.append(Fault(name, None, str(error)))
    if len(keys) != job.record.samples:
        faults.append(Fault(name, None, f"holds {len(keys)} samples, the manifest says {job.record.samples}"))
    twice = len(keys) - len(set(keys))
    if twice:
        faults.append(Fault(name, None, f"{twice} of its keys occur more than once"))
    return faults, keys


def _entry_fault(job: _ShardCheck, number: int, entry: Entry, descriptor: int) -> str | None:
    if entry.audio_format != job.audio_format:
        return f"is {entry.audio_format}, the manifest says {job.audio_format}"
    if job.rows is not None and number < len(job.rows.offset):
        stated = (job.rows.offset[number], job.rows.size[number], job.rows.samples[number])
        if stated != (entry.audio.offset, entry.audio.size, entry.samples):
            return "index and tar differ in where its audio lies or how long it is"
        # An index without the speaker is older than the place for it.
        if job.rows.speakers[number] not in (None, entry.speaker):
            return f"index and tar differ in its speaker, {job.rows.speakers[number]} and {entry.speaker}"
    return stored_form_fault(os.pread(descriptor, entry.audio.size, entry.audio.offset), entry.samples)


class _CategoryCheck(NamedTuple):
    path: Path
    sha256: str


def check_bank(folder: str | Path, *, workers: int | None = None, progress: Progress | None = None) -> list[Fault]:
    """Every fault of a bank: sizes, lengths of the clips, sha256 of the audio, temporary files.

    Args:
        folder: what `cel prepare --bank` wrote.
        workers: processes; default: the cores that this process may use.
        progress: called with the number of categories done and in all.
    """
    folder = Path(folder)
    faults = [Fault(path.name, None, "left by an interrupted run") for path in leftovers(folder)]
    try:
        manifest = BankManifest.load(folder)
        Bank.open(folder)
    except CelError as error:
        return [*faults, Fault(BANK_NAME, None, str(error))]
    jobs = [_CategoryCheck(category_path(folder, name), record.sha256) for name, record in manifest.categories.items()]
    with closing(run_jobs(check_category, jobs, len(jobs), workers)) as results:
        for done, (job, is_whole) in enumerate(zip(jobs, results, strict=True), 1):
            if not is_whole:
                faults.append(Fault(job.path.name, None, f"its sha256 is not the one in {BANK_NAME}"))
            if progress is not None:
                progress(done, len(jobs))
    return faults


def check_category(job: _CategoryCheck) -> bool:
    """Whether the audio of a category has the sha256 that the manifest states."""
    return sha256_of(job.path) == job.sha256
