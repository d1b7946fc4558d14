"""A small tree of audio files to prepare, and readers of what became of it."""

import json
from pathlib import Path

import numpy as np
import soundfile

from cel_dist.data.folder import ShardFolder
from cel_dist.data.prepare import PrepareResult

NAMES = ["a b/ü1.wav", "a b/2.FLAC", "c/d.e/3.ogg", *(f"s{number % 3}/{number:03d}.flac" for number in range(4, 21))]

# A program that stands still after its first shard: source, folder, labels, and further options as JSON.
STOP_AFTER_FIRST_SHARD = """
import json
import sys
from cel_dist.data.prepare import prepare
def progress(done, total):
    if done:
        print("shard", flush=True)
        sys.stdin.read()
if __name__ == "__main__":
    options = json.loads(sys.argv[4])
    prepare(sys.argv[1], sys.argv[2], labels=sys.argv[3], samples_per_shard=2, progress=progress, **options)
"""


def voice(seed: int, seconds: float, rate: int = 16_000) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=round(seconds * rate)) * 0.1


def write_corpus(folder: Path, names: list[str] = NAMES) -> Path:
    for seed, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(folder / name, voice(seed, 1.0 + 0.2 * seed), 16_000)
    return folder


def speaker_of(name: str) -> str:
    return name.split("/")[0].replace(" ", "_")


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def descriptions(folder: Path) -> list[dict[str, object]]:
    """The JSON members of all samples, in the order of the shards."""
    import tarfile

    found = []
    for record in ShardFolder.open(folder).manifest.shards:
        with tarfile.open(folder / record.name) as tar:
            found += [json.load(tar.extractfile(name)) for name in tar.getnames() if name.endswith(".json")]
    return found


def paths(folder: Path) -> list[str]:
    return [str(description["path"]) for description in descriptions(folder)]


def table(result: PrepareResult) -> dict[str, str]:
    header, *rows = result.rejects.read_text().splitlines()
    assert header == "path\treason\tdetail"
    return dict(row.split("\t")[:2] for row in rows)
