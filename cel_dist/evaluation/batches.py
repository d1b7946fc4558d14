"""Pieces of utterances through the encoder, together where they are equally long."""

from collections import defaultdict

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cel_dist.features import SAMPLE_RATE
from cel_dist.model import SpeakerModel


class PieceBatches:
    """Encodes pieces of many utterances in batches of equal length: padding would change embeddings.

    A piece waits for others of its length until there are `seconds` of them. Pieces of all lengths together wait no
    longer than until there are twice as much, so that memory does not grow with the number of lengths.

    Args:
        model: on its device.
        seconds: audio that passes the encoder at once; a longer piece passes alone.
    """

    def __init__(self, model: SpeakerModel, seconds: float) -> None:
        self._model = model
        self._samples = round(seconds * SAMPLE_RATE)
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
        length = len(piece)
        same = self._waiting[length]
        same.append((utterance, self._counts[utterance], name, piece))
        self._counts[utterance] += 1
        self._num_waiting += length
        if (len(same) + 1) * length > self._samples:
            self._encode(length)
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
        for length in list(self._waiting):
            self._encode(length)

    def _encode(self, length: int) -> None:
        pieces = self._waiting.pop(length)
        self._num_waiting -= length * len(pieces)
        rows = self._model.encode(torch.stack([piece for *_, piece in pieces]), [name for _, _, name, _ in pieces])
        for (utterance, place, _, _), row in zip(pieces, rows, strict=True):
            self._rows[utterance][place] = row
