"""Encoder and loss as one module: how the views pass the encoder."""

import copy

import torch

from cel_dist.encoders import build_encoder
from cel_dist.losses import EquilibriumLoss
from cel_dist.training.objective import Objective

B, V, MELS, FRAMES = 4, 2, 40, 32


def encoder_and_features() -> tuple[torch.nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    encoder = build_encoder("fast_resnet34", embedding_dim=16).train()
    features = torch.randn(B, V, MELS, FRAMES)
    # Views of different statistics, as two augmentations give.
    features[:, 1] = 3 * features[:, 1] + 1
    return encoder, features


def test_separate_views_are_normalised_by_their_own_statistics_and_joint_ones_by_those_of_both():
    encoder, features = encoder_and_features()
    alone, together = copy.deepcopy(encoder), copy.deepcopy(encoder)
    loss = EquilibriumLoss()
    separate = Objective(copy.deepcopy(encoder), loss, "separate")("whole", features, None)
    joint = Objective(copy.deepcopy(encoder), loss, "joint")("whole", features, None)
    by_view = loss(torch.stack([alone(features[:, view]) for view in range(V)], dim=1))
    at_once = loss(together(features.reshape(B * V, MELS, FRAMES)).reshape(B, V, -1))
    torch.testing.assert_close(separate.loss, by_view.loss, rtol=0, atol=1e-6)
    torch.testing.assert_close(joint.loss, at_once.loss, rtol=0, atol=1e-6)
    assert abs(separate.loss - joint.loss) > 1e-3


def test_without_batch_statistics_the_two_are_the_same():
    encoder, features = encoder_and_features()
    loss = EquilibriumLoss()
    separate, joint = (
        Objective(encoder, loss, views).eval()("whole", features, None) for views in ("separate", "joint")
    )
    torch.testing.assert_close(separate.loss, joint.loss, rtol=0, atol=1e-5)
