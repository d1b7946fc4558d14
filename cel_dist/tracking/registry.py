"""From an MLflow URI to a model folder on this machine."""

import hashlib
import os
import re
import shutil
import tempfile
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import url2pathname

import yaml

from cel_dist.errors import CelError, RunError
from cel_dist.tracking.connection import connect, mlflow_errors, redacted, resolve_uri, sqlite_file
from cel_dist.tracking.run import MODEL_NAME

_MODEL_URI = re.compile(
    r"models:/(?P<id>m-[0-9a-f]+)$"
    r"|models:/(?P<name>[^/@]+)(?:@(?P<alias>[^/@]+)|/(?P<version>\d+))$"
    rf"|runs:/(?P<run>[^/]+)/{MODEL_NAME}$"
)


def fetch_model(uri: str, tracking_uri: str | None = None) -> Path:
    """The model folder behind an MLflow URI, on this machine.

    Artifacts that are files of this machine are used where they are. Others are downloaded once, to
    `$CEL_CACHE/models` (default `~/.cache/cel_dist/models`).

    Args:
        uri: `models:/NAME@alias`, `models:/NAME/3`, `models:/m-ID` or `runs:/ID/model`.
        tracking_uri: server or database. Default: as `resolve_uri`.

    Raises:
        CelError: the URI is malformed, the server does not answer, the model, alias, version or run does not exist, or
            the model was not made by this project.
        RunError: the download failed.
    """
    where = resolve_uri(tracking_uri)
    match = _MODEL_URI.match(uri)
    if match is None:
        raise CelError(f"'{uri}' names no model; write models:/NAME@alias, models:/NAME/3 or runs:/ID/{MODEL_NAME}")
    database = sqlite_file(where)
    if database and not database.exists():
        raise CelError(
            f"cannot look up {uri}: there is no database {database}; set MLFLOW_TRACKING_URI to the server's"
        )
    remedy = "set MLFLOW_TRACKING_URI to the server that has the model"
    with mlflow_errors(CelError, f"cannot look up {uri} in MLflow at {redacted(where)}", remedy):
        client = connect(where)
        location = client.get_logged_model(_model_id(client, match)).artifact_location
    return _model_folder(_local_copy(location, uri, where), uri)


def _model_id(client: Any, match: re.Match[str]) -> str:
    from mlflow.exceptions import MlflowException

    if match["id"]:
        return match["id"]
    if match["run"]:
        outputs = client.get_run(match["run"]).outputs
        logged = [client.get_logged_model(output.model_id) for output in (outputs.model_outputs if outputs else [])]
        named = [model for model in logged if model.name == MODEL_NAME]
        if not named:
            raise CelError(f"run {match['run']} has no model; let its training end, or name another run")
        return str(max(named, key=lambda model: model.creation_timestamp).model_id)
    name = match["name"]
    try:
        registered = client.get_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        names = ", ".join(model.name for model in client.search_registered_models(max_results=10)) or "none"
        raise CelError(f"there is no model '{name}'; registered there: {names}") from None
    if match["alias"] and match["alias"] not in registered.aliases:
        aliases = ", ".join(sorted(registered.aliases)) or "none"
        raise CelError(f"'{name}' has no alias '{match['alias']}'; its aliases: {aliases}")
    number = registered.aliases[match["alias"]] if match["alias"] else match["version"]
    try:
        found = client.get_model_version(name, number)
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        versions = sorted(int(entry.version) for entry in client.search_model_versions(f"name = '{name}'"))
        raise CelError(f"'{name}' has no version {number}; it has {versions}") from None
    # Versions that were not registered from a logged model have a path of a run here.
    source = _MODEL_URI.match(found.source)
    if source is None or not source["id"]:
        raise CelError("it is another kind of model, not logged by cel_dist; name a model of this project")
    return source["id"]


def _local_copy(location: str, uri: str, where: str) -> Path:
    """The folder with the files of an MLflow model, downloaded if they are not on this machine."""
    parts = urlsplit(location)
    if parts.scheme in ("", "file"):
        folder = Path(url2pathname(parts.path))
        if not folder.is_dir():
            raise CelError(f"the files of {uri} are in {folder}, which is not on this machine; use a tracking server")
        return folder
    import mlflow

    # The location holds the model's unique id and never changes its content.
    key = hashlib.sha256(f"{where} {location}".encode()).hexdigest()[:32]
    cache = Path(os.environ.get("CEL_CACHE") or Path.home() / ".cache" / "cel_dist") / "models"
    folder = cache / key
    if folder.is_dir():
        return folder
    cache.mkdir(parents=True, exist_ok=True)
    fresh = Path(tempfile.mkdtemp(prefix=f".{key}-", dir=cache))
    try:
        with mlflow_errors(RunError, f"cannot download {uri} from MLflow at {redacted(where)}", "try again"):
            got = Path(
                mlflow.artifacts.download_artifacts(
                    artifact_uri=location, dst_path=str(fresh), tracking_uri=where, registry_uri=where
                )
            )
        try:
            got.rename(folder)
        except OSError:
            # Another process was faster; its copy is as good.
            if not folder.is_dir():
                raise
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
    return folder


def _model_folder(packed: Path, uri: str) -> Path:
    try:
        flavor = yaml.safe_load((packed / "MLmodel").read_text(encoding="utf-8"))["flavors"]["python_function"]
        inside: str | None = flavor["artifacts"][MODEL_NAME]["path"]
    except (OSError, KeyError, TypeError, yaml.YAMLError):
        inside = None
    if inside is None or not (packed / inside / "model.json").is_file():
        raise CelError(f"{uri} is another kind of model: it holds no model.json; name a model that cel_dist logged")
    return packed / inside
