"""The layer between the server and the application: connections that are bounded, bodies that nobody reads, records."""

import asyncio
import logging
import time
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from cel_dist.service.limits import Limits
from cel_dist.service.metrics import Metrics

logger = logging.getLogger(__name__)

_DRAIN_SECONDS = 2.0
_DRAIN_BYTES = 16 << 20
_METHODS = {"GET", "HEAD", "POST", "DELETE", "OPTIONS"}
_HEADERS = (
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-resource-policy", b"same-origin"),
    (b"cache-control", b"no-store"),
)


class UnreadBodies:
    """Answers to requests whose body was not read to its end: the connection is closed, but not at once.

    A server that closes while a client sends makes the client's system throw the answer away. So the answer is sent
    whole, then a part of the body is read and forgotten, within bounds, and then the connection is closed: a client
    that goes on for gigabytes meets a closed connection.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        is_read = headers.get(b"content-length", b"0") == b"0" and b"transfer-encoding" not in headers

        async def watched_receive() -> Message:
            nonlocal is_read
            message = await receive()
            is_read = is_read or not message.get("more_body", False)
            return message

        async def watched_send(message: Message) -> None:
            if is_read:
                await send(message)
            elif message["type"] == "http.response.start":
                await send({**message, "headers": [*message.get("headers", []), (b"connection", b"close")]})
            elif message.get("more_body", False):
                await send(message)
            else:
                await send({**message, "more_body": True})
                await _drain(watched_receive)
                await send({"type": "http.response.body", "body": b"", "more_body": False})

        await self._app(scope, watched_receive, watched_send)


async def _drain(receive: Receive) -> None:
    deadline, left = time.monotonic() + _DRAIN_SECONDS, _DRAIN_BYTES
    while left > 0:
        try:
            message = await asyncio.wait_for(receive(), max(deadline - time.monotonic(), 0.001))
        except (asyncio.TimeoutError, TimeoutError):
            return
        left -= len(message.get("body", b""))
        if not message.get("more_body", False):
            return


class Recorded:
    """Counts and logs each request, and adds the headers that every answer has.

    The log has no query: names of people are in there.
    """

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        begin, status = time.monotonic(), 500

        async def noting_send(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message = {**message, "headers": [*message.get("headers", []), *_HEADERS]}
            await send(message)

        try:
            await self._app(scope, receive, noting_send)
        finally:
            seconds = time.monotonic() - begin
            # The template of a route, not the path: paths are as many as clients make up.
            endpoint = getattr(scope.get("route"), "path", "other")
            method = scope["method"] if scope["method"] in _METHODS else "other"
            self._metrics.answered(method, endpoint, status, seconds)
            client = (scope.get("client") or ("unknown", 0))[0]
            logger.info("%s %s %s %d %.3f s", client, method, endpoint, status, seconds)


def bounded_connections(limits: Limits) -> type[H11Protocol]:
    """uvicorn's connections, fewer than a number, and none whose client neither sends a request nor takes an answer.

    uvicorn itself waits for ever for the head of a request and for an answer to be taken, so that a client who does
    nothing would keep a descriptor, and what was to be sent in memory.
    """

    class BoundedConnection(H11Protocol):
        _deadline: asyncio.TimerHandle | None = None
        _answer_deadline: asyncio.TimerHandle | None = None

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            # So that `pause_writing` is called as soon as a client does not take what it is sent.
            transport.set_write_buffer_limits(0)
            if len(self.connections) > limits.max_connections:
                transport.abort()
                return
            self._expect_head()

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            if self.cycle is None or self.cycle.response_complete:
                if self._deadline is None:
                    self._expect_head()
            else:
                self._cancel_deadline()

        def pause_writing(self) -> None:
            super().pause_writing()
            self._answer_deadline = self.loop.call_later(limits.read_seconds, self.transport.abort)

        def resume_writing(self) -> None:
            super().resume_writing()
            self._cancel_answer_deadline()

        def connection_lost(self, exc: Exception | None) -> None:
            self._cancel_deadline()
            self._cancel_answer_deadline()
            super().connection_lost(exc)

        def _expect_head(self) -> None:
            self._deadline = self.loop.call_later(limits.read_seconds, self.transport.abort)

        def _cancel_deadline(self) -> None:
            if self._deadline is not None:
                self._deadline.cancel()
                self._deadline = None

        def _cancel_answer_deadline(self) -> None:
            if self._answer_deadline is not None:
                self._answer_deadline.cancel()
                self._answer_deadline = None

    return BoundedConnection
