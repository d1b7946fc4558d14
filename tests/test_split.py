import pytest
from audio_tree import write_tree

from cel_dist.corpus.split import split_by_speaker
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
