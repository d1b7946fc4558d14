"""What a checkpoint costs a training: how long a rank waits for it, and when it is on disk.

    python benchmarks/checkpoints.py                    # two ranks, the shipped encoder, ZeRO 0, 2 and 3
    python benchmarks/checkpoints.py --times 20 --results DIR

Saving is done by the engine and the store that `cel train` uses, between training steps on features that do not
change. Every save is timed twice: until training may go on, and until the checkpoint is on disk, which is waited for
here, so that nothing is written beside the next step.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from cel_dist.distributed import free_port

RESULTS = Path(__file__).resolve().parent / "results"
RANKS, STAGES, BATCH, FRAMES = 2, (0, 2, 3), 16, 180


def measure(stage: int, times: int, folder: Path) -> dict[str, Any]:
    """Seconds of this rank: a step, a save, and until it is on disk; each as `spread`."""
    from cel_dist.config_file import dump_config, parse_config
    from cel_dist.distributed import World
    from cel_dist.engine import Engine
    from cel_dist.training.checkpoint import SavedRun, TrainState
    from cel_dist.training.checkpoint_store import CheckpointStore
    from cel_dist.training.objective import new_encoder, new_objective
    from cel_dist.training.validation import VERSIONS, Validation

    world, device = World.from_environment(), torch.device("cpu")
    settings = {
        "data": {"shards": "none"},
        "augment": {"profile": 0},
        "train": {"batch_size": BATCH},
        "engine": {"zero_stage": stage},
        "run": {"dir": str(folder)},
    }
    config = parse_config(settings, "benchmark")
    objective = new_objective(config, new_encoder(config), torch.distributed.group.WORLD, on_gpu=False)
    engine = Engine(objective, config, world, device)
    validation = Validation(config, world, device, steps_per_epoch=100)
    store = CheckpointStore(folder / f"stage-{stage}", world, device, keep_last=1, config_text=dump_config(config))
    generator = torch.Generator().manual_seed(world.rank)
    features = torch.randn(BATCH // world.size, 2, 40, FRAMES, generator=generator)
    seconds: dict[str, list[float]] = {"step": [], "save": [], "on disk": []}
    for turn in range(1, times + 2):
        begin = time.perf_counter()
        engine.forward_backward(features)
        engine.step(1e-3)
        seconds["step"].append(time.perf_counter() - begin)
        saved = SavedRun(TrainState(step=turn), {}, {}, {}, world.size, None, VERSIONS, config)
        torch.distributed.barrier()
        begin = time.perf_counter()
        store.save(engine, validation.model(engine, turn), saved)
        seconds["save"].append(time.perf_counter() - begin)
        store.settle()
        seconds["on disk"].append(time.perf_counter() - begin)
    store.close()
    files = store.last().rglob("*")  # type: ignore[union-attr]
    size = sum(path.stat().st_size for path in files if path.is_file())
    return {"stage": stage, "bytes": size, **{name: spread(values[1:]) for name, values in seconds.items()}}


def spread(values: list[float]) -> list[float]:
    """Median, least, most."""
    return [statistics.median(values), min(values), max(values)]


def rank_main(times: int, folder: Path) -> None:
    from cel_dist.config_sections import EngineSection
    from cel_dist.distributed import World
    from cel_dist.process_group import process_group

    torch.set_num_threads(1)
    with process_group(World.from_environment(), EngineSection()):
        rows = [measure(stage, times, folder) for stage in STAGES]
        if os.environ["RANK"] == "0":
            (folder / "rows.json").write_text(json.dumps(rows))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--times", type=int, default=20, help="saves of each stage that are timed")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder for checkpoints.json and .md")
    parser.add_argument("--rank-folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.rank_folder:
        rank_main(options.times, options.rank_folder)
        return
    with tempfile.TemporaryDirectory() as folder:
        place = {"WORLD_SIZE": str(RANKS), "LOCAL_WORLD_SIZE": str(RANKS), "MASTER_ADDR": "127.0.0.1"}
        place["MASTER_PORT"] = str(free_port())
        command = [sys.executable, __file__, "--times", str(options.times), "--rank-folder", folder]
        ranks = [
            subprocess.Popen(command, env={**os.environ, **place, "RANK": str(rank), "LOCAL_RANK": str(rank)})
            for rank in range(RANKS)
        ]
        codes = [process.wait() for process in ranks]
        if any(codes):
            sys.exit("a rank failed; its words are above")
        rows = json.loads(Path(folder, "rows.json").read_text())
    where = (
        f"{os.cpu_count()} cores, {platform.machine()}, torch {version('torch')}, DeepSpeed {version('deepspeed')}, "
        f"gloo, {RANKS} ranks of a thread each, batch {BATCH}, {FRAMES} frames, shipped encoder, "
        f"{options.times} saves of each stage, one run"
    )
    options.results.mkdir(parents=True, exist_ok=True)
    (options.results / "checkpoints.json").write_text(json.dumps({"where": where, "rows": rows}, indent=1) + "\n")
    (options.results / "checkpoints.md").write_text(page(where, rows))


def page(where: str, rows: list[dict[str, Any]]) -> str:
    """The table for people."""
    lines = [
        "# What a checkpoint costs",
        "",
        f"Written by `benchmarks/checkpoints.py` on {where}. Milliseconds of rank 0: median (least to most). *Waits* "
        "is how long training stands still for a checkpoint, *on disk* when it is there under its name, synchronised.",
        "",
        "| ZeRO | MiB | a step | waits | on disk | waits / on disk |",
        "| ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in rows:
        cells = (
            f"{1000 * row[name][0]:.0f} ({1000 * row[name][1]:.0f} to {1000 * row[name][2]:.0f})"
            for name in ("step", "save", "on disk")
        )
        ratio = row["save"][0] / row["on disk"][0]
        lines.append(f"| {row['stage']} | {row['bytes'] / 2**20:.1f} | {' | '.join(cells)} | {ratio:.2f} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
