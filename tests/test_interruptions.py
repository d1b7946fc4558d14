"""Ctrl-C at any moment of a command is one line and exit code 130, leaves no process and nothing half-written."""

import os
import signal
import subprocess
import time
from pathlib import Path

import psutil
import pytest
from commands import cel, finish, only_error, start
from processes import has_ended
from training_runs import losses, write_config


def interrupt(process: subprocess.Popen[str], seconds: float) -> tuple[int, str, str]:
    """Press Ctrl-C so many seconds after the start; what the command came to, of which no process is left."""
    time.sleep(seconds)
    members = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    os.killpg(process.pid, signal.SIGINT)
    result = finish(process)
    assert all(has_ended(member) for member in members)
    return result


def seconds_of(*arguments: object, cwd: Path) -> float:
    """How long a command takes."""
    begin = time.monotonic()
    code, _, err = cel(*arguments, cwd=cwd)
    assert code == 0, err
    return time.monotonic() - begin


@pytest.fixture(scope="module")
def run(small_corpus, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one step."""
    folder = tmp_path_factory.mktemp("trained")
    code, _, err = cel("train", write_config(small_corpus, folder, train={"max_steps": 1}), cwd=folder)
    assert code == 0, err
    return folder / "run"


def test_an_interrupt_during_the_first_imports_is_one_line(tmp_path: Path) -> None:
    # What is imported first tells when it is.
    (tmp_path / "typer.py").write_text("import time\nprint('importing', flush=True)\ntime.sleep(60)\n")
    process = start("doctor", cwd=tmp_path, PYTHONPATH=f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    assert process.stdout is not None
    assert process.stdout.readline() == "importing\n"
    assert only_error(interrupt(process, 0), 130) == "error: interrupted"


def test_an_interrupt_that_goes_through_generated_code_keeps_the_exit_code(tmp_path: Path) -> None:
    # As of a data class or a named tuple that is being made; Python then ends with the signal, whoever caught it.
    (tmp_path / "deepspeed.py").write_text("exec('import time; print(1, flush=True); time.sleep(60)')\n")
    (tmp_path / "torch.py").write_text("import deepspeed\n")
    process = start(
        "embed", "--model", "m", "a.wav", "--out", "o", cwd=tmp_path,
        PYTHONPATH=f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}",
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stdout.readline() == "1\n"
    assert only_error(interrupt(process, 0), 130) == "error: interrupted"


def test_an_interrupted_evaluation_is_one_line_and_works_again(run: Path, small_corpus, tmp_path: Path) -> None:
    listed = ["--trials", small_corpus.trials, "--root", small_corpus.audio]
    command = ["evaluate", "--model", run, *listed, "--out"]
    seconds = seconds_of(*command, "first", cwd=tmp_path)
    for share in (0.3, 0.5, 0.7, 0.9):
        code, out, err = interrupt(start(*command, "test", cwd=tmp_path), share * seconds)
        if code == 0:
            # It was over already: then it is whole.
            assert (out.splitlines()[0].startswith("EER"), err) == (True, "")
        else:
            assert only_error((code, "", err), 130) == "error: interrupted"
        assert not list(tmp_path.glob("test/.*"))
    assert cel(*command, "test", cwd=tmp_path)[0] == 0


def test_an_interrupt_while_a_checkpoint_is_written_leaves_none_that_passes_for_whole(small_corpus, tmp_path) -> None:
    file = write_config(small_corpus, tmp_path, train={"epochs": 8}, checkpoint={"every_steps": 1})
    process = start("train", file, cwd=tmp_path)
    deadline = time.monotonic() + 60
    while not list((tmp_path / "run" / "checkpoints").glob(".*")) and time.monotonic() < deadline:
        time.sleep(0.002)
    assert only_error(interrupt(process, 0), 130) == "error: interrupted"
    code, _, err = cel("train", file, "train.max_steps=6", cwd=tmp_path)
    assert code == 0, err
    assert "damaged" not in err
    assert sorted(losses(tmp_path / "run"))[:6] == [1, 2, 3, 4, 5, 6]


def test_an_interrupted_service_ends_in_peace(run: Path, tmp_path: Path) -> None:
    process = start("serve", "--model", run, "--store", "people.db", "--port", "0", cwd=tmp_path)
    assert process.stdout is not None
    assert "Ctrl+C ends it" in process.stdout.readline()
    code, _, err = interrupt(process, 0)
    assert (code, err) == (0, "")
