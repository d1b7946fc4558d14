"""How utterances are cut before they are embedded."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from cel_dist.errors import CelError
from cel_dist.features import SAMPLE_RATE
from cel_dist.model import mean_embedding
from cel_dist.utterance import MAX_WHOLE_SECONDS, Audio, segments, windows

BATCH_SECONDS = 120.0
"""Audio in the encoder at once."""

WINDOWS_AS = ("scores", "embedding")

_MIN_FRAMES = 16
_MIN_SEGMENT_SECONDS = 0.1


@dataclass(frozen=True)
class Cutting:
    """Whole utterances, segments of them, or windows as published.

    Attributes:
        frames: 0 for whole utterances, else the frames of 10 ms of a window.
        windows: windows an utterance; without effect on whole utterances.
        windows_as: `scores`: each window is kept, and a trial is scored by the mean over all pairs of them, as
            published; `embedding`: an utterance is the mean of its windows.
        segment_seconds: whole utterances that are longer are cut into segments of this length, whose mean they are.
        batch_seconds: audio in the encoder at once, all passes together; a longer piece is alone.

    Raises:
        CelError: one of them is out of range.
    """

    frames: int = 0
    windows: int = 10
    windows_as: str = "scores"
    segment_seconds: float = MAX_WHOLE_SECONDS
    batch_seconds: float = BATCH_SECONDS

    def __post_init__(self) -> None:
        if self.frames and self.frames < _MIN_FRAMES:
            raise CelError(
                f"frames={self.frames}; give 0 for whole utterances or at least {_MIN_FRAMES} frames of 10 ms"
            )
        if self.windows < 1:
            raise CelError(f"windows={self.windows}; give at least one window")
        if self.windows_as not in WINDOWS_AS:
            raise CelError(f"windows_as={self.windows_as}; give {' or '.join(WINDOWS_AS)}")
        if not _MIN_SEGMENT_SECONDS <= self.segment_seconds < math.inf:
            raise CelError(
                f"segment_seconds={self.segment_seconds}; give at least {_MIN_SEGMENT_SECONDS} s, and a number"
            )
        if not 0 < self.batch_seconds < math.inf:
            raise CelError(f"batch_seconds={self.batch_seconds}; give more than 0 s, and a number")

    @property
    def keeps_windows(self) -> bool:
        """Whether an utterance is several embeddings instead of one."""
        return self.frames > 0 and self.windows_as == "scores"

    @property
    def is_as_verified(self) -> bool:
        """Whether utterances are embedded as `cel verify` does it, for which thresholds and calibrations hold."""
        return self.frames == 0 and self.segment_seconds == MAX_WHOLE_SECONDS

    def pieces(self, audio: Audio) -> Iterator[Tensor]:
        """What passes the encoder for an utterance, each [T] on int16 scale. Raises as `utterance.segments` does."""
        if self.frames:
            yield from windows(audio, self.frames, self.windows)
        else:
            yield from segments(audio, round(self.segment_seconds * SAMPLE_RATE))

    def joined(self, rows: NDArray[np.float32]) -> NDArray[np.float32]:
        """The embedding of an utterance from those of its pieces [n, D]: [D], or all of them as they are."""
        return rows if self.keeps_windows else mean_embedding(rows)


WHOLE = Cutting()
"""Utterances as `cel verify` compares them."""
