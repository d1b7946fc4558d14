"""The processes of one launch: which they are, how to signal them, and that none of them outlives it.

A launch writes a name of its own into the environment that all its processes inherit, on every node. By that name they
are found, whatever stands between: the deepspeed launcher takes signals for an order to kill, and ranks that were
started through ssh are nobody's children here.
"""

import os
import secrets
import select
import signal
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import NoReturn

import psutil

LAUNCH = "CEL_LAUNCH"
_HERE, _OVER_SSH = "here", "ssh"
_MODULE = "cel_dist.train"
_LOOK_EVERY_SECONDS = 0.5


def new_launch(*, over_ssh: bool) -> str:
    """A name for a launch by this process: how its ranks are started, whose it is, and what makes it unique."""
    return f"{_OVER_SSH if over_ssh else _HERE}:{os.getpid()}:{secrets.token_hex(8)}"


def processes_of(launch: str) -> list[psutil.Process]:
    """All processes of the launch on this machine, besides this one: its launchers, its ranks and their readers."""
    return [process for process in psutil.process_iter() if _environment(process).get(LAUNCH) == launch]


def ranks_of(launch: str) -> list[psutil.Process]:
    """The ranks of the launch on this machine."""
    return [process for process in processes_of(launch) if _is_rank(process)]


def signal_ranks(launch: str, number: int) -> int:
    """Send a signal to the ranks of the launch on this machine, to nothing else; returns how many there were."""
    return signal_processes(ranks_of(launch), number)


def signal_processes(processes: list[psutil.Process], number: int) -> int:
    """Send a signal to those of the processes that are still there; returns how many they were."""
    reached = 0
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            process.send_signal(number)
            reached += 1
    return reached


def end_processes(launch: str, *, patience_seconds: float) -> None:
    """Ask all processes of the launch on this machine to end, and end those that have not after a while."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        signal_processes(processes_of(launch), number)
        if wait_for_processes(launch, patience_seconds=patience_seconds):
            return


def wait_for_processes(launch: str, *, patience_seconds: float) -> bool:
    """Wait until no process of the launch is left on this machine; returns whether that came to be."""
    end = time.monotonic() + patience_seconds
    while processes := processes_of(launch):
        if time.monotonic() > end:
            return False
        # Not for long: what nobody waits for, as in a container, stays listed when it has ended.
        psutil.wait_procs(processes, timeout=_LOOK_EVERY_SECONDS)
    return True


def end_with_launcher(environment: Mapping[str, str] = os.environ) -> None:
    """End this rank at once when what started it is gone, or is gone already: it would hold the run folder for ever.

    Watched are the processes between this one and the one that stands for the whole launch: `cel train`, or, on a node
    reached through ssh, the server's end of the connection; without `cel train` the launcher of the node alone. A rank
    that none of them started (Slurm, a shell) is left alone.
    """
    launch = environment.get(LAUNCH, "")
    own = psutil.Process()
    if launch:
        watched = _chain(own, launch)
    elif any(argument.startswith("--local_rank") for argument in sys.argv) or "TORCHELASTIC_RUN_ID" in environment:
        watched = [own.ppid()]
    else:
        return
    handles = []
    for pid in watched:
        try:
            handles.append(os.pidfd_open(pid))
        except ProcessLookupError:
            _end()
    # The number of a process that ended may be another's by now; what still stands between this one and the top is not.
    if launch and watched != _chain(own, launch):
        _end()
    threading.Thread(target=_end_with_any, args=(handles,), name="end with launcher", daemon=True).start()


def _chain(own: psutil.Process, launch: str) -> list[int]:
    """Process numbers from the parent up to the one that stands for the launch; ends the process if that is gone."""
    how, pid, _ = launch.split(":")
    # The server of ssh makes the shell of a node the leader of a session of its own.
    top = int(pid) if how == _HERE else psutil.Process(os.getsid(0)).ppid()
    chain = []
    for parent in own.parents():
        chain.append(parent.pid)
        if parent.pid == top:
            break
    # Whose parent is gone is adopted by process 1, which in a container may be `cel train` itself.
    if top not in chain or (how == _OVER_SSH and top == 1):
        _end()
    return chain


def _end_with_any(handles: Sequence[int]) -> None:
    gone = select.poll()
    for handle in handles:
        gone.register(handle, select.POLLIN)
    ended = {handle for handle, _ in gone.poll()}
    # Where the top is still there, it says itself what ended below it.
    _end(says_so=handles[-1] in ended)


def _end(*, says_so: bool = True) -> NoReturn:
    # Whoever read this may be gone too.
    with suppress(OSError):
        if says_so:
            os.write(2, b"error: what started this rank is gone, so it ends; start again with --resume auto\n")
    os._exit(1)


def _is_rank(process: psutil.Process) -> bool:
    # The launchers name the module as well, the readers of a rank do not.
    try:
        words = process.cmdline()
    except psutil.Error:
        return False
    return _MODULE in words and "--module" not in words


def _environment(process: psutil.Process) -> dict[str, str]:
    try:
        return {} if process.pid == os.getpid() else process.environ()
    except psutil.Error:
        return {}
