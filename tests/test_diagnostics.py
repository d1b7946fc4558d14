"""Errors by group, the geometry of embeddings, and the table of metadata, on lists small enough to work out by hand."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from cel_dist.errors import CelError
from cel_dist.evaluation import Diagnostics, Trials, diagnose
from cel_dist.evaluation.geometry import measure_geometry
from cel_dist.evaluation.groups import Group, errors_by_group
from cel_dist.evaluation.metadata import Metadata
from cel_dist.evaluation.plots import group_errors

HEADER = "path\tspeaker\tsession\tgender\tduration\tage\n"
# Two women, two men; the second utterance of each is of another session, `b2` and `d2` are short.
TABLE = (
    HEADER
    + "a1\ta\ts1\tf\t4\t30\n"
    + "a2\ta\ts2\tf\t5\t30\n"
    + "b1\tb\ts1\tfemale\t6\t12\n"
    + "b2\tb\ts1\tF\t1\t12\n"
    + "c1\tc\ts1\tm\t7\t50\n"
    + "c2\tc\ts2\tM\t8\t50\n"
    + "d1\td\ts1\tmale\t9\t9\n"
    + "d2\td\ts1\tm\t2\t9\n"
)
SCORED = (
    # target trials: women, then men
    (1, "a1", "a2", 0.9),
    (1, "b1", "b2", 0.3),
    (1, "c1", "c2", 0.8),
    (1, "d1", "d2", 0.7),
    # two women, two men, one of each
    (0, "a1", "b1", 0.4),
    (0, "a2", "b2", 0.2),
    (0, "c1", "d1", 0.6),
    (0, "c2", "d2", 0.1),
    (0, "a1", "c1", 0.5),
    (0, "b1", "d1", 0.0),
)


def listed(folder: Path, table: str = TABLE) -> tuple[Trials, Metadata, np.ndarray]:
    (folder / "trials.txt").write_text("".join(f"{label} {a} {b}\n" for label, a, b, _ in SCORED))
    (folder / "table.tsv").write_text(table)
    trials = Trials.read(folder / "trials.txt")
    return trials, Metadata.read(folder / "table.tsv", trials.files), np.array([score for *_, score in SCORED])


def by_label(groups: list[Group]) -> dict[str, tuple[int, int, float | None, float | None, float | None]]:
    return {
        group.label: (group.targets, group.non_targets, group.eer, group.false_rejects, group.false_accepts)
        for group in groups
    }


def test_every_group_has_its_own_trials_and_errors(tmp_path: Path) -> None:
    trials, metadata, scores = listed(tmp_path)
    groups, not_shown = errors_by_group(scores, trials, metadata, threshold=0.55, min_trials=1)
    assert not_shown == []
    assert by_label(groups) == {
        "all trials": (4, 6, pytest.approx(0.25), 0.25, pytest.approx(1 / 6)),
        # 0.9 and 0.3 against 0.4 and 0.2: one of each class on the wrong side at any threshold between.
        "sex: female": (2, 2, 0.5, 0.5, 0.0),
        "sex: male": (2, 2, 0.0, 0.0, 0.5),
        # All four targets against 0.5 and 0.0: between 0.5 and 0.7 one of the targets is rejected and nothing accepted.
        "sex: female and male": (4, 2, 0.25, 0.25, 0.0),
        # 0.3 and 0.7, then 0.9 and 0.8, each against all six non-targets.
        "same session": (2, 6, pytest.approx(0.5), 0.5, pytest.approx(1 / 6)),
        "different sessions": (2, 6, 0.0, 0.0, pytest.approx(1 / 6)),
        # Shorter sides: targets 4 1 7 2, non-targets 4 1 7 2 4 6; a third of the ten is up to 2 s, a third above 4 s.
        "shorter side: up to 2 s": (2, 2, 0.0, 0.5, 0.0),
        "shorter side: 2 to 4 s": (1, 2, 0.0, 0.0, 0.0),
        "shorter side: above 4 s": (1, 2, 0.0, 0.0, 0.5),
        "age: under 18": (2, 1, 0.0, 0.5, 0.0),
        "age: 18 and above": (2, 1, 0.0, 0.0, 0.0),
        "age: child and adult": (4, 4, 0.25, 0.25, 0.25),
    }


def test_groups_of_few_trials_have_counts_and_no_rates(tmp_path: Path) -> None:
    trials, metadata, scores = listed(tmp_path)
    groups, _ = errors_by_group(scores, trials, metadata, threshold=0.55, min_trials=3)
    found = by_label(groups)
    assert found["all trials"][2] is not None
    assert found["sex: female"] == (2, 2, None, None, None)
    # Enough targets for the one rate, not enough non-targets for the others.
    assert found["sex: female and male"] == (4, 2, None, 0.25, None)


def test_what_the_table_does_not_say_is_said_to_be_missing(tmp_path: Path) -> None:
    table = "".join("\t".join(line.split("\t")[:2]) + "\t?\n" for line in TABLE.splitlines()).replace("?", "sex", 1)
    trials, metadata, scores = listed(tmp_path, table)
    groups, not_shown = errors_by_group(scores, trials, metadata, threshold=0.55, min_trials=1)
    assert [group.label for group in groups] == ["all trials"]
    assert not_shown == [
        "errors by sex: no value of column 'sex' is known",
        "errors by session: the metadata has no column 'session'",
        "errors by seconds: the metadata has no column 'seconds'",
        "errors by age: the metadata has no column 'age'",
    ]


def test_trials_with_an_unknown_side_are_in_no_group(tmp_path: Path) -> None:
    trials, metadata, scores = listed(tmp_path, TABLE.replace("d2\td\ts1\tm\t2\t9", "d2\td\t\tunknown\t\t"))
    found = by_label(errors_by_group(scores, trials, metadata, threshold=0.55, min_trials=1)[0])
    assert found["sex: male"][:2] == (1, 1)
    assert found["same session"][:2] == (1, 6)
    assert sum(found[label][0] for label in found if label.startswith("shorter side")) == 3


# In degrees; the squared distance of two of them is 2 - 2 cos.
ANGLES = {"a1": 0, "a2": 60, "b1": 90, "b2": 90, "c1": 180, "c2": 240, "d1": 270, "d2": 270}


def on_circle(trials: Trials) -> np.ndarray:
    angles = np.radians([ANGLES[name] for name in trials.files])
    return np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)


def test_alignment_and_uniformity_are_those_of_all_pairs(tmp_path: Path) -> None:
    trials, metadata, _ = listed(tmp_path)
    rows = on_circle(trials)
    found = measure_geometry(rows, trials, metadata)
    # Squared distances of the four speakers' pairs: 1, 0, 1, 0; those of 1 are between sessions.
    assert (found.alignment_targets.mean, found.alignment_targets.pairs) == (pytest.approx(0.5, abs=1e-6), 4)
    assert found.alignment_speakers is not None
    assert (found.alignment_speakers.mean, found.alignment_speakers.pairs) == (pytest.approx(0.5, abs=1e-6), 4)
    assert found.alignment_within_sessions is not None
    assert (found.alignment_within_sessions.mean, found.alignment_within_sessions.pairs) == (
        pytest.approx(0, abs=1e-6),
        2,
    )
    assert found.alignment_between_sessions is not None
    assert (found.alignment_between_sessions.mean, found.alignment_between_sessions.pairs) == (
        pytest.approx(1, abs=1e-6),
        2,
    )
    pairs = [np.square(a - b).sum() for place, a in enumerate(rows) for b in rows[:place]]
    assert found.uniformity == pytest.approx(np.log(np.mean(np.exp(-2 * np.array(pairs)))), abs=1e-5)
    assert (found.utterances, found.dimensions, found.uniformity_utterances) == (8, 2, 8)


def test_alignment_counts_pairs_of_one_speaker_that_are_no_trials(tmp_path: Path) -> None:
    trials, _, _ = listed(tmp_path)
    (tmp_path / "list").write_text("".join(f"{name} {'one' if name < 'c' else 'two'}\n" for name in trials.files))
    found = measure_geometry(on_circle(trials), trials, Metadata.read(tmp_path / "list", trials.files))
    assert found.alignment_speakers is not None
    assert found.alignment_speakers.pairs == 12
    assert found.alignment_within_sessions is None


def test_uniformity_of_a_long_list_is_that_of_a_part_which_is_stated(tmp_path: Path) -> None:
    trials, _, _ = listed(tmp_path)
    rows = on_circle(trials)
    found = measure_geometry(rows, trials, max_rows=5)
    assert (found.utterances, found.uniformity_utterances) == (8, 5)
    assert found.uniformity == measure_geometry(rows, trials, max_rows=5).uniformity
    assert found.uniformity != measure_geometry(rows, trials).uniformity


def test_effective_rank_counts_the_dimensions_in_use() -> None:
    trials = Trials(["x", "y"], np.array([1, 0], np.int8), np.array([0, 0], np.int32), np.array([1, 1], np.int32))
    corners = np.concatenate([np.eye(4, 16), -np.eye(4, 16)]).astype(np.float32)
    spread = measure_geometry(corners, trials)
    assert (spread.effective_rank, spread.components) == (pytest.approx(4), 4)
    line = measure_geometry(corners[[0, 4]], trials)
    assert (line.effective_rank, line.components) == (pytest.approx(1), 1)
    assert measure_geometry(corners[[0, 0]], trials).components == 0


def test_windows_count_as_their_mean(tmp_path: Path) -> None:
    trials, _, _ = listed(tmp_path)
    rows = on_circle(trials)
    turn = np.array([[np.cos(0.1), -np.sin(0.1)], [np.sin(0.1), np.cos(0.1)]], np.float32)
    windows = np.stack([rows @ turn, rows @ turn.T], axis=1)
    assert measure_geometry(windows, trials).uniformity == pytest.approx(
        measure_geometry(rows, trials).uniformity, abs=1e-5
    )


@dataclass
class Scores:
    """What diagnostics need of an evaluation."""

    trials: Trials
    scores: np.ndarray
    embeddings: np.ndarray
    threshold: float = 0.55

    @property
    def compensated(self) -> np.ndarray:
        return self.scores


def test_diagnostics_are_the_same_after_writing_and_reading(tmp_path: Path) -> None:
    trials, metadata, scores = listed(tmp_path)
    diagnostics = diagnose(Scores(trials, scores, on_circle(trials)), metadata, min_trials=2)
    paths = diagnostics.write(tmp_path / "out")
    assert Diagnostics.load(paths["diagnostics_file"]) == diagnostics
    assert paths["diagnostics_picture"].read_bytes().startswith(b"\x89PNG")
    text = diagnostics.text()
    assert "sex: male                           2            2    0.00%" in text
    assert "too few: fewer than 2 trials of a class" in text
    assert "alignment between sessions" in text
    drawn = group_errors(diagnostics.groups, picture="svg").decode()
    assert "sex: female and male" in drawn
    assert "0.00%  (2 / 2)" in drawn
    paths["diagnostics_file"].write_text("{}")
    with pytest.raises(CelError, match=r"diagnostics\.json does not hold diagnostics \(groups: .*evaluate again"):
        Diagnostics.load(paths["diagnostics_file"])


def read_and_check(folder: Path, table: str) -> None:
    trials, metadata, _ = listed(folder, table)
    metadata.check(trials)


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ("", "is empty; write a header"),
        (TABLE.replace("b2\tb", "b3\tb"), "lacks 1 of the 8 utterances of the trials, the first is b2; write paths"),
        (TABLE + "a1\ta\ts9\tf\t4\t30\n", "line 10 of .* repeats a1 of line 2"),
        (TABLE.replace("\ts2\tf", "\ts2\tf\tx"), r"line 3 of .* has 7 columns and the header 6"),
        (TABLE.replace("\t5\t30", "\tlong\t30"), "line 3 of .*: 'long' in column 'seconds' is not a number"),
        (TABLE.replace("\t5\t30", "\t5\t-3"), "line 3 of .*: '-3' in column 'age' is not a number"),
        (TABLE.replace("session", "sex"), r"the header of .* has 'sex' \(or 'gender'\) twice"),
        ("path\tcolour\na1\tred\n", "has none of the columns speaker, session, sex, seconds, age"),
        ("path,speaker\na1,a\n", "line 1 of .* is not 'path speaker'; a table with other columns needs a header"),
        (TABLE.removeprefix(HEADER), "line 1 of .* is not 'path speaker'; a table with other columns needs a header"),
        (TABLE.replace("a2\ta\ts2\tf", "a2\ta\ts2\tm"), "contradicts 1 trials: a1 and a2 are a target trial, but have"),
        (TABLE.replace("b1\tb", "b1\ta"), "contradicts 1 trials: b1 and b2 are a target trial, but have speaker"),
    ],
)
def test_a_faulty_table_is_answered_in_one_line(table: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(CelError, match=message) as caught:
        read_and_check(tmp_path, table)
    assert "\n" not in str(caught.value)
    assert str(tmp_path / "table.tsv") in str(caught.value)


def test_one_speaker_in_a_non_target_trial_contradicts_the_list(tmp_path: Path) -> None:
    trials, metadata, _ = listed(tmp_path, TABLE.replace("d1\td", "d1\tc").replace("d2\td", "d2\tc"))
    with pytest.raises(CelError, match="contradicts 2 trials: c1 and d1 are a non-target trial, but have speaker 'c'"):
        metadata.check(trials)


@pytest.mark.parametrize(
    "content",
    [
        TABLE.replace("\n", "\r\n").encode(),
        b"\xef\xbb\xbf" + TABLE.encode(),
        TABLE.replace("\t", "  ").encode(),
        (TABLE + "\nother\tx\ts\tf\t3\t4\n").encode(),
    ],
    ids=["windows", "byte order mark", "blanks", "more rows"],
)
def test_a_table_reads_the_same_in_other_dress(content: bytes, tmp_path: Path) -> None:
    trials, metadata, scores = listed(tmp_path)
    expected = errors_by_group(scores, trials, metadata, 0.55, min_trials=1)
    (tmp_path / "table.tsv").write_bytes(content)
    assert errors_by_group(scores, trials, Metadata.read(tmp_path / "table.tsv", trials.files), 0.55, min_trials=1) == (
        expected
    )


def test_a_table_that_is_audio_or_absent_is_named(tmp_path: Path) -> None:
    (tmp_path / "audio").write_bytes(b"RIFF\xff\xfe")
    with pytest.raises(CelError, match="is not UTF-8 text"):
        Metadata.read(tmp_path / "audio", [])
    with pytest.raises(CelError, match=r"cannot read the metadata .*absent: No such file"):
        Metadata.read(tmp_path / "absent", [])
