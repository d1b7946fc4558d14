"""Where the ranks of a run are started, and the command of the deepspeed launcher that does it."""

import base64
import json
import os
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path

from cel_dist.config_file import load_config
from cel_dist.distributed import free_port
from cel_dist.errors import CelError
from cel_dist.launcher.hostfile import read_hostfile
from cel_dist.launcher.nodes import environment_file, shell_word_for_pdsh, word_for_pdsh

# Where the ranks of several nodes meet, unless said otherwise: all nodes must know it.
MASTER_PORT = 29500

# How a device may be written in CUDA_VISIBLE_DEVICES: by number, or by the identifier of a GPU or of a part of one.
_DEVICE = re.compile(r"\+?[0-9]|GPU-|MIG-")


@dataclass(frozen=True)
class Placement:
    """Where the ranks of a run are started.

    Attributes:
        num_ranks: processes on each node; None is what the hostfile says, or one without it.
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

    Through ssh it is that of DeepSpeed's front end, which starts the launcher of every node; where only this node is
    started, that of its launcher, which spares the start of another process with torch and DeepSpeed.

    Args:
        config: YAML file.
        overrides: `key=value` settings.
        placement: where.
        resume: as in `cel_dist.training.trainer.train`.
        environment: lines for the shell of a node that is reached through ssh; see `cel_dist.launcher.nodes`.

    Raises:
        CelError: as `Placement.hosts` and `device_ids`.
    """
    hosts = placement.hosts()
    arguments = [str(config), *overrides, "--resume", resume]
    if placement.over_ssh:
        command = _front_end(placement, environment)
        arguments = [word_for_pdsh(argument) for argument in arguments]
    else:
        command = _node_launcher(placement, hosts)
    return [*command, "--module", "cel_dist.train", *arguments]


def _front_end(placement: Placement, environment: Path | None) -> list[str]:
    command = [sys.executable, "-m", "deepspeed.launcher.runner"]
    if placement.num_ranks is not None:
        command += ["--num_accelerators", str(placement.num_ranks)]
    command += ["--hostfile", str(placement.hostfile), "--master_port", str(_given_port(placement) or MASTER_PORT)]
    # A hostfile of one node is obeyed, too: it may be another machine than this one.
    command += ["--force_multi", "--no_ssh_check"]
    command += ["--master_addr", placement.master_addr] if placement.master_addr else []
    command += ["--venv_script", shell_word_for_pdsh(str(environment))] if environment else []
    return command


def _node_launcher(placement: Placement, hosts: Mapping[str, int]) -> list[str]:
    port = _given_port(placement)
    if hosts:
        address = placement.master_addr or next(iter(hosts)).rpartition("@")[2]
        port = port or MASTER_PORT
    else:
        hosts, address = {"localhost": placement.num_ranks or 1}, "127.0.0.1"
        # Two jobs on one machine must not meet at a fixed port.
        port = port or free_port()
    node_rank = placement.node_rank or 0
    devices = {name: [str(number) for number in range(num_ranks)] for name, num_ranks in hosts.items()}
    # Of other nodes the launcher only counts them.
    here = list(hosts)[node_rank]
    devices[here] = device_ids(hosts[here], os.environ.get("CUDA_VISIBLE_DEVICES"))
    world = base64.urlsafe_b64encode(json.dumps(devices).encode()).decode()
    command = [sys.executable, "-m", "cel_dist.launcher.node", "--world_info", world, "--node_rank", str(node_rank)]
    return [*command, "--master_addr", address, "--master_port", str(port)]


def _given_port(placement: Placement) -> int | str | None:
    return placement.master_port or os.environ.get("MASTER_PORT")


def device_ids(num_ranks: int, visible: str | None) -> list[str]:
    """The devices of the ranks of this node, which their launcher writes into their CUDA_VISIBLE_DEVICES.

    Args:
        num_ranks: how many.
        visible: CUDA_VISIBLE_DEVICES as the user has set it, if so. Its first devices are taken; two jobs on one
            machine would share a GPU otherwise. What is no device ends the list, as in CUDA's own reading.

    Returns:
        One a rank; -1, which is none, where the user's list has none.

    Raises:
        CelError: the list names some devices, but not enough.

    >>> device_ids(2, None), device_ids(2, "5, 3,1"), device_ids(1, "GPU-8932f937,GPU-71a3")
    (['0', '1'], ['5', '3'], ['GPU-8932f937'])
    >>> device_ids(2, "-1"), device_ids(1, "NoDevFiles"), device_ids(2, "")
    (['-1', '-1'], ['-1'], ['-1', '-1'])
    """
    if visible is None:
        return [str(number) for number in range(num_ranks)]
    entries = (entry.strip() for entry in visible.split(","))
    # Told twice, a device is one.
    named = list(dict.fromkeys(takewhile(_DEVICE.match, entries)))
    if not named:
        return ["-1"] * num_ranks
    if len(named) < num_ranks:
        raise CelError(
            f"CUDA_VISIBLE_DEVICES={visible} names {len(named)} device{'s' * (len(named) > 1)} for {num_ranks} "
            f"processes; unset it, name {num_ranks}, or start fewer with --nproc {len(named)}"
        )
    return named[:num_ranks]


def planned_command(config: Path, overrides: list[str], placement: Placement, *, resume: str) -> list[str]:
    """The command that `launch` would run, of which nothing but configuration and hostfile is looked at."""
    run_dir = load_config(config, overrides).run.dir
    environment = environment_file(run_dir) if placement.over_ssh else None
    return launcher_command(config, overrides, placement, resume=resume, environment=environment)
