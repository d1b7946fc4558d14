"""Supervised losses: classification heads over the speakers of the training data, and their sum with uniformity.

For an embedding x of speaker y, class weights w_j, and cos_j the cosine between x and w_j:

    Softmax    logits <x, w_j> + b_j
    CosFace    logits s (cos_j - m [j = y])                        Wang et al. 2018, arXiv 1801.09414, equation 4
    ArcFace    logits s cos(theta_j + m [j = y])                   Deng et al. 2019, arXiv 1801.07698, equation 3
    AdaCos     logits s cos_j, s following the batch               Zhang et al. 2019, arXiv 1905.00292, section 4.2

With k sub-centres a class, cos_j is the largest of the k cosines (Deng et al. 2020, "Sub-center ArcFace", ECCV).
"""

import math
from abc import abstractmethod

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from cel_dist.errors import CelError
from cel_dist.losses.batch import Findings
from cel_dist.losses.class_weights import ClassWeights
from cel_dist.losses.classification import ClassificationOutput, Classifier, Scores, classify
from cel_dist.losses.equilibrium import LossOutput, check_weights
from cel_dist.losses.exchange import Exchange, ExchangeName
from cel_dist.losses.precision import MatmulName, Products, full_precision
from cel_dist.losses.terms import Settings, global_terms
from cel_dist.losses.uniformity import Pairs, check_pairs

_SMALLEST_ADAPTED_SCALE = 1e-6


class ClassificationHead(ClassWeights):
    """Cross entropy over classes; what the heads have in common.

    Args:
        embedding_dim: D.
        classes: C, at least 2.
        margin: m, by which the score of the right class is lowered in the way of the head.
        sub_centres: k centres a class, of which the nearest counts.
        group: the ranks that share the batch, None for this process alone. With a group, `forward` takes this rank's
            rows, and the loss and its gradient, after a mean of parameter gradients over the ranks, are those of the
            global batch.
        sharded: cut the classes over the ranks instead of having all of them on each; `ClassWeights` says what that
            means for training.
        seed: of the initial weights; `ClassWeights` says what it does.
        matmul: `fp32`, `tf32` or `bf16` matrix products, accumulated in fp32.

    Raises:
        CelError: a number out of range, or more ranks than classes to be sharded.
    """

    angular = True
    # Exclusive.
    largest_margin = 2.0

    def __init__(
        self,
        embedding_dim: int,
        classes: int,
        margin: float,
        *,
        sub_centres: int = 1,
        group: dist.ProcessGroup | None = None,
        sharded: bool = False,
        seed: int | None = None,
        matmul: MatmulName = "fp32",
    ) -> None:
        super().__init__(embedding_dim, classes, sub_centres, not self.angular, group, sharded, seed)
        self._products = Products(matmul)
        self.margin = margin

    @property
    def margin(self) -> float:
        """m; may be set at any time, on all ranks alike."""
        return self._margin

    @margin.setter
    def margin(self, margin: float) -> None:
        if not 0 <= margin < self.largest_margin:
            raise CelError(
                f"the margin of the head is {margin}; give a number of at least 0 and below {self.largest_margin:.3g}"
            )
        self._margin = margin

    def scalars(self) -> dict[str, float]:
        """What is worth a record at every step, by name."""
        return {}

    def forward(self, x: Tensor, labels: Tensor, skip_unusable: bool = False) -> ClassificationOutput:
        """Loss and accuracy of the global batch, in fp32 (fp64 for fp64 embeddings) under autocast too.

        Replicated heads exchange scalars, sharded ones rows, labels and three numbers a row of the global batch; none
        of them anything backward. Ranks compare the form of what they bring as in `EquilibriumLoss.forward`.

        Args:
            x: [K, D] or [K, V, D] embeddings, not normalised; with a group [B, D] or [B, V, D], this rank's rows.
            labels: [K] or [B] int64 their classes, in 0..C-1, the same for all views of a row.
            skip_unusable: instead of an error for what these rows and labels hold, return a loss that is not a number,
                and findings that say why. The host need not wait for them, and an error in a forward pass would leave
                an engine in the middle of it.

        Raises:
            EmbeddingsError: embeddings that are not finite or of length 0; on every rank alike.
            CelError: a label that is no class, on every rank alike, and as `EquilibriumLoss.forward` for rows and
                labels of a form that cannot be used. In backward: `create_graph=True`.
        """
        with full_precision(x) as own:
            rows = own[:, None] if own.ndim == 2 else own
            classifier = Classifier(
                self.classes,
                self.shard_range[0],
                self.sharded,
                self.angular,
                self._with_margin,
                self._scale_of,
                self._exchange,
                self._products,
                skip_unusable,
            )
            return classify(rows, labels, self.centres, self.bias, classifier)

    def _with_margin(self, right: Tensor) -> tuple[Tensor, Tensor]:
        """Scores of the right classes with the margin, and their derivative at those without."""
        # Published with a margin of fp32, which moves a loss by 1e-7: the reference numbers hold to 1e-9.
        return right - float(np.float32(self.margin)), torch.ones_like(right)

    @abstractmethod
    def _scale_of(self, scores: Scores) -> Tensor | float:
        """Factor of the scores."""


class _FixedScaleHead(ClassificationHead):
    """A scale that stays.

    Attributes:
        scale: s.
    """

    def __init__(
        self,
        embedding_dim: int,
        classes: int,
        margin: float = 0.2,
        scale: float = 30.0,
        *,
        sub_centres: int = 1,
        group: dist.ProcessGroup | None = None,
        sharded: bool = False,
        seed: int | None = None,
        matmul: MatmulName = "fp32",
    ) -> None:
        super().__init__(
            embedding_dim,
            classes,
            margin,
            sub_centres=sub_centres,
            group=group,
            sharded=sharded,
            seed=seed,
            matmul=matmul,
        )
        self.scale = _usable_scale(scale)

    def scalars(self) -> dict[str, float]:
        """Margin and scale."""
        return {"margin": self.margin, "scale": self.scale}

    def _scale_of(self, scores: Scores) -> float:
        return self.scale


class Softmax(_FixedScaleHead):
    """Inner products and a bias, of embeddings as they are: s (<x, w_j> + b_j - m [j = y]), by default with m = 0 and
    s = 1.

    >>> output = Softmax(32, 5)(torch.randn(8, 32), torch.arange(8) % 5)
    >>> bool(output.loss > 0)
    True
    """

    angular = False
    largest_margin = math.inf

    def __init__(
        self,
        embedding_dim: int,
        classes: int,
        margin: float = 0.0,
        scale: float = 1.0,
        *,
        group: dist.ProcessGroup | None = None,
        sharded: bool = False,
        seed: int | None = None,
        matmul: MatmulName = "fp32",
    ) -> None:
        super().__init__(embedding_dim, classes, margin, scale, group=group, sharded=sharded, seed=seed, matmul=matmul)

    def scalars(self) -> dict[str, float]:
        """Nothing: as a rule it has neither margin nor scale."""
        return {}


class CosFace(_FixedScaleHead):
    """A margin on the cosine (additive margin softmax): s (cos - m) for the right class. The margin is below 2."""


class ArcFace(_FixedScaleHead):
    """A margin on the angle (additive angular margin softmax): s cos(theta + m) for the right class.

    Where theta + m would pass pi, and the cosine rise again, s (cos theta - m sin m) takes its place, as in the
    published code. The margin is an angle in radians, below pi / 2.
    """

    largest_margin = math.pi / 2

    def _with_margin(self, right: Tensor) -> tuple[Tensor, Tensor]:
        cos_m, sin_m = math.cos(self.margin), math.sin(self.margin)
        squared_sine = ((1 - right) * (1 + right)).clamp(min=0.0)
        # The derivative grows without bound where the angle is 0, while the way to go there shrinks. Below what
        # rounding makes of a cosine of 1 it would multiply nothing but rounding.
        slope = cos_m + sin_m * right / squared_sine.clamp(min=torch.finfo(right.dtype).eps).sqrt()
        before = right > math.cos(math.pi - self.margin)
        shifted = torch.where(before, cos_m * right - sin_m * squared_sine.sqrt(), right - self.margin * sin_m)
        return shifted, torch.where(before, slope, torch.ones_like(slope))


class AdaCos(ClassificationHead):
    """A scale that follows the batch.

    Before the loss of a batch is computed in training mode, the scale s becomes log(B) / cos(min(pi / 4, theta)), with
    B the mean over the embeddings of the global batch of sum_{j != y} exp(s cos_j), and theta the median of their
    angles to the right class (the lower of two). In evaluation mode it stays. Should B fall to 1, which takes a few
    classes that point away from the embeddings, the scale becomes 1e-6 instead of something that is not positive, and
    recovers with the next batch.

    Args: as `ClassificationHead`, but at least three classes: with two, the scale would be 0 for ever.
        margin: as published 0; else that of `CosFace`.
        scale: at first; by default sqrt(2) log(C - 1), as published.

    Attributes:
        scale: [1] float32 buffer; the same on all ranks, and in the state dict.
    """

    scale: Tensor

    def __init__(
        self,
        embedding_dim: int,
        classes: int,
        margin: float = 0.0,
        scale: float | None = None,
        *,
        group: dist.ProcessGroup | None = None,
        sharded: bool = False,
        seed: int | None = None,
        matmul: MatmulName = "fp32",
    ) -> None:
        super().__init__(embedding_dim, classes, margin, group=group, sharded=sharded, seed=seed, matmul=matmul)
        if classes < 3:
            raise CelError(f"AdaCos has {classes} classes; it adapts nothing below 3, use ArcFace or CosFace")
        first = math.sqrt(2) * math.log(classes - 1) if scale is None else scale
        self.register_buffer("scale", torch.tensor([_usable_scale(first)]))

    def scalars(self) -> dict[str, float]:
        """The scale."""
        return {"scale": float(self.scale)}

    def _scale_of(self, scores: Scores) -> Tensor:
        if self.training:
            others = scores.over_rows(scores.log_of_others(self.scale.to(scores.right.dtype)).double())
            angle = scores.over_rows(scores.right).clamp(-1.0, 1.0).double().acos().median()
            mean = others.logsumexp(dim=0) - math.log(len(others))
            self.scale.copy_((mean / angle.clamp(max=math.pi / 4).cos()).clamp(min=_SMALLEST_ADAPTED_SCALE))
        return self.scale.to(scores.right.dtype)


class SupervisedLoss(nn.Module):
    """Weighted sum of a classification loss and the uniformity loss, for training that treats it as `EquilibriumLoss`.

    Args:
        head: the classification head, with the group given here.
        pairs: pairs of the uniformity loss, `pon`, `apn` or `an`; segments of one speaker are no negatives.
        t: temperature of the uniformity loss, above 0.
        lambda_s: weight of the classification loss. A term of weight 0 is reported but costs no backward pass.
        lambda_u: weight of the uniformity loss.
        group: the ranks that share the batch, None for this process alone.
        exchange: of the uniformity loss; `losses.exchange.Exchange` says what the choices cost.
        matmul: of the uniformity loss: `fp32`, `tf32` or `bf16` matrix products.
        skip_unusable: as that of `EquilibriumLoss`.

    Attributes:
        head: the classification head.
        findings: what was found of the last batch.

    Raises:
        CelError: an unknown name, `t` not above 0, a weight below 0 or not finite, or a head of another group.

    >>> output = SupervisedLoss(ArcFace(32, 5))(torch.randn(4, 2, 32), torch.arange(4))
    >>> bool(output.loss.detach() == output.similarity + output.uniformity)
    True
    """

    def __init__(
        self,
        head: ClassificationHead,
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
        check_pairs(pairs, t)
        check_weights(lambda_s, lambda_u)
        if head.group is not group:
            raise CelError("the head and the uniformity loss share the batch with different ranks; give both one group")
        self.head = head
        self.findings: tuple[Findings, ...] = ()
        self._skip_unusable = skip_unusable
        # `global_terms` has the uniformity, whose weight its loss carries.
        self._lambda_s = lambda_s
        self._settings = Settings(None, pairs, t, 0.0, lambda_u, Products(matmul), skip_unusable=skip_unusable)
        self._exchange = Exchange(group, exchange)

    def forward(self, x: Tensor, labels: Tensor) -> LossOutput:
        """Loss of the global batch; `similarity` is the classification loss, `accuracy` that of the head.

        Args:
            x: [K, V, D] embeddings of V >= 1 segments of one speaker; with a group [B, V, D], this rank's rows.
            labels: [K] or [B] int64 the speakers' classes.

        Raises:
            CelError: as `ClassificationHead.forward`, and where all rows of the global batch have one label.
        """
        with torch.set_grad_enabled(torch.is_grad_enabled() and self._lambda_s > 0):
            classified: ClassificationOutput = self.head(x, labels, self._skip_unusable)
        terms = global_terms(x, None, None, labels, self._exchange, self._settings)
        self.findings = classified.findings, terms.findings
        return LossOutput(
            self._lambda_s * classified.loss + terms.loss,
            classified.loss.detach(),
            terms.uniformity,
            terms.alignment,
            classified.accuracy,
        )

    def clamp_scale(self) -> None:
        """Nothing is to be kept in its range: what a head learns may have any value."""


def _usable_scale(scale: float) -> float:
    if not 0 < scale < math.inf:
        raise CelError(f"the scale of the head is {scale}; give a finite number above 0")
    return scale
