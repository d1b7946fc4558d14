"""A trial as Ray Tune sees it: it starts the ranks of a run, reports their evaluations, and takes them away.

A trial is a folder `trials/ID` of the sweep with one or more runs in it, `1`, `2` and so on. It has more than one where
population-based training gave it weights and settings of another trial on the way: each such piece is a run of its own
that goes on from a checkpoint of the other.
"""

import json
import shutil
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray import tune
from ray.tune.result import DONE, RESULT_DUPLICATE

from cel_dist.config_file import dump_config
from cel_dist.data.files import atomic_write
from cel_dist.errors import RunError
from cel_dist.launcher.restarts import wait_until_released
from cel_dist.sweep.ranks import Ranks, bundles
from cel_dist.sweep.settings import RESOLVED, Sweep
from cel_dist.tracking.recorded import EVALUATIONS, read_records
from cel_dist.training.checkpoint import complete_checkpoints

_LOOK_EVERY_SECONDS = 0.25
_CHECKPOINT, _ORIGIN, _ABOUT, _START = "checkpoint", "origin.json", ".json", ".start"


@dataclass(frozen=True)
class Job:
    """What all trials of a sweep have in common.

    Attributes:
        sweep: what is searched, and how.
        parent_run: MLflow run of the sweep.
        working_folder: of the command, to which paths in the configuration are relative.
        environment: variables for all ranks.
        over: trials that are over, which only tell again what they reached if they are asked.
    """

    sweep: Sweep
    parent_run: str | None
    working_folder: str
    environment: Mapping[str, str]
    over: frozenset[str] = frozenset()


def trial_folder(sweep_folder: Path, trial_id: str) -> Path:
    """Where a trial lives."""
    return sweep_folder / "trials" / trial_id


def runs_of(folder: Path) -> list[Path]:
    """The run folders of a trial, in their order. Beside each lie its values and origin (`.json`), configuration
    (`.yaml`), output (`.log`) and the checkpoint that it began from (`.start`)."""
    return [path.with_suffix("") for path in sorted(folder.glob("*.json"), key=lambda path: int(path.stem))]


class Trial(tune.Trainable):  # type: ignore[misc]
    """One set of settings, trained by as many ranks as the sweep gives it."""

    def setup(self, config: dict[str, Any], job: Job) -> None:
        """Look at what is there of the trial; nothing is started yet: Ray may have a checkpoint to begin from."""
        self._job, self._values = job, job.sweep.section.values_of(config)
        self._folder = trial_folder(job.sweep.folder, self.trial_id)
        self._inherited: Path | None = None
        self._origin: dict[str, Any] | None = None
        self._run_dir: Path | None = None
        self._ranks: Ranks | None = None
        self._reported = 0
        self._last: dict[str, Any] | None = None

    def step(self) -> dict[str, Any]:
        """Wait for the next evaluation, or the end of the run."""
        if self.trial_id in self._job.over and self._is_own():
            return self._told_again()
        if self._run_dir is None:
            self._start()
        assert self._ranks is not None
        while True:
            # In this order: what was recorded before the end is seen after it.
            is_over = self._ranks.wait(_LOOK_EVERY_SECONDS)
            record = self._next_record()
            if record is not None:
                return record
            if is_over:
                if self._last is None and self._origin is not None:
                    # It took over what was at its end already; that evaluation is all there is.
                    self._reported, self._origin = self._origin["step"] - 1, None
                    continue
                if self._last is None:
                    raise RunError(f"the run has no evaluation after its first step; see {self._run_dir}")
                return {RESULT_DUPLICATE: True, DONE: True, **self._last}

    def _is_own(self) -> bool:
        """Whether the trial of this name began with these settings."""
        runs = runs_of(self._folder)
        return bool(runs) and json.loads(runs[0].with_suffix(_ABOUT).read_text())["values"] == self._values

    def _told_again(self) -> dict[str, Any]:
        self._run_dir = runs_of(self._folder)[-1]
        record = self._next_record()
        if record is None and self._last is None:
            raise RunError(f"the run has no evaluation after its first step; see {self._run_dir}")
        return record or {RESULT_DUPLICATE: True, DONE: True, **(self._last or {})}

    def _next_record(self) -> dict[str, Any] | None:
        assert self._run_dir is not None
        records = [record for record in read_records(self._run_dir / EVALUATIONS) if record["step"] > self._reported]
        if not records:
            return None
        self._reported = records[0]["step"]
        self._last = {
            **{name: value for name, value in records[0].items() if isinstance(value, (int, float))},
            "run_dir": str(self._run_dir),
        }
        return self._last

    def _start(self) -> None:
        sweep = self._job.sweep
        if not (sweep.folder / RESOLVED).exists():
            raise RunError(
                f"the machine {ray.util.get_node_ip_address()} of the Ray cluster does not see {sweep.folder}; all of "
                "its machines need the folder of the sweep and the data, under the same paths"
            )
        self._folder.mkdir(parents=True, exist_ok=True)
        self._run_dir = run_dir = self._find_run()
        # Of plug-ins that are files beside the configuration; an actor has a working folder of its own.
        if self._job.working_folder not in sys.path:
            sys.path.append(self._job.working_folder)
        config = sweep.of_trial(
            self._values, run_dir, f"{sweep.folder.name}-{self.trial_id}.{run_dir.name}", self._job.parent_run
        )
        file = run_dir.with_suffix(".yaml")
        with atomic_write(file) as stream:
            stream.write(dump_config(config).encode())
        # Ranks that failed, or that this trial had before, may still be about to end.
        wait_until_released(run_dir)
        section = sweep.section
        self._ranks = Ranks(
            ray.util.get_current_placement_group(),
            bundles(section.ranks, section.cpus, section.gpus),
            [str(file), "--resume", str(self._inherited or "auto")],
            self._job.environment,
            self._job.working_folder,
            run_dir.with_suffix(".log"),
        )

    def _find_run(self) -> Path:
        """The run that goes on, or the folder of a new one."""
        runs = runs_of(self._folder)
        told = {"values": self._values, "origin": self._origin}
        for run in reversed(runs):
            known = json.loads(run.with_suffix(_ABOUT).read_text())
            # A trial that begins again may do so from its own checkpoint or from none: its run folder knows better.
            if known["values"] == self._values and self._origin in (None, known["origin"]):
                self._inherited = run.with_suffix(_START) if known["origin"] else None
                # Before the newest all were reported; of that one it is not known.
                steps = [record["step"] for record in read_records(run / EVALUATIONS)]
                self._reported = max([self._reported, *steps[:-1]])
                return run
        run = self._folder / str(len(runs) + 1)
        if self._inherited is not None:
            self._inherited = self._inherited.rename(run.with_suffix(_START))
        with atomic_write(run.with_suffix(_ABOUT)) as stream:
            stream.write(json.dumps(told).encode())
        return run

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        """Copy the newest complete checkpoint, for another trial or this one to begin from."""
        assert self._run_dir is not None
        target = Path(checkpoint_dir, _CHECKPOINT)
        while True:
            complete = complete_checkpoints(self._run_dir / "checkpoints")
            if not complete:
                raise RunError(f"{self._run_dir} has no checkpoint yet")
            try:
                shutil.copytree(complete[-1], target)
                break
            except (FileNotFoundError, shutil.Error):
                # It made room for a newer one meanwhile.
                shutil.rmtree(target, ignore_errors=True)
                if complete_checkpoints(self._run_dir / "checkpoints")[-1:] == complete[-1:]:
                    raise
        origin = {"trial": self.trial_id, "run": self._run_dir.name, "step": int(complete[-1].name.partition("-")[2])}
        Path(checkpoint_dir, _ORIGIN).write_text(json.dumps(origin))

    def load_checkpoint(self, checkpoint_dir: str) -> None:
        """Begin from what another trial saved. What this one saved is not asked for: its run folder has newer ones."""
        origin = json.loads(Path(checkpoint_dir, _ORIGIN).read_text())
        if origin["trial"] == self.trial_id:
            return
        self._origin = origin
        self._inherited = self._folder / ".inherited"
        shutil.rmtree(self._inherited, ignore_errors=True)
        shutil.copytree(Path(checkpoint_dir, _CHECKPOINT), self._inherited)
        self._reported = origin["step"]

    def cleanup(self) -> None:
        """Take the ranks away, at once."""
        if self._ranks is not None:
            self._ranks.end()
