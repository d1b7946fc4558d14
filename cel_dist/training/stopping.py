"""Requests to end a run before its last step: what a scheduler sends before it takes the machine away."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
"""SIGTERM is what schedulers send; SIGUSR1 is what Slurm sends ahead of it when asked to (`--signal=USR1@120`)."""


class StopRequest:
    """Whether this process was asked to end.

    Attributes:
        name: of the signal; None while there was none.
    """

    def __init__(self) -> None:
        self.name: str | None = None

    def __call__(self, number: int, frame: FrameType | None) -> None:
        """Take note. A scheduler and a launcher may both send a signal, so that another one changes nothing."""
        self.name = self.name or signal.Signals(number).name


@contextmanager
def stop_requests() -> Iterator[StopRequest]:
    """Listen for `SIGNALS` within the block. Outside of the main thread, where Python cannot, there is never one."""
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    former = {number: signal.signal(number, request) for number in SIGNALS}
    try:
        yield request
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)
