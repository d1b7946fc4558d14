"""How long a run takes to its first step.

    python benchmarks/start.py                  # on the embedded corpus, recorded in MLflow
    python benchmarks/start.py --table          # write the page again from the stored figures

From the call of `cel train` to the line that reports the first step, by turns with one process and with two through the
launcher. Each run has a folder and a database of MLflow of its own.
"""

import argparse
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml

from cel_dist.data.pool import default_workers

RESULTS = Path(__file__).resolve().parent / "results"
FRAMES, BATCH, SPEAKERS, UTTERANCES = 100, 40, 40, 10


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=3, help="starts of each kind")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder for start.json and .md")
    parser.add_argument("--table", action="store_true", help="measure nothing, write the page from start.json")
    options = parser.parse_args()
    stored = options.results / "start.json"
    if options.table:
        report = json.loads(stored.read_text())
    else:
        with tempfile.TemporaryDirectory() as folder:
            report = measure(Path(folder), options.turns)
    options.results.mkdir(parents=True, exist_ok=True)
    stored.write_text(json.dumps(report, indent=1) + "\n")
    page = "\n".join(lines(report)) + "\n"
    stored.with_suffix(".md").write_text(page)
    print(page)


def measure(folder: Path, turns: int) -> dict[str, Any]:
    """All figures of the report."""
    from cel_dist.corpus.synth import synthesise_corpus
    from cel_dist.data.prepare import prepare
    from cel_dist.data.prepare_bank import prepare_bank

    made = synthesise_corpus(folder / "corpus", speakers=SPEAKERS, utterances=UTTERANCES)
    prepare(made.root, folder / "shards", list_file=made.train_list, samples_per_shard=40)
    prepare_bank(made.noise.parent, folder / "bank")
    config = folder / "start.yaml"
    config.write_text(
        yaml.safe_dump(
            {
                "data": {"shards": str(folder / "shards"), "bank": str(folder / "bank"), "segment_frames": FRAMES},
                "augment": {"profile": 3},
                "train": {"batch_size": BATCH, "max_steps": 2, "log_every": 1},
            }
        )
    )
    seconds: dict[str, list[float]] = {"one process": [], "two through the launcher": []}
    for turn in range(turns):
        for name, words in zip(seconds, ([], ["--nproc", "2"]), strict=True):
            run = folder / f"run-{turn}-{len(words)}"
            seconds[name].append(
                first_step([str(config), *words, f"run.dir={run}", f"tracking.uri=sqlite:///{run}.db"])
            )
    return {
        "conditions": {
            "machine": f"{default_workers()} cores, {platform.machine()}",
            "python": platform.python_version(),
            "versions": {name: version(name) for name in ("torch", "deepspeed", "mlflow")},
            "batch": BATCH,
            "frames": FRAMES,
            "files": len(made.train_list.read_text().splitlines()),
        },
        "first_step_seconds": seconds,
    }


def first_step(arguments: list[str]) -> float:
    """Seconds from the call of `cel train` to the line of its first step."""
    begin = time.perf_counter()
    command = [sys.executable, "-m", "cel_dist", "train", *arguments]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        seconds = [time.perf_counter() - begin for line in process.stderr if line.lstrip().startswith("step ")]
    if process.returncode or not seconds:
        raise SystemExit(f"{' '.join(command)} failed")
    return seconds[0]


def lines(report: dict[str, Any]) -> list[str]:
    """The page."""
    conditions = report["conditions"]
    versions = ", ".join(f"{name} {number}" for name, number in conditions["versions"].items())
    page = [
        "# The first step",
        "",
        f"Written by `benchmarks/start.py` on {conditions['machine']}; Python {conditions['python']}, {versions}. "
        f"Seconds from `cel train` to the line of the first step: the embedded corpus, {conditions['files']} files of "
        f"its training speakers, batches of {conditions['batch']}, two views of {conditions['frames']} frames, profile "
        "3, fp32, MLflow with a new database. The machine is shared.",
        "",
        "| | median | all |",
        "| --- | ---: | --- |",
    ]
    for name, seconds in report["first_step_seconds"].items():
        told = ", ".join(f"{second:.1f}" for second in seconds)
        page.append(f"| {name} | {statistics.median(seconds):.1f} | {told} |")
    return page


if __name__ == "__main__":
    main()
