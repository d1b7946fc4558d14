"""Cores, memory, disk, limits and programs of a machine."""

import os
import resource
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from cel_dist.data.pool import default_workers
from cel_dist.doctor.check import Check, Checks, tried

if TYPE_CHECKING:
    from cel_dist.doctor.examine import Settings

_GIB = 2**30
_CGROUP = Path("/sys/fs/cgroup")
# A reader keeps up to 64 shards open; torch, MLflow and the connections of the ranks come on top.
_FEW_FILES, _ENOUGH_FILES = 128, 1024
# A rank of the demo takes about 1 GiB, and there are two.
_LITTLE_MEMORY, _ENOUGH_MEMORY = 2 * _GIB, 6 * _GIB
# The demo writes some 300 MB, a checkpoint of a large encoder about as much.
_LITTLE_DISK, _ENOUGH_DISK = _GIB // 2, 10 * _GIB
# Of a reader process, what data.prefetch_mib is by default.
_ENOUGH_SHARED = _GIB // 4
_PROGRAM_SECONDS = 20.0
_LOOK = "the system refuses to tell; look by hand"


def machine(settings: "Settings") -> Checks:
    """What there is of cores, memory, disk and files."""
    yield tried("cores", _cores, _LOOK, "note")
    yield tried("memory", _memory, _LOOK, "note")
    yield tried("disk", lambda: _disk(Path(settings.folder)), "name a folder that can be written into")
    yield tried("shared memory", _shared_memory, "mount /dev/shm; in Docker give --shm-size 2g; or set data.workers=0")
    yield tried("open files", _open_files, _LOOK, "note")


def _cores() -> Check:
    cores, machine_cores = default_workers(), os.cpu_count() or 1
    found = f"{cores} of the machine's {machine_cores}" if cores != machine_cores else f"{cores}"
    quota = cpu_quota(_CGROUP)
    if quota is not None and quota < cores:
        remedy = (
            f"set train.threads={max(1, int(quota))} divided by the ranks, or raise the quota: threads beyond it wait"
        )
        return Check("cores", "note", f"{found}, of which a control group allows the time of {quota:g}", remedy)
    load = os.getloadavg()[0]
    return Check("cores", "ok", f"{found}; load {load:.1f}")


def cpu_quota(root: Path) -> float | None:
    """The number of cores whose time the control group of this process may use; None if it is not limited.

    Args:
        root: where control groups are mounted, of version 2 or 1.
    """
    try:
        quota, period = (root / "cpu.max").read_text().split()
    except (OSError, ValueError):
        quota, period = (_text(root / "cpu" / name) for name in ("cpu.cfs_quota_us", "cpu.cfs_period_us"))
    try:
        cores = int(quota) / int(period)
    except (ValueError, ZeroDivisionError):
        return None
    return cores if cores > 0 else None


def _text(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""


def memory_left(root: Path) -> int | None:
    """Bytes that the control group of this process may still take; None if it is not limited."""
    for limit, used in (
        ("memory.max", "memory.current"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
    ):
        try:
            left = int(_text(root / limit)) - int(_text(root / used))
        except ValueError:
            continue
        # Version 1 states the largest number there is.
        return left if left < 2**60 else None
    return None


def _memory() -> Check:
    import psutil

    memory = psutil.virtual_memory()
    left = memory_left(_CGROUP)
    available = memory.available if left is None else min(memory.available, left)
    found = f"{available / _GIB:.1f} GiB available of {memory.total / _GIB:.1f}"
    if left is not None and left < memory.available:
        found += " (a control group sets the limit)"
    remedy = "end other programs, raise the limit, or lower train.batch_size"
    if available < _LITTLE_MEMORY:
        return Check("memory", "fault", found, remedy)
    return Check("memory", *(("note", found, remedy) if available < _ENOUGH_MEMORY else ("ok", found)))


def _disk(folder: Path) -> Check:
    nearest = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.is_dir())
    with tempfile.TemporaryFile(dir=nearest) as file:
        file.write(b"\0" * 2**16)
        file.flush()
        os.fsync(file.fileno())
    free, free_temporary = (shutil.disk_usage(place).free for place in (nearest, tempfile.gettempdir()))
    found = f"{free / _GIB:.1f} GiB free in {nearest}, {free_temporary / _GIB:.1f} in {tempfile.gettempdir()}"
    remedy = "make room, or write runs to another disk (run.dir)"
    if free < _LITTLE_DISK:
        return Check("disk", "fault", found, remedy)
    return Check("disk", *(("note", found, remedy) if free < _ENOUGH_DISK else ("ok", found)))


def _shared_memory() -> Check:
    folder = "/dev/shm"
    with tempfile.TemporaryFile(dir=folder) as file:
        file.write(b"\0" * 2**20)
        file.flush()
    size = shutil.disk_usage(folder)
    found = f"{size.free / _GIB:.2f} GiB free in {folder}"
    if size.free < _ENOUGH_SHARED:
        remedy = (
            "make it larger (Docker: --shm-size 2g; Kubernetes: an emptyDir of medium Memory), or set data.workers=0"
        )
        return Check("shared memory", "note", found, remedy)
    return Check("shared memory", "ok", found)


def _open_files() -> Check:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    shown = "without limit" if soft == resource.RLIM_INFINITY else f"{soft} a process"
    if soft == resource.RLIM_INFINITY or soft >= _ENOUGH_FILES:
        return Check("open files", "ok", shown)
    allowed = hard == resource.RLIM_INFINITY or hard >= _ENOUGH_FILES
    remedy = f"run 'ulimit -n {65536 if hard == resource.RLIM_INFINITY else hard}' in the shell that starts the job"
    if not allowed:
        remedy = "raise the hard limit too (/etc/security/limits.conf, LimitNOFILE= of a service, docker --ulimit)"
    return Check("open files", "fault" if soft < _FEW_FILES else "note", shown, remedy)


def programs(settings: "Settings") -> Checks:
    """Programs that are used where they are there."""
    yield program("git", ["git", "--version"], "install git; runs then record the commit of the code")
    yield program("ssh", ["ssh", "-V"], "install an OpenSSH client to train on several machines")
    yield program("pdsh", ["pdsh", "-V"], "install pdsh to train on several machines with --hostfile")


def program(name: str, command: list[str], remedy: str) -> Check:
    """Whether a program starts: what it says of its version."""
    path = shutil.which(command[0])
    if path is None:
        return Check(name, "note", "not on the PATH", remedy)
    try:
        done = subprocess.run(
            [path, *command[1:]],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=_PROGRAM_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return Check(name, "note", f"{path} gave no answer within {_PROGRAM_SECONDS:g} s", remedy)
    except OSError as error:
        return Check(name, "note", f"{path} cannot be started: {(error.strerror or str(error)).lower()}", remedy)
    line = next(iter(done.stdout.decode(errors="replace").splitlines()), "").strip()[:100]
    if done.returncode:
        return Check(name, "note", f"{path} ended with code {done.returncode}: {line}", remedy)
    return Check(name, "ok", line or path)
