"""A real MLflow server: models that go through it, and runs that it does not live to see the end of."""

import contextlib
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from training_runs import records, train_job, write_config
from worlds import run_world

from cel_dist.config_file import load_config, parse_config
from cel_dist.distributed import free_port
from cel_dist.tracking import Tracker
from cel_dist.training.checkpoint import TrainState
from cel_dist.training.records import Records
from cel_dist.training.trainer import train


class Server:
    """`mlflow server` on one database and one port, in a process group of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.port = folder, free_port()
        self.uri = f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(self.port)]
        command += ["--workers", "1", "--backend-store-uri", f"sqlite:///{self.folder}/server.db"]
        command += ["--artifacts-destination", str(self.folder / "files")]
        log = self.folder / "server.log"
        with log.open("ab") as output:
            self.process = subprocess.Popen(
                command, cwd=self.folder, stdout=output, stderr=output, start_new_session=True
            )
        deadline = time.monotonic() + 120
        while not self.is_healthy():
            # Waiting on the process, so that one that cannot start is noticed at once.
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(0.2)
            assert self.process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def is_healthy(self) -> bool:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=5)
        try:
            connection.request("GET", "/health")
            return connection.getresponse().status == 200
        except (OSError, http.client.HTTPException):
            return False
        finally:
            connection.close()

    def history(self, run: Path) -> dict[tuple[str, int], tuple[float, int]]:
        """Value and time of each metric at each step that the server has of the run in a folder; each is there once."""
        from mlflow import MlflowClient

        client = MlflowClient(tracking_uri=self.uri)
        run_id = (run / "mlflow_run_id.txt").read_text().strip()
        points = [
            point for name in client.get_run(run_id).data.metrics for point in client.get_metric_history(run_id, name)
        ]
        history = {(point.key, point.step): (point.value, point.timestamp) for point in points}
        assert len(history) == len(points)
        return history


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(tmp_path_factory.mktemp("server"))
    server.start()
    yield server
    server.kill()


def recorded(run: Path) -> dict[tuple[str, int], tuple[float, int]]:
    """Value and time of each metric at each step in the files of a run."""
    rows = [*records(run), *(records(run, "evaluations.jsonl"))]
    return {
        (name, row["step"]): (value, round(1000 * row["time"]))
        for row in rows
        for name, value in row.items()
        if name not in ("step", "epoch", "time")
    }


def settings(uri: str, **tracking: object):
    tree = {"data": {"shards": "s"}, "augment": {"profile": 0}, "tracking": {"uri": uri, **tracking}}
    return parse_config(tree, "test")


def write(run: Records, step: int) -> None:
    run.write_evaluation(step=step, epoch=0, eer=1 / step, min_dcf=0.1 * step)


def train_and_lose_the_server(config, server_pid):
    """Train; the MLflow server is killed before the second record. The outcome."""
    genuine = Records.write_interval

    def write_interval(self, *, step, **rest):
        if step == 2:
            assert self._tracker.flush(60)
            os.killpg(server_pid, signal.SIGKILL)
        genuine(self, step=step, **rest)

    Records.write_interval = write_interval
    return train_job(config)


def test_a_server_that_dies_during_training_gets_everything_later(
    server: Server, small_corpus, tmp_path: Path, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    caplog.set_level("INFO")
    # One run that goes on, and a training that reaches its end, while the server is away.
    config = settings(server.uri)
    paused = tmp_path / "paused"
    paused.mkdir()
    tracker = Tracker.start(config, paused)
    written = Records(paused, tracker, TrainState())
    write(written, 1)
    assert tracker.flush(60)
    file = write_config(
        small_corpus,
        tmp_path,
        train={"max_steps": 4},
        eval={"trials": str(small_corpus.trials), "root": str(small_corpus.audio), "at_start": False},
        tracking={"enabled": True, "uri": server.uri},
    )
    [outcome] = run_world(1, train_and_lose_the_server, file, server.process.pid, folder=tmp_path / "world")
    assert (outcome["steps"], outcome["model_uri"]) == (4, None)
    assert not server.is_healthy()
    run = tmp_path / "run"
    assert [row["step"] for row in records(run)] == [1, 2, 3, 4]
    assert "may lack a part" in (run / "mlflow_unsent.txt").read_text()
    # The same command once more, still without the server, changes nothing and is no failure.
    assert train(load_config(file)).model_uri is None
    write(written, 2)
    tracker.finish("KILLED")
    assert f"all of it is in {paused}. The same 'cel train' sends it when the server is back" in caplog.text
    caplog.clear()
    tracker = Tracker.start(config, paused)
    assert "the run goes on, and what it records is sent later" in caplog.text
    written = Records(paused, tracker, TrainState(step=2, evaluated_step=2))
    write(written, 3)

    server.start()
    assert tracker.flush(60)
    write(written, 4)
    tracker.finish()
    assert server.history(paused) == recorded(paused)
    assert {step for _, step in recorded(paused)} == {1, 2, 3, 4}
    assert list(paused.glob("mlflow_unsent*")) == []

    assert {step for _, step in server.history(run)} == {1}
    assert train(load_config(file)).model_uri == "models:/cel/1"
    assert server.history(run) == recorded(run)
    assert list(run.glob("mlflow_unsent*")) == []
    assert json.loads((run / "summary.json").read_text())["model_uri"] == "models:/cel/1"
    stored = {path.name for path in (server.folder / "files").rglob("*") if path.is_file()}
    assert {"config.yaml", "report.html", "training.svg"} <= stored
    # There is nothing left to send.
    server.kill()
    assert train(load_config(file)).model_uri == "models:/cel/1"
    # That belongs to the result of a command.
    assert capfd.readouterr().out == ""


def test_a_server_that_never_answers_holds_up_no_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cel_dist.tracking.run._OPEN_SECONDS", 0.1)
    monkeypatch.setattr("cel_dist.tracking.run._FLUSH_SECONDS", 0.1)
    (tmp_path / "mlflow_run_id.txt").write_text("0123456789abcdef0123456789abcdef\n")
    with socket.create_server(("127.0.0.1", 0)) as silent:
        tracker = Tracker.start(settings(f"http://127.0.0.1:{silent.getsockname()[1]}"), tmp_path)
        written = Records(tmp_path, tracker, TrainState())
        for step in range(1, 101):
            write(written, step)
        tracker.finish()
        # One question was asked before the first step, and is without an answer after the last one.
        asked, _ = silent.accept()
        assert asked.recv(5).startswith(b"GET ")
        silent.setblocking(False)
        with pytest.raises(BlockingIOError):
            silent.accept()
        asked.close()
    assert [row["step"] for row in records(tmp_path, "evaluations.jsonl")] == list(range(1, 101))
    assert (tmp_path / "mlflow_unsent.txt").exists()
