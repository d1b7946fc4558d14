"""A profiler trace of a few steps, and names for the parts of a step that one reads in it."""

import logging
import os
import warnings
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function, schedule

from cel_dist.config import Config
from cel_dist.data.files import atomic_write

logger = logging.getLogger(__name__)

FOLDER = "profile"
SUMMARY = "summary.txt"

# The first steps of a process compile, allocate and fill caches, which later ones do not.
_STEPS_BEFORE = 4
_ROWS = 40


def named(part: str) -> AbstractContextManager[Any]:
    """Give the block a name in the trace; costs some microseconds where none is taken."""
    return record_function(f"cel: {part}")


class StepProfile:
    """Takes a trace of some steps of this process. This class takes none; `of` returns one that does.

    Call `start` before the first step, `step` after each, and `close` in the end.
    """

    @staticmethod
    def of(config: Config, steps_left: int, first_step: int, device: torch.device) -> "StepProfile":
        """What `train.profile_steps` asks for.

        Args:
            config: the run.
            steps_left: steps that this process will take at most.
            first_step: steps that were taken before.
            device: where training runs.
        """
        if config.train.profile_steps == 0 or steps_left == 0:
            return StepProfile()
        return _TracedSteps(
            config.run.dir / FOLDER, min(config.train.profile_steps, steps_left), steps_left, first_step, device
        )

    def start(self) -> None:
        """The first step begins."""

    def step(self) -> None:
        """A step is over."""

    def close(self) -> None:
        """Write the trace if the steps came to an end before all that were asked for were taken."""


class _TracedSteps(StepProfile):
    """Writes `steps-FIRST-LAST.trace.json.gz`, a Chrome trace, and `summary.txt`, the operators by their time."""

    def __init__(self, folder: Path, num_steps: int, steps_left: int, first_step: int, device: torch.device) -> None:
        self._folder, self._device, self._num_steps = folder, device, num_steps
        spare = steps_left - num_steps
        # One step in which the profiler itself gets going, if there is one to spare.
        warmup = min(1, spare)
        wait = min(_STEPS_BEFORE - warmup, spare - warmup)
        self._first = first_step + wait + warmup + 1
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
        self._taken = -(wait + warmup)
        with warnings.catch_warnings():
            # That a run is too short for a warm-up, and its trace rough, is not worth three lines.
            warnings.simplefilter("ignore")
            planned = schedule(wait=wait, warmup=warmup, active=num_steps, repeat=1)
        self._profile = profile(activities=activities, schedule=planned, on_trace_ready=self._write)
        self._is_open = False

    def start(self) -> None:
        self._is_open = True
        self._profile.start()

    def step(self) -> None:
        if self._is_open:
            self._taken += 1
            self._profile.step()
            if self._taken >= self._num_steps:
                self.close()

    def close(self) -> None:
        if self._is_open:
            self._is_open = False
            self._profile.stop()

    def _write(self, done: Any) -> None:
        """Write what was profiled. A full disk must not end the training."""
        if self._taken <= 0:
            return
        trace = self._folder / f"steps-{self._first:08d}-{self._first + self._taken - 1:08d}.trace.json.gz"
        # The profiler compresses what has this ending.
        fresh = trace.with_name(f".{os.getpid()}.{trace.name}")
        key = "self_device_time_total" if self._device.type == "cuda" else "self_cpu_time_total"
        try:
            self._folder.mkdir(exist_ok=True)
            done.export_chrome_trace(str(fresh))
            os.replace(fresh, trace)
            with atomic_write(self._folder / SUMMARY) as file:
                file.write(done.key_averages().table(sort_by=key, row_limit=_ROWS).encode())
        except (OSError, RuntimeError) as error:
            fresh.unlink(missing_ok=True)
            logger.warning("the profile cannot be written to %s: %s", self._folder, error)
        else:
            logger.info("profile of %d steps: %s (open it at ui.perfetto.dev), %s", self._taken, trace, SUMMARY)
