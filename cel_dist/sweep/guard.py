"""Closes the MLflow runs of a sweep whose process was killed: `python -m cel_dist.sweep.guard FOLDER URI`.

It reads from a pipe whose other end the sweep holds, and which ends with it, however it ends.
"""

import sys
from pathlib import Path

from cel_dist.tracking import RUN_ID_FILE
from cel_dist.tracking.connection import connect


def main(folder: Path, uri: str) -> None:
    """Wait for the end of the sweep; unless it says that it is done, mark what MLflow takes for running as killed."""
    if sys.stdin.buffer.read() == b"done":
        return
    client = connect(uri)
    for noted in [*folder.glob(f"trials/*/*/{RUN_ID_FILE}"), folder / RUN_ID_FILE]:
        run_id = noted.read_text().strip() if noted.exists() else ""
        if run_id and client.get_run(run_id).info.status == "RUNNING":
            client.set_terminated(run_id, "KILLED")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
