"""What the nodes of a job that is started through ssh need: words that arrive as they are, variables, and a pulse."""

import logging
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from cel_dist.data.files import writing_into
from cel_dist.errors import CelError, RunError

logger = logging.getLogger(__name__)

# ssh notices within 40 seconds that the other end is gone, instead of never, and asks no questions that nobody answers.
_SSH_OPTIONS = (
    "-o BatchMode=yes -o ConnectTimeout=15 -o ServerAliveInterval=10 -o ServerAliveCountMax=3 -o TCPKeepAlive=yes"
)
_RETURN_SECONDS = 600
_LOOK_EVERY_SECONDS = 2
# Variables whose names begin so reach the ranks of all nodes.
FORWARDED = (
    "AWS_", "CEL_", "DS_", "FI_", "FSSPEC_", "GLOO_", "HTTPS_PROXY", "HTTP_PROXY", "KMP_", "LD_LIBRARY_PATH", "MKL_",
    "MLFLOW_", "NCCL_", "NO_PROXY", "OMP_", "PYTHON", "PYTORCH_", "TORCH_", "UCX_", "http_proxy", "https_proxy",
    "no_proxy",
)  # fmt: skip


def environment_file(run_dir: Path) -> Path:
    """Where the variables for the nodes are written while they run: the run folder is what all nodes share."""
    return run_dir.absolute() / ".environment"


def write_environment(path: Path, environment: Mapping[str, str]) -> None:
    """Write the variables that the nodes are to have, as lines for their shells, readable for the owner alone.

    On a command line every user of the nodes could read them, the keys of stores and registries included.

    Raises:
        RunError: the file cannot be written.
    """
    lines = [
        f"export {name}={shlex.quote(value)}\n"
        for name, value in sorted(environment.items())
        if name.startswith(FORWARDED)
    ]
    with writing_into(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)
        with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8") as file:
            file.writelines(lines)


def launcher_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """The environment of the deepspeed launcher itself.

    It would put what begins with MLFLOW, passwords included, into the command line of every node and into its log.
    """
    kept = {name: value for name, value in environment.items() if not name.startswith("MLFLOW")}
    kept["PDSH_SSH_ARGS_APPEND"] = f"{environment.get('PDSH_SSH_ARGS_APPEND', '')} {_SSH_OPTIONS}".strip()
    return kept


def word_for_pdsh(word: str) -> str:
    """An argument such that it arrives at the nodes as it is, through the launcher, pdsh and a shell.

    >>> word_for_pdsh("optim.lr=0.1"), word_for_pdsh("eval.root=it's 100%")
    ('optim.lr=0.1', "eval.root=it's 100%%")
    >>> word_for_pdsh("run.name=$HOME")
    "'run.name=$HOME'"
    """
    if " " not in word:
        return shell_word_for_pdsh(word)
    # The launcher puts these into double quotes, where three characters still mean something.
    for special in ("\\", "$", "`"):
        word = word.replace(special, f"\\{special}")
    return word.replace("%", "%%")


def shell_word_for_pdsh(word: str) -> str:
    """A word for the shell of a node, where the launcher adds no quotes; for pdsh, `%` begins a name of its own."""
    return shlex.quote(word).replace("%", "%%")


def ssh_command(host: str, words: list[str]) -> list[str]:
    """A command on a node, in this working folder and with this Python.

    >>> ssh_command("node", ["true"])[-2:][0]
    'node'
    """
    return ["ssh", *_SSH_OPTIONS.split(), host, f"cd {shlex.quote(os.getcwd())} && {shlex.join(words)}"]


def require_reachable(hosts: list[str]) -> None:
    """See that pdsh is here and that every node can be reached and has this Python and this working folder.

    Raises:
        CelError: it is not so; names the nodes.
    """
    for program in ("pdsh", "ssh"):
        if shutil.which(program) is None:
            raise CelError(
                f"{program} is not installed, which starts the ranks of several nodes; install it, or start "
                "'cel train' on every node with --no-ssh --node-rank I"
            )
    asked = {
        host: subprocess.Popen(
            ssh_command(host, ["test", "-x", sys.executable]),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for host in hosts
    }
    lost: dict[str, list[str]] = {}
    for host, process in asked.items():
        words = process.communicate()[1].strip().splitlines()
        if process.returncode == 255:
            lost.setdefault(words[-1] if words else "no reason given", []).append(host)
        elif process.returncode:
            lost.setdefault(f"it has no folder {os.getcwd()} or no {sys.executable}", []).append(host)
    if lost:
        what = "; ".join(f"{', '.join(names)}: {reason}" for reason, names in lost.items())
        raise CelError(
            f"cannot start on all nodes through ssh ({what}); mend that, or start 'cel train' on every node with "
            "--no-ssh --node-rank I"
        )


def wait_until_reachable(hosts: list[str], is_given_up: Callable[[], bool]) -> None:
    """Wait for nodes that were lost, as while one starts anew or a cable is put right.

    Args:
        hosts: the nodes.
        is_given_up: whether nobody wants them any more; then this returns.

    Raises:
        RunError: they are not back after ten minutes; names those that are missing.
    """
    end = time.monotonic() + _RETURN_SECONDS
    is_said = False
    while not is_given_up():
        try:
            require_reachable(hosts)
            return
        except CelError as error:
            if time.monotonic() > end:
                raise RunError(str(error)) from None
            if not is_said:
                logger.warning("waiting at most %d s for what is lost: %s", _RETURN_SECONDS, error)
                is_said = True
        time.sleep(_LOOK_EVERY_SECONDS)
