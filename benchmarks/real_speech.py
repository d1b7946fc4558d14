"""EER on real speech after fixed numbers of utterances, beside the published implementation on the same data.

    .venv/bin/python benchmarks/real_speech.py --shared ../shared --out runs/real_speech

`--shared` is a folder with `data/` in it: `corpus/`, `train.txt`, `train_labelled.txt`, `noise/`, `rir/`, `trials.txt`
and `trials_librispeech.txt`. Training sees audio only. Labels serve twice: some training speakers are taken out for
validation, and the test lists are scored when training has ended. An `--out` that holds a run is refused: `--resume`
continues the same run, `--measure-only` scores a finished one. Writes real_speech.json and .md to `--results`.
"""

import argparse
import json
import os
import platform
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cel_dist.config import Config
from cel_dist.config_file import load_config
from cel_dist.config_sections import AugmentSection
from cel_dist.corpus.trials import Utterance, draw_trials, write_trials
from cel_dist.data.prepare import prepare
from cel_dist.data.prepare_bank import prepare_bank
from cel_dist.distributed import let_idle_threads_sleep
from cel_dist.errors import CelError, RunError
from cel_dist.launcher import Placement, launch
from cel_dist.training.result import SUMMARY

PROJECT = Path(__file__).resolve().parent.parent
TEST_LISTS = ("trials.txt", "trials_librispeech.txt")
# Measured once with the published code on the same data, under the conditions in PUBLISHED.
PUBLISHED_EER = {
    "trials.txt": {0: 29.2, 8280: 26.2, 16560: 20.2, 33120: 17.4, 49680: 17.0},
    "trials_librispeech.txt": {0: 25.9, 8280: 18.5, 16560: 17.0, 33120: 14.8, 49680: 16.0},
}
PUBLISHED = {
    "profile": 3,
    "batch_size": 100,
    "loss": "angular_prototypical + uniformity",
    "utterances_an_epoch": 1656,
    "precision": "fp32",
    "machine": "2 cores",
    "utterances_per_second": 28.0,
}
PROFILES = ("none", "noise", "a room for a quarter of the segments, noise for the others", "room and noise")
NUM_VALIDATION_SPEAKERS = 20
NUM_VALIDATION_TRIALS = 1000
# Where things lie says nothing about what was measured.
PLACES = ("data.shards", "data.bank", "eval.trials", "eval.root", "run.dir", "run.name", "tracking.uri")


@dataclass(frozen=True)
class Curve:
    """Test EERs in percent, a row for each list and number of utterances, and what the checkpoints say of their run."""

    rows: list[dict[str, Any]]
    versions: dict[str, str]
    utterances_an_epoch: int | None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shared", type=Path, default=PROJECT.parent / "shared")
    parser.add_argument("--out", type=Path, default=Path("runs/real_speech"))
    parser.add_argument("--config", type=Path, default=PROJECT / "configs/real_speech.yaml")
    parser.add_argument("--results", type=Path, default=PROJECT / "benchmarks/results")
    parser.add_argument("--nproc", type=int, default=2, help="ranks of the run, also of one that is only measured")
    begin = parser.add_mutually_exclusive_group()
    begin.add_argument("--resume", action="store_true", help="continue the run in --out, under the same settings")
    begin.add_argument("--measure-only", action="store_true", help="train nothing: score the finished run in --out")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    options = parser.parse_intermixed_args()
    let_idle_threads_sleep()
    run = options.out / "run"
    try:
        if options.measure_only:
            if options.overrides:
                raise CelError("--measure-only takes the settings of the run itself; leave the overrides out")
        else:
            train(options, run)
        config, summary = read_run(run)
        curve = measure(config, summary["steps"], run, options.shared / "data")
        write(options, config, summary, curve)
    except (CelError, RunError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, CelError) else 1
    return 0


def train(options: argparse.Namespace, run: Path) -> None:
    """Lists, shards and bank into `--out`, then the run; nothing if the run is there and has ended."""
    data, out = options.shared / "data", options.out
    overrides = [
        f"data.shards={out}/shards",
        f"data.bank={out}/bank",
        f"eval.trials={out}/validation_trials.txt",
        f"eval.root={data}/corpus",
        f"run.dir={run}",
        f"tracking.uri=sqlite:///{out.resolve()}/mlflow.db",
        *options.overrides,
    ]
    config = load_config(options.config, overrides)
    require_checkpoints(config)
    if (run / "config.yaml").exists():
        if not options.resume:
            raise CelError(
                f"{run} already holds a run; continue it with --resume, score it with --measure-only, or give another "
                "--out"
            )
        changed = differences(load_config(run / "config.yaml"), config)
        if changed:
            raise CelError(f"{run} was begun under other settings ({', '.join(changed)}); give another --out")
        if (run / SUMMARY).exists():
            return
    out.mkdir(parents=True, exist_ok=True)
    split(data, out)
    prepare(data / "corpus", out / "shards", list_file=out / "train.txt")
    prepare_bank(data, out / "bank")
    resume = "auto" if options.resume else "none"
    launch(options.config, overrides, Placement(options.nproc), resume=resume)


def require_checkpoints(config: Config) -> None:
    """Refuse settings that would leave a number of utterances without its checkpoint, before hours are spent."""
    last, every = config.train.max_steps, config.checkpoint.every_steps
    for utterances in PUBLISHED_EER[TEST_LISTS[0]]:
        step, rest = divmod(utterances, config.train.batch_size)
        if last is not None and utterances > last * config.train.batch_size:
            continue
        if rest or (step % every and step != last):
            raise CelError(
                f"no checkpoint would fall on {utterances} utterances; train.batch_size={config.train.batch_size} "
                f"times checkpoint.every_steps={every} must divide it"
            )


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


def read_run(run: Path) -> tuple[Config, dict[str, Any]]:
    """Configuration and summary of a run that has ended."""
    try:
        summary: dict[str, Any] = json.loads((run / SUMMARY).read_text(encoding="utf-8"))
    except OSError:
        raise CelError(
            f"{run} holds no run that has ended: there is no {SUMMARY}; let it end, or --resume it"
        ) from None
    return load_config(run / "config.yaml"), summary


def measure(config: Config, steps: int, run: Path, data: Path) -> Curve:
    """Test EERs of the untrained encoder, and of the checkpoints at which the published implementation was measured."""
    # They import torch, which must not come before OpenMP was told to let idle threads sleep.
    from cel_dist.evaluation import evaluate
    from cel_dist.model import SpeakerModel, load_model
    from cel_dist.network import describe
    from cel_dist.training.trainer import initial_encoder

    models = {0: SpeakerModel(initial_encoder(config), describe(config))}
    for utterances in PUBLISHED_EER[TEST_LISTS[0]]:
        step, rest = divmod(utterances, config.train.batch_size)
        if 0 < step <= steps and not rest:
            models[utterances] = load_model(run / "checkpoints" / f"step-{step:08d}")
    rows = []
    for trials in TEST_LISTS:
        for utterances, model in models.items():
            eer = 100 * evaluate(model, data / trials, data / "corpus").eer
            published = PUBLISHED_EER[trials][utterances]
            rows.append({"list": trials, "utterances": utterances, "eer": eer, "published": published})
    training = load_model(run / "checkpoints" / f"step-{steps:08d}").description.training
    epoch = round(training.utterances / training.epoch) if training.utterances and training.epoch else None
    return Curve(rows, training.versions, epoch)


def differences(config: Config, other: Config) -> list[str]:
    """Settings of `config` that `other` has otherwise, as `key=value`; places do not count."""
    others = dict(settings(other))
    return [f"{key}={json.dumps(value)}" for key, value in settings(config) if others[key] != value]


def settings(config: Config) -> Iterator[tuple[str, Any]]:
    """Dotted names and values of all settings but places."""
    for section, fields in config.model_dump(mode="json").items():
        yield from ((f"{section}.{key}", value) for key, value in fields.items() if f"{section}.{key}" not in PLACES)


def write(options: argparse.Namespace, config: Config, summary: dict[str, Any], curve: Curve) -> None:
    """Numbers and conditions as JSON and as a page."""
    machine = f"{os.cpu_count()} cores, {platform.machine()}"
    source = options.config.resolve()
    source = source.relative_to(PROJECT) if source.is_relative_to(PROJECT) else source
    changed = differences(config, load_config(options.config))
    speed = {key: summary[key] for key in ("steps", "seconds", "utterances_per_second")}
    report = {
        "conditions": {
            "machine": machine,
            "ranks": options.nproc,
            "versions": curve.versions,
            "utterances_an_epoch": curve.utterances_an_epoch,
            "config": dict(settings(config)),
            "published": {**PUBLISHED, "snr_db": snr_ranges(AugmentSection())},
        },
        "validation_eer": None if summary["eer"] is None else 100 * summary["eer"],
        **speed,
        "curve": curve.rows,
    }
    versions = ", ".join(f"{name} {number}" for name, number in curve.versions.items())
    lines = [
        "# EER on real speech",
        "",
        f"Written by `benchmarks/real_speech.py`, from `{source}`{' with ' + ', '.join(changed) if changed else ''}; "
        f"{options.nproc} ranks on {machine}; {versions}. {NUM_VALIDATION_SPEAKERS} training speakers were held out "
        "for validation; the test lists were scored after training, from the checkpoints, and chose nothing. One run, "
        f"seed {config.train.seed}.",
        "",
        "| list | utterances seen | EER % | published EER % | difference |",
        "| --- | ---: | ---: | ---: | ---: |",
        *(
            f"| {row['list']} | {row['utterances']} | {row['eer']:.2f} | {row['published']:.1f} "
            f"| {row['eer'] - row['published']:+.2f} |"
            for row in curve.rows
        ),
        "",
        "0 utterances: the untrained encoder. Both implementations trained on the same list, this one without the "
        "validation speakers. Their conditions:",
        "",
        "| | this run | published implementation |",
        "| --- | --- | --- |",
        *(f"| {name} | {ours} | {theirs} |" for name, ours, theirs in conditions(config, speed, curve)),
        "",
        "A smaller batch makes more updates of the same number of utterances, and milder augmentation an easier task. "
        "The two speeds were measured apart, this one beside other work on the same machine: they are no comparison.",
    ]
    options.results.mkdir(parents=True, exist_ok=True)
    (options.results / "real_speech.json").write_text(json.dumps(report, indent=1) + "\n")
    (options.results / "real_speech.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


def conditions(config: Config, speed: dict[str, Any], curve: Curve) -> Iterator[tuple[str, str, str]]:
    """Rows of the table of conditions: what, here, there."""
    profile, published = config.augment.profile, int(PUBLISHED["profile"])
    yield "augmentation profile", f"{profile}: {PROFILES[profile]}", f"{published}: {PROFILES[published]}"
    theirs = snr_ranges(AugmentSection())
    for kind, (low, high) in snr_ranges(config.augment).items():
        yield f"SNR of {kind}, dB", f"{low:g} to {high:g}", f"{theirs[kind][0]:g} to {theirs[kind][1]:g}"
    yield "batch size", str(config.train.batch_size), str(PUBLISHED["batch_size"])
    yield "loss", f"{config.loss.similarity} + uniformity ({config.loss.pairs})", str(PUBLISHED["loss"])
    optim = config.optim
    kind = "step decay" if optim.schedule == "step" else f"cosine to {optim.min_lr:g}"
    yield "learning rate", f"{optim.lr:g}, {kind}, {optim.warmup_steps} warm-up steps", "not recorded"
    yield "utterances an epoch", str(curve.utterances_an_epoch), str(PUBLISHED["utterances_an_epoch"])
    yield "precision", config.train.precision, str(PUBLISHED["precision"])
    measured = speed["utterances_per_second"]
    shown = "not measured" if measured is None else f"{measured:.1f}"
    yield "utterances/s", shown, str(PUBLISHED["utterances_per_second"])


def snr_ranges(augment: AugmentSection) -> dict[str, tuple[float, float]]:
    return {"noise": augment.noise_snr_db, "speech": augment.speech_snr_db, "music": augment.music_snr_db}


if __name__ == "__main__":
    sys.exit(main())
