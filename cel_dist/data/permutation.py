"""A shuffled order that is computed where it is asked for, and never stored."""

import numpy as np
import numpy.typing as npt

# Four rounds are enough to be indistinguishable from random over wide words; narrow ones need more, and cost little.
_ROUNDS = 16


class KeyedPermutation:
    """A permutation of range(size) in O(1) memory.

    A Feistel network permutes the smallest power of two that holds the range; what it sends outside is sent through
    again until it comes back (cycle walking; Black and Rogaway 2002, "Ciphers with arbitrary finite domains").

    Args:
        size: at least 1.
        keys: draws the keys; equal generators give equal permutations.
    """

    def __init__(self, size: int, keys: np.random.Generator) -> None:
        if size < 1:
            raise ValueError(f"a permutation of {size} places")
        self.size = size
        bits = (size - 1).bit_length()
        self._low_bits = np.uint64(bits // 2)
        self._low_mask = np.uint64((1 << bits // 2) - 1)
        self._high_mask = np.uint64((1 << bits - bits // 2) - 1)
        self._keys = keys.integers(0, 2**64, size=_ROUNDS, dtype=np.uint64)

    def __call__(self, places: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Where the permutation sends `places` `[n]`, each in range(size).

        >>> shuffled = KeyedPermutation(5, np.random.default_rng(0))(np.arange(5))
        >>> sorted(shuffled.tolist())
        [0, 1, 2, 3, 4]
        """
        values = self._network(places.astype(np.uint64))
        outside = np.flatnonzero(values >= self.size)
        while len(outside):
            values[outside] = self._network(values[outside])
            outside = outside[values[outside] >= self.size]
        return values.astype(np.int64)

    def _network(self, values: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
        low, high = values & self._low_mask, values >> self._low_bits
        for number, key in enumerate(self._keys):
            if number % 2:
                low ^= _mixed(high, key) & self._low_mask
            else:
                high ^= _mixed(low, key) & self._high_mask
        joined: npt.NDArray[np.uint64] = high << self._low_bits | low
        return joined


def _mixed(values: npt.NDArray[np.uint64], key: np.uint64) -> npt.NDArray[np.uint64]:
    """A hash of 64 bits whose every bit depends on all bits of value and key (the finaliser of SplitMix64)."""
    mixed = values + key
    mixed ^= mixed >> np.uint64(30)
    mixed *= np.uint64(0xBF58476D1CE4E5B9)
    mixed ^= mixed >> np.uint64(27)
    mixed *= np.uint64(0x94D049BB133111EB)
    mixed ^= mixed >> np.uint64(31)
    return mixed
