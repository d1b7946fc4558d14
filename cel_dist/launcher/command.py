"""Where the ranks of a run are started, and the command of the deepspeed launcher that does it."""

import os
import sys
from dataclasses import dataclass
from pathlib import Path

from cel_dist.config_file import load_config
from cel_dist.distributed import free_port
from cel_dist.errors import CelError
from cel_dist.launcher.hostfile import read_hostfile
from cel_dist.launcher.nodes import environment_file, shell_word_for_pdsh, word_for_pdsh

# Where the ranks of several nodes meet, unless said otherwise: all nodes must know it.
MASTER_PORT = 29500


@dataclass(frozen=True)
class Placement:
    """Where the ranks of a run are started.

    Attributes:
        num_ranks: processes on each node; None leaves it to the launcher (one an accelerator, or as the hostfile says).
        hostfile: the nodes, one `name slots=N` a line; None is this machine alone.
        node_rank: start only the ranks of this node, the first of the hostfile being 0, and leave the others to their
            own `cel train`; None starts all nodes through ssh.
        master_addr: where the ranks meet: an address of the first node that all others reach.
        master_port: its port.
    """

    num_ranks: int | None = None
    hostfile: Path | None = None
    node_rank: int | None = None
    master_addr: str | None = None
    master_port: int | None = None

    @property
    def over_ssh(self) -> bool:
        """Whether the ranks are started through ssh."""
        return self.hostfile is not None and self.node_rank is None

    @property
    def has_rank_0(self) -> bool:
        """Whether this machine's start is the one that rank 0, and with it the run folder, belongs to."""
        return not self.node_rank

    def hosts(self) -> dict[str, int]:
        """Processes by node; nothing without a hostfile.

        Raises:
            CelError: the parts do not fit each other, or the hostfile cannot be used.
        """
        if self.num_ranks is not None and self.num_ranks < 1:
            raise CelError(f"--nproc {self.num_ranks}: at least one process is needed")
        if self.master_port is not None and not 0 < self.master_port < 65536:
            raise CelError(f"--master-port {self.master_port}: ports are 1 to 65535")
        if self.hostfile is None:
            for option, value in (("--no-ssh", self.node_rank), ("--master-addr", self.master_addr)):
                if value is not None:
                    raise CelError(f"{option} is for several nodes; name them with --hostfile")
            return {}
        hosts = {name: self.num_ranks or slots for name, slots in read_hostfile(self.hostfile).items()}
        if self.node_rank is not None and not 0 <= self.node_rank < len(hosts):
            raise CelError(
                f"--node-rank {self.node_rank}: {self.hostfile} names {len(hosts)} nodes, 0 to {len(hosts) - 1}"
            )
        return hosts


def launcher_command(
    config: Path, overrides: list[str], placement: Placement, *, resume: str, environment: Path | None = None
) -> list[str]:
    """The deepspeed command line that trains `config`.

    Args:
        config: YAML file.
        overrides: `key=value` settings.
        placement: where.
        resume: as in `cel_dist.training.trainer.train`.
        environment: lines for the shell of a node that is reached through ssh; see `cel_dist.launcher.nodes`.

    Raises:
        CelError: as `Placement.hosts`.
    """
    hosts = placement.hosts()
    port = placement.master_port or os.environ.get("MASTER_PORT")
    command = [sys.executable, "-m", "deepspeed.launcher.runner"]
    if placement.num_ranks is not None:
        command += ["--num_accelerators", str(placement.num_ranks)]
    arguments = [str(config), *overrides, "--resume", resume]
    if placement.hostfile is None:
        # Two jobs on one machine must not meet at a fixed port.
        command += ["--master_port", str(port or free_port())]
    else:
        command += ["--hostfile", str(placement.hostfile), "--master_port", str(port or MASTER_PORT)]
        if placement.node_rank is not None:
            # Without an address the launcher asks for one through ssh.
            command += ["--no_ssh", "--node_rank", str(placement.node_rank)]
            command += ["--master_addr", placement.master_addr or next(iter(hosts)).rpartition("@")[2]]
        else:
            # A hostfile of one node is obeyed, too: it may be another machine than this one.
            command += ["--force_multi", "--no_ssh_check"]
            command += ["--master_addr", placement.master_addr] if placement.master_addr else []
            command += ["--venv_script", shell_word_for_pdsh(str(environment))] if environment else []
            arguments = [word_for_pdsh(argument) for argument in arguments]
    return [*command, "--module", "cel_dist.train", *arguments]


def planned_command(config: Path, overrides: list[str], placement: Placement, *, resume: str) -> list[str]:
    """The command that `launch` would run, of which nothing but configuration and hostfile is looked at."""
    run_dir = load_config(config, overrides).run.dir
    environment = environment_file(run_dir) if placement.over_ssh else None
    return launcher_command(config, overrides, placement, resume=resume, environment=environment)
