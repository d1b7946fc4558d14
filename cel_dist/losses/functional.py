"""The losses one by one, as functions of embeddings."""

import torch.distributed as dist
from torch import Tensor

from cel_dist.losses.exchange import Exchange
from cel_dist.losses.similarity import SimilarityName, find_similarity
from cel_dist.losses.terms import Settings, global_terms
from cel_dist.losses.uniformity import Pairs, check_pairs


def uniformity(x: Tensor, t: float = 2.0, pairs: Pairs = "pon", group: dist.ProcessGroup | None = None) -> Tensor:
    """Log of the mean Gaussian potential exp(-t |a - b|^2) over pairs of unit embeddings.

    From Wang and Isola 2020 (arXiv 2005.10242), with the pairs of Mun et al. 2020 (arXiv 2010.11433).
    `pon` takes the negatives within a view and averages the logarithms of the views; `apn` takes all pairs of the V K
    embeddings, positives included; `an` takes all pairs of different utterances, within views and across.

    Args:
        x: [K, V, D] embeddings, normalised here; with a group [B, V, D], this rank's rows.
        t: temperature, above 0.
        pairs: `pon`, `apn` or `an`.
        group: the ranks that share the batch, all with rows of the same shape. The value is then that of the global
            batch on every rank, and the mean of the ranks' parameter gradients is its gradient.

    Returns:
        Scalar in [-4 t, 0], float32, or float64 for float64 embeddings.

    Raises:
        CelError: fewer than two utterances, embeddings of length 0 or not finite, unknown pairs, or `t` not above 0.

    >>> import torch
    >>> x = torch.tensor([[[1.0, 0.0]], [[-3.0, 0.0]]])
    >>> round(float(uniformity(x, t=2.0)), 5)
    -8.0
    """
    check_pairs(pairs, t)
    return global_terms(x, None, None, None, Exchange(group, "gather"), Settings(pairs=pairs, t=t)).loss


def angular_prototypical(x: Tensor, w: Tensor, b: Tensor, group: dist.ProcessGroup | None = None) -> Tensor:
    """Cross entropy of view 0 against the prototypes, logits w cos + b (A-Prot; Chung et al. 2020, arXiv 2003.11982).

    The prototype of an utterance is the mean of its unit embeddings in views 1..V-1.

    Args:
        x: [K, V, D] embeddings, normalised here, V >= 2; with a group [B, V, D], this rank's rows.
        w: [1] scale, positive.
        b: [1] shift. It cancels in the softmax and is kept for parity of checkpoints.
        group: the ranks that share the batch, all with rows of the same shape. The value is then that of the global
            batch on every rank, and the mean of the ranks' parameter gradients is its gradient.

    Returns:
        Scalar, float32, or float64 for float64 embeddings.

    Raises:
        CelError: fewer than two utterances or views, or embeddings of length 0 or not finite.
    """
    return _similarity("angular_prototypical", x, w, b, group)


def angular_contrastive(x: Tensor, w: Tensor, b: Tensor, group: dist.ProcessGroup | None = None) -> Tensor:
    """Mean of the cross entropies over rows and over columns of w cos(z_0i, z_1j) + b (A-Cont; Mun et al. 2020).

    Arguments and value as `angular_prototypical`, for two views.

    Raises:
        CelError: fewer than two utterances, not two views, or embeddings of length 0 or not finite.
    """
    return _similarity("angular_contrastive", x, w, b, group)


def prototypical(x: Tensor, group: dist.ProcessGroup | None = None) -> Tensor:
    """Cross entropy of view 0 against the prototypes, logits -|x_0i - p_j|^2 (Snell et al. 2017, arXiv 1703.05175).

    Embeddings are taken as they are, not normalised; the prototype p is the mean of views 1..V-1. Computed in fp64,
    because -|a - p|^2 comes of a difference of large numbers. Arguments, value and errors as `angular_prototypical`.
    """
    return _similarity("prototypical", x, None, None, group)


def ge2e(x: Tensor, w: Tensor, b: Tensor, group: dist.ProcessGroup | None = None) -> Tensor:
    """Cross entropy of every view against the centroids, logits w cos + b (GE2E; Wan et al. 2018, arXiv 1710.10467).

    The centroid of an utterance is the mean of its unit embeddings; for its own views it leaves out the view compared
    (equations 5, 8 and 9 there). As in the published CEL code, cosines below 1e-6 are raised to it. Arguments, value
    and errors as `angular_prototypical`.
    """
    return _similarity("ge2e", x, w, b, group)


def _similarity(
    name: SimilarityName, x: Tensor, w: Tensor | None, b: Tensor | None, group: dist.ProcessGroup | None
) -> Tensor:
    settings = Settings(similarity=find_similarity(name))
    return global_terms(x, w, b, None, Exchange(group, "gather"), settings).loss
