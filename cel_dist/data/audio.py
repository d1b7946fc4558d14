"""Audio files to 16 kHz mono int16 and back. All audio that is read comes through here."""

import io
import os
import struct
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
import soundfile
import soxr

from cel_dist.data.ffmpeg import FFMPEG_SUFFIXES, FFmpegError, decoded, needs_ffmpeg

SAMPLE_RATE = 16_000
AudioFormat = Literal["wav", "flac"]
Reason = Literal["unreadable", "empty", "non_finite", "too_short", "silent"]

AUDIO_SUFFIXES = FFMPEG_SUFFIXES | {
    *(".wav", ".flac", ".ogg", ".oga", ".opus", ".mp3", ".aif", ".aiff", ".au", ".caf", ".w64", ".rf64", ".sph"),
}
"""Lower-case file suffixes that are taken for audio when a folder is searched."""

_INT16_SCALE = 32_768.0
_VALUES_AT_ONCE = 1 << 20
_LONGEST_FRAMES = 1 << 40
_SOURCE_RATES_HZ = (1_000, 768_000)
# Dither of an otherwise silent recording moves the last bit or two; the quietest real recording moves far more.
_SILENT_RANGE = 4

# RIFF, a fmt chunk of 16 bytes (PCM, mono, rate, 2 bytes a sample), the data chunk: what `encode_audio` writes.
_WAV_HEADER = struct.Struct("<4sI4s4sIHHIIHH4sI")
WAV_HEADER_BYTES = _WAV_HEADER.size


class AudioError(Exception):
    """Audio that cannot be used: `reason` is one of five fixed words, `detail` says more in one line."""

    def __init__(self, reason: Reason, detail: str) -> None:
        super().__init__(reason, detail)
        self.reason: Reason = reason
        self.detail = " ".join(detail.split())

    def __str__(self) -> str:
        return f"{self.reason}: {self.detail}"


def read_audio(source: Path | bytes, sample_rate: int = SAMPLE_RATE) -> npt.NDArray[np.int16]:
    """Decode a whole file of any supported format to int16 mono `[T]` at `sample_rate`.

    Channels are averaged, other rates go through the soxr resampler at its HQ setting, and values beyond full scale are
    clipped. 16-bit mono audio at `sample_rate` comes back bit for bit. The file is read in blocks, so that an hour of
    44.1 kHz stereo needs the memory of its result only. AAC and other formats that libsndfile does not know are decoded
    by ffmpeg, which goes by the suffix of the path.

    Args:
        source: path of a file, or its content, which ffmpeg is not asked about.
        sample_rate: rate of the result in Hz.

    Raises:
        AudioError: `unreadable`, `non_finite` or `empty`.
    """
    blocks = list(audio_blocks(source, sample_rate))
    samples = np.concatenate(blocks) if blocks else np.zeros(0, np.int16)
    if len(samples) == 0:
        raise AudioError("empty", "no samples")
    return samples


def audio_blocks(
    source: Path | bytes, sample_rate: int = SAMPLE_RATE, *, block_seconds: float | None = None
) -> Iterator[npt.NDArray[np.int16]]:
    """What `read_audio` returns, block by block, int16 `[n]` each: audio of any length in the memory of a block.

    Args:
        source: as for `read_audio`.
        sample_rate: rate of the result in Hz.
        block_seconds: longest block. Default: what a million values of the source are, which at a rate of 1 kHz is
            a quarter of an hour: whoever reads hostile audio bounds memory by this.

    Raises:
        AudioError: `unreadable` or `non_finite`, when the block at fault is asked for.
    """
    try:
        if isinstance(source, Path) and needs_ffmpeg(source):
            with decoded(source) as stream:
                yield from _converted_blocks(stream.read, stream.rate_hz, stream.channels, sample_rate, block_seconds)
        else:
            # As bytes: soundfile cannot encode the name of a file that is not UTF-8.
            with _Sequential(os.fsencode(source) if isinstance(source, Path) else io.BytesIO(source)) as file:
                if (file.channels, file.samplerate, file.subtype) == (1, sample_rate, "PCM_16"):
                    yield from _equal_blocks(file, _frames_at_once(1, sample_rate, block_seconds))
                else:
                    yield from _converted_blocks(
                        file.next_frames, file.samplerate, file.channels, sample_rate, block_seconds
                    )
                file.require_whole()
    except FFmpegError as error:
        raise AudioError("unreadable", str(error)) from None
    except (soundfile.SoundFileError, OSError, ValueError, TypeError) as error:
        raise AudioError("unreadable", getattr(error, "error_string", None) or str(error)) from None


class _Sequential(soundfile.SoundFile):  # type: ignore[misc]  # soundfile has no types
    """A file that is read once, from its beginning to its end.

    soundfile seeks to where it is after each block, and that fails in a FLAC whose header states no length, as programs
    leave it that write into a pipe.
    """

    _position = 0

    def seekable(self) -> bool:
        return False

    def next_frames(self, number: int) -> npt.NDArray[np.float32]:
        """The next samples, float32 `[frames, channels]`, fewer only at the end."""
        block: npt.NDArray[np.float32] = self.read(number, dtype="float32", always_2d=True)
        self._position += len(block)
        return block

    def next_samples(self, number: int) -> npt.NDArray[np.int16]:
        """The next samples of one channel as they are stored, int16 `[n]`, fewer only at the end."""
        # As many as are left and one more: whoever keeps the block keeps all that was asked for.
        expected = min(number, max(0, self.frames - self._position) + 1)
        block: npt.NDArray[np.int16] = self.read(expected, dtype="int16")
        if len(block) == expected < number:
            block = np.concatenate([block, self.read(number - expected, dtype="int16")])
        self._position += len(block)
        return block

    def require_whole(self) -> None:
        """Raise `AudioError` if a FLAC, whose header is exact where it tells, was cut off between two of its frames."""
        if self.format == "FLAC" and self._position < self.frames < _LONGEST_FRAMES:
            raise AudioError("unreadable", f"decoding stopped after {self._position} of {self.frames} samples")


def _frames_at_once(channels: int, rate_hz: int, block_seconds: float | None) -> int:
    frames = max(1, _VALUES_AT_ONCE // channels)
    return frames if block_seconds is None else max(1, min(frames, round(block_seconds * rate_hz)))


def _equal_blocks(file: _Sequential, frames: int) -> Iterator[npt.NDArray[np.int16]]:
    """What needs no conversion, which would take longer than reading it."""
    while True:
        block = file.next_samples(frames)
        yield block
        if len(block) < frames:
            return


def _converted_blocks(
    read: Callable[[int], npt.NDArray[np.float32]],
    rate_hz: int,
    channels: int,
    sample_rate: int,
    block_seconds: float | None,
) -> Iterator[npt.NDArray[np.int16]]:
    if not _SOURCE_RATES_HZ[0] <= rate_hz <= _SOURCE_RATES_HZ[1]:
        raise AudioError("unreadable", f"its header states a rate of {rate_hz} Hz")
    resampler = None
    if rate_hz != sample_rate:
        resampler = soxr.ResampleStream(rate_hz, sample_rate, 1, dtype="float32", quality="HQ")
    frames = _frames_at_once(channels, rate_hz, block_seconds)
    while True:
        block = read(frames)
        if not np.isfinite(block).all():
            raise AudioError("non_finite", "contains NaN or infinity")
        mono = block[:, 0] if channels == 1 else block.mean(axis=1)
        if resampler is not None:
            mono = resampler.resample_chunk(np.ascontiguousarray(mono), last=len(block) < frames)
        yield np.clip(np.rint(mono * _INT16_SCALE), -32_768, 32_767).astype(np.int16)
        # A short block is the end: the frame count in the header of a streamed or compressed file is a guess.
        if len(block) < frames:
            return


def audio_seconds(path: Path) -> float:
    """Duration of an audio file, from its header where that tells, else from decoding it.

    Raises:
        AudioError: as `read_audio`.
    """
    seconds = header_seconds(path)
    return len(read_audio(path)) / SAMPLE_RATE if seconds is None else seconds


def header_seconds(path: Path) -> float | None:
    """Duration of an audio file by its header; None if that does not tell, or cannot be read."""
    if needs_ffmpeg(path):
        return None
    try:
        header = soundfile.info(os.fsencode(path))
    except (soundfile.SoundFileError, OSError):
        return None
    # Streamed files state no length, or the largest number there is.
    is_stated = 0 < header.frames < _LONGEST_FRAMES and header.samplerate > 0
    return float(header.frames / header.samplerate) if is_stated else None


def require_usable(samples: npt.NDArray[np.int16], min_samples: int) -> None:
    """Refuse audio `[T]` that training could not learn from.

    Raises:
        AudioError: `too_short` (fewer than `min_samples`), or `silent` (no more than dither from first to last sample).
    """
    if len(samples) < min_samples:
        raise AudioError(
            "too_short", f"{len(samples) / SAMPLE_RATE:.3f} s, at least {min_samples / SAMPLE_RATE:g} s needed"
        )
    if int(samples.max()) - int(samples.min()) <= _SILENT_RANGE:
        raise AudioError("silent", f"no sample is more than {_SILENT_RANGE} of 32768 from another")


def read_segments(data: bytes | memoryview, ranges: Sequence[tuple[int, int]]) -> list[npt.NDArray[np.int16]]:
    """Some ranges (first sample, number of samples) of an in-memory 16-bit mono file, decoding only what is needed.

    The rate is not looked at.

    Returns:
        int16 `[number]` for each.

    Raises:
        AudioError: `unreadable`: not such a file, or a range reaches over its end.
    """
    segments = []
    try:
        with soundfile.SoundFile(io.BytesIO(data)) as file:
            if file.channels != 1:
                raise AudioError("unreadable", f"{file.channels} channels where one was expected")
            for start, samples in ranges:
                if start < 0 or start + samples > file.frames:
                    raise AudioError(
                        "unreadable", f"samples {start} to {start + samples} of a file that holds {file.frames}"
                    )
                file.seek(start)
                segment: npt.NDArray[np.int16] = file.read(samples, dtype="int16")
                if len(segment) != samples:
                    raise AudioError("unreadable", f"decoding stopped after {len(segment)} of {samples} samples")
                segments.append(segment)
    except (soundfile.SoundFileError, OSError) as error:
        raise AudioError("unreadable", getattr(error, "error_string", None) or str(error)) from None
    return segments


def wav_header(samples: int) -> bytes:
    """The header of a WAV of so many samples as `encode_audio` writes it; they follow at once, little-endian."""
    return _WAV_HEADER.pack(
        *(b"RIFF", 36 + 2 * samples, b"WAVE"),
        *(b"fmt ", 16, 1, 1, SAMPLE_RATE, 2 * SAMPLE_RATE, 2, 16),
        *(b"data", 2 * samples),
    )


def encode_audio(samples: npt.NDArray[np.int16], audio_format: AudioFormat) -> bytes:
    """int16 `[T]` as a complete 16 kHz mono 16-bit file; the same samples give the same bytes."""
    if audio_format == "wav":
        return wav_header(len(samples)) + samples.astype("<i2", copy=False).tobytes()
    buffer = io.BytesIO()
    soundfile.write(buffer, samples, SAMPLE_RATE, subtype="PCM_16", format="FLAC")
    return buffer.getvalue()


def compressed_audio(samples: npt.NDArray[np.int16]) -> tuple[bytes, str]:
    """Audio to listen to: a small file that browsers play, and its media type.

    MP3, which all of them know, or FLAC where libsndfile was built without it.

    Args:
        samples: int16 mono `[T]` at 16 kHz.
    """
    file_format, media_type = (
        ("MP3", "audio/mpeg") if "MP3" in soundfile.available_formats() else ("FLAC", "audio/flac")
    )
    buffer = io.BytesIO()
    soundfile.write(buffer, samples, SAMPLE_RATE, format=file_format)
    return buffer.getvalue(), media_type


def stored_form_fault(data: bytes, samples: int) -> str | None:
    """What is wrong with the audio member of a shard, or None.

    It must be a 16 kHz mono 16-bit file that decodes, to the end, to exactly `samples` samples.
    """
    try:
        with soundfile.SoundFile(io.BytesIO(data)) as file:
            form = (file.samplerate, file.channels, file.subtype)
            decoded = len(file.read(dtype="int16"))
    except (soundfile.SoundFileError, OSError) as error:
        return f"does not decode: {getattr(error, 'error_string', None) or error}"
    if form != (SAMPLE_RATE, 1, "PCM_16"):
        return f"is {form[0]} Hz, {form[1]} channels, {form[2]}, not 16000 Hz, 1 channel, PCM_16"
    if decoded != samples:
        return f"decodes to {decoded} samples, index and json say {samples}"
    return None
