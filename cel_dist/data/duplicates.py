"""Utterances that are there twice: the same samples, or the same sound at another level, cut or coded otherwise.

Both are found in memory that grows with the utterances that are looked at: 16 bytes of digest and up to 150 words of a
fingerprint for each.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Words = npt.NDArray[np.uint32]
Integers = npt.NDArray[np.int64]

# A word that more utterances share says nothing: a tone, a hum.
_MOST_SHARED = 20
# Hits at one shift, then all words that lie over each other are compared, 1 s at least: unrelated sound differs in half
# of the bits, give or take some percent.
_HITS, _OVERLAP_WORDS, _MOST_BITS = 2, 16, 0.25
_MOST_CANDIDATES = 200_000
# Words of an utterance are counted from 0; the difference of two places fits with room.
_PLACES = 1024


class Pair(NamedTuple):
    """Two utterances that sound alike, by their number, and the share of the bits of their fingerprints that differ."""

    first: int
    second: int
    difference: float


def equal_groups(digests: npt.NDArray[np.uint64]) -> list[list[int]]:
    """Groups of two or more utterances of equal digests [N, 2], each in rising order.

    >>> equal_groups(np.array([[1, 1], [2, 2], [1, 1]], np.uint64))
    [[0, 2]]
    """
    order = np.lexsort((digests[:, 1], digests[:, 0]))
    ordered = digests[order]
    begins = np.flatnonzero(np.concatenate([[True], (ordered[1:] != ordered[:-1]).any(axis=1)])[: len(ordered)])
    groups = np.split(order, begins[1:])
    return sorted(sorted(group.tolist()) for group in groups if len(group) > 1)


def similar_pairs(words: Sequence[Words]) -> list[Pair]:
    """Pairs of utterances, by their fingerprints, that are the same sound.

    A copy at another gain, with a little noise, coded otherwise or cut at its beginning is found as long as 1 s of it
    is in both fingerprints, and some words survive bit by bit. At another speed or pitch it is not. Of more than
    200 000 candidates those with most common words are compared.

    Args:
        words: fingerprint of each utterance, as `measurement.fingerprint` makes it.
    """
    lengths = np.array([len(of_one) for of_one in words], np.int64)
    if not lengths.sum():
        return []
    word = np.concatenate(words)
    owner = np.repeat(np.arange(len(words)), lengths)
    place = np.arange(len(word)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    kept = word != 0
    word, owner, place = word[kept], owner[kept], place[kept]
    found = []
    for candidate in _candidates(word, owner, place, len(words)).tolist():
        pair, shift = divmod(candidate, 2 * _PLACES)
        first, second = divmod(pair, len(words))
        difference = _difference(words[first], words[second], shift - _PLACES)
        if difference is not None and difference <= _MOST_BITS:
            found.append(Pair(first, second, difference))
    best: dict[tuple[int, int], Pair] = {}
    for one in sorted(found, key=lambda one: one.difference):
        best.setdefault((one.first, one.second), one)
    return sorted(best.values())


def _candidates(word: Words, owner: Integers, place: Integers, count: int) -> Integers:
    """Pairs of utterances with several equal words at one shift, each as a number: (first, second, shift)."""

    order = np.lexsort((owner, word))
    word, owner, place = word[order], owner[order], place[order]
    begins = np.flatnonzero(np.concatenate([[True], word[1:] != word[:-1]])[: len(word)])
    sizes = np.diff(np.append(begins, len(word)))
    kept = np.repeat((sizes > 1) & (sizes <= _MOST_SHARED), sizes)
    word, owner, place = word[kept], owner[kept], place[kept]
    parts = [np.zeros(0, np.int64)]
    for lag in range(1, _MOST_SHARED):
        same = (word[lag:] == word[:-lag]) & (owner[lag:] != owner[:-lag])
        first, second = owner[:-lag][same], owner[lag:][same]
        shift = place[lag:][same] - place[:-lag][same] + _PLACES
        parts.append((first * count + second) * (2 * _PLACES) + shift)
    candidates, hits = np.unique(np.concatenate(parts), return_counts=True)
    candidates, hits = candidates[hits >= _HITS], hits[hits >= _HITS]
    return candidates[np.argsort(-hits, kind="stable")[:_MOST_CANDIDATES]]


def _difference(first: Words, second: Words, shift: int) -> float | None:
    """Share of differing bits where the words of one lie over those of the other; None if they share too little."""
    first, second = (first, second[shift:]) if shift >= 0 else (first[-shift:], second)
    length = min(len(first), len(second))
    first, second = first[:length], second[:length]
    heard = (first != 0) & (second != 0)
    if np.count_nonzero(heard) < _OVERLAP_WORDS:
        return None
    differing = np.unpackbits((first[heard] ^ second[heard]).view(np.uint8)).mean()
    return float(differing)
