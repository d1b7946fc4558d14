"""Reaching MLflow: which server or database, in bounded time, and with its failures told in one line.

MLflow itself is imported when it is first needed; that takes seconds.
"""

import logging
import os
import re
import socket
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from cel_dist.errors import CelError, RunError

DEFAULT_URI = "sqlite:///mlflow.db"


class NoAnswerError(CelError):
    """The database server does not answer, which may pass."""


# Read when MLflow is imported and at each request; a user's own settings win. Its defaults are minutes of retries,
# progress bars and messages on stderr and stdout, and telemetry.
_ENVIRONMENT = {
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
    "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_LOGGING_LEVEL": "WARNING",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_DISABLE_TELEMETRY": "true",
}
_DATABASE_PORTS = {"postgresql": 5432, "mysql": 3306, "mssql": 1433}


def resolve_uri(uri: str | None = None) -> str:
    """The tracking server or database in force: `uri`, else $MLFLOW_TRACKING_URI, else `sqlite:///mlflow.db`.

    >>> resolve_uri("http://tracking.example:5000")
    'http://tracking.example:5000'
    """
    return uri or os.environ.get("MLFLOW_TRACKING_URI") or DEFAULT_URI


def redacted(uri: str) -> str:
    """A URI that may be shown: without its password.

    >>> redacted("https://user:se@cret@tracking.example/path")
    'https://user:***@tracking.example/path'
    >>> redacted("postgresql:///cel?user=cel&password=secret")
    'postgresql:///cel?user=cel&password=***'
    """
    shown = re.sub(r"(://[^/@:\s]*):[^/\s]*@", r"\1:***@", uri)
    return re.sub(r"([?&](?:password|passwd|sslpassword|token)=)[^&#\s]*", r"\1***", shown, flags=re.IGNORECASE)


def connect(uri: str) -> Any:
    """A client of the server or database at `uri`.

    Raises:
        NoAnswerError: a database server does not answer. MLflow would try for minutes before it says so.
        CelError: what can be told at once is wrong with `uri`: no address, a folder, a file that is no database, a
            database server that has no driver here.
    """
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    # They would tell of every single retry, the second with pages of traceback; that a server does not answer, or that
    # a database is locked, is told once, by who asked it.
    for name in ("urllib3.connectionpool", "mlflow.store.db.utils"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    try:
        parts = urlsplit(uri)
        port = parts.port
    except ValueError as error:
        raise CelError(f"that is no address ({error}); write one such as http://HOST:5000 or {DEFAULT_URI}") from None
    kind = parts.scheme.partition("+")[0]
    if kind in ("", "file"):
        raise CelError(f"that is a folder, which MLflow no longer records to; use a database such as {DEFAULT_URI}")
    database = sqlite_file(uri)
    if database:
        _check_database(database)
    # Without a host it is reached through a file of this machine.
    if kind in _DATABASE_PORTS and parts.hostname:
        _check_port(parts.hostname, port or _DATABASE_PORTS[kind])
    from mlflow import MlflowClient

    try:
        return MlflowClient(tracking_uri=uri, registry_uri=uri)
    except ModuleNotFoundError as error:
        raise CelError(f"it needs the database driver '{error.name}'; install it into this environment") from None


@contextmanager
def default_uri(uri: str) -> Iterator[None]:
    """Make `uri` MLflow's global default for a while, and leave no trace.

    A registry in a database looks the model to register up there, whatever the client was opened with.
    """
    import mlflow

    inherited = os.environ.pop("MLFLOW_TRACKING_URI", None)
    chosen = mlflow.get_tracking_uri() if mlflow.is_tracking_uri_set() else None
    mlflow.set_tracking_uri(uri)
    try:
        yield
    finally:
        mlflow.set_tracking_uri(chosen)
        os.environ.pop("MLFLOW_TRACKING_URI", None)
        if inherited is not None:
            os.environ["MLFLOW_TRACKING_URI"] = inherited


def experiment_id(client: Any, uri: str, name: str) -> str:
    """The id of an experiment, which is made if there is none.

    Args:
        client: of MLflow.
        uri: of the server or database that it is connected to.
        name: of the experiment.

    Raises:
        CelError: the experiment was deleted.
    """
    from mlflow.exceptions import MlflowException

    experiment = client.get_experiment_by_name(name)
    if experiment is None:
        # MLflow would put the artifacts of a database into the working folder of whoever comes first.
        database = sqlite_file(uri)
        location = (database.parent / "mlartifacts").as_uri() if database else None
        try:
            return str(client.create_experiment(name, artifact_location=location))
        except MlflowException:
            # Another process may have made it in between.
            experiment = client.get_experiment_by_name(name)
            if experiment is None:
                raise
    if experiment.lifecycle_stage != "active":
        raise CelError(
            f"experiment '{name}' was deleted; restore it with 'mlflow experiments restore "
            f"--experiment-id {experiment.experiment_id}' or set another tracking.experiment"
        )
    return str(experiment.experiment_id)


def sqlite_file(uri: str) -> Path | None:
    """The file of a SQLite URI; None for other URIs."""
    if not uri.startswith(("sqlite:", "sqlite+")):
        return None
    return Path(urlsplit(uri).path[1:]).resolve()


def _check_database(path: Path) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # Others may be writing to it, on a disk that is slow.
        probe = sqlite3.connect(path, timeout=60)
        try:
            probe.execute("PRAGMA schema_version")
        finally:
            probe.close()
    except (OSError, sqlite3.Error) as error:
        raise CelError(f"{path} cannot be used as a database: {error}; name another file") from None


def _check_port(host: str, port: int) -> None:
    try:
        socket.create_connection((host, port), timeout=5).close()
    except OSError as error:
        raise NoAnswerError(
            f"no database server answers at {host}:{port}: {error}; start it or set another URI"
        ) from None


@contextmanager
def mlflow_errors(kind: type[CelError] | type[RunError], problem: str, remedy: str) -> Iterator[None]:
    """Turn what MLflow, its database, its store of files and the network raise into one line."""
    try:
        yield
    except (CelError, RunError) as error:
        raise kind(f"{problem}: {error}") from None
    except OSError as error:
        raise kind(f"{problem}: {error}; {remedy}") from None
    except ModuleNotFoundError as error:
        raise kind(f"{problem}: it needs the package '{error.name}'; install it into this environment") from None
    except Exception as error:
        # MLflow hands on what the client of a store raises, S3's or another one's, whatever its class. An error of
        # Python's own is one of this code.
        if type(error).__module__ == "builtins":
            raise
        raise kind(f"{problem}: {first_line(error)}; {remedy}") from None


def first_line(error: Exception) -> str:
    """What an error of MLflow says, short enough for one line, and without passwords."""
    line = redacted(next(iter(str(error).strip().splitlines()), type(error).__name__))
    if " failed with exception " in line:
        # The innermost of several nested representations names the cause.
        return "the server does not answer (" + line.rpartition(": ")[2].strip("\"')") + ")"
    return line if len(line) <= 300 else line[:300] + " ..."
