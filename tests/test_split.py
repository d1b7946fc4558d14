import os
from pathlib import Path

import numpy as np
import pytest
from audio_tree import write_tree

from cel_dist.corpus.split import MAX_TRIALS, Split, split_by_speaker
from cel_dist.data.sources import read_list
from cel_dist.errors import CelError
from cel_dist.evaluation import Trials


def test_training_validation_and_test_share_no_speaker(tmp_path):
    audio = write_tree(tmp_path / "audio", speakers=8, utterances=3, seconds=(0.1, 0.2))
    split = split_by_speaker(audio, tmp_path / "lists")
    train = {path.split("/")[0] for path in split.train_list.read_text().split()}
    held_out = [
        {path.split("/")[0] for path in Trials.read(path).files}
        for path in (split.validation_trials, split.test_trials)
    ]
    assert len(train) + sum(map(len, held_out)) == len(train | held_out[0] | held_out[1]) == 8
    for trials in (split.validation_trials, split.test_trials):
        read = Trials.read(trials)
        same = [
            read.files[a].split("/")[0] == read.files[b].split("/")[0]
            for a, b in zip(read.enrol, read.test, strict=True)
        ]
        assert same == read.labels.astype(bool).tolist()
        assert 0 < sum(same) < len(same)


def test_targets_cross_sessions_where_there_are_two(tmp_path):
    for session in ("monday", "friday"):
        write_tree(tmp_path / session, speakers=8, utterances=2, seconds=(0.1, 0.2))
        for speaker in sorted((tmp_path / session).iterdir()):
            target = tmp_path / "audio" / speaker.name / session
            target.parent.mkdir(parents=True, exist_ok=True)
            speaker.rename(target)
    split = split_by_speaker(tmp_path / "audio", tmp_path / "lists")
    lines = [line.split() for line in split.test_trials.read_text().splitlines()]
    sessions = [(enrol.split("/")[1], test.split("/")[1]) for label, enrol, test in lines if label == "1"]
    assert sessions
    assert all(enrol != test for enrol, test in sessions)


def test_a_tree_with_too_few_speakers_is_refused(tmp_path):
    audio = write_tree(tmp_path / "audio", speakers=3, utterances=2, seconds=(0.1, 0.2))
    with pytest.raises(CelError, match="holds 3 speakers"):
        split_by_speaker(audio, tmp_path / "lists")


def touch_tree(folder: Path, counts: dict[str, int]) -> Path:
    """`folder/SPEAKER/NN.wav` without content: a split reads names only."""
    for speaker, count in counts.items():
        (folder / speaker).mkdir(parents=True)
        for number in range(count):
            (folder / speaker / f"{number:02d}.wav").touch()
    return folder


def pairs_of(split: Split) -> list[tuple[int, int]]:
    """Per list of trials, how many pairs of its utterances share a speaker and how many do not."""
    found = []
    for path in (split.validation_trials, split.test_trials):
        speakers = [name.split("/")[0] for name in Trials.read(path).files]
        same = sum(a == b for place, a in enumerate(speakers) for b in speakers[:place])
        found.append((same, len(speakers) * (len(speakers) - 1) // 2 - same))
    return found


@pytest.mark.parametrize("seed", range(5))
def test_speakers_with_unequal_numbers_of_utterances_give_what_trials_there_are(tmp_path, seed):
    counts = np.random.default_rng(seed).integers(4, 31, size=10).tolist()
    audio = touch_tree(tmp_path / "audio", {f"s{number}": count for number, count in enumerate(counts)})
    split = split_by_speaker(audio, tmp_path / "lists", seed)
    for path, pairs in zip((split.validation_trials, split.test_trials), pairs_of(split), strict=True):
        labels = Trials.read(path).labels
        assert (int((labels == 1).sum()), int((labels == 0).sum())) == tuple(min(MAX_TRIALS, count) for count in pairs)


def test_more_target_pairs_than_others_are_no_failure(tmp_path):
    audio = touch_tree(tmp_path / "audio", {**{f"a{number}": 30 for number in range(3)}, "b0": 2, "b1": 2, "b2": 2})
    assert any(same > other for same, other in pairs_of(split_by_speaker(audio, tmp_path / "lists")))


def test_blanks_and_number_signs_in_names_pass_through_the_lists(tmp_path):
    names = ["Ann Lee", "#1", " leading", "Bo\u2028", "Cé  cile", "plain"]
    audio = touch_tree(tmp_path / "audio", dict.fromkeys(names, 3))
    split = split_by_speaker(audio, tmp_path / "lists")
    listed = {*read_list(split.train_list, audio)}
    for trials in (split.validation_trials, split.test_trials):
        files = Trials.read(trials).files
        assert all((audio / name).is_file() for name in files)
        listed |= {os.path.normpath(name) for name in files}
    assert listed == {f"{name}/{number:02d}.wav" for name in names for number in range(3)}


def test_names_that_no_list_can_hold_are_left_out_and_counted(tmp_path, caplog):
    odd = ["tab\there", "line\nbreak", os.fsdecode(b"caf\xe9")]
    audio = touch_tree(tmp_path / "audio", {**{f"s{number}": 3 for number in range(6)}, **dict.fromkeys(odd, 3)})
    split = split_by_speaker(audio, tmp_path / "lists")
    assert "left out 9 of 27 files" in caplog.text
    assert "caf" in caplog.text
    held_out = {name for path in (split.validation_trials, split.test_trials) for name in Trials.read(path).files}
    assert len(read_list(split.train_list, audio)) + len(held_out) == 18
