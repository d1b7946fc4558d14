"""The benchmark on real speech, on a small run that need not be trained: who wins is not asked here."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from cel_dist.config import Config
from cel_dist.config_file import dump_config, load_config
from cel_dist.description import Provenance
from cel_dist.evaluation import evaluate
from cel_dist.model import SpeakerModel
from cel_dist.network import describe
from cel_dist.training.trainer import initial_encoder

PROJECT = Path(__file__).resolve().parent.parent
LISTS = ("trials.txt", "trials_librispeech.txt")
STEPS = 414


def real_speech(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, PROJECT / "benchmarks/real_speech.py", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def model_of(config: Config, step: int) -> SpeakerModel:
    seeded = config.model_copy(update={"train": config.train.model_copy(update={"seed": step})})
    training = Provenance(step=step, epoch=step / 37, utterances=40 * step, versions={"torch": "2.0.0"})
    return SpeakerModel(initial_encoder(seeded), describe(config, training))


@pytest.fixture(scope="module")
def finished(small_corpus, tmp_path_factory) -> tuple[Path, Path, Config]:
    """A data folder, and an --out whose run ended after a third of the curve with other settings than the file's."""
    folder = tmp_path_factory.mktemp("real_speech")
    data, out = folder / "shared" / "data", folder / "out"
    data.mkdir(parents=True)
    (data / "corpus").symlink_to(small_corpus.audio)
    for name in LISTS:
        shutil.copy(small_corpus.trials, data / name)
    overrides = [f"train.max_steps={STEPS}", "augment.profile=1", "encoder.embedding_dim=32", f"run.dir={out}/run"]
    config = load_config(PROJECT / "configs/real_speech.yaml", [*overrides, "train.precision=bf16"])
    for step in (207, STEPS):
        model_of(config, step).save(out / "run" / "checkpoints" / f"step-{step:08d}" / "model")
    (out / "run" / "config.yaml").write_text(dump_config(config))
    summary = {"steps": STEPS, "seconds": 1.0, "utterances_per_second": None, "eer": 0.125}
    (out / "run" / "summary.json").write_text(json.dumps(summary))
    return folder / "shared", out, config


def test_a_finished_run_is_measured_and_told_by_its_own_settings(finished, tmp_path):
    shared, out, config = finished
    done = real_speech("--shared", shared, "--out", out, "--results", tmp_path, "--measure-only")
    assert done.returncode == 0, done.stderr[-2000:]
    page = (tmp_path / "real_speech.md").read_text()
    assert page == done.stdout
    changed = 'with augment.profile=1, encoder.embedding_dim=32, train.max_steps=414, train.precision="bf16"; 2 ranks'
    assert f"from `configs/real_speech.yaml` {changed}" in page
    assert "| augmentation profile | 1: noise | 3: room and noise |" in page
    assert "| SNR of speech, dB | 20 to 30 | 13 to 20 |" in page
    assert "| batch size | 40 | 100 |" in page
    assert "| precision | bf16 | fp32 |" in page
    assert "| utterances an epoch | 1480 | 1656 |" in page
    assert "| utterances/s | not measured | 28.0 |" in page
    report = json.loads((tmp_path / "real_speech.json").read_text())
    assert [(row["list"], row["utterances"]) for row in report["curve"]] == [
        (name, utterances) for name in LISTS for utterances in (0, 8280, 16560)
    ]
    assert [row["published"] for row in report["curve"]] == [29.2, 26.2, 20.2, 25.9, 18.5, 17.0]
    for row in report["curve"]:
        expected = evaluate(
            model_of(config, row["utterances"] // 40), shared / "data" / row["list"], shared / "data" / "corpus"
        )
        assert row["eer"] == pytest.approx(100 * expected.eer)
    assert report["conditions"]["config"]["train.precision"] == "bf16"
    assert report["conditions"]["versions"] == {"torch": "2.0.0"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "already holds a run; continue it with --resume"),
        (["--resume"], "was begun under other settings (augment.profile=1, encoder.embedding_dim=32"),
        (["--measure-only", "optim.lr=1"], "leave the overrides out"),
        (["checkpoint.every_steps=100"], "no checkpoint would fall on 8280 utterances"),
    ],
)
def test_a_run_is_neither_overwritten_nor_continued_otherwise(finished, tmp_path, arguments, message):
    shared, out, _ = finished
    done = real_speech("--shared", shared, "--out", out, "--results", tmp_path, *arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: ")
    assert message in done.stderr
    assert done.stderr.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_a_run_that_has_not_ended_is_not_measured(tmp_path):
    done = real_speech("--out", tmp_path, "--measure-only")
    assert done.returncode == 2
    assert "holds no run that has ended" in done.stderr
