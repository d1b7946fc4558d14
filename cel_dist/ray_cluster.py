"""Reaching a Ray cluster, or starting one on this machine."""

import os
import re
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any, Literal

from cel_dist.data.pool import default_workers
from cel_dist.errors import CelError, RunError

RETRIES = 3
"""How often a job is given to another worker after the one that did it died."""

_CONNECT_SECONDS = 10.0
_HOST_AND_PORT = re.compile(r"^(?:ray://)?\[?(?P<host>[^\[\]/]+)\]?:(?P<port>\d+)$")


@contextmanager
def connected(address: str, cpus: int | None = None, extra: Literal["ray", "sweep"] = "ray") -> Iterator[Any]:
    """The module `ray`, connected to a cluster within the block.

    Args:
        address: as `ray.init` takes it. `local` starts a cluster on this machine and ends it afterwards. If this
            process is connected to a cluster already, that one is used, and stays.
        cpus: cores of a `local` cluster. Default: those that this process may use.
        extra: of this package that brings what is used of Ray.

    Raises:
        CelError: Ray, or what that part of it needs, is not installed, or the address is none.
        RunError: the cluster cannot be reached.
    """
    # Before the import, which reads them. Telling Ray's makers of what users run is not this program's to decide.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    if address == "local" and "ray" not in sys.modules:
        # What Ray does by itself in a cluster that it starts, and warns of. Of another cluster nobody can tell whether
        # it asks for the token, and a process that sends one does not work with one that does not.
        os.environ.setdefault("RAY_AUTH_MODE", "token")
    # Ray tries again without end what its own watch over memory killed, whatever the retries of the task.
    os.environ.setdefault("RAY_task_oom_retries", str(RETRIES))
    try:
        import ray

        import_module("ray.tune" if extra == "sweep" else "ray.exceptions")
    except ImportError as error:
        problem = "Ray is not installed" if error.name == "ray" else f"a part of Ray is missing ({first_line(error)})"
        remedy = "pip install 'cel_dist[sweep]'" if extra == "sweep" else "pip install 'cel_dist[ray]', or do without"
        raise CelError(f"{problem}; {remedy}") from None
    if ray.is_initialized():
        yield ray
        return
    _require_reachable(address)
    # What workers print would come out between the lines of this process, and on its stdout.
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": "warning"}
    if address == "local":
        options |= {"num_cpus": cpus or default_workers(), "include_dashboard": False}
    try:
        ray.init(address=address, **options)
    except ValueError as error:
        raise CelError(f"cannot use the Ray address '{address}': {first_line(error)}") from None
    except (OSError, RuntimeError) as error:
        raise RunError(_unreachable(address, first_line(error))) from None
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
    token = os.environ.get("RAY_AUTH_TOKEN_PATH") or os.path.expanduser("~/.ray/auth_token")
    if "RAY_AUTH_MODE" not in os.environ and os.path.isfile(token):
        # `ray start` asks for the token as soon as its file is there: once any cluster has run on the machine.
        remedy = f"if it asks for the token in {token}, set RAY_AUTH_MODE=token; else start one with 'ray start --head'"
    else:
        remedy = "start one with 'ray start --head'"
    return (
        f"no Ray cluster can be reached at '{address}': {why.rstrip('.').lower()}; {remedy}, give its address, or "
        "'local' (--ray local, --address local)"
    )


def first_line(error: Exception) -> str:
    """What an error of Ray says, in one line."""
    return str(error).strip().split("\n", 1)[0].rstrip(".")
