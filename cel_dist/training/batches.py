"""What a training step begins with: features of this rank's rows of the next global batch."""

import logging
import time
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cel_dist.config import Config
from cel_dist.copies import to_device
from cel_dist.data.augment import Augment
from cel_dist.data.folder import ShardFolder
from cel_dist.data.plugin_augment import PluginAugment
from cel_dist.data.remote import is_remote
from cel_dist.data.spec_augment import SpecAugment
from cel_dist.data.speed import SpeedPerturbation
from cel_dist.data.stream import SegmentBatch, SegmentStream
from cel_dist.distributed import World
from cel_dist.network import describe, front_end
from cel_dist.training.false_negatives import FalseNegatives
from cel_dist.training.preflight import Checked
from cel_dist.training.profile import named

logger = logging.getLogger(__name__)

# Beyond it a damaged shard would fill the log; the count goes on in the metrics.
_FAULTS_SHOWN = 20


class TrainBatch(NamedTuple):
    """This rank's rows of a global batch, augmented, on the training device.

    Attributes:
        epoch: epoch of the batch.
        step: step of the batch in its epoch.
        ids: [B] int64 sample ids; with labels the classes of the speakers.
        utterances: [B, V] int64 on the CPU, places in the index.
        features: [B, V, M, F].
        num_faults: rows whose utterance could not be read, so that another one is in its place.
        waited: seconds spent waiting for the readers.
        false_negatives: their true rate in the global batch; None where speakers are not known, and on ranks other than
            0.
    """

    epoch: int
    step: int
    ids: Tensor
    utterances: Tensor
    features: Tensor
    num_faults: int
    waited: float
    false_negatives: float | None


def num_readers(wanted: int | None, shards: ShardFolder, device: torch.device) -> int:
    """Reader processes of a rank: as many as are wanted, else by what they are worth.

    Beside a CPU that trains, cutting segments out of local WAV is some thousandth of the step, and readers would take
    their time from the same cores; the start of a reader imports torch.
    """
    if wanted is not None:
        return wanted
    is_quick = shards.manifest.audio_format == "wav" and not is_remote(shards.location)
    return 0 if is_quick and device.type == "cpu" else 1


class Batches:
    """Endless iterator over the batches of this rank.

    Args:
        config: the run.
        checked: its data, opened.
        world: rank and size.
        device: where augmentation and features are computed.
    """

    def __init__(self, config: Config, checked: Checked, world: World, device: torch.device) -> None:
        self._plan, self._world, self._device = checked.plan, world, device
        self._rows = world.rows(config.rows)
        # The classes of a speed lie behind those of the one before.
        by_speed = config.labels.speeds_are_speakers
        self._classes_a_speed = len(checked.class_names) // len(config.augment.speeds) if by_speed else 0
        self.stream = SegmentStream(
            checked.shards,
            checked.plan,
            self._rows,
            num_readers(config.data.workers, checked.shards, device),
            prefetch_bytes=round(config.data.prefetch_mib * 2**20),
            max_fault_rate=config.data.max_fault_rate,
            pinned=device.type == "cuda",
        )
        index = checked.shards.index
        # With labels no negative is false.
        self.false_negatives = (
            None
            if config.labels.use
            else FalseNegatives(
                index.speaker,
                # A list of all utterances takes memory that grows with them.
                checked.plan.usable() if len(index.speaker_names) else len(checked.plan),
                config.data.num_speakers,
            )
        )
        self._augment = Augment(config.augment, checked.bank, config.train.seed)
        self._extra = PluginAugment(config.augment.extra, config.train.seed).to(device)
        self._features = front_end(describe(config)).to(device)
        self._speed = SpeedPerturbation(config.augment.speeds, config.segment_samples, config.train.seed).to(device)
        self._masks = SpecAugment(config.augment, config.train.seed)
        self._num_faults = 0

    def state_dict(self) -> dict[str, int]:
        """Epoch and step of the batch that comes next."""
        return self.stream.state_dict()

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Let the batch of `state` come next."""
        self.stream.load_state_dict(state)

    def __iter__(self) -> "Batches":
        return self

    @torch.no_grad()
    def __next__(self) -> TrainBatch:
        """The next batch. Raises RunError as `SegmentStream` does."""
        begin = time.perf_counter()
        with named("read"):
            batch = next(self.stream)
        waited = time.perf_counter() - begin
        self._report(batch)
        rate = None
        if self._world.is_main and self.false_negatives:
            # Without labels the first view's utterance is the row's.
            rate = self.false_negatives.rate(self._plan.batch(batch.epoch, batch.step).utterances[:, 0])
        segments = batch.segments.to(self._device, non_blocking=True)
        size = self._plan.batch_size
        place: Any = {"epoch": batch.epoch, "step": batch.step, "rows": self._rows, "batch_size": size}
        with named("augment"):
            waves = self._extra(self._augment(self._speed(segments, **place), **place), **place)
        with named("features"):
            features: Tensor = self._features(waves.flatten(0, 1)).unflatten(0, waves.shape[:2])
            features = self._masks(features, **place)
        ids = batch.ids.to(self._device, non_blocking=True)
        if self._classes_a_speed:
            # The same voice at another speed is that of somebody else.
            ids = ids + self._classes_a_speed * to_device(self._speed.drawn(**place), ids.device)
        return TrainBatch(batch.epoch, batch.step, ids, batch.utterances, features, len(batch.faults), waited, rate)

    def close(self) -> None:
        """End the reader processes."""
        self.stream.close()

    def _report(self, batch: SegmentBatch) -> None:
        for fault in batch.faults:
            self._num_faults += 1
            if self._num_faults <= _FAULTS_SHOWN:
                logger.warning("skipped: %s", fault)
            if self._num_faults == _FAULTS_SHOWN:
                logger.warning("further utterances that cannot be read are only counted, as 'faults' in the metrics")
