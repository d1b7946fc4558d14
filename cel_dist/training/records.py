"""What a run writes down while it trains: lines in the log, points in MLflow, and objects in two files.

metrics.jsonl        one an interval: step, epoch, means of the losses, speed, learning rate, ...
evaluations.jsonl    one an evaluation: step, epoch, eer, min_dcf, eval_alignment, eval_uniformity
skipped.jsonl        one a batch that was skipped: step, epoch, reason, ids of its samples, and `not_finite`, the ids of
                     those whose features are not finite
"""

import json
import logging
import resource
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cel_dist.data.files import atomic_write
from cel_dist.errors import RunError
from cel_dist.losses import LossOutput
from cel_dist.tracking import Tracker
from cel_dist.tracking.recorded import EVALUATIONS, METRICS, as_record, read_records
from cel_dist.training.checkpoint import TrainState
from cel_dist.training.display import Display
from cel_dist.training.line_file import LineFile
from cel_dist.training.pace import Pace, evaluation_line, interval_line

logger = logging.getLogger(__name__)
SKIPPED = "skipped.jsonl"


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
        self._step_seconds: list[float] = []
        self._begin = self._step_begin = time.perf_counter()

    def begin_step(self) -> None:
        """Let the time of a step count from here. Without it the time from step to step counts."""
        self._step_begin = time.perf_counter()

    def add(
        self,
        output: LossOutput,
        gradient_norm: Tensor,
        *,
        utterances: int,
        waited: float,
        ended: float,
        faults: int = 0,
        false_negatives: float | None = None,
    ) -> None:
        """Count a step.

        Args:
            output: the losses of the step.
            gradient_norm: scalar.
            utterances: number of them in the global batch.
            waited: seconds spent waiting for data.
            ended: when the step was over, by `time.perf_counter`.
            faults: utterances of the global batch that could not be read.
            false_negatives: their true rate, if it is known.
        """
        if false_negatives is not None:
            self._false_negatives.append(false_negatives)
        self._values.append(torch.stack([*(value.detach().float() for value in output), gradient_norm.float()]))
        self._utterances += utterances
        self._waited += waited
        self._faults += faults
        self._step_seconds.append(ended - self._step_begin)
        self._step_begin = ended

    def add_skipped(self, *, waited: float, ended: float, faults: int) -> None:
        """Count a step that updated nothing: what it waited for data, in seconds, when it was over, and what could not
        be read. Its time is that of no step."""
        self._step_begin = ended
        self._waited += waited
        self._faults += faults

    @property
    def is_empty(self) -> bool:
        """Whether no step was counted since the last record, by this process or the one before it."""
        return not self._values

    @property
    def training_seconds(self) -> float:
        """Time of the steps of this process, without evaluations and checkpoints between them."""
        return sum(self._step_seconds)

    @property
    def num_timed_steps(self) -> int:
        """Steps that this process took."""
        return len(self._step_seconds)

    def summary(self) -> dict[str, float]:
        """Means of the losses, and the speed of the interval in wall-clock time.

        `step_seconds` is the median step, `data_wait` the share of the interval that was spent waiting for data, and
        `data_wait_seconds` the mean of it a step. `memory_gib` is what this process has needed at most so far: of the
        GPU, or on a CPU of the main memory.
        """
        now = time.perf_counter()
        seconds = now - self._begin
        # What was loaded is on the CPU, what was added is where the loss was computed.
        device = self._values[-1].device
        means = torch.stack([value.to(device) for value in self._values]).mean(dim=0).tolist()
        rates, steps = self._false_negatives, self._step_seconds
        return {
            **dict(zip([*LossOutput._fields, "grad_norm"], means, strict=True)),
            "utterances_per_second": self._utterances / seconds,
            "data_wait": self._waited / seconds,
            "data_wait_seconds": self._waited / max(1, len(steps)),
            "step_seconds": statistics.median(steps) if steps else 0.0,
            "memory_gib": _memory_bytes(device) / 2**30,
            "faults": self._faults,
            **({"false_negatives": sum(rates) / len(rates)} if rates else {}),
        }

    def state_dict(self) -> dict[str, Any]:
        """What the means are made of, in numbers that JSON keeps exactly. Times and speed belong to a process, and are
        left out."""
        return {
            "values": torch.stack(self._values).tolist() if self._values else [],
            "false_negatives": list(self._false_negatives),
            "faults": self._faults,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Let what `state_dict` returned come before the steps that are added from now on."""
        self._values = [torch.tensor(value) for value in state["values"]]
        self._false_negatives = list(state["false_negatives"])
        self._faults = state["faults"]


def _memory_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    largest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return largest if sys.platform == "darwin" else largest * 1024


class Records:
    """Rank 0's records; on other ranks `Records` is not made.

    A disk that is full for a while costs no record: lines wait in memory, in their order, and are written when there is
    room again.

    Args:
        run_dir: folder of the run.
        tracker: where MLflow's part goes.
        state: position that the run continues from; what was recorded behind it is dropped, because it will come again.
        total_steps: steps of the whole run; None if nobody knows.
        display: shows loss and EER on a terminal.

    Raises:
        RunError: the files cannot be written.
    """

    def __init__(
        self,
        run_dir: Path,
        tracker: Tracker,
        state: TrainState,
        total_steps: int | None = None,
        display: Display | None = None,
    ) -> None:
        self._run_dir = run_dir
        self._tracker = tracker
        self._total_steps = total_steps
        self._display = display or Display()
        self._pace = Pace(state.step)
        with writing(run_dir):
            _keep(run_dir / METRICS, lambda step: step <= state.step)
            _keep(run_dir / EVALUATIONS, lambda step: step < state.step or step == state.evaluated_step)
            _keep(run_dir / SKIPPED, lambda step: step <= state.step)
            self._files = {name: LineFile(run_dir / name) for name in (METRICS, EVALUATIONS, SKIPPED)}
        evaluations = list(read_records(run_dir / EVALUATIONS))
        self._eer: float | None = evaluations[-1].get("eer") if evaluations else None

    def write_interval(self, *, step: int, epoch: int, interval: Interval, values: Mapping[str, float]) -> None:
        """Record the steps since the last interval: its means, and further values of its last step."""
        self._pace.add(step, interval.num_timed_steps, interval.training_seconds)
        means = {**interval.summary(), **values}
        eta = self._pace.seconds_left(self._total_steps)
        if eta is not None:
            means["eta_seconds"] = eta
        self._write(METRICS, step, epoch, means)
        self._display.loss(means["loss"])
        logger.info("%s", interval_line(step, self._total_steps, epoch, means, self._eer, datetime.now()))

    def write_evaluation(
        self, *, step: int, epoch: int, eer: float, min_dcf: float, values: Mapping[str, float] | None = None
    ) -> None:
        """Record an evaluation, and further `values` of it."""
        self._eer = eer
        self._display.eer(eer)
        self._write(EVALUATIONS, step, epoch, {"eer": eer, "min_dcf": min_dcf, **(values or {})})
        logger.info("%s", evaluation_line(step, self._total_steps, epoch, eer, min_dcf))

    def write_skipped(self, *, step: int, epoch: int, reason: str, batch: Mapping[str, list[int]]) -> None:
        """Record a batch that was skipped, as `agreement.describe_batch` describes it."""
        self._files[SKIPPED].append(json.dumps({"step": step, "epoch": epoch, "reason": reason, **batch}))
        logger.warning("step %d (epoch %d) is skipped: %s", step, epoch, reason)

    def flush(self) -> None:
        """Write what a full disk has kept from being written.

        Raises:
            RunError: it still cannot be written.
        """
        with writing(self._run_dir):
            for file in self._files.values():
                file.flush()

    def try_to_flush(self) -> None:
        """Have on disk what there is room for: a run that goes on from a checkpoint takes its lines from here."""
        for file in self._files.values():
            with suppress(OSError):
                file.flush()
                file.sync()

    def _write(self, name: str, step: int, epoch: int, values: Mapping[str, float]) -> None:
        seconds = round(time.time(), 3)
        self._files[name].append(json.dumps({"step": step, "epoch": epoch, "time": seconds, **values}))
        self._tracker.log_metrics(values, step=step, seconds=seconds)


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
        record = as_record(line)
        if record is None or "epoch" not in record:
            logger.warning("%s, line %d, is damaged and was dropped: %s", path, number, line[:80])
        elif is_kept(record["step"]):
            kept.append(line + "\n")
    with atomic_write(path) as file:
        file.write("".join(kept).encode())
