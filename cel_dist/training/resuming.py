"""Beginning a run in its folder, or going on from a checkpoint, all ranks alike."""

import secrets
import shutil
import socket
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from cel_dist.config import Config
from cel_dist.distributed import World
from cel_dist.engine import Engine
from cel_dist.engine_checkpoint import write_universal
from cel_dist.errors import CelError
from cel_dist.evaluation.embed import raised_together
from cel_dist.random_state import restore_random_state
from cel_dist.training.checkpoint import RANDOM, SavedRun
from cel_dist.training.start import Start, find_start


def agreed_start(config: Config, world: World, *, signature: dict[str, Any], resume: str) -> Start:
    """Where the run begins, as rank 0 finds it, which holds the run folder: what the ranks found before may have
    changed. The bytes of the checkpoint are compared with their checksums. Raises as `find_start`, on all ranks."""
    found: list[Start | None] = [None]
    with raised_together(world):
        if world.is_main:
            found[0] = find_start(config, signature=signature, num_ranks=world.size, resume=resume, contents=True)
    if world.size > 1:
        dist.broadcast_object_list(found, src=0)
    assert found[0] is not None
    return found[0]


def require_shared(run_dir: Path, world: World) -> None:
    """Raise CelError on all ranks unless they see the run folder of rank 0: each of them writes its part of it."""
    if world.size == 1:
        return
    # A name that nobody has asked for before: network file systems remember what was not there.
    names = [f".seen-by-all-{secrets.token_hex(8)}"]
    dist.broadcast_object_list(names, src=0)
    token = run_dir / names[0]
    try:
        with raised_together(world):
            if world.is_main:
                token.touch()
        with raised_together(world):
            if not token.exists():
                raise CelError(
                    f"run.dir={run_dir} is not the same folder on all nodes: {socket.gethostname()} does not see what "
                    "rank 0 writes there; put it on a disk that all nodes share"
                )
    finally:
        if world.is_main:
            token.unlink(missing_ok=True)


def go_on(
    engine: Engine, checkpoint: Path, saved: SavedRun, config: Config, world: World, device: torch.device
) -> None:
    """Put what a checkpoint has into the engine and the random generators of all ranks.

    What other ranks or another ZeRO stage wrote goes through the universal format, in a folder beside the run's
    checkpoints that is there for the time of it. States of random generators are of use to as many ranks only.

    Raises:
        RunError: files are damaged, or there is no room to convert them.
    """
    former_stage, stage = saved.config.engine.zero_stage, config.engine.zero_stage
    has_same_ranks = saved.num_ranks == world.size
    if former_stage == stage and (has_same_ranks or stage == 0):
        engine.load(checkpoint)
    else:
        folder = config.run.dir / "checkpoints" / f".universal-{checkpoint.name}"
        with raised_together(world):
            if world.is_main:
                write_universal(checkpoint, folder, stage=former_stage)
        engine.load_universal(folder, checkpoint)
        with raised_together(world):
            # All have read it when all are here.
            pass
        if world.is_main:
            shutil.rmtree(folder)
    if has_same_ranks:
        states = torch.load(checkpoint / RANDOM / f"rank-{world.rank:05d}.pt", weights_only=True)
        restore_random_state(states, device)
