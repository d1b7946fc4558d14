"""What a run writes down while it trains: a line in the log, an object in `metrics.jsonl`, a point in MLflow."""

import json
import logging
import time
from pathlib import Path

import torch
from torch import Tensor

from cel_dist.losses import LossOutput
from cel_dist.tracking import Tracker

logger = logging.getLogger(__name__)


class Interval:
    """Means over the steps since the last record.

    Losses stay tensors until they are read, so that a GPU need not be waited for.
    """

    def __init__(self) -> None:
        self._values: list[Tensor] = []
        self._steps = 0
        self._utterances = 0
        self._waited = 0.0
        self._begin = time.perf_counter()

    def add(self, output: LossOutput, gradient_norm: Tensor, *, utterances: int, waited: float) -> None:
        """Count a step over `utterances` utterances of which `waited` seconds were spent waiting for data."""
        self._values.append(torch.stack([*(value.detach().float() for value in output), gradient_norm.float()]))
        self._utterances += utterances
        self._waited += waited

    def summary(self) -> dict[str, float]:
        """Means of the losses, and the speed of the interval in wall-clock time."""
        seconds = time.perf_counter() - self._begin
        means = torch.stack(self._values).mean(dim=0).tolist()
        return {
            **dict(zip([*LossOutput._fields, "grad_norm"], means, strict=True)),
            "utterances_per_second": self._utterances / seconds,
            "data_wait": self._waited / seconds,
        }


class Records:
    """Rank 0's records; on other ranks `Records` is not made.

    Args:
        run_dir: folder of the run.
        tracker: where MLflow's part goes.
        step: step that the run continues from; what was recorded after it is dropped, because it will come again.
    """

    def __init__(self, run_dir: Path, tracker: Tracker, step: int) -> None:
        self._path = run_dir / "metrics.jsonl"
        self._tracker = tracker
        kept = [line for line in _lines(self._path) if json.loads(line)["step"] <= step]
        self._path.write_text("".join(line + "\n" for line in kept), encoding="utf-8")

    def write(self, *, step: int, epoch: int, values: dict[str, float]) -> None:
        """Record `values` of a step everywhere."""
        record = {"step": step, "epoch": epoch, **values}
        with self._path.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(record) + "\n")
        self._tracker.log_metrics(values, step=step)
        shown = "  ".join(f"{name} {value:.4g}" for name, value in values.items())
        logger.info("step %d  epoch %d  %s", step, epoch, shown)


def _lines(path: Path) -> list[str]:
    if not path.exists():
        return []
    # A last line without its end was cut by a killed process.
    return [line for line in path.read_text(encoding="utf-8").split("\n")[:-1] if line]
