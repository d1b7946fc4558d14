"""All checks of a machine, side by side, each in a process of its own.

An import may hang, a native library may end its process: whoever looks must survive both, and say which it was.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Any, Literal

from cel_dist.doctor.check import Check

DEFAULT_TIMEOUT_SECONDS = 60.0
_COLLECTING_SECONDS = 2.0


@dataclass(frozen=True)
class Settings:
    """What is to be examined for.

    Attributes:
        timeout_seconds: longest that a probe may take.
        tracking: whether runs are to be recorded in MLflow.
        tracking_uri: MLflow's server or database; None for the one that is in force.
        precision: `train.precision` of a configuration; None where there is none.
        folder: where runs are to be written.
    """

    timeout_seconds: float = DEFAULT_TIMEOUT_SECONDS
    tracking: bool = True
    tracking_uri: str | None = None
    precision: Literal["fp32", "bf16"] | None = None
    folder: str = "."


# Probe -> the checks that it always makes, in the order of the table. Those that take longest are begun first, below.
PROBES: dict[str, tuple[str, ...]] = {
    "environment": ("python", "packages", "extras"),
    "machine": ("cores", "memory", "disk", "shared memory", "open files"),
    "compute": ("torch", "processor", "gpu"),
    "collectives": ("gloo", "nccl"),
    "deepspeed": ("deepspeed",),
    "audio": ("libsndfile", "soxr", "ffmpeg"),
    "torchaudio": ("torchaudio",),
    "webdataset": ("webdataset",),
    "corpus": ("espeak-ng",),
    "ray": ("ray",),
    "tracking": ("mlflow",),
    "programs": ("git", "ssh", "pdsh"),
}
_LONGEST_FIRST = ("tracking", "deepspeed", "collectives", "compute", "ray", "torchaudio", "webdataset")
# What is missing without a check's answer, where that does not stop training on this machine.
_SPARE = frozenset({"extras", "gpu", "ffmpeg", "ray", "git", "ssh", "pdsh", "torchaudio"})


def examine(settings: Settings, progress: Callable[[int, int], None] | None = None) -> list[Check]:
    """Try everything, and return what was found, in the order of `PROBES`.

    Never raises for what is wrong with the machine, and never takes much longer than `settings.timeout_seconds`.

    Args:
        settings: what is to be examined for.
        progress: told the number of probes done and in all.
    """
    names = sorted(PROBES, key=lambda name: _LONGEST_FIRST.index(name) if name in _LONGEST_FIRST else len(PROBES))
    # All at once: a probe that waits for a network must not keep the others, nor they its limit from it.
    with ThreadPoolExecutor(len(names), "probe") as pool, _Processes() as processes:
        futures: dict[Future[list[Check]], str] = {pool.submit(_run, name, settings, processes): name for name in names}
        found: dict[str, list[Check]] = {}
        for future in as_completed(futures):
            found[futures[future]] = future.result()
            if progress is not None:
                progress(len(found), len(names))
    return [check for name in PROBES for check in found[name]]


class _Processes:
    """Processes in sessions of their own, all of which are killed, with their children, when the block is left."""

    def __init__(self) -> None:
        self._running: list[subprocess.Popen[str]] = []

    def __enter__(self) -> "_Processes":
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._running:
            self.kill(process)

    def start(self, command: list[str], messages: int) -> "subprocess.Popen[str]":
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=messages,
            text=True,
            errors="replace",
            start_new_session=True,
        )
        self._running.append(process)
        return process

    def kill(self, process: "subprocess.Popen[str]") -> None:
        # Its group outlives it where it left children.
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)


def _run(name: str, settings: Settings, processes: _Processes) -> list[Check]:
    command = [sys.executable, "-m", "cel_dist.doctor.probe", name, json.dumps(asdict(settings))]
    try:
        with tempfile.TemporaryFile() as messages:
            process = processes.start(command, messages.fileno())
            why = ""
            try:
                output, _ = process.communicate(timeout=settings.timeout_seconds)
            except subprocess.TimeoutExpired:
                why = f"gave no answer within {settings.timeout_seconds:g} s"
                processes.kill(process)
                output = _rest(process)
            processes.kill(process)
            messages.seek(0)
            why = why or _ending(process.returncode, messages.read().decode(errors="replace"))
    except OSError as error:
        output, why = "", f"could not be tried: {(error.strerror or str(error)).lower()}"
    checks = list(_parsed(output))
    answered = {check.name for check in checks}
    lacking = [expected for expected in PROBES[name] if expected not in answered]
    return checks + [
        Check(expected, "note" if expected in _SPARE else "fault", why, _remedy(name, settings)) for expected in lacking
    ]


def _rest(process: "subprocess.Popen[str]") -> str:
    try:
        return process.communicate(timeout=_COLLECTING_SECONDS)[0]
    except subprocess.TimeoutExpired as error:
        # A grandchild in a session of its own holds the pipe.
        held = error.stdout
        return held.decode(errors="replace") if isinstance(held, bytes) else held or ""


def _parsed(output: str) -> Iterator[Check]:
    for line in output.splitlines():
        # The last line of a process that was killed may be cut.
        with suppress(ValueError, TypeError):
            fields: dict[str, Any] = json.loads(line)
            yield Check(**fields)


def _ending(code: int, messages: str) -> str:
    last = next((line.strip() for line in reversed(messages.splitlines()) if line.strip()), "")
    if code < 0:
        names = {number.value: number.name for number in signal.Signals}
        return f"trying it ended the process with {names.get(-code, f'signal {-code}')}"
    return f"trying it ended the process with code {code}" + (f": {last[:200]}" if last else "")


def _remedy(probe: str, settings: Settings) -> str:
    if probe == "tracking":
        return "start the server, name another one (tracking.uri, MLFLOW_TRACKING_URI), or set tracking.enabled=false"
    if probe in ("environment", "machine", "programs"):
        return f"run again with --timeout {2 * settings.timeout_seconds:g}; the machine may be busy"
    return f"on a busy machine run again with --timeout {2 * settings.timeout_seconds:g}; else reinstall the package"
