"""A run that is killed, or asked to end, again and again, at moments drawn anew each time, ends as one that nobody
touched."""

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
from training_runs import CEL, ENVIRONMENT, LOSSES, records, train_job, write_config
from worlds import run_world

from cel_dist.model import load_model
from cel_dist.training.checkpoint import complete_checkpoints

# Two for every run of the tests, of ways drawn anew; CEL_ENDS=30 for twenty kills among as many ends.
ENDS = int(os.environ.get("CEL_ENDS", "2"))
STEPS = 6 * ENDS
WAYS = (
    "kill a rank",
    "SIGTERM to cel train",
    "kill the launcher",
    "SIGUSR1 to a rank",
    "kill all ranks",
    "kill cel train",
)
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
        "data": {"workers": 1, "segment_frames": 40},
        "encoder": {"embedding_dim": 32},
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
        return "cel_dist.launcher.node" in process.cmdline()
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


def end(way: str, job: subprocess.Popen[bytes], draw: random.Random) -> None:
    processes = processes_of(job)
    ranks = [process for process in processes if is_rank(process)]
    signum = signal.SIGKILL
    match way:
        case "kill a rank":
            victims = [draw.choice(ranks)] if ranks else []
        case "kill all ranks":
            victims = ranks
        case "kill the launcher":
            victims = [process for process in processes if is_launcher(process)][-1:]
        case "SIGUSR1 to a rank":
            # As Slurm may; rank 0 is not the only one that listens.
            victims, signum = ranks[1:2], signal.SIGUSR1
        case "SIGTERM to cel train":
            job.terminate()
            return
        case _:
            victims = []
    if not victims:
        # At an early moment there is nobody else.
        job.kill()
    for process in victims:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.send_signal(signum)


def untimed(run: Path, name: str) -> list[dict[str, float]]:
    return [{key: value for key, value in row.items() if key not in TIMED} for row in records(run, name)]


def test_a_run_that_is_ended_again_and_again_comes_to_the_same(config, tmp_path):
    untouched, ended = config("untouched"), config("ended")
    for outcome in run_world(2, train_job, untouched, folder=tmp_path / "world"):
        assert isinstance(outcome, dict), outcome
    seed = int(os.environ.get("CEL_ENDS_SEED", time.time_ns() % 10**9))
    draw, told = random.Random(seed), [f"CEL_ENDS_SEED={seed}"]
    run = ended.with_suffix("")
    first = draw.randrange(len(WAYS))
    for number in range(ENDS):
        log = tmp_path / f"log-{number}"
        job = start(ended, log)
        way = WAYS[(first + number) % len(WAYS)]
        moment = wait_for_a_moment(draw, run / "checkpoints", job)
        alive = processes_of(job)
        end(way, job, draw)
        with contextlib.suppress(subprocess.TimeoutExpired):
            job.wait(90)
        # Nobody is left who would write into the folder of the next start.
        _, left = psutil.wait_procs(alive, timeout=60)
        step = newest(run / "checkpoints")
        told.append(f"{way}, {moment}: code {job.returncode}, step {step} is saved")
        said = "\n".join([*told, log.read_text()[-3000:]])
        assert job.returncode is not None, said
        assert not left, said
        if "SIG" in way:
            # What is killed may die with half a traceback of the interpreter's own.
            assert "Traceback" not in log.read_text(), said
        if "SIGTERM" in way:
            # While Python itself starts, nobody listens yet.
            assert job.returncode == 75 or (job.returncode == -signal.SIGTERM and not (alive or log.read_text())), said
        if (ending := re.search(r"ended by .* after step (\d+) of", log.read_text())) is not None:
            assert job.returncode == 75, said
            assert int(ending[1]) == step, said
    log = tmp_path / "log"
    last = start(ended, log)
    assert last.wait(300) == 0, "\n".join([*told, log.read_text()[-3000:]])
    print("\n".join(told))
    for name in ("metrics.jsonl", "evaluations.jsonl"):
        assert untimed(run, name) == untimed(untouched.with_suffix(""), name), told
    rows = records(run)
    assert [row["step"] for row in rows] == [*range(3, STEPS, 3), STEPS]
    assert set(LOSSES) <= set(rows[0])
    one, other = (load_model(file.with_suffix("") / "checkpoints" / f"step-{STEPS:08d}") for file in (ended, untouched))
    for key, value in one.encoder.state_dict().items():
        assert torch.equal(value, other.encoder.state_dict()[key]), key
    assert not list((run / "checkpoints").glob(".*"))
