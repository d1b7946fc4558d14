"""Mistakes that people make: each ends in one clear line, and in a state from which one can go on."""

import os
import signal
from pathlib import Path

import numpy as np
import pytest
import soundfile
from commands import cel, finish, only_error, start
from training_runs import losses, write_config


@pytest.fixture
def recordings(tmp_path: Path) -> Path:
    """Six files in stereo at 44.1 kHz, in a folder and under names as people give them."""
    folder = tmp_path / "Aufnahmen, 2. Teil" / "Zoë & 李"
    folder.mkdir(parents=True)
    for number in range(6):
        noise = 0.1 * np.random.default_rng(number).standard_normal((3 * 44_100, 2))
        soundfile.write(folder / f"naïve #{number} (copy).wav", noise, 44_100)
    return folder.parent


def test_recordings_with_any_name_rate_and_channels_are_prepared(recordings: Path, tmp_path: Path) -> None:
    code, out, err = cel("prepare", recordings, "--out", "out of it", cwd=tmp_path)
    assert code == 0, err
    assert out.startswith("out of it: 6 utterances in 1 shards; 0 files rejected")
    assert cel("check", "out of it", cwd=tmp_path)[0] == 0


def test_a_file_where_a_folder_is_to_be_is_named(tmp_path: Path) -> None:
    (tmp_path / "there").write_text("something of mine")
    for command in (["demo"], ["corpus", "synth"]):
        assert "there is a file; give " in only_error(cel(*command, "--out", "there", cwd=tmp_path), 2)
    assert (tmp_path / "there").read_text() == "something of mine"


def test_recordings_and_a_bank_given_as_shards_are_told_from_them(recordings: Path, small_corpus, tmp_path) -> None:
    (tmp_path / "few").symlink_to(recordings)
    said = only_error(cel("check", "few", cwd=tmp_path), 2)
    assert "few holds recordings, and is no folder of shards; 'cel prepare few --out NEW' makes one" in said
    file = write_config(small_corpus, tmp_path, data={"shards": str(small_corpus.bank)})
    said = only_error(cel("train", file, cwd=tmp_path), 2)
    assert f"{small_corpus.bank} is a bank, not a folder of shards" in said
    said = only_error(cel("train", file, "data.shards=few", cwd=tmp_path), 2)
    assert "few holds recordings" in said


def test_a_relative_path_from_elsewhere_says_from_where(small_corpus, tmp_path: Path) -> None:
    (tmp_path / "shards").symlink_to(small_corpus.shards)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    file = write_config(small_corpus, tmp_path, data={"shards": "shards"})
    said = only_error(cel("train", file, cwd=elsewhere), 2)
    assert f"there is no folder of shards at shards (in {elsewhere})" in said


def test_ctrl_c_in_two_ranks_is_one_line_and_the_run_goes_on(small_corpus, tmp_path: Path) -> None:
    file = write_config(small_corpus, tmp_path, train={"epochs": 400, "max_steps": 1000}, checkpoint={"every_steps": 2})
    process = start("train", file, "--nproc", "2", cwd=tmp_path)
    heard = []
    assert process.stderr is not None
    for line in process.stderr:
        heard.append(line)
        if line.startswith("step") and " 5/" in line:
            # A terminal tells all of them.
            os.killpg(process.pid, signal.SIGINT)
            break
    code, out, err = finish(process)
    assert only_error((code, out, "".join(heard) + err), 130) == "error: interrupted"
    steps = sorted(losses(tmp_path / "run"))
    code, out, err = cel("train", file, f"train.max_steps={steps[-1] + 2}", cwd=tmp_path)
    assert code == 0, err
    assert sorted(losses(tmp_path / "run"))[-1] == steps[-1] + 2


def test_more_processes_than_cores_are_remarked_on(small_corpus, tmp_path: Path) -> None:
    file = write_config(small_corpus, tmp_path, train={"max_steps": 1, "threads": None})
    code, _, err = cel("train", file, "--nproc", "4", cwd=tmp_path)
    assert code == 0, err
    cores = len(os.sched_getaffinity(0))
    assert (f"4 processes share {cores} cores" in err) == (cores < 4)
