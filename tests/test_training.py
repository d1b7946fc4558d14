"""Training as a user starts it, on real processes and a small corpus."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from worlds import run_world

from cel_dist.distributed import free_port
from cel_dist.model import load_model

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}
CEL = [sys.executable, "-m", "cel_dist"]
LOSSES = ("loss", "similarity", "uniformity", "alignment", "accuracy", "grad_norm", "w", "b", "lr")


@pytest.fixture
def config(small_corpus, tmp_path):
    """Writes a configuration for a few short steps on the small corpus; returns a function of further settings."""

    def write(name="run", **sections):
        tree = {
            "run": {"dir": str(tmp_path / name)},
            "data": {
                "shards": str(small_corpus.shards),
                "bank": str(small_corpus.bank),
                "segment_frames": 60,
                "workers": 0,
            },
            "train": {"batch_size": 8, "epochs": 1, "log_every": 1, "threads": 1},
            "checkpoint": {"every_steps": 2},
            "tracking": {"enabled": False},
        }
        for section, values in sections.items():
            tree.setdefault(section, {}).update(values)
        file = tmp_path / f"{name}.yaml"
        file.write_text(yaml.safe_dump(tree))
        return file

    return write


def train_job(config, overrides=(), resume="auto"):
    from dataclasses import asdict

    from cel_dist.config import load_config
    from cel_dist.errors import CelError, RunError
    from cel_dist.training.trainer import train

    try:
        return asdict(train(load_config(config, overrides), resume))
    except (CelError, RunError) as error:
        return f"{type(error).__name__}: {error}"


def metrics(run: Path):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def losses(run: Path):
    return {row["step"]: [row[name] for name in LOSSES] for row in metrics(run) if "loss" in row}


def test_cel_train_through_the_launcher_leaves_a_whole_run(config, small_corpus, tmp_path):
    file = config(
        eval={"trials": str(small_corpus.trials), "root": str(small_corpus.audio)},
        tracking={"enabled": True, "uri": f"sqlite:///{tmp_path}/mlflow.db", "register_as": "small"},
        train={"max_steps": 3},
    )
    done = subprocess.run(
        [*CEL, "train", str(file), "--nproc", "2", "--json"],
        capture_output=True,
        text=True,
        env=ENVIRONMENT,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    summary = json.loads(done.stdout)
    run = tmp_path / "run"
    assert (summary["run_dir"], summary["steps"], summary["model_uri"]) == (str(run), 3, "models:/small/1")
    assert 0 <= summary["eer"] <= summary["eer_before"] <= 1
    rows = metrics(run)
    assert [row["step"] for row in rows if "eer" in row] == [0, 3]
    assert all(
        set(LOSSES) | {"epoch", "utterances_per_second", "data_wait"} <= set(row) for row in rows if "loss" in row
    )
    assert yaml.safe_load((run / "config.yaml").read_text())["loss"]["pairs"] == "pon"
    assert "<html" in (run / "report.html").read_text()
    model = load_model(run)
    assert model.description.threshold is not None
    assert model.description.training.step in (0, 3)
    sample = next(small_corpus.audio.rglob("*.wav"))
    same = load_model(run / "checkpoints" / "step-00000003").embed(sample)
    assert same.shape == (512,)
    assert (tmp_path / "mlflow.db").exists()


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
    command = [sys.executable, "-m", "cel_dist.train", str(config(train={"max_steps": 1}))]
    done = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert set(losses(tmp_path / "run")) == {1}


@pytest.mark.parametrize("stage", [0, 2])
def test_a_resumed_run_is_bit_identical_to_an_uninterrupted_one(config, tmp_path, stage):
    sections = {"train": {"epochs": 2, "max_steps": 5}, "engine": {"zero_stage": stage}}
    run_world(2, train_job, config("whole", **sections), folder=tmp_path / "1")
    part = config("part", **sections)
    # Step 3 is no step at which the whole run writes a checkpoint.
    run_world(2, train_job, part, ["train.max_steps=3"], folder=tmp_path / "2")
    # What was recorded behind the checkpoint comes again, so it must not stay.
    with (tmp_path / "part" / "metrics.jsonl").open("a") as stream:
        stream.write(json.dumps({"step": 4, "epoch": 0, "loss": 99.0}) + "\n")
    results = run_world(2, train_job, part, folder=tmp_path / "3")
    assert results[0]["steps"] == 5
    assert losses(tmp_path / "part") == losses(tmp_path / "whole")
    one, other = (load_model(tmp_path / name).encoder.state_dict() for name in ("whole", "part"))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_checkpoints_are_kept_as_configured_and_unfinished_ones_do_not_count(config, tmp_path):
    file = config(train={"max_steps": 4}, checkpoint={"every_steps": 1, "keep_last": 2})
    run_world(1, train_job, file, folder=tmp_path / "1")
    folder = tmp_path / "run" / "checkpoints"
    assert sorted(path.name for path in folder.iterdir()) == ["step-00000003", "step-00000004"]
    (folder / "step-00000009").mkdir()
    (folder / ".writing-step-00000010").mkdir()
    result = run_world(1, train_job, file, ["train.max_steps=5"], folder=tmp_path / "2")[0]
    assert result["steps"] == 5


def test_a_folder_with_a_run_is_not_overwritten(config, tmp_path):
    file = config(train={"max_steps": 2})
    run_world(1, train_job, file, folder=tmp_path / "1")
    before = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    refused = run_world(1, train_job, file, (), "none", folder=tmp_path / "2")[0]
    assert refused.startswith("CelError: ")
    assert "already holds a run" in refused
    other = run_world(1, train_job, file, ["encoder.embedding_dim=64"], folder=tmp_path / "3")[0]
    assert "written with encoder.embedding_dim=512, this run has encoder.embedding_dim=64" in other
    absent = run_world(1, train_job, file, (), str(tmp_path / "nowhere"), folder=tmp_path / "4")[0]
    assert "is no complete checkpoint" in absent
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == before


def test_a_loss_that_is_not_finite_stops_all_ranks_before_the_optimizer(config, tmp_path):
    file = config(train={"max_steps": 5}, optim={"lr": 1e30}, checkpoint={"every_steps": 1})
    for message in run_world(2, train_job, file, folder=tmp_path / "world"):
        assert message.startswith("RunError: step ")
        assert "nothing was updated and the last good state is" in message


def test_training_starts_from_the_encoder_that_it_is_given(config, tmp_path):
    run_world(1, train_job, config("first", train={"max_steps": 2}), folder=tmp_path / "1")
    seeded = config("second", encoder={"init": str(tmp_path / "first")}, optim={"lr": 1e-12}, train={"max_steps": 1})
    run_world(1, train_job, seeded, folder=tmp_path / "2")
    first, second = (dict(load_model(tmp_path / name).encoder.named_parameters()) for name in ("first", "second"))
    assert all(torch.allclose(first[name], second[name], atol=1e-9) for name in first)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"encoder": {"name": "fast_resnet43"}}, "did you mean 'fast_resnet34'"),
        ({"data": {"shards": "nowhere"}}, "there is no folder of shards at nowhere"),
    ],
)
def test_settings_that_do_not_fit_are_refused_by_every_rank(config, tmp_path, setting, message):
    for result in run_world(2, train_job, config(**setting), folder=tmp_path / "world"):
        assert result.startswith("CelError: ")
        assert message in result


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


def test_bad_input_costs_one_line_and_exit_code_2(config):
    for arguments in (["absent.yaml"], [str(config()), "train.bach_size=2"], [str(config()), "--nproc", "3"]):
        done = subprocess.run([*CEL, "train", *arguments], capture_output=True, text=True, env=ENVIRONMENT, check=False)
        assert done.returncode == 2
        assert done.stderr.startswith("error: ")
        assert done.stderr.count("\n") == 1
        assert done.stdout == ""
