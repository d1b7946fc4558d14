"""The paper's two claims on real speech: uniformity helps the similarity loss, and fine-tuning from CEL beats fine-tuning
from random weights.

    .venv/bin/python benchmarks/claims.py --shared ../shared --out runs/claims

`--shared` is a folder with `data/` in it: `corpus/`, `train_labelled.txt`, `noise/`, `rir/` and the test lists. Every arm is
trained with each seed on the same budget (`claims.yaml`), the last model is kept, and the test lists are scored once, at
the end: they choose nothing. Runs that are there already are not trained again, so that the command goes on where it was
interrupted. Writes claims.json and .md to `--results`.
"""

import argparse
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from cel_dist.data.prepare import prepare
from cel_dist.data.prepare_bank import prepare_bank
from cel_dist.distributed import let_idle_threads_sleep
from cel_dist.errors import CelError, RunError

PROJECT = Path(__file__).resolve().parent.parent
CONFIG = Path(__file__).with_name("claims.yaml")


@dataclass(frozen=True)
class Arm:
    """What is compared: settings that the other arms of its table have otherwise."""

    name: str
    settings: tuple[str, ...]


PRETRAINING = (
    Arm("a-prot", ("loss.similarity=angular_prototypical", "loss.lambda_u=0")),
    Arm("a-prot+pon", ("loss.similarity=angular_prototypical", "loss.pairs=pon")),
    Arm("a-prot+apn", ("loss.similarity=angular_prototypical", "loss.pairs=apn")),
    Arm("a-prot+an", ("loss.similarity=angular_prototypical", "loss.pairs=an")),
    Arm("a-cont", ("loss.similarity=angular_contrastive", "loss.lambda_u=0")),
    Arm("a-cont+pon", ("loss.similarity=angular_contrastive", "loss.pairs=pon")),
)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shared", type=Path, default=PROJECT.parent / "shared")
    parser.add_argument("--out", type=Path, default=Path("runs/claims"))
    parser.add_argument("--results", type=Path, default=PROJECT / "benchmarks/results")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="runs at a time, with a thread each")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings of all runs")
    options = parser.parse_intermixed_args()
    let_idle_threads_sleep()
    try:
        make_data(options.shared / "data", options.out)
        # All arms of a seed before the next seed: what is there when it is interrupted can be compared.
        runs = [(arm, seed) for seed in range(options.seeds) for arm in PRETRAINING]
        with ThreadPoolExecutor(options.jobs) as pool:
            list(pool.map(lambda run: train(*run, options), runs))
    except (CelError, RunError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, CelError) else 1
    return 0


def make_data(data: Path, out: Path) -> None:
    """Shards of all labelled utterances, and the bank."""
    out.mkdir(parents=True, exist_ok=True)
    lines = (data / "train_labelled.txt").read_text().splitlines()
    (out / "train.txt").write_text("".join(f"{line.split()[0]}\n" for line in lines))
    prepare(data / "corpus", out / "shards", list_file=out / "train.txt")
    prepare_bank(data, out / "bank")


def train(arm: Arm, seed: int, options: argparse.Namespace) -> None:
    """One run in a process of its own."""
    run = options.out / "pretraining" / f"{arm.name}-{seed}"
    settings = [
        f"data.shards={options.out}/shards",
        f"data.bank={options.out}/bank",
        f"run.dir={run}",
        f"train.seed={seed}",
        *arm.settings,
        *options.overrides,
    ]
    run.parent.mkdir(parents=True, exist_ok=True)
    with open(run.with_suffix(".log"), "a") as log:
        command = [sys.executable, "-m", "cel_dist.train", str(CONFIG), *settings]
        done = subprocess.run(command, stderr=log, stdout=log, check=False)
    if done.returncode:
        raise RunError(f"{run} was not trained (exit code {done.returncode}); see {run.with_suffix('.log')}")


if __name__ == "__main__":
    sys.exit(main())
