"""Time and memory of scoring and of error rates at the size of the large lists.

    python benchmarks/metrics.py               # all, some minutes
    python benchmarks/metrics.py --small       # a hundredth of the trials, to see that it runs
    python benchmarks/metrics.py --table       # metrics.md again from metrics.json

Each measurement has a process of its own, so that its peak memory is its own; the arrays that it is given are in
`before`. Scores are normal, shifted by 2 for target trials; embeddings are random unit vectors.
"""

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import numpy as np

from cel_dist.back_end import BackEnd
from cel_dist.evaluation.bootstrap import bootstrap_intervals
from cel_dist.evaluation.scoring import score_trials
from cel_dist.evaluation.trials import Trials
from cel_dist.metrics import RankedTrials

RESULTS = Path(__file__).resolve().parent / "results"
PRIORS = ("0.001", "0.01", "0.05", "0.1")
DIMENSION = 512


def error_rates(num_trials: int) -> Callable[[], object]:
    """EER and its threshold, minDCF at four priors, DET points and their convex hull."""
    generator = np.random.default_rng(0)
    labels = (generator.random(num_trials) < 0.1).astype(np.int8)
    scores = generator.normal(2.0 * labels, 1)

    def work() -> object:
        ranked = RankedTrials(scores, labels)
        costs = [ranked.min_dcf(float(prior)) for prior in PRIORS]
        return ranked.eer, ranked.eer_threshold, costs, ranked.det_points, ranked.convex_hull()

    return work


def scoring(num_trials: int, back_end: str, num_files: int = 5000) -> Callable[[], object]:
    """Scores of trials over embeddings of 512 dimensions, with or without a norm."""
    generator = np.random.default_rng(0)
    embeddings = generator.standard_normal((num_files, DIMENSION)).astype(np.float32)
    embeddings /= np.linalg.norm(embeddings, axis=1, keepdims=True)
    enrol, test = generator.integers(0, num_files, (2, num_trials), dtype=np.int32)
    trials = Trials([""] * num_files, np.zeros(num_trials, np.int8), enrol, test)
    cohort = generator.standard_normal((3000, DIMENSION)).astype(np.float32)
    cohort /= np.linalg.norm(cohort, axis=1, keepdims=True)
    kinds = {
        "euclidean": BackEnd(),
        "cosine": BackEnd(scoring="cosine"),
        "adaptive s-norm": BackEnd(scoring="cosine", score_norm="as", cohort=cohort),
    }
    return lambda: score_trials(embeddings, trials, kinds[back_end])


def intervals(num_trials: int, num_speakers: int) -> Callable[[], object]:
    """A thousand replicates over speakers: EER, and minDCF at two priors."""
    generator = np.random.default_rng(0)
    num_files = 100 * num_speakers
    voices = np.arange(num_files) // 100
    enrol = generator.integers(0, num_files, num_trials, dtype=np.int32)
    same = 100 * voices[enrol] + generator.integers(0, 100, num_trials)
    anyone = generator.integers(0, num_files, num_trials)
    test = np.where(generator.random(num_trials) < 0.5, same, anyone).astype(np.int32)
    labels = (voices[enrol] == voices[test]).astype(np.int8)
    speakers = [f"id{voice}" for voice in voices.tolist()]
    trials = Trials([""] * num_files, labels, enrol, test)
    ranked = RankedTrials(generator.normal(2.0 * labels, 1), labels)
    return lambda: bootstrap_intervals(ranked, trials, speakers, priors=("0.01", "0.05"))


def rows(small: bool) -> dict[str, tuple[str, Callable[[], Callable[[], object]]]]:
    """By name: words, and what makes the work."""
    part = 100 if small else 1
    large, listed, short = 4_000_000 // part, 550_000 // part, 37_720 // part
    files = 5000 // (10 if small else 1)
    return {
        "error_rates": (
            f"{large} trials: EER, minDCF at {len(PRIORS)} priors, DET points, convex hull",
            lambda: error_rates(large),
        ),
        **{
            name.replace(" ", "_").replace("-", "_"): (
                f"{listed} trials of {files} x {DIMENSION}: {name}{', cohort of 3000' if 'norm' in name else ''}",
                lambda name=name: scoring(listed, name, files),
            )
            for name in ("euclidean", "cosine", "adaptive s-norm")
        },
        "intervals_short": (
            f"{short} trials, 40 speakers: 1000 replicates",
            lambda: intervals(short, 40),
        ),
        "intervals_listed": (
            f"{listed} trials, 1190 speakers: 1000 replicates",
            lambda: intervals(listed, 1190 // part + 2),
        ),
    }


def peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def measure(name: str, small: bool) -> dict[str, float]:
    """Seconds of one run, and the memory of the process before and at its peak."""
    work = rows(small)[name][1]()
    before = peak_mib()
    begin, used = time.perf_counter(), time.process_time()
    work()
    seconds, core_seconds = time.perf_counter() - begin, time.process_time() - used
    return {"seconds": seconds, "core_seconds": core_seconds, "before_mib": before, "peak_mib": peak_mib()}


def table(report: dict) -> str:
    state = f" {report['state']}" if report["state"] else ""
    lines = [
        "# Scores and error rates at size",
        "",
        f"Written by `benchmarks/metrics.py` on {report['where']}.{state} Seconds are medians of "
        f"{report['turns']} runs, each in a process of its own (range in brackets), core seconds what they took of all "
        "cores. Peak is that of the process, Python, numpy, torch and the arrays that it was given included.",
        "",
        "| what | s | core s | peak MiB | of it before |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    for row in report["rows"]:
        values = {key: [run[key] for run in row["runs"]] for key in row["runs"][0]}
        middle = {key: statistics.median(numbers) for key, numbers in values.items()}
        low, high = min(values["seconds"]), max(values["seconds"])
        lines.append(
            f"| {row['what']} | {middle['seconds']:.2f} ({low:.2f} to {high:.2f}) | {middle['core_seconds']:.2f} | "
            f"{middle['peak_mib']:.0f} | {middle['before_mib']:.0f} |"
        )
    return "\n".join([*lines, ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--state", default="", help="what else the machine was doing, for the table")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(measure(arguments.one, arguments.small)))
        return
    path = arguments.results / "metrics.json"
    if not arguments.table:
        runs: dict[str, list[dict[str, float]]] = {name: [] for name in rows(arguments.small)}
        for _ in range(arguments.turns):
            for name, found in runs.items():
                command = [sys.executable, __file__, "--one", name, *(["--small"] if arguments.small else [])]
                done = subprocess.run(command, check=True, capture_output=True, text=True)
                found.append(json.loads(done.stdout))
        where = f"{os.cpu_count()} cores, {platform.machine()}, numpy {version('numpy')}, scipy {version('scipy')}"
        words = {name: what for name, (what, _) in rows(arguments.small).items()}
        report = {
            "where": where,
            "state": arguments.state,
            "turns": arguments.turns,
            "rows": [{"name": name, "what": words[name], "runs": found} for name, found in runs.items()],
        }
        path.write_text(json.dumps(report, indent=1) + "\n")
    path.with_suffix(".md").write_text(table(json.loads(path.read_text())))


if __name__ == "__main__":
    main()
