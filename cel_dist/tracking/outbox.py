"""What waits to be sent to MLflow, and the thread that sends it.

Training only puts things in, which never waits. While the server is away they stay here, and are tried again. What is
here when a process ends, or is killed, is not lost: metrics are in the files of the run folder (`recorded`), from where
the next process sends them, and files are where they were.
"""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from cel_dist.errors import CelError
from cel_dist.tracking.connection import first_line
from cel_dist.tracking.recorded import Point

logger = logging.getLogger(__name__)

RETRY_SECONDS = 30.0
_POINTS_A_CALL = 1000  # MLflow's own limit


class Task(NamedTuple):
    """Something to be done once besides metrics; `what` completes "MLflow did not take ..."."""

    what: str
    do: Callable[[], None]


class Outbox:
    """A thread that sends points and does tasks, in order, and tries again what failed.

    A point is sent only if its step lies behind the last one that the server has of its name. So what a resumed run
    goes through a second time, or what a server took although its answer got lost, is there once.

    Args:
        where: the server, for messages.
        open_run: called first, again until it does not raise; returns the last step of each metric at the server.
        send: sends up to 1000 points.
        earlier: points that may not have been sent by an earlier process; read after `open_run`.
    """

    def __init__(
        self,
        where: str,
        open_run: Callable[[], dict[str, int]],
        send: Callable[[Sequence[Point]], None],
        earlier: Callable[[], Iterable[Point]],
    ) -> None:
        self._where, self._open_run, self._send, self._earlier = where, open_run, send, earlier
        self._points: deque[Point] = deque()
        self._tasks: list[Task] = []
        self._last_steps: dict[str, int] = {}
        self._told: set[str] = set()
        self._is_open = False
        self._error: Exception | None = None
        self._retry_at = 0.0
        # Attempts that somebody waits for, and the last of them that is over.
        self._wanted = self._done = 0
        self._is_closed = False
        self._changed = threading.Condition()
        # A daemon, because a server that accepts a connection and says nothing must not keep the process from ending.
        self._thread = threading.Thread(target=self._work, name="mlflow", daemon=True)
        self._thread.start()

    def put(self, points: Iterable[Point]) -> None:
        """Send points when it is possible."""
        with self._changed:
            self._points.extend(points)
            self._changed.notify_all()

    def put_task(self, task: Task) -> None:
        """Do a task when it is possible."""
        with self._changed:
            self._tasks.append(task)
            self._changed.notify_all()

    @property
    def is_open(self) -> bool:
        """Whether the server has answered once."""
        return self._is_open

    def wait_until_open(self, seconds: float) -> Exception | None:
        """Wait until the run is open or could not be opened; why it is not, after `seconds` at the latest."""
        with self._changed:
            self._changed.wait_for(lambda: self._is_open or self._error is not None, seconds)
            if self._is_open:
                return None
            return self._error or TimeoutError(f"the server does not answer within {seconds:.0f} seconds")

    def flush(self, seconds: float) -> bool:
        """Try now to send everything, for so many seconds; returns whether nothing is left."""
        with self._changed:
            self._wanted += 1
            wanted = self._wanted
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._done >= wanted, seconds)
            return self._done >= wanted and self._is_open and not self._points and not self._tasks

    def close(self) -> None:
        """Let the thread end; it sends no more."""
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()

    def left(self) -> tuple[int, list[str]]:
        """How many values still wait, and what else does."""
        with self._changed:
            return len(self._points), [task.what for task in self._tasks]

    def _work(self) -> None:
        while True:
            with self._changed:
                while not self._is_due():
                    waits = bool(self._points or self._tasks) or not self._is_open
                    self._changed.wait(max(0.0, self._retry_at - time.monotonic()) if waits else None)
                if self._is_closed:
                    return
                wanted = self._wanted
            error = self._attempt()
            with self._changed:
                self._tell(error)
                self._error = error
                self._retry_at = time.monotonic() + RETRY_SECONDS if error else 0.0
                self._done = wanted
                self._changed.notify_all()

    def _is_due(self) -> bool:
        has_work = self._points or self._tasks or not self._is_open
        return self._is_closed or self._wanted > self._done or (has_work and time.monotonic() >= self._retry_at)

    def _attempt(self) -> Exception | None:
        """Send what there is; what stopped it, if it was not everything.

        Whatever MLflow, its database driver or the network raise must end neither the thread nor the training: it is
        told, and tried again.
        """
        try:
            if not self._is_open:
                self._open()
            while batch := self._next_points():
                self._send(batch)
                with self._changed:
                    for point in batch:
                        self._points.popleft()
                        self._last_steps[point.name] = point.step
        except Exception as error:
            return error
        failed: Exception | None = None
        for task in list(self._tasks):
            try:
                task.do()
            except Exception as error:
                if task.what not in self._told:
                    self._told.add(task.what)
                    logger.warning("MLflow at %s did not take %s: %s", self._where, task.what, _said(error))
                failed = error
            else:
                with self._changed:
                    self._tasks.remove(task)
        return failed

    def _open(self) -> None:
        last_steps = self._open_run()
        earlier = list(self._earlier())
        with self._changed:
            self._last_steps = last_steps
            self._points.extendleft(reversed(earlier))
            self._is_open = True
            self._changed.notify_all()

    def _next_points(self) -> list[Point]:
        """The next points that the server does not have, as many as go into a call; what it has is dropped."""
        with self._changed:
            batch: list[Point] = []
            last_steps: dict[str, int] = {}
            while self._points and len(batch) < _POINTS_A_CALL:
                point = self._points.popleft()
                if point.step > max(self._last_steps.get(point.name, -1), last_steps.get(point.name, -1)):
                    last_steps[point.name] = point.step
                    batch.append(point)
            # They stay until the server has taken them.
            self._points.extendleft(reversed(batch))
            return batch

    def _tell(self, error: Exception | None) -> None:
        if error is None and self._error is not None:
            logger.info("MLflow at %s answers again and has everything", self._where)
        elif error is not None and self._error is None and self._is_open and self._points:
            logger.warning(
                "MLflow at %s takes no metrics, %d values wait and are sent later: %s",
                self._where,
                len(self._points),
                _said(error),
            )


def _said(error: Exception) -> str:
    return str(error) if isinstance(error, CelError) else first_line(error)
