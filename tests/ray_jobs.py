"""Jobs that Ray's workers import."""

import os
import signal
import time
from pathlib import Path
from typing import NamedTuple


class MarkedJob(NamedTuple):
    number: int
    folder: Path


def square(job: MarkedJob) -> int:
    (job.folder / f"done-{job.number}").touch()
    return job.number**2


def die_the_first_time(job: MarkedJob) -> int:
    marker = job.folder / f"died-{job.number}"
    if not marker.exists():
        marker.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return job.number


def die_if_odd(job: MarkedJob) -> int:
    if job.number % 2:
        (job.folder / f"try-{time.monotonic_ns()}").touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return job.number


def fail(job: MarkedJob) -> int:
    raise FileNotFoundError(2, "no such file", str(job.folder))
