"""Noise and room recordings to a bank, once, so that training only maps a file."""

import hashlib
import json
import logging
import posixpath
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from cel_dist.data.audio import SAMPLE_RATE
from cel_dist.data.bank import (
    BANK_NAME,
    CATEGORIES,
    CLIPS_NAME,
    BankManifest,
    Category,
    CategoryRecord,
    category_path,
)
from cel_dist.data.ffmpeg import is_lacking
from cel_dist.data.files import atomic_write, leftovers, require_folder_or_nothing, sole_writer, writing_into
from cel_dist.data.pool import run_jobs
from cel_dist.data.progress import Progress, Reporter
from cel_dist.data.rejects import REJECTS_NAME, Reject, read_usable, write_rejects
from cel_dist.data.shards import MANIFEST_NAME
from cel_dist.data.sources import find_audio, stamp
from cel_dist.errors import CelError

_FOLDER_NAMES: dict[str, Category] = {
    "noise": "noise",
    "pointsource_noises": "noise",
    "speech": "speech",
    "music": "music",
    "rir": "rir",
    "rirs": "rir",
}
_FOLDER_PREFIXES: dict[str, Category] = {"real_rirs": "rir", "simulated_rirs": "rir"}

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class BankResult:
    """What a bank holds: clips by category, files under no category, rejected files and the table of the latter."""

    clips: dict[Category, int]
    skipped: int
    rejected: int
    rejects: Path


def category_of(path: str) -> Category | None:
    """The category of a file by the deepest of its folders that names one.

    Folders named as in MUSAN (OpenSLR 17) and RIRS_NOISES (OpenSLR 28) are known. The folder of real room responses of
    the latter also holds recordings of the rooms' background noise, told apart by their names.

    >>> category_of("musan/music/fma/music-fma-0001.wav")
    'music'
    >>> category_of("RIRS_NOISES/real_rirs_isotropic_noises/RVB2014_type1_noise_largeroom1_1.wav")
    'noise'
    """
    *folders, name = path.lower().split("/")
    for folder in reversed(folders):
        by_prefix = (category for prefix, category in _FOLDER_PREFIXES.items() if folder.startswith(prefix))
        category = _FOLDER_NAMES.get(folder) or next(by_prefix, None)
        if category is not None:
            return "noise" if folder.startswith("real_rirs") and "_noise_" in name else category
    return None


class _ClipJob(NamedTuple):
    source: Path
    path: str


def _read_clip(job: _ClipJob) -> npt.NDArray[np.int16] | Reject:
    # A room response is a fraction of a second long, so there is no shortest length.
    return read_usable(job.source, job.path, min_samples=1)


def prepare_bank(
    source: str | Path,
    out: str | Path,
    *,
    clips: Mapping[Category, Sequence[str]] | None = None,
    workers: int | None = None,
    progress: Progress | None = None,
) -> BankResult:
    """Write the noises, voices, music and room responses below `source` as a bank at 16 kHz.

    Multi-channel recordings are averaged. Memory holds a few clips at a time. A rerun of a finished job does nothing,
    unless files have since got another size or time of change: it writes the bank again.

    Args:
        source: folder of the audio. The deepest folder with a known name decides what a file is (see `category_of`);
            the name of `source` itself counts if none below it does.
        out: folder to write; it must not hold another bank, or shards.
        clips: the files of each category, relative to `source`. Default: those that the names of folders tell.
        workers: processes; default: the cores that this process may use.
        progress: called with the number of files done and in all. None: a line in the log every half minute.

    Raises:
        CelError: `source` cannot be used or has no known folder, `out` holds something else, all files were rejected.
        RunError: the disk is full, a worker was killed, or another run is writing `out`.
    """
    source, out = Path(source), Path(out)
    if workers is not None and workers < 1:
        raise CelError(f"the number of workers must be at least 1, not {workers}; leave it out for all cores")
    require_folder_or_nothing(out)
    if clips is not None:
        by_category, skipped = {category: list(paths) for category, paths in clips.items()}, 0
    else:
        by_category, skipped = _sort_files(source, find_audio(source))
    fingerprint = hashlib.sha256(json.dumps([str(source.resolve()), by_category]).encode()).hexdigest()
    all_paths = [path for paths in by_category.values() for path in paths]
    files, lacks_ffmpeg = stamp(source, all_paths), is_lacking(all_paths)
    with writing_into(out):
        out.mkdir(parents=True, exist_ok=True)
        with sole_writer(out):
            finished = _finished(out, fingerprint, files, lacks_ffmpeg)
            if finished is not None:
                logger.info("%s is already complete: %s", out, _counts(finished.clips))
                return finished
            for path in leftovers(out):
                path.unlink()
            (out / BANK_NAME).unlink(missing_ok=True)
            return _write(source, out, by_category, skipped, (fingerprint, files), workers, progress)


def _sort_files(source: Path, paths: Sequence[str]) -> tuple[dict[Category, list[str]], int]:
    of_path = {path: category_of(path) for path in paths}
    if not any(of_path.values()):
        own = category_of(f"{source.resolve().name}/")
        if own is None:
            raise CelError(
                f"none of the {len(paths)} audio files below {source} lies in a folder named noise, speech, music or "
                "rir; rename the folders"
            )
        of_path = dict.fromkeys(paths, own)
    by_category: dict[Category, list[str]] = {}
    for path, category in of_path.items():
        if category is not None:
            by_category.setdefault(category, []).append(path)
    skipped = Counter(posixpath.dirname(path) or "." for path, category in of_path.items() if category is None)
    if skipped:
        logger.warning(
            "skipped %d files in folders that name no category (noise, speech, music, rir), most of them in %s",
            skipped.total(),
            skipped.most_common(1)[0][0],
        )
    return by_category, skipped.total()


def _finished(out: Path, fingerprint: str, files: str, lacks_ffmpeg: bool) -> BankResult | None:
    if (out / MANIFEST_NAME).exists():
        raise CelError(f"{out} holds shards; give another folder for the bank")
    if not (out / BANK_NAME).exists():
        return None
    manifest = BankManifest.load(out)
    if manifest.job != fingerprint:
        raise CelError(f"{out} holds a bank of another source or other files; give another folder or empty it")
    if manifest.files != files or (manifest.lacked_ffmpeg and not lacks_ffmpeg):
        return None
    for category, record in manifest.categories.items():
        path = category_path(out, category)
        if not path.exists() or path.stat().st_size != record.bytes:
            return None
    return BankResult(
        {category: record.clips for category, record in manifest.categories.items()},
        manifest.skipped,
        manifest.rejected,
        out / REJECTS_NAME,
    )


def _write(
    source: Path,
    out: Path,
    by_category: dict[Category, list[str]],
    skipped: int,
    job: tuple[str, str],
    workers: int | None,
    progress: Progress | None,
) -> BankResult:
    jobs = [_ClipJob(source, path) for paths in by_category.values() for path in paths]
    rejects: list[Reject] = []
    records: dict[Category, CategoryRecord] = {}
    lengths: dict[str, npt.NDArray[np.int64]] = {}
    with closing(run_jobs(_read_clip, jobs, len(jobs), workers)) as results:
        clips = _with_progress(results, len(jobs), progress)
        for category, paths in by_category.items():
            path = category_path(out, category)
            record, of_clips = _write_category(path, islice(clips, len(paths)), rejects)
            if record.clips:
                records[category], lengths[category] = record, of_clips
            else:
                path.unlink()
    table = write_rejects(out, rejects)
    if not records:
        raise CelError(f"all {len(rejects)} audio files were rejected; {table} names the reason for each")
    with atomic_write(out / CLIPS_NAME) as file:
        np.savez(file, **lengths)  # type: ignore[arg-type]
    fingerprint, files = job
    manifest = BankManifest(
        job=fingerprint,
        files=files,
        lacked_ffmpeg=any(is_lacking(paths) for paths in by_category.values()),
        rejected=len(rejects),
        skipped=skipped,
        categories=records,
    )
    manifest.save(out)
    result = BankResult({name: records[name].clips for name in records}, skipped, len(rejects), table)
    logger.info("bank: %s", _counts(result.clips))
    if rejects:
        logger.warning("%d files were rejected; %s names the reason for each", len(rejects), table)
    return result


def _write_category(
    path: Path, clips: Iterator[npt.NDArray[np.int16] | Reject], rejects: list[Reject]
) -> tuple[CategoryRecord, npt.NDArray[np.int64]]:
    digest = hashlib.sha256()
    lengths: list[int] = []
    with atomic_write(path) as file:
        for clip in clips:
            if isinstance(clip, Reject):
                rejects.append(clip)
                continue
            data = clip.astype("<i2", copy=False).tobytes()
            digest.update(data)
            file.write(data)
            lengths.append(len(clip))
    total = sum(lengths)
    record = CategoryRecord(clips=len(lengths), seconds=total / SAMPLE_RATE, bytes=2 * total, sha256=digest.hexdigest())
    return record, np.array(lengths, np.int64)


def _with_progress(
    clips: Iterator[npt.NDArray[np.int16] | Reject], total: int, progress: Progress | None
) -> Iterator[npt.NDArray[np.int16] | Reject]:
    reporter = Reporter(progress, total)
    for clip in clips:
        yield clip
        reporter.add(1, 0.0 if isinstance(clip, Reject) else len(clip) / SAMPLE_RATE)


def _counts(clips: dict[Category, int]) -> str:
    return ", ".join(f"{clips[name]} {name}" for name in CATEGORIES if name in clips)
