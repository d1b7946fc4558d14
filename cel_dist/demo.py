"""The whole story on one machine: corpus, shards, two ranks of training, evaluation, report, registered model."""

import logging
import os
import shlex
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from cel_dist.config import Config
from cel_dist.config_file import load_config
from cel_dist.corpus.split import Split, split_by_speaker
from cel_dist.corpus.synth import read_corpus, synthesise_corpus
from cel_dist.data.files import require_folder_or_nothing, writing_into
from cel_dist.errors import CelError

logger = logging.getLogger(__name__)
Progress = Callable[[int, int], None]

NUM_SPEAKERS = 100
UTTERANCES_EACH = 12
# Some five passes over the embedded training set: four to five minutes on two cores.
MAX_STEPS = 120
BATCH_SIZE = 40
MODEL_NAME = "cel-demo"


@dataclass(frozen=True)
class DemoResult:
    """What `cel demo` tells. EERs are fractions on speakers that neither training nor model selection has heard.

    Attributes:
        commands: shell lines to go on with, by what they do. They work as they stand in the folder where the demo ran:
            the registry of the demo is in its own folder, and its programs need not be on the PATH.
    """

    eer_before: float
    eer_after: float
    seconds: float
    utterances_per_second: float
    run_dir: str
    report: str
    model_uri: str
    tracking_uri: str
    commands: dict[str, str]


def run_demo(
    out: Path,
    corpus: Path | None = None,
    *,
    num_ranks: int = 2,
    overrides: tuple[str, ...] = (),
    progress: Progress | None = None,
) -> DemoResult:
    """Go through the whole system once.

    What is there from an earlier demo in `out` (corpus, bank, shards) is used again; every call trains a run of its
    own.

    Args:
        out: folder for everything that is made.
        corpus: audio to use in place of the embedded corpus: a folder that `cel corpus synth` made, or a tree
            `<speaker>/...` of at least six speakers.
        num_ranks: training processes.
        overrides: settings of the training run, as on the command line.
        progress: told of the work done while the embedded corpus is made.

    Raises:
        CelError: the corpus cannot be used.
        RunError: training failed.
    """
    from cel_dist.data.prepare import prepare
    from cel_dist.data.prepare_bank import prepare_bank
    from cel_dist.launcher import Placement, launch

    begin = time.perf_counter()
    require_folder_or_nothing(out)
    with writing_into(out):
        out.mkdir(parents=True, exist_ok=True)
    logger.info("1/5 corpus: %s", corpus or f"{NUM_SPEAKERS} synthetic speakers in {out / 'corpus'}")
    split, bank_audio = _corpus(out, corpus, progress)
    logger.info("2/5 shards and bank: %s, %s", out / "shards", out / "bank")
    prepare(split.root, out / "shards", list_file=split.train_list)
    prepare_bank(bank_audio, out / "bank")
    run_dir = _new_run(out)
    config = run_dir / "demo.yaml"
    config.write_text(yaml.safe_dump(_settings(out, split, run_dir), sort_keys=False), encoding="utf-8")
    logger.info("3/5 training: %d ranks, run folder %s", num_ranks, run_dir)
    summary = launch(config, list(overrides), Placement(num_ranks), resume="none")
    logger.info("4/5 evaluation on speakers never heard: %s", split.test_trials)
    eer_before, eer_after = _test(load_config(config, overrides), split, run_dir)
    logger.info("5/5 report")
    from cel_dist.report import write_report

    report = write_report(run_dir)
    return DemoResult(
        eer_before=eer_before,
        eer_after=eer_after,
        seconds=time.perf_counter() - begin,
        utterances_per_second=summary["utterances_per_second"],
        run_dir=str(run_dir),
        report=str(report),
        model_uri=summary["model_uri"],
        tracking_uri=_tracking_uri(out),
        commands=_commands(summary["model_uri"], _tracking_uri(out), split),
    )


def _corpus(out: Path, corpus: Path | None, progress: Progress | None) -> tuple[Split, Path]:
    if corpus is not None and not corpus.is_dir():
        raise CelError(f"there is no folder {corpus}; give a folder of audio, or leave --corpus out")
    made = read_corpus(corpus) if corpus else None
    if corpus and made is None:
        # Noise and rooms still come from the embedded corpus; of its speakers a handful is enough.
        small = synthesise_corpus(out / "noise", speakers=6, utterances=2, progress=progress)
        return split_by_speaker(corpus, out / "lists"), small.noise.parent
    if made is None:
        made = synthesise_corpus(out / "corpus", speakers=NUM_SPEAKERS, utterances=UTTERANCES_EACH, progress=progress)
    return Split(made.root, made.train_list, made.validation_trials, made.test_trials), made.noise.parent


def _new_run(out: Path) -> Path:
    for number in range(1, 10_000):
        run_dir = out / "runs" / f"demo-{number:03d}"
        try:
            run_dir.mkdir(parents=True)
        except FileExistsError:
            continue
        return run_dir
    raise CelError(f"{out / 'runs'} is full of demos; delete some")


def _settings(out: Path, split: Split, run_dir: Path) -> dict[str, Any]:
    return {
        "run": {"dir": str(run_dir)},
        "data": {"shards": str(out / "shards"), "bank": str(out / "bank"), "short": "repeat"},
        # The published noise levels hide the voices from a network that sees only a few thousand utterances.
        "augment": {"profile": 1, "noise_snr_db": [10, 25], "speech_snr_db": [20, 30], "music_snr_db": [10, 25]},
        # As in the run that was measured; the statistics of all ranks were not compared with it over as many steps.
        "encoder": {"batch_norm": "per_rank"},
        "train": {"batch_size": BATCH_SIZE, "epochs": 1000, "max_steps": MAX_STEPS},
        "optim": {"schedule": "cosine", "warmup_steps": 10},
        "eval": {"trials": str(split.validation_trials), "root": str(split.root)},
        "tracking": {"uri": _tracking_uri(out), "experiment": "demo", "register_as": MODEL_NAME},
    }


def _tracking_uri(out: Path) -> str:
    return f"sqlite:///{(out / 'mlflow.db').resolve()}"


def _commands(model_uri: str, tracking_uri: str, split: Split) -> dict[str, str]:
    from cel_dist.evaluation.trials import Trials

    trials = Trials.read(split.test_trials)
    first_target = int(trials.labels.argmax())
    voices = [str(split.root / trials.files[side[first_target]]) for side in (trials.enrol, trials.test)]
    registry = shlex.quote(tracking_uri)
    verify = f"{_program('cel', 'cel_dist')} verify --model {shlex.quote(model_uri)} {shlex.join(voices)}"
    return {
        "compare two recordings of an unheard speaker": f"MLFLOW_TRACKING_URI={registry} {verify}",
        "look at all runs in a browser": f"{_program('mlflow', 'mlflow')} ui --backend-store-uri {registry}",
    }


def _program(name: str, module: str) -> str:
    """How a shell in the current folder starts an installed program with the interpreter that runs now."""
    interpreter = Path(sys.executable)
    inside = interpreter.is_relative_to(Path.cwd())
    place = Path(os.path.relpath(interpreter) if inside else interpreter)
    if interpreter.with_name(name).is_file():
        return shlex.quote(str(place.with_name(name)))
    return f"{shlex.quote(str(place))} -m {module}"


def _test(config: Config, split: Split, run_dir: Path) -> tuple[float, float]:
    """EER on the test list of the encoder that training began with, and of the best one."""
    from cel_dist.evaluation import evaluate
    from cel_dist.model import SpeakerModel, load_model
    from cel_dist.network import describe
    from cel_dist.training.trainer import initial_encoder

    untrained = SpeakerModel(initial_encoder(config), describe(config))
    before = evaluate(untrained, split.test_trials, split.root)
    after = evaluate(load_model(run_dir), split.test_trials, split.root, out=run_dir / "test")
    return before.eer, after.eer
