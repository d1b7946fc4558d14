"""Running a function in every rank of a real gloo world."""

import os
import pickle
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cel_dist.distributed import free_port, leave_process

TIMEOUT_SECONDS = 240


def run_world(size: int, function: Callable[..., Any], *arguments: Any, folder: Path) -> list[Any]:
    """Call `function(*arguments)` in `size` new processes with the environment of a launcher; their results by rank.

    `function` must be importable from a module of the tests. Results travel through files in `folder`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "call.pkl").write_bytes(pickle.dumps((function, arguments)))
    port = str(free_port())
    processes = []
    for rank in range(size):
        environment = {
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
        command = [sys.executable, __file__, str(folder), str(rank)]
        processes.append(subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True))
    errors = [process.communicate(timeout=TIMEOUT_SECONDS)[1] for process in processes]
    for rank, process in enumerate(processes):
        assert process.returncode == 0, f"rank {rank} failed:\n{errors[rank][-3000:]}"
    return [pickle.loads((folder / f"result-{rank}.pkl").read_bytes()) for rank in range(size)]


def until(condition: Callable[[], bool], seconds: float = 60) -> None:
    """Wait for what a thread or another process does."""
    deadline, never = time.monotonic() + seconds, threading.Event()
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds} seconds"
        never.wait(0.01)


def _main() -> None:
    import torch

    torch.set_num_threads(1)
    folder, rank = Path(sys.argv[1]), sys.argv[2]
    function, arguments = pickle.loads((folder / "call.pkl").read_bytes())
    (folder / f"result-{rank}.pkl").write_bytes(pickle.dumps(function(*arguments)))
    leave_process(0)


if __name__ == "__main__":
    _main()
