"""This process's place in the job, read from the environment that every launcher sets."""

import atexit
import os
import socket
import sys
from collections.abc import Mapping, MutableMapping
from contextlib import suppress
from dataclasses import dataclass
from typing import NoReturn

from cel_dist.errors import CelError


@dataclass(frozen=True)
class World:
    """Rank and size of the job and of this node.

    >>> World.from_environment({"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"})
    World(rank=3, size=4, local_rank=1, local_size=2)
    >>> World.from_environment({})
    World(rank=0, size=1, local_rank=0, local_size=1)
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] = os.environ) -> "World":
        """Read RANK, WORLD_SIZE, LOCAL_RANK and LOCAL_WORLD_SIZE (or LOCAL_SIZE); none of them means one process.

        Raises:
            CelError: some of the variables are there and others missing, not numbers or out of range.
        """
        if "WORLD_SIZE" not in environment:
            return cls()
        values = {name: environment.get(name) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
        for name, value in values.items():
            if value is None:
                raise CelError(f"WORLD_SIZE is set but {name} is not; start through deepspeed or torchrun")
        local_name = next((name for name in ("LOCAL_WORLD_SIZE", "LOCAL_SIZE") if environment.get(name)), "WORLD_SIZE")
        values[local_name] = environment[local_name]
        try:
            numbers = {name: int(value or "") for name, value in values.items()}
        except ValueError as error:
            raise CelError(
                f"{', '.join(values)} must be numbers ({error}); start through deepspeed or torchrun"
            ) from None
        world = cls(numbers["RANK"], numbers["WORLD_SIZE"], numbers["LOCAL_RANK"], numbers[local_name])
        if not (0 <= world.rank < world.size and world.local_rank >= 0 and world.local_size >= 1):
            stated = ", ".join(f"{name}={value}" for name, value in values.items())
            raise CelError(f"the environment says {stated}, which no job has; start through deepspeed or torchrun")
        return world

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, which alone writes records."""
        return self.rank == 0

    def rows(self, num_rows: int, utterances_a_row: int = 1) -> slice:
        """The rows of a global batch of `num_rows` that this rank owns.

        Raises:
            CelError: the batch does not divide by the number of ranks; names the next one that does.

        >>> World(rank=1, size=2).rows(6)
        slice(3, 6, None)
        """
        share, rest = divmod(num_rows, self.size)
        if rest:
            speakers = (
                "" if utterances_a_row == 1 else f" ({num_rows} speakers with labels.utterances={utterances_a_row})"
            )
            raise CelError(
                f"train.batch_size={num_rows * utterances_a_row}{speakers} does not divide by {self.size} ranks; the "
                f"next that does is {(share + 1) * self.size * utterances_a_row}"
            )
        return slice(self.rank * share, (self.rank + 1) * share)


def let_idle_threads_sleep(environment: MutableMapping[str, str] = os.environ) -> None:
    """Have OpenMP threads sleep soon where they wait; to be called before torch is imported.

    By default they spin for milliseconds. On a machine whose cores are all in use, as by the ranks of a run, a thread
    that spins keeps the very thread from its core that it waits for: an evaluation of seconds was seen to take minutes.
    Threads that sleep at once (OMP_WAIT_POLICY=PASSIVE) cost an encoder a tenth of its time where cores are free, since
    its operations are short; so they spin for about as long as it takes to wake them.
    """
    if "OMP_WAIT_POLICY" not in environment:
        environment.setdefault("GOMP_SPINCOUNT", "3000")


def leave_process(code: int) -> NoReturn:
    """End this process with an exit code, after the functions that Python runs at exit, without native destructors.

    Once in some sixty runs, a native thread of the process group that was still there then aborted rank 0 after all its
    work was done, and the launcher called the run failed.
    """
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)


def free_port() -> int:
    """A TCP port of this machine that nobody listens on at this moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
