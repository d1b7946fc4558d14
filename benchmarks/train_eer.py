"""What the published way of training and this project's reach after the same number of utterances.

    python benchmarks/train_eer.py                      # three seeds of each, on the embedded corpus
    python benchmarks/train_eer.py --precision bf16     # as train.py measured this project's steps
    python benchmarks/train_eer.py --table              # write the page again from the stored figures

Both train the shipped encoder from weights drawn from the seed, on the same recordings, rooms and noises, with Adam of
the same learning rate, constant after a warm-up, and are evaluated by the same code on trials of speakers that neither
has heard. Rooms and noises are drawn by each in its own way: in every segment a room, and one noise at 10 dB or more.
"""

import argparse
import json
import platform
import statistics
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import soundfile
import torch
import yaml
from train import run

from cel_dist.config_file import dump_config, parse_config
from cel_dist.corpus.synth import synthesise_corpus
from cel_dist.data.pool import default_workers
from cel_dist.data.prepare import prepare
from cel_dist.data.prepare_bank import prepare_bank
from cel_dist.evaluation import evaluate
from cel_dist.features import segment_samples
from cel_dist.model import SpeakerModel, load_model
from cel_dist.network import describe
from cel_dist.training.objective import new_encoder

RESULTS = Path(__file__).resolve().parent / "results"
FRAMES, BATCH, SPEAKERS, UTTERANCES = 100, 40, 120, 10
WARMUP = 30
SNR_DB = {"noise": (10, 25), "speech": (20, 30), "music": (10, 25)}
WAYS = ("published", "this project")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=240, help=f"steps of {BATCH} utterances")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each way")
    parser.add_argument("--precision", default="fp32", help="of this project: fp32 or bf16; the other is fp32")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder for train_eer-PRECISION.json and .md")
    parser.add_argument("--table", action="store_true", help="measure nothing, write the page from what is stored")
    options = parser.parse_args()
    stored = options.results / f"train_eer-{options.precision}.json"
    if options.table:
        report = json.loads(stored.read_text())
    else:
        with tempfile.TemporaryDirectory() as folder:
            report = measure(Path(folder), options)
    options.results.mkdir(parents=True, exist_ok=True)
    stored.write_text(json.dumps(report, indent=1) + "\n")
    page = "\n".join(lines(report)) + "\n"
    stored.with_suffix(".md").write_text(page)
    print(page)


def measure(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """All figures of the report."""
    made = synthesise_corpus(folder / "corpus", speakers=SPEAKERS, utterances=UTTERANCES)
    prepare(made.root, folder / "shards", list_file=made.train_list, samples_per_shard=100)
    prepare_bank(made.noise.parent, folder / "bank")
    # Where the published way looks for them.
    pieces = folder / "pieces"
    pieces.mkdir()
    for kind in SNR_DB:
        (pieces / kind).symlink_to(made.noise / kind)
    (pieces / "rir").symlink_to(made.rir)
    # Those that the shards' reader takes: long enough for two segments.
    files = [str(made.root / name.split()[-1]) for name in made.train_list.read_text().splitlines()]
    files = [file for file in files if soundfile.info(file).frames >= 2 * segment_samples(FRAMES)]
    rows = []
    for seed in range(options.seeds):
        ways: dict[str, Any] = {}
        for way, train in zip(WAYS, (published, ours), strict=True):
            model = train(folder / f"{seed}-{way.replace(' ', '-')}", seed, files, options)
            ways[way] = evaluate(model, made.test_trials, made.root).eer
        untrained = model_of(our_config(folder / f"{seed}-untrained", seed, options), None)
        rows.append({"seed": seed, "untrained": evaluate(untrained, made.test_trials, made.root).eer, **ways})
        print(rows[-1], flush=True)
    return {
        "conditions": {
            "machine": f"{default_workers()} cores, {platform.machine()}, {torch.backends.cpu.get_cpu_capability()}",
            "python": platform.python_version(),
            "versions": {name: version(name) for name in ("torch", "deepspeed", "torchaudio", "numpy", "scipy")},
            "precision": options.precision,
            "steps": options.steps,
            "warmup_steps": WARMUP,
            "batch": BATCH,
            "frames": FRAMES,
            "files": len(files),
            "speakers": made.speakers,
            "trials": len(made.test_trials.read_text().splitlines()),
        },
        "rows": rows,
    }


def published(folder: Path, seed: int, files: list[str], options: argparse.Namespace) -> SpeakerModel:
    """Trained by `train_published.py`."""
    folder.mkdir()
    weights = folder / "weights.pt"
    settings = {
        "files": files,
        "pieces": str(folder.parent / "pieces"),
        "segment_samples": segment_samples(FRAMES),
        "batch_size": BATCH,
        "workers": 1,
        "threads": default_workers(),
        "seed": seed,
        "warmup_steps": WARMUP,
        "snr_db": {kind: list(bounds) for kind, bounds in SNR_DB.items()},
        "weights": str(weights),
    }
    path = folder / "settings.yaml"
    path.write_text(yaml.safe_dump(settings))
    # Its first steps are not timed, and count here.
    run("published", path, options.steps - 3)
    return model_of(our_config(folder, seed, options), weights)


def ours(folder: Path, seed: int, files: list[str], options: argparse.Namespace) -> SpeakerModel:
    """Trained by `cel train`."""
    folder.mkdir()
    config = our_config(folder, seed, options)
    path = folder / "config.yaml"
    path.write_text(dump_config(config))
    subprocess.run([sys.executable, "-m", "cel_dist", "train", str(path)], check=True, stdout=subprocess.DEVNULL)
    return load_model(config.run.dir)


def our_config(folder: Path, seed: int, options: argparse.Namespace) -> Any:
    """The settings of a run of `cel train`."""
    tree = {
        "run": {"dir": str(folder / "run")},
        "data": {
            "shards": str(folder.parent / "shards"),
            "bank": str(folder.parent / "bank"),
            "segment_frames": FRAMES,
        },
        "augment": {"profile": 3, **{f"{kind}_snr_db": list(bounds) for kind, bounds in SNR_DB.items()}},
        "optim": {"schedule": "step", "decay": 1.0, "warmup_steps": WARMUP},
        "train": {
            "batch_size": BATCH,
            "epochs": 10_000,
            "max_steps": options.steps,
            "seed": seed,
            "precision": options.precision,
        },
        "tracking": {"enabled": False},
    }
    return parse_config(tree, "benchmark")


def model_of(config: Any, weights: Path | None) -> SpeakerModel:
    """The shipped encoder with stored weights, or with those that a run begins with."""
    encoder = new_encoder(config)
    if weights is not None:
        encoder.load_state_dict(torch.load(weights, weights_only=True))
    return SpeakerModel(encoder.eval(), describe(config))


def lines(report: dict[str, Any]) -> list[str]:
    """The page."""
    conditions, rows = report["conditions"], report["rows"]
    versions = ", ".join(f"{name} {number}" for name, number in conditions["versions"].items())
    page = [
        f"# EER after the same number of utterances, this project in {conditions['precision']}",
        "",
        f"Written by `benchmarks/train_eer.py` on {conditions['machine']}; Python {conditions['python']}, {versions}. "
        f"fast_resnet34 from new weights, {conditions['steps']} steps of {conditions['batch']} utterances, "
        f"{conditions['warmup_steps']} of them warming up to the learning rate of 0.001, two views of "
        f"{conditions['frames']} frames, augmentation profile 3 with noise at 10 dB or more; "
        f"{conditions['files']} files of the embedded corpus with {conditions['speakers']} speakers in all its parts, "
        f"and {conditions['trials']} trials of those held out. The published way computes in fp32. EER in percent.",
        "",
        "| seed | untrained | published | this project |",
        "| ---: | ---: | ---: | ---: |",
    ]
    for row in rows:
        page.append(f"| {row['seed']} | " + " | ".join(f"{100 * row[way]:.1f}" for way in ("untrained", *WAYS)) + " |")
    means = [100 * statistics.mean(row[way] for row in rows) for way in ("untrained", *WAYS)]
    page.append("| mean | " + " | ".join(f"{mean:.1f}" for mean in means) + " |")
    if len(rows) > 1:
        spreads = [100 * statistics.stdev(row[way] for row in rows) for way in ("untrained", *WAYS)]
        page.append("| standard deviation | " + " | ".join(f"{spread:.1f}" for spread in spreads) + " |")
    return page


if __name__ == "__main__":
    main()
