"""What a training step costs, beside the published way of doing it on the same machine.

    python benchmarks/train.py                              # on the GPU, if there is one, else on all cores
    python benchmarks/train.py --batch 200 --precision bf16 # the published batch, as configs/cel.yaml trains it
    python benchmarks/train.py --table                      # write the page again from the stored figures

Both ways train the shipped encoder on the same utterances, rooms and noises, by turns, each in processes of its own
that have all cores to themselves. The published way (`train_published.py`) does all work on an utterance in workers,
item by item, and computes in fp32; it is measured with several numbers of workers, of which the best one counts.
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

import torch
import train_report
import yaml
from data_corpus import Corpus, write_corpus

from cel_dist.data.pool import default_workers
from cel_dist.distributed import free_port, let_idle_threads_sleep

RESULTS = Path(__file__).resolve().parent / "results"
FRAMES = 180


def main() -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=200 if device == "cuda" else 40, help="utterances a step")
    parser.add_argument("--precision", default="bf16" if device == "cuda" else "fp32", help="fp32 or bf16")
    parser.add_argument(
        "--steps", type=int, default=50 if device == "cuda" else 8, help="steps that are timed, a round"
    )
    parser.add_argument("--rounds", type=int, default=3, help="turns of each way")
    parser.add_argument("--utterances", type=int, default=400, help="of the corpus")
    parser.add_argument("--encoder", default="fast_resnet34", help="of this project; the published way has but one")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="another setting of this project"
    )
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder for train-DEVICE-PRECISION.json and .md")
    parser.add_argument("--table", action="store_true", help="measure nothing, write all pages from train-*.json")
    options = parser.parse_args()
    if options.table:
        reports = [json.loads(stored.read_text()) for stored in options.results.glob("train-*.json")]
    else:
        with tempfile.TemporaryDirectory() as folder:
            reports = [measure(Path(folder), device, options)]
    for report in reports:
        print(train_report.write(report, options.results))


def measure(folder: Path, device: str, options: argparse.Namespace) -> dict[str, Any]:
    """All figures of the report."""
    # Of noises and rooms as many as stay in the page cache, for both ways.
    corpus = write_corpus(folder / "corpus", options.utterances, 20)
    cores = default_workers()
    readers = sorted({0, 1, max(1, cores // 2), cores}) if options.encoder == "fast_resnet34" else []
    machine = run("machine", our_config(folder, corpus, options, "machine"), options.steps)
    ours: list[Any] = []
    published: dict[str, list[Any]] = {f"published, {number} workers": [] for number in readers}
    more_ranks: dict[str, list[Any]] = {"2": []} if device == "cpu" and cores > 1 else {}
    for turn in range(options.rounds):
        ours.append(run("ours", our_config(folder, corpus, options, f"{turn}"), options.steps))
        for (_, turns), number in zip(published.items(), readers, strict=True):
            turns.append(run("published", their_config(folder, corpus, options, number), options.steps))
        for ranks, turns in more_ranks.items():
            config = our_config(folder, corpus, options, f"{turn}-{ranks}")
            turns.append(run("ours", config, options.steps, int(ranks)))
    return {
        "conditions": conditions(device, options),
        "machine": machine,
        "ours": ours,
        "published": published,
        "more_ranks": more_ranks,
    }


def run(way: str, config: Path, steps: int, ranks: int = 1) -> dict[str, Any]:
    """What `train_one.py` prints, of several ranks the first."""
    command = [sys.executable, str(Path(__file__).with_name("train_one.py")), way, str(config), str(steps)]
    port = str(free_port())
    processes = []
    for rank in range(ranks):
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks}
        environment = {**os.environ, **{name: str(value) for name, value in place.items()}}
        environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        if way == "ours":
            # As `cel train` does.
            let_idle_threads_sleep(environment)
        processes.append(subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment))
    outputs = [process.communicate()[0] for process in processes]
    if any(process.returncode for process in processes):
        raise SystemExit(f"{way} failed; its last words are above")
    found: dict[str, Any] = json.loads(outputs[0].splitlines()[-1])
    return found


def our_config(folder: Path, corpus: Corpus, options: argparse.Namespace, name: str) -> Path:
    """A configuration of `cel train`, in a run folder of its own."""
    from cel_dist.config_file import assign, dump_config, parse_config

    tree: dict[str, Any] = {
        "run": {"dir": str(folder / f"run-{name}")},
        "data": {"shards": str(corpus.shards("wav")), "bank": str(corpus.bank), "segment_frames": FRAMES},
        "augment": {"profile": 3},
        "encoder": {"name": options.encoder},
        "train": {"batch_size": options.batch, "epochs": 1000, "precision": options.precision},
        "tracking": {"enabled": False},
    }
    for pair in options.set:
        key, _, value = pair.partition("=")
        assign(tree, key, yaml.safe_load(value), "--set")
    path = folder / f"ours-{name}.yaml"
    path.write_text(dump_config(parse_config(tree, "benchmark")))
    return path


def their_config(folder: Path, corpus: Corpus, options: argparse.Namespace, workers: int) -> Path:
    """Settings of `train_published.py`."""
    from cel_dist.features import segment_samples

    path = folder / f"published-{workers}.yaml"
    settings = {
        "tree": str(corpus.tree("wav")),
        "pieces": str(corpus.pieces),
        "segment_samples": segment_samples(FRAMES),
        "batch_size": options.batch,
        "workers": workers,
        "threads": default_workers(),
    }
    path.write_text(yaml.safe_dump(settings))
    return path


def conditions(device: str, options: argparse.Namespace) -> dict[str, Any]:
    """What the figures hold for."""
    cores = f"{default_workers()} cores, {platform.machine()}, {torch.backends.cpu.get_cpu_capability()}"
    return {
        "device": device,
        "machine": f"{torch.cuda.get_device_name()}, {cores}" if device == "cuda" else cores,
        "python": platform.python_version(),
        "versions": {
            name: version(name) for name in ("torch", "deepspeed", "torchaudio", "numpy", "scipy", "soundfile")
        },
        "encoder": options.encoder,
        "precision": options.precision,
        "batch": options.batch,
        "frames": FRAMES,
        "utterances": options.utterances,
        "steps": options.steps,
        "rounds": options.rounds,
        "set": options.set,
    }


if __name__ == "__main__":
    main()
