"""Speed of evaluation and of preparation, beside what bounds them: the encoder, and decoding.

    python benchmarks/evaluation.py            # results/evaluation.json and .md
    python benchmarks/evaluation.py --quick    # the same on a corpus of seconds: whether it runs, not how fast
    python benchmarks/evaluation.py --table    # write the page again from the stored figures

Utterances are speech-shaped noise (`data_corpus.py`) of lengths like those of VoxCeleb1. The ways take turns, each in a
process of its own (`evaluation_one.py`).
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

import evaluation_report
import numpy as np
import soundfile
import torch
from data_corpus import FORMATS, SAMPLE_RATE, speech_shaped

from cel_dist.data.pool import default_workers
from cel_dist.distributed import let_idle_threads_sleep

RESULTS = Path(__file__).resolve().parent / "results"
LEAST_SECONDS, MEAN_SECONDS, MOST_SECONDS = 4.0, 8.2, 145.0
# Of the logarithm: with it and the bounds the mean is that of VoxCeleb1.
CENTRE, SPREAD = 6.6, 0.55
LISTS = {"VoxCeleb1-O": 37_720, "VoxCeleb1-E": 581_480, "VoxCeleb1-H": 552_536}
EMBEDDING_WAYS = ("ours", "one by one", "encoder alone")
PREPARATION_WAYS = ("decoding alone", "to wav", "to flac")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few utterances, one turn")
    parser.add_argument("--utterances", type=int, help="default: 600, or 12 with --quick")
    parser.add_argument("--turns", type=int, help="of each way; default: 3, or 1 with --quick")
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="DIR", help="where evaluation.json and .md go")
    parser.add_argument("--table", action="store_true", help="measure nothing, write the page from evaluation.json")
    options = parser.parse_args()
    if options.table:
        report = json.loads((options.results / "evaluation.json").read_text())
    else:
        with tempfile.TemporaryDirectory() as folder:
            report = measure(
                Path(folder),
                options.utterances or (12 if options.quick else 600),
                options.turns or (1 if options.quick else 3),
            )
    print(evaluation_report.write(report, options.results))


def measure(folder: Path, utterances: int, turns: int) -> dict[str, Any]:
    """All figures of the report."""
    seconds = write_trees(folder, utterances)
    embedding: dict[str, dict[str, list[Any]]] = {name: {way: [] for way in EMBEDDING_WAYS} for name in FORMATS}
    preparation: dict[str, dict[str, list[Any]]] = {name: {way: [] for way in PREPARATION_WAYS} for name in FORMATS}
    scoring: dict[str, list[float]] = {name: [] for name in LISTS}
    for _ in range(turns):
        for kinds, job in ((embedding, "embed"), (preparation, "prepare")):
            for name, ways in kinds.items():
                for way, found in ways.items():
                    found.append(run({"job": job, "way": way, "tree": str(folder / name), "out": str(folder / "out")}))
        for name, trials in LISTS.items():
            scoring[name].append(run({"job": "score", "trials": trials})["seconds"])
    return {
        "conditions": {
            "machine": f"{default_workers()} cores, {platform.machine()}",
            "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
            "python": platform.python_version(),
            "versions": {name: version(name) for name in ("torch", "numpy", "soundfile")},
            "libsndfile": soundfile.__libsndfile_version__,
            "utterances": utterances,
            "audio_seconds": seconds,
            "turns": turns,
        },
        "embedding": embedding,
        "preparation": preparation,
        "scoring": scoring,
    }


def write_trees(folder: Path, utterances: int) -> float:
    """The same utterances as WAV and as FLAC; returns their seconds."""
    random = np.random.default_rng(0)
    total = 0.0
    for name in FORMATS:
        (folder / name).mkdir()
    for number in range(utterances):
        length = float(np.clip(CENTRE * np.exp(SPREAD * random.standard_normal()), LEAST_SECONDS, MOST_SECONDS))
        audio = speech_shaped(random, length)
        total += len(audio) / SAMPLE_RATE
        for name in FORMATS:
            soundfile.write(folder / name / f"{number:05d}.{name}", audio, SAMPLE_RATE, subtype="PCM_16")
    return total


def run(job: dict[str, Any]) -> dict[str, Any]:
    """What `evaluation_one.py` prints."""
    command = [sys.executable, str(Path(__file__).with_name("evaluation_one.py")), json.dumps(job)]
    # As `cel` does.
    environment = dict(os.environ)
    let_idle_threads_sleep(environment)
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


if __name__ == "__main__":
    main()
