import re
from pathlib import Path

import pytest
import yaml

from cel_dist.config_file import dump_config, load_config, parse_config
from cel_dist.errors import CelError
from cel_dist.sweep.settings import load_sweep

PROJECT = Path(__file__).resolve().parent.parent
MINIMAL = {"data": {"shards": "s"}, "augment": {"profile": 0}}


def write(path: Path, tree: object) -> Path:
    path.write_text(yaml.safe_dump(tree))
    return path


@pytest.mark.parametrize("path", sorted((PROJECT / "configs").glob("*.yaml")), ids=lambda path: path.name)
def test_shipped_configurations_are_valid(path):
    base = load_sweep(path).base if path.name.startswith("sweep") else load_config(path)
    assert base.data.shards


def test_overrides_win_over_the_file_and_are_typed(tmp_path):
    file = write(tmp_path / "c.yaml", {**MINIMAL, "train": {"batch_size": 10}})
    config = load_config(file, ["train.batch_size=64", "optim.lr=2e-4", "encoder.init=models:/cel@champion"])
    assert (config.train.batch_size, config.optim.lr, config.encoder.init) == (64, 2e-4, "models:/cel@champion")


def test_the_dumped_configuration_reads_back_equal(tmp_path):
    config = parse_config({**MINIMAL, "augment": {"profile": 0, "noise_snr_db": [1, 2]}}, "test")
    file = tmp_path / "dump.yaml"
    file.write_text(dump_config(config))
    assert load_config(file) == config


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"trian": {"epochs": 1}}, "unknown key 'trian'; did you mean 'train'?"),
        ({"train": {"bacth_size": 1}}, "unknown key 'train.bacth_size'; did you mean 'train.batch_size'?"),
        ({"train": {"batch_size": "many"}}, "'train.batch_size': .*not 'many'"),
        ({"train": {"batch_size": 1}}, "'train.batch_size': .*greater than or equal to 2, not 1"),
        (
            {"loss": {"similarity": "angular"}},
            "'loss.similarity': there is nothing called 'angular'; did you mean 'angular_",
        ),
        ({"augment": {"profile": 3}}, "augment.profile=3 needs data.bank"),
        ({"augment": {"profile": 0, "noise_snr_db": [5, 1]}}, "augment.noise_snr_db"),
        ({"loss": {"lambda_s": 0, "lambda_u": 0}}, "nothing is learned"),
        ({"optim": {"lr": 1e-4, "min_lr": 1e-3}}, "optim.min_lr"),
        ({"eval": {"trials": "t.txt"}}, "eval.trials and eval.root"),
        ({"eval": {"metadata": "t.tsv"}}, "eval.metadata describes the utterances of eval.trials"),
        ({"data": {}}, "'data.shards' is required"),
        ({"optim": {"lr": float("inf")}}, "'optim.lr': .*finite number, not inf"),
        ({"optim": {"weight_decay": float("inf")}}, "'optim.weight_decay': .*finite"),
        ({"loss": {"t": float("inf")}}, "'loss.t': .*finite"),
        ({"loss": {"lambda_s": float("nan")}}, "'loss.lambda_s': .*finite"),
        ({"augment": {"profile": 0, "noise_snr_db": [float("nan"), 1]}}, "'augment.noise_snr_db.0': .*finite"),
        ({"augment": {"profile": 0, "noise_snr_db": [0, 1e9]}}, "'augment.noise_snr_db.1': .*equal to 100"),
        ({"augment": {"profile": False}}, "'augment.profile': .*a number, not False"),
        ({"train": {"max_steps": True}}, "'train.max_steps': input should be a number, not True"),
        ({"optim": {"lr": True}}, "'optim.lr': input should be a number, not True"),
        ({"encoder": {"embedding_dim": 10**9}}, "'encoder.embedding_dim': .*equal to 65536"),
        ({"run": {"name": [1]}}, "'run.name': .*valid string, not"),
    ],
)
def test_bad_settings_are_named_with_their_path_in_one_line(tmp_path, change, message):
    with pytest.raises(CelError) as failure:
        load_config(write(tmp_path / "bad.yaml", {**MINIMAL, **change}))
    assert re.search(message, str(failure.value))
    assert "\n" not in str(failure.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"a: [", "not valid YAML"),
        (b"train: {epochs: 0b_}", "not valid YAML"),
        (b"train: {epochs: !!bool 7}", "not valid YAML"),
        (b"- 1\n", "holds a list"),
        (b"", "'data' is required"),
        (b"run: {name: caf\xe9}", "not UTF-8"),
        (b"train:\n  epochs: 1\nrun: {}\ntrain:\n  max_steps: 1\n", "'train' is set in line 1 and again in line 4"),
        (b"train:\n  epochs: 1\n  epochs: 2\n", "'train.epochs' is set in line 2 and again in line 3"),
        (b"train: &a {epochs: *a}", "'train.epochs'"),
    ],
)
def test_files_that_are_no_configuration(tmp_path, content, message):
    file = tmp_path / "c.yaml"
    file.write_bytes(content)
    with pytest.raises(CelError, match=message):
        load_config(file)


def test_a_missing_file_and_a_malformed_override(tmp_path):
    with pytest.raises(CelError, match="cannot read the configuration"):
        load_config(tmp_path / "absent.yaml")
    file = write(tmp_path / "c.yaml", MINIMAL)
    with pytest.raises(CelError, match="key=value"):
        load_config(file, ["train.batch_size"])
    with pytest.raises(CelError, match="is a value, not a section"):
        load_config(file, ["data.shards.deep=1"])


@pytest.mark.parametrize("name", ["123", "007", "1.10", "yes", "2024-01-31", "2024-99-99", "0b_", "1:30"])
def test_a_name_is_taken_as_it_is_written(tmp_path, name):
    file = tmp_path / "c.yaml"
    file.write_text(f"data: {{shards: {name}}}\naugment: {{profile: 0}}\nrun: {{name: {name}}}\n")
    config = load_config(file)
    assert (config.run.name, str(config.data.shards)) == (name, name)
    assert load_config(file, [f"run.name={name}", f"encoder.init={name}"]).encoder.init == name
    file.write_text(dump_config(config))
    assert load_config(file) == config
    assert load_config(file, ["run.name=null"]).run.name is None
