"""Files of a store that fsspec reaches, read so that a broken connection costs no more than what it had not brought."""

import logging
import random
import time
from collections.abc import Callable
from typing import IO, Any, TypeVar

logger = logging.getLogger(__name__)

_CHUNK_BYTES = 4 << 20
_SMALLEST_CHUNK_BYTES = 1 << 16
# Requests on their way at once: one connection to an object store brings some 50 MB/s, far less than a network.
_CONCURRENT = 8
_FIRST_PAUSE, _LONGEST_PAUSE = 0.25, 20.0
_STALL_SECONDS = 30.0
_NOT_FOUND = 404
_RANGE_NOT_SATISFIABLE = 416
# Too slow, too early, too often: of the answers that blame the one who asks, these may be another one the next time.
_TRANSIENT = (408, 425, 429)

Result = TypeVar("Result")


class RemoteError(Exception):
    """A file that cannot be had; the message says which, why, and how long it was tried."""


def is_remote(location: str) -> bool:
    """Whether a location is a URL, not a path."""
    return "://" in location or location.startswith("file:")


class RemoteFolder:
    """A folder of a store. It may be handed to other processes: they connect anew.

    Args:
        url: `http://`, `https://`, `s3://` or `file://`, the last with the path as it is, nothing escaped. Credentials
            come from the environment, as the store's own tools take them.
        patience: seconds without any progress after which a transfer is given up.
    """

    def __init__(self, url: str, patience: float) -> None:
        self.url = url.rstrip("/")
        self._patience = patience
        self._system: Any = None
        self._has_ranges = True

    def read(self, name: str) -> bytes:
        """The content of a file that fits into memory.

        Raises:
            RemoteError: it is not there, may not be read, or did not come.
        """
        return self._persist(name, lambda: bytes(self._connected().cat_file(f"{self.url}/{name}")), Patience(self))

    def size(self, name: str, patience_seconds: float | None = None) -> int:
        """The length in bytes that the store says a file has.

        Args:
            name: of the file in the folder.
            patience_seconds: how long to try, if not as long as for a transfer.

        Raises:
            RemoteError: it is not there, may not be read, the store does not say, or did not answer.
        """

        def ask() -> int | None:
            url = f"{self.url}/{name}"
            try:
                size: int | None = self._connected().info(url)["size"]
            except FileNotFoundError as error:
                # Of HTTP, fsspec says this of every failure; what it was is the cause.
                if error.__cause__ is None or getattr(error.__cause__, "status", None) == _NOT_FOUND:
                    raise
                raise error.__cause__ from None
            if size and size > 1 and self.url.startswith("http"):
                # A server without ranges answers with the whole file, which `cat_ranges` would read into memory.
                with self._connected().open(url, "rb", block_size=1, cache_type="none", size=size) as file:
                    file.seek(1)
                    try:
                        file.read(1)
                    except ValueError:
                        self._has_ranges = False
            return size

        size = self._persist(name, ask, Patience(self, patience_seconds))
        if size is None:
            raise RemoteError(f"{self.url} does not say how long {name} is")
        return size

    def fetch(self, name: str, size: int, file: IO[bytes]) -> None:
        """Append to `file` what it lacks of the `size` bytes of a file of the store.

        Args:
            name: of the file in the folder.
            size: how long it must be.
            file: opened for appending; holds the beginning, or nothing.

        Raises:
            RemoteError: it is not there, has another size, may not be read, or did not come. What did come is in
                `file`.
            OSError: `file` cannot be written.
        """
        patience = Patience(self)
        while file.tell() < size:
            take = self._fetch_ranges if self._has_ranges else self._fetch_stream
            self._persist(name, lambda: take(name, size, file, patience), patience)  # noqa: B023 (called at once)

    def _fetch_ranges(self, name: str, size: int, file: IO[bytes], patience: "Patience") -> None:
        begin = file.tell()
        # One request before there are several: the store may have no such file, or no ranges.
        chunks = _CONCURRENT if patience.has_seen_bytes else 1
        length = patience.chunk_bytes
        starts = list(range(begin, min(size, begin + chunks * length), length))
        ends = [min(start + length, size) for start in starts]
        paths = [f"{self.url}/{name}"] * len(starts)
        parts = self._connected().cat_ranges(paths, starts, ends, max_gap=None, on_error="return")
        for start, end, part in zip(starts, ends, parts, strict=True):
            if isinstance(part, BaseException):
                raise part
            if len(part) > end - start:
                # Only an HTTP server may be without ranges; it answers with all it has.
                self._has_ranges = False
                file.seek(0)
                file.truncate()
                part = part[:size]
            elif len(part) < end - start:
                # Not a broken connection, which is an exception.
                raise RemoteError(f"{self.url}/{name} has {start + len(part)} bytes, the manifest says {size}")
            _write(file, part)
            patience.renew(file.tell())

    def _fetch_stream(self, name: str, size: int, file: IO[bytes], patience: "Patience") -> None:
        file.seek(0)
        file.truncate()
        with self._connected().open(f"{self.url}/{name}", "rb", block_size=0) as stream:
            while file.tell() < size and (part := stream.read(min(_CHUNK_BYTES, size - file.tell()))):
                _write(file, part)
                # What came again is no progress.
                patience.renew(file.tell())
        if file.tell() != size:
            raise RemoteError(f"{self.url}/{name} has {file.tell()} bytes, the manifest says {size}")

    def _persist(self, name: str, action: Callable[[], Result], patience: "Patience") -> Result:
        """Repeat `action` until it succeeds, fails for good, or patience ends."""
        pause = _FIRST_PAUSE
        while True:
            begun = patience.renewed
            try:
                return action()
            except LocalWriteError as error:
                raise error.cause from None
            except RemoteError:
                raise
            except FileNotFoundError:
                raise RemoteError(f"{self.url}/{name} is not there") from None
            except PermissionError:
                raise RemoteError(f"{self.url}/{name} may not be read") from None
            except ImportError as error:
                raise RemoteError(f"reading {self.url} needs another package ({error})") from None
            except Exception as error:
                # Every store has exceptions of its own for a connection that broke, stalled or was refused.
                reason = f"{type(error).__name__} {error}".strip()
                status = getattr(error, "status", None)
                if status == _RANGE_NOT_SATISFIABLE:
                    raise RemoteError(f"{self.url}/{name} has fewer bytes than the manifest says") from None
                if isinstance(status, int) and 400 <= status < 500 and status not in _TRANSIENT:
                    raise RemoteError(f"{self.url}/{name} may not be read (HTTP status {status})") from None
            if patience.renewed > begun:
                pause = _FIRST_PAUSE
            # A chunk comes whole or not at all; over a line that breaks often only a short one comes.
            patience.chunk_bytes = max(patience.chunk_bytes // 2, _SMALLEST_CHUNK_BYTES)
            if patience.ends(pause):
                raise RemoteError(f"{self.url}/{name} did not come ({reason}), given up after {patience.seconds:g} s")
            logger.warning("%s/%s: %s; trying again in %.1f s", self.url, name, reason, pause)
            time.sleep(pause * random.uniform(0.5, 1.0))
            pause = min(2 * pause, _LONGEST_PAUSE)

    def _connected(self) -> Any:
        if self._system is None:
            import fsspec

            protocol = self.url.partition("://")[0]
            self._system = fsspec.filesystem(protocol, **_options(protocol, min(_STALL_SECONDS, self._patience / 2)))
        return self._system

    @property
    def patience_seconds(self) -> float:
        """Seconds without progress after which a transfer is given up."""
        return self._patience

    def __getstate__(self) -> dict[str, Any]:
        # Connections and the thread that serves them belong to one process.
        return {**self.__dict__, "_system": None}


class Patience:
    """Time that is left for a transfer; it is full again whenever it has come further than ever."""

    def __init__(self, folder: RemoteFolder, seconds: float | None = None) -> None:
        self.seconds = folder.patience_seconds if seconds is None else seconds
        self.renewed = time.monotonic()
        self.chunk_bytes = _CHUNK_BYTES
        self._furthest = 0

    @property
    def has_seen_bytes(self) -> bool:
        """Whether anything has come."""
        return self._furthest > 0

    def renew(self, position: int) -> None:
        """So many bytes are there."""
        if position > self._furthest:
            self._furthest, self.renewed = position, time.monotonic()

    def ends(self, pause: float) -> bool:
        """Whether it ends within a pause of so many seconds."""
        return time.monotonic() + pause > self.renewed + self.seconds


class LocalWriteError(Exception):
    """The file here could not be written, which trying again does not mend."""

    def __init__(self, cause: OSError) -> None:
        super().__init__(str(cause))
        self.cause = cause


def _write(file: IO[bytes], part: bytes) -> None:
    try:
        file.write(part)
        file.flush()
    except OSError as error:
        raise LocalWriteError(error) from None


def _options(protocol: str, stall_seconds: float) -> dict[str, Any]:
    """Settings of a store's connections: a server that falls silent is a failure, not a reason to wait."""
    if protocol in ("http", "https"):
        import aiohttp

        timeout = aiohttp.ClientTimeout(total=None, sock_connect=stall_seconds, sock_read=stall_seconds)
        return {"client_kwargs": {"timeout": timeout}, "skip_instance_cache": True}
    if protocol == "s3":
        timeouts = {"connect_timeout": stall_seconds, "read_timeout": stall_seconds}
        # Retries are counted here, once.
        return {"config_kwargs": {**timeouts, "retries": {"max_attempts": 0}}, "skip_instance_cache": True}
    return {}
