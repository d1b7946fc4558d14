"""The progress of a run on a terminal: one line that moves, with the lines of the log above it."""

import logging
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class Display:
    """What rank 0 shows while it trains, if its stderr is a terminal; else nothing, and no part of it is loaded.

    Ranks inherit stderr from the launcher, and so the terminal. Nothing here waits for a device: loss and EER are those
    that were recorded last.
    """

    def __init__(self) -> None:
        self._progress: Any = None

    @contextmanager
    def shown(self, step: int, total_steps: int, steps_per_epoch: int, batch_size: int) -> Iterator["Display"]:
        """Show it within the block.

        Args:
            step: where the run begins.
            total_steps: where it ends.
            steps_per_epoch: steps of an epoch.
            batch_size: utterances K of a step.
        """
        if not sys.stderr.isatty():
            yield self
            return
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        console = Console(stderr=True)
        progress = Progress(
            TextColumn("epoch {task.fields[epoch]}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("loss {task.fields[loss]}  {task.fields[speed]} utt/s  EER {task.fields[eer]}  left"),
            TimeRemainingColumn(),
            console=console,
            transient=True,
            speed_estimate_period=300,
            refresh_per_second=2,
            # Standard output is for the result.
            redirect_stdout=False,
        )
        self._steps_per_epoch, self._batch_size = steps_per_epoch, batch_size
        self._task = progress.add_task(
            "", completed=step, total=total_steps, epoch=step // steps_per_epoch, loss="-", speed="-", eer="-"
        )
        self._step, self._begin = step, time.monotonic()
        with _log_above(console), progress:
            # A rank that is killed could not bring it back.
            console.show_cursor(True)
            self._progress = progress
            try:
                yield self
            finally:
                self._progress = None

    def at(self, step: int) -> None:
        """A step was launched."""
        if self._progress is None:
            return
        # Of a CUDA device the first steps are launched long before they are done; over a run that makes no difference.
        speed = (step - self._step) * self._batch_size / max(1e-9, time.monotonic() - self._begin)
        epoch = (step - 1) // self._steps_per_epoch
        self._progress.update(self._task, completed=step, epoch=epoch, speed=f"{speed:.1f}")

    def loss(self, value: float) -> None:
        """The mean loss of the interval that was recorded."""
        if self._progress is not None:
            self._progress.update(self._task, loss=f"{value:.4f}")

    def eer(self, value: float) -> None:
        """The last equal error rate, a fraction."""
        if self._progress is not None:
            self._progress.update(self._task, eer=f"{100 * value:.2f} %")


@contextmanager
def _log_above(console: Any) -> Iterator[None]:
    """Let the handlers of the log that write to stderr write above the line that moves."""
    handlers = [
        handler
        for handler in logging.getLogger().handlers
        if isinstance(handler, logging.StreamHandler) and handler.stream is sys.stderr
    ]
    above = _Above(console)
    for handler in handlers:
        handler.setStream(above)
    try:
        yield
    finally:
        for handler in handlers:
            handler.setStream(sys.stderr)


class _Above:
    """A stream whose lines a console prints as they are, above what it keeps at the bottom."""

    def __init__(self, console: Any) -> None:
        self._console = console

    def write(self, text: str) -> int:
        if text.rstrip("\n"):
            self._console.print(text.rstrip("\n"), markup=False, highlight=False, soft_wrap=True)
        return len(text)

    def flush(self) -> None:
        """Nothing is held back."""
