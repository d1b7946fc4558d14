"""Utterances on their way into an encoder: whole, in segments of equal length, or in windows; in bounded memory."""

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from cel_dist.data.audio import SAMPLE_RATE, AudioError, audio_blocks, audio_seconds, require_usable
from cel_dist.errors import CelError
from cel_dist.features import segment_samples

MIN_SAMPLES = 1600
"""Shortest waveform that is embedded: 0.1 s. Less than that says nothing about a voice."""

MAX_WHOLE_SECONDS = 120.0
"""Longest utterance that passes the encoder as one; a longer one does so in segments of this length. Memory grows with
what passes at once."""


@dataclass(frozen=True)
class Excerpt:
    """A part of an audio file, or all of it.

    Attributes:
        path: of the file.
        start_seconds: where the part begins.
        end_seconds: where it ends; None for the end of the file.
    """

    path: str
    start_seconds: float = 0.0
    end_seconds: float | None = None

    @property
    def is_whole(self) -> bool:
        """Whether it is all of the file."""
        return self.start_seconds == 0 and self.end_seconds is None

    def below(self, root: str | os.PathLike[str]) -> "Excerpt":
        """The same part, with a path that `root` was put before."""
        return Excerpt(str(Path(root) / self.path), self.start_seconds, self.end_seconds)

    def seconds(self) -> float:
        """Duration, by what the file says of its own.

        Raises:
            CelError: the file cannot be read as audio.
        """
        try:
            whole = audio_seconds(Path(self.path))
        except AudioError as error:
            raise _unreadable(self.path, error) from None
        end = whole if self.end_seconds is None else min(whole, self.end_seconds)
        return end - self.start_seconds


Audio: TypeAlias = str | os.PathLike[str] | Excerpt | NDArray[Any] | Tensor


def name_of(audio: Audio) -> str:
    """What an utterance is called in messages."""
    if isinstance(audio, Excerpt):
        end = "its end" if audio.end_seconds is None else f"{audio.end_seconds:g} s"
        return audio.path if audio.is_whole else f"{audio.path} from {audio.start_seconds:g} s to {end}"
    return str(audio) if isinstance(audio, (str, os.PathLike)) else "the waveform"


def segments(audio: Audio, length: int) -> Iterator[Tensor]:
    """An utterance in segments of `length` samples, on int16 scale, each int16 or float32 [length].

    They follow each other, but for the last, which reaches back so that it is as long as the others. An utterance that
    is not longer comes whole. Digital silence says nothing about a voice: of several segments, silent ones are left
    out. A file is read while it is cut, and never held as a whole.

    Args:
        audio: path or part of an audio file; or a waveform [T] at 16 kHz, numpy or torch, either int16 or floating
            point with full scale 1.0 (it is multiplied by 32768).
        length: samples.

    Raises:
        CelError: the file cannot be read; the waveform has another shape or type, is shorter than 0.1 s, silent or not
            finite. Some of this shows only after the first segments.
    """
    found, fault = False, AudioError("empty", "no samples")
    for segment in _cut(_blocks(audio), length):
        try:
            require_usable(segment, MIN_SAMPLES)
        except AudioError as error:
            fault = error
            continue
        found = True
        yield torch.from_numpy(np.ascontiguousarray(segment))
    if not found:
        raise _refusal(audio, fault)


def windows(audio: Audio, frames: int, number: int) -> Tensor:
    """Evenly spaced windows [number, T] of an utterance, on int16 scale; see `SpeakerModel.embed_windows`.

    A file that is longer than `MAX_WHOLE_SECONDS` is read twice instead of held: where the windows lie depends on its
    length, and a header may be wrong about that.

    Raises:
        CelError: as for `segments`, or `frames` or `number` is below 1.
    """
    if frames < 1 or number < 1:
        raise CelError(f"frames={frames} and windows={number}; windows need at least one frame, and one of them")
    length = segment_samples(frames)
    held: list[NDArray[Any]] = []
    total = 0
    for block in _blocks(audio):
        total += len(block)
        held.append(block)
        if total > max(MAX_WHOLE_SECONDS * SAMPLE_RATE, length) and _is_file(audio):
            held.clear()
    if total and not held:
        return torch.from_numpy(_usable(_windows_of_blocks(_blocks(audio), total, length, number), audio))
    wave = torch.from_numpy(_usable(np.concatenate(held) if held else np.zeros(0, np.int16), audio))
    if total < length:
        # One sample more than needed when the shortage is odd: the published loader rounds up on both sides.
        half = (length - total + 1) // 2
        wave = functional.pad(wave, (half, half))
    return torch.stack([wave[start : start + length] for start in _window_starts(len(wave), length, number)])


def _window_starts(total: int, length: int, number: int) -> list[int]:
    starts: list[int] = np.linspace(0, total - length, num=number).astype(np.int64).tolist()
    return starts


def _windows_of_blocks(blocks: Iterable[NDArray[Any]], total: int, length: int, number: int) -> NDArray[Any]:
    cut = np.zeros((number, length), np.int16)
    starts = _window_starts(total, length, number)
    position = 0
    for block in blocks:
        for window, start in zip(cut, starts, strict=True):
            begin, end = max(start, position), min(start + length, position + len(block))
            if begin < end:
                window[begin - start : end - start] = block[begin - position : end - position]
        position += len(block)
    return cut


def _cut(blocks: Iterable[NDArray[Any]], length: int) -> Iterator[NDArray[Any]]:
    rest: NDArray[Any] = np.zeros(0, np.int16)
    last = None
    for block in blocks:
        rest = np.concatenate([rest, block]) if len(rest) else block
        while len(rest) >= length:
            last, rest = rest[:length], rest[length:]
            yield last
    if len(rest):
        yield rest if last is None else np.concatenate([last, rest])[-length:]


def _is_file(audio: Audio) -> bool:
    return isinstance(audio, (str, os.PathLike, Excerpt))


def _blocks(audio: Audio) -> Iterator[NDArray[Any]]:
    """The samples on int16 scale, int16 or float32 [n] each, in order."""
    if isinstance(audio, (str, os.PathLike)):
        yield from _file_blocks(Excerpt(str(audio)))
    elif isinstance(audio, Excerpt):
        yield from _file_blocks(audio)
    else:
        yield _samples(audio)


def _file_blocks(excerpt: Excerpt) -> Iterator[NDArray[np.int16]]:
    path = Path(excerpt.path)
    if not path.is_file():
        raise CelError(f"there is no audio file {path}; check the path")
    first = round(excerpt.start_seconds * SAMPLE_RATE)
    end = None if excerpt.end_seconds is None else round(excerpt.end_seconds * SAMPLE_RATE)
    position = 0
    try:
        for block in audio_blocks(path):
            if end is not None and position >= end:
                break
            yield block[max(first - position, 0) : None if end is None else end - position]
            position += len(block)
    except AudioError as error:
        raise _unreadable(path, error) from None
    if first and position <= first:
        raise CelError(
            f"{path} ends after {position / SAMPLE_RATE:g} s, but a part of it is to begin at "
            f"{excerpt.start_seconds:g} s; check the times in the list of enrolments"
        )


def _unreadable(path: str | Path, fault: AudioError) -> CelError:
    return CelError(f"{path} cannot be read as audio ({fault}); convert it to WAV or FLAC, or leave it out")


def _samples(audio: NDArray[Any] | Tensor) -> NDArray[Any]:
    name = name_of(audio)
    if isinstance(audio, Tensor):
        samples: NDArray[Any] = audio.detach().cpu().numpy()
    elif isinstance(audio, np.ndarray):
        samples = audio
    else:
        raise CelError(f"cannot embed a {type(audio).__name__}; give a path, a waveform [T] or a list of them")
    if samples.ndim != 1:
        raise CelError(
            f"{name} has shape {list(samples.shape)}; give one channel [T], and several utterances as a list"
        )
    if samples.dtype.kind == "f":
        samples = samples.astype(np.float32) * np.float32(32768)
        if not np.isfinite(samples).all():
            raise CelError(f"{name} holds values that are not finite; check how it was made")
    elif samples.dtype != np.int16:
        raise CelError(f"{name} holds {samples.dtype}; give int16, or floating point with full scale 1.0")
    return samples


def _usable(wave: NDArray[Any], audio: Audio) -> NDArray[Any]:
    try:
        require_usable(wave.reshape(-1), MIN_SAMPLES)
    except AudioError as error:
        raise _refusal(audio, error) from None
    return np.ascontiguousarray(wave)


def _refusal(audio: Audio, fault: AudioError) -> CelError:
    return CelError(f"{name_of(audio)} cannot be embedded ({fault}); leave it out or record it again")
