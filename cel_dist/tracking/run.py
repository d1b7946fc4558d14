"""The record of a run in MLflow: parameters, metrics, files, and the model it produced."""

import json
import logging
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from numpy.typing import NDArray

from cel_dist.config import Config
from cel_dist.config_file import flat
from cel_dist.description import DESCRIPTION_FILE, read_description
from cel_dist.errors import CelError, RunError
from cel_dist.tracking.connection import (
    NoAnswerError,
    connect,
    experiment_id,
    first_line,
    mlflow_errors,
    redacted,
    resolve_uri,
)
from cel_dist.tracking.outbox import Outbox, Task
from cel_dist.tracking.recorded import Point, points_of, recorded_points
from cel_dist.tracking.system_metrics import SystemMonitor

logger = logging.getLogger(__name__)

RUN_ID_FILE = "mlflow_run_id.txt"
UNSENT_FILE = "mlflow_unsent.txt"
PARENT_TAG = "mlflow.parentRunId"

_PARAMS_A_CALL = 100  # MLflow's own limit
_OPEN_SECONDS = 10.0
_FLUSH_SECONDS = 30.0
_FLUSH_SECONDS_KILLED = 10.0
_REMEDY = "start the server, set tracking.uri to another one, or set tracking.enabled=false"
_LATER = "The same 'cel train' sends it when the server is back."


class Tracker:
    """Where rank 0 sends the record of a run. This class records nothing; `start` returns one that does.

    Use `start`, then `log_params`, `log_metrics` and the others, then `finish`, whatever happened in between. All but
    `start`, `flush`, `log_model` and `finish` return at once: a thread of its own sends.
    """

    @staticmethod
    def start(config: Config, run_dir: Path, *, run_id: str | None = None) -> "Tracker":
        """Open the record of the run in `run_dir`: a new MLflow run, or the one that the folder already has.

        The run's id is kept in `run_dir/mlflow_run_id.txt`. While MLflow may lack something of the run, the folder
        holds `mlflow_unsent.txt`. With `tracking.enabled=false` nothing is recorded.

        A new run needs a server that answers. One that goes on does not: what its folder has recorded meanwhile is sent
        when the server is back.

        Args:
            config: settings; `tracking` says where to record, `run.name` under which name.
            run_dir: folder of the run; must exist.
            run_id: MLflow run to continue. Default: the one noted in `run_dir`, if the server knows it.

        Raises:
            CelError: the server or database does not answer to a new run, or cannot be used, the experiment was
                deleted, or the server does not know `run_id`.
            RunError: the run folder cannot be written.
        """
        if not config.tracking.enabled:
            return Tracker()
        return MlflowTracker(config, run_dir, run_id)

    def log_params(self, config: Config) -> None:
        """Record the resolved configuration under dotted names such as `train.batch_size`; never ends a training."""

    def log_metrics(self, metrics: Mapping[str, float], step: int, seconds: float | None = None) -> None:
        """Record values of a step, taken so many seconds after 1970 (default: now); never ends a training."""

    def log_artifact(self, path: Path) -> None:
        """Store a file, or a folder under its own name, with the run; never ends a training."""

    def flush(self, seconds: float) -> bool:
        """Try to send what waits, for so many seconds; returns whether nothing is left."""
        return True

    def log_model(self, model_folder: Path, sample: NDArray[Any], register_as: str | None = None) -> str | None:
        """Store a model folder as an MLflow model and return its URI; None where nothing is recorded."""
        return None

    def finish(self, status: Literal["FINISHED", "FAILED", "KILLED"] = "FINISHED") -> None:
        """Close the record, in bounded time."""


class MlflowTracker(Tracker):
    """The record of a run in MLflow.

    Attributes:
        uri: tracking server or database.
        run_id: MLflow's id of the run; empty until a server that was away at the start of a resumed run is back.
    """

    def __init__(self, config: Config, run_dir: Path, run_id: str | None) -> None:
        self.uri = resolve_uri(config.tracking.uri)
        self.run_id = ""
        self._where = redacted(self.uri)
        self._run_dir = run_dir
        self._experiment_name = config.tracking.experiment
        self._parent_run = config.tracking.parent_run
        self._run_name = config.run.name or run_dir.resolve().name
        self._client: Any = None
        self._has_given_up = False
        self._lacks_model = False
        is_new = run_id is None and not (run_dir / RUN_ID_FILE).exists()
        problem = f"cannot record in MLflow at {self._where}"
        with mlflow_errors(CelError, problem, _REMEDY):
            try:
                self._client = connect(self.uri)
            except NoAnswerError:
                if is_new:
                    raise
            last_steps = self._open(run_id) if is_new or run_id else None
        self._outbox = Outbox(
            self._where,
            (lambda: last_steps) if last_steps is not None else self._open,
            self._send,
            lambda: recorded_points(run_dir),
        )
        error = self._outbox.wait_until_open(_OPEN_SECONDS)
        if isinstance(error, CelError) and not isinstance(error, NoAnswerError):
            self._outbox.close()
            raise CelError(f"{problem}: {error}")
        if error is not None:
            logger.warning("%s for now: %s; the run goes on, and what it records is sent later", problem, _line(error))
        _write(run_dir / UNSENT_FILE, f"MLflow at {self._where} may lack a part of this run. {_LATER}\n")
        self._monitor = (
            SystemMonitor(run_dir, config.tracking.system_metrics_seconds, self._outbox.put)
            if config.tracking.system_metrics
            else None
        )

    def log_params(self, config: Config) -> None:
        """Record the configuration; MLflow's parameters are final, so what a resumed run changes becomes a tag."""
        values = {
            path: redacted(value) if isinstance(value, str) else json.dumps(value)
            for path, value in flat(config.model_dump(mode="json"))
        }
        self._outbox.put_task(Task("the configuration", lambda: self._send_params(values)))

    def log_metrics(self, metrics: Mapping[str, float], step: int, seconds: float | None = None) -> None:
        """Record values of a step, taken so many seconds after 1970 (default: now).

        They are sent in the background, as soon as the server takes them. What it has of this metric at this step or a
        later one stays.
        """
        self._outbox.put(points_of(metrics, step=step, seconds=time.time() if seconds is None else seconds))

    def log_artifact(self, path: Path) -> None:
        """Store a file, or a folder under its own name, in the background."""
        self._outbox.put_task(Task(path.name, lambda: self._client.log_artifact(self.run_id, str(path))))

    def flush(self, seconds: float) -> bool:
        """Try to send what waits, for so many seconds; returns whether nothing is left."""
        return self._outbox.flush(seconds)

    def log_model(self, model_folder: Path, sample: NDArray[Any], register_as: str | None = None) -> str:
        """Store a model folder as an MLflow model (pyfunc) of this run, and register it if asked.

        The first version of a registered name gets the alias `champion`; a later one takes it over only by hand.

        Args:
            model_folder: as `SpeakerModel.save` writes it; all of it is kept.
            sample: a waveform [T] with sound, int16 or of full scale 1.0; its beginning becomes the input example.
            register_as: name in the registry.

        Returns:
            `models:/NAME/VERSION` if registered, else `models:/m-...`.

        Raises:
            CelError: the folder holds no usable model, or the model cannot embed `sample`.
            RunError: MLflow refuses the model or does not answer.
        """
        from cel_dist.tracking.registration import add_version, input_example, store_model

        self._lacks_model = True
        example = input_example(model_folder, sample)
        description = read_description(model_folder / DESCRIPTION_FILE)
        remedy = f"the model itself is safe in {model_folder}. {_LATER}"
        problem = f"cannot store the model in MLflow at {self._where}"
        # Metrics come first: they are at the server when somebody sees the model there.
        self._flush(_FLUSH_SECONDS)
        if self._has_given_up:
            raise RunError(f"{problem}: the server does not answer; {remedy}")
        with mlflow_errors(RunError, problem, remedy):
            place = self._client.get_run(self.run_id).info.experiment_id
            stored = store_model(self._client, model_folder, example, experiment_id=place, run_id=self.run_id)
            uri = f"models:/{stored}"
            if register_as:
                uri = add_version(self._client, self.uri, stored, register_as, description)
        self._lacks_model = False
        return uri

    def finish(self, status: Literal["FINISHED", "FAILED", "KILLED"] = "FINISHED") -> None:
        """Send what still waits and close the run, within a bounded time.

        What MLflow does not take stays in the run folder, and is told in one line; that cannot hide the run's own
        failure.
        """
        if self._monitor:
            self._monitor.stop()
        self._outbox.put_task(Task("the end of the run", lambda: self._client.set_terminated(self.run_id, status)))
        # Whoever kills a run may not wait for long.
        is_sent = self._flush(_FLUSH_SECONDS if status == "FINISHED" else _FLUSH_SECONDS_KILLED)
        num_values, tasks = self._outbox.left()
        self._outbox.close()
        if not is_sent:
            left = [f"{num_values} values of metrics"] if num_values else []
            logger.warning(
                "MLflow at %s did not take %s; all of it is in %s. %s",
                self._where,
                ", ".join([*left, *tasks]) or "everything",
                self._run_dir,
                _LATER,
            )
        elif not self._lacks_model:
            (self._run_dir / UNSENT_FILE).unlink(missing_ok=True)

    def _flush(self, seconds: float) -> bool:
        """Wait until everything is sent, unless a former wait was for nothing."""
        if self._has_given_up:
            return False
        is_sent = self._outbox.flush(seconds)
        # What is refused does not keep the rest from being taken, a server that does not answer does.
        self._has_given_up = not is_sent and (not self._outbox.is_open or self._outbox.left()[0] > 0)
        return is_sent

    def _open(self, wanted: str | None = None) -> dict[str, int]:
        """Find the run or make it; returns the last step that MLflow has of each metric."""
        if self._client is None:
            self._client = connect(self.uri)
        noted = self._run_dir / RUN_ID_FILE
        run_id = wanted or self._known(noted)
        if run_id is None:
            from mlflow.tracking.context.registry import resolve_tags

            experiment = experiment_id(self._client, self.uri, self._experiment_name)
            tags = {**resolve_tags(), **({PARENT_TAG: self._parent_run} if self._parent_run else {})}
            run_id = self._client.create_run(experiment, run_name=self._run_name, tags=tags).info.run_id
        else:
            # A killed process leaves its run open, an orderly end closes it; it goes on in either case.
            self._client.update_run(run_id, status="RUNNING")
        _write(noted, run_id + "\n")
        self.run_id = run_id
        # The data of a run hold the last value of each metric; only as a message also the step.
        return {metric.key: metric.step for metric in self._client.get_run(run_id).data.to_proto().metrics}

    def _send(self, points: Sequence[Point]) -> None:
        from mlflow.entities import Metric

        metrics = [Metric(point.name, point.value, point.milliseconds, point.step) for point in points]
        self._client.log_batch(self.run_id, metrics=metrics)

    def _send_params(self, values: Mapping[str, str]) -> None:
        from mlflow.entities import Param, RunTag

        former = self._client.get_run(self.run_id).data.params
        params = [Param(name, value) for name, value in values.items() if name not in former]
        tags = [RunTag(f"resumed.{name}", value) for name, value in values.items() if former.get(name, value) != value]
        for begin in range(0, len(params), _PARAMS_A_CALL):
            self._client.log_batch(self.run_id, params=params[begin : begin + _PARAMS_A_CALL])
        if tags:
            self._client.log_batch(self.run_id, tags=tags)

    def _known(self, noted: Path) -> str | None:
        from mlflow.exceptions import MlflowException

        if not noted.exists():
            return None
        run_id = noted.read_text(encoding="utf-8").strip()
        try:
            stage = self._client.get_run(run_id).info.lifecycle_stage
        except MlflowException as error:
            if error.error_code not in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
                raise
            stage = "unknown"
        if stage == "active":
            return run_id
        logger.warning("MLflow at %s has no run %s (%s); a new one is started", self._where, run_id, noted)
        return None


def _line(error: Exception) -> str:
    return str(error) if isinstance(error, CelError) else first_line(error)


def _write(path: Path, text: str) -> None:
    fresh = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        fresh.write_text(text, encoding="utf-8")
        os.replace(fresh, path)
    except OSError as error:
        fresh.unlink(missing_ok=True)
        raise RunError(f"cannot write {path}: {(error.strerror or str(error)).lower()}; put that right") from None
