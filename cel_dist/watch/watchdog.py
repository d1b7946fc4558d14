"""The watchdog of a rank: says which rank is lost or stands still, and ends this process when one is.

A thread in every rank keeps a connection of its own to rank 0, apart from the collectives, so that it can tell what a
collective that hangs or fails cannot: who is gone. Ranks send signs of life and where they are; rank 0 judges and tells
all the others. A rank that does not hear of rank 0 judges for itself.
"""

import logging
import os
import selectors
import socket
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable
from contextlib import ExitStack, suppress
from types import FrameType
from typing import Any

from cel_dist.distributed import World
from cel_dist.errors import ALREADY_SAID, RunError
from cel_dist.watch.line import Line
from cel_dist.watch.roster import Finding, Limits, Position, Roster

logger = logging.getLogger(__name__)

# The main thread, when it hears of a finding by a failing collective, leaves in the regular way within this.
_LEAVING_SECONDS = 15.0
# One that hangs does not hear of it.
_HANGING_SECONDS = 5.0
_CLOSING_SECONDS = 2.0
_CONNECT_SECONDS = 3.0


def listen() -> socket.socket:
    """A socket on a free port of all addresses of this machine, for the watchdog of rank 0."""
    if socket.has_dualstack_ipv6():
        return socket.create_server(("", 0), family=socket.AF_INET6, dualstack_ipv6=True, backlog=1024)
    return socket.create_server(("", 0), backlog=1024)


class Watchdog:
    """Watches the ranks of a job from one of them. A context manager: it watches within the block.

    Args:
        world: this rank's place.
        limits: patience.
        main: host and port where the watchdog of rank 0 is reached.
        token: what all ranks of this job, and no others, know.
        listener: of rank 0, bound to that port.
        on_patience: called in the main thread with the seconds that a collective may take from here on, when these
            change from `limits.collective(True)`, and again.
    """

    def __init__(
        self,
        world: World,
        limits: Limits = Limits(),  # noqa: B008
        *,
        main: tuple[str, int] = ("", 0),
        token: str = "",
        listener: socket.socket | None = None,
        on_patience: Callable[[float], None] = lambda seconds: None,
    ) -> None:
        self._world, self._limits, self._main, self._token = world, limits, main, token
        self._on_patience, self._patience = on_patience, limits.collective(True)
        self._position, self._first_step = Position(), 0
        self._main_thread = threading.get_ident()
        now = time.monotonic()
        # Rank 0 needs itself there, to see who is behind whom.
        self._roster = Roster(range(world.size) if world.is_main else [0], limits, now)
        self._listener = listener
        self._lines: dict[int, Line] = {}
        self._strangers: set[Line] = set()
        self._local: set[int] = set()
        self._outbox: deque[dict[str, Any]] = deque()
        self._is_asked = self._is_closing = False
        self._finding: Finding | None = None
        self._found, self._joined = threading.Event(), threading.Event()
        if world.is_main:
            self._joined.set()
        self._deadline: float | None = None
        self._next_beat = self._next_look = self._awake = now
        self._ends = list(socket.socketpair()) if world.size > 1 else []
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> "Watchdog":
        if self._world.size > 1:
            for end in self._ends:
                end.setblocking(False)
            self._thread.start()
            # From the first collective on the end of a process is to be seen. Rank 0 waits in that for all the others.
            self._joined.wait(self._limits.peer)
        return self

    def __exit__(self, *error: object) -> None:
        self._is_closing = True
        if self._world.size > 1:
            self._wake()
            self._thread.join(2 * _CLOSING_SECONDS + _CONNECT_SECONDS)

    def at(self, step: int, doing: str, *, alone: bool = False) -> None:
        """Note where this rank is. All ranks call it alike, in the same order.

        Args:
            step: the step that is next to be completed, counted from 1.
            doing: what begins here, for people.
            alone: whether one rank may work for long there while the others wait for it.
        """
        self._first_step = self._first_step or step
        patient = alone or step <= self._first_step
        self._position = Position(self._position.passed + 1, step, doing, patient)
        patience = self._limits.collective(patient)
        if patience != self._patience:
            self._patience = patience
            self._on_patience(patience)

    def explain(self, failure: str) -> RunError:
        """What became of the others, after a collective has failed here with the words `failure`.

        Waits for it at most a little longer than a rank may be silent.
        """
        if self._world.size > 1:
            self._is_asked = True
            self._tell(ask=True)
            self._found.wait(self._limits.peer + 2 * self._limits.beat + 1)
        if self._finding is not None:
            # From now on the main thread is on its way.
            self._deadline = time.monotonic() + _LEAVING_SECONDS
            return RunError(self._finding.text, said_by=ALREADY_SAID)
        return RunError(
            f"rank {self._world.rank} lost its connection to others at {self._position}, though all are heard of: "
            f"{failure}"
        )

    def failed(self, words: str) -> None:
        """Let the others know why this rank ends."""
        self._tell(failed=words)

    def done(self) -> None:
        """Let the others know that this rank has come to its regular end."""
        self._tell(done=True)

    def _tell(self, **message: Any) -> None:
        self._outbox.append(message)
        self._wake()

    def _wake(self) -> None:
        with suppress(OSError):
            self._ends[1].send(b"-") if self._ends else None

    # What follows runs in the watchdog's thread.

    def _watch(self) -> None:
        with ExitStack() as held:
            selector = held.enter_context(selectors.DefaultSelector())
            for opened in [*self._ends, *([self._listener] if self._listener else [])]:
                held.callback(opened.close)
            selector.register(self._ends[0], selectors.EVENT_READ, self._woken)
            if self._listener:
                self._listener.setblocking(False)
                selector.register(self._listener, selectors.EVENT_READ, lambda: self._accept(selector))
            tick = min(self._limits.beat / 2, 0.25)
            until, ended = None, set[Line]()
            self._awake = time.monotonic()
            while True:
                for key, _ in selector.select(max(0.0, self._next_look - time.monotonic())):
                    key.data()
                now = time.monotonic()
                if (stood_still := now - self._awake - tick) > max(1.0, self._limits.beat):
                    self._roster.forgive(stood_still)
                self._awake = now
                if now < self._next_look:
                    # Rank 0 of a large job hears of somebody all the time.
                    continue
                self._next_look = now + tick
                self._send(now, selector)
                if self._is_closing:
                    if until is None:
                        until = now + _CLOSING_SECONDS
                        if self._listener:
                            selector.unregister(self._listener)
                            self._listener.close()
                    for line in set(self._lines.values()) - ended:
                        if line.flush():
                            line.end()
                            ended.add(line)
                    if now >= until or not self._lines:
                        break
                elif self._finding is None:
                    self._judge(now)
                elif self._deadline is not None and now > self._deadline:
                    if self._finding.kind == "failed" and self._world.rank in self._finding.ranks:
                        # On the way out with this on its lips.
                        logger.error("error: %s", self._finding.text)
                    _end_process()
            for line in [*self._lines.values(), *self._strangers]:
                line.close()

    def _woken(self) -> None:
        with suppress(OSError):
            self._ends[0].recv(1024)
        self._next_look = 0.0

    def _accept(self, selector: selectors.BaseSelector) -> None:
        assert self._listener is not None
        with suppress(OSError):
            line = Line(self._listener.accept()[0])
            self._strangers.add(line)
            selector.register(line.connection, selectors.EVENT_READ, lambda: self._hear(line, selector))

    def _connect(self, selector: selectors.BaseSelector, now: float) -> None:
        try:
            line = Line(socket.create_connection(self._main, min(_CONNECT_SECONDS, self._limits.peer / 2)))
        except ConnectionRefusedError:
            # The machine answers, the process is no more.
            self._roster.closed(0, now, surely=True)
            return
        except OSError:
            # Whether it is to be waited for is a matter of how long nothing was heard. What this took counts.
            self._awake = time.monotonic()
            return
        self._lines[0], line.rank = line, 0
        selector.register(line.connection, selectors.EVENT_READ, lambda: self._hear(line, selector))
        line.send(hello=self._world.rank, token=self._token, host=socket.gethostname())
        self._next_beat = now

    def _hear(self, line: Line, selector: selectors.BaseSelector) -> None:
        now = time.monotonic()
        try:
            for message in line.receive():
                if line.rank is not None:
                    self._take(line.rank, line, message, now)
                elif message["token"] == self._token:
                    self._welcome(line, int(message["hello"]), str(message["host"]), now)
                else:
                    line.is_closed = True
        except (KeyError, TypeError, ValueError):
            # Somebody else's idea of a message.
            line.is_closed = True
        if line.is_closed:
            selector.unregister(line.connection)
            line.close()
            self._strangers.discard(line)
            self._next_look = 0.0
            if (rank := line.rank) is not None and self._lines.get(rank) is line:
                del self._lines[rank]
                if self._world.is_main:
                    # A launcher that notices the same ends its other ranks within a second.
                    self._roster.closed(rank, now, surely=line.is_local)

    def _welcome(self, line: Line, rank: int, host: str, now: float) -> None:
        if not 0 < rank < self._world.size:
            raise ValueError(rank)
        if rank in self._lines:
            # It has come back before its former connection was seen to end.
            former = self._lines.pop(rank)
            former.rank = None
            former.end()
        self._strangers.discard(line)
        self._lines[rank], line.rank = line, rank
        if line.is_local:
            self._local.add(rank)
        self._roster.came(rank, host, line.address, now)
        line.send(host=socket.gethostname())

    def _take(self, rank: int, line: Line, message: dict[str, Any], now: float) -> None:
        if "beat" in message:
            self._roster.beat(rank, Position(*message["beat"]), now)
            if self._world.is_main:
                line.send(beat=self._where())
        elif "host" in message:
            if line.is_local:
                self._local.add(rank)
            self._roster.came(rank, str(message["host"]), line.address, now)
            self._joined.set()
        elif "ask" in message:
            self._is_asked, self._next_look = True, 0.0
        elif "failed" in message:
            self._roster.failed(rank, str(message["failed"]), now)
        elif "done" in message:
            self._roster.done(rank)
        elif "finding" in message:
            kind, text, ranks = message["finding"]
            self._conclude(Finding(kind, str(text), tuple(ranks)), now, is_said=True)

    def _send(self, now: float, selector: selectors.BaseSelector) -> None:
        if self._world.is_main:
            # What the others have from the answers to their beats.
            self._roster.beat(0, self._where(), now)
        elif not self._lines and not self._roster.is_done(0) and not self._is_closing:
            self._connect(selector, now)
        while self._outbox and (self._lines or self._world.is_main):
            message = self._outbox.popleft()
            for line in self._lines.values():
                line.send(**message)
        if not self._world.is_main and not self._is_closing and now >= self._next_beat:
            self._next_beat = now + self._limits.beat
            for line in self._lines.values():
                line.send(beat=self._where())
        for line in self._lines.values():
            line.flush()

    def _judge(self, now: float) -> None:
        finding = self._roster.lost(now, asked=self._is_asked)
        if finding is None and self._world.is_main:
            finding = self._roster.stalled(now)
        if finding is None:
            return
        if self._world.is_main:
            self._tell(finding=finding)
            # Its own words are in the log of this machine already.
            is_said = finding.kind == "failed" and finding.ranks[0] in self._local
        else:
            # Rank 0 is lost: one line a machine.
            first = 1 if 0 in self._local else 0
            is_said = self._world.local_rank != first or (finding.kind == "failed" and 0 in self._local)
        self._conclude(finding, now, is_said=is_said)

    def _conclude(self, finding: Finding, now: float, *, is_said: bool) -> None:
        if self._finding is not None:
            return
        if not is_said:
            logger.error("error: %s", finding.text)
        if finding.kind == "stalled" and self._world.rank in finding.ranks:
            logger.error("rank %d is here:\n%s", self._world.rank, "".join(traceback.format_stack(self._frame())))
        self._finding = finding
        self._deadline = now + (_LEAVING_SECONDS if self._is_asked else min(_HANGING_SECONDS, self._limits.peer))
        self._found.set()

    def _where(self) -> Position:
        frame = self._frame()
        while frame is not None:
            package = frame.f_globals.get("__name__", "").partition(".")[0]
            if package not in ("torch", "deepspeed") and package not in sys.stdlib_module_names:
                place = f"{os.path.basename(frame.f_code.co_filename)}:{frame.f_lineno} ({frame.f_code.co_name})"
                return self._position._replace(where=place)
            frame = frame.f_back
        return self._position

    def _frame(self) -> FrameType | None:
        return sys._current_frames().get(self._main_thread)


def _end_process() -> None:
    """End this process though its main thread hangs."""
    logging.shutdown()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            stream.flush()
    os._exit(1)
