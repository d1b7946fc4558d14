"""Embeddings to scores: what is taken off them, how two are compared, and how a cohort normalises the score."""

import logging
from dataclasses import dataclass, fields
from typing import Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from cel_dist.errors import CelError

logger = logging.getLogger(__name__)

Scoring: TypeAlias = Literal["negative_euclidean", "cosine"]
ScoreNorm: TypeAlias = Literal["z", "t", "s", "as"]
Embeddings: TypeAlias = NDArray[np.float32]
Scores: TypeAlias = NDArray[np.float64]
Places: TypeAlias = NDArray[np.integer]

_BLOCK_PAIRS = 512
"""Pairs at a time, 1 MB a side with 512 dimensions: what stays in the caches of a core."""
_BLOCK_FLOATS = 4_000_000
"""Numbers of one side of a block of windows, or of scores against the cohort: 32 MB, whatever the number of trials."""


@dataclass(frozen=True)
class BackEnd:
    """From two embeddings to a score.

    1. `mean` is taken off every embedding, which is brought back to unit length.
    2. `scoring` compares two: minus their Euclidean distance, or their cosine. The order is the same; windows, norms
       and calibrations differ.
    3. `score_norm` states the score in standard deviations of the scores that the two utterances have against the
       cohort, other speakers all of them (mu, sigma: of the score of one side against the cohort, sigma with the
       divisor of all, not one less):

           z     (s - mu_enrol) / sigma_enrol
           t     (s - mu_test) / sigma_test
           s     the mean of both
           as    the mean of both, each side's mu and sigma over the `top_n` utterances of the cohort that are most
                 like that side: adaptive s-norm 1 of Matejka et al. 2017 (Analysis of score normalization in
                 multilingual speaker recognition, Interspeech), after Karam et al. 2011 and Cumani et al. 2011

    Attributes:
        scoring: how two embeddings are compared.
        mean: float32 [D], or None.
        score_norm: one of the four, or None.
        cohort: float32 [K, D], or [K, windows, D] for trials of windows; of unit length, `mean` taken off. Needed with
            `score_norm`.
        top_n: of `as`.

    Raises:
        CelError: `score_norm` without a cohort of at least two, or `top_n` below 2.
    """

    scoring: Scoring = "negative_euclidean"
    mean: Embeddings | None = None
    score_norm: ScoreNorm | None = None
    cohort: Embeddings | None = None
    top_n: int = 300

    def __post_init__(self) -> None:
        if self.score_norm is not None and (self.cohort is None or len(self.cohort) < 2):
            raise CelError(f"the score norm '{self.score_norm}' needs a cohort of at least two; give a longer list")
        if self.top_n < 2:
            raise CelError(f"top_n={self.top_n}; give at least 2, a deviation of one score is nothing")

    @staticmethod
    def fit(
        cohort: Embeddings,
        *,
        scoring: Scoring = "negative_euclidean",
        subtract_mean: bool = False,
        score_norm: ScoreNorm | None = None,
        top_n: int = 300,
    ) -> "BackEnd":
        """The back end with the mean, the cohort, or both, of these unit embeddings [K, D] or [K, windows, D]."""
        mean = None
        if subtract_mean:
            mean = cohort.reshape(-1, cohort.shape[-1]).mean(axis=0, dtype=np.float64).astype(np.float32)
        kept = _without_mean(cohort, mean) if score_norm else None
        return BackEnd(scoring, mean, score_norm, kept, top_n)

    def score(self, embeddings: Embeddings, enrol: Places, test: Places) -> Scores:
        """Scores of M pairs, float64 [M], higher for more alike.

        Without a norm they lie in [-2, 0] (Euclidean) or [-1, 1] (cosine). Of windows it is the mean over all pairs of
        them.

        Args:
            embeddings: of unit length, float32 [N, D] or [N, windows, D].
            enrol: [M] rows of `embeddings`.
            test: [M] rows of `embeddings`.

        Raises:
            CelError: all scores of an utterance against the cohort are equal.
        """
        rows = _without_mean(embeddings, self.mean)
        scores = pair_scores(rows, enrol, test, self.scoring)
        if self.score_norm is None:
            return scores
        sides = {"z": (enrol,), "t": (test,)}.get(self.score_norm, (enrol, test))
        mean, deviation = self._cohort_statistics(rows, np.unique(np.concatenate(sides)))
        parts = [(scores - mean[side]) / deviation[side] for side in sides]
        normalised: Scores = parts[0] if len(parts) == 1 else (parts[0] + parts[1]) / 2
        return normalised

    def _cohort_statistics(self, rows: Embeddings, places: Places) -> tuple[Scores, Scores]:
        """Mean and deviation [N] of the scores of some rows against the cohort; 0 elsewhere."""
        assert self.cohort is not None
        size = len(self.cohort)
        kept = size
        if self.score_norm == "as":
            if self.top_n > size:
                logger.warning("the cohort has %d entries, fewer than top_n=%d: all of them count", size, self.top_n)
            kept = min(self.top_n, size)
        means, deviations = np.zeros(len(rows)), np.zeros(len(rows))
        # Once, and not for every block of rows: of a large cohort it is gigabytes.
        cohort = self.cohort.astype(np.float64)
        windows = 1 if rows.ndim == 2 else rows.shape[1]
        block = max(1, _BLOCK_FLOATS // (self.cohort.size // self.cohort.shape[-1] * windows))
        for begin in range(0, len(places), block):
            chosen = places[begin : begin + block]
            scores = cohort_scores(rows[chosen], cohort, self.scoring)
            if kept < size:
                scores = np.partition(scores, size - kept, axis=1)[:, size - kept :]
            means[chosen], deviations[chosen] = scores.mean(axis=1), scores.std(axis=1)
        # Rounding leaves equal scores some last digits apart.
        if not (deviations[places] > 1e-9).all():
            raise CelError(
                "an utterance has the same score against all of the cohort; give a cohort of different files"
            )
        return means, deviations

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, BackEnd):
            return NotImplemented
        return all(np.array_equal(getattr(self, field.name), getattr(other, field.name)) for field in fields(self))


def pair_scores(rows: Embeddings, enrol: Places, test: Places, scoring: Scoring) -> Scores:
    """Scores of M pairs of rows, without mean and norm: see `BackEnd.score`.

    The squared distance is summed from differences in float32, which are exact where two embeddings are close: products
    would cancel most digits there, and before training all embeddings are close. The cosine is 1 - d^2 / 2, so that it,
    too, tells close ones apart.
    """
    if rows.ndim == 3 and scoring == "negative_euclidean":
        return _window_scores(rows, enrol, test)
    if rows.ndim == 3:
        # The mean of all products is the product of the means; what lengths lack of 1 is made up for as in 1 - d^2 / 2.
        means = rows.mean(axis=1, dtype=np.float64)
        lacking = (1 - np.square(rows, dtype=np.float64).sum(-1).mean(axis=1)) / 2
        parts = [slice(begin, begin + _BLOCK_PAIRS) for begin in range(0, len(enrol), _BLOCK_PAIRS)]
        products = np.concatenate([np.einsum("ij,ij->i", means[enrol[part]], means[test[part]]) for part in parts])
        cosines: Scores = products + lacking[enrol] + lacking[test]
        return cosines
    squares = np.empty(len(enrol))
    left, right = np.empty((2, _BLOCK_PAIRS, rows.shape[1]), np.float32)
    for begin in range(0, len(enrol), _BLOCK_PAIRS):
        part = slice(begin, begin + _BLOCK_PAIRS)
        count = len(enrol[part])
        # 'clip' spares numpy a buffer; the places were made by this package.
        np.take(rows, enrol[part], axis=0, out=left[:count], mode="clip")
        np.take(rows, test[part], axis=0, out=right[:count], mode="clip")
        np.subtract(left[:count], right[:count], out=left[:count])
        squares[part] = np.einsum("ij,ij->i", left[:count], left[:count])
    return 1 - squares / 2 if scoring == "cosine" else -np.sqrt(squares)


def cohort_scores(rows: Embeddings, cohort: Embeddings | Scores, scoring: Scoring) -> Scores:
    """Scores [N, K] of embeddings [N, D] or [N, windows, D] against a cohort [K, D] or [K, windows, D]."""
    left, right = (side.astype(np.float64, copy=False).reshape(-1, side.shape[-1]) for side in (rows, cohort))
    lengths = (np.einsum("nd,nd->n", side, side) for side in (left, right))
    squares = np.add.outer(*lengths) - 2 * (left @ right.T)
    # The cosine as in `pair_scores`: lengths are 1 but for the rounding to float32, which close embeddings would show.
    compared = 1 - squares / 2 if scoring == "cosine" else -np.sqrt(np.maximum(squares, 0))
    num_rows, num_cohort = len(rows), len(cohort)
    shape = (num_rows, len(left) // max(num_rows, 1), num_cohort, len(right) // num_cohort)
    scores: Scores = compared.reshape(shape).mean(axis=(1, 3))
    return scores


def _window_scores(rows: Embeddings, enrol: Places, test: Places) -> Scores:
    """Minus the mean distance over all pairs of windows, from products in float64."""
    squares = np.square(rows, dtype=np.float64).sum(-1)
    block = max(1, _BLOCK_FLOATS // (rows.shape[1] * rows.shape[2]))
    scores = np.empty(len(enrol))
    for begin in range(0, len(enrol), block):
        left, right = enrol[begin : begin + block], test[begin : begin + block]
        products = rows[left].astype(np.float64) @ rows[right].astype(np.float64).transpose(0, 2, 1)
        distances = np.sqrt(np.maximum(squares[left][:, :, None] + squares[right][:, None, :] - 2 * products, 0))
        scores[begin : begin + block] = -distances.mean(axis=(1, 2))
    return scores


def _without_mean(rows: Embeddings, mean: Embeddings | None) -> Embeddings:
    """`rows` with the mean taken off, at unit length again."""
    if mean is None:
        return rows
    moved = rows.astype(np.float64) - mean
    lengths = np.linalg.norm(moved, axis=-1, keepdims=True)
    unit: Embeddings = (moved / np.maximum(lengths, np.finfo(np.float32).tiny)).astype(np.float32)
    return unit
