"""The loss of the global batch with its gradient at this rank's rows, in two passes and two collectives.

The first pass over the rows of all ranks gives every term its sums over own rows; one exchange of a few scalars and
one number a row makes them global; the second pass gives the gradient at what other ranks' rows compared themselves
with. That gradient is multiplied by W, because the engine averages over the ranks where the global loss has the sum.
No gradient is ever sent.
"""

import functools
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from cel_dist.errors import CelError
from cel_dist.losses.batch import Findings, GlobalBatch, faults, unusable_rows
from cel_dist.losses.exchange import Exchange
from cel_dist.losses.precision import Products, full_precision
from cel_dist.losses.similarity import Similarity, SimilarityTerm
from cel_dist.losses.tiles import TileSize, negative_logsumexp
from cel_dist.losses.uniformity import Pairs, UniformityTerm, view_pairs


@dataclass(frozen=True)
class Settings:
    """What is computed, and how.

    Attributes:
        similarity: the similarity loss, None for none.
        pairs: pairs of the uniformity loss, None for none.
        t: its temperature.
        lambda_s: weight of the similarity loss; at 0 it has a value and no gradient.
        lambda_u: weight of the uniformity loss, likewise.
        products: how matrix products are computed.
        tile: size of the tiles; None chooses by device.
        skip_unusable: a batch of which there is no loss has one that is not a number, instead of raising an error, for
            which the host would have to wait.
    """

    similarity: Similarity | None = None
    pairs: Pairs | None = None
    t: float = 2.0
    lambda_s: float = 1.0
    lambda_u: float = 1.0
    products: Products = field(default_factory=lambda: Products("fp32"))
    tile: TileSize | None = None
    skip_unusable: bool = False


class Values(NamedTuple):
    """Scalars of the global batch, equal on every rank; 0 for a term that was not asked for. And what was found of the
    batch."""

    loss: Tensor
    similarity: Tensor
    uniformity: Tensor
    alignment: Tensor
    accuracy: Tensor
    findings: Findings


def global_terms(
    x: Tensor, w: Tensor | None, b: Tensor | None, ids: Tensor | None, exchange: Exchange, settings: Settings
) -> Values:
    """The loss and what it is made of; only the loss has a gradient.

    Args:
        x: [B, V, D] this rank's rows.
        w: [1] scale; None where the similarity has none.
        b: [1] shift. It cancels in the softmax, so its gradient is 0.
        ids: [B] int64 sample ids, or None where all samples of the batch are different.
        exchange: the ranks that share the batch.
        settings: what is computed.

    Raises:
        CelError: on every rank alike; `EquilibriumLoss.forward` says for what.
    """
    with full_precision(x) as own:
        exchange.agree(own, ids is not None, _problem(x, ids))
        if settings.similarity is not None:
            settings.similarity.check_views(x.shape[1])
        if len(own) * exchange.world_size < 2:
            raise CelError(
                f"the global batch holds {len(own)} utterance; a contrastive loss has no negatives below 2, raise the "
                "batch size"
            )
        similarity_learns = torch.is_grad_enabled() and settings.lambda_s > 0
        uniformity_learns = torch.is_grad_enabled() and settings.lambda_u > 0
        local: tuple[Tensor | None, ...] = (None, None, None)
        if settings.similarity is not None:
            with torch.set_grad_enabled(similarity_learns):
                local = settings.similarity.local(own)
            if not similarity_learns:
                w, b = (None if scalar is None else scalar.detach() for scalar in (w, b))
        with torch.set_grad_enabled(uniformity_learns):
            units = F.normalize(own, dim=-1)
        learns = similarity_learns and settings.similarity is not None, uniformity_learns and settings.pairs is not None
        loss, of_similarity, of_uniformity, alignment, accuracy, counts = _GlobalTerms.apply(  # type: ignore[no-untyped-call]
            *local, units, w, b, own.detach(), ids, exchange, settings, learns
        )
        findings = Findings(counts, functools.partial(_error, num_rows=len(own), num_ranks=exchange.world_size))
        if not settings.skip_unusable:
            findings.check()
        return Values(findings.poisoned(loss), of_similarity, of_uniformity, alignment, accuracy, findings)


def _problem(x: Tensor, ids: Tensor | None) -> str:
    """What is wrong with the form of rows and ids; empty if nothing is."""
    if x.ndim != 3:
        return f"embeddings have shape {list(x.shape)}; give [utterances, views, dimensions]"
    if ids is not None and (ids.shape != x.shape[:1] or ids.dtype != torch.int64):
        return f"ids have shape {list(ids.shape)} and type {ids.dtype}; give {len(x)} of int64"
    return ""


def _error(counts: list[float], num_rows: int, num_ranks: int) -> CelError:
    """What to say of faults [W 2], and of whether no pair is left."""
    *of_rows, is_one_sample = counts
    if any(of_rows):
        return unusable_rows(zip(of_rows[::2], of_rows[1::2], strict=True), num_rows)
    assert is_one_sample
    return CelError(f"all {num_rows * num_ranks} utterances of the global batch are one sample; give different ones")


class _GlobalTerms(torch.autograd.Function):
    """Gradients are computed with the loss, while the rows of the other ranks are at hand."""

    @staticmethod
    def forward(
        ctx: Any,
        anchors: Tensor | None,
        keys: Tensor | None,
        positives: Tensor | None,
        units: Tensor,
        w: Tensor | None,
        b: Tensor | None,
        x: Tensor,
        ids: Tensor | None,
        exchange: Exchange,
        settings: Settings,
        learns: tuple[bool, bool],
    ) -> tuple[Tensor, ...]:
        similarity_learns, uniformity_learns = learns
        with settings.products.active():
            batch = GlobalBatch.share(x, ids, exchange, settings.products, settings.tile)
            similarity = None
            if settings.similarity and anchors is not None and keys is not None and positives is not None:
                scale = x.new_ones(1) if w is None else w.to(x.dtype)
                similarity = SimilarityTerm(settings.similarity, anchors, keys, positives, scale, similarity_learns)
            logarithms = view_pairs(settings.pairs, batch.num_views) if settings.pairs else []
            uniformities = [UniformityTerm(pairs, units, settings.t, uniformity_learns) for pairs in logarithms]
            shared, common = _first_pass(x, units, batch, [*([similarity] if similarity else []), *uniformities])
            _, _, num_same, distance = common.sum(dim=0)

            loss_s = accuracy = loss_u = x.new_zeros(())
            is_one_sample = num_same.new_zeros(())
            gradients: list[Tensor | None] = [None] * 5
            if similarity:
                loss_s, accuracy = (value.to(x.dtype) for value in similarity.value(shared[0]))
            if uniformities:
                of_uniformity = shared[-len(uniformities) :]
                logs = [
                    term.value(part, batch.num_utterances, num_same)
                    for term, part in zip(uniformities, of_uniformity, strict=True)
                ]
                loss_u = torch.stack(logs).mean().to(x.dtype)
                is_one_sample = (num_same == batch.num_utterances**2).double()
            weight = exchange.world_size
            if similarity and similarity_learns:
                found = similarity.gradients(shared[0], batch)
                gradients[0], gradients[1], gradients[2], gradients[4] = (
                    weight * settings.lambda_s * gradient for gradient in found
                )
            if uniformities and uniformity_learns:
                total = sum(
                    (term.gradient(part) for term, part in zip(uniformities, of_uniformity, strict=True)),
                    start=torch.zeros_like(units),
                )
                gradients[3] = weight * settings.lambda_u / len(uniformities) * total
            if w is None:
                gradients[4] = None
            elif gradients[4] is not None:
                gradients[4] = gradients[4].to(w.dtype)
        ctx.save_for_backward(*gradients, None if b is None else torch.zeros_like(b))
        num_view_pairs = batch.num_views * (batch.num_views - 1) / 2
        alignment = (distance / (batch.num_utterances * max(num_view_pairs, 1))).to(x.dtype)
        loss = settings.lambda_s * loss_s + settings.lambda_u * loss_u
        counts = torch.cat([common[:, :2].flatten(), is_one_sample[None]])
        outputs = loss, loss_s, loss_u, alignment, accuracy, counts
        ctx.mark_non_differentiable(*outputs[1:])
        return outputs

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        # `once_differentiable` speaks up only where `grad` has a gradient itself, and keeps silent otherwise.
        if torch.is_grad_enabled():
            raise CelError("the loss has no second derivative; take its gradient without create_graph=True")
        gradients = (None if saved is None else saved * grad.to(saved.dtype) for saved in ctx.saved_tensors)
        return (*gradients, None, None, None, None, None)


def _first_pass(
    x: Tensor, units: Tensor, batch: GlobalBatch, terms: list[SimilarityTerm | UniformityTerm]
) -> tuple[list[Tensor], Tensor]:
    """Compare own rows with those of all ranks, and exchange what came of it.

    Returns:
        For every term, the parts of all ranks [W, ...]; and [W, 4] of faults (two), pairs of equal ids and the sum of
        squared distances between the views of a row; all in fp64, in which K^2 pairs are counted exactly and no
        log-normaliser is rounded.
    """
    comparisons = [term.comparisons() for term in terms]
    flat = [comparison for of_term in comparisons for comparison in of_term]
    softmaxes, num_same = negative_logsumexp(flat, batch.rows, batch.own, batch.products, batch.tile)
    rest = iter(softmaxes)
    parts = [term.take([next(rest) for _ in of_term]) for term, of_term in zip(terms, comparisons, strict=True)]
    common = [
        faults(x),
        num_same[None],
        _squared_distances(units)[None],
    ]
    common_part = torch.cat([part.double() for part in common])
    gathered = batch.exchange.gather_vectors(torch.cat([common_part, *(part.double() for part in parts)]))
    of_common, *shared = torch.split(gathered, [len(common_part), *(len(part) for part in parts)], dim=1)
    return shared, of_common


def _squared_distances(units: Tensor) -> Tensor:
    num_views = units.shape[1]
    first, second = torch.triu_indices(num_views, num_views, offset=1, device=units.device)
    return (units[:, first] - units[:, second]).square().sum()
