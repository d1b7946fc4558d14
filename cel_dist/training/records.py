"""What a run writes down while it trains: lines in the log, points in MLflow, and objects in two files.

metrics.jsonl        one an interval: step, epoch, means of the losses, speed, learning rate, ...
evaluations.jsonl    one an evaluation: step, epoch, eer, min_dcf
"""

import json
import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cel_dist.data.files import atomic_write
from cel_dist.errors import RunError
from cel_dist.losses import LossOutput
from cel_dist.tracking import Tracker
from cel_dist.training.checkpoint import TrainState

logger = logging.getLogger(__name__)
METRICS = "metrics.jsonl"
EVALUATIONS = "evaluations.jsonl"


class Interval:
    """Means over the steps since the last record.

    Losses stay tensors on their device until they are read: one copy an interval.
    """

    def __init__(self) -> None:
        self._values: list[Tensor] = []
        self._false_negatives: list[float] = []
        self._utterances = 0
        self._waited = 0.0
        self._faults = 0
        self._begin = time.perf_counter()

    def add(
        self,
        output: LossOutput,
        gradient_norm: Tensor,
        *,
        utterances: int,
        waited: float,
        faults: int = 0,
        false_negatives: float | None = None,
    ) -> None:
        """Count a step.

        Args:
            output: the losses of the step.
            gradient_norm: scalar.
            utterances: number of them in the global batch.
            waited: seconds spent waiting for data.
            faults: utterances of the global batch that could not be read.
            false_negatives: their true rate, if it is known.
        """
        if false_negatives is not None:
            self._false_negatives.append(false_negatives)
        self._values.append(torch.stack([*(value.detach().float() for value in output), gradient_norm.float()]))
        self._utterances += utterances
        self._waited += waited
        self._faults += faults

    def summary(self) -> dict[str, float]:
        """Means of the losses, and the speed of the interval in wall-clock time."""
        seconds = time.perf_counter() - self._begin
        means = torch.stack(self._values).mean(dim=0).tolist()
        rates = self._false_negatives
        return {
            **dict(zip([*LossOutput._fields, "grad_norm"], means, strict=True)),
            "utterances_per_second": self._utterances / seconds,
            "data_wait": self._waited / seconds,
            "faults": self._faults,
            **({"false_negatives": sum(rates) / len(rates)} if rates else {}),
        }


class Records:
    """Rank 0's records; on other ranks `Records` is not made.

    Args:
        run_dir: folder of the run.
        tracker: where MLflow's part goes.
        state: position that the run continues from; what was recorded behind it is dropped, because it will come again.

    Raises:
        RunError: the files cannot be written.
    """

    def __init__(self, run_dir: Path, tracker: Tracker, state: TrainState) -> None:
        self._run_dir = run_dir
        self._tracker = tracker
        with writing(run_dir):
            _keep(run_dir / METRICS, lambda step: step <= state.step)
            _keep(run_dir / EVALUATIONS, lambda step: step < state.step or step == state.evaluated_step)

    def write_interval(self, *, step: int, epoch: int, values: dict[str, float]) -> None:
        """Record the steps since the last interval. Raises RunError as the class does."""
        self._write(METRICS, step, epoch, values)

    def write_evaluation(self, *, step: int, epoch: int, eer: float, min_dcf: float) -> None:
        """Record an evaluation. Raises RunError as the class does."""
        self._write(EVALUATIONS, step, epoch, {"eer": eer, "min_dcf": min_dcf})

    def _write(self, name: str, step: int, epoch: int, values: dict[str, float]) -> None:
        record = {"step": step, "epoch": epoch, **values}
        with writing(self._run_dir), (self._run_dir / name).open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(record) + "\n")
        self._tracker.log_metrics(values, step=step)
        shown = "  ".join(f"{name} {value:.4g}" for name, value in values.items())
        logger.info("step %d  epoch %d  %s", step, epoch, shown)


@contextmanager
def writing(run_dir: Path) -> Iterator[None]:
    """Turn a full disk or a refused permission within the block into a RunError."""
    try:
        yield
    except OSError as error:
        raise RunError(
            f"cannot write the run folder {run_dir}: {(error.strerror or str(error)).lower()}; put that right and run "
            "the same command again, it continues from the last checkpoint"
        ) from error


def _keep(path: Path, is_kept: Callable[[int], bool]) -> None:
    """Leave only the lines of some steps in a file, which is made if it is not there."""
    # A last line without its end was cut by a killed process.
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n")[:-1] if path.exists() else []
    kept = []
    for number, line in enumerate(lines, start=1):
        step = _step_of(line)
        if step is None:
            logger.warning("%s, line %d, is damaged and was dropped: %s", path, number, line[:80])
        elif is_kept(step):
            kept.append(line + "\n")
    with atomic_write(path) as file:
        file.write("".join(kept).encode())


def _step_of(line: str) -> int | None:
    try:
        record: Any = json.loads(line)
    except ValueError:
        return None
    step = record.get("step") if isinstance(record, dict) else None
    return step if isinstance(step, int) and "epoch" in record else None
