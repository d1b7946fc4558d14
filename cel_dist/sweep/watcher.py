"""What happens in a search, told to whoever wants to know: the table, the record in MLflow, the file of outcomes."""

import json
import pickle
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ray.tune import Callback

from cel_dist.sweep.outcomes import ENDED, Outcome, read_outcomes, write_outcomes
from cel_dist.sweep.section import SweepSection
from cel_dist.sweep.trial import runs_of, trial_folder
from cel_dist.tracking.recorded import EVALUATIONS, read_records
from cel_dist.training.result import SUMMARY

Listener = Callable[[Outcome, str], None]
"""Told a trial and what has happened to it: `started`, `reported`, `recovering`, or its new status."""


class Watcher(Callback):  # type: ignore[misc]
    """Follows all trials.

    Args:
        folder: of the sweep.
        section: what is searched.
        listeners: told of each event, in turn.

    Attributes:
        outcomes: the trials by id, in the order in which they came.
    """

    def __init__(self, folder: Path, section: SweepSection, listeners: Sequence[Listener]) -> None:
        self._folder, self._section, self._listeners = folder, section, list(listeners)
        self.outcomes: dict[str, Outcome] = {outcome.id: outcome for outcome in read_outcomes(folder)}
        self._pause()

    def listen(self, listener: Listener) -> None:
        """Tell one more of what happens."""
        self._listeners.append(listener)

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """It begins, or goes on."""
        outcome = self._of(trial)
        outcome.values, outcome.status = self._section.values_of(trial.config), "running"
        self._tell(outcome, "started")

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        """It was evaluated."""
        outcome = self._of(trial)
        outcome.values = self._section.values_of(trial.config)
        outcome.add(result, self._section.metric)
        outcome.origins = [
            about["origin"]
            for about in (json.loads(run.with_suffix(".json").read_text()) for run in self.runs(outcome))
            if about["origin"]
        ]
        self._tell(outcome, "reported")

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """It is over, by itself or because the scheduler ended it."""
        outcome = self._of(trial)
        # A run that has reached its end says so.
        run_dir = Path(trial.last_result.get("run_dir", outcome.run_dir or ""))
        outcome.status = "finished" if (run_dir / SUMMARY).exists() else "stopped"
        self._tell(outcome, outcome.status)

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """It has failed for good."""
        outcome = self._of(trial)
        outcome.status, outcome.error = "failed", _reason(trial)
        self._tell(outcome, "failed")

    def on_trial_recover(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """It has failed and is started again."""
        outcome = self._of(trial)
        outcome.failures += 1
        outcome.error = _reason(trial)
        self._tell(outcome, "recovering")

    def leave(self, trials: Sequence[Any] | None) -> None:
        """Note that what is still under way goes on another time.

        Args:
            trials: all that Ray knows; None if it did not come to tell. Ray may not know one that began just before a
                sweep was killed: its settings are drawn again, for another trial.
        """
        self._pause()
        if trials is not None:
            known = {trial.trial_id for trial in trials}
            for name in [outcome.id for outcome in self.outcomes.values() if outcome.status not in ENDED]:
                if name not in known:
                    del self.outcomes[name]
            for trial in trials:
                if trial.trial_id not in self.outcomes:
                    self._recover(trial)
        write_outcomes(self._folder, self.outcomes.values())

    def _pause(self) -> None:
        for outcome in self.outcomes.values():
            if outcome.status == "running":
                outcome.status = "paused"

    def _recover(self, trial: Any) -> None:
        """An outcome that nothing was noted of, from the runs of the trial."""
        outcome = self._of(trial)
        for run in self.runs(outcome):
            for evaluation in read_records(run / EVALUATIONS):
                if evaluation["step"] > 0 and self._section.metric in evaluation:
                    outcome.add({**evaluation, "run_dir": str(run)}, self._section.metric)
            is_finished = (run / SUMMARY).exists()
            outcome.status = "finished" if is_finished else "stopped"
        if trial.status != trial.TERMINATED:
            outcome.status = "failed" if trial.status == trial.ERROR else "paused"

    def runs(self, outcome: Outcome) -> list[Path]:
        """The run folders of a trial."""
        return runs_of(trial_folder(self._folder, outcome.id))

    def _of(self, trial: Any) -> Outcome:
        return self.outcomes.setdefault(trial.trial_id, Outcome(trial.trial_id, self._section.values_of(trial.config)))

    def _tell(self, outcome: Outcome, event: str) -> None:
        write_outcomes(self._folder, self.outcomes.values())
        for listener in self._listeners:
            listener(outcome, event)


def _reason(trial: Any) -> str:
    """What a trial failed of, in a line."""
    # `Trial.get_pickled_error` looks where Ray will have copied the file to some seconds later.
    noted = trial.pickled_error_file
    error: Any = pickle.loads(Path(noted).read_bytes()) if noted and Path(noted).exists() else None
    while getattr(error, "cause", None) is not None:
        error = error.cause
    text = str(error).strip() if error is not None else "no reason given"
    return " ".join(text.splitlines()[-1].split())
