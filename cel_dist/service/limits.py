"""What one client, and all of them together, may take of the service."""

import asyncio
import ipaddress
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import TypeVar

from fastapi import Request

from cel_dist.errors import CelError

_CLIENTS_REMEMBERED = 10_000
Result = TypeVar("Result")


class Refusal(Exception):  # noqa: N818 - not a fault: what a client is told
    """A request that is not served: an HTTP status and one line."""

    def __init__(self, status: int, message: str, retry_after_seconds: float | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.retry_after_seconds = retry_after_seconds


@dataclass(frozen=True)
class Limits:
    """Bounds of the service, for each request and for all.

    Attributes:
        max_seconds: longest recording.
        max_bytes: largest body of a request.
        rate: requests a minute that one client may make; as many at once. 0: any number.
        queue: requests that may be received, wait or be worked on at one time.
        read_seconds: time that a client has to send the head of a request, as much for its body, and as much to take
            the answer.
        max_recordings: recordings that the store may hold.
        max_connections: connections that are open at one time.
        end_seconds: time that requests have to be served when the service is asked to end.

    Raises:
        CelError: a bound is not above zero (a rate: below zero).
    """

    max_seconds: float = 60.0
    max_bytes: int = 16 << 20
    rate: float = 60.0
    queue: int = 8
    read_seconds: float = 20.0
    max_recordings: int = 10_000
    max_connections: int = 512
    end_seconds: float = 10.0

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if not (value >= 0 if field.name == "rate" else value > 0) or value == float("inf"):
                raise CelError(f"{field.name}={value}; give a number above zero{', or 0' * (field.name == 'rate')}")


class RateLimit:
    """A token bucket a client: `rate` requests at once, and then as they come back, evenly over a minute.

    Clients are addresses; of IPv6, whose subscribers have many, the first 64 bits. The longest unseen is forgotten when
    there are too many to remember.
    """

    def __init__(self, rate: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._rate = rate
        self._clock = clock
        self._left: OrderedDict[str, tuple[float, float]] = OrderedDict()

    def take(self, address: str, requests: int = 1) -> None:
        """Count a request; with `requests=0`, only look whether one more is allowed.

        Raises:
            Refusal: 429, there were too many.
        """
        if not self._rate:
            return
        client, now, capacity = _client(address), self._clock(), max(self._rate, 1.0)
        left, then = self._left.pop(client, (capacity, now))
        left = min(capacity, left + (now - then) * self._rate / 60)
        self._left[client] = (left - requests if left >= 1 else left, now)
        if len(self._left) > _CLIENTS_REMEMBERED:
            self._left.popitem(last=False)
        if left < 1:
            raise Refusal(429, f"more than {self._rate:g} requests a minute; wait", (1 - left) * 60 / self._rate)


def _client(address: str) -> str:
    try:
        parsed = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return address
    if isinstance(parsed, ipaddress.IPv6Address):
        if parsed.ipv4_mapped:
            return str(parsed.ipv4_mapped)
        return str(ipaddress.ip_network((parsed, 64), strict=False))
    return str(parsed)


class Worker:
    """One thread that decodes and embeds, and the bounded number of requests that may be on their way to it.

    Args:
        queue: requests at one time. Bodies are in memory meanwhile.
    """

    def __init__(self, queue: int) -> None:
        self._queue = queue
        self._turn = asyncio.Lock()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="encoder")
        self.admitted = 0

    @contextmanager
    def place(self) -> Iterator[None]:
        """A place in the queue while the block runs.

        Raises:
            Refusal: 503, all places are taken.
        """
        if self.admitted >= self._queue:
            raise Refusal(503, "too many requests at one time; try again", 1)
        self.admitted += 1
        try:
            yield
        finally:
            self.admitted -= 1

    async def run(self, request: Request, work: Callable[[], Result]) -> Result:
        """What `work` returns, in the thread; one at a time, in the order of the calls.

        Raises:
            Refusal: the client went away before its turn.
        """
        async with self._turn:
            if await request.is_disconnected():
                raise Refusal(499, "the client went away")
            return await asyncio.get_running_loop().run_in_executor(self._thread, work)

    def close(self) -> None:
        """Wait for what is being worked on, and end the thread."""
        self._thread.shutdown(cancel_futures=True)
