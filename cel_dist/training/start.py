"""Where a run begins: from nothing, or from a checkpoint of the same experiment, and what of it still holds.

A run folder holds one experiment. Going on in it with other settings would give numbers that belong to none, so only
settings that leave the model alone may change on the way.
"""

import hashlib
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from cel_dist.config import Config
from cel_dist.config_file import flat
from cel_dist.description import DESCRIPTION_FILE, read_description
from cel_dist.errors import CelError
from cel_dist.training.checkpoint import SavedRun, TrainState, complete_checkpoints, read_checkpoint, require_whole
from cel_dist.training.result import TrainResult
from cel_dist.training.schedule import num_steps

logger = logging.getLogger(__name__)

# Settings, or whole sections, that a run may change when it goes on.
_FREE = (
    "checkpoint",
    "data.cache_dir",
    "data.cache_gib",
    "data.max_fault_rate",
    "data.num_speakers",
    "data.patience_seconds",
    "data.prefetch_mib",
    "data.verify",
    "data.workers",
    "engine",
    "eval",
    "loss.exchange",
    "run",
    "tracking",
    "train.epochs",
    "train.log_every",
    "train.max_skipped_steps",
    "train.max_steps",
    "train.profile_steps",
    "train.threads",
)
_MANIFESTS = "manifests"
# Without these a checkpoint cannot be read, or its position means nothing, in whatever run.
FIXED = (
    "encoder.name",
    "encoder.embedding_dim",
    "encoder.pooling",
    "features.num_mels",
    "head.sub_centres",
    "head.weights",
    "labels.speeds_are_speakers",
    "labels.use",
    "loss.similarity",
    "train.batch_size",
)


@dataclass(frozen=True)
class Start:
    """Where a run begins.

    Attributes:
        state: position.
        checkpoint: what to load; None begins with the initial encoder.
        saved: what it says of itself.
        is_own: whether it is one of this run.
        begun_from: the checkpoint that the run was told to go on from, now or before; None if it found its own.
        result: outcome of a run that has already reached its end, else None.
        remarks: what a user should know about the continuation.
    """

    state: TrainState = field(default_factory=TrainState)
    checkpoint: Path | None = None
    saved: SavedRun | None = None
    is_own: bool = False
    begun_from: str | None = None
    result: TrainResult | None = None
    remarks: tuple[str, ...] = ()


def signature(
    *, steps_per_epoch: int, class_names: Sequence[str] = (), manifest_sha256: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """What a checkpoint depends on besides the configuration: the position of a run on the steps of an epoch, class
    weights on whom they belong to, and at which speed; and what its data are, wherever they lie."""
    of_data: dict[str, Any] = {"steps per epoch": steps_per_epoch}
    if manifest_sha256:
        of_data[_MANIFESTS] = dict(manifest_sha256)
    if class_names:
        digest = hashlib.sha256("\n".join(class_names).encode()).hexdigest()[:16]
        of_data["speakers"] = f"{len(class_names)} ({digest})"
    return of_data


def find_start(
    config: Config, *, signature: dict[str, Any], num_ranks: int | None, resume: str, contents: bool = False
) -> Start:
    """Decide where the run begins; changes nothing.

    Args:
        config: the run.
        signature: of its data.
        num_ranks: processes of the run; None if that is not known yet.
        resume: as in `cel_dist.training.trainer.train`.
        contents: compare all bytes of a checkpoint with their checksums, and not the sizes of its files alone.

    Raises:
        CelError: the checkpoint is incomplete, damaged, or does not fit the run, or the run folder holds another run.
    """
    own = config.run.dir / "checkpoints"
    complete = complete_checkpoints(own)
    if resume == "none" and complete:
        raise CelError(
            f"{config.run.dir} already holds a run (up to {complete[-1].name}); choose another run.dir, or continue it "
            "with --resume auto"
        )
    if resume == "none" or (resume == "auto" and not complete):
        return Start()
    named = None if resume == "auto" else str(Path(resume).resolve())
    newest = None if named is None or not complete else _newest_whole(complete, contents=contents)
    if named is None or (newest is not None and newest[1].begun_from == named):
        # Told the same again, as a scheduler tells it, the run goes on and does not begin once more.
        checkpoint, saved, remarks = newest or _newest_whole(complete, contents=contents)
        if named is not None:
            remarks.append(
                f"the run began from {resume} before and has come to {checkpoint.name} since, where it goes on"
            )
    else:
        checkpoint, remarks = Path(resume), []
        saved = _read_whole(checkpoint, contents=contents)
    is_own = checkpoint.resolve() in [path.resolve() for path in complete]
    if complete and not is_own:
        raise CelError(
            f"{config.run.dir} already holds a run (up to {complete[-1].name}), which cannot go on from {checkpoint}; "
            "choose another run.dir, or continue it with --resume auto"
        )
    steps_per_epoch = signature["steps per epoch"]
    changed = _changed_settings(saved.config, config)
    remarks += _other_data(saved.signature.get(_MANIFESTS, {}), signature.get(_MANIFESTS, {}), changed, checkpoint)
    signed = [key for key in signature if key != _MANIFESTS]
    changed |= {key: (saved.signature.get(key), signature[key]) for key in signed}
    changed = {key: (former, now) for key, (former, now) in changed.items() if former != now}
    remarks += _require_same_experiment(checkpoint, changed, signed, is_own=is_own)
    remarks += _other_world(saved, config, num_ranks)
    total, former_total = num_steps(config, steps_per_epoch), num_steps(saved.config, steps_per_epoch)
    if config.optim.schedule == "cosine" and total != former_total:
        remarks.append(
            f"the cosine schedule now ends at step {total} instead of {former_total}: the learning rate leaves its "
            f"former curve at step {saved.state.step}"
        )
    state = _what_still_holds(saved, config, is_own=is_own)
    result = TrainResult.read(config.run.dir) if is_own and checkpoint == complete[-1] else None
    if result and not (result.steps == saved.state.step >= total):
        result = None
    if result is None and saved.state.step > total:
        remarks.append(
            f"train.epochs and train.max_steps end the run at step {total}, and {checkpoint} is at step "
            f"{saved.state.step}: nothing is trained, the run is finished as it is; raise them to go on instead"
        )
    return Start(state, checkpoint, saved, is_own, named or saved.begun_from, result, tuple(remarks))


def _read_whole(checkpoint: Path, *, contents: bool) -> SavedRun:
    saved = read_checkpoint(checkpoint)
    require_whole(checkpoint, saved, contents=contents)
    return saved


def _newest_whole(complete: list[Path], *, contents: bool) -> tuple[Path, SavedRun, list[str]]:
    """The newest checkpoint that is as it was written, and a remark for each one that is not."""
    remarks: list[str] = []
    for checkpoint in reversed(complete):
        try:
            return checkpoint, _read_whole(checkpoint, contents=contents), remarks
        except CelError as error:
            remarks.append(f"{error}; going on from the checkpoint before it")
            damage = error
    raise CelError(
        f"{damage}; no checkpoint before it is whole either: remove {complete[0].parent} to start anew, or restore one"
    )


def _other_world(saved: SavedRun, config: Config, num_ranks: int | None) -> list[str]:
    """A remark where other ranks or another stage go on."""
    before = saved.num_ranks, saved.config.engine.zero_stage
    now = saved.num_ranks if num_ranks is None else num_ranks, config.engine.zero_stage
    if before == now:
        return []
    (former_ranks, former_stage), (ranks, stage) = before, now
    return [
        f"the checkpoint was written by {former_ranks} ranks under ZeRO {former_stage}, {ranks} under ZeRO {stage} go "
        "on from it: the same parameters and optimizer, sums in another order"
    ]


def _other_data(
    former: Mapping[str, str], now: Mapping[str, str], changed: dict[str, tuple[Any, Any]], checkpoint: Path
) -> list[str]:
    """Take data that were only moved out of what changed; a remark on those that are others in the same place."""
    remarks = []
    for name in former.keys() & now.keys():
        setting = f"data.{name}"
        if former[name] == now[name]:
            changed.pop(setting, None)
        elif setting not in changed:
            remarks.append(f"{setting} has other data than when {checkpoint} was written: its manifest is another one")
    return sorted(remarks)


def _require_same_experiment(
    checkpoint: Path, changed: Mapping[str, tuple[Any, Any]], signed: list[str], *, is_own: bool
) -> list[str]:
    """Refuse what must not have changed; what another run may do in another way becomes a remark."""
    fixed = [key for key in changed if key in FIXED or key in signed]
    if not changed or not (fixed or is_own):
        return [f"{key} is now {now}, up to {checkpoint} it was {former}" for key, (former, now) in changed.items()]
    remedy = (
        "start a new run in another run.dir (encoder.init takes a trained encoder over)"
        if fixed
        else f"go on with other settings in another run.dir, with --resume {checkpoint}"
    )
    named = changed if is_own else {key: changed[key] for key in fixed}
    before = ", ".join(f"{key}={former}" for key, (former, _) in named.items())
    after = ", ".join(f"{key}={now}" for key, (_, now) in named.items())
    raise CelError(
        f"checkpoint {checkpoint} was written with {before}, this run has {after}; take the former values, or {remedy}"
    )


def _what_still_holds(saved: SavedRun, config: Config, *, is_own: bool) -> TrainState:
    """The position without what belongs to another run, another validation list, or a model that is not there."""
    state = saved.state
    same_list = (saved.config.eval.trials, saved.config.eval.root) == (config.eval.trials, config.eval.root)
    if not (is_own and same_list):
        return TrainState(step=state.step)
    if state.best_step is not None and _step_of_model(config.run.dir / "model") != state.best_step:
        return replace(state, best_eer=None, best_step=None, evaluated_step=None)
    return state


def _step_of_model(folder: Path) -> int | None:
    try:
        return read_description(folder / DESCRIPTION_FILE).training.step
    except CelError:
        return None


def _changed_settings(former: Config, now: Config) -> dict[str, tuple[Any, Any]]:
    before = dict(flat(former.model_dump(mode="json")))
    after = dict(flat(now.model_dump(mode="json")))
    return {
        key: (before.get(key), after.get(key))
        # Of plug-ins a setting may be there in one of the two alone.
        for key in dict.fromkeys([*after, *before])
        if before.get(key) != after.get(key) and not any(key == free or key.startswith(f"{free}.") for free in _FREE)
    }
