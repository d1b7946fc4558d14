"""The examples of docs/extending.md, and the types of what they use."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from cel_dist.config_file import parse_config
from cel_dist.data.plugin_augment import PluginAugment
from cel_dist.encoders import build_encoder
from cel_dist.losses import EquilibriumLoss

PROJECT = Path(__file__).resolve().parent.parent
USER = """
import numpy as np

import cel_dist
from cel_dist.config_file import load_config
from cel_dist.encoders import build_encoder
from cel_dist.features import LogMel
from cel_dist.losses import EquilibriumLoss
from cel_dist.metrics import eer


def embedding(model: str, path: str) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
    return cel_dist.load_model(model).embed(path)


def loss_of(x: Tensor) -> float:
    return float(EquilibriumLoss(similarity="ge2e")(x).loss)


def epochs(path: str) -> int:
    return load_config(path, ["train.epochs=3"]).train.epochs


def embeddings(wave: Tensor) -> Tensor:
    result: Tensor = build_encoder("tdnn", embedding_dim=64)(LogMel()(wave))
    return result


def rate(scores: list[float], labels: list[int]) -> float:
    return eer(np.array(scores), np.array(labels))
"""


def example() -> str:
    return "\n".join(re.findall(r"```python\n(.*?)```", (PROJECT / "docs" / "extending.md").read_text(), re.DOTALL))


def test_the_examples_register_what_a_configuration_can_name(tmp_path, monkeypatch):
    (tmp_path / "my_parts.py").write_text(example())
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    tree = {
        "run": {"plugins": ["my_parts"]},
        "data": {"shards": "s"},
        "augment": {"profile": 0, "extra": {"gain": {"decibels": 3.0}}},
        "encoder": {"name": "mean_mlp"},
        "loss": {"similarity": "from_the_second"},
    }
    config = parse_config(tree, "example")
    embeddings = build_encoder(config.encoder.name, 16)(torch.randn(6, 40, 50)).unflatten(0, (3, 2))
    loss = EquilibriumLoss(config.loss.similarity)(embeddings).loss
    swapped = EquilibriumLoss("angular_prototypical")(embeddings.flip(1)).loss
    torch.testing.assert_close(loss, swapped)
    augment = PluginAugment(config.augment.extra, seed=0)
    louder = augment(torch.ones(4, 2, 8), epoch=0, step=0, rows=slice(0, 4), batch_size=4)
    assert bool((louder.log10().abs() <= 3 / 20 + 1e-6).all())
    assert len(louder.unique()) == 8


def test_a_strictly_typed_program_can_use_the_package(tmp_path):
    pytest.importorskip("mypy")
    assert (PROJECT / "cel_dist" / "py.typed").exists()
    (tmp_path / "program.py").write_text(example() + USER)
    command = [sys.executable, "-m", "mypy", "--strict", "--config-file", os.devnull, "program.py"]
    environment = {**os.environ, "MYPYPATH": str(PROJECT), "MYPY_CACHE_DIR": str(tmp_path / "cache")}
    command.insert(3, "--follow-imports=silent")
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
