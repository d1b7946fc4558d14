"""Losses: tensors and a process group in, scalars of the global batch out."""

from cel_dist.losses.equilibrium import EquilibriumLoss, LossOutput
from cel_dist.losses.functional import angular_contrastive, angular_prototypical, ge2e, prototypical, uniformity

__all__ = [
    "EquilibriumLoss",
    "LossOutput",
    "angular_contrastive",
    "angular_prototypical",
    "ge2e",
    "prototypical",
    "uniformity",
]
