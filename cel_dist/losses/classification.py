"""Cross entropy over classes for the global batch, with its gradients, computed in one go.

For row i of class y, scores c_ij (cosines, or inner products plus a bias), a scale s and a margin that makes f(c_iy) of
the score of the right class,

    n_i = logsumexp_{j != y} s c_ij        L_i = log(1 + exp(n_i - s f(c_iy)))        q_i = 1 - exp(-L_i)
    dL_i/dc_ij = s exp(s c_ij - s f(c_iy) - L_i)   for j != y,        dL_i/dc_iy = -s q_i f'(c_iy)

Replicated classes are compared with this rank's rows, and only scalars are exchanged. Sharded classes are compared with
the rows of all ranks: the ranks exchange rows and labels, the largest score of a row, its sum of exponentials and its
right score, and the gradients at the rows, of which every rank gets its own. The gradient at the rows is, as that of
`terms`, W times that of the global loss, because the engine averages over the ranks; the one at replicated weights
averages to it. The gradient at sharded weights is that of the global loss, because nobody averages it.

Gradients are computed with the loss: nothing of the size of the logits waits for the backward pass, and under ZeRO-3
the weights need not be there once more.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cel_dist.errors import CelError
from cel_dist.losses.batch import Findings, faults, unusable_rows
from cel_dist.losses.exchange import Exchange
from cel_dist.losses.precision import Products

_SMALLEST_LENGTH = 1e-12


class ClassificationOutput(NamedTuple):
    """What a classification head returns: scalars of the global batch, equal on every rank.

    Attributes:
        loss: mean cross entropy; it alone carries a gradient.
        accuracy: share of the embeddings whose own class has the largest score, without margin; in [0, 1].
        findings: what was found of the batch.
    """

    loss: Tensor
    accuracy: Tensor
    findings: Findings


class Classifier(NamedTuple):
    """What a head makes of scores.

    Attributes:
        classes: C.
        first: the first class whose weights are here.
        sharded: whether the other ranks have the other classes.
        angular: scores are cosines; otherwise inner products plus the bias.
        margin: from the scores of the right classes [N] to f of them and its derivative.
        scale: from what adapts it to the scale, [1] or a number.
        exchange: the ranks that share the batch.
        products: how matrix products are computed.
        skip_unusable: a batch of which there is no loss has one that is not a number, instead of raising an error.
    """

    classes: int
    first: int
    sharded: bool
    angular: bool
    margin: Callable[[Tensor], tuple[Tensor, Tensor]]
    scale: Callable[["Scores"], Tensor | float]
    exchange: Exchange
    products: Products
    skip_unusable: bool


def classify(
    x: Tensor, labels: Tensor, weight: Tensor, bias: Tensor | None, classifier: Classifier
) -> ClassificationOutput:
    """Loss and accuracy of the global batch.

    Args:
        x: [B, V, D] this rank's embeddings, fp32 or fp64.
        labels: [B] int64 their classes.
        weight: [c, k, D] centres of the classes that are here.
        bias: [c], or None.
        classifier: what is made of them.

    Raises:
        EmbeddingsError: on every rank alike: embeddings that are not finite or of length 0.
        CelError: on every rank alike: a label that is no class, or rows or labels whose form cannot be used.
    """
    classifier.exchange.agree(x, True, _problem(x, labels, weight.shape[-1]))
    loss, accuracy, counts = _Classification.apply(  # type: ignore[no-untyped-call]
        x, weight, bias, labels, classifier, torch.is_grad_enabled()
    )
    findings = _findings(counts, len(x), classifier)
    return ClassificationOutput(findings.poisoned(loss), accuracy, findings)


def _problem(x: Tensor, labels: Tensor, dim: int) -> str:
    """What is wrong with the form of rows and labels; empty if nothing is."""
    if x.ndim != 3 or x.shape[2] != dim:
        return f"embeddings have shape {list(x.shape)}; give [utterances, {dim}] or [utterances, views, {dim}]"
    if labels.shape != x.shape[:1] or labels.dtype != torch.int64:
        return f"labels have shape {list(labels.shape)} and type {labels.dtype}; give {len(x)} of int64"
    return ""


class Scores:
    """Scores of N rows against the classes that are here.

    Attributes:
        right: [N] scores of the right classes.
        largest: [N] largest scores of other classes.
    """

    def __init__(self, rows: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, of: Classifier) -> None:
        self._exchange, self._products, self._shards = of.exchange, of.products, of.sharded
        num_classes, num_centres, _ = weight.shape
        scores = rows.new_empty(len(rows), num_classes * num_centres)
        self._products.inner(self._products.rounded(rows), self._products.rounded(weight.flatten(0, 1)), out=scores)
        self._winners: Tensor | None = None
        if num_centres > 1:
            scores, self._winners = scores.view(-1, num_classes, num_centres).max(dim=2)
        if bias is not None:
            scores += bias
        places = labels - of.first
        # Rows of a class that is elsewhere have no right score here. They take part in what is done at these places,
        # because a list of the others has a length that the host would have to wait for.
        self._here = ((places >= 0) & (places < num_classes))[:, None]
        self._places = places.clamp(0, num_classes - 1)[:, None]
        at_places = scores.gather(1, self._places)
        right = at_places.masked_fill(~self._here, 0.0).squeeze(1)
        scores.scatter_(1, self._places, at_places.masked_fill(self._here, -torch.inf))
        largest = scores.amax(dim=1)
        self.right = of.exchange.total(right) if of.sharded else right
        self.largest = of.exchange.largest(largest) if of.sharded else largest
        self._scores = scores

    def log_of_others(self, scale: Tensor | float) -> Tensor:
        """[N] logsumexp of the scaled scores of all other classes."""
        return self._log_of_sum(((self._scores - self.largest[:, None]) * scale).exp_(), scale)

    def over_rows(self, vector: Tensor) -> Tensor:
        """Numbers of the rows that are compared here [N] as those of the global batch, on every rank."""
        return vector if self._shards else self._exchange.gather_vectors(vector).flatten()

    def normalise(self, scale: Tensor | float) -> Tensor:
        """As `log_of_others`, for the last time: afterwards there are the exponentials in place of the scores."""
        self._scores.sub_(self.largest[:, None]).mul_(scale).exp_()
        return self._log_of_sum(self._scores, scale)

    def gradients(
        self, rows: Tensor, weight: Tensor, others: Tensor, right: Tensor, wanted: tuple[bool, bool, bool]
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Gradients at rows [N, D], of classes that are here alone, weights [c, k, D] and biases [c], where wanted.

        Args:
            rows: [N, D] what the scores came of.
            weight: [c, k, D] likewise.
            others: [N] factors of the exponentials.
            right: [N] gradients at the right scores.
            wanted: which of the three gradients.
        """
        at_scores = self._scores.mul_(others[:, None])
        at_places = at_scores.gather(1, self._places)
        at_scores.scatter_(1, self._places, torch.where(self._here, right[:, None], at_places))
        at_bias = at_scores.sum(dim=0) if wanted[2] else None
        if self._winners is not None:
            of_centres = at_scores.new_zeros(*at_scores.shape, weight.shape[1])
            at_scores = of_centres.scatter_(2, self._winners[:, :, None], at_scores[:, :, None]).flatten(1)
        at_rows = at_weight = None
        if wanted[0]:
            at_rows = torch.zeros_like(rows)
            self._products.add_weighted(at_rows, at_scores, self._products.rounded(weight.flatten(0, 1)))
        if wanted[1]:
            at_weight = torch.zeros_like(weight)
            self._products.add_weighted(at_weight.view(-1, rows.shape[1]), at_scores.T, self._products.rounded(rows))
        return at_rows, at_weight, at_bias

    def _log_of_sum(self, exponentials: Tensor, scale: Tensor | float) -> Tensor:
        total = exponentials.sum(dim=1)
        return (self._exchange.total(total) if self._shards else total).log() + scale * self.largest


class _Classification(torch.autograd.Function):
    """Gradients are computed with the loss, while rows and weights are at hand."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        classifier: Classifier,
        learns: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        exchange, sharded = classifier.exchange, classifier.sharded
        of_rows, of_weight, of_bias = (learns and needed for needed in ctx.needs_input_grad[:3])
        num_views, world_size = x.shape[1], exchange.world_size
        if sharded:
            (block,) = exchange.share(x, labels)
            rows, labels = block.rows.flatten(0, 1), block.ids.repeat_interleave(num_views)
            parts = zip(block.rows.chunk(world_size), block.ids.chunk(world_size), strict=True)
            found = torch.stack([_faults(*part, classifier) for part in parts])
        else:
            found = exchange.gather_vectors(_faults(x, labels, classifier))
            rows, labels = x.flatten(0, 1), labels.repeat_interleave(num_views)
        if not classifier.skip_unusable:
            # Before the scale follows the batch.
            _findings(found, len(x), classifier).check()
        with classifier.products.active():
            units, lengths = _units(rows) if classifier.angular else (rows, None)
            cast = weight.to(rows.dtype)
            centres, of_centres = _units(cast) if classifier.angular else (cast, None)
            scores = Scores(units, centres, None if bias is None else bias.to(rows.dtype), labels, classifier)
            scale = classifier.scale(scores)
            right, slope = classifier.margin(scores.right)
            others = scores.normalise(scale)
            losses = torch.logaddexp(others - scale * right, torch.zeros_like(others))
            sums = torch.stack([losses.double().sum(), (scores.right > scores.largest).sum().double()])
            values = (sums if sharded else exchange.total(sums)) / (len(x) * num_views * world_size)
            gradients: list[Tensor | None] = [None, None, None]
            if of_rows or of_weight or of_bias:
                share = scale / len(rows)
                factors = share * (scale * (scores.largest - right) - losses).exp()
                # -expm1(-loss) is the share of the softmax that the other classes have, without cancellation.
                at_right = share * torch.expm1(-losses) * slope
                gradients = list(scores.gradients(units, centres, factors, at_right, (of_rows, of_weight, of_bias)))
        at_rows, at_weight, _ = gradients
        if at_rows is not None:
            if lengths is not None:
                at_rows = _through_units(at_rows, units, lengths)
            gradients[0] = (world_size * exchange.own_rows_of_total(at_rows) if sharded else at_rows).view_as(x)
        if at_weight is not None and of_centres is not None:
            gradients[1] = _through_units(at_weight, centres, of_centres)
        ctx.save_for_backward(
            *(
                None if gradient is None else gradient.to(given.dtype)
                for gradient, given in zip(gradients, (x, weight, x if bias is None else bias), strict=True)
            )
        )
        loss, accuracy = values.to(x.dtype)
        ctx.mark_non_differentiable(accuracy, found)
        return loss, accuracy, found

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise CelError("the loss has no second derivative; take its gradient without create_graph=True")
        gradients = (None if saved is None else saved * grad.to(saved.dtype) for saved in ctx.saved_tensors)
        return (*gradients, None, None, None)


def _faults(x: Tensor, labels: Tensor, classifier: Classifier) -> Tensor:
    """[3] rows that are not finite, rows of length 0, and labels that are no class, of one rank."""
    unknown = ((labels < 0) | (labels >= classifier.classes)).sum()
    return torch.cat([faults(x), unknown[None].to(x.dtype)]).double()


def _findings(counts: Tensor, num_rows: int, classifier: Classifier) -> Findings:
    """Of the `_faults` of all ranks [W, 3]."""

    def error(by_rank: list[list[float]]) -> CelError:
        unknown = [str(rank) for rank, (*_, count) in enumerate(by_rank) if count]
        if not unknown:
            return unusable_rows([of_rank[:2] for of_rank in by_rank], num_rows)
        return CelError(
            f"rank {', '.join(unknown)} has labels that are not in 0..{classifier.classes - 1}, the classes of the "
            "head; number the speakers from 0"
        )

    return Findings(counts, error)


def _units(vectors: Tensor) -> tuple[Tensor, Tensor]:
    """Vectors [..., D] at length 1, and their lengths [..., 1]."""
    lengths = torch.linalg.vector_norm(vectors, dim=-1, keepdim=True).clamp(min=_SMALLEST_LENGTH)
    return vectors / lengths, lengths


def _through_units(gradient: Tensor, units: Tensor, lengths: Tensor) -> Tensor:
    """From the gradient at units to that at the vectors they were."""
    return (gradient - (gradient * units).sum(dim=-1, keepdim=True) * units) / lengths
