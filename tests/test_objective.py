"""Encoder and loss as one module: how the views pass the encoder."""

import copy

import pytest
import torch

from cel_dist.config_file import parse_config
from cel_dist.encoders import build_encoder
from cel_dist.encoders.batch_norm import GlobalBatchNorm
from cel_dist.losses import EquilibriumLoss
from cel_dist.training.objective import Objective, new_objective

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


def configured(section="loss", **settings):
    """The objective of a configuration that says `settings` in a section, with the encoder of all these tests."""
    tree = {"data": {"shards": "none"}, "augment": {"profile": 0}, "encoder": {"batch_norm": "per_rank"}}
    tree.setdefault(section, {}).update(settings)
    return new_objective(parse_config(tree, "test"), encoder_and_features()[0], None, on_gpu=False)


@pytest.mark.parametrize(
    ("section", "settings"),
    [
        ("loss", {"similarity": "angular_contrastive"}),
        ("loss", {"pairs": "apn"}),
        ("loss", {"t": 3.0}),
        ("loss", {"lambda_s": 0.5}),
        ("loss", {"lambda_u": 0.5}),
        ("loss", {"matmul": "bf16"}),
        ("encoder", {"views": "joint"}),
    ],
)
def test_what_the_configuration_says_changes_the_loss(section, settings):
    _, features = encoder_and_features()
    usual, changed = configured()("whole", features, None), configured(section, **settings)("whole", features, None)
    assert abs(usual.loss - changed.loss) > 1e-5


def test_exchange_and_batch_norm_are_those_of_the_configuration():
    # Alone, a process sends nothing, and its statistics are those of the batch.
    assert [configured(exchange=how).loss._exchange.chosen for how in ("gather", "ring")] == ["gather", "ring"]
    for kind, wanted in (("per_rank", False), ("global", True)):
        encoder = configured("encoder", batch_norm=kind).encoder
        assert any(isinstance(module, GlobalBatchNorm) for module in encoder.modules()) is wanted
