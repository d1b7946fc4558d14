"""Groups of utterances embedded side by side: while one is in the encoder, others are read and decoded."""

from collections.abc import Callable, Generator, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

import torch

from cel_dist.model import exact_kernels

Group = TypeVar("Group")
Result = TypeVar("Result")

# Passes that share what may be in the encoder at once. On a CPU they are one a thread: an encoder of small layers gains
# more by another pass than by another thread inside of each layer, and a pass that is shorter stays in the caches. A
# GPU has one pass to compute and one that waits for it.
_CPU_PASSES = 8
_GPU_PASSES = 2
# Threads that read and decode for a GPU; more of them wait for Python.
_READERS = 8
# Groups for each thread at least, so that they finish together.
_GROUPS_EACH = 8


@dataclass(frozen=True)
class SideBySide:
    """How groups are shared out over threads.

    Attributes:
        device: of the encoder.
        workers: groups under way at once.
        threads: of the operations of each, on a CPU.
    """

    device: torch.device
    workers: int
    threads: int

    @classmethod
    def plan(cls, device: torch.device, num_groups: int) -> "SideBySide":
        """For so many groups, with the threads that torch has here.

        >>> SideBySide.plan(torch.device("cpu"), 1).workers
        1
        """
        threads = torch.get_num_threads()
        if device.type != "cpu":
            return cls(device, max(1, min(_READERS, threads, num_groups)), 1)
        # No thread is left over but a few of an odd number.
        each = -(-threads // max(1, min(_CPU_PASSES, threads, num_groups // _GROUPS_EACH)))
        return cls(device, threads // each, each)

    @staticmethod
    def pass_seconds(device: torch.device, batch_seconds: float) -> float:
        """Longest pass of the encoder, of `batch_seconds` that may be in it at once.

        The same for every number of threads: what shares a pass changes the last bits of an embedding.
        """
        return batch_seconds / (_CPU_PASSES if device.type == "cpu" else _GPU_PASSES)

    def map(self, function: Callable[[Group], Result], groups: Iterable[Group]) -> Generator[Result, None, None]:
        """Yield `function(group)` for every group, in their order. What it raises comes through as it is."""
        if self.workers == 1:
            yield from map(function, groups)
            return
        threads = torch.get_num_threads()
        try:
            with exact_kernels(), ThreadPoolExecutor(self.workers, "embed", self._begin) as pool:
                yield from pool.map(function, groups)
        finally:
            # A thread that sets its own number sets that of threads to come, too.
            torch.set_num_threads(threads)

    def _begin(self) -> None:
        torch.set_num_threads(self.threads)
        if self.device.type == "cuda":
            # A thread begins on the first GPU, and pinned memory would wake it.
            torch.cuda.set_device(self.device)
