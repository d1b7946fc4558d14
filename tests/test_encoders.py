"""Encoders: parity of the Fast ResNet-34 with the published one, and what a registry must refuse."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from cel_dist.encoders import FastResNet34, SelfAttentivePooling, build_encoder, encoder_names, register_encoder
from cel_dist.errors import CelError
from cel_dist.published import read_published


@pytest.mark.parametrize(("training", "name"), [(True, "embedding_train_mode"), (False, "embedding_eval_mode")])
def test_embeddings_equal_the_published_ones(shared: Path, training: bool, name: str) -> None:
    golden = np.load(shared / "golden" / "encoder.npz")
    encoder = build_encoder("fast_resnet34").train(training)
    encoder.load_state_dict(read_published(shared / "golden" / "published_format.model").encoder_state)
    with torch.no_grad():
        embeddings = encoder(torch.from_numpy(golden["log_mel"])).numpy()
    largest = np.abs(golden[name]).max()
    np.testing.assert_allclose(embeddings / largest, golden[name] / largest, atol=1e-4)


def test_fast_resnet34_has_the_published_number_of_parameters() -> None:
    assert sum(parameter.numel() for parameter in build_encoder("fast_resnet34").parameters()) == 1_437_078


def test_embedding_size_and_number_of_frames_are_free() -> None:
    encoder = build_encoder("fast_resnet34", embedding_dim=24).eval()
    with torch.no_grad():
        assert encoder(torch.randn(3, 40, 33)).shape == (3, 24)
        assert encoder(torch.randn(1, 40, 4)).shape == (1, 24)


def test_initial_weights_follow_the_seed() -> None:
    states = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        states.append(build_encoder("fast_resnet34").state_dict())
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert not torch.equal(states[0]["stem.weight"], states[2]["stem.weight"])


def test_activations_are_channels_last_and_weights_contiguous() -> None:
    encoder = FastResNet34()
    seen = []
    for block in encoder.stages[2]:
        block.register_forward_hook(lambda module, args, output: seen.append(output))
    encoder(torch.randn(2, 40, 50)).sum().backward()
    assert len(seen) == 6
    assert all(output.is_contiguous(memory_format=torch.channels_last) for output in seen)
    assert all(parameter.grad.is_contiguous() for parameter in encoder.parameters())


def test_autocast_keeps_parameters_fp32_and_gives_bf16_embeddings() -> None:
    encoder = build_encoder("fast_resnet34", embedding_dim=8).eval()
    features = torch.randn(2, 40, 20)
    with torch.no_grad():
        exact = encoder(features)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            rounded = encoder(features)
    assert rounded.dtype == torch.bfloat16
    assert {parameter.dtype for parameter in encoder.parameters()} == {torch.float32}
    assert torch.cosine_similarity(rounded.float(), exact).min() > 0.99


def test_pooling_of_equal_frames_returns_that_frame() -> None:
    frame = torch.randn(2, 1, 16)
    torch.testing.assert_close(SelfAttentivePooling(16)(frame.expand(2, 9, 16)), frame[:, 0])


def test_pooling_follows_its_attention() -> None:
    pooling = SelfAttentivePooling(2)
    with torch.no_grad():
        pooling.hidden.weight.copy_(torch.eye(2))
        pooling.hidden.bias.zero_()
        pooling.context.copy_(torch.tensor([[40.0], [0.0]]))
        pooled = pooling(torch.tensor([[[3.0, 1.0], [-3.0, 7.0]]]))
    torch.testing.assert_close(pooled, torch.tensor([[3.0, 1.0]]))


def test_a_misspelt_name_is_answered_with_the_nearest_one() -> None:
    with pytest.raises(CelError, match="unknown encoder 'fast_resnet43'; did you mean 'fast_resnet34'"):
        build_encoder("fast_resnet43")
    with pytest.raises(CelError, match="size 0"):
        build_encoder("fast_resnet34", embedding_dim=0)


def test_a_registered_encoder_can_be_built_once_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cel_dist.encoders.registry._ENCODERS", {})

    @register_encoder("flat", source="nobody", pooling="tap")
    class Flat(nn.Linear):
        def __init__(self, embedding_dim: int, *, pooling: str, num_mels: int) -> None:
            super().__init__(num_mels, embedding_dim)

    assert encoder_names() == ["flat"]
    assert build_encoder("flat", embedding_dim=3).out_features == 3
    with pytest.raises(ValueError, match="two encoders are called 'flat'"):
        register_encoder("flat", source="nobody", pooling="tap")(Flat)
    with pytest.raises(ValueError, match="there is no pooling 'mean'"):
        register_encoder("round", source="nobody", pooling="mean")(Flat)
