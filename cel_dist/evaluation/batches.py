"""Pieces of utterances through the encoder, together where they have equally many frames."""

import threading
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from cel_dist.features import HOP, SAMPLE_RATE
from cel_dist.model import SpeakerModel


class Room:
    """What may be in the encoder at once, whichever thread brought it.

    Args:
        seconds: of audio, all passes together; a pass of more is alone.
    """

    def __init__(self, seconds: float) -> None:
        self._free = threading.Condition()
        self._limit = round(seconds * SAMPLE_RATE)
        self._taken = 0

    @contextmanager
    def taken(self, samples: int) -> Iterator[None]:
        """Wait until there is room for so many samples, and hold it."""
        with self._free:
            self._free.wait_for(lambda: self._taken == 0 or self._taken + samples <= self._limit)
            self._taken += samples
        try:
            yield
        finally:
            with self._free:
                self._taken -= samples
                self._free.notify_all()


class PieceBatches:
    """Encodes pieces of many utterances in batches of equally many frames: padding would change embeddings.

    A piece waits for others of its frames until there are `seconds` of them. Pieces of all numbers of frames together
    wait no longer than until there are twice as much, so that memory does not grow with the number of lengths.

    Args:
        model: on its device.
        seconds: audio of a pass of the encoder; a longer piece passes alone.
        room: in the encoder.
    """

    def __init__(self, model: SpeakerModel, seconds: float, room: Room) -> None:
        self._model = model
        self._samples = round(seconds * SAMPLE_RATE)
        self._room = room
        self._waiting: defaultdict[int, list[tuple[int, int, str, Tensor]]] = defaultdict(list)
        self._num_waiting = 0
        self._rows: defaultdict[int, dict[int, NDArray[np.float32]]] = defaultdict(dict)
        self._counts: defaultdict[int, int] = defaultdict(int)

    def add(self, utterance: int, name: str, piece: Tensor) -> None:
        """Take the next piece of an utterance.

        Args:
            utterance: its number.
            name: what it is called in errors.
            piece: [T] samples on int16 scale.

        Raises:
            RunError: the encoder's output is not finite.
        """
        frames = 1 + len(piece) // HOP
        same = self._waiting[frames]
        same.append((utterance, self._counts[utterance], name, piece))
        self._counts[utterance] += 1
        self._num_waiting += len(piece)
        if (len(same) + 1) * len(piece) > self._samples:
            self._encode(frames)
        elif self._num_waiting >= 2 * self._samples:
            self._encode_all()

    def take(self) -> dict[int, NDArray[np.float32]]:
        """Encode what waits: unit embeddings [pieces, D] of all utterances since the last call, by their numbers.

        Raises:
            RunError: the encoder's output is not finite.
        """
        self._encode_all()
        taken = {
            utterance: np.stack([rows[place] for place in range(len(rows))]) for utterance, rows in self._rows.items()
        }
        self._rows.clear()
        self._counts.clear()
        return taken

    def _encode_all(self) -> None:
        for frames in list(self._waiting):
            self._encode(frames)

    def _encode(self, frames: int) -> None:
        # Equal lengths side by side: they share the computation of features, too.
        pieces = sorted(self._waiting.pop(frames), key=lambda entry: len(entry[-1]))
        samples = sum(len(piece) for *_, piece in pieces)
        self._num_waiting -= samples
        with self._room.taken(samples):
            rows = self._model.encode([piece for *_, piece in pieces], [name for _, _, name, _ in pieces])
        for (utterance, place, _, _), row in zip(pieces, rows, strict=True):
            self._rows[utterance][place] = row
