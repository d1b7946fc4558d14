"""Training as a user starts it, on real processes and a small corpus."""

import functools
import gzip
import hashlib
import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from training_runs import CEL, ENVIRONMENT, LOSSES, losses, records, train_and_name_threads, train_job, write_config
from worlds import run_world

from cel_dist.cli.app import run as cel
from cel_dist.code_version import code_version
from cel_dist.data.prepare import prepare
from cel_dist.distributed import free_port
from cel_dist.evaluation import Diagnostics
from cel_dist.model import load_model


@pytest.fixture
def config(small_corpus, tmp_path):
    """Writes a configuration of a run in the test's folder."""
    return functools.partial(write_config, small_corpus, tmp_path)


def test_cel_train_through_the_launcher_leaves_a_whole_run(config, small_corpus, tmp_path):
    table = tmp_path / "speakers.txt"
    files = [path.relative_to(small_corpus.audio) for path in small_corpus.audio.rglob("*.wav")]
    table.write_text("".join(f"{name} {name.parts[0]}\n" for name in files))
    file = config(
        eval={"trials": str(small_corpus.trials), "root": str(small_corpus.audio), "metadata": str(table)},
        tracking={"enabled": True, "uri": f"sqlite:///{tmp_path}/mlflow.db"},
        train={"max_steps": 3},
    )
    done = subprocess.run(
        [*CEL, "train", str(file), "--nproc", "2", "--json", "--profile", "train.profile_steps=1"],
        capture_output=True,
        text=True,
        env=ENVIRONMENT,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    summary = json.loads(done.stdout)
    run = tmp_path / "run"
    assert (summary["run_dir"], summary["steps"], summary["model_uri"]) == (str(run), 3, "models:/cel/1")
    assert 0 <= summary["eer"] <= summary["eer_before"] <= 1
    assert [(row["step"], set(row)) for row in records(run, "evaluations.jsonl")] == [
        (step, {"step", "epoch", "time", "eer", "min_dcf", "eval_alignment", "eval_uniformity"}) for step in (0, 3)
    ]
    measured = {"utterances_per_second", "data_wait", "data_wait_seconds", "step_seconds", "memory_gib", "eta_seconds"}
    rows = records(run)
    assert all({*LOSSES, *measured, "step", "epoch", "time"} <= set(row) for row in rows)
    assert rows[0]["eta_seconds"] > rows[1]["eta_seconds"] > rows[2]["eta_seconds"] == 0
    [line] = re.findall(r"^step 2/3  epoch 0  loss .*", done.stderr, re.MULTILINE)
    assert re.search(r"  w 10\.\d  EER [ \d]\d\.\d\d%  [ \d.]+ utt/s  wait .* s/step  \d\.\d GiB  ETA 0m\d\ds, ", line)
    # The trace is of the last step: the first ones, which are slower, are left out where there are others.
    [trace] = (run / "profile").glob("*.json.gz")
    assert trace.name == "steps-00000003-00000003.trace.json.gz"
    assert f"profile of 1 steps: {trace}" in done.stderr
    names = {event.get("name") for event in json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]}
    parts = {"data", "read", "augment", "features", "forward and backward", "check", "optimizer"}
    assert {f"cel: {part}" for part in parts} <= names
    assert "convolution" in (run / "profile" / "summary.txt").read_text()
    assert yaml.safe_load((run / "config.yaml").read_text())["loss"]["pairs"] == "pon"
    assert "<html" in (run / "report.html").read_text()
    diagnostics = Diagnostics.load(run / "evaluation" / "diagnostics.json")
    assert [group.label for group in diagnostics.groups] == ["all trials"]
    assert diagnostics.geometry.alignment_speakers is not None
    [best] = [row for row in records(run, "evaluations.jsonl") if row["eer"] == summary["eer"]][:1]
    assert diagnostics.geometry.uniformity == pytest.approx(best["eval_uniformity"], abs=1e-6)
    assert "Voice or channel" in (run / "report.html").read_text()
    model = load_model(run)
    assert model.description.threshold is not None
    training = model.description.training
    assert training.step in (0, 3)
    manifests = {"shards": small_corpus.shards / "manifest.json", "bank": small_corpus.bank / "bank.json"}
    assert training.data_sha256 == {
        name: hashlib.sha256(file.read_bytes()).hexdigest() for name, file in manifests.items()
    }
    assert training.metrics["eer"] == summary["eer"]
    low, high = training.intervals["eer"]
    assert 0 <= low <= high <= 1
    assert training.measured_on is not None
    assert (training.measured_on.speakers, training.measured_on.replicates) == (10, 1000)
    assert training.measured_on.trials_sha256 == model.description.calibration.trials_sha256
    assert training.code == code_version()
    sample = next(small_corpus.audio.rglob("*.wav"))
    same = load_model(run / "checkpoints" / "step-00000003").embed(sample)
    assert same.shape == (512,)
    stored = {path.name for path in (tmp_path / "mlartifacts").rglob("*") if path.is_file()}
    assert {"config.yaml", "report.html", "training.svg", "det.svg", "scores.svg", "encoder.safetensors"} <= stored


def test_every_launcher_starts_the_same_training(config, tmp_path):
    scripts = Path(sys.executable).parent
    commands = {
        "deepspeed": ["deepspeed", "--num_accelerators", "2", "--master_port", str(free_port())],
        "torchrun": ["torchrun", "--nproc_per_node", "2", "--master_port", str(free_port())],
    }
    # torchrun looks for the python beside it.
    environment = {**ENVIRONMENT, "PATH": f"{scripts}{os.pathsep}{os.environ['PATH']}"}
    for launcher, (script, *options) in commands.items():
        file = config(launcher, train={"max_steps": 2})
        command = [scripts / script, *options, "--module", "cel_dist.train", str(file)]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
        assert done.returncode == 0, done.stderr[-3000:]
    assert set(losses(tmp_path / "deepspeed")) == {1, 2}
    assert losses(tmp_path / "deepspeed") == losses(tmp_path / "torchrun")


def test_one_process_without_a_launcher_trains(config, tmp_path):
    file = config(train={"max_steps": 1}, data={"num_speakers": 20})
    command = [sys.executable, "-m", "cel_dist.train", str(file)]
    done = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert not (tmp_path / "run" / "profile").exists()
    assert set(losses(tmp_path / "run")) == {1}
    # The shards have no labels: forty utterances of what is said to be twenty speakers.
    (row,) = records(tmp_path / "run")
    assert row["false_negatives_expected"] == pytest.approx(1 / 39)
    assert "false_negatives" not in row


def test_checkpoints_are_kept_as_configured_and_unfinished_ones_do_not_count(config, tmp_path):
    file = config(train={"max_steps": 4}, checkpoint={"every_steps": 1, "keep_last": 2})
    [(_, threads, _)] = run_world(1, train_and_name_threads, file, folder=tmp_path / "1")
    assert not [name for name in threads if "gloo" in name]
    folder = tmp_path / "run" / "checkpoints"
    assert sorted(path.name for path in folder.iterdir()) == ["step-00000003", "step-00000004"]
    (folder / "step-00000009").mkdir()
    (folder / ".writing-step-00000010").mkdir()
    result = run_world(1, train_job, file, ["train.max_steps=5"], folder=tmp_path / "2")[0]
    assert result["steps"] == 5


def test_training_starts_from_the_encoder_that_it_is_given(config, tmp_path):
    run_world(1, train_job, config("first", train={"max_steps": 2}), folder=tmp_path / "1")
    seeded = config("second", encoder={"init": str(tmp_path / "first")}, optim={"lr": 1e-12}, train={"max_steps": 1})
    run_world(1, train_job, seeded, folder=tmp_path / "2")
    first, second = (dict(load_model(tmp_path / name).encoder.named_parameters()) for name in ("first", "second"))
    assert all(torch.allclose(first[name], second[name], atol=1e-9) for name in first)


def test_a_port_in_use_is_named(config, tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        place = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
        environment = {**ENVIRONMENT, **place, "MASTER_PORT": str(taken.getsockname()[1])}
        command = [sys.executable, "-m", "cel_dist.train", str(config())]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 2
    assert f"127.0.0.1:{environment['MASTER_PORT']} is in use; choose another one" in done.stderr
    assert "Traceback" not in done.stderr


def test_bad_input_costs_one_line_and_exit_code_2(config, capfd):
    file = str(config())
    for arguments in (["absent.yaml"], [file, "--nproc", "3"]):
        done = subprocess.run([*CEL, "train", *arguments], capture_output=True, text=True, env=ENVIRONMENT, check=False)
        assert_is_refused(done.returncode, done.stdout, done.stderr)
    # What is refused at the same places, without the time that it takes to load what is not used.
    for arguments in ([file, "data.shards=nowhere"], [file, "data.shards=nowhere", "--nproc", "2"]):
        assert_is_refused(cel(["train", *arguments]), *capfd.readouterr())


def assert_is_refused(code, out, err):
    assert code == 2
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert out == ""


def test_batch_norm_is_as_configured_and_labels_are_counted_in_the_log(config, small_corpus, tmp_path):
    labels = tmp_path / "labels.txt"
    files = sorted(path.relative_to(small_corpus.audio) for path in small_corpus.audio.rglob("*.wav"))
    labels.write_text("".join(f"{path} {path.parts[0]}\n" for path in files))
    prepare(small_corpus.audio, tmp_path / "labelled", labels=labels, workers=1)
    rows = {}
    for kind in ("global", "per_rank"):
        file = config(
            kind,
            train={"max_steps": 1, "encode_chunks": 2},
            encoder={"batch_norm": kind},
            data={"num_speakers": 20, "shards": str(tmp_path / "labelled")},
        )
        run_world(2, train_job, file, folder=tmp_path / f"world-{kind}")
        (rows[kind],) = records(tmp_path / kind)
    assert rows["global"]["loss"] != rows["per_rank"]["loss"]
    for row in rows.values():
        # Ten speakers with four utterances each; the estimate of twenty counts only where labels are missing.
        assert row["false_negatives_expected"] == pytest.approx(3 / 39)
        assert 0 <= row["false_negatives"] <= 1
