"""The deepspeed launcher as a process of `cel train`: hands on signals that are for the ranks, and leaves nothing."""

import logging
import os
import signal
import subprocess
import sys
import threading
from contextlib import suppress
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

from cel_dist.errors import EXIT_PREEMPTED
from cel_dist.launcher.nodes import launcher_environment, ssh_command, write_environment
from cel_dist.launcher.ranks import (
    LAUNCH,
    end_processes,
    new_launch,
    processes_of,
    signal_processes,
    signal_ranks,
    wait_for_processes,
)

logger = logging.getLogger(__name__)

# With these a scheduler asks a run to end. The launcher takes the first for an order to kill, and dies of the second.
_REQUESTS = (signal.SIGTERM, signal.SIGUSR1)
# Ranks that were told to end write a checkpoint first; the deepspeed launcher waits as long.
_PATIENCE_SECONDS = 30.0
_SSH_SECONDS = 30


class LaunchProcess:
    """Runs launchers, one at a time, and within the block hands SIGTERM and SIGUSR1 to their ranks.

    The first such signal goes to the ranks, which agree on a step, write a checkpoint and end. A second one, or one
    that finds no rank yet, ends everything.

    Args:
        first_host: the node of rank 0 if the ranks are started through ssh; None if they run on this machine.

    Attributes:
        requests: the signals received.
        found_no_rank: the launcher was ended before it had started the ranks.
    """

    def __init__(self, first_host: str | None) -> None:
        self._first_host = first_host
        self._launch = ""
        self._launcher: subprocess.Popen[bytes] | None = None
        self._former: dict[signal.Signals, Any] = {}
        self.requests: list[signal.Signals] = []
        self.found_no_rank = False

    def __enter__(self) -> "LaunchProcess":
        # Python lets the main thread alone have handlers; elsewhere the signals mean what they always do.
        if threading.current_thread() is threading.main_thread():
            self._former = {number: signal.signal(number, self._receive) for number in _REQUESTS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._former.items():
            signal.signal(number, handler)

    def run(self, command: list[str], environment_file: Path | None) -> int:
        """Run a launcher to its end, its output on stderr, and see that nothing of it is left on this machine.

        Args:
            command: the launcher.
            environment_file: where to write the variables of nodes that are reached through ssh, while they run.

        Returns:
            Its exit code; negative if a signal killed it. EXIT_PREEMPTED if the end was asked for before the start.
        """
        if self.requests:
            return EXIT_PREEMPTED
        self._launch = new_launch(over_ssh=self._first_host is not None)
        environment = {**os.environ, LAUNCH: self._launch}
        try:
            if environment_file is not None:
                write_environment(environment_file, environment)
                environment = launcher_environment(environment)
            # A session of its own: what is sent to the group of `cel train`, as Ctrl-C is, comes through here.
            self._launcher = subprocess.Popen(
                command,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=sys.stderr.fileno(),
                start_new_session=True,
            )
            if self.requests:
                self._pass_on(self.requests[-1])
            code = self._launcher.wait()
            # Where the launcher was killed, its ranks end by themselves.
            wait_for_processes(self._launch, patience_seconds=_PATIENCE_SECONDS)
            return code
        finally:
            self._kill_launcher()
            end_processes(self._launch, patience_seconds=_PATIENCE_SECONDS)
            self._launch, self._launcher = "", None
            if environment_file is not None:
                with suppress(OSError):
                    environment_file.unlink(missing_ok=True)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self.requests.append(signal.Signals(number))
        if self._launch:
            self._pass_on(signal.Signals(number))

    def _pass_on(self, number: signal.Signals) -> None:
        if len(self.requests) == 1:
            if self._tell_ranks(number):
                logger.warning("%s: the ranks write a checkpoint and end", number.name)
                return
            self.found_no_rank = True
        logger.warning("%s: ending at once", number.name)
        self._kill_launcher()
        signal_processes(processes_of(self._launch), signal.SIGTERM)

    def _kill_launcher(self) -> None:
        """End the launcher of this node, and with it the ranks, if they are still there.

        Of SIGTERM it makes a request to the ranks, and then waits for one after the other, half a minute each. That of
        nodes behind ssh is told by SIGTERM, because it has to end what runs there.
        """
        if self._launcher is not None and self._first_host is None:
            self._launcher.kill()

    def _tell_ranks(self, number: signal.Signals) -> bool:
        """Whether there was a rank to tell. One is enough: the ranks tell each other."""
        if self._first_host is None:
            return signal_ranks(self._launch, number) > 0
        words = [sys.executable, "-m", "cel_dist.launcher", self._launch, str(number.value)]
        path = os.environ.get("PYTHONPATH")
        if path:
            words = ["env", f"PYTHONPATH={path}", *words]
        try:
            done = subprocess.run(
                ssh_command(self._first_host, words),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                timeout=_SSH_SECONDS,
                check=False,
            )
        except subprocess.TimeoutExpired:
            return False
        return done.returncode == 0
