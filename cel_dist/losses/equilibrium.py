"""The equilibrium of contrastive similarity and uniformity: the objective of CEL."""

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from cel_dist.errors import CelError
from cel_dist.losses.gather import check_equal_rows, gather_rows
from cel_dist.losses.precision import full_precision
from cel_dist.losses.similarity import SIMILARITIES, SimilarityName, cross_entropy
from cel_dist.losses.uniformity import Pairs, check_pairs, uniformity_of_rows

_SMALLEST_SCALE = 1e-6


class LossOutput(NamedTuple):
    """What `EquilibriumLoss` returns: scalars of the global batch, equal on every rank. Only `loss` carries a gradient.

    Attributes:
        loss: lambda_s * similarity + lambda_u * uniformity.
        similarity: the similarity loss.
        uniformity: the uniformity loss.
        alignment: mean squared distance between unit embeddings of the same utterance, in [0, 4].
        accuracy: share of the rows whose own utterance has the largest logit, in [0, 1].
    """

    loss: Tensor
    similarity: Tensor
    uniformity: Tensor
    alignment: Tensor
    accuracy: Tensor


class EquilibriumLoss(nn.Module):
    """Weighted sum of a similarity loss and the uniformity loss (Mun et al. 2020, arXiv 2010.11433).

    Args:
        similarity: `angular_prototypical`, `angular_contrastive`, `prototypical` or `ge2e`.
        pairs: pairs of the uniformity loss, `pon`, `apn` or `an`.
        t: temperature of the uniformity loss, above 0.
        lambda_s: weight of the similarity loss. A term of weight 0 is reported but costs no backward pass.
        lambda_u: weight of the uniformity loss.
        group: the ranks that share the batch, None for this process alone. With a group, `forward` takes this rank's
            rows, and the loss and its gradient, after a mean of parameter gradients over the ranks, are those of the
            global batch.

    Attributes:
        w: [1] scale of the logits, 10 at first; None where the similarity has none. `clamp_scale` keeps it positive.
        b: [1] shift of the logits, -5 at first; None where the similarity has none.

    Raises:
        CelError: an unknown name, `t` not above 0, or a weight below 0 or not finite.

    >>> output = EquilibriumLoss()(torch.randn(8, 2, 32))
    >>> bool(output.loss.detach() == output.similarity + output.uniformity)
    True
    """

    w: nn.Parameter | None
    b: nn.Parameter | None

    def __init__(
        self,
        similarity: SimilarityName = "angular_prototypical",
        pairs: Pairs = "pon",
        t: float = 2.0,
        lambda_s: float = 1.0,
        lambda_u: float = 1.0,
        group: dist.ProcessGroup | None = None,
    ) -> None:
        super().__init__()
        if similarity not in SIMILARITIES:
            raise CelError(f"unknown similarity loss '{similarity}'; choose one of {', '.join(SIMILARITIES)}")
        check_pairs(pairs, t)
        for name, weight in (("lambda_s", lambda_s), ("lambda_u", lambda_u)):
            if not 0 <= weight < float("inf"):
                raise CelError(f"{name} is {weight}; give a finite weight of at least 0")
        self._similarity = SIMILARITIES[similarity]
        self._pairs, self._t = pairs, t
        self._lambda_s, self._lambda_u = lambda_s, lambda_u
        self._group = group
        self._checked_shape: torch.Size | None = None
        # Of shape [1], because DeepSpeed refuses parameters without dimensions.
        scaled = self._similarity.scaled
        self.register_parameter("w", nn.Parameter(torch.tensor([10.0])) if scaled else None)
        self.register_parameter("b", nn.Parameter(torch.tensor([-5.0])) if scaled else None)

    def forward(self, x: Tensor) -> LossOutput:
        """Loss of embeddings that are not normalised, in fp32 (fp64 for fp64 embeddings) under autocast too.

        Args:
            x: [K, V, D] embeddings of V >= 2 views; with a group [B, V, D], this rank's rows.

        Ranks compare their shapes when a shape is not that of the call before, so a constant shape costs one small
        collective in all.

        Raises:
            CelError: fewer than two utterances in the global batch, fewer than two views, more than two of them with
                `angular_contrastive`, or ranks with rows of different shape.
        """
        if x.shape != self._checked_shape:
            check_equal_rows(x, self._group)
            self._checked_shape = x.shape
        with full_precision(x) as own:
            rows = gather_rows(own, self._group)
            with torch.set_grad_enabled(torch.is_grad_enabled() and self._lambda_s > 0):
                logits = self._logits(rows)
                similarity = cross_entropy(logits, self._similarity.symmetric)
            with torch.set_grad_enabled(torch.is_grad_enabled() and self._lambda_u > 0):
                uniformity = uniformity_of_rows(rows, self._t, self._pairs)
            loss = self._lambda_s * similarity + self._lambda_u * uniformity
            return LossOutput(
                loss, similarity.detach(), uniformity.detach(), _alignment(rows.detach()), _accuracy(logits.detach())
            )

    @torch.no_grad()
    def clamp_scale(self) -> None:
        """Raise w to 1e-6 if a step of the optimizer took it below; to be called after every step."""
        if self.w is not None:
            self.w.clamp_(min=_SMALLEST_SCALE)

    def _logits(self, rows: Tensor) -> Tensor:
        similarities = self._similarity.compare(rows)
        return similarities if self.w is None or self.b is None else self.w * similarities + self.b


def _alignment(x: Tensor) -> Tensor:
    z = F.normalize(x, dim=-1)
    first, second = torch.triu_indices(x.shape[1], x.shape[1], offset=1, device=x.device)
    return (z[:, first] - z[:, second]).square().sum(dim=-1).mean()


def _accuracy(logits: Tensor) -> Tensor:
    own = torch.arange(logits.shape[-1], device=logits.device)
    return (logits.argmax(dim=-1) == own).to(logits.dtype).mean()
