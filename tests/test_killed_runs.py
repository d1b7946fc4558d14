"""A run that is killed again and again, at moments drawn anew each time, ends as one that nobody touched."""

import contextlib
import os
import random
import signal
import subprocess
import time
from pathlib import Path

import psutil
import pytest
import torch
from training_runs import CEL, ENVIRONMENT, LOSSES, records, write_config

from cel_dist.model import load_model

# Some for every run of the tests; CEL_KILLS=20 for the whole of it.
KILLS = int(os.environ.get("CEL_KILLS", "5"))
STEPS = 10 * KILLS
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
    """Half of the moments are any, half lie in the writing of a checkpoint."""
    begin = time.monotonic()
    if draw.random() < 0.5:
        seconds = draw.uniform(0, 16)
        while job.poll() is None and time.monotonic() < begin + seconds:
            time.sleep(0.01)
        return f"{seconds:.1f} s after the start"
    number = draw.randrange(1, 4)
    for _ in range(number):
        while job.poll() is None and not any(checkpoints.glob(".writing-*")):
            time.sleep(0.002)
        inside = draw.uniform(0, 0.1)
        time.sleep(inside)
    return f"{1000 * inside:.0f} ms into the writing of checkpoint {number}"


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
            job.kill()
            return
    for process in victims:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.send_signal(signal.SIGKILL)


def untimed(run: Path, name: str) -> list[dict[str, float]]:
    return [{key: value for key, value in row.items() if key not in TIMED} for row in records(run, name)]


def test_a_killed_run_ends_as_an_untouched_one(config, tmp_path):
    seed = int(os.environ.get("CEL_KILLS_SEED", time.time_ns() % 10**9))
    draw = random.Random(seed)
    whole, killed = config("whole"), config("killed")
    assert start(whole, tmp_path / "whole.log").wait(240) == 0, (tmp_path / "whole.log").read_text()[-3000:]
    run, log = killed.with_suffix(""), tmp_path / "killed.log"
    told = [f"CEL_KILLS_SEED={seed}"]
    for number in range(KILLS):
        job = start(killed, log)
        moment = wait_for_a_moment(draw, run / "checkpoints", job)
        alive = processes_of(job)
        victim = VICTIMS[number % len(VICTIMS)]
        kill(victim, job, draw)
        code = job.wait(90)
        # Nobody is left who would write into the folder of the next attempt.
        _, left = psutil.wait_procs(alive, timeout=60)
        told.append(f"{victim}, {moment}: code {code}, {sorted(path.name for path in run.glob('checkpoints/step-*'))}")
        assert not left, "\n".join(told)
        assert "Traceback" not in log.read_text().replace('Traceback (most recent call last):\n  File "<frozen', "")
    last = start(killed, log)
    assert last.wait(240) == 0, "\n".join([*told, log.read_text()[-3000:]])
    print("\n".join(told))
    for name in ("metrics.jsonl", "evaluations.jsonl"):
        assert untimed(run, name) == untimed(whole.with_suffix(""), name), "\n".join(told)
    rows = records(run)
    assert [row["step"] for row in rows] == [*range(3, STEPS, 3), STEPS]
    assert set(LOSSES) <= set(rows[0])
    one, other = (load_model(folder / "checkpoints" / f"step-{STEPS:08d}") for folder in (run, whole.with_suffix("")))
    for key, value in one.encoder.state_dict().items():
        assert torch.equal(value, other.encoder.state_dict()[key]), key
    assert not list((run / "checkpoints").glob(".*"))
