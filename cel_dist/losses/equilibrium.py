"""The equilibrium of contrastive similarity and uniformity: the objective of CEL."""

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from cel_dist.errors import CelError
from cel_dist.losses.batch import Findings
from cel_dist.losses.exchange import Exchange, ExchangeName
from cel_dist.losses.precision import MatmulName, Products
from cel_dist.losses.similarity import find_similarity
from cel_dist.losses.terms import Settings, global_terms
from cel_dist.losses.uniformity import Pairs, check_pairs

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
        similarity: `angular_prototypical`, `angular_contrastive`, `prototypical`, `ge2e`, or what
            `register_similarity` made known.
        pairs: pairs of the uniformity loss, `pon`, `apn` or `an`.
        t: temperature of the uniformity loss, above 0.
        lambda_s: weight of the similarity loss. A term of weight 0 is reported but costs no backward pass.
        lambda_u: weight of the uniformity loss.
        group: the ranks that share the batch, None for this process alone. With a group, `forward` takes this rank's
            rows, and the loss and its gradient, after a mean of parameter gradients over the ranks, are those of the
            global batch.
        exchange: `gather`, `ring` or `auto`; `losses.exchange.Exchange` says what they cost.
        matmul: `fp32`, `tf32` or `bf16` matrix products, accumulated in fp32. The logits of `prototypical` are
            differences of large numbers, so its products are fp64 in any case.
        skip_unusable: for training: embeddings that are not finite or of length 0, and a batch of one sample alone,
            give a loss that is not a number, and `findings` say why, instead of CelError. The host need not wait for
            the device, and an error in a forward pass would leave an engine in the middle of it.

    Attributes:
        w: [1] scale of the logits, 10 at first; None where the similarity has none. `clamp_scale` keeps it positive.
        b: [1] shift of the logits, -5 at first; None where the similarity has none.
        findings: what was found of the last batch.

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
        similarity: str = "angular_prototypical",
        pairs: Pairs = "pon",
        t: float = 2.0,
        lambda_s: float = 1.0,
        lambda_u: float = 1.0,
        group: dist.ProcessGroup | None = None,
        exchange: ExchangeName = "auto",
        matmul: MatmulName = "fp32",
        skip_unusable: bool = False,
    ) -> None:
        super().__init__()
        definition = find_similarity(similarity)
        check_pairs(pairs, t)
        check_weights(lambda_s, lambda_u)
        self._settings = Settings(
            definition, pairs, t, lambda_s, lambda_u, Products(matmul), skip_unusable=skip_unusable
        )
        self.findings: tuple[Findings, ...] = ()
        self._exchange = Exchange(group, exchange)
        # Of shape [1], because DeepSpeed refuses parameters without dimensions.
        scaled = definition.scaled
        self.register_parameter("w", nn.Parameter(torch.tensor([10.0])) if scaled else None)
        self.register_parameter("b", nn.Parameter(torch.tensor([-5.0])) if scaled else None)

    def forward(self, x: Tensor, ids: Tensor | None = None) -> LossOutput:
        """Loss of embeddings that are not normalised, in fp32 (fp64 for fp64 embeddings) under autocast too.

        Two collectives a step (`exchange="ring"`: one, and W - 1 exchanges with the neighbours a pass), and none
        backward. Ranks compare the form of what they bring (shape, type, whether there are ids) at the first call, and
        when it is not that of the call before. All ranks must change it together: if one does so alone, it waits for
        the others, and the process group's timeout is what ends the run.

        Args:
            x: [K, V, D] embeddings of V >= 2 views; with a group [B, V, D], this rank's rows.
            ids: [K] or [B] int64 ids of the samples. Equal ids are no negatives. None: all samples are different.

        Raises:
            CelError: on every rank alike: fewer than two utterances in the global batch, fewer than two views, more
                than two of them with `angular_contrastive`, embeddings that are not finite or of length 0, and where
                forms are compared, rows or ids of a form that cannot be used, or rows of different form; the ranks
                are named. In backward: `create_graph=True`, as there is no second derivative.
        """
        *values, findings = global_terms(x, self.w, self.b, ids, self._exchange, self._settings)
        self.findings = (findings,)
        return LossOutput(*values)

    @torch.no_grad()
    def clamp_scale(self) -> None:
        """Raise w to 1e-6 if a step of the optimizer took it below; to be called after every step."""
        if self.w is not None:
            self.w.clamp_(min=_SMALLEST_SCALE)


def check_weights(lambda_s: float, lambda_u: float) -> None:
    """Raise CelError unless the weights of both terms are finite and at least 0."""
    for name, weight in (("lambda_s", lambda_s), ("lambda_u", lambda_u)):
        if not 0 <= weight < float("inf"):
            raise CelError(f"{name} is {weight}; give a finite weight of at least 0")
