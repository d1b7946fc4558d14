"""The metrics that a run folder holds, as points for MLflow.

These files, not MLflow, are the record of a run: what a server has not got, or lost, is read again from here.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

METRICS = "metrics.jsonl"
EVALUATIONS = "evaluations.jsonl"
SYSTEM_METRICS = "system_metrics.jsonl"

_NO_METRICS = ("step", "epoch", "time")


class Point(NamedTuple):
    """A value of a metric; `milliseconds` since 1970."""

    name: str
    value: float
    milliseconds: int
    step: int


def points_of(values: Mapping[str, Any], *, step: int, seconds: float) -> list[Point]:
    """Points of the numbers among `values`, taken `seconds` after 1970.

    >>> points_of({"loss": 2.5, "note": "first"}, step=3, seconds=1.0)
    [Point(name='loss', value=2.5, milliseconds=1000, step=3)]
    """
    milliseconds = round(seconds * 1000)
    return [
        Point(name, float(value), milliseconds, step)
        for name, value in values.items()
        if isinstance(value, (int, float)) and name not in _NO_METRICS
    ]


def recorded_points(run_dir: Path) -> Iterator[Point]:
    """All points of a run folder, file by file, each file in the order of its lines; damaged lines are left out."""
    for name in (METRICS, EVALUATIONS, SYSTEM_METRICS):
        path = run_dir / name
        for record in read_records(path):
            # Records of earlier versions do not say when they were made; the file does not know better than this.
            seconds = record.get("time")
            if not isinstance(seconds, (int, float)):
                seconds = path.stat().st_mtime
            yield from points_of(record, step=record["step"], seconds=seconds)


def read_records(path: Path) -> Iterator[dict[str, Any]]:
    """The whole lines of a file of records; none if there is no file."""
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return
    # What follows the last line break was cut off in the middle of writing, or is being written now.
    for line in text.split("\n")[:-1]:
        record = as_record(line)
        if record is not None:
            yield record


def as_record(line: str) -> dict[str, Any] | None:
    """The record in a line; None if it is damaged."""
    try:
        record: Any = json.loads(line)
    except ValueError:
        return None
    is_whole = isinstance(record, dict) and isinstance(record.get("step"), int)
    return record if is_whole else None
