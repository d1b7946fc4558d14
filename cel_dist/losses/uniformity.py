"""The uniformity loss: embeddings spread over the unit sphere."""

import math
from typing import Literal, get_args

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from cel_dist.errors import CelError
from cel_dist.losses.gather import gather_rows
from cel_dist.losses.precision import full_precision

Pairs = Literal["pon", "apn", "an"]

# The published code takes distances across views with F.pairwise_distance, which adds this to every coordinate of a
# difference. It moves a loss by about 1e-6, and is kept because the reference numbers hold to 1e-9.
PUBLISHED_SHIFT = 1e-6


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
        CelError: fewer than two utterances, unknown pairs, or `t` not above 0.

    >>> x = torch.tensor([[[1.0, 0.0]], [[-3.0, 0.0]]])
    >>> uniformity(x, t=2.0)
    tensor(-8.)
    """
    check_pairs(pairs, t)
    with full_precision(x) as own:
        return uniformity_of_rows(gather_rows(own, group), t, pairs)


def uniformity_of_rows(x: Tensor, t: float, pairs: Pairs) -> Tensor:
    """Uniformity of the gathered rows [K, V, D]; `uniformity` says the rest."""
    num_utterances, num_views = check_rows(x, num_views=1)
    # A Gram matrix a view for `pon`, [V, K, K], and one of all embeddings for the others, [V K, V K].
    z = F.normalize(x, dim=-1).transpose(0, 1)
    if pairs != "pon":
        z = z.flatten(0, 1)
    # |a - b|^2 = 2 - 2 <a, b> on the sphere.
    squared_distances = 2 - 2 * z @ z.mT
    if pairs == "an":
        utterance = torch.arange(len(z), device=x.device) % num_utterances
        view = torch.arange(len(z), device=x.device) // num_utterances
        squared_distances = squared_distances + _published_shift(z, view)
        excluded = utterance[:, None] == utterance
        num_pairs = num_views**2 * num_utterances * (num_utterances - 1)
    else:
        excluded = torch.eye(z.shape[-2], dtype=torch.bool, device=x.device)
        num_pairs = z.shape[-2] * (z.shape[-2] - 1)
    # Every pair stands above and below the diagonal, and is counted twice in `num_pairs` too.
    log_potential = (-t * squared_distances).masked_fill(excluded, -math.inf)
    return (log_potential.flatten(-2).logsumexp(-1) - math.log(num_pairs)).mean()


def _published_shift(z: Tensor, view: Tensor) -> Tensor:
    """What |a - b + PUBLISHED_SHIFT|^2 has more than |a - b|^2, [n, n], where a is of an earlier view than b."""
    direction = torch.sign(view - view[:, None]).to(z.dtype)
    coordinate_sums = z.sum(dim=-1)
    differences = coordinate_sums[:, None] - coordinate_sums
    return 2 * PUBLISHED_SHIFT * direction * differences + PUBLISHED_SHIFT**2 * z.shape[-1] * direction.abs()


def check_pairs(pairs: str, t: float) -> None:
    """Raise CelError unless `pairs` is a known choice and `t` is above 0."""
    if pairs not in get_args(Pairs):
        raise CelError(f"unknown pairs '{pairs}' of the uniformity loss; choose one of {', '.join(get_args(Pairs))}")
    if not t > 0:
        raise CelError(f"the temperature t of the uniformity loss is {t}; give a number above 0")


def check_rows(x: Tensor, num_views: int) -> tuple[int, int]:
    """K and V of rows [K, V, D]; raise CelError unless K >= 2 and V >= `num_views`."""
    if x.ndim != 3:
        raise CelError(f"embeddings have shape {list(x.shape)}; give [utterances, views, dimensions]")
    if len(x) < 2:
        raise CelError(f"the global batch holds {len(x)} utterance; a contrastive loss has no negatives below 2")
    if x.shape[1] < num_views:
        raise CelError(f"an utterance has {x.shape[1]} view; this loss needs at least {num_views}")
    return len(x), x.shape[1]
