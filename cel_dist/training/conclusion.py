"""What a run leaves when it has reached its end: summary, report, and the model in MLflow."""

import logging
from pathlib import Path

import numpy as np

from cel_dist.config import Config
from cel_dist.config_file import load_config
from cel_dist.data.files import sole_writer
from cel_dist.errors import CelError, RunError
from cel_dist.tracking import UNSENT_FILE, Tracker
from cel_dist.training.records import writing
from cel_dist.training.result import TrainResult

logger = logging.getLogger(__name__)


def conclude(config: Config, result: TrainResult, tracker: Tracker) -> None:
    """Write summary and report, and let MLflow take the model, unless it has it, and the files.

    Summary and report come before MLflow is asked: a failure there leaves the run whole.

    Raises:
        RunError: the run folder cannot be written.
    """
    # Plots and templates take a second to import, which the start of a run need not wait for.
    from cel_dist.report import PLOTS

    run_dir = config.run.dir
    report = _write_outcome(result, run_dir)
    if result.model_uri is None:
        sample = 0.1 * np.random.default_rng(0).standard_normal(config.segment_samples)
        try:
            result.model_uri = tracker.log_model(
                run_dir / "model", sample.astype(np.float32), config.tracking.register_as
            )
        except (CelError, RunError) as error:
            logger.warning("%s", error)
        if result.model_uri:
            report = _write_outcome(result, run_dir)
    tracker.log_artifact(report)
    tracker.log_artifact(run_dir / PLOTS)


def catch_up(config: Config, result: TrainResult) -> TrainResult:
    """Send to MLflow what it did not take of a run that is at its end; does nothing where it has everything.

    Args:
        config: the run.
        result: its stored outcome.

    Returns:
        The outcome, with the model's URI if it was sent now.

    Raises:
        CelError: the server or database cannot be used. That it does not answer is only a warning.
        RunError: the run folder cannot be written, or another process writes it.
    """
    run_dir = config.run.dir
    logger.info("%s", result.nothing_to_do())
    if not config.tracking.enabled or not (run_dir / UNSENT_FILE).exists():
        return result
    with sole_writer(run_dir, "cel train"):
        logger.info("sending to MLflow what it did not take of this run")
        tracker = Tracker.start(config, run_dir)
        try:
            # Settings that a finished run is started with are not those that it was trained with.
            tracker.log_params(load_config(run_dir / "config.yaml"))
            tracker.log_artifact(run_dir / "config.yaml")
            conclude(config, result, tracker)
        finally:
            tracker.finish("FINISHED")
    return result


def _write_outcome(result: TrainResult, run_dir: Path) -> Path:
    from cel_dist.report import write_report

    with writing(run_dir):
        result.write(run_dir)
    # Without voices: it goes to MLflow, to whoever may look there.
    return write_report(run_dir, audio=False)
