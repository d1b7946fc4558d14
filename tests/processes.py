"""Processes, seen from outside: the readers of a stream, and whether one has ended."""

import psutil


def readers_of(pid: int | None = None) -> list[int]:
    """Process ids of the readers of a process, this one by default; they are children of its fork server."""
    servers = [child for child in psutil.Process(pid).children() if "forkserver" in " ".join(child.cmdline())]
    readers = [reader for server in servers for reader in server.children()]
    return [reader.pid for reader in readers if reader.status() != psutil.STATUS_ZOMBIE]


def has_ended(process: psutil.Process) -> bool:
    """Whether it does so within half a minute. In a container it may stay listed then, because nobody asks for it."""
    left = psutil.wait_procs([process], timeout=30)[1]
    return not left or process.status() == psutil.STATUS_ZOMBIE
