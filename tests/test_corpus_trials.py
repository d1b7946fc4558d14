"""Trials drawn from any list of utterances."""

from collections import Counter
from pathlib import Path

import pytest

from cel_dist.corpus.trials import Trial, Utterance, count_target_pairs, draw_trials, write_trials
from cel_dist.errors import CelError


def utterances_of(counts: dict[str, list[int]]) -> list[Utterance]:
    return [
        Utterance(f"{speaker}/{session}/{number}.wav", speaker, f"s{session}")
        for speaker, sessions in counts.items()
        for session, count in enumerate(sessions)
        for number in range(count)
    ]


@pytest.mark.parametrize("num_nontarget", [30, 170])
def test_trials_are_distinct_and_never_a_file_against_itself(num_nontarget: int) -> None:
    listed = utterances_of({"a": [4, 3], "b": [2, 5], "c": [6], "d": [1, 1]})
    of = {utterance.path: utterance for utterance in listed}
    trials = draw_trials(listed, num_target=23, num_nontarget=num_nontarget, seed=4, cross_session=False)
    assert Counter(trial.label for trial in trials) == {1: 23, 0: num_nontarget}
    assert len({frozenset((trial.enrol, trial.test)) for trial in trials}) == len(trials)
    for label, enrol, test in trials:
        assert enrol != test
        assert (of[enrol].speaker == of[test].speaker) == bool(label)


def test_cross_session_trials_can_be_exhausted_and_no_more() -> None:
    listed = utterances_of({"a": [4, 3], "b": [2, 5], "c": [6]})
    possible = 4 * 3 + 2 * 5
    assert count_target_pairs(listed) == possible
    of = {utterance.path: utterance for utterance in listed}
    trials = draw_trials(listed, num_target=possible, num_nontarget=40, seed=0)
    assert all(of[trial.enrol].session != of[trial.test].session for trial in trials)
    with pytest.raises(CelError, match=f"there are {possible} pairs"):
        draw_trials(listed, num_target=possible + 1, num_nontarget=0, seed=0)
    with pytest.raises(CelError, match="non-target trials asked for"):
        draw_trials(listed, num_target=0, num_nontarget=10_000, seed=0)


def test_target_trials_are_spread_evenly_over_speakers() -> None:
    listed = utterances_of({"many": [50, 50], "few": [3, 3], "some": [10, 10]})
    trials = draw_trials(listed, num_target=24, num_nontarget=0, seed=0)
    assert Counter(trial.enrol.split("/")[0] for trial in trials) == {"many": 8, "few": 8, "some": 8}


def test_speakers_with_one_session_each_still_get_nontarget_trials() -> None:
    listed = utterances_of({"a": [4], "b": [4]})
    trials = draw_trials(listed, num_target=6, num_nontarget=16, seed=0, cross_session=False)
    assert len(trials) == 22
    assert len(draw_trials(listed, num_target=0, num_nontarget=16, seed=0)) == 16
    with pytest.raises(CelError, match="different sessions"):
        draw_trials(listed, num_target=1, num_nontarget=0, seed=0)


def test_trials_depend_on_the_seed_and_on_nothing_else() -> None:
    listed = utterances_of({"a": [5, 5], "b": [5, 5]})
    first, again, other = (draw_trials(listed, num_target=9, num_nontarget=9, seed=seed) for seed in (1, 1, 2))
    assert first == again
    assert first != other


def test_same_path_twice_is_refused() -> None:
    listed = utterances_of({"a": [2, 2], "b": [2, 2]})
    with pytest.raises(CelError, match="names a file twice"):
        draw_trials([*listed, listed[0]], num_target=1, num_nontarget=1, seed=0)


def test_trials_file_has_label_enrolment_and_test(tmp_path: Path) -> None:
    write_trials(tmp_path / "t.txt", [Trial(1, "a/1.wav", "a/2.wav"), Trial(0, "a/1.wav", "b/1.wav")])
    assert (tmp_path / "t.txt").read_text() == "1 a/1.wav a/2.wav\n0 a/1.wav b/1.wav\n"
    assert [path.name for path in tmp_path.iterdir()] == ["t.txt"]
