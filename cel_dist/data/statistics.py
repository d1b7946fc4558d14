"""What a folder of shards holds, as far as it matters for training: lengths, levels, faults of the audio, duplicates.

    index of all N utterances -> lengths, what a batch is made of                     at once
    a sample of them, shard by shard, in processes                                    data/measuring.py, measurement.py
    digests and fingerprints of the sample -> duplicates                              data/duplicates.py
    all of it -> what to do                                                           data/advice.py

Who speaks is read only where a caller asks for it.
"""

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from cel_dist.data.advice import Advice, advice_on
from cel_dist.data.audio import SAMPLE_RATE
from cel_dist.data.duplicates import equal_groups, similar_pairs
from cel_dist.data.folder import Access, ShardFolder
from cel_dist.data.measurement import Measurement
from cel_dist.data.measuring import MOST_FINGERPRINTS, Names, choose, measured
from cel_dist.data.plan import ShortPolicy
from cel_dist.data.progress import Progress
from cel_dist.errors import CelError
from cel_dist.training.false_negatives import FalseNegatives

if TYPE_CHECKING:
    from cel_dist.config import Config

DEFAULT_SAMPLE = 10_000
"""Most utterances whose audio is measured."""

DURATION_EDGES = (0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 8.0, 10.0, 15.0, 20.0, 30.0, 60.0)
"""Where the bars of the histogram begin, in seconds; the last one has no end."""

CLIPPED_FROM = 1e-4
"""An utterance with this share of clipped samples counts as clipped."""

QUIET_DB = -45.0
"""An utterance below this level counts as quiet."""

OFFSET_FROM = 0.01
"""An utterance whose mean is so far from zero, of full scale, has a DC offset."""

PADDED_FROM = 0.1
"""An utterance of which this share is zeros at its ends counts as padded."""

_MOST_EXAMPLES = 20
_PERCENTILES = (5, 25, 50, 75, 95)


@dataclass(frozen=True)
class Batches:
    """What the data is to be cut into.

    Attributes:
        segment_samples: length of a segment in samples.
        batch_size: utterances of a global batch.
        short: what happens to utterances shorter than two segments.
        segments: segments that are cut from an utterance: 2, with labels 1.
    """

    segment_samples: int = 29_040
    batch_size: int = 200
    short: ShortPolicy = "drop"
    segments: int = 2

    @classmethod
    def of(cls, config: "Config") -> "Batches":
        """Those of a run."""
        return cls(config.read_samples, config.train.batch_size, config.data.short, 1 if config.labels.use else 2)


@dataclass(frozen=True)
class Drawn:
    """Which utterances are long enough, and what an epoch is made of.

    Attributes:
        segment_seconds: length of a segment.
        needed_seconds: length of all segments of an utterance.
        batch_size: as asked for.
        short: policy in force.
        short_utterances: shorter than all their segments, which `drop` leaves out.
        shorter_than_a_segment: these `overlap` leaves out, too.
        dropped: left out by the policy in force.
        usable: drawn once an epoch.
        batches_per_epoch: whole batches of an epoch.
    """

    segment_seconds: float
    needed_seconds: float
    batch_size: int
    short: str
    short_utterances: int
    shorter_than_a_segment: int
    dropped: int
    usable: int
    batches_per_epoch: int


@dataclass(frozen=True)
class Negatives:
    """How often the rows of a batch are pushed apart though one speaker said both.

    Attributes:
        source: `labels` of the index, or `estimate` of the number of speakers, who speak equally much then.
        pair_rate: chance that two rows of a batch are of one speaker.
        anchor_rate: chance that a row has such another one in its batch.
        pairs_per_batch: such pairs that a batch has on average.
    """

    source: str
    pair_rate: float
    anchor_rate: float
    pairs_per_batch: float


@dataclass(frozen=True)
class Levels:
    """Shares of the measured utterances, and percentiles (5, 25, 50, 75, 95) over them.

    Attributes:
        rms_db: levels, dB of full scale.
        peak_db: largest samples, dB of full scale.
        silence: shares of silent frames.
        clipped: share of utterances that clip; see `measurement.Measurement` for what that means, here and below.
        quiet: share of those below `QUIET_DB`.
        offset: share of those with a DC offset.
        padded: share of those with zeros at their ends.
        narrow: share of those without anything above 4.3 kHz.
        silence_of_all: share of silence in all the audio that was measured.
        padding_of_all: share of zeros at the ends in all of it.
    """

    rms_db: list[float]
    peak_db: list[float]
    silence: list[float]
    clipped: float
    quiet: float
    offset: float
    padded: float
    narrow: float
    silence_of_all: float
    padding_of_all: float


@dataclass(frozen=True)
class Duplicates:
    """Utterances of the sample that are there more than once.

    Attributes:
        exact: utterances that repeat an earlier one sample by sample.
        similar: pairs that sound alike, without the exact ones.
        compared: utterances whose fingerprints were compared.
        exact_examples: groups of names.
        similar_examples: pairs of names.
    """

    exact: int
    similar: int
    compared: int
    exact_examples: list[list[str]]
    similar_examples: list[list[str]]


@dataclass(frozen=True)
class Statistics:
    """What `statistics` found.

    Attributes:
        location: folder or URL.
        utterances: in all shards.
        hours: of audio in all shards.
        duration_edges: `DURATION_EDGES`.
        duration_counts: utterances from each edge to the next.
        duration_seconds: percentiles (5, 25, 50, 75, 95).
        drawn: what an epoch is made of.
        negatives: None without labels or an estimate.
        sampled: utterances whose audio was measured.
        unreadable: utterances of the sample that could not be read.
        levels: None if none could be read.
        duplicates: of the sample.
        advice: what to do, the gravest first.
    """

    location: str
    utterances: int
    hours: float
    duration_edges: list[float]
    duration_counts: list[int]
    duration_seconds: list[float]
    drawn: Drawn
    negatives: Negatives | None
    sampled: int
    unreadable: int
    levels: Levels | None
    duplicates: Duplicates
    advice: list[Advice] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, texts, lists and dictionaries, as JSON takes them."""
        return asdict(self)


def statistics(
    location: str | Path,
    batches: Batches | None = None,
    *,
    access: Access | None = None,
    sample: int = DEFAULT_SAMPLE,
    seed: int = 0,
    num_speakers: int | None = None,
    use_labels: bool = False,
    workers: int | None = None,
    progress: Progress | None = None,
) -> Statistics:
    """Look into a folder of shards.

    Lengths are of all utterances; audio is that of a sample. Of shards that must be downloaded or unpacked as few are
    used as give the sample: `cel prepare` has shuffled over all of them.

    Args:
        location: folder or URL.
        batches: what the data is to be cut into; default: that of the default configuration.
        access: how shards are read.
        sample: most utterances whose audio is measured.
        seed: of the sample.
        num_speakers: an estimate, for the rate of false negatives.
        use_labels: count that rate by the speakers in the index instead.
        workers: processes; default: the cores that this process may use.
        progress: told the number of utterances measured and to be measured.

    Raises:
        CelError: the folder is not what `cel prepare` writes, is empty, or has no labels where they are asked for.
    """
    batches = batches or Batches()
    shards = ShardFolder.open(location, access)
    if len(shards.index) == 0:
        raise CelError(f"{location} holds no utterances; prepare audio with 'cel prepare SRC --out {location}'")
    samples = np.asarray(shards.index.samples)
    drawn = _drawn(samples, batches)
    chosen = choose(shards, sample, seed)
    results = list(measured(shards, chosen, workers, progress))
    read = [(place, one) for place, one in zip(chosen.tolist(), results, strict=True) if one is not None]
    found = Statistics(
        location=str(location),
        utterances=len(samples),
        hours=float(samples.sum()) / SAMPLE_RATE / 3600,
        duration_edges=list(DURATION_EDGES),
        duration_counts=np.histogram(samples, np.array([*DURATION_EDGES, np.inf]) * SAMPLE_RATE)[0].tolist(),
        duration_seconds=_percentiles(samples / SAMPLE_RATE),
        drawn=drawn,
        negatives=_negatives(shards, batches, drawn, num_speakers, use_labels),
        sampled=len(chosen),
        unreadable=len(chosen) - len(read),
        levels=_levels([one for _, one in read], samples[[place for place, _ in read]]) if read else None,
        duplicates=_duplicates(shards, [place for place, _ in read], [one for _, one in read]),
    )
    found.advice.extend(advice_on(found))
    return found


def _percentiles(values: npt.ArrayLike) -> list[float]:
    return [float(value) for value in np.percentile(np.asarray(values, np.float64), _PERCENTILES)]


def _shortest(batches: Batches) -> int:
    needed = batches.segments * batches.segment_samples
    return {"drop": needed, "overlap": batches.segment_samples, "repeat": 1}[batches.short]


def _drawn(samples: npt.NDArray[np.int64], batches: Batches) -> Drawn:
    needed = batches.segments * batches.segment_samples
    usable = int(np.count_nonzero(samples >= _shortest(batches)))
    return Drawn(
        segment_seconds=batches.segment_samples / SAMPLE_RATE,
        needed_seconds=needed / SAMPLE_RATE,
        batch_size=batches.batch_size,
        short=batches.short,
        short_utterances=int(np.count_nonzero(samples < needed)),
        shorter_than_a_segment=int(np.count_nonzero(samples < batches.segment_samples)),
        dropped=len(samples) - usable,
        usable=usable,
        batches_per_epoch=usable // batches.batch_size,
    )


def _negatives(
    shards: ShardFolder, batches: Batches, drawn: Drawn, num_speakers: int | None, use_labels: bool
) -> Negatives | None:
    usable: npt.NDArray[np.int64] | int = drawn.usable
    speaker = np.zeros(0, np.int32)
    if use_labels:
        if not len(shards.index.speaker_names):
            raise CelError(
                f"{shards.location} has no labels; leave out --use-labels, or prepare with 'cel prepare --labels FILE'"
            )
        speaker = np.asarray(shards.index.speaker)
        usable = np.flatnonzero(np.asarray(shards.index.samples) >= _shortest(batches))
    rate = FalseNegatives(speaker, usable, num_speakers).expected
    if rate is None:
        return None
    size = min(batches.batch_size, max(drawn.usable, 1))
    return Negatives(
        source="labels" if use_labels else "estimate",
        pair_rate=rate,
        anchor_rate=1.0 - (1.0 - rate) ** (size - 1),
        pairs_per_batch=rate * size * (size - 1) / 2,
    )


def _levels(read: list[Measurement], samples: npt.NDArray[np.int64]) -> Levels:
    table = {
        name: np.array([getattr(one, name) for one in read], np.float64)
        for name in ("rms_db", "peak_db", "silence", "clipped", "padding", "offset", "is_narrow")
    }
    weights = samples / samples.sum()
    return Levels(
        rms_db=_percentiles(table["rms_db"]),
        peak_db=_percentiles(table["peak_db"]),
        silence=_percentiles(table["silence"]),
        clipped=float((table["clipped"] >= CLIPPED_FROM).mean()),
        quiet=float((table["rms_db"] < QUIET_DB).mean()),
        offset=float((np.abs(table["offset"]) >= OFFSET_FROM).mean()),
        padded=float((table["padding"] >= PADDED_FROM).mean()),
        narrow=float(table["is_narrow"].mean()),
        silence_of_all=float((table["silence"] * weights).sum()),
        padding_of_all=float((table["padding"] * weights).sum()),
    )


def _duplicates(shards: ShardFolder, places: list[int], read: list[Measurement]) -> Duplicates:
    groups = equal_groups(np.array([one.digest for one in read], np.uint64).reshape(-1, 2))
    repeats = {number for group in groups for number in group[1:]}
    # One of each group stands for all of it.
    alone = [number for number in range(min(len(read), MOST_FINGERPRINTS)) if number not in repeats]
    pairs = similar_pairs([read[number].words for number in alone])
    names = Names(shards)
    return Duplicates(
        exact=len(repeats),
        similar=len(pairs),
        compared=len(alone),
        exact_examples=[[names.of(places[number]) for number in group[:10]] for group in groups[:_MOST_EXAMPLES]],
        similar_examples=[
            [names.of(places[alone[number]]) for number in (pair.first, pair.second)] for pair in pairs[:_MOST_EXAMPLES]
        ],
    )
