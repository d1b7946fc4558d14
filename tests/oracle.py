"""The losses as their definitions read: every pair of the batch in memory, gradients by autograd. For small batches."""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

SHIFT = 1e-6


def equilibrium(x, w=None, ids=None, similarity=None, pairs=None, t=2.0, lambda_s=1.0, lambda_u=1.0):
    """Loss, similarity, uniformity of embeddings x [K, V, D]; w a scale, ids [K] those of the samples."""
    ids = torch.arange(len(x)) if ids is None else ids
    loss_s = similarity_loss(x, w, ids, similarity) if similarity else x.new_zeros(())
    loss_u = uniformity_loss(x, ids, pairs, t) if pairs else x.new_zeros(())
    return lambda_s * loss_s + lambda_u * loss_u, loss_s, loss_u


def similarity_loss(x: Tensor, w: Tensor, ids: Tensor, name: str) -> Tensor:
    num_rows, num_views, _ = x.shape
    z = F.normalize(x, dim=-1)
    if name in ("angular_prototypical", "angular_contrastive"):
        logits = w * z[:, 0] @ F.normalize(z[:, 1:].mean(1), dim=-1).T
    elif name == "prototypical":
        logits = -(x[:, None, 0] - x[:, 1:].mean(1)[None] + SHIFT).square().sum(-1)
    elif name == "ge2e":
        cosines = torch.empty(num_views, num_rows, num_rows, dtype=x.dtype)
        for view in range(num_views):
            for row in range(num_rows):
                for other in range(num_rows):
                    used = [v for v in range(num_views) if other != row or v != view]
                    centroid = F.normalize(z[other, used].mean(0), dim=0)
                    cosines[view, row, other] = z[row, view] @ centroid
        logits = (w * cosines.clamp(min=1e-6)).flatten(0, 1)
    negative = ids[:, None] != ids
    right = torch.eye(num_rows, dtype=torch.bool)
    repeats = logits.shape[0] // num_rows
    kept = (negative | right).repeat(repeats, 1)
    right = right.repeat(repeats, 1)
    logits = logits.masked_fill(~kept, -math.inf)
    rows = -logits.log_softmax(1)[right].mean()
    if name != "angular_contrastive":
        return rows
    return (rows - logits.log_softmax(0)[right].mean()) / 2


def uniformity_loss(x: Tensor, ids: Tensor, pairs: str, t: float) -> Tensor:
    num_rows, num_views, _ = x.shape
    z = F.normalize(x, dim=-1)
    if pairs == "pon":
        logs = []
        for view in range(num_views):
            potentials = (-t * (z[:, None, view] - z[None, :, view]).square().sum(-1)).exp()
            logs.append(potentials[ids[:, None] != ids].mean().log())
        return torch.stack(logs).mean()
    found = []
    for u in range(num_views):
        for v in range(u, num_views):
            shift = SHIFT if pairs == "an" and u != v else 0.0
            potentials = (-t * (z[:, None, u] - z[None, :, v] + shift).square().sum(-1)).exp()
            kept = ids[:, None] != ids
            if pairs == "apn" and u != v:
                kept = kept | torch.eye(num_rows, dtype=torch.bool)
            # A pair of different views is met once, a pair within a view twice.
            found += [potentials[kept]] * (2 if u != v else 1)
    return torch.cat(found).mean().log()
