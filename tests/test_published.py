"""Checkpoints of the published implementation: every tensor finds its place, and other files are refused by name."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from cel_dist.encoders import build_encoder
from cel_dist.errors import CelError
from cel_dist.losses import EquilibriumLoss
from cel_dist.published import read_published


@pytest.fixture
def tensors(shared: Path) -> dict[str, Tensor]:
    return torch.load(shared / "golden" / "published_format.model", weights_only=True)


def saved(content: object, folder: Path) -> Path:
    path = folder / "some.model"
    torch.save(content, path)
    return path


def test_encoder_and_loss_load_strictly(shared: Path) -> None:
    published = read_published(shared / "golden" / "published_format.model")
    build_encoder("fast_resnet34", published.embedding_dim).load_state_dict(published.encoder_state)
    loss = EquilibriumLoss()
    loss.load_state_dict(published.loss_state)
    assert (loss.w.item(), loss.b.item()) == (10.0, -5.0)


def test_no_value_is_lost_or_used_twice(tensors: dict[str, Tensor], shared: Path) -> None:
    state = read_published(shared / "golden" / "published_format.model").encoder_state
    originals = [tensor for name, tensor in tensors.items() if name.startswith("__S__.")]
    assert len(state) == len(originals)
    assert sum(tensor.double().sum() for tensor in state.values()) == pytest.approx(
        float(sum(tensor.double().sum() for tensor in originals)), rel=1e-12
    )


def test_another_embedding_size_is_read_from_the_file(tensors: dict[str, Tensor], tmp_path: Path) -> None:
    tensors["__S__.fc.weight"] = tensors["__S__.fc.weight"][:64].clone()
    tensors["__S__.fc.bias"] = tensors["__S__.fc.bias"][:64].clone()
    assert read_published(saved(tensors, tmp_path)).embedding_dim == 64


def test_a_loss_without_parameters_gives_none(tensors: dict[str, Tensor], tmp_path: Path) -> None:
    encoder_only = {name: tensor for name, tensor in tensors.items() if not name.startswith("__L__.")}
    assert read_published(saved(encoder_only, tmp_path)).loss_state is None


def test_missing_unknown_and_mis_shaped_tensors_are_named(tensors: dict[str, Tensor], tmp_path: Path) -> None:
    del tensors["__S__.sap_linear.bias"]
    tensors["__S__.layer2.0.extra"] = torch.zeros(1)
    tensors["__S__.bn1.weight"] = torch.zeros(8)
    tensors["__L__.w"] = torch.zeros(2)
    with pytest.raises(CelError) as caught:
        read_published(saved(tensors, tmp_path))
    assert "'pooling.hidden.bias' is missing" in str(caught.value)
    assert "'stages.1.0.extra' is unknown" in str(caught.value)
    assert "and 1 more" in str(caught.value)
    assert "'stem_norm.weight' has shape (8,) instead of (16,)" in str(caught.value)


def test_files_that_are_no_published_model_are_refused_in_one_line(
    tensors: dict[str, Tensor], shared: Path, tmp_path: Path
) -> None:
    text, empty, cut, archive = (tmp_path / name for name in ("text.model", "empty.model", "cut.model", "numbers.npz"))
    text.write_text("hello, this is text")
    empty.touch()
    content = (shared / "golden" / "published_format.model").read_bytes()
    cut.write_bytes(content[: len(content) // 2])
    np.savez(archive, numbers=np.arange(3))
    for path, message in (
        (text, "not a state dict"),
        (empty, "not a state dict"),
        (cut, "cut short"),
        (archive, "not a state dict"),
        (tmp_path / "absent.model", "No such file"),
        (tmp_path, "Is a directory"),
    ):
        with pytest.raises(CelError, match=message) as caught:
            read_published(path)
        assert str(path) in str(caught.value)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"epoch": 3}, "not a state dict of tensors"),
        ([torch.zeros(1)], "not a state dict of tensors"),
        ({"w": torch.zeros(1)}, "no published CEL encoder"),
    ],
)
def test_other_saved_objects_are_refused(content: object, message: str, tmp_path: Path) -> None:
    with pytest.raises(CelError, match=message):
        read_published(saved(content, tmp_path))


def test_a_file_that_would_run_code_is_refused(tmp_path: Path) -> None:
    marker = tmp_path / "ran"

    class Malicious:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return (Path.touch, (marker,))

    with pytest.raises(CelError, match="not a state dict"):
        read_published(saved(Malicious(), tmp_path))
    assert not marker.exists()
