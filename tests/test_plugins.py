"""Encoders, augmentations and losses of other packages: through entry points, and as a file in the working folder."""

import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
import yaml
from plugin_source import SOURCE
from training_runs import CEL, ENVIRONMENT, records, write_config

from cel_dist.config_file import load_config
from cel_dist.data.plugin_augment import Draws, PluginAugment, register_augmentation
from cel_dist.data.randomness import Purpose, generator
from cel_dist.errors import CelError, RunError

USE = {"encoder": {"embedding_dim": 16}, "loss": {}, "augment": {"profile": 1}, "optim": {"lr": 0.01}}


def install(folder, prefix=""):
    """A package with entry points, as pip would leave it in a folder of packages."""
    package = folder / "tiny_speech"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (package / "parts.py").write_text(SOURCE.replace("PREFIX", prefix))
    information = folder / "tiny_speech-1.0.dist-info"
    information.mkdir()
    (information / "METADATA").write_text("Metadata-Version: 2.1\nName: tiny-speech\nVersion: 1.0\n")
    (information / "entry_points.txt").write_text(
        f"[cel_dist.encoders]\n{prefix}mean_mlp = tiny_speech.parts:MeanMlp\n"
        f"[cel_dist.augmentations]\n{prefix}gain = tiny_speech.parts\n"
        f"[cel_dist.similarities]\n{prefix}both_views = tiny_speech.parts\n"
    )
    return folder


def using(prefix, **sections):
    tree = {name: dict(values) for name, values in USE.items()}
    tree["encoder"]["name"] = f"{prefix}mean_mlp"
    tree["loss"]["similarity"] = f"{prefix}both_views"
    tree["augment"]["extra"] = {f"{prefix}gain": {"decibels": 3.0}}
    for name, values in sections.items():
        tree.setdefault(name, {}).update(values)
    return tree


def cel(*arguments, cwd=None, path=None):
    environment = dict(ENVIRONMENT)
    if path is not None:
        environment["PYTHONPATH"] = os.pathsep.join([str(path), environment.get("PYTHONPATH", "")])
    return subprocess.run([*CEL, *arguments], cwd=cwd, env=environment, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    return install(tmp_path_factory.mktemp("packages"))


@pytest.fixture(scope="module")
def trained(installed, small_corpus, tmp_path_factory):
    """The folder of two runs with the plug-ins, of one rank and of two through the launcher."""
    folder = tmp_path_factory.mktemp("plugin_runs")
    for name, nproc in (("one", []), ("two", ["--nproc", "2"])):
        config = write_config(small_corpus, folder, name, **using(""))
        done = cel("train", str(config), *nproc, path=installed)
        assert done.returncode == 0, done.stderr
    return folder


def test_a_run_is_the_same_on_one_rank_and_on_two_with_the_negatives_of_both(trained):
    one, two = records(trained / "one"), records(trained / "two")
    assert len(one) == len(two) == 5
    for name in ("similarity", "uniformity", "grad_norm"):
        np.testing.assert_allclose([row[name] for row in two], [row[name] for row in one], rtol=1e-4)
    # Among four rows instead of eight the loss would be lower by about log(7 / 3); and it is one that learns.
    assert len({row["similarity"] for row in one}) == 5


def test_the_saved_model_names_its_plugin_and_is_loaded_and_evaluated_with_it(
    trained, installed, small_corpus, tmp_path
):
    model = trained / "two" / "model"
    assert json.loads((model / "model.json").read_text())["encoder"]["module"] == "tiny_speech.parts"
    arguments = ["evaluate", "--model", str(model), "--trials", str(small_corpus.trials), "--root"]
    arguments += [str(small_corpus.audio), "--out", str(tmp_path / "evaluation"), "--json"]
    done = cel(*arguments, path=installed)
    assert done.returncode == 0, done.stderr
    assert 0 <= json.loads(done.stdout)["eer"] <= 1
    missing = cel(*arguments)
    assert missing.returncode == 2
    assert missing.stderr.count("\n") == 1
    assert "tiny_speech.parts" in missing.stderr
    assert "'mean_mlp'" in missing.stderr
    assert "install its package" in missing.stderr


def test_a_file_in_the_working_folder_serves_every_rank_and_the_evaluation(small_corpus, tmp_path):
    (tmp_path / "my_parts.py").write_text(SOURCE.replace("PREFIX", "own_"))
    config = write_config(small_corpus, tmp_path, **using("own_", run={"plugins": ["my_parts"]}))
    script = [shutil.which("cel", path=os.path.dirname(sys.executable)) or "cel"]
    done = subprocess.run(
        [*script, "train", str(config), "train.max_steps=2", "--nproc", "2"],
        cwd=tmp_path,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert len(records(tmp_path / "run")) == 2
    embed = ["embed", "--model", str(tmp_path / "run"), str(next(small_corpus.audio.rglob("*.*")))]
    done = subprocess.run(
        [*script, *embed, "--out", "e.npz"], cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert np.load(tmp_path / "e.npz")["embeddings"].shape == (1, 16)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (
            "import nowhere_to_be_found",
            "cannot be imported: ModuleNotFoundError: No module named 'nowhere_to_be_found'",
        ),
        ("1 / 0", "cannot be imported: ZeroDivisionError: division by zero; put that right in the plug-in"),
        (
            "from cel_dist.encoders import register_encoder\n"
            "register_encoder('tdnn', source='', pooling='tap')(object)",
            "two encoders are called 'tdnn'",
        ),
        (None, "install its package, or start where its file is"),
    ],
)
def test_a_broken_plugin_names_itself_in_one_line(tmp_path, monkeypatch, source, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    name = f"broken_{abs(hash(source))}"
    if source is not None:
        (tmp_path / f"{name}.py").write_text(source)
    config = tmp_path / "c.yaml"
    config.write_text(f"data: {{shards: s}}\naugment: {{profile: 0}}\nrun: {{plugins: [{name}]}}\n")
    with pytest.raises(CelError) as failure:
        load_config(config)
    assert f"plug-in {name} (run.plugins)" in str(failure.value)
    assert message in str(failure.value)
    assert "\n" not in str(failure.value)


def test_an_entry_point_that_leads_elsewhere_is_named(tmp_path):
    install(tmp_path, "other_")
    points = tmp_path / "tiny_speech-1.0.dist-info" / "entry_points.txt"
    points.write_text("[cel_dist.encoders]\nmisnamed = tiny_speech.parts\nbroken = tiny_speech.absent\n")
    for name, message in (("misnamed", "registers no encoder called"), ("broken", "cannot be imported")):
        program = f"from cel_dist.encoders import build_encoder; build_encoder({name!r})"
        environment = {**ENVIRONMENT, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ENVIRONMENT.get('PYTHONPATH', '')}"}
        done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
        assert message in done.stderr.splitlines()[-1]
        assert f"entry point '{name}' of cel_dist.encoders" in done.stderr.splitlines()[-1]


@register_augmentation("test_shift")
def shift(samples: int = 1):
    if samples < 1:
        raise ValueError(f"samples={samples} is below 1")
    return lambda segments, draws: segments + samples * (draws.uniform(1) + draws.normal(2, per="row")[..., :1])


@register_augmentation("test_cut")
def cut():
    return lambda segments, draws: segments[..., 1:]


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"test_shfit": {}}, "'augment.extra': there is nothing called 'test_shfit'; did you mean 'test_shift'"),
        ({"test_shift": {"smaples": 1}}, "augment.extra.test_shift: .*'smaples'.*its settings are: samples"),
        ({"test_shift": {"samples": 0}}, "augment.extra.test_shift: samples=0 is below 1"),
    ],
)
def test_settings_of_an_augmentation_are_checked(tmp_path, extra, message):
    file = tmp_path / "c.yaml"
    file.write_text(yaml.safe_dump({"data": {"shards": "s"}, "augment": {"profile": 0, "extra": extra}}))
    with pytest.raises(CelError, match=message):
        PluginAugment(load_config(file).augment.extra, 0)


def test_an_augmentation_does_the_same_for_any_number_of_ranks():
    segments = torch.zeros(8, 2, 5)
    augment = PluginAugment({"test_shift": {"samples": 2}}, seed=3)
    whole = augment(segments, epoch=1, step=2, rows=slice(0, 8), batch_size=8)
    parts = [augment(segments[:2], epoch=1, step=2, rows=slice(n, n + 2), batch_size=8) for n in range(0, 8, 2)]
    assert torch.equal(torch.cat(parts), whole)
    assert len(whole[..., 0].unique()) == 16
    later = augment(segments, epoch=1, step=3, rows=slice(0, 8), batch_size=8)
    assert not torch.equal(later, whole)


def test_the_numbers_of_two_augmentations_and_of_views_differ():
    def draws(stream):
        return Draws(generator(0, Purpose.PLUGIN, 0, 0, stream), slice(0, 4), 4, 2, torch.device("cpu"))

    assert not torch.equal(draws(1).uniform(3), draws(2).uniform(3))
    assert draws(1).uniform(3).shape == (4, 2, 3)
    assert draws(1).normal(3, per="row").shape == (4, 1, 3)


def test_an_augmentation_that_changes_the_form_is_named():
    with pytest.raises(RunError, match=r"'test_cut' made .*4.* of .*5.*must keep the form"):
        PluginAugment({"test_cut": {}}, 0)(torch.zeros(2, 2, 5), epoch=0, step=0, rows=slice(0, 2), batch_size=2)
