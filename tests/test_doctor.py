"""`cel doctor`, as a command, on this machine and on machines that lack something."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from cel_dist.doctor import Settings
from cel_dist.doctor.examine import PROBES
from cel_dist.doctor.machine import cpu_quota, memory_left
from cel_dist.doctor.tracking import tracking

EVERY_CHECK = [check for checks in PROBES.values() for check in checks]


def doctor(
    *arguments: str, folder: Path, limit: str | None = None, **environment: str
) -> tuple[int, dict[str, dict[str, Any]]]:
    """Exit code and checks by name of `cel doctor --json`, run in `folder`, after a shell command that sets a limit."""
    words = [sys.executable, "-m", "cel_dist", "doctor", "--json", *arguments]
    if limit is not None:
        words = ["/bin/sh", "-c", f'{limit}; exec "$@"', "sh", *words]
    inherited = {name: value for name, value in os.environ.items() if name != "MLFLOW_TRACKING_URI"}
    done = subprocess.run(
        words, cwd=folder, env=inherited | environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert "Traceback" not in done.stderr
    answer = json.loads(done.stdout)
    checks = {check["name"]: check for check in answer["checks"]}
    assert list(checks) == EVERY_CHECK
    faults = [check for check in checks.values() if check["state"] == "fault"]
    assert answer["ok"] == (not faults)
    assert done.returncode == (1 if faults else 0)
    assert all(check["remedy"] for check in checks.values() if check["state"] != "ok")
    return done.returncode, checks


def test_a_machine_that_can_train_has_no_fault_and_nothing_is_written(tmp_path: Path) -> None:
    config, folder = tmp_path / "config.yaml", tmp_path / "empty"
    config.write_text("data: {shards: shards}\naugment: {profile: 0}\ntracking: {uri: 'sqlite:///own.db'}\n")
    folder.mkdir()
    code, checks = doctor("--config", str(config), folder=folder)
    assert code == 0, [check for check in checks.values() if check["state"] == "fault"]
    assert "summed a tensor" in checks["gloo"]["found"]
    assert "WAV, FLAC, OGG, MP3" in checks["libsndfile"]["found"]
    # The database of the configuration, which to look for must not make.
    assert "sqlite:///own.db is not there yet" in checks["mlflow"]["found"]
    assert not list(folder.iterdir())


def test_several_faults_at_once_are_each_found_and_named(tmp_path: Path) -> None:
    # No program on the PATH, packages that raise, end the process and hang, few files.
    broken = tmp_path / "broken"
    for name, source in {
        "soxr": "raise ImportError('libsoxr.so.9: cannot open shared object file')",
        "webdataset": "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)",
        "ray": "import sys; sys.exit(3)",
        "deepspeed": "import threading; threading.Event().wait()",
    }.items():
        (broken / name).mkdir(parents=True)
        (broken / name / "__init__.py").write_text(source)
    path = os.pathsep.join([str(broken), os.environ.get("PYTHONPATH", "")])
    code, checks = doctor("--timeout", "45", folder=tmp_path, limit="ulimit -n 100", PATH="/nowhere", PYTHONPATH=path)
    assert code == 1
    assert checks["soxr"]["state"] == "fault"
    assert "libsoxr.so.9" in checks["soxr"]["found"]
    assert checks["webdataset"]["state"] == "fault"
    assert "SIGSEGV" in checks["webdataset"]["found"]
    assert checks["ray"]["state"] == "note"
    assert "SystemExit" in checks["ray"]["found"]
    assert checks["deepspeed"]["state"] == "fault"
    assert "no answer within 45 s" in checks["deepspeed"]["found"]
    for name in ("ffmpeg", "git", "ssh", "pdsh"):
        assert (checks[name]["state"], checks[name]["found"]) == ("note", "not on the PATH")
    assert (checks["open files"]["state"], checks["open files"]["found"]) == ("fault", "100 a process")
    assert "limits.conf" in checks["open files"]["remedy"]
    assert checks["libsndfile"]["state"] == "ok"


def test_a_broken_torch_is_a_finding_wherever_it_is_needed(tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("raise OSError('libtorch.so: no such file')")
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    _, checks = doctor(folder=tmp_path, PYTHONPATH=path)
    assert checks["torch"]["found"] == "OSError: libtorch.so: no such file"
    assert checks["libsndfile"]["state"] == "ok"
    faults = [name for name, check in checks.items() if check["state"] == "fault"]
    assert {"torch", "gloo", "deepspeed"} <= set(faults)

    # The same for people: aligned lines, and a conclusion.
    program = [sys.executable, "-m", "cel_dist", "doctor"]
    environment = os.environ | {"PYTHONPATH": path}
    done = subprocess.run(
        program, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 1
    *lines, last = done.stdout.splitlines()
    heads = [line for line in lines if line.startswith(("ok", "note", "fault"))]
    assert [line[7:22].strip() for line in heads] == EVERY_CHECK
    assert last == f"{len(faults)} faults stop training or 'cel demo' here."


@pytest.mark.parametrize("enabled", [True, False])
def test_a_tracking_server_that_never_answers_is_given_up(monkeypatch: pytest.MonkeyPatch, enabled: bool) -> None:
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        uri = f"http://user:secret@127.0.0.1:{silent.getsockname()[1]}"
        # It sets them for its process; here they go back to what they were.
        for name in ("MLFLOW_HTTP_REQUEST_TIMEOUT", "MLFLOW_HTTP_REQUEST_MAX_RETRIES"):
            monkeypatch.setenv(name, "60")
        checks = list(tracking(Settings(timeout_seconds=3, tracking=enabled, tracking_uri=uri)))
    assert [(check.name, check.state) for check in checks] == [("mlflow", "fault" if enabled else "note")]
    assert "127.0.0.1" in checks[0].found
    assert "secret" not in checks[0].found
    assert "tracking.enabled=false" in checks[0].remedy


def test_a_config_that_cannot_be_read_is_bad_input(tmp_path: Path) -> None:
    program = [sys.executable, "-m", "cel_dist", "doctor", "--config", "nowhere.yaml"]
    done = subprocess.run(program, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("error: cannot read the configuration nowhere.yaml")


def test_limits_of_control_groups_are_read_in_both_versions(tmp_path: Path) -> None:
    assert cpu_quota(tmp_path) is None
    assert memory_left(tmp_path) is None
    (tmp_path / "cpu").mkdir()
    (tmp_path / "cpu/cpu.cfs_quota_us").write_text("-1\n")
    (tmp_path / "cpu/cpu.cfs_period_us").write_text("100000\n")
    assert cpu_quota(tmp_path) is None
    (tmp_path / "cpu/cpu.cfs_quota_us").write_text("250000\n")
    assert cpu_quota(tmp_path) == 2.5
    (tmp_path / "cpu.max").write_text("150000 100000\n")
    assert cpu_quota(tmp_path) == 1.5
    (tmp_path / "cpu.max").write_text("max 100000\n")
    assert cpu_quota(tmp_path) is None
    (tmp_path / "memory.max").write_text("1000\n")
    (tmp_path / "memory.current").write_text("400\n")
    assert memory_left(tmp_path) == 600
