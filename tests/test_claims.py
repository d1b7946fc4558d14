"""The benchmark of the paper's claims: what it draws, and what it makes of error rates. It trains nothing here."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))

from claims import ARMS, spread, table, tenth

LABELLED = [[f"{speaker}/{number}.wav", speaker] for speaker in "abcdefghijklmnopqrst" for number in range(5)]
LABELLED += [[f"{number}/0.wav", str(number)] for number in range(100)]


def test_a_tenth_is_of_whole_speakers_with_several_utterances() -> None:
    chosen = tenth(LABELLED, seed=0)
    assert len(chosen) == 20
    assert len({path.split("/")[0] for path in chosen}) == 4
    assert chosen == tenth(LABELLED, seed=0)
    assert set(chosen) != set(tenth(LABELLED, seed=1))


@pytest.mark.parametrize("config", ARMS)
def test_differences_are_between_runs_of_one_seed(config: str) -> None:
    rows = [
        {
            "config": config,
            "arm": arm.name,
            "seed": seed,
            # The seeds differ by much more than the arms.
            "eer": dict.fromkeys(("trials.txt", "trials_librispeech.txt"), 10.0 * seed + place + 20),
            "training": {"alignment": 0.5, "uniformity": -2.0},
        }
        for place, arm in enumerate(ARMS[config])
        for seed in (1, 0, 2)
    ]
    places = {arm.name: place for place, arm in enumerate(ARMS[config])}
    lines = list(table(config, rows))[2:]
    assert len(lines) == len(ARMS[config])
    for line, arm in zip(lines, ARMS[config], strict=True):
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        assert cells[:2] == [arm.title, f"{30 + places[arm.name]:.2f} ± 10.00"]
        difference = "" if arm.against is None else f"{places[arm.name] - places[arm.against]:+.2f} ± 0.00"
        assert cells[2] == difference
        assert cells[-2:] == ["0.50", "-2.00"]


def test_one_seed_has_no_spread() -> None:
    assert spread([3.0]) == "3.00"
