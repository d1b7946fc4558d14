"""Encoders: parity of the Fast ResNet-34 with the published one, and what a registry must refuse."""

from itertools import combinations
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch
from torch import nn

from cel_dist.config_sections import EncoderSection
from cel_dist.description import EncoderDescription
from cel_dist.encoders import FastResNet34, build_encoder, encoder_names, find_encoder, register_encoder
from cel_dist.encoders.cost import encoder_cost
from cel_dist.encoders.pooling import POOLINGS
from cel_dist.encoders.registry import RegisteredEncoder
from cel_dist.errors import CelError
from cel_dist.plugins import Registry
from cel_dist.published import read_published

LARGE = {("ecapa_tdnn_1024", pooling) for pooling in ("tap", "sap", "stats")}


@pytest.mark.parametrize(("training", "name"), [(True, "embedding_train_mode"), (False, "embedding_eval_mode")])
def test_embeddings_equal_the_published_ones(shared: Path, training: bool, name: str) -> None:
    golden = np.load(shared / "golden" / "encoder.npz")
    encoder = build_encoder("fast_resnet34").train(training)
    encoder.load_state_dict(read_published(shared / "golden" / "published_format.model").encoder_state)
    with torch.no_grad():
        embeddings = encoder(torch.from_numpy(golden["log_mel"])).numpy()
    largest = np.abs(golden[name]).max()
    np.testing.assert_allclose(embeddings / largest, golden[name] / largest, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "embedding_dim", "num_mels", "published"),
    [
        # METHOD: 1 437 078.
        ("fast_resnet34", 512, 40, "1.437078"),
        # Snyder et al. 2018, section 2.2: 4.2 million up to segment6, with 24 coefficients.
        ("tdnn", 512, 24, "4.2"),
        # Desplanques et al. 2020, table 1: 6.2 and 14.7 million, with 80 coefficients and 192 dimensions.
        ("ecapa_tdnn_512", 192, 80, "6.2"),
        ("ecapa_tdnn_1024", 192, 80, "14.7"),
        # Wang et al. 2023, arXiv 2210.17016: 6.63 million, with 80 bands and 256 dimensions.
        ("resnet34", 256, 80, "6.63"),
    ],
)
def test_an_encoder_has_the_published_number_of_parameters(
    name: str, embedding_dim: int, num_mels: int, published: str
) -> None:
    digits = len(published.partition(".")[2])
    found = encoder_cost(name, embedding_dim, num_mels=num_mels).parameters
    assert f"{found / 1e6:.{digits}f}" == published


def test_vggvox_has_the_layers_of_the_paper() -> None:
    convolutions = 96 * 5 * 7 + 256 * 96 * 5 * 5 + 384 * 256 * 9 + 256 * 384 * 9 + 256 * 256 * 9 + 512 * 256 * 4
    norms = 2 * (96 + 256 + 384 + 256 + 256 + 512)
    assert encoder_cost("vggvox").parameters == convolutions + norms + 512 * 512 + 512
    # fc6 spans what is left of the bands: 4 of 40, 9 of 80.
    kernels = [build_encoder("vggvox", num_mels=mels).fc6[0].weight.shape[2] for mels in (40, 80)]
    assert kernels == [4, 9]
    with pytest.raises(CelError, match="takes 16 mel bands or more, not 8"):
        build_encoder("vggvox", num_mels=8)


def test_multiply_adds_are_those_of_convolutions_and_matrix_products() -> None:
    # The x-vector network, layer by layer: products for each frame, then those for the embedding.
    by_frame = 40 * 5 * 512 + 2 * 512 * 3 * 512 + 512 * 512 + 512 * 1500
    assert encoder_cost("tdnn", 512, num_frames=200).multiply_adds == 200 * by_frame + 3000 * 512
    assert encoder_cost("tdnn", 512, num_frames=400).multiply_adds == 400 * by_frame + 3000 * 512


@pytest.mark.parametrize("name", encoder_names())
def test_every_encoder_takes_short_and_long_segments_and_every_row_by_itself(name: str) -> None:
    torch.manual_seed(0)
    encoder = build_encoder(name, embedding_dim=24)
    with torch.no_grad():
        encoder(torch.randn(4, 40, 40))
        encoder.eval()
        for frames in (11, 18, 33):
            features = torch.randn(3, 40, frames)
            whole = encoder(features)
            assert whole.shape == (3, 24)
            alone = torch.cat([encoder(row[None]) for row in features])
            torch.testing.assert_close(alone, whole, rtol=1e-4, atol=1e-5)
        assert not torch.allclose(whole[0], whole[1], rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize(
    ("name", "pooling"),
    # The two widths of ECAPA-TDNN differ in nothing else.
    [(name, pooling) for name in encoder_names() for pooling in POOLINGS if (name, pooling) not in LARGE],
)
def test_every_encoder_learns_with_every_pooling(name: str, pooling: str) -> None:
    torch.manual_seed(0)
    num_mels = 80 if pooling in ("tap", "asp") else 40
    encoder = build_encoder(name, 8, pooling=pooling, num_mels=num_mels).train()
    embeddings = encoder(torch.randn(2, num_mels, 16))
    assert embeddings.shape == (2, 8)
    (embeddings * torch.randn(2, 8)).sum().backward()
    for parameter_name, parameter in encoder.named_parameters():
        assert parameter.grad is not None, parameter_name
        assert torch.isfinite(parameter.grad).all(), parameter_name


def test_the_default_pooling_is_that_of_the_paper_and_another_one_another_network() -> None:
    defaults = {name: find_encoder(name).pooling for name in encoder_names()}
    assert defaults == {
        "ecapa_tdnn_1024": "asp",
        "ecapa_tdnn_512": "asp",
        "fast_resnet34": "sap",
        "resnet34": "stats",
        "tdnn": "stats",
        "vggvox": "tap",
    }
    for name, pooling in defaults.items():
        with torch.device("meta"):
            encoders = {choice: build_encoder(name, 16, pooling=choice) for choice in ("default", *POOLINGS)}
        shapes = {
            choice: [(key, value.shape) for key, value in encoder.state_dict().items()]
            for choice, encoder in encoders.items()
        }
        assert shapes["default"] == shapes[pooling]
        assert all(shapes[one] != shapes[other] for one, other in combinations(POOLINGS, 2))
    with pytest.raises(CelError, match="unknown pooling 'mean' of encoder 'tdnn'; known poolings: default, tap, sap"):
        build_encoder("tdnn", pooling="mean")
    with pytest.raises(CelError, match="features of 0 mel bands"):
        build_encoder("tdnn", num_mels=0)


def test_a_configuration_and_a_model_know_the_poolings_that_there_are() -> None:
    for section in (EncoderSection, EncoderDescription):
        assert get_args(section.model_fields["pooling"].annotation) == ("default", *POOLINGS)


def test_each_block_of_ecapa_sees_all_before_it() -> None:
    encoder = build_encoder("ecapa_tdnn_512", 8).eval()
    seen: list[torch.Tensor] = []
    for module in (encoder.stem, *encoder.blocks):
        module.register_forward_hook(lambda module, args, output: seen.extend((args[0], output)))
    with torch.no_grad():
        encoder(torch.randn(1, 40, 20))
    inputs, outputs = seen[2::2], seen[1::2]
    for number, received in enumerate(inputs, start=1):
        torch.testing.assert_close(received, sum(outputs[:number]))


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


@pytest.mark.parametrize("name", [name for name in encoder_names() if name != "ecapa_tdnn_1024"])
def test_autocast_keeps_parameters_fp32_and_gives_bf16_embeddings(name: str) -> None:
    torch.manual_seed(0)
    encoder = build_encoder(name, embedding_dim=8)
    features = torch.randn(2, 40, 20)
    with torch.no_grad():
        encoder(torch.randn(2, 40, 40))
        encoder.eval()
        exact = encoder(features)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            rounded = encoder(features)
    assert rounded.dtype == torch.bfloat16
    assert {parameter.dtype for parameter in encoder.parameters()} == {torch.float32}
    assert torch.cosine_similarity(rounded.float(), exact).min() > 0.99


def test_a_misspelt_name_is_answered_with_the_nearest_one() -> None:
    with pytest.raises(CelError, match="unknown encoder 'fast_resnet43'; did you mean 'fast_resnet34'"):
        build_encoder("fast_resnet43")
    with pytest.raises(CelError, match="size 0"):
        build_encoder("fast_resnet34", embedding_dim=0)


def test_a_registered_encoder_can_be_built_once_named(monkeypatch: pytest.MonkeyPatch) -> None:
    empty: Registry[RegisteredEncoder] = Registry("encoder", "cel_dist.no_encoders")
    monkeypatch.setattr("cel_dist.encoders.registry._ENCODERS", empty)

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
