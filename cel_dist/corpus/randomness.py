"""Random generators keyed by what they are for, so that no draw depends on another or on the order of work."""

import zlib

import numpy as np


def generator(seed: int, purpose: str, *index: int) -> np.random.Generator:
    """A generator that is a pure function of its arguments.

    Args:
        seed: seed of the corpus, not negative.
        purpose: what is drawn, for example "text"; each purpose is a stream of its own.
        index: place within the stream, for example speaker and utterance number.

    >>> generator(0, "text", 3).integers(1000) == generator(0, "text", 3).integers(1000)
    np.True_
    """
    return np.random.default_rng([seed, zlib.crc32(purpose.encode()), *index])
