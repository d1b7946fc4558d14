"""Formats that libsndfile does not read, decoded by the program ffmpeg where it is installed."""

import os
import re
import shutil
import struct
import subprocess
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np
import numpy.typing as npt

FFMPEG_SUFFIXES = frozenset({".m4a", ".aac", ".mp4", ".wma", ".webm", ".mka"})
"""Lower-case file suffixes that are left to ffmpeg."""

DEADLINE_SECONDS = 600.0
"""An ffmpeg that gives nothing for so long is given up. What whoever reads it does meanwhile does not count."""

# What such files may be. A playlist under their name would make ffmpeg open other files and addresses.
_FORMATS = "mov,aac,asf,matroska,mp3,ogg,wav,flac"
# The header of AU: magic, where the samples begin, bytes of samples (unknown in a stream), encoding, rate, channels.
_AU_HEADER = struct.Struct(">4sIIIII")
_BIG_ENDIAN_FLOAT = 6
_MESSAGE_BYTES = 4096


class FFmpegError(Exception):
    """A file that ffmpeg could not decode, or no ffmpeg; one line."""


@dataclass(frozen=True)
class DecodedStream:
    """Samples as ffmpeg decodes them."""

    rate_hz: int
    channels: int
    _pipe: IO[bytes]
    _waiting: Callable[[], AbstractContextManager[None]]

    def read(self, frames: int) -> npt.NDArray[np.float32]:
        """The next samples, float32 `[frames, channels]`, fewer only at the end."""
        with self._waiting():
            data = self._pipe.read(frames * self.channels * 4)
        whole = len(data) // (4 * self.channels)
        return np.frombuffer(data, ">f4", whole * self.channels).astype(np.float32).reshape(whole, self.channels)


def needs_ffmpeg(path: str | os.PathLike[str]) -> bool:
    """Whether a file of this name is left to ffmpeg."""
    return os.path.splitext(path)[1].lower() in FFMPEG_SUFFIXES


def is_installed() -> bool:
    """Whether there is a program ffmpeg on the `PATH`."""
    return shutil.which("ffmpeg") is not None


def is_lacking(paths: Iterable[str]) -> bool:
    """Whether any of these files needs ffmpeg, and there is none."""
    return any(map(needs_ffmpeg, paths)) and not is_installed()


@contextmanager
def decoded(path: Path, deadline_seconds: float = DEADLINE_SECONDS) -> Iterator[DecodedStream]:
    """The first audio stream of a file, in its own rate and channels. The block must read it to its end.

    Raises:
        FFmpegError: ffmpeg is not installed, does not know the format, met damage, or gave nothing until the deadline.
            All but the first are known only when the block ends.
    """
    program = shutil.which("ffmpeg")
    if program is None:
        raise FFmpegError(f"{path.suffix.lower()} needs ffmpeg, which is not installed; install it and run again")
    # `file:` keeps a name from being taken for an option or an address. -xerror: damage is not decoded around.
    source = ["-protocol_whitelist", "file", "-format_whitelist", _FORMATS, "-threads", "1", "-i", f"file:{path}"]
    target = ["-map", "0:a:0", "-c:a", "pcm_f32be", "-f", "au", "-protocol_whitelist", "pipe", "pipe:1"]
    command = [program, "-nostdin", "-hide_banner", "-v", "error", "-xerror", *source, *target]
    with tempfile.TemporaryFile() as messages:
        process = subprocess.Popen(
            [os.fsencode(word) for word in command],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=messages,
        )
        assert process.stdout is not None
        expired = threading.Event()

        def give_up() -> None:
            expired.set()
            process.kill()

        @contextmanager
        def waiting() -> Iterator[None]:
            timer = threading.Timer(deadline_seconds, give_up)
            timer.start()
            try:
                yield
            finally:
                timer.cancel()

        try:
            with waiting():
                header = process.stdout.read(_AU_HEADER.size)
            if len(header) == _AU_HEADER.size:
                yield _stream(header, process.stdout, waiting)
            # A block that stopped reading gets an error of ffmpeg's, and no process that waits for it for ever.
            process.stdout.close()
            with waiting():
                returncode = process.wait()
        finally:
            process.kill()
            process.wait()
            process.stdout.close()
        if expired.is_set():
            raise FFmpegError(f"ffmpeg gave nothing for {deadline_seconds:g} s")
        if returncode != 0 or len(header) < _AU_HEADER.size:
            messages.seek(0)
            raise FFmpegError(f"ffmpeg: {_reason(messages.read(_MESSAGE_BYTES), path)}")


def _stream(header: bytes, pipe: IO[bytes], waiting: Callable[[], AbstractContextManager[None]]) -> DecodedStream:
    magic, begin, _, encoding, rate_hz, channels = _AU_HEADER.unpack(header)
    if (magic, encoding) != (b".snd", _BIG_ENDIAN_FLOAT):
        raise FFmpegError("ffmpeg wrote something else than asked for; install another version of it")
    pipe.read(begin - _AU_HEADER.size)
    return DecodedStream(rate_hz, channels, pipe, waiting)


def _reason(messages: bytes, path: Path) -> str:
    """The first line that ffmpeg wrote, without what differs from run to run or place to place."""
    text = messages.decode(errors="replace").strip()
    line = text.split("\n", 1)[0] or "no audio came out"
    return re.sub(r" @ 0x[0-9a-f]+", "", line.replace(f"file:{path}: ", ""))
