"""What a run writes down while it trains: means, lines of the log, files that outlive a full disk."""

import contextlib
import gzip
import json
import os
import time
from datetime import datetime

import pytest
import torch

from cel_dist.config_file import parse_config
from cel_dist.errors import RunError
from cel_dist.losses import LossOutput
from cel_dist.tracking import Tracker
from cel_dist.training.checkpoint import TrainState
from cel_dist.training.pace import Pace, evaluation_line, interval_line
from cel_dist.training.profile import StepProfile, named
from cel_dist.training.records import Interval, Records

VALUES = {
    "loss": 4.1234,
    "w": 10.02,
    "utterances_per_second": 812.12,
    "data_wait": 0.031,
    "step_seconds": 0.2451,
    "memory_gib": 1.234,
    "eta_seconds": 4325.2,
}
NOW = datetime(2026, 5, 1, 14, 0)


def add_steps(interval: Interval, steps: range) -> None:
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        *losses, norm = torch.randn(6, generator=generator)
        interval.begin_step()
        interval.add(
            LossOutput(*losses),
            norm,
            utterances=8,
            waited=0.0,
            ended=time.perf_counter(),
            faults=step % 2,
            false_negatives=step / 7 if step else None,
        )


def test_an_interval_that_was_interrupted_has_the_same_means_to_the_last_bit():
    whole, begun, resumed = Interval(), Interval(), Interval()
    add_steps(whole, range(7))
    add_steps(begun, range(3))
    resumed.load_state_dict(json.loads(json.dumps(begun.state_dict())))
    add_steps(resumed, range(3, 7))
    measured = {"utterances_per_second", "data_wait", "data_wait_seconds", "step_seconds", "memory_gib"}
    expected, found = whole.summary(), resumed.summary()
    assert expected.keys() == found.keys() > measured
    assert {name: value for name, value in found.items() if name not in measured} == {
        name: value for name, value in expected.items() if name not in measured
    }
    # Steps of another process took no time of this one.
    assert (resumed.num_timed_steps, whole.num_timed_steps) == (4, 7)
    # A process needs more than what its libraries take, and less than this machine has.
    assert 0.05 < found["memory_gib"] < os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
    Interval().load_state_dict(Interval().state_dict())


def test_the_line_of_an_interval_fits_a_terminal_and_stays_aligned():
    line = interval_line(1000, 50000, 3, VALUES, 0.1234, NOW)
    assert line == (
        "step  1000/50000  epoch 3  loss 4.1234  w 10.0  EER 12.34%   812 utt/s  wait  3%  0.245 s/step  1.2 GiB"
        "  ETA 1h12m, 15:12"
    )
    assert len(line) <= 121
    before = interval_line(10, 50000, 3, {**VALUES, "utterances_per_second": 9.57, "data_wait": 0.5}, None, NOW)
    for part in ("loss", "w 10", "EER", " utt/s", "wait", "s/step", "GiB", "ETA"):
        assert before.index(part) == line.index(part)
    assert "EER   -" in before
    head = {**{name: VALUES[name] for name in VALUES if name != "w"}, "accuracy": 0.072, "margin": 0.2, "scale": 30.0}
    assert "  loss 4.1234  acc   7%  EER 12.34%" in interval_line(1000, 50000, 3, head, 0.1234, NOW)
    # Numbers that are not known are not made up, and those that matter are not kept back.
    short = {name: VALUES[name] for name in VALUES if name not in ("w", "eta_seconds")}
    assert interval_line(3, None, 0, {**short, "faults": 2, "skipped": 1}, None, NOW).endswith(
        "GiB  2 unreadable  1 skipped"
    )
    assert interval_line(3, 9, 0, {**VALUES, "eta_seconds": 400_000}, None, NOW).endswith("ETA 4d15h, 05-06 05:06")
    assert evaluation_line(9, 10, 1, 0.1234, 0.5).endswith("epoch 1  validation EER 12.34 %  minDCF 0.5000")


def test_the_time_left_follows_recent_steps_and_spreads_what_is_between_them():
    now = 0.0
    pace = Pace(100, lambda: now)
    assert pace.seconds_left(1000) is None
    now = 10.0
    pace.add(110, 10, 10.0)
    assert pace.seconds_left(1000) == pytest.approx(890)
    assert pace.seconds_left(None) is None
    # A checkpoint of five seconds in twenty steps costs a quarter of a second a step.
    now = 25.0
    pace.add(120, 10, 10.0)
    assert pace.seconds_left(1000) == pytest.approx(880 * 1.25)
    # Ten intervals later the steps are twice as fast, and the first ones are forgotten.
    for step in range(130, 230, 10):
        now += 5.0
        pace.add(step, 10, 5.0)
    assert pace.seconds_left(1000) == pytest.approx(780 * (0.5 + 5 / 120))
    assert pace.seconds_left(200) == 0


def test_records_outlive_a_full_disk(mount_disk, caplog):
    disk = mount_disk(64)
    records = Records(disk, Tracker(), TrainState())
    filler = disk / "filler"

    def write(step: int) -> None:
        records.write_evaluation(step=step, epoch=0, eer=1 / (step + 1), min_dcf=0.5)

    def fill() -> None:
        with filler.open("ab", buffering=0) as stream, contextlib.suppress(OSError):
            while stream.write(bytes(1000)):
                pass

    write(0)
    fill()
    # The file has a page of its own, which is to be full as well; then a line is cut in the middle.
    for step in range(1, 120):
        write(step)
    evaluations = disk / "evaluations.jsonl"
    whole = evaluations.read_bytes()
    assert whole.endswith(b"}\n")
    assert 4096 - 120 < len(whole) <= 4096
    [warning] = [line for line in caplog.messages if "cannot write" in line]
    assert f"cannot write {evaluations}: no space left on device; its lines wait in memory" in warning
    with pytest.raises(RunError, match="no space left on device"):
        records.flush()
    records.try_to_flush()
    filler.unlink()
    write(120)
    rows = [json.loads(line) for line in evaluations.read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(121))
    assert evaluations.read_bytes().startswith(whole)
    records.flush()


@pytest.mark.parametrize(
    ("asked", "left", "taken", "expected"),
    [
        (2, 100, 9, ["00000005-00000006"]),
        (2, 3, 3, ["00000002-00000003"]),
        (5, 3, 3, ["00000001-00000003"]),
        # A run that is ended early leaves what it has.
        (3, 100, 6, ["00000005-00000006"]),
        (3, 100, 4, []),
        (0, 100, 9, []),
    ],
)
def test_steps_are_traced_once_the_first_ones_are_over(asked, left, taken, expected, tmp_path):
    tree = {"data": {"shards": "s"}, "augment": {"profile": 0}, "train": {"profile_steps": asked}}
    config = parse_config({**tree, "run": {"dir": str(tmp_path)}}, "test")
    traced = StepProfile.of(config, left, 0, torch.device("cpu"))
    traced.start()
    for step in range(1, taken + 1):
        with named(f"step {step}"):
            torch.ones(3).sum()
        traced.step()
    traced.close()
    traces = sorted(tmp_path.rglob("*.gz"))
    assert [path.name for path in traces] == [f"steps-{steps}.trace.json.gz" for steps in expected]
    for trace in traces:
        first, last = (int(number) for number in expected[0].split("-"))
        names = [event.get("name", "") for event in json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]]
        assert {name for name in names if name.startswith("cel: ")} == {
            f"cel: step {step}" for step in range(first, last + 1)
        }
    assert (tmp_path / "profile").exists() == bool(expected)
