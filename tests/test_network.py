"""From settings and descriptions to networks and front ends, and that nothing of them is lost on the way."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cel_dist.config import Config
from cel_dist.config_file import parse_config
from cel_dist.distributed import World
from cel_dist.encoders import AttentiveStatisticsPooling
from cel_dist.errors import CelError
from cel_dist.model import SpeakerModel, load_model
from cel_dist.network import describe, front_end, new_network
from cel_dist.training.batches import Batches, TrainBatch
from cel_dist.training.objective import initial_encoder
from cel_dist.training.preflight import preflight

BATCH = 8


def configured(**sections: dict[str, Any]) -> Config:
    tree: dict[str, Any] = {"data": {"shards": "s"}, "augment": {"profile": 0}, "encoder": {"embedding_dim": 8}}
    for name, values in sections.items():
        tree[name] = {**tree.get(name, {}), **values}
    return parse_config(tree, "test")


def saved(config: Config, folder: Path) -> Path:
    SpeakerModel(initial_encoder(config), describe(config)).save(folder)
    return folder


def test_pooling_and_mel_bands_are_described_built_saved_and_loaded(tmp_path: Path) -> None:
    config = configured(encoder={"name": "resnet34", "pooling": "asp"}, features={"num_mels": 80})
    loaded = load_model(saved(config, tmp_path / "m"), "cpu")
    assert (loaded.description.encoder.pooling, loaded.description.features.num_mels) == ("asp", 80)
    assert isinstance(loaded.encoder.pooling, AttentiveStatisticsPooling)
    wave = np.random.default_rng(0).integers(-3000, 3000, 8000).astype(np.int16)
    expected = SpeakerModel(initial_encoder(config), describe(config)).embed(wave)
    assert np.array_equal(loaded.embed(wave), expected)


def test_a_model_that_says_nothing_of_pooling_and_bands_is_as_published(tmp_path: Path) -> None:
    path = saved(configured(), tmp_path / "m") / "model.json"
    tree = json.loads(path.read_text())
    del tree["encoder"]["pooling"], tree["features"]["num_mels"]
    path.write_text(json.dumps(tree))
    loaded = load_model(tmp_path / "m", "cpu")
    assert loaded.description == describe(configured())
    assert loaded.embed(np.ones(4000, np.float32) * np.sin(np.arange(4000, dtype=np.float32))).shape == (8,)


def test_the_number_of_bands_is_that_of_the_front_end_and_of_the_encoder() -> None:
    for num_mels in (40, 80):
        described = describe(configured(features={"num_mels": num_mels}, encoder={"name": "tdnn"}))
        features = front_end(described)(3000 * torch.randn(2, 8000))
        assert features.shape == (2, num_mels, 51)
        # No band is empty: that of an empty one would be constant.
        assert (features.std(dim=-1) > 0.9).all()
        assert new_network(described).frame_layers[0].conv.in_channels == num_mels


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"features": {"num_mels": 80}}, "features.num_mels=40, this run has features.num_mels=80; set features.num_m"),
        ({"encoder": {"pooling": "asp"}}, "encoder.pooling=sap, this run has encoder.pooling=asp"),
        ({"encoder": {"embedding_dim": 16}}, "encoder.embedding_dim=8, this run has encoder.embedding_dim=16"),
        ({"encoder": {"name": "tdnn"}}, "encoder.name=fast_resnet34, encoder.pooling=sap, this run has"),
    ],
)
def test_a_run_does_not_begin_with_a_model_of_another_network(tmp_path: Path, change, message: str) -> None:
    folder = saved(configured(), tmp_path / "m")
    sections = {**change, "encoder": {**change.get("encoder", {}), "init": str(folder)}}
    with pytest.raises(CelError) as caught:
        initial_encoder(configured(**sections))
    assert message in str(caught.value)
    assert str(caught.value).startswith(f"encoder.init={folder} is a model with")
    # By its name or by default, it is the same pooling.
    initial_encoder(configured(encoder={"pooling": "sap", "init": str(folder)}))


@pytest.mark.parametrize(
    ("augment", "message"),
    [
        ({"speeds": [0.9, 1.005]}, r"augment.speeds=\[0.9, 1.005\]: a speed has two decimals"),
        ({"speeds": [1.0, 1.0]}, "has a speed twice"),
        ({"speeds": [0.1]}, "'augment.speeds.0': .*greater than or equal to 0.5"),
        ({"speeds": []}, "'augment.speeds': .*at least 1"),
        (
            {"time_masks": 36},
            "augment.time_masks=36 of up to augment.time_mask_frames=5 may leave nothing of data.segm",
        ),
        ({"freq_masks": 4}, "augment.freq_masks=4 of up to augment.freq_mask_bands=10 may leave nothing of features.n"),
    ],
)
def test_augmentation_that_cannot_be_is_refused(augment: dict[str, Any], message: str) -> None:
    with pytest.raises(CelError, match=message):
        configured(augment=augment)


def test_mel_bands_and_pooling_are_checked() -> None:
    with pytest.raises(CelError, match=r"'features\.num_mels': input should be 40 or 80, not 64"):
        configured(features={"num_mels": 64})
    with pytest.raises(CelError, match=r"'encoder\.pooling': input should be 'default', 'tap'"):
        configured(encoder={"pooling": "mean"})


@pytest.fixture
def first_batch(small_corpus, tmp_path: Path) -> Any:
    """The first batch of a run with these settings, on one of so many ranks."""

    def draw(rank: int = 0, size: int = 1, **sections: dict[str, Any]) -> TrainBatch:
        data = {"shards": str(small_corpus.shards), "segment_frames": 60, "workers": 0}
        tree = {"data": data, "train": {"batch_size": BATCH}, "run": {"dir": str(tmp_path / "run")}, **sections}
        config = configured(**tree)
        batches = Batches(config, preflight(config, size, "auto"), World(rank=rank, size=size), torch.device("cpu"))
        batch = next(batches)
        batches.close()
        return batch

    return draw


def test_speeds_masks_and_mel_bands_change_what_is_trained_on(first_batch) -> None:
    plain = first_batch().features
    assert plain.shape == (BATCH, 2, 40, 62)
    assert first_batch(features={"num_mels": 80}).features.shape == (BATCH, 2, 80, 62)
    fast = first_batch(augment={"speeds": [0.9, 1.1]}).features
    assert fast.shape == plain.shape
    assert not torch.allclose(fast, plain, atol=0.1)
    masks = {"time_masks": 1, "time_mask_frames": 20, "freq_masks": 1, "freq_mask_bands": 10}
    for name, widest in (("time_masks", "time_mask_frames"), ("freq_masks", "freq_mask_bands")):
        masked = first_batch(augment={name: 1, widest: masks[widest]}).features
        hidden = masked == 0
        assert hidden.any()
        assert torch.equal(masked[~hidden], plain[~hidden])
        narrow = first_batch(augment={name: 1, widest: 1}).features == 0
        assert 0 < narrow.sum() < hidden.sum()


@pytest.mark.parametrize(
    ("num_ranks", "sections", "rows"),
    [
        (2, {"train": {"batch_size": 4}}, None),
        (2, {"train": {"batch_size": 2}}, None),
        (1, {"train": {"batch_size": 5, "encode_chunks": 3}}, 1),
        (2, {"train": {"batch_size": 4, "encode_chunks": 2}, "encoder": {"batch_norm": "per_rank"}}, 1),
        (2, {"train": {"batch_size": 2}, "encoder": {"batch_norm": "per_rank"}}, 1),
        (2, {"train": {"batch_size": 2}, "encoder": {"batch_norm": "per_rank", "views": "joint"}}, None),
    ],
)
def test_batch_norm_over_rows_has_two_of_them(small_corpus, tmp_path, num_ranks, sections, rows) -> None:
    tree = {"data": {"shards": str(small_corpus.shards), "segment_frames": 60}, "run": {"dir": str(tmp_path / "run")}}
    tree |= {**sections, "encoder": {"name": "ecapa_tdnn_512", "embedding_dim": 8, **sections.get("encoder", {})}}
    if rows is None:
        preflight(configured(**tree), num_ranks, "auto")
        return
    with pytest.raises(CelError, match=f"leaves {rows} for a forward pass; raise train.batch_size"):
        preflight(configured(**tree), num_ranks, "auto")
    preflight(configured(**{**tree, "encoder": {**tree["encoder"], "name": "tdnn"}}), num_ranks, "auto")


def test_speeds_and_masks_are_the_same_for_any_number_of_ranks(first_batch) -> None:
    augment = {"speeds": [0.9, 1.0, 1.1], "time_masks": 2, "freq_masks": 2, "freq_mask_bands": 5}
    whole = first_batch(augment=augment).features
    halves = [first_batch(rank, 2, augment=augment).features for rank in range(2)]
    torch.testing.assert_close(torch.cat(halves), whole, rtol=0, atol=1e-3)
