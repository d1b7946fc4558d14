"""What a user sees of long work: lines in a log, a bar on a terminal."""

import io
import sys
from pathlib import Path

import pytest
from prepare_corpus import write_corpus

from cel_dist.cli.app import run
from cel_dist.cli.progress import progress_bar
from cel_dist.data.prepare import prepare
from cel_dist.data.progress import Reporter


class Clock:
    seconds = 1000.0

    def __call__(self) -> float:
        return self.seconds


def test_a_line_every_half_minute_tells_of_speed_and_time_left(caplog: pytest.LogCaptureFixture) -> None:
    clock = Clock()
    with caplog.at_level("INFO", "cel_dist.data.progress"):
        # An earlier run did 400 files; they are counted, and make this one no faster.
        reporter = Reporter(None, 2000, done=400, audio_seconds=3600.0, clock=clock)
        for _ in range(16):
            clock.seconds += 10.0
            reporter.add(100, 720.0)
    assert [record.getMessage() for record in caplog.records] == [
        "700 of 2000 files (35.0%), 10 files/s, 1.6 h of audio, 2 min 10 s left",
        "1000 of 2000 files (50.0%), 10 files/s, 2.2 h of audio, 1 min 40 s left",
        "1300 of 2000 files (65.0%), 10 files/s, 2.8 h of audio, 1 min 10 s left",
        "1600 of 2000 files (80.0%), 10 files/s, 3.4 h of audio, 40 s left",
        "1900 of 2000 files (95.0%), 10 files/s, 4.0 h of audio, 10 s left",
    ]


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("bank", [False, True])
def test_preparing_says_how_far_it_is_in_the_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, workers: int, bank: bool
) -> None:
    monkeypatch.setattr("cel_dist.data.progress.INTERVAL_SECONDS", 0.0)
    source = write_corpus(tmp_path / "noise", ["1.wav", "2.wav", "3.wav"])
    kind = ["--bank"] if bank else ["--samples-per-shard", "1"]
    with caplog.at_level("INFO"):
        assert run(["prepare", str(source), "--out", str(tmp_path / "out"), "--workers", str(workers), *kind]) == 0
    lines = [record.getMessage() for record in caplog.records if record.name == "cel_dist.data.progress"]
    assert [line.partition(",")[0] for line in lines] == ["1 of 3 files (33.3%)", "2 of 3 files (66.7%)"]
    assert all("files/s" in line and "0.0 h of audio" in line and line.endswith("s left") for line in lines)


def test_a_finished_preparation_has_nothing_to_tell(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    source = write_corpus(tmp_path / "corpus", ["1.wav"])
    with caplog.at_level("INFO", "cel_dist.data.progress"):
        prepare(source, tmp_path / "out", workers=1)
    assert caplog.records == []


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_shows_a_bar_with_the_time_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cel_dist.cli.progress._QUIET_SECONDS", -1.0)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setattr(sys, "stderr", Terminal())
    with progress_bar("Preparing") as advance:
        assert advance is not None
        advance(400, 2000)
        advance(410, 2000)
        advance(420, 2000)
    shown = sys.stderr.getvalue()
    assert "Preparing" in shown
    assert "420/2000" in shown
    assert "left" in shown
