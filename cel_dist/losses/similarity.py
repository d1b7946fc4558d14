"""The similarity losses: the views of an utterance drawn together, and away from the other utterances.

All of them are a cross entropy whose right answer is the own utterance. They differ in what a row of logits compares.
"""

from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from cel_dist.errors import CelError
from cel_dist.losses.gather import gather_rows
from cel_dist.losses.precision import full_precision
from cel_dist.losses.uniformity import PUBLISHED_SHIFT, check_rows

SimilarityName = Literal["angular_prototypical", "angular_contrastive", "prototypical", "ge2e"]


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
        CelError: fewer than two utterances or views.
    """
    with full_precision(x) as own:
        return cross_entropy(w * _prototype_cosines(gather_rows(own, group)) + b)


def angular_contrastive(x: Tensor, w: Tensor, b: Tensor, group: dist.ProcessGroup | None = None) -> Tensor:
    """Mean of the cross entropies over rows and over columns of w cos(z_0i, z_1j) + b (A-Cont; Mun et al. 2020).

    Arguments and value as `angular_prototypical`, for two views.

    Raises:
        CelError: fewer than two utterances, or not two views.
    """
    with full_precision(x) as own:
        return cross_entropy(w * _view_cosines(gather_rows(own, group)) + b, symmetric=True)


def prototypical(x: Tensor, group: dist.ProcessGroup | None = None) -> Tensor:
    """Cross entropy of view 0 against the prototypes, logits -|x_0i - p_j|^2 (Snell et al. 2017, arXiv 1703.05175).

    Embeddings are taken as they are, not normalised; the prototype p is the mean of views 1..V-1. Arguments, value
    and errors as `angular_prototypical`.
    """
    with full_precision(x) as own:
        return cross_entropy(_prototype_distances(gather_rows(own, group)))


def ge2e(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    """Cross entropy of every view against the centroids, logits w cos + b (GE2E; Wan et al. 2018, arXiv 1710.10467).

    The centroid of an utterance is the mean of its unit embeddings; for its own views it leaves out the view compared
    (equations 5, 8 and 9 there). As in the published CEL code, cosines below 1e-6 are raised to it. Over a process
    group, use `EquilibriumLoss("ge2e", group=...)`.

    Args:
        x: [K, V, D] embeddings, normalised here, V >= 2.
        w: [1] scale, positive.
        b: [1] shift.

    Returns:
        Scalar, float32, or float64 for float64 embeddings.

    Raises:
        CelError: fewer than two utterances or views.
    """
    with full_precision(x) as rows:
        return cross_entropy(w * _centroid_cosines(rows) + b)


class Similarity(NamedTuple):
    """What tells a similarity loss from the others.

    Attributes:
        compare: gathered rows [K, V, D] to similarities [..., K, K] whose right answers are on the diagonal.
        scaled: whether the logits are w times the similarities plus b, or the similarities themselves.
        symmetric: whether the columns are classified too.
    """

    compare: Callable[[Tensor], Tensor]
    scaled: bool
    symmetric: bool


def cross_entropy(logits: Tensor, symmetric: bool = False) -> Tensor:
    """Mean cross entropy of the rows (`symmetric`: and of the columns) of logits [..., K, K], right on the diagonal."""
    log_normaliser = logits.logsumexp(-1)
    if symmetric:
        log_normaliser = (log_normaliser + logits.logsumexp(-2)) / 2
    return (log_normaliser - logits.diagonal(dim1=-2, dim2=-1)).mean()


def _prototype_cosines(x: Tensor) -> Tensor:
    check_rows(x, num_views=2)
    z = F.normalize(x, dim=-1)
    return z[:, 0] @ F.normalize(z[:, 1:].mean(dim=1), dim=-1).mT


def _view_cosines(x: Tensor) -> Tensor:
    check_rows(x, num_views=2)
    if x.shape[1] != 2:
        raise CelError(f"angular_contrastive compares two views, not {x.shape[1]}; use angular_prototypical or ge2e")
    z = F.normalize(x, dim=-1)
    return z[:, 0] @ z[:, 1].mT


def _prototype_distances(x: Tensor) -> Tensor:
    check_rows(x, num_views=2)
    # |a - p + shift|, as published, is |a - (p - shift)|.
    prototypes = x[:, 1:].mean(dim=1) - PUBLISHED_SHIFT
    # -|a - p|^2 without the -|a|^2, which is the same along a row and so cancels in its softmax.
    return 2 * x[:, 0] @ prototypes.mT - prototypes.square().sum(dim=-1)


def _centroid_cosines(x: Tensor) -> Tensor:
    num_utterances, num_views = check_rows(x, num_views=2)
    z = F.normalize(x, dim=-1)
    total = z.sum(dim=1, keepdim=True)
    to_own = (z * F.normalize((total - z) / (num_views - 1), dim=-1)).sum(dim=-1)
    to_others = z.transpose(0, 1) @ F.normalize(total.squeeze(1) / num_views, dim=-1).mT
    own = torch.eye(num_utterances, dtype=torch.bool, device=x.device)
    return torch.where(own, to_own.mT.unsqueeze(-1), to_others).clamp(min=1e-6)


SIMILARITIES: dict[SimilarityName, Similarity] = {
    "angular_prototypical": Similarity(_prototype_cosines, scaled=True, symmetric=False),
    "angular_contrastive": Similarity(_view_cosines, scaled=True, symmetric=True),
    "prototypical": Similarity(_prototype_distances, scaled=False, symmetric=False),
    "ge2e": Similarity(_centroid_cosines, scaled=True, symmetric=False),
}
