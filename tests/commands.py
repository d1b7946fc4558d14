"""The command `cel` as a process of its own, and what it must say when it fails."""

import os
import subprocess
import sys
from pathlib import Path


def start(*arguments: object, cwd: Path, **environment: str) -> subprocess.Popen[str]:
    """`cel` in a folder, in a session of its own; stdout and stderr are pipes."""
    return subprocess.Popen(
        [sys.executable, "-m", "cel_dist", *map(str, arguments)],
        cwd=cwd,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def finish(process: subprocess.Popen[str], timeout: float = 120) -> tuple[int, str, str]:
    """Exit code, stdout and stderr."""
    out, err = process.communicate(timeout=timeout)
    return process.returncode, out, err


def cel(*arguments: object, cwd: Path, **environment: str) -> tuple[int, str, str]:
    """Runs `cel` in a folder to its end."""
    return finish(start(*arguments, cwd=cwd, **environment))


def only_error(result: tuple[int, str, str], code: int) -> str:
    """The one `error:` line of a command that failed as it should: the end of stderr, and nothing on stdout."""
    returned, out, err = result
    lines = err.splitlines()
    errors = [line for line in lines if line.startswith("error: ")]
    assert (returned, len(errors)) == (code, 1), (returned, out, err)
    assert lines[-1] == errors[0], err
    assert "Traceback" not in err
    assert out == ""
    return errors[0]
