"""A run that is killed again and again, at moments drawn anew each time, ends as one that nobody touched."""

import contextlib
import os
import random
import re
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import torch
from training_runs import CEL, ENVIRONMENT, LOSSES, records, write_config

from cel_dist.model import load_model
from cel_dist.training.checkpoint import complete_checkpoints

# Some for every run of the tests; CEL_KILLS=20 for the whole of it.
KILLS = int(os.environ.get("CEL_KILLS", "5"))
STEPS = 6 * KILLS
VICTIMS = ("a rank", "all ranks", "the launcher", "cel train")
# Of values that hold for the process that wrote them.
TIMED = {"time", "utterances_per_second", "data_wait", "data_wait_seconds", "step_seconds", "memory_gib", "eta_seconds"}


@pytest.fixture(scope="module")
def config(small_corpus, tmp_path_factory):
    """Writes a configuration of a run in which much is written: a checkpoint a step, an evaluation every tenth."""
    folder = tmp_path_factory.mktemp("runs")
    sections = {
        "train": {"epochs": STEPS, "max_steps": STEPS, "log_every": 3},
        "checkpoint": {"every_steps": 1},
        "eval": {"trials": str(small_corpus.trials), "root": str(small_corpus.audio), "every_epochs": 2},
        "engine": {"zero_stage": 2},
        "data": {"workers": 1},
    }
    return lambda name: write_config(small_corpus, folder, name, **sections)


def start(file: Path, log: Path) -> subprocess.Popen[bytes]:
    with log.open("ab") as stream:
        return subprocess.Popen(
            [*CEL, "train", str(file), "--nproc", "2"], stderr=stream, stdout=stream, env=ENVIRONMENT
        )


def processes_of(job: subprocess.Popen[bytes]) -> list[psutil.Process]:
    try:
        return psutil.Process(job.pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def is_rank(process: psutil.Process) -> bool:
    try:
        command = process.cmdline()
    except psutil.Error:
        return False
    return "cel_dist.train" in command and any(word.startswith("--local_rank") for word in command)


def is_launcher(process: psutil.Process) -> bool:
    try:
        return any(word.startswith("deepspeed.launcher") for word in process.cmdline())
    except psutil.Error:
        return False


def wait_for_a_moment(draw: random.Random, checkpoints: Path, job: subprocess.Popen[bytes]) -> str:
    """One in four lies in the start of the run; the others some checkpoints on, half of them while one is written."""

    def wait(is_there: Callable[[], bool]) -> None:
        while job.poll() is None and not is_there():
            time.sleep(0.002)

    if draw.random() < 0.25:
        begin, seconds = time.monotonic(), draw.uniform(0, 12)
        wait(lambda: time.monotonic() > begin + seconds)
        return f"{seconds:.1f} s after the start"
    goal = newest(checkpoints) + draw.randrange(1, 5)
    wait(lambda: newest(checkpoints) >= goal)
    if draw.random() < 0.5:
        seconds = draw.uniform(0, 1.5)
        time.sleep(seconds)
        return f"{seconds:.2f} s after checkpoint {goal}"
    wait(lambda: any(checkpoints.glob(".writing-*")))
    seconds = draw.uniform(0, 0.1)
    time.sleep(seconds)
    return f"{1000 * seconds:.0f} ms into the writing of a checkpoint after {goal}"


def newest(checkpoints: Path) -> int:
    return max((int(path.name.removeprefix("step-")) for path in complete_checkpoints(checkpoints)), default=0)


def kill(victim: str, job: subprocess.Popen[bytes], draw: random.Random) -> None:
    processes = processes_of(job)
    ranks = [process for process in processes if is_rank(process)]
    launchers = [
        process for process in processes if process not in ranks and "deepspeed" in " ".join(process.cmdline())
    ]
    match victim:
        case "a rank":
            victims = [draw.choice(ranks)] if ranks else []
        case "all ranks":
            victims = ranks
        case "the launcher":
            victims = launchers[-1:]
        case _:
            victims = []
    if not victims:
        # At an early moment there is nobody else.
        job.kill()
    for process in victims:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.send_signal(signal.SIGKILL)


def untimed(run: Path, name: str) -> list[dict[str, float]]:
    return [{key: value for key, value in row.items() if key not in TIMED} for row in records(run, name)]


@pytest.fixture(scope="module")
def untouched(config):
    """The folder of a run that went from its first step to its last."""
    file = config("untouched")
    log = file.with_suffix(".log")
    assert start(file, log).wait(240) == 0, log.read_text()[-3000:]
    return file.with_suffix("")


def require_the_same(run: Path, untouched: Path, told: str) -> None:
    """Both trained the same batches once each, and came to the same to the last bit."""
    for name in ("metrics.jsonl", "evaluations.jsonl"):
        assert untimed(run, name) == untimed(untouched, name), told
    rows = records(run)
    assert [row["step"] for row in rows] == [*range(3, STEPS, 3), STEPS]
    assert set(LOSSES) <= set(rows[0])
    one, other = (load_model(folder / "checkpoints" / f"step-{STEPS:08d}") for folder in (run, untouched))
    for key, value in one.encoder.state_dict().items():
        assert torch.equal(value, other.encoder.state_dict()[key]), key
    assert not list((run / "checkpoints").glob(".*"))


def test_a_killed_run_ends_as_an_untouched_one(config, untouched, tmp_path):
    seed = int(os.environ.get("CEL_KILLS_SEED", time.time_ns() % 10**9))
    draw = random.Random(seed)
    killed, log = config("killed"), tmp_path / "killed.log"
    run = killed.with_suffix("")
    told = [f"CEL_KILLS_SEED={seed}"]
    for number in range(KILLS):
        job = start(killed, log)
        moment = wait_for_a_moment(draw, run / "checkpoints", job)
        alive = processes_of(job)
        victim = VICTIMS[number % len(VICTIMS)]
        kill(victim, job, draw)
        try:
            code = job.wait(90)
        except subprocess.TimeoutExpired:
            code = None
        # Nobody is left who would write into the folder of the next attempt.
        _, left = psutil.wait_procs(alive, timeout=60)
        told.append(f"{victim}, {moment}: code {code}, step {newest(run / 'checkpoints')} is saved")
        assert code is not None, "\n".join([*told, log.read_text()[-3000:]])
        assert not left, "\n".join(told)
        assert "Traceback" not in log.read_text().replace('Traceback (most recent call last):\n  File "<frozen', "")
    last = start(killed, log)
    assert last.wait(240) == 0, "\n".join([*told, log.read_text()[-3000:]])
    print("\n".join(told))
    require_the_same(run, untouched, "\n".join(told))


def test_a_run_that_is_asked_to_end_saves_where_it_is_and_goes_on(config, untouched, tmp_path):
    file, log = config("asked"), tmp_path / "asked.log"
    run = file.with_suffix("")
    # To `cel train`, as a container is told, and to a single rank, as Slurm may choose.
    for number, signum in enumerate((signal.SIGTERM, signal.SIGUSR1)):
        former = len(records(run)) if number else 0
        job = start(file, log)
        while job.poll() is None and not ((run / "metrics.jsonl").exists() and len(records(run)) > former):
            time.sleep(0.05)
        if number == 0:
            job.send_signal(signum)
        else:
            [process for process in processes_of(job) if is_rank(process)][1].send_signal(signum)
        assert job.wait(90) == 75, log.read_text()[-3000:]
        step = newest(run / "checkpoints")
        assert re.search(rf"ended by .* after step {step} of {STEPS}; the checkpoint is written", log.read_text())
        assert "Traceback" not in log.read_text()
    assert start(file, log).wait(240) == 0, log.read_text()[-3000:]
    require_the_same(run, untouched, log.read_text()[-3000:])
