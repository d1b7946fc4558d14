"""Random numbers that are a function of where they are used, so that nothing has to be remembered to resume a run."""

from enum import IntEnum, unique

import numpy as np


@unique
class Purpose(IntEnum):
    """What a stream of random numbers is for. Two purposes never share numbers."""

    ORDER = 1
    SEGMENTS = 2
    AUGMENTATION = 3
    SPEED = 11
    MASKS = 12
    PLUGIN = 13


def generator(seed: int, purpose: Purpose, epoch: int, step: int = 0, stream: int = 0) -> np.random.Generator:
    """A counter-based generator (Philox; Salmon et al. 2011) placed at (seed, purpose, epoch, step).

    Streams of different numbers, below 2^64, share nothing either.

    >>> a, b = generator(1, Purpose.ORDER, epoch=2), generator(1, Purpose.ORDER, epoch=2)
    >>> bool(a.random() == b.random() != generator(1, Purpose.ORDER, epoch=3).random())
    True
    """
    # Philox counts in the lowest word, so the higher words keep 2^64 draws of two places apart.
    counter = np.array([0, purpose, epoch, step], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=np.array([seed, stream], dtype=np.uint64), counter=counter))
