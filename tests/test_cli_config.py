"""`cel config`, and what the shell completes."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jsonschema
import pytest
import yaml
from training_runs import CEL, ENVIRONMENT, write_config

from cel_dist import config_sections
from cel_dist.cli.app import run
from cel_dist.config import Config
from cel_dist.config_file import all_paths, load_config
from cel_dist.config_schema import json_schema
from cel_dist.encoders import encoder_names
from cel_dist.losses.similarity import SIMILARITIES
from cel_dist.sweep.section import SweepConfig

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
SHIPPED = sorted(CONFIGS.glob("*.yaml"))
SCHEMAS = {"cel.schema.json": Config, "sweep.schema.json": SweepConfig}


@pytest.fixture
def config(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text("data: {shards: s}\naugment: {profile: 0}\ntrain: {batch_size: 64}\n")
    return file


@pytest.mark.parametrize("name", SCHEMAS)
def test_the_shipped_schemas_are_those_of_the_code(name, tmp_path):
    out = tmp_path / name
    assert run(["config", "schema", "--out", str(out), *(["--sweep"] if "sweep" in name else [])]) == 0
    shipped = CONFIGS / name
    assert shipped.read_text() == out.read_text(), f"write it anew: cel config schema --out {shipped.name}"
    jsonschema.Draft202012Validator.check_schema(json.loads(out.read_text()))


@pytest.mark.parametrize("file", SHIPPED, ids=lambda file: file.name)
def test_shipped_configurations_fit_the_schema_that_they_name(file):
    first = file.read_text().splitlines()[0]
    assert first.startswith("# yaml-language-server: $schema=")
    schema = json.loads((file.parent / first.partition("=")[2]).read_text())
    jsonschema.Draft202012Validator(schema).validate(yaml.safe_load(file.read_text()))


@pytest.mark.parametrize(
    "tree",
    [
        {"trian": {}},
        {"train": {"bacth_size": 8}},
        {"train": {"batch_size": "many"}},
        {"train": {"batch_size": 1}},
        {"loss": {"pairs": "all"}},
        {"augment": {"noise_snr_db": [1]}},
    ],
)
def test_the_schema_refuses_what_loading_refuses(tree):
    assert not jsonschema.Draft202012Validator(json_schema(Config)).is_valid(tree)


def test_the_schema_takes_names_of_plugins_and_describes_every_setting():
    schema = json_schema(Config)
    jsonschema.Draft202012Validator(schema).validate({"loss": {"similarity": "mine"}, "encoder": {"name": "mine"}})
    for path in all_paths():
        section, name = path.split(".")
        part = schema["$defs"][schema["properties"][section]["$ref"].rpartition("/")[2]]
        assert part["properties"][name]["description"], path


def test_the_names_that_are_known_without_loading_torch_are_those_that_are_registered():
    assert sorted(config_sections.ENCODERS) == encoder_names()
    assert tuple(SIMILARITIES) == config_sections.SIMILARITIES


def test_show_prints_what_loads_again_to_the_same(config, capsys, tmp_path):
    assert run(["config", "show", str(config), "optim.lr=0.5"]) == 0
    text = capsys.readouterr().out
    assert "  lr: 0.5  # default: 0.001\n" in text
    assert text.count("# default") == 4
    shown = tmp_path / "shown.yaml"
    shown.write_text(text)
    assert load_config(shown) == load_config(config, ["optim.lr=0.5"])
    assert run(["config", "show", str(config), "optim.lr=0.5", "--changed-only"]) == 0
    text = capsys.readouterr().out
    assert set(yaml.safe_load(text)) == {"data", "augment", "train", "optim"}
    shown.write_text(text)
    assert load_config(shown) == load_config(config, ["optim.lr=0.5"])


def test_show_as_json(config, capsys):
    assert run(["config", "show", str(config), "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["config"]["train"]["batch_size"] == 64
    assert result["changed"]["train.batch_size"] == {"value": 64, "default": 200}
    assert set(result["changed"]) == {"data.shards", "augment.profile", "train.batch_size"}


def test_a_sweep_is_shown_and_its_settings_validated(capsys):
    sweep = str(CONFIGS / "sweep_cel.yaml")
    assert run(["config", "show", sweep]) == 0
    assert "loss.lambda_u" in yaml.safe_load(capsys.readouterr().out)["sweep"]["space"]
    assert run(["config", "validate", sweep, "--settings-only"]) == 0
    assert run(["config", "validate", sweep, "--settings-only", "sweep.space.loss.t.log_uniform=[0,1]"]) == 2
    assert "log_uniform" in capsys.readouterr().err


def test_validate_looks_at_what_is_named(small_corpus, tmp_path, capsys):
    config = write_config(small_corpus, tmp_path)
    assert run(["config", "validate", str(config), "--nproc", "2"]) == 0
    assert capsys.readouterr().out.count("\n") == 1
    assert not (tmp_path / "run").exists()
    assert run(["config", "validate", str(config), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["ok"] is True
    for override, message in (
        ("data.bank=nowhere", "nowhere"),
        ("encoder.name=tdn", "did you mean 'tdnn'"),
        ("train.batch_size=7", "batch_size"),
        ("data.shards=absent", "absent"),
        ("train.epocs=1", "train.epochs"),
    ):
        assert run(["config", "validate", str(config), "--nproc", "2", override]) == 2, override
        err = capsys.readouterr().err
        assert message in err
        assert err.count("\n") == 1
    assert run(["config", "validate", str(config), "data.shards=absent", "--settings-only"]) == 0


def test_diff_tells_as_diff_does(config, tmp_path, capsys):
    folder = tmp_path / "run"
    folder.mkdir()
    shutil.copy(config, folder / "config.yaml")
    assert run(["config", "diff", str(config), str(folder)]) == 0
    assert capsys.readouterr().out == ""
    (folder / "config.yaml").write_text("data: {shards: s, workers: 2}\naugment: {profile: 0}\n")
    assert run(["config", "diff", str(config), str(folder)]) == 1
    assert capsys.readouterr().out == "data.workers\tnull\t2\ntrain.batch_size\t64\t200\n"
    assert run(["config", "diff", str(config), str(folder), "--json"]) == 1
    told = json.loads(capsys.readouterr().out)
    assert told == {"same": False, "differing": {"data.workers": [None, 2], "train.batch_size": [64, 200]}}
    assert run(["config", "diff", str(config), str(tmp_path / "absent")]) == 2
    assert run(["config", "diff", str(config), str(tmp_path)]) == 2


def complete(line: str) -> list[str]:
    """What a real bash offers for a line that ends at the cursor, through the script that `cel` gives it."""
    script = f"""
eval "$(_CEL_COMPLETE=source_bash cel)"
COMP_LINE={line!r}; COMP_POINT=${{#COMP_LINE}}
COMP_WORDS=({bash_words(line)}); COMP_CWORD=$((${{#COMP_WORDS[@]}} - 1))
$(complete -p cel | sed 's/.*-F \\([^ ]*\\).*/\\1/') cel "${{COMP_WORDS[-1]}}"
printf '%s\\n' "${{COMPREPLY[@]}}"
"""
    folder = os.path.dirname(sys.executable)
    environment = {**ENVIRONMENT, "PATH": f"{folder}:{os.environ['PATH']}", "SHELL": "/bin/bash"}
    done = subprocess.run(["bash", "-c", script], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def bash_words(line: str) -> str:
    """As bash cuts a line: at blanks, and at `=`, which is a word of its own."""
    words = line.replace("=", " = ").split()
    return " ".join(f"'{word}'" for word in [*words, *([""] if line.endswith(" ") else [])])


@pytest.mark.parametrize(
    ("line", "offered"),
    [
        ("cel train c.yaml encoder.name=ec", ["ecapa_tdnn_1024", "ecapa_tdnn_512"]),
        ("cel train c.yaml encoder.p", ["encoder.pooling=default", "encoder.pooling=tap"]),
        ("cel config show c.yaml loss.pairs=", ["pon", "apn", "an"]),
        ("cel config validate c.yaml train.batch", ["train.batch_size=200"]),
        ("cel sweep c.yaml data.sh", ["data.shards=", "data.short="]),
        ("cel prepare x --recipe lib", ["librispeech"]),
        ("cel conf", ["config"]),
        ("cel config di", ["diff"]),
    ],
)
def test_bash_completes(line, offered):
    if shutil.which("cel", path=os.path.dirname(sys.executable)) is None:
        pytest.skip("the script cel is not installed")
    found = complete(line)
    assert found[: len(offered)] == offered


def test_completion_loads_no_torch():
    environment = {**ENVIRONMENT, "_CEL_COMPLETE": "complete_bash", "COMP_WORDS": "cel train c.yaml loss.pairs = a"}
    environment["COMP_CWORD"] = "5"
    command = [sys.executable, "-X", "importtime", *CEL[1:]]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.stdout.split() == ["apn", "an"]
    loaded = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines() if line.startswith("import time")}
    assert "cel_dist.config" in loaded
    assert not loaded & {"torch", "ray", "mlflow", "deepspeed"}
