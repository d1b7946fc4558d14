"""Enrolled people: the store as several processes meet it, and the commands around it."""

import json
import multiprocessing
import os
import shutil
import signal
import sqlite3
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from service import small_model, speech, wav

from cel_dist.cli.app import run
from cel_dist.errors import CelError, RunError
from cel_dist.model import Calibration, SpeakerModel, mean_embedding
from cel_dist.service import Speakers, SpeakerStore, fingerprint
from cel_dist.service.store import NameFaultError, StoreFaultError, StoreFullError, UnknownPersonError, checked_name

Cel = Callable[..., Any]
FORK = multiprocessing.get_context("fork")


@pytest.fixture(scope="module")
def model() -> SpeakerModel:
    return small_model()


@pytest.fixture
def folder(tmp_path: Path, model: SpeakerModel, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder: a model in `model`; Ann and Bob, three recordings each."""
    monkeypatch.chdir(tmp_path)
    model.save("model")
    for speaker, name in enumerate(("ann", "bob")):
        for number in range(3):
            Path(f"{name}{number}.wav").write_bytes(wav(speaker, seed=number))
    return tmp_path


@pytest.fixture
def cel(capsys: pytest.CaptureFixture[str]) -> Cel:
    """Runs a command: its JSON object, or its error."""

    def call(*arguments: object) -> Any:
        code = run([*map(str, arguments), "--json"])
        captured = capsys.readouterr()
        if code:
            assert captured.out == ""
            assert captured.err.count("\n") == 1
            assert code == 2
            return captured.err
        return json.loads(captured.out)

    return call


def rows(number: int, seed: int = 0) -> np.ndarray:
    drawn = np.random.default_rng(seed).standard_normal((number, 32))
    return (drawn / np.linalg.norm(drawn, axis=1, keepdims=True)).astype(np.float32)


def new_store(path: Path) -> SpeakerStore:
    return SpeakerStore(path, "a" * 64, 32, create=True)


STORE = ("--store", "people.db")
WITH = ("--model", "model", *STORE)


def test_people_are_enrolled_compared_listed_and_removed(cel: Cel, folder: Path, model: SpeakerModel) -> None:
    assert cel("enrol", "Ann", "ann0.wav", "ann1.wav", *WITH) == {
        "name": "Ann",
        "recordings": 2,
        "seconds": 3.0,
        "store": "people.db",
    }
    cel("enrol", "Bob", "bob0.wav", *WITH)
    ann = mean_embedding(model.embed(["ann0.wav", "ann1.wav"]))
    expected = model.score(ann, "ann2.wav")

    verified = cel("verify", *WITH, "Ann", "ann2.wav")
    assert verified["score"] == pytest.approx(expected, abs=1e-6)
    assert verified["same"] is (expected >= -0.05)
    assert set(verified) == {"score", "probability", "same", "threshold"}
    # The same three files without a store.
    assert cel("verify", "--model", "model", "ann0.wav", "ann1.wav", "ann2.wav") == pytest.approx(verified)

    found = cel("identify", "bob0.wav", *WITH)
    assert [candidate["name"] for candidate in found["candidates"]] == ["Bob", "Ann"]
    assert found["candidates"][0]["score"] == pytest.approx(0, abs=1e-3)
    assert found["identified"] == "Bob"
    assert len(cel("identify", "bob0.wav", *WITH, "--top", 1)["candidates"]) == 1

    # More of somebody who is there.
    assert cel("enrol", "Ann", "ann2.wav", *WITH)["recordings"] == 3
    people = [{"name": "Ann", "recordings": 3, "seconds": 4.5}, {"name": "Bob", "recordings": 1, "seconds": 1.5}]
    assert cel("speakers", "list", *STORE) == {"store": "people.db", "speakers": people}
    assert cel("speakers", "remove", "Ann", *STORE) == {"name": "Ann", "removed": 3}
    assert [person["name"] for person in cel("speakers", "list", *STORE)["speakers"]] == ["Bob"]


def test_nobody_is_identified_below_the_threshold_or_without_one(cel: Cel, folder: Path, model: SpeakerModel) -> None:
    cel("enrol", "Ann", "ann0.wav", *WITH)
    calibration = model.description.calibration
    assert calibration is not None
    model.calibrate(-1e-6, calibration).save("strict")
    strict = cel("identify", "bob0.wav", "--model", "strict", *STORE)
    assert (strict["identified"], strict["candidates"][0]["same"]) == (None, False)
    plain = SpeakerModel(model.encoder, model.description.model_copy(update={"threshold": None, "calibration": None}))
    plain.save("plain")
    undecided = cel("identify", "bob0.wav", "--model", "plain", *STORE)
    assert (undecided["identified"], undecided["candidates"][0]["same"]) == (None, None)


def test_durations_of_people_reach_a_calibration_that_asks_for_them(folder: Path, model: SpeakerModel) -> None:
    calibration = Calibration(
        slope=20.0, offset=1.0, quality="duration", duration_slope=3.0, reference_seconds=2.0, trials="list"
    )
    timed = model.calibrate(-0.05, calibration)
    speakers = Speakers(timed, Path("people.db"), create=True)
    speakers.enrol("Ann", ["ann0.wav", "ann1.wav"])
    # Two seconds against three: the test is the shorter one. Against one recording it is not.
    test = speech(0, 2.0, seed=9)
    assert speakers.verify("Ann", test).threshold == pytest.approx(-0.05)
    assert speakers.verify("Ann", test) == timed.verify(["ann0.wav", "ann1.wav"], test)
    [candidate] = speakers.identify(test).candidates
    assert candidate.threshold == pytest.approx(-0.05)
    shorter = timed.verify("ann0.wav", test)
    assert shorter.threshold is not None
    assert shorter.threshold > -0.05


def test_embeddings_of_another_model_are_refused_and_those_of_a_new_calibration_are_not(
    cel: Cel, folder: Path, model: SpeakerModel
) -> None:
    cel("enrol", "Ann", "ann0.wav", *WITH)
    small_model(seed=1).save("other")
    for command in (("enrol", "Bob", "bob0.wav"), ("identify", "bob0.wav"), ("verify", "Ann", "bob0.wav")):
        refused = cel(*command, "--model", "other", *STORE)
        assert "the embeddings in people.db are of another model" in refused
    assert [person["name"] for person in cel("speakers", "list", *STORE)["speakers"]] == ["Ann"]
    # Nor is a store that holds nothing of any model, as a first enrolment that fails leaves it.
    assert "cannot be read as audio" in cel("enrol", "Bob", "people.db", "--model", "other", "--store", "new.db")
    assert cel("enrol", "Ann", "ann0.wav", "--model", "model", "--store", "new.db")["recordings"] == 1
    again = model.calibrate(-0.5, Calibration(slope=1.0, offset=0.0))
    assert fingerprint(again) == fingerprint(model)
    again.save("again")
    assert cel("verify", "Ann", "ann1.wav", "--model", "again", *STORE)["threshold"] == -0.5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("enrol", "../Ann", "ann0.wav", *WITH), "'../Ann' is no name to enrol under"),
        (("enrol", "Cid", "absent.wav", *WITH), "there is no audio file absent.wav"),
        (("enrol", "Cid", "ann0.wav", "--model", "model", "--store", "model"), "model is a folder; give a file"),
        (("enrol", "Cid", "ann0.wav", "--model", "model", "--store", "ann1.wav"), "ann1.wav is no store"),
        (("enrol", "Cid", "ann0.wav", "--model", "absent", *STORE), "there is no model at absent"),
        (("identify", "ann0.wav", "--model", "model", "--store", "absent.db"), "there is no store absent.db"),
        (("identify", "ann0.wav", *WITH, "--top", "0"), "ask for at least one candidate"),
        (("verify", "Cid", "ann0.wav", *WITH), "nobody called 'Cid' is enrolled"),
        (("verify", "Ann", "ann0.wav", "ann1.wav", *WITH), "give one name and one file"),
        (("speakers", "remove", "\udcff", *STORE), "nobody called '\\udcff' is enrolled"),
        (
            ("enrol", "Cid", "ann0.wav", "--model", "model", "--store", "no/where.db"),
            "cannot open the store no/where.db",
        ),
        (("enrol", "Cid", "ann0.wav", "--model", "model", "--store", "x" * 300), "File name too long"),
        (("speakers", "list", "--store", "x" * 300), "File name too long"),
        (("speakers", "list", "--store", "absent.db"), "there is no store absent.db"),
        (("speakers", "remove", "Cid", *STORE), "nobody called 'Cid' is enrolled"),
    ],
)
def test_bad_input_is_one_line_and_leaves_the_store_as_it_was(
    cel: Cel, folder: Path, model: SpeakerModel, arguments: tuple[str, ...], message: str
) -> None:
    new = SpeakerStore(Path("people.db"), fingerprint(model), 32, create=True)
    new.add("Ann", rows(1), [1.0])
    before = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    assert message in cel(*arguments)
    assert {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()} == before


def test_a_store_is_private_and_forgets_what_is_removed(tmp_path: Path) -> None:
    path = tmp_path / "people.db"
    store = new_store(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    ann, bob = rows(2)
    store.add("Ann", ann[None], [1.0])
    store.add("Bob", bob[None], [1.0])
    assert ann.tobytes() in path.read_bytes()
    store.remove("Ann")
    left = path.read_bytes()
    assert ann.tobytes() not in left
    assert b"Ann" not in left
    assert bob.tobytes() in left
    assert list(tmp_path.iterdir()) == [path]


def test_a_person_is_the_mean_of_all_recordings_and_is_read_anew_when_another_process_adds_one(tmp_path: Path) -> None:
    mine, other = new_store(tmp_path / "people.db"), new_store(tmp_path / "people.db")
    some = rows(3)
    mine.add("Ann", some[:2], [1.0, 2.0])
    np.testing.assert_array_equal(mine.gallery().embeddings, mean_embedding(some[:2])[None])
    assert mine.gallery() is mine.gallery()
    other.add("Ann", some[2:], [3.0])
    gallery = mine.gallery()
    np.testing.assert_array_equal(gallery.embeddings, mean_embedding(some)[None])
    assert (gallery.names, gallery.seconds.tolist(), gallery.recordings.tolist()) == (("Ann",), [6.0], [3])
    # Another store in its place.
    (tmp_path / "people.db").unlink()
    new_store(tmp_path / "people.db").add("Bob", some[:1], [1.0])
    assert mine.gallery().names == ("Bob",)


def test_names_are_one_text_however_unicode_writes_them(tmp_path: Path) -> None:
    store = new_store(tmp_path / "people.db")
    store.add("Jose\u0301 O'Neil", rows(1), [1.0])
    store.add("Jos\u00e9 O'Neil", rows(1), [1.0])
    assert [person.recordings for person in store.people()] == [2]
    assert store.remove("Jose\u0301 O'Neil") == 2


@pytest.mark.parametrize(
    "name", ["", " ", " Ann", "Ann ", ".", "..", "a/b", "..\\a", "a\nb", "a\0b", "\u202ea", "x" * 101]
)
def test_what_is_no_name(name: str) -> None:
    with pytest.raises(NameFaultError, match="is no name to enrol under"):
        checked_name(name)


def test_a_full_store_takes_nothing_of_a_request_that_goes_beyond(tmp_path: Path) -> None:
    store = new_store(tmp_path / "people.db")
    store.add("Ann", rows(2), [1.0, 1.0], max_recordings=3)
    with pytest.raises(StoreFullError, match="holds 2 of at most 3"):
        store.add("Bob", rows(2), [1.0, 1.0], max_recordings=3)
    assert [person.name for person in store.people()] == ["Ann"]
    with pytest.raises(UnknownPersonError):
        store.gallery().place("Bob")


def _add_some(path: Path, name: str) -> None:
    for seed in range(10):
        new_store(path).add(name, rows(1, seed), [1.0])


def test_processes_that_make_and_fill_a_store_at_once_lose_nothing(tmp_path: Path) -> None:
    path = tmp_path / "people.db"
    processes = [FORK.Process(target=_add_some, args=(path, name)) for name in "abcd"]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0, 0, 0]
    assert [(person.name, person.recordings) for person in new_store(path).people()] == [(name, 10) for name in "abcd"]


def _add_and_wait(path: Path, said: Any) -> None:
    with new_store(path)._open(writing=True) as database:
        database.execute("INSERT INTO recordings (name, embedding, seconds) VALUES ('Eve', x'00', 1)")
        said.send("written")
        signal.pause()


def test_a_process_that_is_killed_while_it_writes_leaves_the_store_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "people.db"
    new_store(path).add("Ann", rows(1), [1.0])
    here, there = FORK.Pipe()
    process = FORK.Process(target=_add_and_wait, args=(path, there))
    process.start()
    assert here.recv() == "written"
    assert [person.name for person in new_store(path).people()] == ["Ann"]
    os.kill(process.pid or 0, signal.SIGKILL)
    process.join()
    new_store(path).add("Bob", rows(1), [1.0])
    assert [person.name for person in new_store(path).people()] == ["Ann", "Bob"]


def test_files_that_are_no_store_and_damaged_ones_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "people.db"
    for content in (b"no database at all" * 100, b"SQLite format 3\0"):
        path.write_bytes(content)
        with pytest.raises(StoreFaultError, match="is no store of enrolled people"):
            new_store(path)
    path.unlink()
    with sqlite3.connect(path) as database:
        database.execute("CREATE TABLE meta (key, value)")
    with pytest.raises(StoreFaultError, match="is no store of enrolled people"):
        new_store(path)
    path.unlink()
    store = new_store(path)
    with pytest.raises(CelError, match="embeddings of shape"):
        store.add("Ann", np.ones((1, 16), np.float32), [1.0])
    with sqlite3.connect(path) as database:
        database.execute("INSERT INTO recordings (name, embedding, seconds) VALUES ('Eve', x'00', 1)")
        database.execute("UPDATE meta SET value = '7' WHERE key = 'changes'")
    with pytest.raises(StoreFaultError, match="damaged"):
        store.gallery()
    # The first bytes of a store, as a copy that was cut off leaves them.
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(StoreFaultError, match="damaged"):
        new_store(path).people()


def test_a_disk_that_is_full_leaves_the_store_as_it_was(tmp_path: Path, mount_disk: Callable[[int], Path]) -> None:
    path = mount_disk(64) / "people.db"
    new_store(path).add("Ann", rows(1), [1.0])
    before = path.read_bytes()
    with pytest.raises(RunError, match="check space"):
        new_store(path).add("Bob", rows(1000), [1.0] * 1000)
    assert path.read_bytes() == before
    shutil.copy(path, tmp_path / "copy.db")
    assert [person.name for person in SpeakerStore(tmp_path / "copy.db").people()] == ["Ann"]


@pytest.mark.parametrize("command", ["enrol", "identify", "speakers list", "speakers remove", "serve"])
def test_help_ends_with_an_example(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run([*command.split(), "--help"]) == 0
    assert f"Example: cel {command} " in capsys.readouterr().out
