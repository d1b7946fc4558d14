"""The reader processes of a stream, seen from outside."""

import psutil


def readers_of(pid: int | None = None) -> list[int]:
    """Process ids of the readers of a process, this one by default; they are children of its fork server."""
    servers = [child for child in psutil.Process(pid).children() if "forkserver" in " ".join(child.cmdline())]
    readers = [reader for server in servers for reader in server.children()]
    return [reader.pid for reader in readers if reader.status() != psutil.STATUS_ZOMBIE]
