"""The trials of a sweep as they go on: a table that follows them on a terminal, lines elsewhere."""

import logging
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol

from cel_dist.sweep.outcomes import ENDED, Outcome

logger = logging.getLogger(__name__)

_ROWS = 30
_ORDER = {"running": 0, "paused": 1, "waiting": 2, "finished": 3, "stopped": 4, "failed": 5}


class _Draw(Protocol):
    def __call__(self, outcome: Outcome, event: str) -> None: ...


@contextmanager
def live_table(outcomes: Mapping[str, Outcome], num_trials: int, metric: str) -> Iterator[_Draw]:
    """A function to be told what happens to trials, which shows it.

    Args:
        outcomes: all trials, as they are at the time.
        num_trials: how many there will be.
        metric: what they are compared by.
    """
    if not sys.stderr.isatty():
        yield lambda outcome, event: logger.info("%s", line(outcome, event, metric))
        return
    from rich.console import Console
    from rich.live import Live

    with Live(console=Console(stderr=True), auto_refresh=False) as live:

        def draw(outcome: Outcome, event: str) -> None:
            if event in ("recovering", "failed"):
                live.console.print(line(outcome, event, metric), markup=False, highlight=False)
            live.update(table(outcomes.values(), num_trials, metric), refresh=True)

        yield draw


def line(outcome: Outcome, event: str, metric: str) -> str:
    """What has happened to a trial, in a line."""
    what = f"trial {outcome.id}: {event}"
    if event == "started":
        return f"{what} with {told(outcome.values)}"
    if event in ("recovering", "failed"):
        return f"{what}: {outcome.error}"
    if outcome.last is None:
        return what
    return f"{what}, epoch {outcome.epoch:g}, {metric} {outcome.last:.4f}, best {outcome.best:.4f}"


def told(values: Mapping[str, Any]) -> str:
    """Settings in a line."""
    return " ".join(f"{setting}={short(value)}" for setting, value in values.items())


def short(value: Any) -> str:
    """A value as a table shows it."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def table(outcomes: Iterable[Outcome], num_trials: int, metric: str) -> Any:
    """The trials under way and the best of the others, as a table of rich."""
    from rich.table import Table

    known = list(outcomes)
    num_ended = sum(outcome.status in ENDED for outcome in known)
    settings = list(known[0].values) if known else []
    drawn = Table(title=f"{num_ended} of {num_trials} trials are over", title_justify="left")
    for name in ("trial", "status", "epoch", metric, "best", *settings):
        drawn.add_column(name, overflow="fold", justify="left" if name in ("trial", "status") else "right")
    known.sort(key=lambda outcome: (_ORDER[outcome.status] > 2, outcome.best if outcome.best is not None else 9.0))
    for outcome in known[:_ROWS]:
        drawn.add_row(
            outcome.id,
            outcome.status,
            f"{outcome.epoch:g}",
            *("-" if value is None else f"{value:.4f}" for value in (outcome.last, outcome.best)),
            *(short(outcome.values.get(setting)) for setting in settings),
        )
    if len(known) > _ROWS:
        drawn.caption = f"and {len(known) - _ROWS} more"
    return drawn
