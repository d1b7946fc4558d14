"""Scores of trials from embeddings."""

import numpy as np
from numpy.typing import NDArray

from cel_dist.back_end import BackEnd
from cel_dist.evaluation.trials import Trials


def score_trials(
    embeddings: NDArray[np.float32], trials: Trials, back_end: BackEnd | None = None
) -> NDArray[np.float64]:
    """Scores float64 [M] of trials, higher for more alike.

    Args:
        embeddings: of unit length, [N, D] or [N, windows, D]; row i belongs to `trials.files[i]`.
        trials: M trials.
        back_end: what makes scores of embeddings. Default: minus the Euclidean distance, a mean over all pairs of
            windows where there are windows.

    Raises:
        CelError: as `BackEnd.score`.
    """
    return (back_end or BackEnd()).score(embeddings, trials.enrol, trials.test)
