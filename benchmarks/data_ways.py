"""The ways from stored utterances to batches that `benchmarks/data.py` compares, and the measurement of one of them.

Neither side imports what only the other one needs, so that the time to the first batch is its own.
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from data_corpus import Corpus
from torch import Tensor

from cel_dist.config_sections import AugmentSection
from cel_dist.data.folder import Access, ShardFolder
from cel_dist.data.plan import Plan
from cel_dist.data.stream import SegmentBatch, SegmentStream
from cel_dist.features import LogMel, segment_samples

SEGMENT_SAMPLES = segment_samples(180)
PROFILE = 3


@dataclass(frozen=True)
class Way:
    """One row of the table.

    Attributes:
        source: `files` read one by one (the per-item approach), or shards: `local`, `cache` or `http`.
        audio_format: `wav` or `flac`.
        output: `int16` segments, or `features` of augmented ones.
    """

    source: str
    audio_format: str
    output: str

    @property
    def is_per_item(self) -> bool:
        return self.source == "files"


@dataclass(frozen=True)
class Places:
    """What the ways read from.

    Attributes:
        corpus: trees, shards and bank.
        url: of the served shards.
        cache: that a way may use; the shards are in it, or it is empty.
    """

    corpus: Corpus
    url: str
    cache: Path


def batches(way: Way, places: Places, batch_size: int) -> Iterator[Tensor]:
    """Batches without end, read in this process: `[B, 2, T]` int16 or `[B, 2, 40, F]` float32."""
    if way.is_per_item:
        return _per_item(way, places, batch_size)
    stream = opened_stream(way, places, batch_size)
    if way.output == "int16":
        return (batch.segments for batch in stream)
    return _features(stream, places, batch_size)


def opened_stream(way: Way, places: Places, batch_size: int) -> SegmentStream:
    """The stream of a way that reads shards."""
    local = places.corpus.shards(way.audio_format)
    location = str(local) if way.source == "local" else f"{places.url}/{way.audio_format}"
    shards = ShardFolder.open(location, Access(cache=places.cache))
    plan = Plan(shards.index, segment_samples=SEGMENT_SAMPLES, batch_size=batch_size, short="drop", seed=0)
    return SegmentStream(shards, plan, slice(0, batch_size))


def _per_item(way: Way, places: Places, batch_size: int) -> Iterator[Tensor]:
    from per_item import per_item_loader

    pieces = places.corpus.pieces if way.output == "features" else None
    loader = per_item_loader(places.corpus.tree(way.audio_format), SEGMENT_SAMPLES, batch_size, pieces)
    while True:
        yield from loader


def _features(stream: SegmentStream, places: Places, batch_size: int) -> Iterator[Tensor]:
    stages = Stages(places.corpus.bank, torch.device("cpu"), batch_size)
    for batch in stream:
        yield stages.features(stages.augmented(batch, batch.segments))


class Stages:
    """What the training device does with the segments of a batch."""

    def __init__(self, bank: Path, device: torch.device, batch_size: int) -> None:
        from cel_dist.data.augment import Augment
        from cel_dist.data.bank import Bank

        self._augment = Augment(AugmentSection(profile=PROFILE), Bank.open(bank), seed=0)
        self._log_mel = LogMel().to(device)
        self._batch_size = batch_size

    @torch.no_grad()
    def augmented(self, batch: SegmentBatch, segments: Tensor) -> Tensor:
        rows = slice(0, self._batch_size)
        return self._augment(segments, epoch=batch.epoch, step=batch.step, rows=rows, batch_size=self._batch_size)

    @torch.no_grad()
    def features(self, waves: Tensor) -> Tensor:
        return self._log_mel(waves.flatten(0, 1)).unflatten(0, waves.shape[:2])


@dataclass(frozen=True)
class Measured:
    """What some batches took.

    Attributes:
        core_seconds: time of all threads of the process on a core, for one pair.
        seconds: time that passed, for one pair.
        bytes_read: what the process read from files, for one pair; pages of mapped files are not in it.
        bytes_fetched: what came from the server, for one pair.
        import_seconds: time that passed until everything was imported.
        first_batch_seconds: and from then until the first batch was there.
    """

    core_seconds: float
    seconds: float
    bytes_read: float
    bytes_fetched: float
    import_seconds: float
    first_batch_seconds: float


def measure(way: Way, places: Places, batch_size: int, least_seconds: float, import_seconds: float) -> Measured:
    """Read batches for at least so long; over HTTP, where the cache is empty before, the whole batches of one epoch."""
    fetches = way.source == "http"
    start = _Clock()
    source = batches(way, places, batch_size)
    pairs = len(next(source))
    first_batch_seconds = start.seconds
    if fetches:
        clock, least_pairs, least_seconds = start, places.corpus.utterances // batch_size * batch_size, 0.0
    else:
        # What only the first batch takes is no part of the rate.
        clock, pairs, least_pairs = _Clock(), 0, batch_size
    while pairs < least_pairs or clock.seconds < least_seconds:
        pairs += len(next(source))
    return Measured(
        core_seconds=clock.core_seconds / pairs,
        seconds=clock.seconds / pairs,
        bytes_read=clock.bytes_read / pairs,
        bytes_fetched=sum(path.stat().st_size for path in places.cache.glob("*.tar")) / pairs if fetches else 0.0,
        import_seconds=import_seconds,
        first_batch_seconds=first_batch_seconds,
    )


class _Clock:
    """What passed since it was made."""

    def __init__(self) -> None:
        self._begin = time.perf_counter(), time.process_time(), _bytes_read()

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self._begin[0]

    @property
    def core_seconds(self) -> float:
        return time.process_time() - self._begin[1]

    @property
    def bytes_read(self) -> int:
        return _bytes_read() - self._begin[2]


def _bytes_read() -> int:
    """Bytes that this process has read from files so far; the system counts sockets elsewhere."""
    fields = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(fields["rchar"])
