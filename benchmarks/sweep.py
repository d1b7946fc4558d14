"""What a sweep costs on one machine: eight trials of two ranks with ASHA over the embedded corpus, and a second sweep.

    python benchmarks/sweep.py                          # in one Ray of this machine, started here
    python benchmarks/sweep.py --trials 8 --epochs 4 --results DIR

Both sweeps are `cel sweep`, one after the other in the same Ray. How long processes of a trial outlive the line that
says that it was stopped is looked at from outside, every 20 ms.
"""

import argparse
import json
import os
import platform
import secrets
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil
import yaml

from cel_dist.distributed import free_port

RESULTS = Path(__file__).resolve().parent / "results"
RANKS, BATCH, SPEAKERS, UTTERANCES = 2, 40, 40, 10
SPACE = {
    "optim.lr": {"log_uniform": [1e-5, 1e-2]},
    "loss.lambda_u": {"uniform": [0.0, 2.0]},
    "augment.profile": {"integer": [0, 1]},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=8, help="trials of the first sweep")
    parser.add_argument("--epochs", type=int, default=4, help="epochs of a trial that is not stopped")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder for sweep.json and .md")
    options = parser.parse_args()
    # Both sides of a connection must know whether there is a token, and which.
    os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        corpus = prepare(folder)
        with ray_here(folder) as address:
            sweeps = [
                measure(folder, "first", address, corpus, options.epochs, options.trials),
                measure(folder, "second", address, corpus, 1, 2),
            ]
    where = (
        f"{os.cpu_count()} cores, {platform.machine()}, torch {version('torch')}, Ray {version('ray')}, gloo, trials "
        f"of {RANKS} ranks of a thread each, one at a time, {corpus['train_utterances']} utterances an epoch in "
        f"batches of {BATCH}, {options.epochs} epochs, ASHA after 1, 2, 4 ... epochs, the better half goes on; one run"
    )
    options.results.mkdir(parents=True, exist_ok=True)
    (options.results / "sweep.json").write_text(json.dumps({"where": where, "sweeps": sweeps}, indent=1) + "\n")
    (options.results / "sweep.md").write_text(page(where, sweeps))


def prepare(folder: Path) -> dict[str, Any]:
    """The embedded corpus as shards, with its noises and its validation trials."""
    from cel_dist.corpus.synth import synthesise_corpus
    from cel_dist.data.prepare import prepare as prepare_shards
    from cel_dist.data.prepare_bank import prepare_bank

    made = synthesise_corpus(folder / "corpus", speakers=SPEAKERS, utterances=UTTERANCES)
    prepare_shards(made.root, folder / "shards", list_file=made.train_list, samples_per_shard=40)
    prepare_bank(made.noise.parent, folder / "bank")
    return {
        "trials": str(made.validation_trials),
        "root": str(made.root),
        "train_utterances": len(made.train_list.read_text().splitlines()),
    }


@contextmanager
def ray_here(folder: Path) -> Iterator[str]:
    """The address of a Ray of this machine alone, which the sweeps share."""
    port, host = free_port(), "127.0.0.1"
    command = [
        str(Path(sys.executable).with_name("ray")),
        "start",
        "--head",
        "--block",
        f"--port={port}",
        f"--node-ip-address={host}",
    ]
    command += [f"--num-cpus={RANKS}", "--include-dashboard=false"]
    with (folder / "ray.log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env={**os.environ, "RAY_USAGE_STATS_ENABLED": "0"})
    try:
        while process.poll() is None and "Ray runtime started" not in (folder / "ray.log").read_text():
            time.sleep(0.1)
        yield f"{host}:{port}"
    finally:
        process.terminate()
        process.wait()


def measure(folder: Path, name: str, address: str, corpus: dict[str, Any], epochs: int, trials: int) -> dict[str, Any]:
    """One sweep: seconds in all and to its first rank, and from each early stop until the last process was gone."""
    tree = {
        "run": {"dir": str(folder / name)},
        "data": {"shards": str(folder / "shards"), "bank": str(folder / "bank"), "short": "repeat"},
        "encoder": {"batch_norm": "per_rank"},
        "train": {"batch_size": BATCH, "epochs": epochs},
        "eval": {"trials": corpus["trials"], "root": corpus["root"], "at_start": False},
        "tracking": {"uri": f"sqlite:///{folder}/mlflow.db"},
        "sweep": {"space": SPACE, "trials": trials, "ranks": RANKS, "scheduler": "asha", "reduction": 2},
    }
    file = folder / f"{name}.yaml"
    file.write_text(yaml.safe_dump(tree))
    begin = time.perf_counter()
    with (folder / f"{name}.log").open("wb") as log:
        command = [sys.executable, "-m", "cel_dist", "sweep", str(file), "--address", address, "--json"]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log)
        watch = Watch(folder / name)
        watch.start()
        out, _ = process.communicate()
        seconds = time.perf_counter() - begin
        watch.end()
    if process.returncode:
        sys.exit((folder / f"{name}.log").read_text())
    result = json.loads(out)
    return {
        "trials": [
            {key: trial[key] for key in ("id", "status", "epoch", "best", "failures", "values")}
            for trial in result["trials"]
        ],
        "best": result["best"]["best"],
        "seconds": seconds,
        "seconds_to_first_rank": watch.first_rank - begin,
        "seconds_from_stop_to_free": watch.freed,
    }


class Watch(threading.Thread):
    """Looks at a sweep from outside.

    Attributes:
        first_rank: when the first rank was seen.
        freed: by trial that was stopped, seconds from the word until none of its processes was left.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__(daemon=True)
        self._folder, self._ended = folder, threading.Event()
        self.first_rank = float("nan")
        self.freed: dict[str, float] = {}

    def run(self) -> None:
        stopped: dict[str, float] = {}
        while not self._ended.wait(0.02):
            alive = self._trials_alive()
            now = time.perf_counter()
            if alive and self.first_rank != self.first_rank:
                self.first_rank = now
            for trial in self._stopped():
                since = stopped.setdefault(trial, now)
                if trial not in alive:
                    self.freed.setdefault(trial, now - since)

    def end(self) -> None:
        self._ended.set()
        self.join()

    def _stopped(self) -> list[str]:
        try:
            trials = json.loads((self._folder / "trials.json").read_text())
        except FileNotFoundError:
            return []
        return [trial["id"] for trial in trials if trial["status"] == "stopped"]

    def _trials_alive(self) -> set[str]:
        found = set()
        for process in psutil.process_iter(["cmdline"]):
            words = process.info["cmdline"] or []
            if "cel_dist.train" in words:
                found |= {Path(word).parent.name for word in words if word.startswith(str(self._folder))}
        return found


def page(where: str, sweeps: list[dict[str, Any]]) -> str:
    """The table for people."""
    first, second = sweeps
    freed = list(first["seconds_from_stop_to_free"].values())
    lines = [
        "# What a sweep costs",
        "",
        f"Written by `benchmarks/sweep.py` on {where}.",
        "",
        "| sweep | trials | run to their end | stopped early | epochs in all | seconds | to the first rank |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name, sweep in (("first", first), ("second, in the same Ray", second)):
        status = [trial["status"] for trial in sweep["trials"]]
        epochs = sum(trial["epoch"] for trial in sweep["trials"])
        lines.append(
            f"| {name} | {len(status)} | {status.count('finished')} | {status.count('stopped')} | {epochs:g} | "
            f"{sweep['seconds']:.0f} | {sweep['seconds_to_first_rank']:.1f} |"
        )
    if freed:
        lines += [
            "",
            "From the word that a trial is stopped until its last process is gone: median "
            f"{statistics.median(freed):.2f} s, most {max(freed):.2f} s, of {len(freed)}.",
        ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
