"""The uniformity loss: embeddings spread over the unit sphere (Wang and Isola 2020, arXiv 2005.10242).

    D = sum_ij exp(-t |z_i - z_j|^2)      L = log(D / number of pairs)      dL/dz_i = 4 t / D sum_j exp(..) (z_j - z_i)

Both ends of a pair pull alike, hence 4 t instead of 2 t, and a row needs nothing but a pass over all rows and D.
"""

import functools
from collections.abc import Callable
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from cel_dist.errors import CelError
from cel_dist.losses.tiles import Comparison, Softmax

Pairs = Literal["pon", "apn", "an"]

# The published code takes distances across views, and those of `prototypical`, with F.pairwise_distance, which adds
# this to every coordinate of a difference. It moves a loss by about 1e-6, and is kept because the reference numbers
# hold to 1e-9.
PUBLISHED_SHIFT = 1e-6

# exp(40) K is far from the largest fp32 number, and exp(-40) from the smallest.
_LARGEST_BOUNDED_LOGIT = 40.0


class ViewPair(NamedTuple):
    """Pairs of one view's embeddings with those of another, or of the same.

    Attributes:
        anchor, key: numbers of the views.
        with_positives: an utterance meets itself in the other view.
        shift: is added to every coordinate of the difference anchor - key.
    """

    anchor: int
    key: int
    with_positives: bool
    shift: float


def view_pairs(pairs: Pairs, num_views: int) -> list[list[ViewPair]]:
    """The pairs of views whose potentials are summed, by logarithm: the loss is the mean of the logarithms."""
    views = range(num_views)
    if pairs == "pon":
        return [[ViewPair(view, view, False, 0.0)] for view in views]
    shift = PUBLISHED_SHIFT if pairs == "an" else 0.0
    return [[ViewPair(u, v, pairs == "apn" and u != v, shift * ((v > u) - (v < u))) for u in views for v in views]]


def check_pairs(pairs: str, t: float) -> None:
    """Raise CelError unless `pairs` is a known choice and `t` is above 0."""
    if pairs not in get_args(Pairs):
        raise CelError(f"unknown pairs '{pairs}' of the uniformity loss; choose one of {', '.join(get_args(Pairs))}")
    if not t > 0:
        raise CelError(f"the temperature t of the uniformity loss is {t}; give a number above 0")


class UniformityTerm:
    """One logarithm of the uniformity loss over the global batch, for the embeddings of this rank.

    Args:
        pairs: the pairs of views in it.
        units: [B, V, D] unit embeddings of this rank, without graph.
        t: temperature.
        with_gradient: whether `gradient` will be asked for.
    """

    def __init__(self, pairs: list[ViewPair], units: Tensor, t: float, with_gradient: bool) -> None:
        self._pairs, self._t, self._with_gradient = pairs, t, with_gradient
        self._units = units

    def comparisons(self) -> list[tuple[Comparison, bool]]:
        """What the first pass compares: -t |a - b|^2 = 2 t <a, b> - t |a|^2 - t, of which it takes the first part."""
        return [
            (
                Comparison(
                    2 * self._t * self._anchors(pair),
                    unit_view(pair.key),
                    bounded=2 * self._t <= _LARGEST_BOUNDED_LOGIT,
                    meets_itself=pair.with_positives,
                ),
                self._with_gradient,
            )
            for pair in self._pairs
        ]

    def take(self, softmaxes: list[Softmax]) -> Tensor:
        """This rank's part of what the ranks tell each other: the logarithm of its part of D; [1].

        Args:
            softmaxes: of the comparisons, after the first pass.
        """
        self._softmaxes = softmaxes
        self._potentials = [
            softmax.logsumexp() - self._t * (1 + self._anchors(pair).square().sum(dim=-1))
            for softmax, pair in zip(softmaxes, self._pairs, strict=True)
        ]
        return torch.cat(self._potentials).logsumexp(dim=0, keepdim=True)

    def value(self, shared: Tensor, num_utterances: int, num_same: Tensor) -> Tensor:
        """The logarithm of the global batch, as exact as the parts; of no use where all utterances are one sample.

        Args:
            shared: [W, 1] the parts of all ranks.
            num_utterances: K.
            num_same: fp64 scalar, ordered pairs of rows with equal sample ids, every row with itself among them.
        """
        kept = num_utterances * sum(pair.with_positives for pair in self._pairs)
        num_pairs = len(self._pairs) * (num_utterances**2 - num_same) + kept
        return shared.logsumexp(dim=0).squeeze(0) - num_pairs.log()

    def gradient(self, shared: Tensor) -> Tensor:
        """Gradient at this rank's unit embeddings, [B, V, D]."""
        log_total = shared.logsumexp(dim=0).to(self._units.dtype)
        gradient = torch.zeros_like(self._units)
        for pair, softmax, potential in zip(self._pairs, self._softmaxes, self._potentials, strict=True):
            weights = 4 * self._t * (potential - log_total).exp()
            # The part along z_i of z_j - z_i does not turn it, so only the shift is left of -z_i.
            gradient[:, pair.anchor] += weights[:, None] * (softmax.mean() - pair.shift)
        return gradient

    def _anchors(self, pair: ViewPair) -> Tensor:
        return self._units[:, pair.anchor] + pair.shift


@functools.cache
def unit_view(view: int) -> Callable[[Tensor], Tensor]:
    """The map from rows [n, V, D] to one view's unit embeddings [n, D]; the same function for the same view."""
    return lambda x: F.normalize(x[:, view], dim=-1)
