"""A file of lines that outlives a full disk."""

import logging
import os
from pathlib import Path

from cel_dist.data.files import sync

logger = logging.getLogger(__name__)


class LineFile:
    """Appends lines to a file. What cannot be written waits in memory, in its order, until there is room again.

    Nothing half-written stays: a line that was cut by a full disk is taken back, and written anew.

    Args:
        path: an existing file whose last line is whole. Nobody else writes it.

    Raises:
        OSError: there is no such file.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._bytes = path.stat().st_size
        self._waiting: list[bytes] = []
        self._is_told = False

    def append(self, line: str) -> None:
        """Write a line, or keep it and warn once that it could not be written."""
        self._waiting.append(line.encode() + b"\n")
        try:
            self.flush()
        except OSError as error:
            if not self._is_told:
                logger.warning(
                    "cannot write %s: %s; its lines wait in memory, make room before the run ends",
                    self._path,
                    (error.strerror or str(error)).lower(),
                )
            self._is_told = True

    def flush(self) -> None:
        """Write the lines that wait. Raises OSError if that is not possible; they go on waiting then."""
        if not self._waiting:
            return
        descriptor = os.open(self._path, os.O_WRONLY | os.O_CREAT, 0o666)
        try:
            # Bytes behind the last whole line are what a full disk has left of one.
            os.ftruncate(descriptor, self._bytes)
            while self._waiting:
                self._write(descriptor, self._waiting[0])
                self._bytes += len(self._waiting.pop(0))
        finally:
            os.close(descriptor)
        if self._is_told:
            logger.info("%s is written again, nothing is missing", self._path)
            self._is_told = False

    def sync(self) -> None:
        """Wait until what was written is on disk. Raises OSError."""
        sync(self._path)

    def _write(self, descriptor: int, line: bytes) -> None:
        written = 0
        try:
            while written < len(line):
                written += os.pwrite(descriptor, line[written:], self._bytes + written)
        except OSError:
            os.ftruncate(descriptor, self._bytes)
            raise
