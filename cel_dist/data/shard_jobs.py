"""One shard of a preparation: the job that says all about it, the work, and the record that it was done."""

import json
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import numpy as np

from cel_dist.data.audio import AudioFormat, encode_audio
from cel_dist.data.ffmpeg import is_lacking
from cel_dist.data.files import atomic_write
from cel_dist.data.index import ShardRows
from cel_dist.data.rejects import Reject, read_usable
from cel_dist.data.shards import ShardRecord, Utterance, write_shard
from cel_dist.errors import RunError

STATE_NAME = ".prepare"
"""Folder in that of the shards: what was asked for, and a record of each shard that is done."""


@dataclass(frozen=True)
class ShardJob:
    """One shard to write; holds all that `build_shard` needs, so that any process or machine can do it."""

    source: Path
    out: Path
    name: str
    first: int
    """Position of the first file in the shuffled order."""
    paths: tuple[str, ...]
    speakers: tuple[str, ...] | None
    audio_format: AudioFormat
    min_samples: int
    lacks_ffmpeg: bool
    """Whether any of the files needs ffmpeg, which is not installed where the job was made."""
    fingerprint: str


@dataclass(frozen=True)
class ShardOutcome:
    """A finished shard; `record` is None if every file was rejected and there is none."""

    record: ShardRecord | None
    rows: ShardRows
    rejects: tuple[Reject, ...]
    lacked_ffmpeg: bool = False
    """Whether files were rejected for want of ffmpeg."""

    @property
    def seconds(self) -> float:
        """Length of the audio in the shard."""
        return 0.0 if self.record is None else self.record.seconds

    def save(self, path: Path, fingerprint: str) -> None:
        """Write `OUT/.prepare/NAME.json`, so that a rerun of the job with this fingerprint need not do it again."""
        record = None if self.record is None else self.record.model_dump()
        rows = [column.tolist() for column in (self.rows.offset, self.rows.size, self.rows.samples)]
        state = {
            "fingerprint": fingerprint,
            "record": record,
            "rows": rows,
            "speakers": self.rows.speakers,
            "rejects": self.rejects,
            "lacked_ffmpeg": self.lacked_ffmpeg,
        }
        with atomic_write(path) as file:
            file.write(json.dumps(state).encode())

    @classmethod
    def load(cls, path: Path, fingerprint: str) -> "ShardOutcome | None":
        """Read what `save` wrote; None if that was not done, or for another job."""
        try:
            state = json.loads(path.read_bytes())
            if state["fingerprint"] != fingerprint:
                return None
            record = None if state["record"] is None else ShardRecord.model_validate(state["record"])
            offset, size, samples = (np.array(column, np.int64) for column in state["rows"])
            rows = ShardRows(offset, size, samples, tuple(state["speakers"]))
            return cls(
                record, rows, tuple(Reject(*fields) for fields in state["rejects"]), state.get("lacked_ffmpeg", False)
            )
        except (FileNotFoundError, ValueError, KeyError, TypeError):
            return None


def _outcome_path(job: ShardJob) -> Path:
    return job.out / STATE_NAME / f"{job.name}.json"


def earlier_outcome(job: ShardJob) -> ShardOutcome | None:
    """What is on record of the very job, if its shard is there in the recorded size; None if it must be done."""
    outcome = ShardOutcome.load(_outcome_path(job), job.fingerprint)
    if outcome is not None and outcome.lacked_ffmpeg and not job.lacks_ffmpeg:
        return None
    if outcome is not None and outcome.record is not None:
        try:
            if (job.out / job.name).stat().st_size != outcome.record.bytes:
                return None
        except FileNotFoundError:
            return None
    return outcome


def build_shard(job: ShardJob) -> ShardOutcome:
    """Decode the files of a job, write its shard and the record that it is finished.

    Raises:
        OSError: the shard could not be written; nothing of it is left.
    """
    rejects: list[Reject] = []
    utterances = _usable_utterances(job, rejects)
    first = next(utterances, None)
    if first is None:
        empty = np.zeros(0, np.int64)
        record, rows = None, ShardRows(empty, empty, empty, ())
        # One from before its files were replaced may be there.
        (job.out / job.name).unlink(missing_ok=True)
    else:
        record, rows = write_shard(job.out / job.name, chain([first], utterances), job.audio_format)
    outcome = ShardOutcome(record, rows, tuple(rejects), job.lacks_ffmpeg)
    try:
        outcome.save(_outcome_path(job), job.fingerprint)
    except OSError:
        # A shard that is on no record is nobody's: the folder would hold more than it tells of.
        (job.out / job.name).unlink(missing_ok=True)
        raise
    return outcome


def build_shard_elsewhere(job: ShardJob) -> ShardOutcome:
    """`build_shard` on a machine that need not see the folders of the one that made the job.

    Raises:
        RunError: it does not, or one of the two has ffmpeg and the other has not. Files would otherwise be rejected for
            the machine's sake.
        OSError: the shard could not be written; nothing of it is left.
    """
    host = socket.gethostname()
    if is_lacking(job.paths) != job.lacks_ffmpeg:
        lacking = "where the preparation was started" if job.lacks_ffmpeg else f"on {host}"
        raise RunError(f"{job.name} holds files for ffmpeg, which is not installed {lacking}; install it everywhere")
    for folder in (job.source, job.out / STATE_NAME):
        if not folder.is_dir():
            raise RunError(
                f"the machine {host} sees no folder {folder}; SRC and OUT must lie, at the same path, "
                "on a file system that all machines of the Ray cluster share"
            )
    return build_shard(job)


def _usable_utterances(job: ShardJob, rejects: list[Reject]) -> Iterator[Utterance]:
    for number, path in enumerate(job.paths):
        samples = read_usable(job.source, path, job.min_samples)
        if isinstance(samples, Reject):
            rejects.append(samples)
            continue
        speaker = None if job.speakers is None else job.speakers[number]
        audio = encode_audio(samples, job.audio_format)
        yield Utterance(f"{job.first + number:09d}", audio, len(samples), path, speaker)
