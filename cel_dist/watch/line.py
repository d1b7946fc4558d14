"""A connection between two ranks that carries JSON objects and never blocks."""

import json
import socket
from typing import Any

_MAX_MESSAGE_BYTES = 1 << 16
_MAX_WAITING_BYTES = 1 << 20


class Line:
    """One JSON object a line, in both directions.

    Args:
        connection: a connected socket.

    Attributes:
        is_closed: whether the connection has ended, by either side.
        address: the other side's address.
        is_local: whether both sides are on one machine.
        rank: the rank on the other side, once it is known.
    """

    def __init__(self, connection: socket.socket) -> None:
        connection.setblocking(False)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.connection = connection
        self.is_closed = False
        self.rank: int | None = None
        try:
            self.address = _plain(connection.getpeername()[0])
        except OSError:
            # Gone before it was looked at.
            self.address, self.is_closed = "?", True
        self.is_local = self.address == _plain(connection.getsockname()[0])
        self._read = self._to_write = b""

    def send(self, **message: Any) -> None:
        """Send, or keep until `flush` can. What the other side takes no more of is dropped: it is lost anyway."""
        if len(self._to_write) < _MAX_WAITING_BYTES:
            self._to_write += json.dumps(message).encode() + b"\n"
        self.flush()

    def flush(self) -> bool:
        """Send what waits; returns whether nothing is left."""
        while self._to_write and not self.is_closed:
            try:
                self._to_write = self._to_write[self.connection.send(self._to_write) :]
            except (BlockingIOError, InterruptedError):
                return False
            except OSError:
                self.is_closed = True
        return True

    def receive(self) -> list[dict[str, Any]]:
        """Messages that have arrived. One that is no JSON object, or too long, closes the connection."""
        while not self.is_closed:
            try:
                data = self.connection.recv(1 << 16)
            except (BlockingIOError, InterruptedError):
                break
            except OSError:
                data = b""
            self.is_closed = not data
            self._read += data
            if len(self._read) > _MAX_MESSAGE_BYTES and b"\n" not in self._read[-_MAX_MESSAGE_BYTES:]:
                self.is_closed = True
        *complete, self._read = self._read.split(b"\n")
        messages = []
        for text in complete:
            try:
                message = json.loads(text)
            except ValueError:
                message = None
            if not isinstance(message, dict):
                # Not one of this job's ranks.
                self.is_closed = True
                break
            messages.append(message)
        return messages

    def end(self) -> None:
        """Let the other side know that nothing more will come. What was sent before still arrives."""
        try:
            self.connection.shutdown(socket.SHUT_WR)
        except OSError:
            self.is_closed = True

    def close(self) -> None:
        """Close the connection."""
        self.is_closed = True
        self.connection.close()


def _plain(address: str) -> str:
    """An IPv4 address as such, which a socket for both families gives as one of IPv6.

    >>> _plain("::ffff:10.0.0.2"), _plain("fd00::1")
    ('10.0.0.2', 'fd00::1')
    """
    return address.removeprefix("::ffff:")
