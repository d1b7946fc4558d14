"""The service as a process: a socket, uvicorn, and an end when it is asked to."""

import contextlib
import ipaddress
import logging
import resource
import signal
import socket
from collections.abc import Callable, Iterator

import uvicorn

from cel_dist.errors import CelError
from cel_dist.service.app import Gate, create_app, is_loopback
from cel_dist.service.limits import Limits
from cel_dist.service.speakers import Speakers
from cel_dist.service.web import bounded_connections

logger = logging.getLogger(__name__)

_OTHER_FILES = 128
"""Files that are open beside connections: the store, libraries, the listening socket."""


def listen(host: str, port: int) -> socket.socket:
    """A listening socket; with port 0, on a port that was free.

    Raises:
        CelError: the address is not of this machine, or the port is taken or not permitted.
    """
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        return socket.create_server(address[:2], family=family, backlog=128)
    except (OSError, OverflowError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise CelError(f"cannot listen on {host} port {port}: {reason}; give another --host or --port") from None


def url_of(listener: socket.socket) -> str:
    """Where a listening socket is reached from this machine."""
    host, port = listener.getsockname()[:2]
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def serve(
    speakers: Speakers,
    listener: socket.socket,
    limits: Limits,
    *,
    token: str | None = None,
    trusted_proxy: str | None = None,
    ready: Callable[[], None] = lambda: None,
) -> None:
    """Serve until SIGTERM or SIGINT; then requests that are being served are ended, and new ones not accepted.

    Args:
        speakers: model and store.
        listener: a listening socket.
        limits: of each client and of all.
        token: that clients must send; None: none.
        trusted_proxy: address of a proxy, or its network, whose word on a client's address (`X-Forwarded-For`) counts.
        ready: called when signals are seen to.

    Raises:
        CelError: the token cannot be sent in a header, the proxy is no address, or the system allows fewer open files
            than there may be connections.
    """
    if token is not None and (not token.isascii() or not token.isprintable() or token != token.strip() or not token):
        raise CelError("the token is empty or has characters that a header cannot have; give letters and digits")
    if trusted_proxy is not None:
        _require_addresses(trusted_proxy)
    _allow_files(limits.max_connections + _OTHER_FILES)
    only_this_machine = is_loopback(listener.getsockname()[0])
    if token is None and not only_this_machine:
        logger.warning("everybody who reaches this address may enrol and remove people; give --token to change that")
    config = uvicorn.Config(
        create_app(speakers, limits, Gate(token, only_this_machine)),
        http=bounded_connections(limits),
        ws="none",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=trusted_proxy is not None,
        forwarded_allow_ips=trusted_proxy,
        # Handed to `asyncio.wait_for`, which takes fractions, too.
        timeout_graceful_shutdown=limits.end_seconds,  # type: ignore[arg-type]
    )
    server = uvicorn.Server(config)
    logging.getLogger("uvicorn.error").setLevel(logging.WARNING)
    # It warns of what clients send, which is theirs to know.
    logging.getLogger("python_multipart").setLevel(logging.ERROR)
    with _ends(server):
        ready()
        server.run(sockets=[listener])


def _require_addresses(proxies: str) -> None:
    # uvicorn takes a name for something that no client's address is equal to, and so would trust nobody.
    for proxy in proxies.split(","):
        try:
            ipaddress.ip_network(proxy.strip())
        except ValueError:
            raise CelError(
                f"the trusted proxy '{proxy.strip()}' is no address; give one such as 127.0.0.1, or a network such as "
                "10.0.0.0/8"
            ) from None


def _allow_files(number: int) -> None:
    """Have the system allow so many open files: beyond what it allows, connections wait for ever."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < number:
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (number, hard))
        except (ValueError, OSError):
            raise CelError(
                f"--max-connections needs {number} open files, and the system allows {hard}; lower it, or raise that "
                "with 'ulimit -n'"
            ) from None


@contextlib.contextmanager
def _ends(server: uvicorn.Server) -> Iterator[None]:
    """Signals that come before uvicorn sees to them, and that it raises again when it is done, end it in peace."""

    def end(*_: object) -> None:
        server.should_exit = True

    former = {number: signal.signal(number, end) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)
