"""Independent jobs over a Ray cluster: results in order, few tasks at a time. The only part that knows Ray."""

import os
import re
import socket
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, TypeVar

from cel_dist.data.pool import default_workers
from cel_dist.errors import CelError, RunError

Job = TypeVar("Job")
Result = TypeVar("Result")

RETRIES = 3
"""How often a job is given to another worker after the one that did it died."""

# For each core of the cluster, so that no worker waits for the driver and a million jobs are not all in Ray's tables.
_TASKS_AHEAD = 2
_CONNECT_SECONDS = 10.0
_END_SECONDS = 10.0
_HOST_AND_PORT = re.compile(r"^(?:ray://)?\[?(?P<host>[^\[\]/]+)\]?:(?P<port>\d+)$")


def run_jobs_on_ray(
    function: Callable[[Job], Result],
    jobs: Iterable[Job],
    num_jobs: int,
    address: str,
    workers: int | None = None,
    *,
    name: Callable[[Job], str],
) -> Generator[Result, None, None]:
    """Yield `function(job)` for every job, in their order, from tasks of one core each.

    Closing the generator cancels what has not begun. A task whose worker dies is tried again `RETRIES` times.

    Args:
        function: a function of a module that the machines of the cluster have installed.
        jobs: consumed as tasks end.
        num_jobs: how many there are; nothing is started for none.
        address: as `ray.init` takes it. `local` starts a cluster on this machine and ends it afterwards. If this
            process is connected to a cluster already, that one is used.
        workers: most tasks under way at once, and the cores of a `local` cluster. Default: twice the cores of the
            cluster, and for a `local` one the cores that this process may use.
        name: what a job is called in messages.

    Raises:
        CelError: Ray is not installed, or the address is none.
        RunError: the cluster cannot be reached or was lost, or a worker died at each try of a job, which is named. What
            `function` raises comes through as it is.
    """
    if num_jobs == 0:
        return
    with _connected(address, workers) as ray:
        task = ray.remote(function).options(num_cpus=1, max_retries=RETRIES)
        most = workers or max(1, round(_TASKS_AHEAD * ray.cluster_resources().get("CPU", 1)))
        pending: deque[tuple[Job, Any]] = deque()
        running: set[Any] = set()
        try:
            for job in jobs:
                pending.append((job, task.remote(job)))
                running.add(pending[-1][1])
                # What is done and waits for its turn does not count: one slow job must not leave the others idle.
                while len(running) >= most:
                    _, left = ray.wait(list(running), num_returns=1)
                    running = set(left)
                while pending and pending[0][1] not in running:
                    yield _result(ray, *pending.popleft(), name)
            while pending:
                yield _result(ray, *pending.popleft(), name)
        finally:
            _cancel(ray, [reference for _, reference in pending])


def _cancel(ray: Any, references: list[Any]) -> None:
    """End what is under way, and give it the time to remove its temporary files."""
    if not references:
        return
    # Nothing is left to end where the cluster is lost, and what lost it is on its way up already.
    with suppress(ray.exceptions.RayError, ConnectionError):
        for reference in references:
            ray.cancel(reference)
        ray.wait(references, num_returns=len(references), timeout=_END_SECONDS)


def _result(ray: Any, job: Job, reference: Any, name: Callable[[Job], str]) -> Any:
    try:
        return ray.get(reference)
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, ImportError):
            raise RunError(
                f"a worker of the Ray cluster cannot import what it needs ({_first_line(error.cause)}); install the "
                "same cel_dist on all its machines"
            ) from None
        # Ray's own class for it carries the traceback of the worker into every message.
        raise error.cause from None
    except (ray.exceptions.WorkerCrashedError, ray.exceptions.OutOfMemoryError, ray.exceptions.NodeDiedError):
        raise RunError(
            f"the worker died at each of {RETRIES + 1} tries of {name(job)} (often killed by the system, for want of "
            "memory); free memory or use fewer cores, then run the same command again, it continues"
        ) from None
    except ray.exceptions.RayError as error:
        raise RunError(
            f"the Ray cluster was lost while it did {name(job)}: {_first_line(error)}; run the same command again when "
            "it is back, it continues"
        ) from None


@contextmanager
def _connected(address: str, workers: int | None) -> Iterator[Any]:
    # Before the import, which reads them. Telling Ray's makers of what users run is not this program's to decide.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # Ray tries again without end what its own watch over memory killed, whatever the retries of the task.
    os.environ.setdefault("RAY_task_oom_retries", str(RETRIES))
    try:
        import ray
        import ray.exceptions
    except ImportError:
        raise CelError("Ray is not installed; pip install 'cel_dist[ray]', or leave out --ray") from None
    if ray.is_initialized():
        yield ray
        return
    _require_reachable(address)
    # What workers print would come out between the lines of this process, and on its stdout.
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": "warning"}
    if address == "local":
        options |= {"num_cpus": workers or default_workers(), "include_dashboard": False}
    try:
        ray.init(address=address, **options)
    except ValueError as error:
        raise CelError(f"cannot use the Ray address '{address}': {_first_line(error)}") from None
    except (OSError, RuntimeError) as error:
        raise RunError(_unreachable(address, _first_line(error))) from None
    try:
        yield ray
    finally:
        ray.shutdown()


def _require_reachable(address: str) -> None:
    """Raise RunError if nobody answers at a host and port, for which Ray itself waits several minutes."""
    known = os.environ.get("RAY_ADDRESS", "") if address == "auto" else address
    match = _HOST_AND_PORT.match(known)
    if match is None:
        return
    try:
        socket.create_connection((match["host"], int(match["port"])), timeout=_CONNECT_SECONDS).close()
    except (OSError, OverflowError) as error:
        raise RunError(_unreachable(known, getattr(error, "strerror", None) or str(error))) from None


def _unreachable(address: str, why: str) -> str:
    return (
        f"no Ray cluster can be reached at '{address}': {why.rstrip('.').lower()}; start one with 'ray start --head', "
        "give its address, or use '--ray local'"
    )


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n", 1)[0].rstrip(".")
