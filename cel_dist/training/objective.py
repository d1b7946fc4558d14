"""Encoder and loss as one module, so that one engine owns all parameters and the loss sees them whole (ZeRO-3), as the
configuration says, and the encoder that a run begins with."""

from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from cel_dist.config import Config
from cel_dist.encoders.batch_norm import with_global_batch_norm
from cel_dist.losses import EquilibriumLoss, LossOutput
from cel_dist.losses.supervised import AdaCos, ArcFace, ClassificationHead, CosFace, Softmax, SupervisedLoss
from cel_dist.model import load_model, load_weights
from cel_dist.network import describe, new_network, require_same_network


class Objective(nn.Module):
    """Features of this rank's utterances to the loss of the global batch.

    The steps of a batch that is encoded in chunks go through `forward` as well, because the engine prepares
    parameters and takes gradients only there.

    Args:
        encoder: [n, M, F] to [n, D].
        loss: the loss over all ranks.
        views: `separate` passes the views one by one, so that batch norm normalises each by its own statistics, as in
            the published implementation; `joint` passes them together.
    """

    def __init__(self, encoder: nn.Module, loss: nn.Module, views: Literal["separate", "joint"]) -> None:
        super().__init__()
        self.encoder = encoder
        self.loss = loss
        self._joint = views == "joint"

    def forward(self, step: Literal["whole", "embed", "compare", "pull"], *inputs: Any) -> Any:
        """One step of the objective.

        Args:
            step: `whole` takes features [B, V, M, F] and ids, or classes, [B] or None to a LossOutput; `embed` takes
                features to embeddings [B, V, D]; `compare` takes embeddings and ids to a LossOutput; `pull` takes
                features and gradients [B, V, D] at their embeddings to a scalar whose gradient is that of the loss.
            inputs: what the step takes.
        """
        match step:
            case "whole":
                features, ids = inputs
                return self._compare(self._embed(features), ids)
            case "embed":
                return self._embed(*inputs)
            case "compare":
                return self._compare(*inputs)
            case "pull":
                features, gradients = inputs
                return (self._embed(features) * gradients).sum()

    def _embed(self, features: Tensor) -> Tensor:
        num_views = features.shape[1]
        if self._joint:
            return self.encoder(features.flatten(0, 1)).unflatten(0, (-1, num_views))  # type: ignore[no-any-return]
        return torch.stack([self.encoder(features[:, view]) for view in range(num_views)], dim=1)

    def _compare(self, embeddings: Tensor, ids: Tensor | None) -> LossOutput:
        output: LossOutput = self.loss(embeddings, ids)
        return output


def new_objective(
    config: Config, encoder: nn.Module, group: dist.ProcessGroup | None, on_gpu: bool, num_classes: int | None = None
) -> Objective:
    """The objective of the configuration over a group of ranks (None: this process alone).

    Args:
        config: the run's configuration.
        encoder: the encoder to train; its batch norm is changed in place if that is to be global.
        group: the ranks that share the batch.
        on_gpu: whether it is going to compute on a GPU.
        num_classes: of a loss that classifies.
    """
    settings: dict[str, Any] = {
        "pairs": config.loss.pairs,
        "t": config.loss.t,
        "lambda_s": config.loss.lambda_s,
        "lambda_u": config.loss.lambda_u,
        "group": group,
        "exchange": config.loss.exchange,
        "matmul": config.loss.matmul,
        "skip_unusable": True,
    }
    loss: nn.Module
    if config.classifies:
        assert num_classes is not None
        loss = SupervisedLoss(_new_head(config, num_classes, group), **settings)
    else:
        loss = EquilibriumLoss(config.loss.similarity, **settings)
    if config.encoder.batch_norm == "global":
        encoder = with_global_batch_norm(encoder, group, on_gpu)
    return Objective(encoder, loss, config.encoder.views)


def _new_head(config: Config, num_classes: int, group: dist.ProcessGroup | None) -> ClassificationHead:
    """The head of the configuration, with class weights drawn from the seed: the same for any number of ranks."""
    head = config.head
    margins: dict[str, Any] = {"margin": head.margin, "scale": head.scale, "sub_centres": head.sub_centres}
    common: dict[str, Any] = {
        "matmul": config.loss.matmul,
        "embedding_dim": config.encoder.embedding_dim,
        "classes": num_classes,
        "group": group,
        "sharded": head.weights == "sharded",
        "seed": config.train.seed,
    }
    match config.loss.similarity:
        case "softmax":
            return Softmax(**common)
        case "adacos":
            return AdaCos(**common)
        case "cosface":
            return CosFace(**common, **margins)
        case _:
            return ArcFace(**common, **margins)


def new_encoder(config: Config) -> nn.Module:
    """The encoder of the configuration, with weights drawn from the seed: the same on all ranks.

    Raises:
        CelError: the encoder is unknown.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.train.seed)
        return new_network(describe(config))


def initial_encoder(config: Config) -> nn.Module:
    """The encoder with which a run starts: `new_encoder`, with the weights of `encoder.init` if that is set.

    Raises:
        CelError: the encoder is unknown, or `encoder.init` is no model or one of another encoder, pooling or front end.
    """
    encoder = new_encoder(config)
    if config.encoder.init:
        description, source = describe(config), f"encoder.init={config.encoder.init}"
        model = load_model(config.encoder.init, "cpu")
        require_same_network(model.description, description, source)
        load_weights(encoder, model.encoder.state_dict(), description.encoder, source)
    return encoder
