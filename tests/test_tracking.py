"""MLflow for real: databases in files, a server in a process of its own, models that go there and come back."""

import contextlib
import json
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from worlds import until

from cel_dist.back_end import BackEnd
from cel_dist.config import Config
from cel_dist.config_file import parse_config
from cel_dist.description import Calibration, EncoderDescription, ModelDescription
from cel_dist.distributed import free_port
from cel_dist.encoders import build_encoder
from cel_dist.errors import CelError
from cel_dist.model import SpeakerModel, load_model
from cel_dist.tracking import Tracker, fetch_model, resolve_uri

DIMENSION = 16


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> str:
    return f"sqlite:///{tmp_path_factory.mktemp('mlflow')}/mlflow.db"


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(1)
    encoder = build_encoder("fast_resnet34", embedding_dim=DIMENSION)
    description = ModelDescription(encoder=EncoderDescription(name="fast_resnet34", embedding_dim=DIMENSION))
    rows = np.linalg.qr(np.random.default_rng(2).standard_normal((DIMENSION, DIMENSION)))[0].astype(np.float32)
    normalised = BackEnd.fit(rows[:5], subtract_mean=True, score_norm="as", top_n=3)
    folder = tmp_path_factory.mktemp("trained") / "model"
    model = SpeakerModel(encoder, description)
    model.calibrate(0.1, Calibration(slope=1.0, offset=0.0), normalised).save(folder)
    return folder


@pytest.fixture(scope="module")
def waves() -> np.ndarray:
    return np.random.default_rng(5).normal(0, 0.1, (2, 29_040)).astype(np.float32)


def settings(uri: str, **tracking: object) -> Config:
    tree = {"data": {"shards": "s"}, "augment": {"profile": 0}, "tracking": {"uri": uri, **tracking}}
    return parse_config(tree, "test")


def client_of(uri: str):
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri=uri, registry_uri=uri)


def test_importing_the_package_does_not_import_mlflow() -> None:
    code = "import sys, cel_dist.tracking; sys.exit('mlflow' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_a_run_holds_parameters_metrics_and_files_where_the_database_is(database: str, tmp_path: Path) -> None:
    config = settings(database, experiment="records")
    tracker = Tracker.start(config, tmp_path)
    tracker.log_params(config)
    tracker.log_metrics({"loss": 2.5, "eer": 0.25}, step=10)
    tracker.log_metrics({"loss": 1.5}, step=20)
    note = tmp_path / "note.txt"
    note.write_text("hello", encoding="utf-8")
    tracker.log_artifact(note)
    tracker.finish()

    client = client_of(database)
    run_id = (tmp_path / "mlflow_run_id.txt").read_text().strip()
    run = client.get_run(run_id)
    assert run.info.status == "FINISHED"
    assert run.info.run_name == tmp_path.name
    assert run.data.params["train.batch_size"] == "200"
    assert run.data.params["encoder.name"] == "fast_resnet34"
    assert [(point.step, point.value) for point in client.get_metric_history(run_id, "loss")] == [(10, 2.5), (20, 1.5)]
    assert run.data.metrics["eer"] == 0.25
    beside_database = Path(database.removeprefix("sqlite:///")).parent / "mlartifacts"
    assert [path.read_text() for path in beside_database.rglob("note.txt")] == ["hello"]


def test_a_resumed_run_goes_on_in_the_same_mlflow_run(database: str, tmp_path: Path) -> None:
    config = settings(database, experiment="records")
    first = Tracker.start(config, tmp_path)
    first.log_params(config)
    first.log_metrics({"loss": 2.0}, step=1)
    first.finish("KILLED")
    run_id = (tmp_path / "mlflow_run_id.txt").read_text().strip()

    longer = config.model_copy(update={"train": config.train.model_copy(update={"max_steps": 7})})
    second = Tracker.start(longer, tmp_path)
    client = client_of(database)
    assert client.get_run(run_id).info.status == "RUNNING"
    second.log_params(longer)
    second.log_metrics({"loss": 1.0}, step=2)
    second.finish()

    run = client.get_run(run_id)
    assert [point.step for point in client.get_metric_history(run_id, "loss")] == [1, 2]
    assert (run.info.status, run.data.params["train.max_steps"]) == ("FINISHED", "null")
    assert run.data.tags["resumed.train.max_steps"] == "7"
    assert (tmp_path / "mlflow_run_id.txt").read_text().strip() == run_id


def test_a_run_that_the_server_does_not_know_starts_anew_unless_it_was_asked_for(database: str, tmp_path: Path) -> None:
    noted = tmp_path / "mlflow_run_id.txt"
    noted.write_text("0123456789abcdef0123456789abcdef\n")
    config = settings(database, experiment="records")
    Tracker.start(config, tmp_path).finish()
    assert noted.read_text().strip() != "0123456789abcdef0123456789abcdef"
    with pytest.raises(CelError, match="fedcba98"):
        Tracker.start(config, tmp_path, run_id="fedcba9876543210fedcba9876543210")


def test_tracking_can_be_switched_off(tmp_path: Path, model_folder: Path, waves: np.ndarray) -> None:
    config = settings(f"sqlite:///{tmp_path}/none.db", enabled=False)
    tracker = Tracker.start(config, tmp_path)
    tracker.log_params(config)
    tracker.log_metrics({"loss": 1.0}, step=1)
    assert tracker.log_model(model_folder, waves[0], "name") is None
    tracker.finish()
    assert list(tmp_path.iterdir()) == []


def test_a_model_comes_back_by_version_alias_run_and_id(
    database: str, tmp_path: Path, model_folder: Path, waves: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", database)
    stored = load_model(model_folder)
    expected = stored.embed(list(waves))
    assert stored.back_end.score_norm == "as"
    tracker = Tracker.start(settings(database, experiment="models"), tmp_path)
    plain = tracker.log_model(model_folder, waves[0])
    first = tracker.log_model(model_folder, waves[0], "speakers")
    second = tracker.log_model(model_folder, (waves[0] * 32767).astype(np.int16), "speakers")
    tracker.finish()

    assert plain is not None
    assert plain.startswith("models:/m-")
    assert (first, second) == ("models:/speakers/1", "models:/speakers/2")
    run_id = (tmp_path / "mlflow_run_id.txt").read_text().strip()
    for uri in (plain, "models:/speakers/2", "models:/speakers@champion", f"runs:/{run_id}/model"):
        fetched = load_model(uri)
        np.testing.assert_array_equal(fetched.embed(list(waves)), expected)
        assert fetched.back_end == stored.back_end
    # The first version became the champion; the second did not take its place unasked.
    assert client_of(database).get_model_version_by_alias("speakers", "champion").version == 1


def test_a_model_that_cannot_embed_is_refused_before_it_is_stored(
    database: str, tmp_path: Path, model_folder: Path, waves: np.ndarray
) -> None:
    tracker = Tracker.start(settings(database, experiment="refused"), tmp_path)
    with pytest.raises(CelError, match="silent"):
        tracker.log_model(model_folder, np.zeros(16_000, np.float32), "never")
    with pytest.raises(CelError, match=r"model\.json"):
        tracker.log_model(tmp_path, waves[0], "never")
    tracker.finish("FAILED")
    with pytest.raises(CelError, match="there is no model 'never'"):
        fetch_model("models:/never/1", database)


@pytest.mark.parametrize(
    ("uri", "message"),
    [
        ("models:/voices", "names no model"),
        ("runs:/abc/other", "names no model"),
        ("models:/nobody@champion", "there is no model 'nobody'; registered there: .*voices"),
        ("models:/voices@best", "no alias 'best'; its aliases: champion"),
        ("models:/voices/7", r"no version 7; it has \[1\]"),
        ("runs:/0123456789abcdef0123456789abcdef/model", "0123456789abcdef0123456789abcdef"),
    ],
)
def test_a_wrong_model_uri_is_named(uri: str, message: str, registered: str) -> None:
    with pytest.raises(CelError, match=message):
        fetch_model(uri, registered)


@pytest.fixture(scope="module")
def registered(database: str, tmp_path_factory: pytest.TempPathFactory, model_folder: Path, waves: np.ndarray) -> str:
    tracker = Tracker.start(settings(database, experiment="models"), tmp_path_factory.mktemp("run"))
    assert tracker.log_model(model_folder, waves[0], "voices") == "models:/voices/1"
    tracker.finish()
    return database


def test_another_kind_of_model_is_refused(database: str, tmp_path: Path) -> None:
    client = client_of(database)
    experiment = client.create_experiment("others", artifact_location=tmp_path.as_uri())
    other = client.create_logged_model(experiment, name="model")
    content = tmp_path / "content"
    content.mkdir()
    (content / "MLmodel").write_text("flavors: {python_function: {loader_module: mlflow.sklearn}}\n")
    client.log_model_artifacts(other.model_id, str(content))
    with pytest.raises(CelError, match="another kind of model"):
        fetch_model(f"models:/{other.model_id}", database)


def test_a_deleted_experiment_is_named(database: str, tmp_path: Path) -> None:
    client = client_of(database)
    client.delete_experiment(client.create_experiment("gone"))
    with pytest.raises(CelError, match="experiment 'gone' was deleted"):
        Tracker.start(settings(database, experiment="gone"), tmp_path)


def test_the_database_is_not_made_by_looking_a_model_up(tmp_path: Path) -> None:
    with pytest.raises(CelError, match="there is no database"):
        fetch_model("models:/cel@champion", f"sqlite:///{tmp_path}/mlflow.db")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("uri", "message"),
    [
        ("http://user:secret@127.0.0.1:{port}", r"http://user:\*\*\*@127.0.0.1:\d+: the server does not answer"),
        ("postgresql://user:secret@127.0.0.1:{port}/db", "no database server answers at 127.0.0.1"),
        ("sqlite:///{folder}/text.db", "file is not a database"),
        ("{folder}/mlruns", "no longer records to"),
    ],
)
def test_an_unusable_server_is_named_within_seconds(uri: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "text.db").write_text("this is a text file and by no means a database" * 10)
    config = settings(uri.format(port=free_port(), folder=tmp_path))
    begin = time.monotonic()
    with pytest.raises(CelError, match=message) as caught:
        Tracker.start(config, tmp_path)
    assert time.monotonic() - begin < 20
    assert "secret" not in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_uri_comes_from_the_configuration_then_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://from-environment")
    assert resolve_uri("http://configured") == "http://configured"
    assert resolve_uri(None) == "http://from-environment"
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    assert resolve_uri(None) == "sqlite:///mlflow.db"


def test_metrics_wait_while_the_database_does_not_take_them(
    database: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tracker = Tracker.start(settings(f"{database}?timeout=0.2", experiment="records"), tmp_path)
    tracker.log_metrics({"loss": 3.0}, step=1)
    assert tracker.flush(60)
    with contextlib.closing(sqlite3.connect(database.removeprefix("sqlite:///"), isolation_level=None)) as other:
        other.execute("BEGIN EXCLUSIVE")
        tracker.log_metrics({"loss": 2.0}, step=2)
        until(lambda: "takes no metrics, 1 values wait" in caplog.text)
        tracker.log_metrics({"loss": 1.0}, step=3)
        other.execute("ROLLBACK")
    tracker.finish()
    run_id = (tmp_path / "mlflow_run_id.txt").read_text().strip()
    assert [point.value for point in client_of(database).get_metric_history(run_id, "loss")] == [3.0, 2.0, 1.0]


def test_a_step_is_in_mlflow_once_however_often_it_is_taken(database: str, tmp_path: Path) -> None:
    config = settings(database, experiment="records")
    first = Tracker.start(config, tmp_path)
    for step in (1, 2, 3):
        first.log_metrics({"loss": float(step)}, step=step, seconds=1e9 + step)
    first.finish("KILLED")
    # The run goes on from step 1; a step that was recorded and never sent is in the folder.
    (tmp_path / "metrics.jsonl").write_text(
        '{"step": 1, "epoch": 0, "time": 1000000001.0, "loss": 1.0}\n'
        '{"step": 4, "epoch": 0, "time": 1000000004.5, "loss": 4.0, "w": 10.0}\n{"step": 5, "ep'
    )
    second = Tracker.start(config, tmp_path)
    for step in (2, 3, 4, 5):
        second.log_metrics({"loss": 10.0 * step}, step=step)
    second.finish()
    client = client_of(database)
    run_id = (tmp_path / "mlflow_run_id.txt").read_text().strip()
    points = client.get_metric_history(run_id, "loss")
    assert [(point.step, point.value) for point in points] == [(1, 1.0), (2, 2.0), (3, 3.0), (4, 4.0), (5, 50.0)]
    assert points[3].timestamp == 1_000_000_004_500
    assert client.get_run(run_id).data.metrics["w"] == 10.0


def test_the_load_of_the_machine_is_recorded_if_asked_for(database: str, tmp_path: Path) -> None:
    names = {}
    for is_wanted in (False, True):
        run = tmp_path / str(is_wanted)
        run.mkdir()
        for _ in range(2):
            if is_wanted and (run / "system_metrics.jsonl").exists():
                with (run / "system_metrics.jsonl").open("a") as file:
                    file.write('{"step": 99, "ti')
            config = settings(
                database,
                experiment="records",
                system_metrics=is_wanted,
                system_metrics_seconds=0.01 if is_wanted else 9,
            )
            tracker = Tracker.start(config, run)
            tracker.log_metrics({"loss": 1.0}, step=1)
            if is_wanted:
                until((run / "system_metrics.jsonl").exists)
            tracker.finish()
        run_id = (run / "mlflow_run_id.txt").read_text().strip()
        names[is_wanted] = set(client_of(database).get_run(run_id).data.metrics)
    assert names[False] == {"loss"}
    assert {"system/cpu_utilization_percentage", "system/system_memory_usage_megabytes"} <= names[True]
    assert {"system/disk_usage_percentage", "system/network_receive_megabytes"} <= names[True]
    samples = [json.loads(line) for line in (tmp_path / "True" / "system_metrics.jsonl").read_text().splitlines()]
    history = client_of(database).get_metric_history(run_id, "system/system_memory_usage_megabytes")
    # They are numbered on by the second process, and each is there once.
    assert [sample["step"] for sample in samples] == list(range(1, len(samples) + 1))
    assert [(point.step, point.value) for point in history] == [
        (sample["step"], sample["system/system_memory_usage_megabytes"]) for sample in samples
    ]
