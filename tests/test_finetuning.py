"""Whole runs with labels: from an encoder or from nothing, interrupted, in other worlds, and what they leave."""

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from training_runs import losses, records, train_job, write_config
from worlds import run_world

from cel_dist import load_model
from cel_dist.config_file import load_config, parse_config
from cel_dist.config_sections import LabelsSection
from cel_dist.data.prepare import prepare
from cel_dist.errors import CelError
from cel_dist.training.classes import Classes, class_names, read_classes
from cel_dist.training.preflight import preflight
from cel_dist.training.start import signature

PROJECT = Path(__file__).resolve().parent.parent
LABELLED = {
    "data": {"segment_frames": 40, "short": "repeat"},
    "augment": {"profile": 0},
    "encoder": {"embedding_dim": 16, "views": "joint"},
    "labels": {"use": True, "utterances": 1},
    "loss": {"similarity": "arcface", "lambda_u": 0.5},
    "head": {"margin": 0.3, "scale": 20, "margin_from_epoch": 0.5, "margin_until_epoch": 1.5},
    "optim": {"lr": 1e-3, "head_lr": 3e-3},
    "train": {"batch_size": 8, "epochs": 2},
}


@pytest.fixture(scope="module")
def labelled(small_corpus, tmp_path_factory):
    """The small corpus with speakers in its shards."""
    folder = tmp_path_factory.mktemp("labelled")
    paths = sorted(path.relative_to(small_corpus.audio).as_posix() for path in small_corpus.audio.rglob("*.flac"))
    paths = paths or sorted(
        path.relative_to(small_corpus.audio).as_posix() for path in small_corpus.audio.rglob("*.wav")
    )
    (folder / "labels.txt").write_text("".join(f"{path} {path.split('/')[0]}\n" for path in paths))
    prepare(small_corpus.audio, folder / "shards", labels=folder / "labels.txt", samples_per_shard=15, workers=1)
    return type(small_corpus)(small_corpus.audio, folder / "shards", small_corpus.bank, small_corpus.trials)


def config_of(labelled, folder, name="run", **sections):
    merged = {key: {**value, **sections.pop(key, {})} for key, value in LABELLED.items()}
    return write_config(labelled, folder, name, **merged, **sections)


def trained(folder, num_ranks, config, *overrides):
    outcome = run_world(num_ranks, train_job, config, overrides, folder=folder / f"world-{config.stem}")[0]
    assert isinstance(outcome, dict), outcome


@pytest.fixture(scope="module")
def runs(labelled, tmp_path_factory):
    """A run that classifies; one that goes on from its head; one that compares; and AdaCos in shards, whole and cut."""
    folder = tmp_path_factory.mktemp("runs")
    trained(folder, 1, config_of(labelled, folder, "whole"))
    start = str(folder / "whole")
    no_growth = {"margin_from_epoch": 0.0, "margin_until_epoch": 0.0}
    large = {"data": {"segment_frames": 60}, "head": {"margin": 0.5, "init": start, **no_growth}}
    trained(
        folder, 1, config_of(labelled, folder, "large_margin", **large, encoder={"init": start}), "train.max_steps=1"
    )
    of_pairs = {key: value for key, value in LABELLED.items() if key != "head"}
    of_pairs |= {"labels": {"use": True, "utterances": 2}, "loss": {"similarity": "angular_prototypical"}}
    trained(folder, 1, write_config(labelled, folder, "prototypical", **of_pairs))
    shards = {key: value for key, value in LABELLED.items() if key != "head"}
    shards |= {"loss": {"similarity": "adacos"}, "head": {"weights": "sharded"}, "engine": {"zero_stage": 2}}
    shards |= {"train": {"batch_size": 8, "epochs": 1}}
    adacos, cut = (write_config(labelled, folder, name, **shards) for name in ("adacos", "adacos_cut"))
    trained(folder, 2, adacos)
    trained(folder, 2, cut, "train.max_steps=2")
    trained(folder, 2, cut)
    return folder


def test_the_margin_grows(runs):
    rows = records(runs / "whole")
    assert [row["margin"] for row in rows] == pytest.approx([0, 0, 0, 0.03, 0.09, 0.15, 0.21, 0.27, 0.3, 0.3])


def test_sharded_class_weights_and_the_scale_of_adacos_go_on_as_if_nothing_had_stopped(runs):
    rows = records(runs / "adacos")
    assert len({row["scale"] for row in rows}) == 5
    assert [row["scale"] for row in records(runs / "adacos_cut")] == [row["scale"] for row in rows]
    assert losses(runs / "adacos_cut") == losses(runs / "adacos")
    one, other = (read_classes(str(runs / name)) for name in ("adacos", "adacos_cut"))
    assert one.weights["weight"].shape == (10, 16)
    assert torch.equal(one.weights["weight"], other.weights["weight"])


def test_a_head_is_taken_over_by_the_names_of_its_speakers(runs):
    former, now = (read_classes(str(runs / name)) for name in ("whole", "large_margin"))
    assert former.names == now.names
    # One step of Adam at the rate of the head.
    moved = (former.weights["weight"] - now.weights["weight"]).abs().max().item()
    assert 0 < moved < 4e-3


def test_models_hold_no_names_of_speakers(runs):
    newest = sorted((runs / "whole" / "checkpoints").glob("step-*"))[-1]
    with safe_open(newest / "classes.safetensors", framework="pt") as file:
        assert "speakers" in file.metadata()
    for folder in (newest / "model", runs / "whole" / "model"):
        assert sorted(path.name for path in folder.iterdir()) == ["encoder.safetensors", "model.json"]
        assert load_model(folder).description.encoder.embedding_dim == 16


def test_the_contrastive_losses_take_speakers_for_rows(runs):
    rows = records(runs / "prototypical")
    # Two utterances of four speakers a batch, four utterances of ten speakers.
    assert rows[-1]["epoch"] == 2
    assert all(0 <= row["accuracy"] <= 1 for row in rows)
    assert "false_negatives" not in rows[0]


@pytest.mark.parametrize(
    ("sections", "complaint"),
    [
        ({"loss": {"similarity": "arcface"}}, "labels.use=true"),
        ({"labels": {"utterances": 3}}, "labels.use is false"),
        ({"labels": {"use": True, "utterances": 3}}, "does not divide by labels.utterances=3"),
        (
            {"labels": {"use": True, "utterances": 4}, "loss": {"similarity": "angular_contrastive"}},
            "set labels.utterances=2",
        ),
        ({"labels": {"use": True, "utterances": 1}}, "2 or more"),
        ({"labels": {"use": True}, "train": {"batch_size": 2}}, "is one speaker"),
        ({"head": {"margin": 0.3}}, "head.margin=0.3 is not used with"),
        (
            {"labels": {"use": True}, "loss": {"similarity": "softmax"}, "head": {"scale": 20}},
            "head.scale=20.0 is not used with loss.similarity=softmax",
        ),
        (
            {"labels": {"use": True}, "loss": {"similarity": "arcface"}, "head": {"margin": 1.6}},
            "arcface takes less than 1.57",
        ),
        (
            {"labels": {"use": True}, "loss": {"similarity": "cosface"}, "head": {"margin_from_epoch": 2}},
            "is after head.margin_until_epoch",
        ),
        (
            {"labels": {"use": True, "speeds_are_speakers": True}, "loss": {"similarity": "arcface"}},
            r"needs two or more of augment.speeds=\[1.0\]",
        ),
        (
            {"labels": {"use": True, "speeds_are_speakers": True}, "augment": {"profile": 0, "speeds": [0.9, 1.0]}},
            "speeds_are_speakers=true is not used with loss.similarity=angular_prototypical",
        ),
        (
            {"labels": {"use": True}, "loss": {"similarity": "softmax", "lambda_s": 0}},
            "leaves the class weights as they are drawn",
        ),
        ({"loss": {"similarity": "prototypical"}, "optim": {"head_lr": 0.01}}, "head_lr=0.01 is not used with"),
    ],
)
def test_settings_that_cannot_work_together_are_named(sections, complaint):
    with pytest.raises(CelError, match=complaint):
        parse_config({"data": {"shards": "s"}, "augment": {"profile": 0}, **sections}, "test")


def test_a_run_without_labels_in_its_shards_says_what_to_do(small_corpus, tmp_path):
    outcome = train_job(config_of(small_corpus, tmp_path))
    assert "cel prepare" in outcome
    assert "--labels" in outcome


def test_a_batch_that_ranks_cannot_share_is_told_in_utterances(labelled, tmp_path):
    config = load_config(write_config(labelled, tmp_path, labels={"use": True}, train={"batch_size": 6}))
    with pytest.raises(CelError, match=r"train.batch_size=6 \(3 speakers .* by 2 ranks; the next that does is 8"):
        preflight(config, 2, "auto")


def test_a_head_of_no_run_is_named_before_training(labelled, tmp_path):
    outcome = train_job(config_of(labelled, tmp_path, head={"init": str(tmp_path)}))
    assert outcome.startswith("CelError: head.init=")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("sections", "complaint"),
    [
        ({"head": {"sub_centres": 2}}, r"weight \[classes, 16\], this run .* weight \[classes, 2, 16\]; take its"),
        ({"encoder": {"embedding_dim": 8}}, r"this run those of the form weight \[classes, 8\]"),
        ({"loss": {"similarity": "softmax"}}, r"this run those of the form bias \[classes\], weight"),
        ({}, "has 2 speakers, and none of them is in data.shards"),
        ({"loss": {"similarity": "adacos"}, "labels": {"too_few": "drop"}}, "adapts nothing to 2 speakers"),
    ],
)
def test_a_head_that_cannot_be_is_named_before_a_process_is_started(small_corpus, tmp_path, sections, complaint):
    Classes(["nobody", "no one"], {"weight": torch.zeros(2, 16)}).write(tmp_path)
    paths = sorted(path.relative_to(small_corpus.audio) for path in small_corpus.audio.rglob("*.wav"))
    (tmp_path / "labels.txt").write_text("".join(f"{path} id{n % 2}\n" for n, path in enumerate(paths)))
    prepare(small_corpus.audio, tmp_path / "shards", labels=tmp_path / "labels.txt", workers=1)
    merged = {key: {**value, **sections.get(key, {})} for key, value in LABELLED.items()}
    merged["data"]["shards"] = str(tmp_path / "shards")
    merged["train"] = {"batch_size": 2}
    merged["head"] = {"init": str(tmp_path), **sections.get("head", {})}
    config = load_config(write_config(small_corpus, tmp_path, **merged))
    with pytest.raises(CelError, match=complaint):
        preflight(config, 1, "auto")


def test_the_order_of_speeds_is_that_of_classes_and_so_must_stay():
    def of(*speeds):
        tree = {**LABELLED, "data": {"shards": "s"}, "augment": {"profile": 0, "speeds": list(speeds)}}
        tree["labels"] = {**LABELLED["labels"], "speeds_are_speakers": True}
        return class_names(parse_config(tree, "test"), ["a", "b"])

    assert of(0.9, 1.0) == ("a x0.9", "b x0.9", "a", "b")
    one, other = (signature(steps_per_epoch=1, class_names=of(*speeds)) for speeds in ((0.9, 1.0), (1.0, 0.9)))
    assert one != other


@pytest.mark.parametrize("path", sorted(PROJECT.glob("configs/finetune_*.yaml")), ids=lambda path: path.stem)
def test_the_recipes_are_valid(path):
    config = load_config(path)
    assert config.labels != LabelsSection()
