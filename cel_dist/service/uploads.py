"""Audio out of the bodies of requests: read into memory up to a limit, never onto a disk, and decoded up to a limit."""

import asyncio
import io
from typing import Any

import numpy as np
from fastapi import Request
from numpy.typing import NDArray
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header
from starlette.requests import ClientDisconnect

from cel_dist.data.audio import SAMPLE_RATE, AudioError, audio_blocks
from cel_dist.service.limits import Limits, Refusal

_MAX_PARTS = 10
_BLOCK_SECONDS = 2.0


async def read_uploads(request: Request, limits: Limits) -> list[bytes]:
    """The recordings in the body of a request: the body itself, or each part with a file name of a form.

    Starlette's own parser of forms is not used: above 1 MB it writes to a disk.

    Raises:
        Refusal: 408 the body does not come, 413 it is too large, 415 it is compressed, 400 it is empty or no
            form where it says it is one, 499 the client went away.
    """
    if request.headers.get("content-encoding", "identity") != "identity":
        raise Refusal(415, "the body is compressed; send the audio file as it is")
    declared = request.headers.get("content-length", "0")
    if not declared.isdecimal() or int(declared) > limits.max_bytes:
        raise _too_large(limits)
    kind, options = parse_options_header(request.headers.get("content-type", ""))
    if kind == b"multipart/form-data":
        form: _Form | _Body = _Form(options.get(b"boundary", b""))
    else:
        form = _Body()
    try:
        await asyncio.wait_for(_feed(request, form, limits), limits.read_seconds)
        recordings = form.recordings()
    except (asyncio.TimeoutError, TimeoutError):
        raise Refusal(408, f"the body did not come within {limits.read_seconds:g} s; try again") from None
    except ClientDisconnect:
        raise Refusal(499, "the client went away") from None
    except FormParserError:
        raise Refusal(400, "the body is no form, though its content type says so; send the audio file alone") from None
    if not recordings or not all(recordings):
        raise Refusal(400, "there is no audio in the request; send a file as its body, or as a form")
    return recordings


async def _feed(request: Request, form: "_Form | _Body", limits: Limits) -> None:
    received = 0
    async for chunk in request.stream():
        received += len(chunk)
        if received > limits.max_bytes:
            raise _too_large(limits)
        if chunk:
            form.write(chunk)
    form.end()


def _too_large(limits: Limits) -> Refusal:
    return Refusal(413, f"the body is larger than {limits.max_bytes} bytes; send a shorter recording")


class _Body:
    """A body that is an audio file."""

    def __init__(self) -> None:
        self._buffer = io.BytesIO()

    def write(self, chunk: bytes) -> None:
        self._buffer.write(chunk)

    def end(self) -> None:
        pass

    def recordings(self) -> list[bytes]:
        # Not a copy: the bytes and the buffer share their memory.
        return [self._buffer.getvalue()]


class _Form:
    """A body that is a form: what its parts with file names hold. The names themselves are not looked at."""

    def __init__(self, boundary: bytes) -> None:
        if not boundary:
            raise Refusal(400, "the form has no boundary; send the audio file as the body")
        self._files: list[io.BytesIO] = []
        self._parts = 0
        self._header = bytearray()
        self._value = bytearray()
        self._is_file = False
        self._is_whole = False
        callbacks: Any = {
            "on_part_begin": self._begin,
            "on_header_begin": self._begin_header,
            "on_header_field": lambda data, start, end: self._header.extend(data[start:end]),
            "on_header_value": lambda data, start, end: self._value.extend(data[start:end]),
            "on_header_end": self._end_header,
            "on_headers_finished": self._end_headers,
            "on_part_data": self._data,
            "on_end": self._finish,
        }
        try:
            self._parser = MultipartParser(boundary, callbacks)
        except FormParserError:
            raise Refusal(400, "the boundary of the form is too long; send the audio file as the body") from None

    def write(self, chunk: bytes) -> None:
        self._parser.write(chunk)

    def end(self) -> None:
        if not self._is_whole:
            raise Refusal(400, "the form ends before its last boundary; send it again")

    def recordings(self) -> list[bytes]:
        return [file.getvalue() for file in self._files]

    def _begin(self) -> None:
        self._parts += 1
        self._is_file = False
        if self._parts > _MAX_PARTS:
            raise Refusal(413, f"more than {_MAX_PARTS} parts in one form; send several requests")

    def _finish(self) -> None:
        self._is_whole = True

    def _begin_header(self) -> None:
        self._header.clear()
        self._value.clear()

    def _end_header(self) -> None:
        if self._header.lower() == b"content-disposition":
            _, options = parse_options_header(bytes(self._value))
            self._is_file = b"filename" in options

    def _end_headers(self) -> None:
        if self._is_file:
            self._files.append(io.BytesIO())

    def _data(self, data: bytes, start: int, end: int) -> None:
        if self._is_file:
            self._files[-1].write(memoryview(data)[start:end])


def is_audio(data: bytes) -> bool:
    """Whether bytes begin as WAV, FLAC, Ogg, MP3, AIFF or AU do.

    libsndfile would try twenty formats more, which nobody sends and few have looked at for years.
    """
    form = data[8:12]
    return (
        (data[:4] in (b"RIFF", b"RF64") and form == b"WAVE")
        or (data[:4] == b"FORM" and form in (b"AIFF", b"AIFC"))
        or data[:4] in (b"fLaC", b"OggS", b".snd")
        or data[:3] == b"ID3"
        or (len(data) > 1 and data[0] == 0xFF and data[1] & 0xE0 == 0xE0)
    )


def decode(data: bytes, max_seconds: float) -> NDArray[np.int16]:
    """An uploaded file as int16 [T] at 16 kHz. Decoding ends where it becomes too long, whatever the header says.

    Raises:
        Refusal: 415 it is no audio, 413 it is longer than `max_seconds`, 422 it is damaged or empty.
    """
    if not is_audio(data):
        raise Refusal(415, "this is no audio that is known here; send WAV, FLAC, Ogg (Vorbis, Opus), MP3, AIFF or AU")
    blocks: list[NDArray[np.int16]] = []
    samples, most = 0, round(max_seconds * SAMPLE_RATE)
    try:
        for block in audio_blocks(data, block_seconds=_BLOCK_SECONDS):
            samples += len(block)
            if samples > most:
                raise Refusal(413, f"the recording is longer than {max_seconds:g} s; send a part of it")
            blocks.append(block)
    except AudioError as error:
        raise Refusal(422, f"the recording cannot be read ({error}); record it again, or convert it to WAV") from None
    if not samples:
        raise Refusal(422, "the recording is empty; record it again")
    return np.concatenate(blocks)
