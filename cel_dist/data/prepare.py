"""Audio tree to shards: shuffled globally once, cut into independent jobs, restartable at any point.

The permutation of all source files is drawn first, and shard i takes positions i * n to (i + 1) * n of it. A file that
is rejected leaves its position empty, so what a shard holds never depends on another shard, on the number of workers or
on an interruption. A shard whose files were all rejected is not written, and its number stays unused.

Sizes and times of the source files are part of what a shard was made from, so that a rerun writes again the shards of
files that were replaced or repaired, and no others.
"""

import hashlib
import json
import logging
import shutil
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path

import numpy as np

from cel_dist.data.audio import SAMPLE_RATE, AudioFormat
from cel_dist.data.bank import BANK_NAME
from cel_dist.data.ffmpeg import is_lacking
from cel_dist.data.files import atomic_write, leftovers, require_folder_or_nothing, sha256_of, sole_writer, writing_into
from cel_dist.data.folder import ShardFolder
from cel_dist.data.index import INDEX_NAME, Index
from cel_dist.data.pool import run_jobs
from cel_dist.data.progress import Progress, Reporter
from cel_dist.data.ray_pool import run_jobs_on_ray
from cel_dist.data.rejects import REJECTS_NAME, write_rejects
from cel_dist.data.shard_jobs import (
    STATE_NAME,
    ShardJob,
    ShardOutcome,
    build_shard,
    build_shard_elsewhere,
    earlier_outcome,
)
from cel_dist.data.shards import MANIFEST_NAME, Manifest
from cel_dist.data.sources import find_audio, read_labels, read_list, stamp
from cel_dist.errors import CelError

JOB_NAME = "job.json"
# Two segments of 180 frames, the published length: what `data.short` of the configuration decides about.
TWO_SEGMENTS = 2 * (180 * 160 + 240)

Build = Callable[[Sequence[ShardJob]], Generator[ShardOutcome, None, None]]
"""Builds the shards of jobs and yields their outcomes in that order."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class PrepareResult:
    """What a preparation left behind: numbers of samples, shards and rejected files, and the table of the latter."""

    samples: int
    shards: int
    rejected: int
    rejects: Path


@dataclass(frozen=True)
class JobDescription:
    """Everything that the bytes of a folder of shards depend on, besides the content of the files."""

    source: str
    sources_sha256: str
    audio_format: AudioFormat
    samples_per_shard: int
    seed: int
    min_seconds: float
    prefix: str

    def fingerprint(self, files: str) -> str:
        """A digest that two jobs share only if their descriptions and the stamps of their files are equal."""
        return hashlib.sha256(json.dumps([asdict(self), files], sort_keys=True).encode()).hexdigest()


def prepare(
    source: str | Path,
    out: str | Path,
    *,
    list_file: str | Path | None = None,
    labels: str | Path | None = None,
    utterances: Mapping[str, str] | None = None,
    audio_format: AudioFormat = "wav",
    samples_per_shard: int = 1000,
    seed: int = 0,
    workers: int | None = None,
    ray_address: str | None = None,
    min_seconds: float = 1.0,
    prefix: str = "train",
    progress: Progress | None = None,
) -> PrepareResult:
    """Write the audio files of a tree or list as 16 kHz mono shards in globally shuffled order.

    Files that cannot be used never stop the run: `rejects.tsv` names each with a reason. An interrupted run is
    continued by the same call; the bytes are those of an uninterrupted one, for any number of workers. Shards that are
    there with the right size are not looked into: to have one written again, delete it. Those with source files that
    have since got another size or time of change are written again, so that repaired files are taken in.

    Args:
        source: folder of the audio. Paths in lists, labels, samples and rejects are relative to it.
        out: folder to write; it must not hold shards of another preparation.
        list_file: names the files to take, one a line. Default: every audio file below `source`.
        labels: lines `path speaker`; the speaker is stored with the sample and read by fine-tuning only.
        utterances: path and speaker of every file to take, instead of a list and labels.
        audio_format: `wav` decodes some 250 times faster when segments are read, `flac` takes about half the space.
        samples_per_shard: source files a shard.
        seed: seed of the order.
        workers: processes; default: the cores that this process may use. With Ray, the most jobs under way at once.
        ray_address: the Ray cluster that does the work, as `ray.init` takes it; `local` starts one on this machine for
            the time. Source and `out` must be on a file system that all its machines share. None: no Ray.
        min_seconds: shorter files are rejected.
        prefix: shards are called `PREFIX-%06d.tar`.
        progress: called with the number of files done and in all. None: a line in the log every half minute.

    Raises:
        CelError: source, list, labels or an option cannot be used; `out` holds something else; all files were rejected.
        RunError: the disk is full, a worker was killed, the Ray cluster cannot be reached, or another run is writing
            `out`.
    """
    source, out = Path(source), Path(out)
    _check_options(samples_per_shard, seed, workers, min_seconds, prefix)
    require_folder_or_nothing(out)
    speakers: Sequence[str] | None
    if utterances is not None:
        paths = sorted(utterances)
        speakers = [utterances[path] for path in paths]
    else:
        paths = find_audio(source) if list_file is None else read_list(Path(list_file), source)
        speakers = None if labels is None else read_labels(Path(labels), paths)
    description = JobDescription(
        str(source.resolve()), _digest(paths, speakers), audio_format, samples_per_shard, seed, min_seconds, prefix
    )
    with writing_into(out):
        out.mkdir(parents=True, exist_ok=True)
        with sole_writer(out):
            _claim(out, description)
            jobs = _shard_jobs(source, out, paths, speakers, description)
            outcomes = {job.name: outcome for job in jobs if (outcome := earlier_outcome(job)) is not None}
            finished = _finished(out, outcomes) if len(outcomes) == len(jobs) else None
            if finished is not None:
                logger.info(
                    "%s is already complete: %d utterances in %d shards", out, finished.samples, finished.shards
                )
                return finished
            # While shards are replaced, the folder is not whole and must not pass for it.
            (out / MANIFEST_NAME).unlink(missing_ok=True)
            built = _run(jobs, outcomes, len(paths), _builder(workers, ray_address), progress)
            return _finalise(out, description, built)


def _check_options(samples_per_shard: int, seed: int, workers: int | None, min_seconds: float, prefix: str) -> None:
    if samples_per_shard < 1:
        raise CelError(f"samples per shard must be at least 1, not {samples_per_shard}; 1000 is a good number")
    if seed < 0:
        raise CelError(f"the seed must not be negative, {seed} is; give 0 or more")
    if workers is not None and workers < 1:
        raise CelError(f"the number of workers must be at least 1, not {workers}; leave it out for all cores")
    if not 0 <= min_seconds < float("inf"):
        raise CelError(f"the shortest length must be 0 seconds or more, not {min_seconds}; 1 is a good number")
    if not prefix or set(prefix) & set("/.\0"):
        raise CelError(f"the prefix '{prefix}' cannot begin the name of a shard; use letters, digits, - and _")


def _digest(paths: Sequence[str], speakers: Sequence[str] | None) -> str:
    digest = hashlib.sha256()
    for pair in zip(paths, speakers, strict=True) if speakers is not None else zip(paths):
        digest.update("\0".join(pair).encode("utf-8", "surrogateescape") + b"\n")
    return digest.hexdigest()


def _claim(out: Path, description: JobDescription) -> None:
    """Make `out` this job's folder, or find that it already is; clear what a killed run left half-written."""
    state = out / STATE_NAME
    now = asdict(description)
    try:
        before = json.loads((state / JOB_NAME).read_bytes())
    except FileNotFoundError:
        before = {}
    if before != now:
        written = next(chain(out.glob("*.tar"), out.glob(MANIFEST_NAME), out.glob(BANK_NAME)), None)
        if written is not None:
            raise CelError(f"{out} holds {written.name}, {_difference(before, now)}; give another folder or empty it")
        state.mkdir(exist_ok=True)
        with atomic_write(state / JOB_NAME) as file:
            file.write(json.dumps(now, indent=1).encode())
    _clear_leftovers(out)


def _clear_leftovers(out: Path) -> None:
    for path in leftovers(out) + leftovers(out / STATE_NAME):
        path.unlink()


def _difference(before: dict[str, object], now: dict[str, object]) -> str:
    if not before:
        return "which is not of this preparation"
    different = [
        "other files or speakers" if key == "sources_sha256" else f"{key} {before.get(key)}, not {now[key]}"
        for key in now
        if before.get(key) != now[key]
    ]
    return f"of another preparation ({', '.join(different)})"


def _finished(out: Path, outcomes: Mapping[str, ShardOutcome]) -> PrepareResult | None:
    """What an earlier run left, if it came to its end and wrote no shard since; `outcomes` are those of all shards."""
    try:
        manifest = ShardFolder.open(out).manifest
    except CelError:
        return None
    if manifest.shards != tuple(outcome.record for outcome in outcomes.values() if outcome.record is not None):
        return None
    return PrepareResult(manifest.samples, len(manifest.shards), manifest.rejected, out / REJECTS_NAME)


def _shard_jobs(
    source: Path, out: Path, paths: Sequence[str], speakers: Sequence[str] | None, description: JobDescription
) -> list[ShardJob]:
    order = np.random.default_rng(description.seed).permutation(len(paths))
    jobs = []
    for number, first in enumerate(range(0, len(paths), description.samples_per_shard)):
        places = order[first : first + description.samples_per_shard].tolist()
        chosen = tuple(paths[place] for place in places)
        jobs.append(
            ShardJob(
                # A worker on another machine, or of a cluster that was there before, works in a folder of its own.
                source=source.absolute(),
                out=out.absolute(),
                name=f"{description.prefix}-{number:06d}.tar",
                first=first,
                paths=chosen,
                speakers=None if speakers is None else tuple(speakers[place] for place in places),
                audio_format=description.audio_format,
                min_samples=round(description.min_seconds * SAMPLE_RATE),
                lacks_ffmpeg=is_lacking(chosen),
                fingerprint=description.fingerprint(stamp(source, chosen)),
            )
        )
    return jobs


def _builder(workers: int | None, ray_address: str | None) -> Build:
    """How shards are built: by processes of this machine, or by a Ray cluster."""
    if ray_address is None:
        return lambda jobs: run_jobs(build_shard, jobs, len(jobs), workers)
    return lambda jobs: run_jobs_on_ray(
        build_shard_elsewhere, jobs, len(jobs), ray_address, workers, name=lambda job: job.name
    )


def _run(
    jobs: Sequence[ShardJob],
    earlier: Mapping[str, ShardOutcome],
    num_files: int,
    build: Build,
    progress: Progress | None,
) -> list[ShardOutcome]:
    outcomes = dict(earlier)
    missing = [job for job in jobs if job.name not in outcomes]
    if outcomes:
        logger.info("continuing: %d of %d shards are there, and their files as they were", len(outcomes), len(jobs))
    reporter = Reporter(
        progress,
        num_files,
        done=sum(len(job.paths) for job in jobs if job.name in earlier),
        audio_seconds=sum(outcome.seconds for outcome in earlier.values()),
    )
    with closing(build(missing)) as results:
        for job, outcome in zip(missing, results, strict=True):
            outcomes[job.name] = outcome
            reporter.add(len(job.paths), outcome.seconds)
    return [outcomes[job.name] for job in jobs]


def _finalise(out: Path, description: JobDescription, outcomes: Sequence[ShardOutcome]) -> PrepareResult:
    # Those of workers that were killed and whose jobs Ray gave to others.
    _clear_leftovers(out)
    rejects = [reject for outcome in outcomes for reject in outcome.rejects]
    table = write_rejects(out, rejects)
    written = [(outcome.record, outcome.rows) for outcome in outcomes if outcome.record is not None]
    if not written:
        # Nothing to continue from: once the files are repaired, the same command starts afresh.
        shutil.rmtree(out / STATE_NAME)
        raise CelError(f"all {len(rejects)} audio files were rejected; {table} names the reason for each")
    records = tuple(record for record, _ in written)
    index = Index.from_shards([rows for _, rows in written])
    index.save(out)
    manifest = Manifest(
        seed=description.seed,
        sample_rate=SAMPLE_RATE,
        audio_format=description.audio_format,
        samples=len(index),
        seconds=int(index.samples.sum()) / SAMPLE_RATE,
        rejected=len(rejects),
        index_sha256=sha256_of(out / INDEX_NAME),
        shards=records,
    )
    manifest.save(out)
    logger.info("%d utterances, %.2f h, in %d shards", len(index), manifest.seconds / 3600, len(records))
    if rejects:
        logger.warning("%d files were rejected; %s names the reason for each", len(rejects), table)
    short = int((index.samples < TWO_SEGMENTS).sum())
    if short:
        logger.info(
            "%d utterances are shorter than two segments of 180 frames (%.2f s); data.short says what happens to them",
            short,
            TWO_SEGMENTS / SAMPLE_RATE,
        )
    return PrepareResult(len(index), len(records), len(rejects), table)
