"""Short pieces of the audio that a report is about, to be listened to in its page."""

import base64
from pathlib import Path

import numpy as np

from cel_dist.data.audio import SAMPLE_RATE, AudioError, audio_blocks, compressed_audio

CLIP_SECONDS = 3.5
MAX_BYTES = 8 << 20
"""Of all clips of a page, as they stand in it."""


class Clips:
    """Clips of utterances, each once, as long as there is room.

    Args:
        root: folder to which the names of utterances are relative; None if there is none, and no audio.
        max_bytes: of all clips, as `data:` URIs.

    Attributes:
        sources: the clips as `data:` URIs.
    """

    def __init__(self, root: Path | None, max_bytes: int = MAX_BYTES) -> None:
        self._root = root
        self._left = max_bytes
        self._numbers: dict[str, int | None] = {}
        self.sources: list[str] = []

    def number(self, name: str) -> int | None:
        """Where the first seconds of an utterance stand in `sources`; None if there is no such file, or no room."""
        if name not in self._numbers:
            source = self._source(name)
            self._numbers[name] = None
            if source is not None and len(source) <= self._left:
                self._left -= len(source)
                self._numbers[name] = len(self.sources)
                self.sources.append(source)
        return self._numbers[name]

    def _source(self, name: str) -> str | None:
        if self._root is None or self._left <= 0 or not (self._root / name).is_file():
            return None
        wanted = round(CLIP_SECONDS * SAMPLE_RATE)
        blocks: list[np.ndarray] = []
        try:
            for block in audio_blocks(self._root / name, block_seconds=CLIP_SECONDS):
                blocks.append(block)
                if sum(map(len, blocks)) >= wanted:
                    break
        except AudioError:
            # It can be scored no more, but what was scored can be reported.
            return None
        samples = np.concatenate(blocks)[:wanted] if blocks else np.zeros(0, np.int16)
        if not len(samples):
            return None
        content, media_type = compressed_audio(samples)
        return f"data:{media_type};base64,{base64.b64encode(content).decode('ascii')}"
