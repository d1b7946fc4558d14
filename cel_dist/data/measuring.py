"""Utterances drawn from shards and measured in processes, in memory for one utterance a process and all results."""

import json
import os
from collections.abc import Iterator
from contextlib import closing, suppress
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from cel_dist.data.archive import ShardFaultError, members
from cel_dist.data.audio import AudioError, read_audio
from cel_dist.data.folder import ShardFolder
from cel_dist.data.measurement import Measurement, measure
from cel_dist.data.pool import run_jobs
from cel_dist.data.progress import Progress
from cel_dist.data.shard_files import LocalShards, ShardFiles, ShardUnavailableError

MOST_FINGERPRINTS = 50_000
"""Utterances of a sample whose fingerprints are made and compared: what they take grows with their number."""

# Few enough that a bar moves and a worker holds little, enough that opening the shard costs nothing beside it.
_UTTERANCES_A_JOB = 200


class Job(NamedTuple):
    """Some utterances of one shard."""

    files: ShardFiles
    places: list[tuple[int, int]]
    with_words: bool


def choose(shards: ShardFolder, sample: int, seed: int) -> npt.NDArray[np.int64]:
    """Ascending places in the index of `sample` utterances to measure, or of all if there are no more."""
    generator = np.random.default_rng(seed)
    num_utterances = len(shards.index)
    if sample >= num_utterances:
        return np.arange(num_utterances)
    if isinstance(shards.files, LocalShards):
        return np.sort(generator.choice(num_utterances, sample, replace=False))
    starts = shards.index.shard_starts
    order = generator.permutation(len(starts) - 1)
    enough = int(np.searchsorted(np.cumsum(np.diff(starts)[order]), sample)) + 1
    places = np.concatenate([np.arange(starts[shard], starts[shard + 1]) for shard in order[:enough]])
    return np.sort(generator.choice(places, sample, replace=False))


def _jobs(shards: ShardFolder, chosen: npt.NDArray[np.int64]) -> Iterator[Job]:
    index = shards.index
    bounds = np.searchsorted(chosen, index.shard_starts)
    for shard, (begin, end) in enumerate(zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True)):
        for first in range(begin, end, _UTTERANCES_A_JOB):
            places = chosen[first : min(end, first + _UTTERANCES_A_JOB)]
            where = list(zip(index.offset[places].tolist(), index.size[places].tolist(), strict=True))
            yield Job(shards.files.part(shard), where, first < MOST_FINGERPRINTS)


def measured(
    shards: ShardFolder, chosen: npt.NDArray[np.int64], workers: int | None, progress: Progress | None
) -> Iterator[Measurement | None]:
    """Measure some utterances, and yield the results in their order; None for those that cannot be read.

    Args:
        shards: where they lie.
        chosen: their places in the index, ascending.
        workers: processes; default: the cores that this process may use.
        progress: told the number of utterances measured and to be measured.
    """
    bounds = np.diff(np.searchsorted(chosen, shards.index.shard_starts))
    num_jobs = int((-(-bounds // _UTTERANCES_A_JOB)).sum())
    done = 0
    with closing(run_jobs(measure_some, _jobs(shards, chosen), num_jobs, workers)) as results:
        for part in results:
            yield from part
            done += len(part)
            if progress is not None:
                progress(done, len(chosen))


def measure_some(job: Job) -> list[Measurement | None]:
    """Measure some utterances of a shard; None for those that cannot be read."""
    try:
        descriptor = job.files.open(0)
    except ShardUnavailableError:
        return [None] * len(job.places)
    found: list[Measurement | None] = []
    try:
        for offset, size in job.places:
            try:
                found.append(measure(read_audio(os.pread(descriptor, size, offset)), with_words=job.with_words))
            except (AudioError, OSError):
                found.append(None)
    finally:
        os.close(descriptor)
    return found


class Names:
    """What utterances are called: the path that they were prepared from, else shard and member."""

    def __init__(self, shards: ShardFolder) -> None:
        self._shards = shards
        self._of_shard: dict[int, dict[int, str]] = {}

    def of(self, place: int) -> str:
        """The name of the utterance at a place in the index."""
        shard = int(self._shards.index.shard[place])
        if shard not in self._of_shard:
            self._of_shard[shard] = self._read(shard)
        offset = int(self._shards.index.offset[place])
        name = self._shards.manifest.shards[shard].name
        return self._of_shard[shard].get(offset, f"{name} at byte {offset}")

    def _read(self, shard: int) -> dict[int, str]:
        """Names by the offset of the audio."""
        paths: dict[str, str] = {}
        audio: dict[int, str] = {}
        try:
            descriptor = self._shards.files.open(shard)
        except ShardUnavailableError:
            return {}
        try:
            with suppress(ShardFaultError, OSError):
                for member in members(descriptor):
                    key, _, suffix = member.name.rpartition(".")
                    if suffix == "json":
                        with suppress(ValueError, KeyError, TypeError):
                            paths[key] = str(json.loads(os.pread(descriptor, member.size, member.offset))["path"])
                    else:
                        audio[member.offset] = key
        finally:
            os.close(descriptor)
        name = self._shards.manifest.shards[shard].name
        return {offset: paths.get(key, f"{name} sample {key}") for offset, key in audio.items()}
