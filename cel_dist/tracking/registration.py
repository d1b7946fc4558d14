"""From a model folder to MLflow: stored as a model that anybody can load, and as a version of a registered name.

What is stored is complete: weights without pickles, `model.json`, its card, the code that loads it (`code/cel_dist`,
because cel_dist is on no package index) and the packages that this code needs, in the versions at hand.
"""

import tempfile
import warnings
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import cel_dist
from cel_dist.config_sections import is_registrable
from cel_dist.data.audio import SAMPLE_RATE
from cel_dist.description import DESCRIPTION_FILE, ModelDescription, read_description
from cel_dist.errors import CelError, RunError
from cel_dist.model import SpeakerModel, load_published
from cel_dist.model_card import facts_as_tags, model_card, shortened
from cel_dist.model_folder import CARD_FILE, is_mlflow_uri, model_folder_of
from cel_dist.tracking.connection import connect, default_uri, experiment_id, mlflow_errors, redacted, resolve_uri
from cel_dist.tracking.registry import MODEL_NAME, find_model_id, model_folder_in
from cel_dist.tracking.run import RUN_ID_FILE

CHAMPION = "champion"
EXPERIMENT = "cel"
REQUIREMENTS = (
    "torch",
    "torchaudio",
    "numpy",
    "pydantic",
    "safetensors",
    "soundfile",
    "soxr",
    "typing_extensions",
    "mlflow",
)
"""What `code/cel_dist` imports to load a model and to embed."""

_EXAMPLE_SECONDS = (0.5, 0.3)
_MAX_DESCRIPTION = 4900  # The column of MLflow's databases has 5000 characters.


def register_model(
    source: str | Path, name: str, tracking_uri: str | None = None, *, experiment: str = EXPERIMENT
) -> str:
    """Store any MODEL in MLflow and make it a new version of a registered name.

    The first version of a name gets the alias `champion`; a later one takes it over only by `promote`. A model of a run
    that this MLflow knows belongs to that run. One that is stored there already is not stored again.

    Args:
        source: run, checkpoint or model folder, published `.model` file, or URI of a model in this MLflow.
        name: in the registry; made if there is none.
        tracking_uri: server or database. Default: as `resolve_uri`.
        experiment: for a model that belongs to no run.

    Returns:
        `models:/NAME/VERSION`.

    Raises:
        CelError: the source is no usable model, the name is not allowed, or the server does not answer.
        RunError: MLflow refuses the model. Nothing is registered then.
    """
    check_name(name)
    where = resolve_uri(tracking_uri)
    # Before MLflow is asked: it makes a database where there is none.
    folder = model_folder_of(source, tracking_uri)
    with tempfile.TemporaryDirectory(prefix="cel-model-") as scratch:
        if folder is None:
            folder = Path(scratch, "model")
            load_published(source, "cpu").save(folder)
        description = read_description(folder / DESCRIPTION_FILE)
        example = input_example(folder)
        remedy = "start the server, or give another address"
        with mlflow_errors(CelError, f"cannot use MLflow at {redacted(where)}", remedy):
            client = connect(where)
            model_id: str | None = None
            run_id: str | None = None
            place = ""
            if is_mlflow_uri(source):
                model_id = find_model_id(client, str(source))
            else:
                run_id = _run_of(client, Path(source))
                place = (
                    client.get_run(run_id).info.experiment_id if run_id else experiment_id(client, where, experiment)
                )
        with mlflow_errors(RunError, f"cannot register {source}", "try again"):
            model_id = model_id or store_model(client, folder, example, experiment_id=place, run_id=run_id)
            return add_version(client, where, model_id, name, description)


def check_name(name: str) -> None:
    """Raises CelError where the registry does not take the name, or MODEL could not tell it from an alias."""
    if not is_registrable(name):
        raise CelError(f"'{name[:250]}' cannot be a model's name; give a short one without '/', ':' and '@'")


def store_model(
    client: Any, model_folder: Path, example: list[list[float]], *, experiment_id: str, run_id: str | None = None
) -> str:
    """Store a model folder as an MLflow model (pyfunc), whole or not at all, and return its id.

    Args:
        client: of MLflow.
        model_folder: as `SpeakerModel.save` writes it.
        example: what `input_example` returned.
        experiment_id: that it belongs to.
        run_id: that it comes from, if any.

    Raises:
        mlflow.exceptions.MlflowException: MLflow refuses it.
    """
    from mlflow.entities import LoggedModelOutput

    logged = client.create_logged_model(
        experiment_id, name=MODEL_NAME, source_run_id=run_id, model_type="speaker embedding"
    )
    try:
        with tempfile.TemporaryDirectory(prefix="cel-mlflow-") as scratch:
            packed = Path(scratch, MODEL_NAME)
            _pack(model_folder, packed, logged.model_id, run_id, example)
            client.log_model_artifacts(logged.model_id, str(packed))
        client.finalize_logged_model(logged.model_id, "READY")
        if run_id:
            client.log_outputs(run_id, [LoggedModelOutput(logged.model_id, step=0)])
    except BaseException:
        with suppress(Exception):
            client.delete_logged_model(logged.model_id)
        raise
    return str(logged.model_id)


def input_example(model_folder: Path, sample: NDArray[Any] | None = None) -> list[list[float]]:
    """Two utterances of different lengths that the model has embedded, with digits enough for 16 bits.

    Args:
        model_folder: as `SpeakerModel.save` writes it.
        sample: a waveform [T] with sound, int16 or of full scale 1.0, whose beginning they are. Default: noise.

    Raises:
        CelError: the folder holds no usable model, or the model cannot embed the sample.
    """
    if sample is None:
        sample = 0.1 * np.random.default_rng(0).standard_normal(SAMPLE_RATE)
    wave = sample * (1.0 / 32768.0 if sample.dtype == np.int16 else 1.0)
    rows: list[list[float]] = [
        np.round(wave[: round(seconds * SAMPLE_RATE)], 5).tolist() for seconds in _EXAMPLE_SECONDS
    ]
    SpeakerModel.load_folder(model_folder, device="cpu").embed([np.asarray(row, np.float32) for row in rows])
    return rows


def add_version(client: Any, uri: str, model_id: str, name: str, description: ModelDescription) -> str:
    """Make a stored model a new version of `name`; the first one gets the alias `champion`.

    Args:
        client: of MLflow.
        uri: of the server or database that it is connected to.
        model_id: of the stored model.
        name: in the registry; made if there is none.
        description: what tags and card of the version say.

    Returns:
        `models:/NAME/VERSION`.
    """
    from mlflow.exceptions import MlflowException

    try:
        client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    with default_uri(uri):
        added = client.create_model_version(
            name,
            source=f"models:/{model_id}",
            run_id=client.get_logged_model(model_id).source_run_id or None,
            model_id=model_id,
            tags=facts_as_tags(description),
            description=shortened(model_card(description, name), _MAX_DESCRIPTION),
        )
    if int(added.version) == 1:
        client.set_registered_model_alias(name, CHAMPION, added.version)
    return f"models:/{name}/{added.version}"


def _pack(model_folder: Path, packed: Path, model_id: str, run_id: str | None, example: list[list[float]]) -> None:
    import mlflow

    # It would tell that rows are not looked at sample by sample, which is on purpose; past any filter, so it is caught.
    with warnings.catch_warnings(record=True):
        mlflow.pyfunc.save_model(
            packed,
            mlflow_model=mlflow.models.Model(run_id=run_id, model_id=model_id),
            python_model=str(Path(__file__).with_name("pyfunc_model.py")),
            artifacts={MODEL_NAME: str(model_folder)},
            code_paths=[str(Path(cel_dist.__file__).parent)],
            input_example=example,
            pip_requirements=[f"{name}=={version(name).partition('+')[0]}" for name in REQUIREMENTS],
        )
    inside = model_folder_in(packed, f"models:/{model_id}")
    card = model_card(read_description(inside / DESCRIPTION_FILE), MODEL_NAME)
    (inside / CARD_FILE).write_text(card, encoding="utf-8")


def _run_of(client: Any, source: Path) -> str | None:
    """The MLflow run of a run folder, or of a folder in one, where MLflow knows it."""
    from mlflow.exceptions import MlflowException

    # A checkpoint's model is three folders deeper than its run.
    for folder in [source.resolve(), *source.resolve().parents][:4]:
        if (folder / RUN_ID_FILE).is_file():
            run_id = (folder / RUN_ID_FILE).read_text(encoding="utf-8").strip()
            try:
                return run_id if client.get_run(run_id).info.lifecycle_stage == "active" else None
            except MlflowException as error:
                if error.error_code not in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
                    raise
                return None
    return None
