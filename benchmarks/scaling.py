"""Words that a training step sends, counted in real worlds and evaluated for 1 024 ranks, and a model of efficiency.

    python benchmarks/scaling.py             # counts and times worlds of 1, 2 and 4 ranks, some minutes
    python benchmarks/scaling.py --quick     # counts only, worlds of 1 and 2, stages 0 and 3
    python benchmarks/scaling.py --table     # the files again from what was counted and timed
    python benchmarks/scaling.py --table --encoder-tflops 25 --results DIR      # for another accelerator

Counted: every collective of a step of `cel train`, as `scaling_ranks.py` sees it. Formulas: `scaling_words.py`. The
model: `scaling_model.py`. What it means is in docs/scaling.md.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
from scaling_model import Accelerator, flops, modelled, shipped_encoder
from scaling_report import write
from scaling_words import Step, sent

from cel_dist.data.prepare import prepare
from cel_dist.distributed import free_port, let_idle_threads_sleep

FOLDER = Path(__file__).resolve().parent
RESULTS = FOLDER / "results"
WORLDS = (1, 2, 4)
# Of a rank, where the counts are taken and where the times are.
COUNTED_SHARE, TIMED_SHARE = 4, 8
COUNTED_FRAMES, TIMED_FRAMES = 32, 180
# Stage 3 learns in two steps in which order parameters are needed.
COUNTED_STEP = 4
# The first two steps warm up; the last three run under the profiler, which tells the time inside of collectives.
TIMED_STEPS, PROFILED_STEPS = 13, 3
COUNTED = (
    *({"stage": stage} for stage in (0, 1, 2, 3)),
    {"exchange": "ring"},
    {"batch_norm": "per_rank"},
    {"joint": True},
)
# The larger worlds are slow to start, and have nothing new in those that are left out.
COUNTED_LARGE = ({"stage": 0}, {"stage": 1}, {"stage": 3}, {"exchange": "ring"})
QUICK = ({"stage": 3, "exchange": "ring"}, {"stage": 1, "joint": True})
TIMED = ({}, {"batch_norm": "per_rank"})


def write_shards(folder: Path, utterances: int) -> Path:
    """Shards of noise, long enough for two segments."""
    random = np.random.default_rng(0)
    tree = folder / "audio"
    tree.mkdir()
    for number in range(utterances):
        soundfile.write(tree / f"{number:03d}.wav", 0.1 * random.standard_normal(16_000 * 4), 16_000)
    prepare(tree, folder / "shards", samples_per_shard=16, workers=1)
    return folder / "shards"


def case_of(step: dict[str, Any], ranks: int, shards: Path, folder: Path, *, timed: bool) -> dict[str, Any]:
    """What `scaling_ranks.run` takes."""
    return {
        "counts": not timed,
        "steps": TIMED_STEPS if timed else COUNTED_STEP,
        "profiled": PROFILED_STEPS if timed else 0,
        "config": {
            "run": {"dir": str(folder / "run")},
            "data": {
                "shards": str(shards),
                "workers": 0,
                "segment_frames": TIMED_FRAMES if timed else COUNTED_FRAMES,
            },
            "augment": {"profile": 0},
            "encoder": {
                "batch_norm": step.get("batch_norm", "global"),
                "views": "joint" if step.get("joint") else "separate",
            },
            "loss": {"exchange": step.get("exchange", "gather")},
            "train": {
                "batch_size": ranks * (TIMED_SHARE if timed else COUNTED_SHARE),
                "epochs": 100,
                "threads": 1,
            },
            "engine": {"zero_stage": step.get("stage", 0)},
            "tracking": {"enabled": False},
        },
    }


def world(ranks: int, cases: list[dict[str, Any]], folder: Path) -> list[list[dict[str, Any]]]:
    """What every rank of one world found in all cases."""
    job = folder / "job.json"
    job.write_text(json.dumps(cases))
    port, started = str(free_port()), []
    for rank in range(ranks):
        environment = {
            **os.environ,
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(ranks),
            "LOCAL_WORLD_SIZE": str(ranks),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
            "OMP_NUM_THREADS": "1",
        }
        let_idle_threads_sleep(environment)
        command = [sys.executable, FOLDER / "scaling_ranks.py", job, str(rank)]
        started.append(subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True))
    errors = [process.communicate()[1] for process in started]
    for rank, process in enumerate(started):
        if process.returncode:
            raise SystemExit(f"rank {rank} of {ranks} failed:\n{errors[rank][-3000:]}")
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(ranks)]


def measured(*, quick: bool) -> dict[str, Any]:
    """Counts and times of all worlds; counts are of rank 0, and the other ranks must have the same."""
    report: dict[str, Any] = {"counts": [], "times": []}
    with tempfile.TemporaryDirectory(prefix="scaling-") as root:
        shards = write_shards(Path(root), max(WORLDS) * TIMED_SHARE)
        for ranks in (2,) if quick else WORLDS:
            # One rank sends nothing.
            counted = () if ranks == 1 else QUICK if quick else COUNTED if ranks == 2 else COUNTED_LARGE
            timed = () if quick else TIMED
            folder = Path(root) / f"world{ranks}"
            folder.mkdir()
            steps = [(step, False) for step in counted] + [(step, True) for step in timed]
            cases = [
                case_of(step, ranks, shards, folder / str(place), timed=is_timed)
                for place, (step, is_timed) in enumerate(steps)
            ]
            found = world(ranks, cases, folder)
            for (step, is_timed), rows in zip(steps, zip(*found, strict=True), strict=True):
                row = {"W": ranks, **step}
                if is_timed:
                    shares = [rank["collectives_share"] for rank in rows]
                    report["times"].append({**row, "seconds": rows[0]["seconds"], "collectives_share": shares[0]})
                else:
                    if any(rank["sent"] != rows[0]["sent"] for rank in rows):
                        raise SystemExit(f"the ranks of {row} sent different things")
                    report["counts"].append({**row, "sent": rows[0]["sent"]})
                print(row, flush=True)
    return report


def compare(counts: list[dict]) -> list[dict]:
    """Every count beside its formula."""
    encoder, table = shipped_encoder(), []
    for row in counts:
        options = {name: value for name, value in row.items() if name not in ("W", "sent")}
        step = Step(encoder, row["W"], COUNTED_SHARE, **options)
        formulas = {(s.part, s.kind): (s.number, s.given) for s in sent(step)}
        found = {(s["part"], s["kind"]): (s["number"], s["given"]) for s in row["sent"]}
        for part, kind in sorted({*formulas, *found}):
            if part == "agreement":
                continue
            table.append(
                {
                    "W": row["W"],
                    **options,
                    "part": part,
                    "kind": kind,
                    "counted": found.get((part, kind), (0, 0)),
                    "formula": formulas.get((part, kind), (0, 0)),
                }
            )
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer worlds, and no times")
    parser.add_argument("--table", action="store_true", help="measure nothing, write the files again")
    parser.add_argument("--busy", action="store_true", help="note that other processes were running")
    for part, rate in (("encoder", Accelerator.encoder_rate), ("loss", Accelerator.loss_rate)):
        told = f"what an accelerator of the model sustains on the {part}; {rate / 1e12:g} if not given"
        parser.add_argument(f"--{part}-tflops", type=float, default=rate / 1e12, metavar="X", help=told)
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="DIR")
    options = parser.parse_args()
    file = options.results / "scaling.json"
    if options.table:
        report = json.loads(file.read_text())
    else:
        report = measured(quick=options.quick)
        report["conditions"] = {
            "machine": f"{os.cpu_count()} cores, {platform.machine()}",
            "torch": version("torch"),
            "deepspeed": version("deepspeed"),
            "busy": options.busy,
            "counted": {"b": COUNTED_SHARE, "frames": COUNTED_FRAMES},
            "timed": {"b": TIMED_SHARE, "frames": TIMED_FRAMES, "steps": TIMED_STEPS - PROFILED_STEPS - 2},
        }
        report["flops"] = flops()
    report["compared"] = compare(report["counts"])
    accelerator = Accelerator(1e12 * options.encoder_tflops, 1e12 * options.loss_tflops)
    report["model"] = modelled(report["flops"], report["counts"], accelerator)
    options.results.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(report, indent=1) + "\n")
    write(report, file.with_suffix(".md"))
    wrong = [row for row in report["compared"] if tuple(row["counted"]) != tuple(row["formula"])]
    for row in wrong:
        print(f"counted is not what the formula says: {row}", file=sys.stderr)
    if wrong:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
