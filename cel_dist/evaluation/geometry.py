"""How embeddings lie on the unit sphere: alignment, uniformity, and how many dimensions they use.

Alignment and uniformity are those of Wang and Isola 2020 (arXiv 2005.10242, equations 1 and 2): the mean squared
distance of embeddings of one speaker, and the log of the mean Gaussian potential of all pairs. Both are better when
lower, and each alone can be had for nothing: alignment by one embedding for all, uniformity by noise.
"""

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from pydantic import BaseModel, ConfigDict
from scipy.sparse import csr_matrix

from cel_dist.evaluation.metadata import Metadata, name_numbers
from cel_dist.evaluation.trials import Trials
from cel_dist.losses import uniformity

MAX_UNIFORMITY_ROWS = 10_000
"""Uniformity takes all pairs of so many utterances; of longer lists, of so many that are drawn with a fixed seed."""

_VARIANCE_SHARE = 0.9


class Alignment(BaseModel):
    """Mean squared distance of two embeddings of one speaker, in [0, 4], and the number of pairs.

    Attributes:
        mean: None without pairs.
        pairs: over which the mean is; each pair weighs the same.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    mean: float | None
    pairs: int


class Geometry(BaseModel):
    """The embeddings of N utterances on the unit sphere of D dimensions.

    Attributes:
        utterances, dimensions: N and D.
        uniformity: log mean exp(-2 |a - b|^2) over pairs of utterances, in [-8, 0]: `losses.uniformity`.
        uniformity_utterances: of how many utterances all pairs were taken, N up to `MAX_UNIFORMITY_ROWS`.
        alignment_targets: over the target trials.
        alignment_speakers, alignment_within_sessions, alignment_between_sessions: over all pairs of utterances of one
            speaker, those of one session, and those of two sessions. None where speakers or sessions are not known.
        effective_rank: exp of the entropy of the covariance's eigenvalues divided by their sum (Roy and Vetterli 2007),
            in [1, D]; far below D and N the dimensions have collapsed (Jing et al. 2022, arXiv 2110.09348).
        components: directions that hold nine tenths of the variance.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    utterances: int
    dimensions: int
    uniformity: float
    uniformity_utterances: int
    alignment_targets: Alignment
    alignment_speakers: Alignment | None = None
    alignment_within_sessions: Alignment | None = None
    alignment_between_sessions: Alignment | None = None
    effective_rank: float
    components: int


def measure_geometry(
    embeddings: NDArray[np.float32],
    trials: Trials,
    metadata: Metadata | None = None,
    *,
    max_rows: int = MAX_UNIFORMITY_ROWS,
) -> Geometry:
    """Alignment, uniformity and spectrum of the embeddings of a list. Memory grows with N D, not with N^2.

    Args:
        embeddings: [N, D]; or [N, windows, D], of which the mean of the windows is taken and brought to unit length.
        trials: over the N utterances.
        metadata: of the N utterances; speakers and sessions are used where it has them.
        max_rows: largest number of utterances all of whose pairs are taken for the uniformity.
    """
    rows = unit_rows(embeddings)
    effective_rank, components = _spectrum(rows)
    within = between = speakers = None
    if metadata is not None and metadata.speaker is not None:
        speakers = _alignment_of(rows, metadata.speaker)
        if metadata.session is not None:
            # Only where both are known can a pair be told to be within a session or between two.
            known = (metadata.speaker != "") & (metadata.session != "")
            joined = np.char.add(np.char.add(metadata.speaker, "\t"), metadata.session)
            within = _alignment_of(rows, np.where(known, joined, ""))
            between = _difference(_alignment_of(rows, np.where(known, metadata.speaker, "")), within)
    potential, num_used = _uniformity(rows, max_rows)
    return Geometry(
        utterances=rows.shape[0],
        dimensions=rows.shape[1],
        uniformity=potential,
        uniformity_utterances=num_used,
        alignment_targets=_alignment_of_targets(rows, trials),
        alignment_speakers=speakers,
        alignment_within_sessions=within,
        alignment_between_sessions=between,
        effective_rank=effective_rank,
        components=components,
    )


def sphere_measures(embeddings: NDArray[np.float32], trials: Trials) -> dict[str, float]:
    """Alignment of the target trials and uniformity of all utterances, to be recorded during training.

    Arguments as for `measure_geometry`. They are called `eval_alignment` and `eval_uniformity`: without the prefix they
    would be mixed with those of the batches.
    """
    rows = unit_rows(embeddings)
    aligned = _alignment_of_targets(rows, trials).mean
    measures = {"eval_uniformity": _uniformity(rows, MAX_UNIFORMITY_ROWS)[0]}
    return measures if aligned is None else {"eval_alignment": aligned, **measures}


def unit_rows(embeddings: ArrayLike) -> NDArray[np.float64]:
    """One unit vector an utterance, float64 [N, D], from [N, D] or [N, windows, D]."""
    given = np.asarray(embeddings)
    # Not the windows themselves in float64: of a long list they are gigabytes.
    rows: NDArray[np.float64] = given.mean(axis=1, dtype=np.float64) if given.ndim == 3 else given.astype(np.float64)
    lengths = np.sqrt(np.einsum("nd,nd->n", rows, rows))
    rows /= np.maximum(lengths, np.finfo(np.float64).tiny)[:, None]
    return rows


def _uniformity(rows: NDArray[np.float64], max_rows: int) -> tuple[float, int]:
    """Of unit rows [N, D], and the number of rows that it was taken of."""
    if len(rows) > max_rows:
        rows = rows[np.sort(np.random.default_rng(0).choice(len(rows), max_rows, replace=False))]
    return float(uniformity(torch.from_numpy(rows[:, None].astype(np.float32)), t=2.0)), len(rows)


def _alignment_of_targets(rows: NDArray[np.float64], trials: Trials) -> Alignment:
    targets = np.flatnonzero(trials.labels == 1)
    total, block = 0.0, 1 << 14
    for begin in range(0, len(targets), block):
        part = targets[begin : begin + block]
        total += float(np.square(rows[trials.enrol[part]] - rows[trials.test[part]]).sum())
    return Alignment(mean=total / len(targets) if len(targets) else None, pairs=len(targets))


def _alignment_of(rows: NDArray[np.float64], groups: NDArray[np.str_]) -> Alignment:
    """Over all pairs within a group; a row with the group "" is in none.

    The sum over the pairs of n rows of |a - b|^2 is n sum |a|^2 - |sum a|^2: no pair is ever looked at.
    """
    numbers = name_numbers(groups)
    known = np.flatnonzero(numbers >= 0)
    # A row a group, with ones at its members: the sums of the groups are one product, and no row is copied.
    ones = (np.ones(len(known)), (numbers[known], known))
    membership = csr_matrix(ones, shape=(int(numbers.max(initial=-1)) + 1, len(rows)))
    counts = np.diff(membership.indptr).astype(np.int64)
    sums = membership @ rows
    squares = membership @ np.einsum("nd,nd->n", rows, rows)
    pairs = int((counts * (counts - 1) // 2).sum())
    total = float((counts * squares - np.square(sums).sum(axis=1)).sum())
    return Alignment(mean=max(total, 0.0) / pairs if pairs else None, pairs=pairs)


def _difference(whole: Alignment, part: Alignment) -> Alignment:
    """Over the pairs of `whole` that are not in `part`."""
    pairs = whole.pairs - part.pairs
    if pairs == 0:
        return Alignment(mean=None, pairs=0)
    total = (whole.mean or 0.0) * whole.pairs - (part.mean or 0.0) * part.pairs
    return Alignment(mean=max(total, 0.0) / pairs, pairs=pairs)


def _spectrum(rows: NDArray[np.float64]) -> tuple[float, int]:
    """Effective rank, and number of principal components that hold `_VARIANCE_SHARE` of the variance."""
    mean = rows.mean(axis=0)
    covariance = rows.T @ rows / len(rows) - np.outer(mean, mean)
    variances = np.maximum(np.linalg.eigvalsh(covariance)[::-1], 0)
    total = variances.sum()
    if total <= 1e-12:
        return 1.0, 0
    shares = variances / total
    used = shares[shares > 0]
    rank = float(np.exp(-(used * np.log(used)).sum()))
    return rank, int(np.searchsorted(np.cumsum(shares), _VARIANCE_SHARE) + 1)
