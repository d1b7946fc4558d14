"""The record of a run in MLflow: parameters, metrics, files, and the model it produced."""

import json
import logging
import os
import tempfile
import time
from collections.abc import Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from cel_dist.config import Config
from cel_dist.errors import CelError, RunError
from cel_dist.tracking.connection import (
    connect,
    default_uri,
    first_line,
    mlflow_errors,
    redacted,
    resolve_uri,
    sqlite_file,
)

logger = logging.getLogger(__name__)

RUN_ID_FILE = "mlflow_run_id.txt"
MODEL_NAME = "model"
CHAMPION = "champion"

_METRICS_A_CALL = 1000  # MLflow's own limits
_PARAMS_A_CALL = 100
_RETRY_SECONDS = 60.0
_EXAMPLE_SAMPLES = 16_000
_REQUIREMENTS = ("cel_dist", "torch", "torchaudio", "numpy", "safetensors", "soundfile", "soxr", "mlflow")
_REMEDY = "start the server, set tracking.uri to another one, or set tracking.enabled=false"


class Tracker:
    """Where rank 0 sends the record of a run. This class records nothing; `start` returns one that does.

    Use `start`, then `log_params`, `log_metrics` and the others, then `finish`, whatever happened in between.
    """

    @staticmethod
    def start(config: Config, run_dir: Path, *, run_id: str | None = None) -> "Tracker":
        """Open the record of the run in `run_dir`: a new MLflow run, or the one that the folder already has.

        The run's id is kept in `run_dir/mlflow_run_id.txt`. With `tracking.enabled=false` nothing is recorded.

        Args:
            config: settings; `tracking` says where to record, `run.name` under which name.
            run_dir: folder of the run; must exist.
            run_id: MLflow run to continue. Default: the one noted in `run_dir`, if the server knows it.

        Raises:
            CelError: the server or database does not answer or cannot be used, the experiment was deleted, or the
                server does not know `run_id`.
        """
        if not config.tracking.enabled:
            return Tracker()
        return MlflowTracker(config, run_dir, run_id)

    def log_params(self, config: Config) -> None:
        """Record the resolved configuration under dotted names such as `train.batch_size`."""

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """Record values of a step in one call; never ends a training."""

    def log_artifact(self, path: Path) -> None:
        """Store a file, or a folder under its own name, with the run; never ends a training."""

    def log_model(self, model_folder: Path, sample: NDArray[Any], register_as: str | None = None) -> str | None:
        """Store a model folder as an MLflow model and return its URI; None where nothing is recorded."""
        return None

    def finish(self, status: Literal["FINISHED", "FAILED", "KILLED"] = "FINISHED") -> None:
        """Close the record."""


class MlflowTracker(Tracker):
    """The record of a run in MLflow.

    Attributes:
        uri: tracking server or database.
        run_id: MLflow's id of the run.
    """

    def __init__(self, config: Config, run_dir: Path, run_id: str | None) -> None:
        self.uri = resolve_uri(config.tracking.uri)
        self._where = redacted(self.uri)
        self._pending: list[Any] = []
        self._retry_at = 0.0
        noted = run_dir / RUN_ID_FILE
        with mlflow_errors(CelError, f"cannot record in MLflow at {self._where}", _REMEDY):
            self._client = connect(self.uri)
            experiment = self._experiment(config.tracking.experiment)
            resumed = run_id or self._known(noted)
            if resumed is None:
                from mlflow.tracking.context.registry import resolve_tags

                name = config.run.name or run_dir.resolve().name
                resumed = self._client.create_run(experiment, run_name=name, tags=resolve_tags()).info.run_id
            else:
                # A killed process leaves its run open, an orderly end closes it; it goes on in either case.
                self._client.update_run(resumed, status="RUNNING")
        self.run_id: str = resumed
        _write(noted, self.run_id + "\n")

    def log_params(self, config: Config) -> None:
        """Record the configuration; MLflow's parameters are final, so what a resumed run changes becomes a tag.

        Raises:
            RunError: the server refuses or does not answer.
        """
        from mlflow.entities import Param, RunTag

        with mlflow_errors(RunError, f"cannot record the configuration in MLflow at {self._where}", "try again"):
            former = self._client.get_run(self.run_id).data.params
            values = dict(_flatten(config.model_dump(mode="json")))
            params = [Param(name, value) for name, value in values.items() if name not in former]
            tags = [
                RunTag(f"resumed.{name}", value) for name, value in values.items() if former.get(name, value) != value
            ]
            for begin in range(0, len(params), _PARAMS_A_CALL):
                self._client.log_batch(self.run_id, params=params[begin : begin + _PARAMS_A_CALL])
            if tags:
                self._client.log_batch(self.run_id, tags=tags)

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """Record values of a step in one call.

        A server that goes away does not end a training: values wait, and are sent with a later step or by `finish`.
        """
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        self._pending += [Metric(name, float(value), now, step) for name, value in metrics.items()]
        if time.monotonic() >= self._retry_at:
            self._send()

    def log_artifact(self, path: Path) -> None:
        """Store a file, or a folder under its own name. A failure is a warning: the original stays where it is."""
        from mlflow.exceptions import MlflowException

        try:
            self._client.log_artifact(self.run_id, str(path))
        except (MlflowException, OSError) as error:
            logger.warning("MLflow at %s did not take %s: %s", self._where, path, first_line(error))

    def log_model(self, model_folder: Path, sample: NDArray[Any], register_as: str | None = None) -> str:
        """Store a model folder as an MLflow model (pyfunc) of this run, and register it if asked.

        The model takes float32 waveforms [N, T] of full scale 1.0 at 16 kHz and returns unit embeddings [N, D]. The
        first version of a registered name gets the alias `champion`; a later one takes it over only by hand.

        Args:
            model_folder: `encoder.safetensors` and `model.json`.
            sample: a waveform [T] with sound, int16 or of full scale 1.0; its first second becomes the input example.
            register_as: name in the registry.

        Returns:
            `models:/NAME/VERSION` if registered, else `models:/m-...`.

        Raises:
            CelError: the folder holds no usable model, or the model cannot embed `sample`.
            RunError: MLflow refuses the model or does not answer.
        """
        import mlflow
        from mlflow.entities import LoggedModelOutput

        from cel_dist.model import SpeakerModel

        model = SpeakerModel.load_folder(model_folder, device="cpu")
        example = _full_scale(sample)[None, :_EXAMPLE_SAMPLES]
        embedding = model.embed(list(example))
        remedy = f"the model itself is safe in {model_folder}"
        with (
            mlflow_errors(RunError, f"cannot store the model in MLflow at {self._where}", remedy),
            tempfile.TemporaryDirectory(prefix="cel-mlflow-") as scratch,
        ):
            experiment = self._client.get_run(self.run_id).info.experiment_id
            logged = self._client.create_logged_model(
                experiment, name=MODEL_NAME, source_run_id=self.run_id, model_type="speaker embedding"
            )
            packed = Path(scratch, MODEL_NAME)
            mlflow.pyfunc.save_model(
                packed,
                mlflow_model=mlflow.models.Model(run_id=self.run_id, model_id=logged.model_id),
                python_model=str(Path(__file__).with_name("pyfunc_model.py")),
                artifacts={MODEL_NAME: str(model_folder)},
                signature=_signature(embedding.shape[1]),
                input_example=example,
                pip_requirements=[f"{name}=={version(name).partition('+')[0]}" for name in _REQUIREMENTS],
            )
            self._client.log_model_artifacts(logged.model_id, str(packed))
            self._client.finalize_logged_model(logged.model_id, "READY")
            self._client.log_outputs(self.run_id, [LoggedModelOutput(logged.model_id, step=0)])
            return self._register(logged.model_id, register_as) if register_as else f"models:/{logged.model_id}"

    def finish(self, status: Literal["FINISHED", "FAILED", "KILLED"] = "FINISHED") -> None:
        """Send what still waits and close the run. A failure is a warning, so that it cannot hide the run's own."""
        from mlflow.exceptions import MlflowException

        self._send()
        try:
            self._client.set_terminated(self.run_id, status)
        except MlflowException as error:
            logger.warning("MLflow at %s still shows run %s as open: %s", self._where, self.run_id, first_line(error))

    def _send(self) -> None:
        from mlflow.exceptions import MlflowException

        try:
            while self._pending:
                self._client.log_batch(self.run_id, metrics=self._pending[:_METRICS_A_CALL])
                del self._pending[:_METRICS_A_CALL]
        except MlflowException as error:
            self._retry_at = time.monotonic() + _RETRY_SECONDS
            logger.warning(
                "MLflow at %s takes no metrics, %d wait: %s", self._where, len(self._pending), first_line(error)
            )

    def _experiment(self, name: str) -> str:
        from mlflow.exceptions import MlflowException

        experiment = self._client.get_experiment_by_name(name)
        if experiment is None:
            # MLflow would put the artifacts of a database into the working folder of whoever comes first.
            database = sqlite_file(self.uri)
            location = (database.parent / "mlartifacts").as_uri() if database else None
            try:
                return str(self._client.create_experiment(name, artifact_location=location))
            except MlflowException:
                # Another process may have made it in between.
                experiment = self._client.get_experiment_by_name(name)
                if experiment is None:
                    raise
        if experiment.lifecycle_stage != "active":
            raise CelError(
                f"experiment '{name}' was deleted; restore it with 'mlflow experiments restore "
                f"--experiment-id {experiment.experiment_id}' or set another tracking.experiment"
            )
        return str(experiment.experiment_id)

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

    def _register(self, model_id: str, name: str) -> str:
        from mlflow.exceptions import MlflowException

        try:
            self._client.create_registered_model(name)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
        with default_uri(self.uri):
            registered = self._client.create_model_version(
                name, source=f"models:/{model_id}", run_id=self.run_id, model_id=model_id
            )
        if int(registered.version) == 1:
            self._client.set_registered_model_alias(name, CHAMPION, registered.version)
        return f"models:/{name}/{registered.version}"


def _flatten(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for name, value in tree.items():
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{prefix}{name}.")
        else:
            yield prefix + name, redacted(value) if isinstance(value, str) else json.dumps(value)


def _full_scale(sample: NDArray[Any]) -> NDArray[np.float32]:
    scale = 1.0 / 32768.0 if sample.dtype == np.int16 else 1.0
    wave: NDArray[np.float32] = np.multiply(sample, scale).astype(np.float32)
    return wave


def _signature(dimension: int) -> Any:
    from mlflow.models import ModelSignature
    from mlflow.types import Schema, TensorSpec

    single = np.dtype(np.float32)
    return ModelSignature(
        inputs=Schema([TensorSpec(single, (-1, -1))]), outputs=Schema([TensorSpec(single, (-1, dimension))])
    )


def _write(path: Path, text: str) -> None:
    fresh = path.with_name(f".{path.name}.{os.getpid()}")
    fresh.write_text(text, encoding="utf-8")
    os.replace(fresh, path)
