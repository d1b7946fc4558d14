"""Independent jobs over a pool of processes: results in order, bounded memory, and no orphans."""

import multiprocessing
import os
import signal
import sys
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing import resource_tracker
from typing import TypeVar

from cel_dist.errors import RunError

Job = TypeVar("Job")
Result = TypeVar("Result")

# Enough that no worker waits for the parent, few enough that a million files are not all queued as pickles.
_JOBS_AHEAD = 2


def default_workers() -> int:
    """CPU cores that this process may use: in a container or a batch job, often not all that the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def run_jobs(
    function: Callable[[Job], Result], jobs: Iterable[Job], num_jobs: int, workers: int | None = None
) -> Generator[Result, None, None]:
    """Yield `function(job)` for every job, in their order. Closing the generator ends the pool early.

    Args:
        function: a function of a module, so that a spawned process can import it.
        jobs: consumed as workers become free.
        num_jobs: how many there are, so that no more processes than jobs are started.
        workers: number of processes; default: `default_workers()`. One works in this process.

    Raises:
        RunError: a worker process was killed. What `function` raises comes through as it is; in either case jobs that
            have not begun are dropped.
    """
    workers = min(workers or default_workers(), num_jobs)
    if workers <= 1:
        yield from map(function, jobs)
        return
    # spawn: a forked worker would inherit locked locks of whatever threads the caller runs.
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), _begin_worker)
    pending: deque[Future[Result]] = deque()
    try:
        for job in jobs:
            pending.append(pool.submit(function, job))
            if len(pending) >= workers * _JOBS_AHEAD:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    except BrokenProcessPool:
        raise RunError(
            "a worker process was killed (often by the system, for want of memory); run the same command again, "
            f"with --workers below {workers}"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


def _begin_worker() -> None:
    # Ctrl-C reaches the workers too: they end their job, which removes its temporary file, without a traceback each.
    signal.signal(signal.SIGINT, lambda number, frame: sys.exit(128 + number))
    end_with_parent()


@contextmanager
def deaf_to_schedulers() -> Iterator[None]:
    """Let processes that are started within the block not hear SIGTERM and SIGUSR1, which a scheduler may send to all
    processes of a job: the one that started them hears it, and needs them until it has ended. SIGKILL ends them."""
    requests = {signal.SIGTERM, signal.SIGUSR1}
    former = signal.pthread_sigmask(signal.SIG_BLOCK, requests)
    try:
        # It would start with the first process, and leaves SIGTERM unblocked in who started it.
        resource_tracker.ensure_running()
        signal.pthread_sigmask(signal.SIG_BLOCK, requests)
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, former)


def end_with_parent() -> None:
    """Let this process, started by multiprocessing, end at once when the one that started it is gone.

    Otherwise it waits for work for ever, or goes on with what nobody will take: nothing closes its end of the queue.
    """
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
