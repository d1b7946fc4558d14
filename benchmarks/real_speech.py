"""EER on real speech after fixed numbers of utterances, beside the published implementation on the same data.

    python benchmarks/real_speech.py --shared ../shared --out runs/real_speech

`--shared` is a folder with `data/` in it: `corpus/`, `train.txt`, `train_labelled.txt`, `noise/`, `rir/`, `trials.txt`
and `trials_librispeech.txt`. Training sees audio only. Labels serve twice: some training speakers are taken out for
validation, and the test lists are scored when training has ended. Writes results/real_speech.json and .md.
"""

import argparse
import json
import os
import platform
import time
from collections import Counter
from importlib.metadata import version
from pathlib import Path

import numpy as np

from cel_dist.config import load_config
from cel_dist.corpus.trials import Utterance, draw_trials, write_trials
from cel_dist.data.prepare import prepare
from cel_dist.data.prepare_bank import prepare_bank
from cel_dist.evaluation import evaluate
from cel_dist.launcher import launch
from cel_dist.model import load_model

PROJECT = Path(__file__).resolve().parent.parent
RESULTS = Path(__file__).resolve().parent / "results"
TEST_LISTS = ("trials.txt", "trials_librispeech.txt")
# Measured once with the published code on the same data: A-Prot + uniformity, batch 100, profile 3, fp32, two cores.
PUBLISHED_EER = {
    "trials.txt": {0: 29.2, 8280: 26.2, 16560: 20.2, 33120: 17.4, 49680: 17.0},
    "trials_librispeech.txt": {0: 25.9, 8280: 18.5, 16560: 17.0, 33120: 14.8, 49680: 16.0},
}
PUBLISHED_UTTERANCES_PER_SECOND = 28
NUM_VALIDATION_SPEAKERS = 20
NUM_VALIDATION_TRIALS = 1000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shared", type=Path, default=PROJECT.parent / "shared")
    parser.add_argument("--out", type=Path, default=Path("runs/real_speech"))
    parser.add_argument("--config", type=Path, default=PROJECT / "configs/real_speech.yaml")
    parser.add_argument("--nproc", type=int, default=2)
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    options = parser.parse_intermixed_args()
    data, out = options.shared / "data", options.out
    out.mkdir(parents=True, exist_ok=True)
    split(data, out)
    prepare(data / "corpus", out / "shards", list_file=out / "train.txt")
    prepare_bank(data, out / "bank")
    overrides = [
        f"data.shards={out}/shards",
        f"data.bank={out}/bank",
        f"eval.trials={out}/validation_trials.txt",
        f"eval.root={data}/corpus",
        f"run.dir={out}/run",
        f"tracking.uri=sqlite:///{out.resolve()}/mlflow.db",
        *options.overrides,
    ]
    begin = time.time()
    summary = launch(options.config, overrides, num_ranks=options.nproc, hostfile=None, resume="auto")
    summary["wall_seconds"] = time.time() - begin
    config = load_config(options.config, overrides)
    curve = measure(config.train.batch_size, out / "run", data)
    write(summary, curve, config, options.nproc, options.overrides)


def split(data: Path, out: Path) -> None:
    """Take speakers with many utterances out of the training list, for validation."""
    lines = [line.split() for line in (data / "train_labelled.txt").read_text().splitlines()]
    counts = Counter(speaker for _, speaker in lines)
    rich = sorted(speaker for speaker, count in counts.items() if count >= 8)
    held_out = set(np.random.default_rng(0).permutation(rich)[:NUM_VALIDATION_SPEAKERS].tolist())
    utterances = [Utterance(path, speaker, path.split("/")[1]) for path, speaker in lines if speaker in held_out]
    trials = draw_trials(
        utterances, num_target=NUM_VALIDATION_TRIALS, num_nontarget=NUM_VALIDATION_TRIALS, seed=0, cross_session=False
    )
    write_trials(out / "validation_trials.txt", trials)
    kept = [path for path, speaker in lines if speaker not in held_out]
    (out / "train.txt").write_text("\n".join(kept) + "\n")


def measure(batch_size: int, run: Path, data: Path) -> list[dict[str, object]]:
    """Test EERs of every checkpoint at which the published implementation was measured."""
    rows = []
    for utterances in sorted(PUBLISHED_EER[TEST_LISTS[0]]):
        checkpoint = run / "checkpoints" / f"step-{utterances // batch_size:08d}"
        if utterances % batch_size or not checkpoint.is_dir():
            continue
        model = load_model(checkpoint)
        for trials in TEST_LISTS:
            result = evaluate(model, data / trials, data / "corpus")
            published = PUBLISHED_EER[trials][utterances]
            rows.append({"list": trials, "utterances": utterances, "eer": 100 * result.eer, "published": published})
    return rows


def write(
    summary: dict[str, object], curve: list[dict[str, object]], config: object, nproc: int, overrides: list[str]
) -> None:
    conditions = {
        "machine": f"{os.cpu_count()} cores, {platform.machine()}",
        "ranks": nproc,
        "versions": {name: version(name) for name in ("torch", "deepspeed", "cel_dist")},
        "config": config.model_dump(mode="json"),  # type: ignore[attr-defined]
    }
    for section, key in (("data", "shards"), ("data", "bank"), ("eval", "trials"), ("eval", "root"), ("run", "dir")):
        conditions["config"][section].pop(key)
    conditions["config"]["tracking"].pop("uri")
    speed = {key: summary[key] for key in ("steps", "seconds", "utterances_per_second")}
    report = {"conditions": conditions, "validation_eer": 100 * summary["eer"], **speed, "curve": curve}
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "real_speech.json").write_text(json.dumps(report, indent=1) + "\n")
    lines = [
        "# EER on real speech",
        "",
        f"Written by `benchmarks/real_speech.py`. {nproc} ranks on {conditions['machine']}, torch "
        f"{conditions['versions']['torch']}, deepspeed {conditions['versions']['deepspeed']}, fp32; configuration "
        f"`configs/real_speech.yaml`{' with ' + ', '.join(overrides) if overrides else ''}. "
        f"{NUM_VALIDATION_SPEAKERS} training speakers were held out for validation; the test lists were scored after "
        "training, from the checkpoints, and chose nothing.",
        "",
        f"{report['utterances_per_second']:.1f} utterances/s (the published implementation, measured apart on such a "
        f"machine: {PUBLISHED_UTTERANCES_PER_SECOND}). The machine is shared, so the two speeds are no comparison.",
        "",
        "| list | utterances seen | EER % | published EER % | difference |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    lines += [
        f"| {row['list']} | {row['utterances']} | {row['eer']:.2f} | {row['published']:.1f} "
        f"| {row['eer'] - row['published']:+.2f} |"
        for row in sorted(curve, key=lambda row: (row["list"], row["utterances"]))
    ]
    (RESULTS / "real_speech.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
