"""Scores of embeddings, and their norms, against numbers made by hand."""

import logging
from pathlib import Path

import numpy as np
import pytest

from cel_dist.back_end import BackEnd, cohort_scores, pair_scores
from cel_dist.errors import CelError
from cel_dist.evaluation.cohort import speaker_means
from cel_dist.evaluation.lists import UtteranceList, speakers_of_files

ENROL, TEST = np.array([0, 0, 1]), np.array([1, 2, 2])


def unit(*angles: float) -> np.ndarray:
    """Embeddings [N, 2] at angles in degrees: their cosines are those of the differences."""
    radians = np.deg2rad(angles)
    return np.stack([np.cos(radians), np.sin(radians)], axis=1).astype(np.float32)


def cosine(degrees: float) -> float:
    return float(np.cos(np.deg2rad(degrees)))


def test_distance_and_cosine_of_the_same_pairs():
    rows = unit(0, 60, 180)
    distances = BackEnd().score(rows, ENROL, TEST)
    np.testing.assert_allclose(distances, [-1, -2, -np.sqrt(3)], rtol=1e-6)
    cosines = BackEnd(scoring="cosine").score(rows, ENROL, TEST)
    np.testing.assert_allclose(cosines, [0.5, -1, -0.5], rtol=1e-6)


@pytest.mark.parametrize("scoring", ["negative_euclidean", "cosine"])
def test_embeddings_that_nearly_coincide_keep_their_order(scoring):
    generator = np.random.default_rng(0)
    start = generator.standard_normal(512)
    step = generator.standard_normal(512)
    step -= start * (step @ start) / (start @ start)
    # Each pair is 1 % further apart than the one before, all of them closer than products in float32 can tell.
    exact = start + np.outer(1e-4 * 1.01 ** np.arange(50), step)
    rows = np.concatenate([[start], exact])
    rows = (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)
    scores = pair_scores(rows, np.zeros(50, int), np.arange(1, 51), scoring)
    wide = rows.astype(np.float64)
    squares = np.square(wide[0] - wide[1:]).sum(axis=1)
    if scoring == "cosine":
        np.testing.assert_allclose(1 - scores, squares / 2, rtol=1e-6)
    else:
        np.testing.assert_allclose(scores, -np.sqrt(squares), rtol=1e-6)
    assert (np.diff(scores) < 0).all()


def test_windows_have_the_mean_cosine_of_all_pairs_of_them():
    rows = np.stack([unit(0, 30), unit(90, 50)])
    expected = np.mean([cosine(angle) for angle in (90, 50, 60, 20)])
    scores = BackEnd(scoring="cosine").score(rows, np.array([0]), np.array([1]))
    np.testing.assert_allclose(scores, [expected], rtol=1e-6)


@pytest.mark.parametrize(
    ("norm", "sides"), [("z", ("enrol",)), ("t", ("test",)), ("s", ("enrol", "test")), ("as", ("enrol", "test"))]
)
def test_norms_by_hand(norm, sides):
    # Enrolment at 0, test at 40 degrees; the cohort at 60, 90, 180 and 10.
    rows, cohort = unit(0, 40), unit(60, 90, 180, 10)
    against = {"enrol": [cosine(a) for a in (60, 90, 180, 10)], "test": [cosine(a) for a in (20, 50, 140, 30)]}
    expected = []
    for side in sides:
        # The two that are most alike: of the enrolment those at 60 and 10 degrees, of the test those at 60 and 10.
        values = sorted(against[side])[-2:] if norm == "as" else against[side]
        middle = sum(values) / len(values)
        deviation = np.sqrt(sum((value - middle) ** 2 for value in values) / len(values))
        expected.append((cosine(40) - middle) / deviation)
    back_end = BackEnd(scoring="cosine", score_norm=norm, cohort=cohort, top_n=2)
    score = back_end.score(rows, np.array([0]), np.array([1]))
    np.testing.assert_allclose(score, [np.mean(expected)], rtol=1e-5)


def test_adaptive_norm_with_the_whole_cohort_is_the_plain_one_and_says_so(caplog):
    generator = np.random.default_rng(0)
    rows = unit(*generator.uniform(0, 360, 3))
    cohort = unit(*generator.uniform(0, 360, 7))
    plain = BackEnd(score_norm="s", cohort=cohort).score(rows, ENROL, TEST)
    with caplog.at_level(logging.WARNING):
        adaptive = BackEnd(score_norm="as", cohort=cohort, top_n=8).score(rows, ENROL, TEST)
    np.testing.assert_allclose(adaptive, plain, rtol=1e-12)
    assert "7 entries, fewer than top_n=8" in caplog.text
    narrow = BackEnd(score_norm="as", cohort=cohort, top_n=3).score(rows, ENROL, TEST)
    assert not np.allclose(narrow, plain)


def test_adaptive_norm_takes_the_most_similar_of_a_large_cohort():
    generator = np.random.default_rng(0)
    rows, cohort = (unit(*generator.uniform(0, 360, count)) for count in (3, 400))
    nearest = np.sort(cohort_scores(rows, cohort, "cosine"), axis=1)[:, -7:]
    plain = pair_scores(rows, ENROL, TEST, "cosine")
    expected = [(plain - nearest[side].mean(axis=1)) / nearest[side].std(axis=1) for side in (ENROL, TEST)]
    back_end = BackEnd(scoring="cosine", score_norm="as", cohort=cohort, top_n=7)
    np.testing.assert_allclose(back_end.score(rows, ENROL, TEST), np.mean(expected, axis=0), rtol=1e-9)


@pytest.mark.parametrize("windows", [1, 3])
def test_norms_of_embeddings_that_nearly_coincide_do_not_depend_on_the_rounding_of_lengths(windows):
    generator = np.random.default_rng(0)
    exact = generator.standard_normal(64) + 3e-4 * generator.standard_normal((12, windows, 64))
    exact /= np.linalg.norm(exact, axis=-1, keepdims=True)
    rows = exact.astype(np.float32)
    places = (np.array([0]), np.array([1]))
    wide = rows / np.linalg.norm(rows.astype(np.float64), axis=-1, keepdims=True)
    cosines = np.einsum("nwd,mvd->nm", wide, wide) / windows**2
    sides = [(cosines[0, 1] - cosines[side, 2:].mean()) / cosines[side, 2:].std() for side in (0, 1)]
    given = rows if windows > 1 else rows[:, 0]
    back_end = BackEnd(scoring="cosine", score_norm="s", cohort=given[2:])
    np.testing.assert_allclose(back_end.score(given, *places), [np.mean(sides)], rtol=2e-3)


def test_z_and_t_change_places_with_the_sides():
    rows, cohort = unit(0, 35, 200), unit(10, 100, 250)
    forth = BackEnd(score_norm="z", cohort=cohort).score(rows, ENROL, TEST)
    back = BackEnd(score_norm="t", cohort=cohort).score(rows, TEST, ENROL)
    np.testing.assert_array_equal(forth, back)


def test_blocks_of_the_cohort_change_nothing(monkeypatch):
    generator = np.random.default_rng(0)
    rows = generator.standard_normal((9, 2, 4)).astype(np.float32)
    rows /= np.linalg.norm(rows, axis=-1, keepdims=True)
    back_end = BackEnd(score_norm="as", cohort=rows[4:], top_n=3)
    whole = back_end.score(rows, ENROL, TEST)
    monkeypatch.setattr("cel_dist.back_end._BLOCK_FLOATS", 1)
    np.testing.assert_allclose(back_end.score(rows, ENROL, TEST), whole, rtol=1e-12)


def test_scores_against_a_cohort_are_those_of_pairs():
    generator = np.random.default_rng(0)
    rows = generator.standard_normal((5, 3, 8)).astype(np.float32)
    rows /= np.linalg.norm(rows, axis=-1, keepdims=True)
    first, second = np.repeat([0, 1], 3), np.tile([2, 3, 4], 2)
    for shaped in (rows, rows[:, 0]):
        for scoring in ("negative_euclidean", "cosine"):
            expected = pair_scores(shaped, first, second, scoring).reshape(2, 3)
            np.testing.assert_allclose(cohort_scores(shaped[:2], shaped[2:], scoring), expected, rtol=1e-6)


def test_the_mean_of_the_cohort_is_taken_off_both_sides():
    # The cohort's mean is (0.5, 0.5): of the rows remain (0.5, -0.5), (-0.5, 0.5) and (-1.5, -0.5).
    back_end = BackEnd.fit(unit(0, 90), scoring="cosine", subtract_mean=True)
    scores = back_end.score(unit(0, 90, 180), ENROL, TEST)
    np.testing.assert_allclose(scores, [-1, -1 / np.sqrt(5), 1 / np.sqrt(5)], rtol=1e-6)
    normed = BackEnd.fit(unit(0, 90, 200), subtract_mean=True, score_norm="s")
    np.testing.assert_allclose(np.linalg.norm(normed.cohort, axis=1), 1, rtol=1e-6)
    assert not np.allclose(normed.cohort, unit(0, 90, 200))


def test_norms_without_a_cohort_or_with_one_that_says_nothing_are_refused():
    with pytest.raises(CelError, match="needs a cohort of at least two"):
        BackEnd(score_norm="z", cohort=unit(0))
    with pytest.raises(CelError, match="top_n=1"):
        BackEnd(top_n=1)
    with pytest.raises(CelError, match="the same score against all of the cohort"):
        BackEnd(score_norm="s", cohort=unit(5, 5, 5)).score(unit(0, 1, 2), ENROL, TEST)


def test_speakers_of_a_cohort_become_their_mean_directions():
    means = speaker_means(unit(0, 60, 200), ["b", "b", "a"])
    np.testing.assert_allclose(means, unit(200, 30), atol=1e-6)


def written(path: Path, content: str) -> Path:
    path.write_text(content)
    return path


def test_lists_have_one_or_two_columns_and_each_utterance_once(tmp_path):
    plain = UtteranceList.read(written(tmp_path / "a", "\ufeffa/1.wav\r\n\r\nb/1.wav\r\na/1.wav\r\n"))
    assert (plain.files, plain.speakers) == (["a/1.wav", "b/1.wav"], None)
    tabbed = UtteranceList.read(written(tmp_path / "b", "Ann Lee/1.wav\tann\nb/1.wav\tbob\n"))
    assert (tabbed.files, tabbed.speakers) == (["Ann Lee/1.wav", "b/1.wav"], ["ann", "bob"])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "is empty"),
        ("a b\nc\n", "line 2: 1 columns instead of 'path speaker'"),
        ("a\nc d\n", "line 2: 2 columns instead of 'path'"),
        ("a b c\n", "line 1: 3 columns"),
        ("a b\na c\n", "line 2: a is of c, before it was of b"),
    ],
)
def test_faulty_lists_are_refused_with_file_and_line(tmp_path, content, message):
    path = written(tmp_path / "list.txt", content)
    with pytest.raises(CelError, match=message) as caught:
        UtteranceList.read(path)
    assert str(path) in str(caught.value)


def test_speakers_come_from_a_list_or_from_the_first_folder(tmp_path):
    files = ["id1/x/1.wav", "id2/x/1.wav"]
    assert speakers_of_files(files) == ["id1", "id2"]
    listed = written(tmp_path / "speakers.txt", "id2/x/1.wav bob\nother.wav eve\nid1/x/1.wav ann\n")
    assert speakers_of_files(files, listed) == ["ann", "bob"]
    assert speakers_of_files(["part.wav", "id2/x/1.wav"], listed, names=["other.wav", "id2/x/1.wav"]) == ["eve", "bob"]
    with pytest.raises(CelError, match=r"names no speaker for 1 of 3 utterances, the first is id3/1\.wav"):
        speakers_of_files([*files, "id3/1.wav"], listed)
    for path in ("1.wav", "/data/id1/1.wav"):
        with pytest.raises(CelError, match="does not tell its speaker"):
            speakers_of_files([*files, path])
    with pytest.raises(CelError, match="line 1: 1 columns instead of 'path speaker'"):
        speakers_of_files(files, written(tmp_path / "no.txt", "id1/x/1.wav\n"))
