"""What has become of the trials of a sweep, as their folders and the search tell it."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from cel_dist.data.files import atomic_write
from cel_dist.errors import CelError
from cel_dist.tracking.recorded import EVALUATIONS, read_records

TRIALS = "trials.json"

Status = Literal["waiting", "running", "paused", "finished", "stopped", "failed"]

ENDED: tuple[Status, ...] = ("finished", "stopped", "failed")


@dataclass
class Outcome:
    """A trial.

    Attributes:
        id: of its folder.
        values: its settings by their paths; with population-based training the last ones.
        status: `stopped` is what the scheduler ended before its time.
        epoch: that its last evaluation was made at.
        last: what that measured, of `sweep.metric`; a fraction.
        best: the lowest such value.
        run_dir: run folder with the best one.
        failures: how often it was started again.
        error: what it failed of.
        origins: with population-based training, where each of its later runs began: trial, run and step.
    """

    id: str
    values: dict[str, Any]
    status: Status = "waiting"
    epoch: float = 0.0
    last: float | None = None
    best: float | None = None
    run_dir: str | None = None
    failures: int = 0
    error: str | None = None
    origins: list[dict[str, Any]] = field(default_factory=list)

    @property
    def is_over(self) -> bool:
        """Whether it stays as it is. One that failed is tried again by a sweep that goes on."""
        return self.status in ("finished", "stopped")

    def add(self, result: Mapping[str, Any], metric: str) -> None:
        """Take in an evaluation; one that is no number is not the best."""
        self.epoch, self.last = float(result["epoch"]), float(result[metric])
        if self.last == self.last and (self.best is None or self.last < self.best):
            self.best, self.run_dir = self.last, str(result["run_dir"])


def best_of(outcomes: Iterable[Outcome]) -> Outcome | None:
    """The trial with the lowest value; None if there is no value at all."""
    measured = [outcome for outcome in outcomes if outcome.best is not None]
    return min(measured, key=lambda outcome: (outcome.best, outcome.id), default=None)


def write_outcomes(folder: Path, outcomes: Iterable[Outcome]) -> None:
    """Write `trials.json`, atomically."""
    with atomic_write(folder / TRIALS) as file:
        file.write(json.dumps([asdict(outcome) for outcome in outcomes], indent=1).encode() + b"\n")


def read_outcomes(folder: Path) -> list[Outcome]:
    """What `write_outcomes` left; nothing if there is none.

    Raises:
        CelError: the file is damaged.
    """
    path = folder / TRIALS
    try:
        return [Outcome(**entry) for entry in json.loads(path.read_text(encoding="utf-8"))]
    except FileNotFoundError:
        return []
    except (ValueError, TypeError):
        raise CelError(
            f"{path} is damaged; remove it and go on with --resume, which makes it again from the runs"
        ) from None


def curve(runs: Iterable[Path], metric: str) -> list[tuple[float, float]]:
    """Epochs and values of all evaluations in run folders that follow each other."""
    points: dict[float, float] = {}
    for run in runs:
        for record in read_records(run / EVALUATIONS):
            if metric in record:
                points[float(record["epoch"])] = float(record[metric])
    return sorted(points.items())
