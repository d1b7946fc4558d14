"""Running a function in every rank of a real gloo world.

Ranks are copies of a process that has loaded torch and DeepSpeed already, which takes longer than most of what they do.
"""

import atexit
import functools
import importlib
import json
import os
import pickle
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cel_dist.distributed import free_port, leave_process

TIMEOUT_SECONDS = 240
_SERVE = "serve"


def run_world(size: int, function: Callable[..., Any], *arguments: Any, folder: Path, forked: bool = True) -> list[Any]:
    """Call `function(*arguments)` in `size` new processes with the environment of a launcher; their results by rank.

    `function` must be importable from a module of the tests. Results travel through files in `folder`. Where it is
    about what a process loads, `forked=False` starts each one from nothing.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "call.pkl").write_bytes(pickle.dumps((function, arguments)))
    port = str(free_port())
    environments = [
        {
            **os.environ,
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(size),
            "LOCAL_WORLD_SIZE": str(size),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
            # A process that is aborted says where.
            "PYTHONFAULTHANDLER": "1",
            "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]),
        }
        for rank in range(size)
    ]
    codes = (_fork if forked and not _has_gpu() else _start)(folder, environments)
    for rank, code in enumerate(codes):
        assert code == 0, f"rank {rank} ended with {code}:\n{_errors(folder, rank).read_text()[-3000:]}"
    return [pickle.loads((folder / f"result-{rank}.pkl").read_bytes()) for rank in range(size)]


def until(condition: Callable[[], bool], seconds: float = 60) -> None:
    """Wait for what a thread or another process does."""
    deadline, never = time.monotonic() + seconds, threading.Event()
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds} seconds"
        never.wait(0.01)


def _errors(folder: Path, rank: int) -> Path:
    return folder / f"errors-{rank}"


@functools.cache
def _has_gpu() -> bool:
    import torch

    # CUDA does not survive a fork.
    return torch.cuda.is_available()


def _start(folder: Path, environments: list[dict[str, str]]) -> list[int]:
    processes = []
    for rank, environment in enumerate(environments):
        with _errors(folder, rank).open("wb") as errors:
            command = [sys.executable, __file__, str(folder), str(rank)]
            processes.append(subprocess.Popen(command, env=environment, stderr=errors))
    return [process.wait(timeout=TIMEOUT_SECONDS) for process in processes]


def _fork(folder: Path, environments: list[dict[str, str]]) -> list[int]:
    server = _server()
    assert server.stdin is not None
    assert server.stdout is not None
    print(json.dumps([str(folder), os.getcwd(), environments]), file=server.stdin, flush=True)
    codes: list[int] = json.loads(server.stdout.readline())
    return codes


@functools.cache
def _server() -> "subprocess.Popen[str]":
    """The process that is copied: one for all worlds of these tests, until they end."""
    server = subprocess.Popen(
        [sys.executable, __file__, _SERVE],
        env={**os.environ, "DS_ACCELERATOR": "cpu"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    atexit.register(server.communicate)
    return server


def load_what_takes_long() -> None:
    """What ranks load, for a process that is to be copied."""
    # As the ranks themselves do, who find DeepSpeed loaded here.
    sys.modules["mlflow"] = None  # type: ignore[assignment]
    import deepspeed  # noqa: F401

    del sys.modules["mlflow"]
    for module in ("training.trainer", "engine", "report", "evaluation.plots"):
        importlib.import_module(f"cel_dist.{module}")
    # What the first optimizer loads, and the plots of a report.
    for module in ("torch._dynamo", "matplotlib.backends.backend_svg"):
        importlib.import_module(module)


def _serve() -> None:
    import numpy as np

    load_what_takes_long()
    # Its own, which what DeepSpeed prints does not get into.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        folder, cwd, environments = json.loads(line)
        pids = []
        for rank, environment in enumerate(environments):
            pids.append(os.fork())
            if pids[-1] == 0:
                code = 1
                try:
                    with _errors(Path(folder), rank).open("wb") as errors, open(os.devnull, "rb") as nothing:
                        os.dup2(errors.fileno(), 2)
                        os.dup2(nothing.fileno(), 0)
                    answers.close()
                    os.chdir(cwd)
                    os.environ.clear()
                    os.environ.update(environment)
                    # A copy has the state of the generator, too, and no process has that of another.
                    np.random.seed()
                    _work(Path(folder), rank)
                    code = 0
                except BaseException:
                    traceback.print_exc()
                finally:
                    leave_process(code)
        print(json.dumps(_wait(pids)), file=answers, flush=True)


def _wait(pids: list[int]) -> list[int]:
    """Exit codes; minus the signal that killed it. Who is there too long is killed."""
    codes: dict[int, int] = {}
    deadline = time.monotonic() + TIMEOUT_SECONDS
    while len(codes) < len(pids):
        for pid in set(pids) - set(codes):
            found, status = os.waitpid(pid, os.WNOHANG)
            if found:
                codes[pid] = os.waitstatus_to_exitcode(status)
            elif time.monotonic() > deadline:
                os.kill(pid, 9)
        time.sleep(0.005)
    return [codes[pid] for pid in pids]


def _work(folder: Path, rank: int) -> None:
    import faulthandler

    import torch

    faulthandler.enable()
    torch.set_num_threads(1)
    function, arguments = pickle.loads((folder / "call.pkl").read_bytes())
    (folder / f"result-{rank}.pkl").write_bytes(pickle.dumps(function(*arguments)))


if __name__ == "__main__":
    if sys.argv[1:] == [_SERVE]:
        _serve()
    else:
        _work(Path(sys.argv[1]), int(sys.argv[2]))
        leave_process(0)
