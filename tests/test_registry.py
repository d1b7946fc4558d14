"""`cel models` against a database in a file: what becomes of models, and what versions carry."""

import io
import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cel_dist.back_end import BackEnd
from cel_dist.cli.app import run
from cel_dist.config_file import parse_config
from cel_dist.data.audio import encode_audio
from cel_dist.description import (
    Calibration,
    EncoderDescription,
    MeasuredOn,
    ModelDescription,
    Provenance,
)
from cel_dist.encoders import build_encoder
from cel_dist.errors import CelError
from cel_dist.model import SpeakerModel, load_model
from cel_dist.model_card import model_card, shortened
from cel_dist.tracking import Tracker, fetch_model
from cel_dist.tracking.connection import connect
from cel_dist.tracking.registration import register_model

DIMENSION = 16
Cel = Callable[..., tuple[int, str, str]]


@pytest.fixture
def cel(capsys: pytest.CaptureFixture[str]) -> Cel:
    # As in a process of its own, where nobody else has imported MLflow before and left it louder.
    logging.getLogger("mlflow").setLevel(logging.WARNING)

    def call(*arguments: object) -> tuple[int, str, str]:
        code = run(["models", *map(str, arguments)])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


def told(result: tuple[int, str, str]) -> dict[str, Any]:
    code, out, err = result
    assert code == 0, err
    return json.loads(out)


def refused(result: tuple[int, str, str], code: int = 2) -> str:
    assert (result[0], result[1]) == (code, ""), result
    assert result[2].startswith("error: ")
    assert result[2].count("\n") == 1
    return result[2]


def write_model(folder: Path, seed: int) -> SpeakerModel:
    torch.manual_seed(seed)
    config = parse_config({"data": {"shards": "s"}, "augment": {"profile": 0}, "optim": {"lr": seed / 100}}, "test")
    training = Provenance(
        config=config.model_dump(mode="json"),
        step=10 * seed,
        metrics={"eer": 0.1 * seed, "min_dcf": 0.5},
        intervals={"eer": (0.05 * seed, 0.15 * seed), "min_dcf": (0.4, 0.6)},
        measured_on=MeasuredOn(trials="val.txt", trials_sha256="ab12", num_trials=40, speakers=5, replicates=1000),
        data_sha256={"shards": "cd34"},
        code="git:0123abcd",
    )
    encoder = EncoderDescription(name="fast_resnet34", embedding_dim=DIMENSION)
    description = ModelDescription(encoder=encoder, training=training, threshold=-0.5)
    description.calibration = Calibration(slope=2.0, offset=1.0, trials="val.txt")
    model = SpeakerModel(build_encoder("fast_resnet34", DIMENSION), description)
    model.save(folder)
    return model


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models `good` and `poor`, recordings in `audio`, and `trials.txt`, on which `good` makes no error."""
    folder = tmp_path_factory.mktemp("place")
    good, _ = write_model(folder / "good", 1), write_model(folder / "poor", 2)
    (folder / "audio").mkdir()
    generator = np.random.default_rng(0)
    names = [f"{number}.wav" for number in range(5)]
    for name in names:
        wave = (3000 * generator.standard_normal(4800)).astype(np.int16)
        (folder / "audio" / name).write_bytes(encode_audio(wave, "wav"))
    rows = good.embed([folder / "audio" / name for name in names])
    pairs = [(float(rows[a] @ rows[b]), names[a], names[b]) for a in range(5) for b in range(a)]
    pairs.sort(reverse=True)
    lines = [f"{int(place < 5)} {one} {other}\n" for place, (_, one, other) in enumerate(pairs)]
    (folder / "trials.txt").write_text("".join(lines))
    return folder


@pytest.fixture(scope="module")
def empty(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A database in which nothing is registered; to make its tables takes seconds, a copy does not."""
    file = tmp_path_factory.mktemp("empty") / "mlflow.db"
    assert connect(f"sqlite:///{file}").search_registered_models() == []
    return file


@pytest.fixture
def registry(empty: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A database in which nothing is registered; it is the default one."""
    uri = f"sqlite:///{shutil.copy(empty, tmp_path)}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    return uri


@pytest.fixture(scope="module")
def filled(place: Path, empty: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A database with version 1 (good, champion) and 2 (poor) of `cel`; for tests that only read it."""
    uri = f"sqlite:///{shutil.copy(empty, tmp_path_factory.mktemp('filled'))}"
    assert register_model(place / "good", "cel", uri) == "models:/cel/1"
    assert register_model(place / "poor", "cel", uri) == "models:/cel/2"
    return uri


def test_versions_are_listed_and_shown_with_what_is_known_of_them(cel: Cel, filled: str) -> None:
    where = ("--tracking-uri", filled)
    newest, first = told(cel("list", *where, "--json"))["versions"]
    assert (newest["uri"], newest["aliases"]) == ("models:/cel/2", [])
    assert (first["uri"], first["aliases"], first["run_id"]) == ("models:/cel/1", ["champion"], None)
    assert (
        first["tags"].items()
        >= {
            "cel.encoder": "fast_resnet34",
            "cel.eer": "0.1",
            "cel.eer_interval": "0.05 0.15",
            "cel.calibrated_on": "val.txt",
            "cel.shards_sha256": "cd34",
            "cel.code": "git:0123abcd",
        }.items()
    )
    _, table, _ = cel("list", *where)
    assert "champion  fast_resnet34 16  10.00%  5.00% to 15.00%" in table
    by_name, by_alias = (told(cel("show", name, *where, "--json")) for name in ("cel", "models:/cel@champion"))
    assert by_name == by_alias
    assert by_name["description"]["training"]["config"]["optim"]["lr"] == 0.01
    _, shown, _ = cel("show", "cel/2", *where)
    for part in ("# cel", "EER 20.00 % (10.00 to 30.00)", "sha256 cd34", "git:0123abcd", "optim.lr=0.02", "-0.5000"):
        assert part in shown
    # The stored model has the card, too.
    card = fetch_model("models:/cel/2", filled) / "model_card.md"
    assert "optim.lr=0.02" in card.read_text()


def test_a_long_card_fits_into_mlflow(place: Path) -> None:
    description = load_model(place / "good").description
    card = model_card(description, "cel")
    cut = shortened(card, 600)
    assert len(cut) <= 600
    assert card.startswith(cut[: cut.rindex("\n... (")])
    assert shortened(card, len(card)) == card


def test_an_alias_moves_only_to_a_better_model_if_that_is_demanded(cel: Cel, registry: str, place: Path) -> None:
    demand = ("--if-better-on", place / "trials.txt", "--root", place / "audio", "--json")
    # Nobody to compare with.
    for version, name in enumerate(("poor", "good", "poor"), start=1):
        assert told(cel("register", place / name, "--name", "cel", "--json"))["version"] == version
    assert told(cel("promote", "cel", 1, "--alias", "next", *demand))["former"] is None
    done = told(cel("promote", "cel", 2, *demand))
    assert (done["former"], done["eer"]) == (1, 0.0)
    assert done["former_eer"] > 0
    message = refused(cel("promote", "cel", 3, *demand), code=1)
    assert f"an EER of {done['former_eer']:.2%}" in message
    assert "of 0.00%: 'champion' stays with version 2" in message
    # One that is as good is not better; one that is the champion remains it.
    assert told(cel("register", place / "good", "--name", "cel", "--json"))["version"] == 4
    refused(cel("promote", "cel", 4, *demand), code=1)
    assert told(cel("promote", "cel", 2, *demand))["former"] == 2
    assert told(cel("show", "cel@champion", "--json"))["version"] == 2
    assert told(cel("promote", "cel", 3, "--json"))["former"] == 2
    assert told(cel("show", "cel", "--json"))["aliases"] == ["champion"]
    assert "belong together" in refused(cel("promote", "cel", 1, "--if-better-on", place / "trials.txt"))
    assert "it has [1, 2, 3, 4]" in refused(cel("promote", "cel", 9))


class Terminal(io.StringIO):
    """Standard input with somebody at it."""

    def isatty(self) -> bool:
        return True


def test_a_version_that_holds_an_alias_is_deleted_only_by_force(
    cel: Cel, registry: str, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for _ in range(2):
        register_model(place / "good", "cel")
    assert "add --yes" in refused(cel("delete", "cel", 2))
    for said, code in (("n\n", 1), ("y\n", 0)):
        monkeypatch.setattr("sys.stdin", Terminal(said))
        done = cel("delete", "cel", 2, "--json")
        assert (done[0], "Delete models:/cel/2 of 20" in done[2]) == (code, True)
    assert json.loads(done[1])["versions_left"] == [1]
    monkeypatch.undo()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", registry)
    register_model(place / "good", "cel")
    assert "models:/cel/1 is 'champion'" in refused(cel("delete", "cel", 1, "--yes"))
    gone = told(cel("delete", "cel", 1, "--yes", "--force", "--json"))
    assert (gone["deleted"], gone["versions_left"]) == ("models:/cel/1", [3])
    # The stored model is still there, and can come back.
    assert told(cel("register", gone["stored_model"], "--name", "cel", "--json"))["version"] == 4
    assert told(cel("delete", "cel", 4, "--yes", "--json"))["versions_left"] == [3]
    _, text, _ = cel("delete", "cel", 3, "--yes")
    assert "'cel' is gone, too" in text
    assert told(cel("list", "--json"))["versions"] == []
    assert "there is no model 'cel'" in refused(cel("delete", "cel", 3, "--yes"))


def test_a_model_is_pulled_whole_or_not_at_all(
    cel: Cel, registry: str, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    register_model(place / "good", "cel")
    told(cel("pull", "models:/cel@champion", "--out", tmp_path / "out", "--json"))
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    wave = np.random.default_rng(3).normal(0, 0.1, 8000).astype(np.float32)
    np.testing.assert_array_equal(load_model(tmp_path / "out").embed(wave), load_model(place / "good").embed(wave))
    assert (tmp_path / "out" / "model.json").read_bytes() == (place / "good" / "model.json").read_bytes()
    where = ("--tracking-uri", registry)
    # A second time it takes the place of the first, and of nothing else.
    told(cel("pull", "models:/cel/1", "--out", tmp_path / "out", *where, "--json"))
    assert "other files" in refused(cel("pull", "models:/cel/1", "--out", tmp_path, *where))
    assert "no version 7" in refused(cel("pull", "models:/cel/7", "--out", tmp_path / "new", *where))
    stored = fetch_model("models:/cel/1", registry) / "encoder.safetensors"
    stored.write_bytes(stored.read_bytes()[:1000])
    assert "damaged" in refused(cel("pull", "models:/cel/1", "--out", tmp_path / "new", *where))
    assert not [path for path in tmp_path.iterdir() if "new" in path.name]


def test_two_models_are_compared_wherever_they_are(cel: Cel, filled: str, place: Path, tmp_path: Path) -> None:
    where = ("--tracking-uri", filled, "--json")
    found = told(cel("diff", "models:/cel/1", place / "poor", *where))
    assert set(found["differing"]) == {
        "training.config.optim.lr",
        "training.step",
        "training.metrics.eer",
        "training.intervals.eer",
    }
    assert found["differing"]["training.config.optim.lr"] == [0.01, 0.02]
    assert not found["same_weights"]
    assert told(cel("diff", "models:/cel/2", place / "poor", *where)) == {
        "a": "models:/cel/2",
        "b": str(place / "poor"),
        "differing": {},
        "same_weights": True,
        "same_back_end": True,
    }
    shutil.copytree(place / "poor", tmp_path / "copy")
    tree = json.loads((tmp_path / "copy" / "model.json").read_text())
    (tmp_path / "copy" / "model.json").write_text(json.dumps({**tree, "threshold": -0.25, "scoring": "cosine"}))
    _, text, _ = cel("diff", place / "poor", tmp_path / "copy")
    assert "threshold: -0.5 | -0.25\n" in text
    assert "scoring: negative_euclidean | cosine\n" in text
    assert text.endswith("the weights are the same\n")
    # Calibrated with a cohort, it is the same encoder.
    model = load_model(place / "poor")
    cohort = model.embed([place / "audio" / f"{number}.wav" for number in range(3)])
    calibration = Calibration(slope=1.0, offset=0.0)
    model.calibrate(0.0, calibration, BackEnd.fit(cohort, score_norm="s"), "cohort").save(tmp_path / "normed")
    found = told(cel("diff", place / "poor", tmp_path / "normed", "--json"))
    assert (found["same_weights"], found["same_back_end"]) == (True, False)
    assert found["differing"]["back_end.score_norm"] == [None, "s"]


def test_a_model_of_a_run_belongs_to_the_run(registry: str, place: Path, tmp_path: Path) -> None:
    from mlflow import MlflowClient

    run_dir = tmp_path / "run"
    shutil.copytree(place / "good", run_dir / "checkpoints" / "step-1" / "model")
    settings = {"data": {"shards": "s"}, "augment": {"profile": 0}, "tracking": {"uri": registry}}
    Tracker.start(parse_config(settings, "test"), run_dir).finish()
    register_model(run_dir / "checkpoints" / "step-1", "cel")
    client = MlflowClient(tracking_uri=registry, registry_uri=registry)
    run_id = (run_dir / "mlflow_run_id.txt").read_text().strip()
    assert client.get_model_version("cel", "1").run_id == run_id
    assert len(client.get_run(run_id).outputs.model_outputs) == 1


def test_a_version_that_mlflow_copied_to_another_name_is_a_model_too(
    cel: Cel, filled: str, place: Path, tmp_path: Path
) -> None:
    uri = f"sqlite:///{shutil.copy(filled.removeprefix('sqlite:///'), tmp_path / 'copied.db')}"
    client = connect(uri)
    for source, name in (("models:/cel/2", "staging"), ("models:/staging/1", "production")):
        client.copy_model_version(source, name)
    stored = told(cel("show", "cel/2", "--tracking-uri", uri, "--json"))["model_id"]
    told(cel("delete", "staging", 1, "--yes", "--tracking-uri", uri, "--json"))
    assert told(cel("show", "production/1", "--tracking-uri", uri, "--json"))["model_id"] == stored
    assert fetch_model("models:/production/1", uri) == fetch_model("models:/cel/2", uri)


@pytest.mark.parametrize("name", ["a/b", "a:b", "a@b", " ", "", " a", "a\nb", "..", "n" * 251])
def test_a_name_that_no_address_could_hold_is_refused(place: Path, tmp_path: Path, name: str) -> None:
    with pytest.raises(CelError, match="cannot be a model's name"):
        register_model(place / "good", name, f"sqlite:///{tmp_path}/mlflow.db")
    assert list(tmp_path.iterdir()) == []


def test_a_run_is_not_begun_that_could_not_register_its_model() -> None:
    settings = {"data": {"shards": "s"}, "augment": {"profile": 0}, "tracking": {"register_as": "team/cel"}}
    with pytest.raises(CelError, match=r"tracking.register_as.*without '/'"):
        parse_config(settings, "test")


def test_names_may_have_blanks_quotes_and_letters_of_any_language(cel: Cel, filled: str, tmp_path: Path) -> None:
    uri = f"sqlite:///{shutil.copy(filled.removeprefix('sqlite:///'), tmp_path / 'names.db')}"
    names = ['it\'s "mine"', "größer als 話者", "a%2Fb"]
    for name in names:
        assert register_model("models:/cel/1", name, uri) == f"models:/{name}/1"
        assert fetch_model(f"models:/{name}@champion", uri) == fetch_model("models:/cel/1", uri)
    listed = told(cel("list", "--tracking-uri", uri, "--json"))["versions"]
    assert {version["name"] for version in listed} == {"cel", *names}
    assert told(cel("delete", names[0], 1, "--yes", "--force", "--tracking-uri", uri, "--json"))["versions_left"] == []


def test_what_a_promotion_cannot_use_is_refused_before_anything_is_measured(cel: Cel, filled: str, place: Path) -> None:
    where = ("--tracking-uri", filled)
    demand = ("--if-better-on", place / "trials.txt", "--root", place / "audio")
    for alias in ("latest", "v2", "a b", "a/b", ""):
        assert "cannot be an alias" in refused(cel("promote", "cel", 2, "--alias", alias, *demand, *where))
    nowhere = ("--if-better-on", place / "nowhere.txt", "--root", place / "audio")
    assert "nowhere.txt" in refused(cel("promote", "cel", 2, "--alias", "unheld", *nowhere, *where))
    assert told(cel("show", "cel/2", *where, "--json"))["aliases"] == []


def test_what_cannot_be_stored_leaves_nothing(
    registry: str, place: Path, monkeypatch: pytest.MonkeyPatch, cel: Cel
) -> None:
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException

    def full(self: MlflowClient, model_id: str, folder: str) -> None:
        raise MlflowException("the disk is full")

    with monkeypatch.context() as broken:
        broken.setattr(MlflowClient, "log_model_artifacts", full)
        assert "the disk is full" in refused(cel("register", place / "good", "--name", "cel"), code=1)
    client = MlflowClient(tracking_uri=registry, registry_uri=registry)
    assert list(client.search_registered_models()) == []
    assert list(client.search_logged_models([client.get_experiment_by_name("cel").experiment_id])) == []


@pytest.mark.parametrize(
    ("uri", "message"),
    [
        ("postgresql://me:secret@127.0.0.1:first/cel", "that is no address (Port could not be cast"),
        ("http://[::1", "that is no address (Invalid IPv6 URL)"),
        ("oracle://me:secret@127.0.0.1/cel", "unsupported URI 'oracle://me:***@127.0.0.1/cel'"),
    ],
)
def test_an_address_that_is_none_is_named_without_its_password(cel: Cel, uri: str, message: str) -> None:
    line = refused(cel("list", "--tracking-uri", uri))
    assert message in line
    assert "secret" not in line


def test_what_the_store_of_the_files_raises_is_one_line(
    cel: Cel, registry: str, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("boto3")
    monkeypatch.setenv("AWS_PROFILE", "nobody")
    client = connect(registry)
    client.create_experiment("s3", artifact_location="s3://bucket/models")
    register = ("register", place / "good", "--name", "cel", "--experiment", "s3")
    assert "cannot register" in refused(cel(*register), code=1)
    stored = client.create_logged_model(client.get_experiment_by_name("s3").experiment_id, name="model")
    line = refused(cel("pull", f"models:/{stored.model_id}", "--out", place / "never"), code=1)
    assert f"cannot download models:/{stored.model_id}" in line
    assert "The config profile (nobody) could not be found" in line
    assert not (place / "never").exists()


def test_listing_makes_no_database(cel: Cel, tmp_path: Path) -> None:
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    for arguments in (("list",), ("show", "cel"), ("delete", "cel", 1, "--yes"), ("promote", "cel", 1)):
        assert "there is no database" in refused(cel(*arguments, "--tracking-uri", uri))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("command", ["list", "show", "register", "promote", "pull", "diff", "delete"])
def test_help_ends_with_an_example(cel: Cel, command: str) -> None:
    code, out, _ = cel(command, "--help")
    assert code == 0
    assert f"Example: cel models {command}" in " ".join(out.split())
