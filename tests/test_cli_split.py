"""`cel corpus split` and `cel corpus trials`: from recordings to lists, by one command."""

import json
from collections import Counter
from pathlib import Path

import pytest
from commands import only_error

from cel_dist.cli.app import run
from cel_dist.data.sources import read_list
from cel_dist.evaluation import Trials


@pytest.fixture
def recordings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Eight speakers with four files each, two a session; names only, which is all that the lists are about."""
    monkeypatch.chdir(tmp_path)
    for speaker in range(8):
        for session in ("a", "b"):
            folder = tmp_path / "my recordings" / f"speaker {speaker}" / session
            folder.mkdir(parents=True)
            for number in range(2):
                (folder / f"{number}.wav").touch()
    return Path("my recordings")


def told(capsys: pytest.CaptureFixture[str], *arguments: object) -> dict:
    code = run([*map(str, arguments), "--json"])
    captured = capsys.readouterr()
    assert code == 0, captured.err
    return json.loads(captured.out)


def speakers_of(paths: list[str], place: int = 0) -> set[str]:
    return {path.split("/")[place] for path in paths}


def test_a_split_has_disjoint_speakers_and_says_what_comes_next(recordings, capsys) -> None:
    made = told(capsys, "corpus", "split", recordings, "--out", "lists")
    train = read_list(Path(made["train_list"]), recordings)
    held_out = [Trials.read(Path(made[name])) for name in ("validation_trials", "test_trials")]
    speakers = [speakers_of(train), *(speakers_of(list(trials.files)) for trials in held_out)]
    assert [len(found) for found in speakers] == [4, 2, 2]
    assert len(set.union(*speakers)) == 8
    assert made["train_files"] == len(train) == 16
    assert [made["num_validation_trials"], made["num_test_trials"]] == [len(trials.labels) for trials in held_out]
    assert made["next"] == [
        "cel prepare 'my recordings' --list lists/train.txt --out shards",
        "cel train CONFIG data.shards=shards eval.trials=lists/validation_trials.txt eval.root='my recordings'",
        "cel evaluate --model RUN --trials lists/test_trials.txt --root 'my recordings'",
    ]
    first = Path("lists/test_trials.txt").read_bytes()
    told(capsys, "corpus", "split", recordings, "--out", "lists")
    assert Path("lists/test_trials.txt").read_bytes() == first
    told(capsys, "corpus", "split", recordings, "--out", "lists", "--seed", 3)
    assert Path("lists/test_trials.txt").read_bytes() != first


def test_all_speakers_can_be_held_out_where_something_else_is_trained_on(recordings, capsys) -> None:
    made = told(capsys, "corpus", "split", recordings, "--out", "lists", "--no-training")
    held_out = [Trials.read(Path(made[name])) for name in ("validation_trials", "test_trials")]
    speakers = [speakers_of(list(trials.files)) for trials in held_out]
    assert [len(found) for found in speakers] == [4, 4]
    assert len(set.union(*speakers)) == 8
    assert "train_list" not in made
    assert not Path("lists/train.txt").exists()
    assert made["next"][0].startswith("cel train CONFIG data.shards=SHARDS ")


def test_labels_take_the_place_of_folders(recordings, capsys) -> None:
    files = sorted(path.relative_to(recordings).as_posix() for path in recordings.rglob("*.wav"))
    # Two folders are one speaker each time, so that there are four of them.
    speaker_of = {name: f"person{int(name[8]) % 4}" for name in files}
    Path("labels").write_text("".join(f"{name} {speaker}\n" for name, speaker in speaker_of.items()))
    error = refused(capsys, "corpus", "split", recordings, "--out", "lists", "--labels", "labels")
    assert "holds 4 speakers" in error
    told(capsys, "corpus", "trials", recordings, "--out", "by_label", "--labels", "labels")
    trials = Trials.read(Path("by_label"))
    for label, enrol, test in zip(trials.labels, trials.enrol, trials.test, strict=True):
        assert label == (speaker_of[trials.files[enrol]] == speaker_of[trials.files[test]])
    Path("labels").write_text("speaker 0/a/0.wav x\n")
    assert "31 of the 32 files have no speaker" in refused(
        capsys, "corpus", "trials", recordings, "--out", "t", "--labels", "labels"
    )
    assert not Path("t").exists()


def test_trials_are_as_many_as_asked_for_and_cross_sessions(recordings, capsys) -> None:
    made = told(capsys, "corpus", "trials", recordings, "--out", "t/trials.txt", "--targets", 20, "--nontargets", 30)
    trials = Trials.read(Path("t/trials.txt"))
    assert Counter(trials.labels.tolist()) == {1: 20, 0: 30}
    assert (made["targets"], made["nontargets"]) == (20, 30)
    pairs = [
        (trials.files[a].split("/"), trials.files[b].split("/")) for a, b in zip(trials.enrol, trials.test, strict=True)
    ]
    assert all((enrol[0] == test[0]) == label for label, (enrol, test) in zip(trials.labels, pairs, strict=True))
    assert all(enrol[1] != test[1] for enrol, test in pairs)
    # Eight speakers with two files in either session.
    made = told(capsys, "corpus", "trials", recordings, "--out", "all.txt")
    assert made["targets"] == 8 * 2 * 2
    error = refused(capsys, "corpus", "trials", recordings, "--out", "more", "--targets", 33)
    assert "33 target trials asked for, but there are 32" in error


def test_files_without_a_speaker_train_and_are_not_tested(recordings, capsys) -> None:
    for number in range(3):
        (recordings / f"loose{number}.wav").touch()
    made = told(capsys, "corpus", "split", recordings, "--out", "lists")
    assert made["train_files"] == 16 + 3
    told(capsys, "corpus", "trials", recordings, "--out", "trials")
    assert not any(name.startswith("loose") for name in Trials.read(Path("trials")).files)


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    code = run([*map(str, arguments)])
    captured = capsys.readouterr()
    return only_error((code, captured.out, captured.err), 2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("split", "absent", "--out", "lists"), "there is no folder absent"),
        (("split", "my recordings", "--out", "file"), "is a file"),
        (("split", "my recordings", "--out", "lists", "--labels", "absent"), "cannot read absent"),
        (("split", "my recordings", "--out", "lists", "--seed", "-1"), "--seed"),
        (("split", "my recordings/speaker 0", "--out", "lists"), "holds 2 speakers"),
        (("split", "empty", "--out", "lists"), "no audio below empty"),
        (("trials", "my recordings", "--out", "my recordings"), "is a folder"),
        (("trials", "my recordings/speaker 0/a", "--out", "t"), "holds 0 speakers"),
        (("trials", "my recordings", "--out", "t", "--targets", "0"), "--targets"),
        (("trials", "my recordings", "--out", "file/t"), "is a file"),
    ],
)
def test_what_cannot_be_divided_is_one_line_and_writes_nothing(recordings, capsys, arguments, message) -> None:
    Path("file").touch()
    Path("empty").mkdir()
    assert message in refused(capsys, "corpus", *arguments)
    assert sorted(path.name for path in Path().iterdir()) == ["empty", "file", "my recordings"]
