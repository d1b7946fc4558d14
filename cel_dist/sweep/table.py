"""The trials of a sweep as they go on: a table that follows them on a terminal, lines elsewhere."""

import logging
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol

from cel_dist.sweep.outcomes import ENDED, Outcome

logger = logging.getLogger(__name__)

_ROWS = 30
# Between two columns.
_GAP = 3
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

        def show() -> None:
            live.update(table(outcomes.values(), num_trials, metric, live.console.width), refresh=True)

        show()

        def draw(outcome: Outcome, event: str) -> None:
            if event in ("recovering", "failed"):
                live.console.print(line(outcome, event, metric), markup=False, highlight=False)
            show()

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


def table(outcomes: Iterable[Outcome], num_trials: int, metric: str, width: int = 80) -> Any:
    """The trials under way and the best of the others, as a table of rich.

    Settings have a column each where the terminal has so many characters, and share one elsewhere.
    """
    from rich import box
    from rich.table import Table

    known = list(outcomes)
    num_ended = sum(outcome.status in ENDED for outcome in known)
    known.sort(key=lambda outcome: (_ORDER[outcome.status] > 2, outcome.best if outcome.best is not None else 9.0))
    shown = known[:_ROWS]
    settings = list(known[0].values) if known else []
    fixed = [("trial", "status", "epoch", metric, "best"), *map(_cells, shown)]
    values = [settings, *([short(outcome.values.get(setting)) for setting in settings] for outcome in shown)]
    columns = [*zip(*fixed, strict=True), *zip(*values, strict=True)]
    if sum(max(map(len, column)) + _GAP for column in columns) > width:
        names = [setting.rpartition(".")[2] for setting in settings]
        values = [
            ["settings"],
            *([" ".join(f"{a}={b}" for a, b in zip(names, row, strict=True))] for row in values[1:]),
        ]
    drawn = Table(
        title=f"{num_ended} of {num_trials} trials are over", title_justify="left", box=box.SIMPLE, padding=(0, 1)
    )
    for name in fixed[0]:
        drawn.add_column(name, no_wrap=True, justify="left" if name in ("trial", "status") else "right")
    for name in values[0]:
        drawn.add_column(name, overflow="fold", justify="left" if name == "settings" else "right")
    for left, right in zip(fixed[1:], values[1:], strict=True):
        drawn.add_row(*left, *right)
    if len(known) > _ROWS:
        drawn.caption = f"and {len(known) - _ROWS} more"
    return drawn


def _cells(outcome: Outcome) -> tuple[str, ...]:
    measured = ("-" if value is None else f"{value:.4f}" for value in (outcome.last, outcome.best))
    return (outcome.id, outcome.status, f"{outcome.epoch:g}", *measured)
