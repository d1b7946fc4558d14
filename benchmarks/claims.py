"""The paper's two claims on real speech: uniformity helps the similarity loss, and fine-tuning from CEL beats
fine-tuning from random weights.

    .venv/bin/python benchmarks/claims.py --shared ../shared --out runs/claims

`--shared` is a folder with `data/` in it: `corpus/`, `train_labelled.txt` and the test lists. Every
arm is trained with each seed on the same budget (`claims.yaml`, `claims_finetuning.yaml`), the last model is kept, and
the test lists are scored once, at the end: they choose no model. What is there already is not done again, so that the
command goes on where it was interrupted. Writes claims.json and .md to `--results`; what people have to say about the
numbers, in claims_notes.md there, becomes the end of the page.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cel_dist.config_file import load_config
from cel_dist.data.prepare import prepare
from cel_dist.distributed import let_idle_threads_sleep
from cel_dist.errors import CelError, RunError

PROJECT = Path(__file__).resolve().parent.parent
TEST_LISTS = ("trials.txt", "trials_librispeech.txt")
SCORED = "claims.json"
FRACTION = 0.1


@dataclass(frozen=True)
class Arm:
    """What is compared: settings that the other arms of its table have otherwise.

    Attributes:
        name: of the folder of its runs.
        title: of its row.
        settings: `key=value`; `{out}` and `{seed}` are filled in.
        against: the arm that it is claimed to be better than.
    """

    name: str
    title: str
    settings: tuple[str, ...]
    against: str | None = None


def _pretraining(name: str, title: str, similarity: str, *settings: str) -> Arm:
    shards = ("data.shards={out}/shards", f"loss.similarity={similarity}")
    short = "a-prot" if similarity == "angular_prototypical" else "a-cont"
    return Arm(name, title, shards + settings, None if name == short else short)


def _finetuning(name: str, title: str, shards: str, *settings: str, against: str | None = None) -> Arm:
    init = (f"encoder.init={{out}}/{START}-{{seed}}",) if against else ()
    return Arm(name, title, (f"data.shards={{out}}/{shards}", *init, *settings), against)


START = "a-prot+pon"
TENTH = "labelled-tenth-{seed}"
# The published rate takes a network far away from where it began.
SLOW = "optim.lr=2e-4"
ARMS = {
    "claims.yaml": (
        _pretraining("a-prot", "A-Prot alone", "angular_prototypical", "loss.lambda_u=0"),
        _pretraining("a-prot+pon", "A-Prot + uniformity PoN", "angular_prototypical", "loss.pairs=pon"),
        _pretraining("a-prot+apn", "A-Prot + uniformity APN", "angular_prototypical", "loss.pairs=apn"),
        _pretraining("a-prot+an", "A-Prot + uniformity AN", "angular_prototypical", "loss.pairs=an"),
        _pretraining("a-cont", "A-Cont alone", "angular_contrastive", "loss.lambda_u=0"),
        _pretraining("a-cont+pon", "A-Cont + uniformity PoN", "angular_contrastive", "loss.pairs=pon"),
    ),
    "claims_finetuning.yaml": (
        _finetuning("all-nothing", "all labels, from nothing", "labelled"),
        _finetuning("all-cel", "all labels, from CEL", "labelled", against="all-nothing"),
        _finetuning("tenth-nothing", "a tenth of the labels, from nothing", TENTH),
        _finetuning("tenth-cel", "a tenth of the labels, from CEL", TENTH, against="tenth-nothing"),
        _finetuning("tenth-nothing-slow", "a tenth, from nothing, a fifth of the learning rate", TENTH, SLOW),
        _finetuning("tenth-cel-slow", "a tenth, from CEL, a fifth of it", TENTH, SLOW, against="tenth-nothing-slow"),
    ),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shared", type=Path, default=PROJECT.parent / "shared")
    parser.add_argument("--out", type=Path, default=Path("runs/claims"))
    parser.add_argument("--results", type=Path, default=PROJECT / "benchmarks/results")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="runs at a time, with a thread each")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings of all runs")
    options = parser.parse_intermixed_args()
    let_idle_threads_sleep()
    try:
        make_data(options.shared / "data", options.out, options.seeds)
        rows = []
        # Encoders first, from which others begin; all arms of a seed before the next seed, so that what an interruption
        # leaves can be compared.
        for config, arms in ARMS.items():
            runs = [(config, arm, seed) for seed in range(options.seeds) for arm in arms]
            with ThreadPoolExecutor(options.jobs) as pool:
                rows += list(pool.map(lambda run: train_and_score(*run, options), runs))
        write(options, rows)
    except (CelError, RunError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, CelError) else 1
    return 0


def make_data(data: Path, out: Path, num_seeds: int) -> None:
    """Shards without labels, with all of them, and for each seed with a tenth."""
    out.mkdir(parents=True, exist_ok=True)
    labelled = [line.split() for line in (data / "train_labelled.txt").read_text().splitlines()]
    lists = {"shards": [path for path, _ in labelled], "labelled": [path for path, _ in labelled]}
    for seed in range(num_seeds):
        lists[f"labelled-tenth-{seed}"] = tenth(labelled, seed)
    for name, paths in lists.items():
        chosen = out / f"{name}.txt"
        chosen.write_text("".join(f"{path}\n" for path in paths))
        labels = data / "train_labelled.txt" if name.startswith("labelled") else None
        prepare(data / "corpus", out / name, list_file=chosen, labels=labels)


def tenth(labelled: list[list[str]], seed: int) -> list[str]:
    """The utterances of speakers drawn at random, of whom there are at least two, until they are a tenth of all."""
    by_speaker = defaultdict(list)
    for path, speaker in labelled:
        by_speaker[speaker].append(path)
    rich = sorted(speaker for speaker, paths in by_speaker.items() if len(paths) > 1)
    chosen: list[str] = []
    for place in np.random.default_rng(seed).permutation(len(rich)).tolist():
        if len(chosen) >= FRACTION * len(labelled):
            break
        chosen += by_speaker[rich[place]]
    return chosen


def train_and_score(config: str, arm: Arm, seed: int, options: argparse.Namespace) -> dict[str, Any]:
    """One run in a process of its own, and its error rates."""
    run = options.out / f"{arm.name}-{seed}"
    settings = [setting.format(out=options.out, seed=seed) for setting in arm.settings]
    settings += [f"run.dir={run}", f"train.seed={seed}", *options.overrides]
    with open(run.with_suffix(".log"), "a") as log:
        command = [sys.executable, "-m", "cel_dist.train", str(Path(__file__).with_name(config)), *settings]
        done = subprocess.run(command, stderr=log, stdout=log, check=False)
    if done.returncode:
        raise RunError(f"{run} was not trained (exit code {done.returncode}); see {run.with_suffix('.log')}")
    if not (run / SCORED).exists():
        (run / SCORED).write_text(json.dumps(score(run, options.shared / "data")))
    print(f"{run.name}: {(run / SCORED).read_text()}", file=sys.stderr)
    return {"config": config, "arm": arm.name, "seed": seed, **json.loads((run / SCORED).read_text())}


def score(run: Path, data: Path) -> dict[str, Any]:
    """Test EERs in percent, and the last losses of a run."""
    # It imports torch, which must not come before OpenMP was told to let idle threads sleep.
    from cel_dist.evaluation import evaluate
    from cel_dist.model import load_model

    model = load_model(run, "cpu")
    eers = {trials: 100 * evaluate(model, data / trials, data / "corpus").eer for trials in TEST_LISTS}
    last = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    return {"eer": eers, "training": {name: last[name] for name in ("alignment", "uniformity", "accuracy")}}


def write(options: argparse.Namespace, rows: list[dict[str, Any]]) -> None:
    """Numbers and conditions as JSON and as a page."""
    from importlib.metadata import version

    configs = {name: load_config(Path(__file__).with_name(name), options.overrides) for name in ARMS}
    versions = {name: version(name) for name in ("cel_dist", "torch", "deepspeed")}
    machine = f"{os.cpu_count()} cores, {platform.machine()}"
    report = {
        "conditions": {
            "machine": machine,
            "versions": versions,
            "configs": {name: config.model_dump(mode="json") for name, config in configs.items()},
        },
        "untrained_eer": untrained(options),
        "rows": rows,
    }
    lines = [
        "# The claims of the paper on real speech",
        "",
        f"Written by `benchmarks/claims.py`; {machine}, a process with a thread a run; "
        f"{', '.join(f'{name} {number}' for name, number in versions.items())}. {options.seeds} seeds an arm: means "
        "and standard deviations over the seeds. Differences are between runs of the same seed; below 0 the claim "
        "holds. The test lists were scored once, from the last model, and chose none.",
    ]
    for name, text in zip(ARMS, (_told_pretraining, _told_finetuning), strict=True):
        lines += ["", *text(configs[name], report["untrained_eer"]), "", *table(name, rows)]
    options.results.mkdir(parents=True, exist_ok=True)
    (options.results / "claims.json").write_text(json.dumps(report, indent=1) + "\n")
    notes = options.results / "claims_notes.md"
    if notes.exists():
        lines += ["", notes.read_text().strip()]
    (options.results / "claims.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


def _told_pretraining(config: Any, untrained_eer: dict[str, float]) -> list[str]:
    steps, batch = config.train.max_steps, config.train.batch_size
    return [
        "## Uniformity helps",
        "",
        f"Without labels: {steps} steps of {batch} utterances ({steps * batch} seen, 2289 there are), two segments of "
        f"{config.data.segment_frames} frames, augmentation profile {config.augment.profile}, "
        f"{config.encoder.name}. An untrained encoder has "
        f"{', '.join(f'{eer:.1f} % on {name}' for name, eer in untrained_eer.items())} (seed 0).",
    ]


def _told_finetuning(config: Any, untrained_eer: dict[str, float]) -> list[str]:
    steps, batch = config.train.max_steps, config.train.batch_size
    return [
        "## Fine-tuning from CEL helps",
        "",
        f"With labels, {config.loss.similarity} over speakers: {steps} steps of {batch} utterances, "
        f"{config.labels.utterances} of a speaker, one segment of {config.data.segment_frames} frames each, no "
        f"augmentation. All: 2289 utterances of 422 speakers. A tenth: whole speakers, others for each seed. `from "
        f"CEL` begins with the encoder of `{START}` of the same seed.",
    ]


def untrained(options: argparse.Namespace) -> dict[str, float]:
    """Test EERs in percent of an encoder with random weights."""
    from cel_dist.evaluation import evaluate
    from cel_dist.model import SpeakerModel
    from cel_dist.network import describe
    from cel_dist.training.objective import initial_encoder

    config = load_config(Path(__file__).with_name("claims.yaml"), options.overrides)
    model = SpeakerModel(initial_encoder(config), describe(config))
    data = options.shared / "data"
    return {trials: 100 * evaluate(model, data / trials, data / "corpus").eer for trials in TEST_LISTS}


def table(config: str, rows: list[dict[str, Any]]) -> Iterator[str]:
    """EERs of the arms of one configuration, and the differences that the claim is about."""
    yield "| | " + " | ".join(f"{name}: EER % | difference" for name in TEST_LISTS) + " | alignment | uniformity |"
    yield "| --- |" + " ---: | ---: |" * len(TEST_LISTS) + " ---: | ---: |"
    by_arm = {arm.name: sorted((row for row in rows if row["arm"] == arm.name), key=_seed) for arm in ARMS[config]}
    for arm in ARMS[config]:
        cells = []
        for name in TEST_LISTS:
            eers = [row["eer"][name] for row in by_arm[arm.name]]
            cells.append(spread(eers))
            others = [row["eer"][name] for row in by_arm[arm.against]] if arm.against else []
            cells.append(spread([a - b for a, b in zip(eers, others, strict=True)], "+") if others else "")
        for name in ("alignment", "uniformity"):
            cells.append(f"{statistics.mean(row['training'][name] for row in by_arm[arm.name]):.2f}")
        yield f"| {arm.title} | {' | '.join(cells)} |"


def spread(values: list[float], sign: str = "") -> str:
    """Mean and standard deviation; the mean alone of one value."""
    mean = f"{statistics.mean(values):{sign}.2f}"
    return f"{mean} ± {statistics.stdev(values):.2f}" if len(values) > 1 else mean


def _seed(row: dict[str, Any]) -> int:
    return int(row["seed"])


if __name__ == "__main__":
    sys.exit(main())
