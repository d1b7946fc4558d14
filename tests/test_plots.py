"""Pictures: what they state, and that making them changes nothing else."""

import struct
from xml.etree import ElementTree

import matplotlib as mpl
import numpy as np
import pytest

from cel_dist.evaluation.plots import det_plot, score_histogram
from cel_dist.evaluation.projection import neighbour_map, principal_components
from cel_dist.metrics import eer

SCORES = np.array([-1.4, -1.2, -1.1, -0.7, -1.0, -0.8, -0.6, -0.5])
LABELS = np.array([0, 0, 0, 0, 1, 1, 1, 1])


def texts(svg: bytes) -> list[str]:
    root = ElementTree.fromstring(svg)
    return ["".join(node.itertext()).strip() for node in root.iter("{http://www.w3.org/2000/svg}text")]


def size(png: bytes) -> tuple[int, int]:
    assert png[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = struct.unpack(">II", png[16:24])
    return width, height


def clusters(num: int, each: int, seed: int = 0) -> tuple[np.ndarray, list[str]]:
    generator = np.random.default_rng(seed)
    centres = generator.standard_normal((num, 64))
    rows = np.repeat(centres, each, axis=0) + 0.3 * generator.standard_normal((num * each, 64))
    names = [f"speaker{number:02d}" for number in range(num) for _ in range(each)]
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32), names


def test_det_plot_states_the_equal_error_rate_of_every_curve():
    shown = texts(det_plot({"before": (-SCORES, LABELS), "after": (SCORES, LABELS)}, picture="svg"))
    assert f"before: EER {eer(-SCORES, LABELS):.2%}" in shown
    assert f"after: EER {eer(SCORES, LABELS):.2%}" in shown
    assert f"EER {eer(SCORES, LABELS):.2%}" in texts(det_plot({"": (SCORES, LABELS)}, picture="svg"))


def test_det_plot_of_many_trials_draws_what_can_be_seen_of_them():
    generator = np.random.default_rng(0)
    labels = generator.integers(0, 2, 300_000)
    scores = generator.normal(2.0 * labels, 1)
    picture = det_plot({"": (scores, labels)}, picture="svg")
    assert len(picture) < 50_000
    assert f"EER {eer(scores, labels):.2%}" in texts(picture)


def test_det_plot_of_perfect_scores_is_drawn():
    assert "EER 0.00%" in texts(det_plot({"": (LABELS.astype(float), LABELS)}, picture="svg"))


def test_histogram_states_counts_and_threshold():
    shown = texts(score_histogram(SCORES, LABELS, threshold=-0.75, picture="svg"))
    assert "different speakers (4 trials)" in shown
    assert "same speaker (4 trials)" in shown
    assert any(text.startswith("threshold") for text in shown)
    assert not any(text.startswith("threshold") for text in texts(score_histogram(SCORES, LABELS, picture="svg")))


@pytest.mark.parametrize(
    "draw",
    [
        lambda picture: det_plot({"a": (SCORES, LABELS)}, picture=picture),
        lambda picture: score_histogram(SCORES, LABELS, threshold=-0.8, picture=picture),
    ],
    ids=["det", "histogram"],
)
def test_pictures_are_repeatable_and_leave_matplotlib_as_it_was(draw):
    before = dict(mpl.rcParams)
    width, height = size(draw("png"))
    assert width > 300
    assert height > 200
    assert draw("svg") == draw("svg")
    assert dict(mpl.rcParams) == before


def test_neighbours_of_the_map_are_of_the_same_speaker():
    rows, names = clusters(6, 10)
    places = neighbour_map(rows)
    distances = np.linalg.norm(places[:, None] - places[None], axis=-1) + np.diag(np.full(60, np.inf))
    nearest = distances.argmin(axis=1)
    assert np.mean([names[a] == names[b] for a, b in enumerate(nearest)]) == 1
    np.testing.assert_array_equal(places, neighbour_map(rows))


@pytest.mark.parametrize("num", [1, 2, 5, 9])
def test_a_handful_of_points_is_mapped_to_principal_components(num):
    rows = np.random.default_rng(0).standard_normal((num, 8))
    np.testing.assert_array_equal(neighbour_map(rows), principal_components(rows))
    assert neighbour_map(rows).shape == (num, 2)


def test_identical_points_stay_together():
    assert not neighbour_map(np.ones((20, 4))).any()
