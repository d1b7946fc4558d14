"""From an MLflow URI to a model folder on this machine."""

import hashlib
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import url2pathname

import yaml

from cel_dist.errors import CelError, RunError
from cel_dist.tracking.connection import connect, mlflow_errors, redacted, resolve_uri, sqlite_file

MODEL_NAME = "model"

_MODEL_URI = re.compile(
    r"models:/(?P<id>m-[0-9a-f]+)$"
    r"|models:/(?P<name>[^/@]+)(?:@(?P<alias>[^/@]+)|/(?P<version>\d+))$"
    rf"|runs:/(?P<run>[^/]+)/{MODEL_NAME}$"
)

_PLACE = re.compile(r"/models/(?P<id>m-[0-9a-f]+)/artifacts/?$")
"""Where MLflow puts the files of a stored model, in the folder of its experiment."""


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
    if _MODEL_URI.match(uri) is None:
        raise CelError(f"'{uri}' names no model; write models:/NAME@alias, models:/NAME/3 or runs:/ID/{MODEL_NAME}")
    where = resolve_uri(tracking_uri)
    with looking_up(uri, where) as client:
        location = client.get_logged_model(find_model_id(client, uri)).artifact_location
    return model_folder_in(_local_copy(location, uri, where), uri)


@contextmanager
def looking_up(what: str, where: str) -> Iterator[Any]:
    """A client that reads what is at `where`; a database that is not there is not made.

    Raises:
        CelError: the server does not answer, or knows nothing of what is asked.
    """
    database = sqlite_file(where)
    if database and not database.exists():
        raise CelError(
            f"cannot look up {what}: there is no database {database}; set MLFLOW_TRACKING_URI to the server's"
        )
    remedy = "set MLFLOW_TRACKING_URI to the server that has the model"
    with mlflow_errors(CelError, f"cannot look up {what} in MLflow at {redacted(where)}", remedy):
        yield connect(where)


def find_model_id(client: Any, uri: str) -> str:
    """The id of the stored model behind a URI, as `fetch_model` takes it.

    Raises:
        CelError: model, alias, version or run do not exist; the message names those that do.
    """
    match = _MODEL_URI.match(uri)
    if match is None:
        raise CelError(f"'{uri}' names no model; write models:/NAME@alias, models:/NAME/3 or runs:/ID/{MODEL_NAME}")
    return _model_id(client, match)


def _model_id(client: Any, match: re.Match[str]) -> str:
    if match["id"]:
        return match["id"]
    if match["run"]:
        outputs = client.get_run(match["run"]).outputs
        logged = [client.get_logged_model(output.model_id) for output in (outputs.model_outputs if outputs else [])]
        named = [model for model in logged if model.name == MODEL_NAME]
        if not named:
            raise CelError(f"run {match['run']} has no model; let its training end, or name another run")
        return str(max(named, key=lambda model: model.creation_timestamp).model_id)
    found = version_entry(client, match["name"], alias=match["alias"], version=match["version"])
    model_id = stored_id(client, found)
    if model_id is None:
        raise CelError("it is another kind of model, not logged by cel_dist; name a model of this project")
    return model_id


def stored_id(client: Any, entry: Any) -> str | None:
    """The id of the stored model that an entry of a version is of; None where it was not registered from one."""
    # Its own field `model_id` is not filled by databases. Others have a path of a run as their source.
    source = _MODEL_URI.match(entry.source)
    if source is None or not source["version"]:
        return source["id"] if source else None
    # A copy under another name ("Promote" on MLflow's pages). The version that it was copied from may be gone.
    place = _PLACE.search(client.get_model_version_download_uri(entry.name, entry.version))
    return place["id"] if place else None


def version_entry(client: Any, name: str, *, alias: str | None = None, version: str | None = None) -> Any:
    """MLflow's entry of a version of a registered model, by alias or number.

    Raises:
        CelError: there is no such model, alias or version; the message names those that there are.
    """
    from mlflow.exceptions import MlflowException

    registered = model_entry(client, name)
    if alias and alias not in registered.aliases:
        aliases = ", ".join(sorted(registered.aliases)) or "none"
        raise CelError(f"'{name}' has no alias '{alias}'; its aliases: {aliases}")
    number = registered.aliases[alias] if alias else version
    try:
        return client.get_model_version(name, number)
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        raise CelError(f"'{name}' has no version {number}; it has {version_numbers(client, name)}") from None


def model_entry(client: Any, name: str) -> Any:
    """MLflow's entry of a registered model.

    Raises:
        CelError: there is none of that name; the message names those that there are.
    """
    from mlflow.exceptions import MlflowException

    try:
        return client.get_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        names = ", ".join(model.name for model in client.search_registered_models(max_results=10)) or "none"
        raise CelError(f"there is no model '{name}'; registered there: {names}") from None


def version_numbers(client: Any, name: str) -> list[int]:
    """The versions of a registered model, oldest first."""
    return sorted(int(entry.version) for entry in version_entries(client, name))


def version_entries(client: Any, name: str) -> list[Any]:
    """MLflow's entries of all versions of a registered model."""
    quote = '"' if "'" in name else "'"
    # A search has no way to write a name with both; one such name must not hide all others.
    wanted = None if quote in name else f"name = {quote}{name}{quote}"
    found = all_pages(lambda token: client.search_model_versions(wanted, page_token=token))
    return [entry for entry in found if entry.name == name]


def all_pages(search: Callable[[str | None], Any]) -> list[Any]:
    """Everything that a search of MLflow finds; `search` gets the token of a page."""
    found: list[Any] = []
    token: str | None = None
    while True:
        page = search(token)
        found += page
        token = page.token
        if not token:
            return found


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


def model_folder_in(packed: Path, uri: str) -> Path:
    """The model folder inside of a stored MLflow model.

    Raises:
        CelError: it is another kind of model.
    """
    try:
        flavor = yaml.safe_load((packed / "MLmodel").read_text(encoding="utf-8"))["flavors"]["python_function"]
        inside: str | None = flavor["artifacts"][MODEL_NAME]["path"]
    except (OSError, KeyError, TypeError, yaml.YAMLError):
        inside = None
    if inside is None or not (packed / inside / "model.json").is_file():
        raise CelError(f"{uri} is another kind of model: it holds no model.json; name a model that cel_dist logged")
    return packed / inside
