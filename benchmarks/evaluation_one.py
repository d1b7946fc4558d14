"""One process of `benchmarks/evaluation.py`; prints one JSON object.

python benchmarks/evaluation_one.py JOB     # JSON: job, and what it is about
"""

import json
import os
import resource
import shutil
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

NUM_EMBEDDED, DIMENSION = 4_708, 512


def embed(way: str, tree: Path) -> dict[str, Any]:
    """Seconds of embedding all files of a tree with the shipped encoder, whose weights do not matter here."""
    import torch

    from cel_dist.data.audio import read_audio
    from cel_dist.encoders import build_encoder
    from cel_dist.evaluation import embed_files
    from cel_dist.model import EncoderDescription, ModelDescription, SpeakerModel

    torch.manual_seed(0)
    encoder = build_encoder("fast_resnet34", embedding_dim=DIMENSION)
    encoder.to("cuda" if torch.cuda.is_available() else "cpu")
    description = ModelDescription(encoder=EncoderDescription(name="fast_resnet34", embedding_dim=DIMENSION))
    model = SpeakerModel(encoder, description)
    files = sorted(path.name for path in tree.iterdir())
    model.embed(tree / files[0])
    if way != "encoder alone":
        begin = time.perf_counter()
        if way == "ours":
            embed_files(model, tree, files)
        else:
            model.embed([tree / name for name in files])
        return {"seconds": time.perf_counter() - begin, "peak_bytes": _peak_bytes(torch)}
    # The passes of `embed_files`: the same threads and batches, with the front end's output ready.
    features: dict[int, list[Any]] = {}

    class Ready(torch.nn.Module):
        def forward(self, waves: Any) -> Any:
            return torch.stack([features[_fingerprint(wave)][0] for wave in waves])

    waves: dict[str, Any] = {}
    with torch.inference_mode():
        for name in files:
            wave = torch.from_numpy(read_audio(tree / name))
            waves[name] = wave
            mel = model._features(wave[None].to(model.device).float())[0]
            features[_fingerprint(wave.float())] = [mel]
    model._features = Ready()
    import cel_dist.evaluation.cutting as cutting

    cutting.segments = lambda excerpt, length: [waves[Path(excerpt.path).name]]  # type: ignore[assignment, misc]
    begin = time.perf_counter()
    embed_files(model, tree, files)
    return {"seconds": time.perf_counter() - begin, "peak_bytes": _peak_bytes(torch)}


def _fingerprint(wave: Any) -> int:
    return hash((len(wave), *wave[1000:1008].tolist()))


def _peak_bytes(torch: Any) -> int:
    """Most memory at a time: of the GPU, or of this process with all that it has loaded."""
    if torch.cuda.is_available():
        peak: int = torch.cuda.max_memory_allocated()
        return peak
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def decode(paths: Sequence[Path]) -> int:
    """Read files whole; returns their samples."""
    from cel_dist.data.audio import read_audio

    return sum(len(read_audio(path)) for path in paths)


def prepare(way: str, tree: Path, out: Path) -> dict[str, Any]:
    """Seconds of preparing a tree, or of decoding it, by a process a core. Processes are started before."""
    from cel_dist.data import prepare as preparation
    from cel_dist.data.pool import default_workers

    workers = default_workers()
    files = sorted(tree.iterdir())
    # As many shards as there are parts here, several for each process.
    number = max(1, -(-len(files) // (4 * workers)))
    parts = [files[first : first + number] for first in range(0, len(files), number)]
    with ProcessPoolExecutor(workers, get_context("spawn")) as pool:
        # Each waits for the other: all of them have loaded what they need.
        list(pool.map(_loaded, range(4 * workers)))
        begin = time.perf_counter()
        if way == "decoding alone":
            list(pool.map(decode, parts))
        else:
            shutil.rmtree(out, ignore_errors=True)
            preparation._builder = lambda *_: lambda jobs: pool.map(preparation.build_shard, jobs)  # type: ignore[assignment]
            audio_format: Any = way.removeprefix("to ")
            begin = time.perf_counter()
            preparation.prepare(tree, out, audio_format=audio_format, samples_per_shard=number)
        seconds = time.perf_counter() - begin
    return {"seconds": seconds, "workers": workers}


def _loaded(number: int) -> int:
    from cel_dist.data import shard_jobs  # noqa: F401

    # Long enough that every process of the pool gets a part.
    time.sleep(0.5)
    return number


def score(trials: int) -> dict[str, Any]:
    """Seconds of scoring so many trials and of their error rates."""
    import numpy as np

    from cel_dist.back_end import BackEnd
    from cel_dist.metrics import RankedTrials

    random = np.random.default_rng(0)
    rows = random.standard_normal((NUM_EMBEDDED, DIMENSION)).astype(np.float32)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    enrol, test = random.integers(NUM_EMBEDDED, size=(2, trials), dtype=np.int32)
    labels = (np.arange(trials) % 2).astype(np.int8)
    begin = time.perf_counter()
    ranked = RankedTrials(BackEnd().score(rows, enrol, test), labels)
    assert 0 < ranked.eer < 1
    ranked.min_dcf(0.01)
    return {"seconds": time.perf_counter() - begin}


def main() -> None:
    job = json.loads(sys.argv[1])
    if job["job"] == "score":
        found = score(job["trials"])
    elif job["job"] == "embed":
        found = embed(job["way"], Path(job["tree"]))
    else:
        found = prepare(job["way"], Path(job["tree"]), Path(job["out"]))
    print(json.dumps(found), flush=True)
    os._exit(0)


if __name__ == "__main__":
    main()
