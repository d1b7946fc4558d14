"""Losses: tensors and a process group in, scalars of the global batch out."""

from cel_dist.losses.equilibrium import EquilibriumLoss, LossOutput
from cel_dist.losses.functional import angular_contrastive, angular_prototypical, ge2e, prototypical, uniformity
from cel_dist.losses.similarity import Similarity, register_similarity, similarity_names

__all__ = [
    "EquilibriumLoss",
    "LossOutput",
    "Similarity",
    "angular_contrastive",
    "angular_prototypical",
    "ge2e",
    "prototypical",
    "register_similarity",
    "similarity_names",
    "uniformity",
]
