"""Which code is running: the commit of a checkout, or the version of the package."""

import os
import subprocess
from functools import cache
from importlib.metadata import version
from pathlib import Path

_PACKAGE = Path(__file__).resolve().parent
_GIT_SECONDS = 5.0
# A hook of git has them from the repository that it is a hook of.
_OTHER_REPOSITORY = ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE", "GIT_COMMON_DIR", "GIT_PREFIX")


@cache
def code_version() -> str:
    """`git:COMMIT`, with `+changed` where files of the package differ from it; `cel_dist VERSION` out of a checkout.

    A package that merely lies inside of somebody else's repository (an environment in it) is none of its commits.

    >>> code_version().startswith(("git:", "cel_dist "))
    True
    """
    if _git("ls-files", "--error-unmatch", "__init__.py") is not None:
        commit, changes = _git("rev-parse", "HEAD"), _git("status", "--porcelain", "--untracked-files=no", ".")
        if commit:
            return f"git:{commit}{'+changed' if changes else ''}"
    return f"cel_dist {version('cel_dist')}"


def _git(*arguments: str) -> str | None:
    """What git prints; None where there is no git, no repository, or one of another user."""
    environment = {name: value for name, value in os.environ.items() if name not in _OTHER_REPOSITORY}
    # Without its optional lock on the index, which somebody who commits beside it may need.
    command = ["git", "--no-optional-locks", "-C", str(_PACKAGE), *arguments]
    try:
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=_GIT_SECONDS, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
