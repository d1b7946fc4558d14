"""Starting the ranks of a run through the deepspeed launcher, and reading what they left."""

import logging
import os
import shlex
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from cel_dist.config_file import load_config
from cel_dist.data.files import sole_writer
from cel_dist.distributed import free_port
from cel_dist.errors import CelError, RunError

logger = logging.getLogger(__name__)


def launcher_command(
    config: Path, overrides: list[str], *, num_ranks: int | None, hostfile: Path | None, resume: str
) -> list[str]:
    """The deepspeed command line that trains `config`.

    Args:
        config: YAML file.
        overrides: `key=value` settings.
        num_ranks: processes on each node; None leaves it to the launcher (one an accelerator, or as the hostfile says).
        hostfile: the nodes, one `name slots=N` a line; None is this machine alone.
        resume: as in `cel_dist.training.trainer.train`.
    """
    command = [sys.executable, "-m", "deepspeed.launcher.runner"]
    if num_ranks is not None:
        command += ["--num_accelerators", str(num_ranks)]
    if hostfile is not None:
        command += ["--hostfile", str(hostfile)]
    else:
        # Two jobs on one machine must not meet at the launcher's fixed default.
        command += ["--master_port", os.environ.get("MASTER_PORT") or str(free_port())]
    return [*command, "--module", "cel_dist.train", str(config), *overrides, "--resume", resume]


def launch(
    config: Path, overrides: list[str], *, num_ranks: int | None, hostfile: Path | None, resume: str
) -> dict[str, Any]:
    """Train in new processes and return the run's summary (see `TrainResult`).

    Everything that can be found wrong beforehand is checked here first, so that a mistake costs seconds and one line
    instead of a launch. With a hostfile, this machine must see the data and the run folder as the nodes do.

    Raises:
        CelError: the run cannot be started, here or by the ranks.
        RunError: another process writes the run folder, or the ranks failed; what they said is above on stderr.
    """
    # Both read much, of which the command line and its help know nothing.
    from cel_dist.training.conclusion import catch_up
    from cel_dist.training.preflight import preflight
    from cel_dist.training.result import TrainResult

    settings = load_config(config, overrides)
    if num_ranks is not None and num_ranks < 1:
        raise CelError(f"--nproc {num_ranks}: at least one process is needed")
    if hostfile is not None and not hostfile.is_file():
        raise CelError(f"hostfile {hostfile} does not exist; write one line 'name slots=N' for each node")
    start = preflight(settings, num_ranks if hostfile is None else None, resume).start
    if start.result is not None:
        return asdict(catch_up(settings, start.result))
    if settings.run.dir.is_dir():
        # The ranks hold the folder while they run; looking now spares the start of a second set of them.
        with sole_writer(settings.run.dir, "cel train"):
            pass
    command = launcher_command(config, overrides, num_ranks=num_ranks, hostfile=hostfile, resume=resume)
    logger.info("starting: %s", shlex.join(command))
    # Standard output belongs to the command's own result.
    code = subprocess.run(command, stdout=sys.stderr.fileno(), check=False).returncode
    if code == 2:
        raise CelError("training did not start; the line above that begins with 'error:' says why")
    if code != 0:
        raise RunError(
            f"training ended with code {code}; its last words are above, its run folder is {settings.run.dir}"
        )
    result = TrainResult.read(settings.run.dir)
    if result is None:
        raise RunError(
            f"training ended, but there is no summary of it in {settings.run.dir}; put run.dir where all nodes see it"
        )
    return asdict(result)
