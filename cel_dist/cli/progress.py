"""The progress bar of every command that may take a while."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

_QUIET_SECONDS = 2.0
# Shards come in bursts, a minute or more apart when they are large.
_SPEED_ESTIMATE_SECONDS = 600.0


@contextmanager
def progress_bar(text: str) -> Iterator[Callable[[int, int], None] | None]:
    """A bar on stderr, told the numbers done and in all, once the work has taken two seconds; None off a terminal."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    bar = Progress(
        *columns, console=Console(stderr=True), transient=True, speed_estimate_period=_SPEED_ESTIMATE_SECONDS
    )
    begin = time.monotonic()

    def advance(done: int, total: int) -> None:
        if not bar.task_ids:
            # What an earlier run did is no speed of this one.
            bar.add_task(text, completed=done, total=total)
        bar.update(bar.task_ids[0], completed=done, total=total)
        if not bar.live.is_started and time.monotonic() - begin > _QUIET_SECONDS:
            bar.start()

    try:
        yield advance
    finally:
        if bar.live.is_started:
            bar.stop()
