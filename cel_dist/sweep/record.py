"""The record of a sweep in MLflow: a run of its own, with the runs of the trials as its children.

Rank 0 of a trial records its run as any other training does. What a scheduler ends has no time to close its record;
that is done here, and what was not sent is sent.
"""

import logging
import subprocess
import sys
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

from cel_dist.config_file import load_config
from cel_dist.errors import CelError, RunError
from cel_dist.sweep.guard import DONE
from cel_dist.sweep.outcomes import ENDED, Outcome, best_of, read_outcomes
from cel_dist.sweep.settings import Sweep
from cel_dist.tracking import RUN_ID_FILE, UNSENT_FILE, Tracker
from cel_dist.tracking.connection import connect, mlflow_errors, redacted

logger = logging.getLogger(__name__)

_REMEDY = "start the server, set tracking.uri to another one, or set tracking.enabled=false"


class SweepRecord:
    """Where a sweep is recorded; with `tracking.enabled=false` nowhere.

    Args:
        sweep: the search.
        runs_of_trial: the run folders of a trial, in their order.

    Raises:
        CelError: the server does not answer.
    """

    def __init__(self, sweep: Sweep, runs_of_trial: Callable[[Outcome], list[Path]]) -> None:
        self._sweep, self._runs_of_trial = sweep, runs_of_trial
        self._told: set[Path] = set()
        self._guard: subprocess.Popen[bytes] | None = None
        # MLflow may be slow, and the search does not wait for it.
        self._sender = ThreadPoolExecutor(1, "mlflow")
        self._tracker = Tracker.start(sweep.base, sweep.folder)
        self.run_id: str | None = getattr(self._tracker, "run_id", None)
        if self.run_id is None:
            return
        with mlflow_errors(CelError, f"cannot record in MLflow at {redacted(sweep.tracking_uri)}", _REMEDY):
            self._client = connect(sweep.tracking_uri)
        self._tracker.log_params(sweep.base)
        for name, value in sweep.section.model_dump(mode="json", exclude_none=True).items():
            self._sender.submit(self._safely, partial(self._client.set_tag, self.run_id, f"sweep.{name}", str(value)))
        # Where this process is killed, somebody has to say so.
        self._guard = subprocess.Popen(
            [sys.executable, "-m", "cel_dist.sweep.guard", str(sweep.folder)],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            start_new_session=True,
        )
        assert self._guard.stdin is not None
        self._guard.stdin.write(f"{sweep.tracking_uri}\n".encode())
        self._guard.stdin.flush()

    def __call__(self, outcome: Outcome, event: str) -> None:
        """Take in what has happened to a trial."""
        if self.run_id is not None:
            runs = self._runs_of_trial(outcome)
            self._sender.submit(self._safely, partial(self._take, replace(outcome), event, runs))

    def finish(self, status: Literal["FINISHED", "FAILED", "KILLED"], files: Iterable[Path]) -> None:
        """Close the runs of all trials and that of the sweep, with these files."""
        if self.run_id is not None:
            for about in sorted(self._sweep.folder.glob("trials/*/*.json")):
                self._sender.submit(self._safely, partial(self._close, about.with_suffix(""), status))
        self._sender.shutdown()
        for path in files:
            self._tracker.log_artifact(path)
        self._tracker.finish(status)
        if self._guard is not None:
            self._guard.communicate(DONE.encode())

    def _take(self, outcome: Outcome, event: str, runs: list[Path]) -> None:
        if event == "reported":
            for number, run in enumerate(runs):
                self._mark(outcome, run, number, runs)
        if event in ENDED:
            for run in runs:
                self._close(run, "FAILED" if event == "failed" and run == runs[-1] else "FINISHED", event)
            ended = [other for other in read_outcomes(self._sweep.folder) if other.status in ENDED]
            best = best_of(ended)
            if best is not None and best.best is not None:
                self._tracker.log_metrics({f"best_{self._sweep.section.metric}": best.best}, step=len(ended))

    def _mark(self, outcome: Outcome, run: Path, number: int, runs: list[Path]) -> None:
        """Say in MLflow which trial a run belongs to, and which run it came from."""
        noted = run / RUN_ID_FILE
        if run in self._told or not noted.exists():
            return
        tags = {"sweep.trial": outcome.id, "sweep.run": run.name}
        origin = outcome.origins[number - 1] if 0 < number <= len(outcome.origins) else None
        if origin:
            donor = self._sweep.folder / "trials" / origin["trial"] / origin["run"] / RUN_ID_FILE
            tags |= {"sweep.begun_from_trial": origin["trial"], "sweep.begun_from_step": str(origin["step"])}
            tags["sweep.begun_from_run"] = donor.read_text().strip() if donor.exists() else ""
        for name, value in tags.items():
            self._client.set_tag(noted.read_text().strip(), name, value)
        self._told.add(run)

    def _close(self, run: Path, status: Literal["FINISHED", "FAILED", "KILLED"], event: str | None = None) -> None:
        """Close the record of a run that could not do so itself; one that did stays as it is."""
        noted = run / RUN_ID_FILE
        if not noted.exists():
            return
        run_id = noted.read_text().strip()
        if event is not None:
            self._client.set_tag(run_id, "sweep.outcome", event)
        known = self._client.get_run(run_id).info.status
        if known != "RUNNING" and not (run / UNSENT_FILE).exists():
            if known == "KILLED" and event is not None:
                # It had come to its end when the sweep was killed, or was seen to only now.
                self._client.set_terminated(run_id, status)
            return
        if event is None and known in ("FAILED", "KILLED"):
            # What only lacks a part does not become what it is not.
            status = known
        Tracker.start(load_config(run.with_suffix(".yaml")), run).finish(status)

    def _safely(self, send: Callable[[], Any]) -> None:
        problem = f"MLflow at {redacted(self._sweep.tracking_uri)} did not take a part of the sweep"
        try:
            with mlflow_errors(RunError, problem, "all of it is in the folder of the sweep"):
                send()
        except (CelError, RunError) as error:
            logger.warning("%s", error)
