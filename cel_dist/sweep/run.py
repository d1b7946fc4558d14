"""A sweep from its start, or from where it was left, to its summary."""

import logging
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import yaml

from cel_dist.data.files import atomic_write, sole_writer
from cel_dist.errors import CelError, PreemptedError, RunError
from cel_dist.launcher.nodes import FORWARDED
from cel_dist.ray_cluster import connected
from cel_dist.sweep.outcomes import ENDED, read_outcomes
from cel_dist.sweep.settings import RESOLVED, Sweep

logger = logging.getLogger(__name__)


def run_sweep(
    sweep: Sweep, *, address: str = "local", resume: bool = False, register_as: str | None = None
) -> dict[str, Any]:
    """Run the trials of a sweep and summarise them.

    Its folder gets `trials/ID/` with the runs of each trial, `trials.json`, `best.yaml` and `sweep.html`.

    Args:
        sweep: what is searched, and how.
        address: of a Ray cluster as `ray.init` takes it; `local` starts one on this machine and ends it afterwards. All
            its machines see the folder of the sweep and the data.
        resume: go on with what the folder has: trials that are over stay as they are, others go on from their newest
            checkpoints.
        register_as: name in the registry of MLflow for the model of the best trial. `tracking.register_as` is for
            runs by themselves.

    Returns:
        Best trial, importances, all trials, the files by kind, and `model_uri`: of the registered model, or None.

    Raises:
        CelError: the folder has a sweep already, or none to go on with, or another one; data and settings do not fit.
        RunError: the cluster or a disk failed, or all trials.
        PreemptedError: it was asked to end (SIGINT, SIGTERM).
    """
    from cel_dist.tracking.registration import check_name
    from cel_dist.training.preflight import preflight

    if address.startswith("ray://"):
        raise CelError(f"--address {address}: a sweep does not go through Ray's client; give HOST:PORT, or auto")
    try:
        with _interruptible():
            # What would fail in every trial fails here, in seconds.
            first = sweep.of_trial({}, sweep.folder / "trials" / "first", "check")
            if register_as is not None:
                check_name(register_as)
            preflight(first, sweep.section.ranks, "auto")
            sweep.folder.mkdir(parents=True, exist_ok=True)
            with sole_writer(sweep.folder, "cel sweep"):
                text = _checked(sweep, resume)
                # Ray takes SIGTERM for itself when it starts.
                with connected(address, extra="sweep"), _interruptible():
                    # Only now, so that a cluster out of reach leaves nothing that the same command would refuse.
                    with atomic_write(sweep.folder / RESOLVED) as file:
                        file.write(text.encode())
                    return _run(sweep, register_as)
    except (KeyboardInterrupt, SystemExit):
        raise PreemptedError(_asked_to_end(sweep)) from None


def _asked_to_end(sweep: Sweep) -> str:
    if not (sweep.folder / RESOLVED).exists():
        return "the sweep was asked to end before it began"
    return f"the sweep was asked to end and did; go on with --resume, its folder is {sweep.folder}"


def _checked(sweep: Sweep, resume: bool) -> str:
    """Check that the folder is what `resume` says; returns the search as the folder is to note it."""
    from cel_dist.config_file import dump_config, flat
    from cel_dist.sweep.section import SweepConfig

    noted = sweep.folder / RESOLVED
    text = dump_config(SweepConfig(**dict(sweep.base), sweep=sweep.section))
    if noted.exists():
        if not resume:
            raise CelError(
                f"{sweep.folder} already has a sweep; go on with --resume, or choose another run.dir for a new one"
            )
        if noted.read_text() != text:
            former, now = (dict(flat(yaml.safe_load(text))) for text in (noted.read_text(), text))
            changed = [path for path in {**former, **now} if former.get(path) != now.get(path)]
            told = ", ".join(f"{path}={former.get(path)}" for path in changed)
            raise CelError(
                f"{noted} has other settings than this sweep: {told}; go on with those, or choose another run.dir"
            )
    elif resume:
        raise CelError(f"{sweep.folder} has no sweep to go on with; leave out --resume, or name its run.dir")
    return text


def _run(sweep: Sweep, register_as: str | None) -> dict[str, Any]:
    from cel_dist.sweep.record import SweepRecord
    from cel_dist.sweep.summary import summarise
    from cel_dist.sweep.table import live_table
    from cel_dist.sweep.trial import Job, runs_of, trial_folder
    from cel_dist.sweep.tuner import search
    from cel_dist.sweep.watcher import Watcher
    from cel_dist.tracking.registration import register_model

    def runs(outcome: Any) -> list[Path]:
        return runs_of(trial_folder(sweep.folder, outcome.id))

    record = SweepRecord(sweep, runs)
    status: Literal["FINISHED", "FAILED", "KILLED"] = "FAILED"
    files: list[Path] = []
    try:
        watcher = Watcher(sweep.folder, sweep.section, [record])
        former = list(watcher.outcomes.values())
        over = frozenset(outcome.id for outcome in former if outcome.is_over)
        job = Job(sweep, record.run_id, os.getcwd(), _forwarded(), over)
        known = None
        with live_table(watcher.outcomes, sweep.section.num_trials, sweep.section.metric) as draw:
            watcher.listen(draw)
            try:
                known = search(job, [watcher], former)
            finally:
                watcher.leave(known)
        outcomes = list(watcher.outcomes.values())
        summary = summarise(sweep, outcomes, {outcome.id: runs(outcome) for outcome in outcomes})
        files = list(summary.files.values())
        if len(outcomes) < sweep.section.num_trials or any(outcome.status not in ENDED for outcome in outcomes):
            raise PreemptedError(_asked_to_end(sweep))
        if summary.best is None:
            raise RunError(
                f"all {len(outcomes)} trials failed, the last one of: {outcomes[-1].error}; put that right and go on "
                f"with --resume, their logs are in {sweep.folder / 'trials'}"
            )
        status = "FINISHED"
    except (KeyboardInterrupt, PreemptedError):
        status = "KILLED"
        raise
    except OSError as error:
        raise RunError(
            f"cannot write {sweep.folder}: {(error.strerror or str(error)).lower()}; put that right and go on with "
            "--resume"
        ) from None
    finally:
        record.finish(status, files)
    result: dict[str, Any] = {
        "sweep_dir": str(sweep.folder),
        "metric": sweep.section.metric,
        "best": asdict(summary.best),
        "importances": summary.importances,
        "trials": [asdict(outcome) for outcome in read_outcomes(sweep.folder)],
        "files": {kind: str(path) for kind, path in summary.files.items()},
        "model_uri": None,
    }
    if register_as is not None and summary.best.run_dir is not None:
        result["model_uri"] = register_model(
            summary.best.run_dir, register_as, sweep.tracking_uri, experiment=sweep.base.tracking.experiment
        )
    return result


def _forwarded() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name.startswith(FORWARDED)}


@contextmanager
def _interruptible() -> Iterator[None]:
    """Make of SIGTERM what Ctrl-C is to Ray Tune: an orderly end."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    former = signal.signal(signal.SIGTERM, lambda number, frame: signal.raise_signal(signal.SIGINT))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, former)
