"""Two hosts for tests: network namespaces joined by a cable, with a server of ssh in each."""

import os
import shutil
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

ADDRESSES = ("10.213.77.1", "10.213.77.2")
# The same on both hosts, as the name of an interface should be that all ranks are told.
INTERFACE = "cable"
_READY_SECONDS = 20


class Hosts:
    """Two hosts that see the same files and, of networks, each other alone.

    Attributes:
        addresses: theirs.
        environment: what commands on them need: the interface for gloo, and an `ssh` that knows the keys.
    """

    def __init__(self, folder: Path) -> None:
        self.addresses = ADDRESSES
        self.folder = folder
        self.environment = {
            **os.environ,
            "GLOO_SOCKET_IFNAME": INTERFACE,
            "OMP_NUM_THREADS": "1",
            "PATH": f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}",
        }
        self._spaces = tuple(f"cel-{os.getpid()}-{number}" for number in (0, 1))

    def start(self, host: int, command: Sequence[object], **options: Any) -> subprocess.Popen[str]:
        """Start a command on a host; options as of Popen, where `environment` adds to that of the hosts."""
        environment = {**self.environment, **options.pop("environment", {})}
        line = ["ip", "netns", "exec", self._spaces[host], *map(str, command)]
        return subprocess.Popen(line, env=environment, text=True, stdin=subprocess.DEVNULL, **options)

    def cut(self) -> None:
        """Cut the cable: nothing arrives any more, and nobody is told."""
        _ip("-n", self._spaces[0], "link", "set", INTERFACE, "down")

    def mend(self) -> None:
        """Join the cable again."""
        _ip("-n", self._spaces[0], "link", "set", INTERFACE, "up")

    def processes(self, host: int) -> list[int]:
        """The processes of a host."""
        return [int(pid) for pid in _ip("netns", "pids", self._spaces[host]).split()]

    def open(self) -> None:
        for number, space in enumerate(self._spaces):
            try:
                _ip("netns", "add", space)
            except subprocess.CalledProcessError as error:
                pytest.skip(f"network namespaces are not permitted here: {error.stderr.strip()}")
            _ip("-n", space, "link", "set", "lo", "up")
            if number:
                ends = ("netns", self._spaces[0], "type", "veth", "peer", "name", INTERFACE, "netns", space)
                _ip("link", "add", "name", INTERFACE, *ends)
        for space, address in zip(self._spaces, self.addresses, strict=True):
            _ip("-n", space, "address", "add", f"{address}/24", "dev", INTERFACE)
            _ip("-n", space, "link", "set", INTERFACE, "up")
        self._serve_ssh()

    def close(self) -> None:
        for space in self._spaces:
            for pid in _ip("netns", "pids", space, check=False).split():
                subprocess.run(["kill", "-KILL", pid], capture_output=True, check=False)
            _ip("netns", "delete", space, check=False)

    def _serve_ssh(self) -> None:
        """Start the servers, with keys of this test and nothing of the user's."""
        for key in ("host_key", "user_key"):
            command = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", self.folder / key]
            subprocess.run(command, check=True, stdin=subprocess.DEVNULL)
        server = self.folder / "sshd_config"
        server.write_text(
            f"HostKey {self.folder}/host_key\nAuthorizedKeysFile {self.folder}/user_key.pub\nPidFile none\nUsePAM no\n"
            "StrictModes no\nPermitRootLogin prohibit-password\nPasswordAuthentication no\n"
            "KbdInteractiveAuthentication no\n"
        )
        public = (self.folder / "host_key.pub").read_text()
        (self.folder / "known_hosts").write_text("".join(f"{address} {public}" for address in self.addresses))
        client = self.folder / "ssh_config"
        client.write_text(
            f"IdentityFile {self.folder}/user_key\nUserKnownHostsFile {self.folder}/known_hosts\n"
            "IdentitiesOnly yes\nIdentityAgent none\nStrictHostKeyChecking yes\nLogLevel ERROR\n"
        )
        program = self.folder / "bin" / "ssh"
        program.parent.mkdir()
        program.write_text(f'#!/bin/sh\nexec {shutil.which("ssh")} -F {client} "$@"\n')
        program.chmod(0o755)
        # Where the package makes it only for its own service.
        Path("/run/sshd").mkdir(exist_ok=True)
        for host in (0, 1):
            with open(self.folder / f"sshd-{host}.log", "w") as log:
                self.start(host, [_sshd(), "-D", "-e", "-f", server], stderr=log)
        end = time.monotonic() + _READY_SECONDS
        for address in self.addresses:
            while self.start(0, ["ssh", address, "true"], stderr=subprocess.DEVNULL).wait():
                if time.monotonic() > end:
                    said = (self.folder / f"sshd-{self.addresses.index(address)}.log").read_text()
                    pytest.skip(f"no server of ssh runs here: {said.strip()}")


def _sshd() -> str | None:
    # It wants its full path, which a user's PATH may lack.
    return shutil.which("sshd", path=f"{os.environ['PATH']}:/usr/sbin:/sbin")


def _ip(*arguments: str, check: bool = True) -> str:
    return subprocess.run(["ip", *arguments], capture_output=True, text=True, check=check).stdout


@contextmanager
def two_hosts(folder: Path) -> Iterator[Hosts]:
    """Two hosts whose keys lie in `folder`; the test is skipped where they cannot be made."""
    if os.geteuid() != 0:
        pytest.skip("network namespaces need root")
    missing = [name for name in ("ip", "ssh", "ssh-keygen", "pdsh") if shutil.which(name) is None]
    missing += [] if _sshd() else ["sshd"]
    if missing:
        pytest.skip(f"not installed: {', '.join(missing)} (packages iproute2, openssh-client, openssh-server, pdsh)")
    folder.mkdir(parents=True, exist_ok=True)
    hosts = Hosts(folder)
    try:
        hosts.open()
        yield hosts
    finally:
        hosts.close()
