"""Encoder and loss as one module, so that one engine owns all parameters and the loss sees them whole (ZeRO-3), and
the encoder that a run begins with."""

from typing import Literal

import torch
from torch import Tensor, nn

from cel_dist.config import Config
from cel_dist.description import EncoderDescription
from cel_dist.encoders import build_encoder
from cel_dist.losses import EquilibriumLoss, LossOutput
from cel_dist.model import load_model, load_weights


class Objective(nn.Module):
    """Features of this rank's utterances to the loss of the global batch.

    Args:
        encoder: [n, 40, F] to [n, D].
        loss: the equilibrium loss over all ranks.
        views: `separate` passes the views one by one, so that batch norm normalises each by its own statistics, as in
            the published implementation; `joint` passes them together.
    """

    def __init__(self, encoder: nn.Module, loss: EquilibriumLoss, views: Literal["separate", "joint"]) -> None:
        super().__init__()
        self.encoder = encoder
        self.loss = loss
        self._joint = views == "joint"

    def forward(self, features: Tensor) -> LossOutput:
        """Compute the loss of the global batch from this rank's features [B, V, 40, F]."""
        num_views = features.shape[1]
        if self._joint:
            embeddings = self.encoder(features.flatten(0, 1)).unflatten(0, (-1, num_views))
        else:
            embeddings = torch.stack([self.encoder(features[:, view]) for view in range(num_views)], dim=1)
        output: LossOutput = self.loss(embeddings)
        return output


def new_encoder(config: Config) -> nn.Module:
    """The encoder of the configuration, with weights drawn from the seed: the same on all ranks.

    Raises:
        CelError: the encoder is unknown.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.train.seed)
        return build_encoder(config.encoder.name, embedding_dim=config.encoder.embedding_dim)


def initial_encoder(config: Config) -> nn.Module:
    """The encoder with which a run starts: `new_encoder`, with the weights of `encoder.init` if that is set.

    Raises:
        CelError: the encoder is unknown, or `encoder.init` is no model or one of another encoder.
    """
    encoder = new_encoder(config)
    if config.encoder.init:
        description = EncoderDescription(name=config.encoder.name, embedding_dim=config.encoder.embedding_dim)
        state = load_model(config.encoder.init, "cpu").encoder.state_dict()
        load_weights(encoder, state, description, config.encoder.init)
    return encoder
