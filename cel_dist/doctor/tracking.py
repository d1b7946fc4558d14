"""MLflow: whether the server or database in force answers, and lists its registered models."""

import os
from typing import TYPE_CHECKING

from cel_dist.doctor.check import Check, Checks, State, one_line, tried

if TYPE_CHECKING:
    from cel_dist.doctor.examine import Settings

_REMEDY = "start the server, name another one (tracking.uri, MLFLOW_TRACKING_URI), or set tracking.enabled=false"
_REINSTALL = "reinstall what it names: pip install --force-reinstall PACKAGE (mlflow, if it names none)"
_ENOUGH = 1000


def tracking(settings: "Settings") -> Checks:
    """The package, and the registry in force."""
    # A server that does not answer is tried once, and not for the minutes that a run can spare.
    os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"] = f"{max(1, int(settings.timeout_seconds / 3))}"
    os.environ["MLFLOW_HTTP_REQUEST_MAX_RETRIES"] = "0"
    # Whatever the packages that it is made of raise when they are imported.
    yield tried("mlflow", lambda: _registry(settings), _REINSTALL, "fault" if settings.tracking else "note")


def _registry(settings: "Settings") -> Check:
    from cel_dist.errors import CelError
    from cel_dist.tracking.connection import connect, first_line, redacted, resolve_uri, sqlite_file

    uri = resolve_uri(settings.tracking_uri)
    shown = redacted(uri)
    failure: State = "fault" if settings.tracking else "note"
    try:
        database = sqlite_file(uri)
        if database is not None and not database.exists():
            # To look must not make it.
            nearest = next(path for path in database.parents if path.is_dir())
            if not os.access(nearest, os.W_OK | os.X_OK):
                raise CelError(f"{nearest} cannot be written into")
            import mlflow

            return Check(
                "mlflow", "ok", f"{mlflow.__version__}; {shown} is not there yet, and will be made in {nearest}"
            )
        client = connect(uri)
        import mlflow

        models = client.search_registered_models(max_results=_ENOUGH)
    except CelError as error:
        return Check("mlflow", failure, f"{shown}: {error}", _REMEDY)
    except (ImportError, AttributeError) as error:
        return Check("mlflow", failure, one_line(error), _REINSTALL)
    except Exception as error:
        return Check("mlflow", failure, f"{shown}: {first_line(error)}", _REMEDY)
    number = f"{len(models)}" if len(models) < _ENOUGH else f"{_ENOUGH} or more"
    return Check("mlflow", "ok", f"{mlflow.__version__}; {shown} answers: {number} registered models")
