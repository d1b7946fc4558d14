"""Everything about a run that can be found wrong before a process is started for it."""

import os
from dataclasses import dataclass
from pathlib import Path

from cel_dist.config import Config
from cel_dist.data.augment import Augment
from cel_dist.data.bank import Bank
from cel_dist.data.folder import DEFAULT_CACHE, Access, ShardFolder
from cel_dist.data.plan import Plan
from cel_dist.distributed import World
from cel_dist.errors import CelError
from cel_dist.evaluation.embed import file_sizes
from cel_dist.evaluation.metadata import Metadata
from cel_dist.evaluation.trials import Trials
from cel_dist.training.objective import initial_encoder
from cel_dist.training.start import Start, find_start


@dataclass(frozen=True)
class Checked:
    """Data of a run, opened, and where the run begins."""

    shards: ShardFolder
    plan: Plan
    bank: Bank | None
    start: Start


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
        World(size=num_ranks).rows(config.train.batch_size)
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
    plan = Plan(
        shards.index,
        segment_samples=config.segment_samples,
        batch_size=config.train.batch_size,
        short=data.short,
        seed=config.train.seed,
        window=data.window_shards,
        remainder=data.remainder,
    )
    shards.files.require_room(plan.max_shards_at_once)
    bank = Bank.open(config.data.bank) if config.data.bank else None
    Augment(config.augment, bank, config.train.seed)
    start = find_start(config, steps_per_epoch=plan.steps_per_epoch, num_ranks=num_ranks, resume=resume)
    if start.checkpoint is None:
        initial_encoder(config)
    if start.result is None and config.eval.trials is not None and config.eval.root is not None:
        trials = Trials.read(config.eval.trials)
        file_sizes(config.eval.root, trials.files)
        if config.eval.metadata is not None:
            Metadata.read(config.eval.metadata, trials.files).check(trials)
    return Checked(shards, plan, bank, start)


def _require_usable_folder(folder: Path) -> None:
    """Raise CelError unless `folder` can be written into, or made."""
    nearest = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    if not nearest.is_dir():
        raise CelError(f"run.dir={folder}: {nearest} is a file; name a folder")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise CelError(f"run.dir={folder}: {nearest} cannot be written into; name another folder")
