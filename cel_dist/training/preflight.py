"""Everything about a run that can be found wrong before a process is started for it."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cel_dist.config import Config
from cel_dist.data.augment import Augment
from cel_dist.data.bank import Bank
from cel_dist.data.folder import DEFAULT_CACHE, Access, ShardFolder
from cel_dist.data.index import Index
from cel_dist.data.plan import BatchPlan, Plan
from cel_dist.data.plugin_augment import PluginAugment
from cel_dist.data.speaker_plan import SpeakerPlan
from cel_dist.distributed import World
from cel_dist.encoders import find_encoder
from cel_dist.errors import CelError
from cel_dist.evaluation.embed import file_sizes
from cel_dist.evaluation.metadata import Metadata
from cel_dist.evaluation.trials import Trials
from cel_dist.training.classes import class_names, require_head
from cel_dist.training.objective import initial_encoder
from cel_dist.training.start import Start, find_start, signature


@dataclass(frozen=True)
class Checked:
    """Data of a run, opened, and where the run begins.

    Attributes:
        shards: the utterances.
        plan: which of them form batches.
        bank: noises and rooms.
        start: where the run begins.
        class_names: whom a run with labels tells apart, in the order of their classes; of others none.
    """

    shards: ShardFolder
    plan: BatchPlan
    bank: Bank | None
    start: Start
    class_names: tuple[str, ...] = ()

    @property
    def manifest_sha256(self) -> dict[str, str]:
        """SHA-256 of `manifest.json` of the shards and of `bank.json`."""
        return _manifest_sha256(self.shards, self.bank)

    @property
    def signature(self) -> dict[str, Any]:
        """What a checkpoint of the run depends on besides the configuration."""
        return _signature(self.shards, self.plan, self.bank, self.class_names)


def _manifest_sha256(shards: ShardFolder, bank: Bank | None) -> dict[str, str]:
    manifests = {"shards": shards.manifest, "bank": None if bank is None else bank.manifest}
    return {name: read.sha256 for name, read in manifests.items() if read is not None and read.sha256 is not None}


def _signature(shards: ShardFolder, plan: BatchPlan, bank: Bank | None, names: tuple[str, ...]) -> dict[str, Any]:
    return signature(
        steps_per_epoch=plan.steps_per_epoch, class_names=names, manifest_sha256=_manifest_sha256(shards, bank)
    )


def preflight(config: Config, num_ranks: int | None, resume: str) -> Checked:
    """Check what a run needs, in seconds and without writing anything: data, encoder, validation list, run folder,
    checkpoint.

    Args:
        config: the run.
        num_ranks: processes of the run; None if only the launcher will know.
        resume: as in `cel_dist.training.trainer.train`.

    Raises:
        CelError: something is missing, damaged, or does not fit the rest.
    """
    if num_ranks is not None:
        World(size=num_ranks).rows(config.rows, config.labels.utterances if config.labels.use else 1)
        _require_rows(config, num_ranks)
    _require_usable_folder(config.run.dir)
    data = config.data
    shards = ShardFolder.open(
        data.shards,
        Access(
            verify=data.verify == "sha256",
            cache=data.cache_dir or DEFAULT_CACHE,
            cache_bytes=round(data.cache_gib * 2**30),
            patience=data.patience_seconds,
        ),
    )
    plan, names = _plan(config, shards.index)
    shards.files.require_room(plan.max_shards_at_once, plan.cache_remedy)
    bank = Bank.open(config.data.bank) if config.data.bank else None
    Augment(config.augment, bank, config.train.seed)
    PluginAugment(config.augment.extra, config.train.seed)
    start = find_start(
        config,
        signature=_signature(shards, plan, bank, names),
        num_ranks=num_ranks,
        resume=resume,
    )
    if start.checkpoint is None:
        initial_encoder(config)
        if config.classifies:
            require_head(config, names)
    if start.result is None and config.eval.trials is not None and config.eval.root is not None:
        trials = Trials.read(config.eval.trials)
        file_sizes(config.eval.root, trials.files)
        if config.eval.metadata is not None:
            Metadata.read(config.eval.metadata, trials.files).check(trials)
    return Checked(shards, plan, bank, start, names)


def _plan(config: Config, index: Index) -> tuple[BatchPlan, tuple[str, ...]]:
    """The plan of a run, and the names of the classes of one with labels."""
    data, labels = config.data, config.labels
    if not labels.use:
        plan = Plan(
            index,
            segment_samples=config.read_samples,
            batch_size=config.train.batch_size,
            short=data.short,
            seed=config.train.seed,
            window=data.window_shards,
            remainder=data.remainder,
        )
        return plan, ()
    of_speakers = SpeakerPlan(
        index,
        segment_samples=config.read_samples,
        speakers_per_batch=config.rows,
        utterances_per_speaker=labels.utterances,
        max_segments=labels.max_segments,
        too_few=labels.too_few,
        short=data.short,
        seed=config.train.seed,
        remainder=data.remainder,
    )
    return of_speakers, class_names(config, of_speakers.class_names)


def _require_rows(config: Config, num_ranks: int) -> None:
    """Raise CelError if a forward pass has fewer rows than the encoder's batch norm takes."""
    needed, chunks = find_encoder(config.encoder.name).min_rows, config.train.encode_chunks
    on_rank = config.rows // num_ranks
    part = -(-on_rank // chunks)
    # The rest is the last part.
    rows = on_rank - (-(-on_rank // part) - 1) * part
    if config.encoder.batch_norm == "global":
        rows *= num_ranks
    if config.encoder.views == "joint":
        rows *= config.labels.utterances if config.labels.use else 2
    if rows < needed:
        raise CelError(
            f"encoder.name={config.encoder.name} normalises over {needed} rows or more, and train.batch_size="
            f"{config.train.batch_size} on {num_ranks} ranks with train.encode_chunks={chunks} leaves {rows} for a "
            "forward pass; raise train.batch_size, lower train.encode_chunks, or set encoder.batch_norm=global"
        )


def _require_usable_folder(folder: Path) -> None:
    """Raise CelError unless `folder` can be written into, or made."""
    nearest = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    if not nearest.is_dir():
        raise CelError(f"run.dir={folder}: {nearest} is a file; name a folder")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise CelError(f"run.dir={folder}: {nearest} cannot be written into; name another folder")
