"""The similarity losses: the views of an utterance drawn together, and away from the other utterances.

Each is a cross entropy whose right answer is the own utterance. They differ only in the vectors whose inner products
are the logits. With anchors a_i, keys p_j, logits l_ij and as negatives the j whose sample id is not i's,

    n_i = logsumexp_j l_ij      L = mean_i log(1 + exp(n_i - l_ii))      q_i = 1 / (1 + exp(l_ii - n_i))
    dL/da_i = scale q_i / K (mean of p_j under the softmax of the negatives - p_i)
    dL/dp_j = scale / K (sum_i exp(l_ij - n_i) q_i a_i - q_j a_j)

so an anchor needs nothing but a pass over all keys, and a key the n_i of all anchors besides.
"""

from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from cel_dist.errors import CelError
from cel_dist.losses.batch import GlobalBatch
from cel_dist.losses.tiles import Comparison, Pull, Softmax, pulled
from cel_dist.losses.uniformity import PUBLISHED_SHIFT, unit_view
from cel_dist.plugins import SIMILARITIES as REGISTERED

SimilarityName = Literal["angular_prototypical", "angular_contrastive", "prototypical", "ge2e"]


class Similarity(NamedTuple):
    """Maps from rows [n, V, D] of any rank to what is compared, and how the logits come of it.

    Attributes:
        anchors: to [R n, D], R anchors a row; anchor r n + i belongs to row i.
        keys: to [n, D].
        positives: to [R n], the inner product of every anchor with its right answer; None where that is the key of
            its row.
        scaled: logits are w times the inner products plus b. Otherwise they are the inner products minus the squared
            length of the key, and the maps give fp64.
        symmetric: every key is to find its anchor, too.
        floor: inner products below it are raised to it.
        two_views: rows of more than two views make no sense.
    """

    anchors: Callable[[Tensor], Tensor]
    keys: Callable[[Tensor], Tensor]
    positives: Callable[[Tensor], Tensor] | None = None
    scaled: bool = True
    symmetric: bool = False
    floor: float | None = None
    two_views: bool = False

    def check_views(self, num_views: int) -> None:
        """Raise CelError unless the loss is for rows of this many views."""
        if num_views < 2:
            raise CelError(f"an utterance has {num_views} view; this loss needs at least 2")
        if self.two_views and num_views != 2:
            raise CelError(
                f"this similarity loss compares two views, not {num_views}; use angular_prototypical or ge2e"
            )

    def local(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Anchors, keys and positives of this rank's rows, with their graph."""
        anchors, keys = self.anchors(x), self.keys(x)
        positives = (anchors * keys).sum(dim=-1) if self.positives is None else self.positives(x)
        return anchors, keys, positives if self.floor is None else positives.clamp(min=self.floor)


def _unit_prototypes(x: Tensor) -> Tensor:
    return F.normalize(F.normalize(x[:, 1:], dim=-1).mean(dim=1), dim=-1)


def _all_views(x: Tensor) -> Tensor:
    return F.normalize(x, dim=-1).transpose(0, 1).flatten(0, 1)


def _centroids(x: Tensor) -> Tensor:
    return F.normalize(F.normalize(x, dim=-1).mean(dim=1), dim=-1)


def _cosines_with_centroid_of_the_others(x: Tensor) -> Tensor:
    z = F.normalize(x, dim=-1)
    others = F.normalize((z.sum(dim=1, keepdim=True) - z) / (x.shape[1] - 1), dim=-1)
    return (z * others).sum(dim=-1).T.flatten()


def _doubled_first_view(x: Tensor) -> Tensor:
    # -|a - p|^2 without -|a|^2, which is the same along a row and so cancels in its softmax. What is left are large
    # numbers with small differences when the embeddings are long: in fp32 and at a length of 32, the gradient would be
    # off by 6e-5. In fp64 it is as exact as the embeddings are.
    return 2 * x[:, 0].double()


def _prototypes(x: Tensor) -> Tensor:
    # |a - p + shift|, as published, is |a - (p - shift)|.
    return x[:, 1:].double().mean(dim=1) - PUBLISHED_SHIFT


SIMILARITIES: dict[SimilarityName, Similarity] = {
    "angular_prototypical": Similarity(unit_view(0), _unit_prototypes),
    "angular_contrastive": Similarity(unit_view(0), unit_view(1), symmetric=True, two_views=True),
    "prototypical": Similarity(_doubled_first_view, _prototypes, scaled=False),
    # As in the published code, cosines below 1e-6 are raised to it.
    "ge2e": Similarity(_all_views, _centroids, _cosines_with_centroid_of_the_others, floor=1e-6),
}


def register_similarity(name: str) -> Callable[[Callable[[], Similarity]], Callable[[], Similarity]]:
    """Decorator of a function that returns a `Similarity`: makes it known as `name` to `loss.similarity`.

    What it says of rows holds for those of all ranks: negatives, duplicates, gradients and the exchange are those of
    the losses that ship with this package.

    Raises:
        ValueError: the name is taken.
    """

    def register(definition: Callable[[], Similarity]) -> Callable[[], Similarity]:
        REGISTERED.add(name, definition())
        return definition

    return register


def similarity_names() -> list[str]:
    """Names that `find_similarity` knows, those of installed plug-ins among them."""
    return REGISTERED.names()


def find_similarity(name: str) -> Similarity:
    """The similarity loss of a name. Raises CelError where there is none; the nearest one is named."""
    found: Similarity = REGISTERED.get(name)
    return found


for _name, _similarity in SIMILARITIES.items():
    REGISTERED.add(_name, _similarity)


class SimilarityGradients(NamedTuple):
    """Gradients of the global loss at what this rank brought in; `scale` is this rank's part of the sum over ranks."""

    anchors: Tensor
    keys: Tensor
    positives: Tensor
    scale: Tensor


class SimilarityTerm:
    """A similarity loss over the global batch, for the anchors and keys of this rank.

    Args:
        similarity: which one.
        anchors, keys, positives: of this rank's rows, without graph.
        scale: [1] factor of the inner products, above 0.
        with_gradient: whether `gradients` will be asked for.
    """

    def __init__(
        self,
        similarity: Similarity,
        anchors: Tensor,
        keys: Tensor,
        positives: Tensor,
        scale: Tensor,
        with_gradient: bool,
    ) -> None:
        self._similarity = similarity
        self._anchors, self._keys, self._products, self._scale = anchors, keys, positives, scale
        self._floor = None if similarity.floor is None else float(similarity.floor * scale)
        self._logits = scale * positives + (0.0 if similarity.scaled else _bias(keys))
        self._with_gradient = with_gradient

    def comparisons(self) -> list[tuple[Comparison, bool]]:
        """What the first pass compares: anchors with keys, and keys with anchors if the loss is symmetric."""
        similarity = self._similarity
        bias = None if similarity.scaled else _bias
        rows = Comparison(self._scale * self._anchors, similarity.keys, bias, self._floor)
        if not similarity.symmetric:
            return [(rows, self._with_gradient)]
        # The means would be of no use: the anchors' gradient has the columns' softmax in it, which comes later.
        return [(rows, False), (Comparison(self._scale * self._keys, similarity.anchors), False)]

    def take(self, softmaxes: list[Softmax]) -> Tensor:
        """This rank's part of what the ranks tell each other: loss, right answers, log-normalisers; [2 + R B (1 + s)].

        Args:
            softmaxes: of the comparisons, after the first pass.
        """
        self._softmax = softmaxes[0]
        self._losses = [_log1pexp(softmax.logsumexp() - self._logits) for softmax in softmaxes]
        right = (self._logits > self._softmax.largest).sum()
        total = torch.stack(self._losses).mean(dim=0).sum()
        return torch.cat([total[None], right[None].to(total.dtype), *(self._logits + loss for loss in self._losses)])

    def value(self, shared: Tensor) -> tuple[Tensor, Tensor]:
        """Loss and accuracy of the global batch from the parts of all ranks [W, ...]."""
        loss, right = shared[:, :2].sum(dim=0) / (len(shared) * len(self._anchors))
        return loss, right

    def gradients(self, shared: Tensor, batch: GlobalBatch) -> SimilarityGradients:
        """Gradients at this rank's rows, after one more pass over the rows of all ranks."""
        # From [W, comparisons, R, B] to [R, K] for each comparison.
        by_rank = shared[:, 2:].reshape(len(shared), len(self._losses), -1, batch.num_rows)
        normalisers = by_rank.movedim(0, 2).flatten(2).to(self._keys.dtype)
        weight = 1 / (len(self._losses) * len(shared) * len(self._anchors))
        # -expm1(-loss) is the share of the softmax that the negatives have, without cancellation.
        shares = [-torch.expm1(-loss) for loss in self._losses]
        at_logits = -weight * sum(shares[1:], start=shares[0])
        similarity, scale, products = self._similarity, self._scale, self._products
        if similarity.symmetric:
            of_rows, of_columns = (self._logits + loss for loss in self._losses)
            rows, columns = normalisers
            at_key, at_anchor = pulled(
                [
                    Pull(scale * self._keys, similarity.anchors, ((None, -rows), (-of_columns, None))),
                    Pull(scale * self._anchors, similarity.keys, ((None, -columns), (-of_rows, None))),
                ],
                batch.rows,
                batch.own,
                batch.products,
                batch.tile,
            )
            anchor_sums = weight * at_anchor.vectors
            # The weights of the whole sum to the shares, so any number can be taken from all cosines alike. With 1,
            # what rounding does to the weights, w times more than to a cosine, counts little where all are alike.
            at_scale = ((self._anchors * anchor_sums).sum(dim=-1) - weight * at_anchor.mass).sum()
            products = products - 1
        else:
            bias = None if similarity.scaled else _bias(self._keys)
            (at_key,) = pulled(
                [Pull(scale * self._keys, similarity.anchors, ((bias, -normalisers[0]),), self._floor)],
                batch.rows,
                batch.own,
                batch.products,
                batch.tile,
            )
            anchor_sums = (weight * shares[0])[:, None] * self._softmax.mean()
            at_scale = (self._anchors * anchor_sums).sum()
            if similarity.floor is not None:
                at_scale += similarity.floor * (weight * shares[0] * (1 - self._softmax.kept())).sum()
        at_keys = scale * weight * at_key.vectors
        if not similarity.scaled:
            at_keys -= 2 * (weight * at_key.mass + at_logits)[:, None] * self._keys
        at_scale = at_scale + (at_logits * products).sum()
        return SimilarityGradients(scale * anchor_sums, at_keys, scale * at_logits, at_scale[None])


def _bias(keys: Tensor) -> Tensor:
    return -keys.square().sum(dim=-1)


def _log1pexp(x: Tensor) -> Tensor:
    # F.softplus is linear from 20 on, which is not exact enough for fp64.
    return torch.logaddexp(x, torch.zeros_like(x))
