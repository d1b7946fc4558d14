"""Scores of trials from embeddings."""

import numpy as np
from numpy.typing import NDArray

from cel_dist.evaluation.trials import Trials

_BLOCK_FLOATS = 4_000_000
"""Numbers of one side of a block, 32 MB: enough to keep the processor busy, whatever the number of trials."""


def score_trials(embeddings: NDArray[np.float32], trials: Trials) -> NDArray[np.float64]:
    """Minus the Euclidean distance of unit embeddings, a mean over all pairs of windows where there are windows.

    Distances come from matrix products, |a - b|^2 = |a|^2 + |b|^2 - 2 <a, b>, in float64: in float32 the
    difference would cancel most digits for embeddings that are close, as all are before training.

    Args:
        embeddings: [N, D], or [N, windows, D]; row i belongs to `trials.files[i]`.
        trials: M trials.

    Returns:
        float64 [M] scores in [-2, 0], higher for more alike.
    """
    windowed = embeddings if embeddings.ndim == 3 else embeddings[:, None]
    block = max(1, _BLOCK_FLOATS // (windowed.shape[1] * windowed.shape[2]))
    scores = np.empty(len(trials))
    for begin in range(0, len(trials), block):
        rows = slice(begin, begin + block)
        enrol = windowed[trials.enrol[rows]].astype(np.float64)
        test = windowed[trials.test[rows]].astype(np.float64)
        products = enrol @ test.transpose(0, 2, 1)
        norms = np.square(enrol).sum(-1)[:, :, None] + np.square(test).sum(-1)[:, None, :]
        distances = np.sqrt(np.maximum(norms - 2 * products, 0))
        scores[rows] = -distances.mean(axis=(1, 2))
    return scores
