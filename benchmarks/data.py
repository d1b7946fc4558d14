"""Speed of the data plane beside the per-item approach, on one core, and what its stages cost.

    python benchmarks/data.py            # results/data.json and .md, some minutes
    python benchmarks/data.py --quick    # the same on a corpus of seconds: whether it runs, not how fast

Utterances are speech-shaped noise of VoxCeleb's lengths (`data_corpus.py`), made anew in a temporary folder: trees of
WAV and FLAC files, and shards of both, which are read from there, over HTTP into an empty cache, and from the cache
when it is full. The per-item approach (`per_item.py`) reads the trees. The ways take turns, each in a process of its
own with one thread (`data_one.py`), on one core where the system lets a process choose. Needs Linux, which counts what
a process reads.
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
from collections.abc import Callable
from dataclasses import asdict, astuple
from importlib.metadata import version
from pathlib import Path

import soundfile
import torch
from data_corpus import FORMATS, Corpus, write_corpus
from data_report import AIMS, ratio_of, write
from data_server import serving
from data_ways import SEGMENT_SAMPLES, Measured, Places, Stages, Way, opened_stream

from cel_dist.data.index import Index

RESULTS = Path(__file__).resolve().parent / "results"
WAYS = [
    *(Way(source, name, "int16") for source in ("local", "cache", "http", "files") for name in FORMATS),
    *(Way(source, name, "features") for source in ("local", "files") for name in FORMATS),
]


def all_turns(places: Places, options: argparse.Namespace) -> list[dict[Way, Measured]]:
    """Every way once a turn."""
    turns = []
    for number in range(options.turns):
        # What one way leaves in the allocator would be another one's gain.
        groups = [WAYS] if options.quick else [[way] for way in WAYS]
        found = {way: each for group in groups for way, each in in_own_process(group, places, options).items()}
        rates = (f"{way.source} {way.audio_format} {way.output} {1 / m.core_seconds:.0f}" for way, m in found.items())
        print(f"turn {number + 1}, pairs/s a core: {', '.join(rates)}", flush=True)
        turns.append(found)
    return turns


def in_own_process(ways: list[Way], places: Places, options: argparse.Namespace) -> dict[Way, Measured]:
    """Measure some ways in one process."""
    job = {
        "ways": [astuple(way) for way in ways],
        "folder": str(places.corpus.folder),
        "utterances": places.corpus.utterances,
        "url": places.url,
        "cache": str(places.cache),
        "batch_size": options.batch_size,
        "seconds": options.seconds,
    }
    command = [sys.executable, RESULTS.parent / "data_one.py", json.dumps(job)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment)
    return {way: Measured(**found) for way, found in zip(ways, json.loads(done.stdout), strict=True)}


def fill_cache(places: Places, batch_size: int) -> None:
    """Fetch all shards by reading an epoch."""
    for audio_format in FORMATS:
        stream = opened_stream(Way("cache", audio_format, "int16"), places, batch_size)
        for _ in range(places.corpus.utterances // batch_size):
            next(stream)


def stage_costs(places: Places, options: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Seconds a pair of augmentation and of log-mel, on the CPU and on a GPU if there is one."""
    batch = next(opened_stream(Way("local", "wav", "int16"), places, options.batch_size))
    costs = {}
    for name in ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",):
        device = torch.device(name)
        stages = Stages(places.corpus.bank, device, options.batch_size)
        segments = batch.segments.to(device)
        waves = stages.augmented(batch, segments)
        costs[name] = {
            "augmentation": _median_seconds(lambda: stages.augmented(batch, segments), device, options),  # noqa: B023
            "log_mel": _median_seconds(lambda: stages.features(waves), device, options),  # noqa: B023
        }
    return costs


def _median_seconds(stage: Callable[[], object], device: torch.device, options: argparse.Namespace) -> float:
    # A core's time; a GPU's is what passes until it is done.
    clock = time.process_time if device.type == "cpu" else time.perf_counter
    seconds = []
    stage()
    for _ in range(options.turns):
        if device.type == "cuda":
            torch.cuda.synchronize()
        begin = clock()
        stage()
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append((clock() - begin) / options.batch_size)
    return statistics.median(seconds)


def table_rows(turns: list[dict[Way, Measured]], corpus: Corpus) -> list[dict]:
    """Medians over the turns, way by way."""
    members = {name: Index.load(corpus.shards(name)).size.mean() for name in FORMATS}
    rows = []
    for way in WAYS:
        found = [asdict(turn[way]) for turn in turns]
        medians = {name: statistics.median(turn[name] for turn in found) for name in found[0]}
        rows.append({**asdict(way), **medians, "member_bytes": float(members[way.audio_format])})
    return rows


def conditions(corpus: Corpus, server: str, core: str, options: argparse.Namespace) -> dict:
    samples = Index.load(corpus.shards("wav")).samples
    return {
        "machine": f"{os.cpu_count()} cores, {platform.machine()}",
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "core": core,
        "python": platform.python_version(),
        "versions": {name: version(name) for name in ("torch", "torchaudio", "numpy", "scipy", "soundfile", "fsspec")},
        "libsndfile": soundfile.__libsndfile_version__,
        "server": server,
        "utterances": len(samples),
        "mean_seconds": float(samples.mean() / 16_000),
        "batch_size": options.batch_size,
        "segment_samples": SEGMENT_SAMPLES,
        "turns": options.turns,
        "seconds": options.seconds,
    }


def keep_to_one_core() -> str:
    """Let this process and those it starts from now on use one core; says whether the system does so."""
    torch.set_num_threads(1)
    if not hasattr(os, "sched_setaffinity"):
        return "one thread, on any core"
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    return "one thread on one core"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few utterances, one turn")
    parser.add_argument("--turns", type=int, help="default: 5, or 1 with --quick")
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="DIR", help="where data.json and .md go")
    options = parser.parse_args()
    options.turns = options.turns or (1 if options.quick else 5)
    options.batch_size, options.seconds = (20, 0.05) if options.quick else (100, 1.0)
    utterances, pieces = (40, 4) if options.quick else (600, 60)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        corpus = write_corpus(folder, utterances, pieces)
        with serving(corpus.served, folder / "server") as server:
            # After the server has been started: it has the other cores.
            core = keep_to_one_core()
            places = Places(corpus, server.url, folder / "cache")
            fill_cache(places, options.batch_size)
            turns = all_turns(places, options)
            report = {
                "conditions": conditions(corpus, server.name, core, options),
                "table": table_rows(turns, corpus),
                "ratios": [ratio_of(aim, turns) for aim in AIMS],
                "stages": stage_costs(places, options),
            }
    write(report, options.results)


if __name__ == "__main__":
    main()
