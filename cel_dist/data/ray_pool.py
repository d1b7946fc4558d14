"""Independent jobs over a Ray cluster: results in order, few tasks at a time."""

from collections import deque
from collections.abc import Callable, Generator, Iterable
from contextlib import suppress
from typing import Any, TypeVar

from cel_dist.errors import RunError
from cel_dist.ray_cluster import RETRIES, connected, first_line

Job = TypeVar("Job")
Result = TypeVar("Result")

# For each core of the cluster, so that no worker waits for the driver and a million jobs are not all in Ray's tables.
_TASKS_AHEAD = 2
_END_SECONDS = 10.0


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
    with connected(address, workers) as ray:
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
                f"a worker of the Ray cluster cannot import what it needs ({first_line(error.cause)}); install the "
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
            f"the Ray cluster was lost while it did {name(job)}: {first_line(error)}; run the same command again when "
            "it is back, it continues"
        ) from None
