"""Closes the MLflow runs of a sweep whose process was killed: `python -m cel_dist.sweep.guard FOLDER`.

It reads from a pipe whose other end the sweep holds, and which ends with it, however it ends: first the server or
database, whose password does not belong on a command line, and in the end, unless it was killed, that it is done.
"""

import logging
import sys
from pathlib import Path

from cel_dist.errors import CelError, RunError
from cel_dist.tracking import RUN_ID_FILE
from cel_dist.tracking.connection import connect, mlflow_errors, redacted

logger = logging.getLogger(__name__)

DONE = "done"


def main(folder: Path) -> None:
    """Wait for the end of the sweep; unless it says that it is done, mark what MLflow takes for running as killed."""
    uri, *words = sys.stdin.read().split("\n")
    if DONE in words:
        return
    for noted in [*folder.glob(f"trials/*/*/{RUN_ID_FILE}"), folder / RUN_ID_FILE]:
        try:
            problem = f"cannot close the record of {noted.parent} in MLflow at {redacted(uri)}"
            with mlflow_errors(RunError, problem, "go on with 'cel sweep --resume', which does"):
                close(noted, uri)
        except (CelError, RunError) as error:
            logger.warning("%s", error)


def close(noted: Path, uri: str) -> None:
    """Mark the run whose id a file holds as killed, if MLflow takes it for running."""
    run_id = noted.read_text().strip() if noted.exists() else ""
    client = connect(uri)
    if run_id and client.get_run(run_id).info.status == "RUNNING":
        client.set_terminated(run_id, "KILLED")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
