"""Mistakes that people make: each ends in one clear line, and in a state from which one can go on."""

import os
import signal
import subprocess
import sys
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


@pytest.fixture
def read_only(mount_disk) -> Path:
    """A folder that cannot be written into, not by root either."""
    disk = mount_disk(1024)
    subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
    return disk


@pytest.fixture
def model(small_corpus, tmp_path: Path) -> Path:
    """A run of one step."""
    file = write_config(small_corpus, tmp_path, "made", train={"max_steps": 1})
    code, _, err = cel("train", file, cwd=tmp_path)
    assert code == 0, err
    return tmp_path / "made"


def test_a_folder_that_is_read_only_is_told_before_the_work(read_only: Path, model: Path, small_corpus) -> None:
    listed = ["--trials", small_corpus.trials, "--root", small_corpus.audio]
    for command in (
        ["prepare", small_corpus.audio, "--out", read_only / "shards"],
        # The trials' files are not there: who looks at the folder first has not computed anything.
        ["evaluate", "--model", model, "--trials", small_corpus.trials, "--root", model, "--out", read_only / "test"],
        ["models", "export", model, "--out", read_only / "model", "--format", "safetensors"],
    ):
        said = only_error(cel(*command, cwd=model.parent), 2)
        assert said.startswith(f"error: cannot write into {read_only}: it is read-only for this user; "), said
    said = only_error(cel("train", model.with_suffix(".yaml"), f"run.dir={read_only / 'run'}", cwd=model.parent), 2)
    assert f"{read_only} cannot be written into; name another folder" in said
    for command in (
        ["embed", "--model", model, small_corpus.audio, "--out", read_only / "all.npz"],
        ["report", model, "--out", read_only / "report.html"],
    ):
        assert f"cannot write {read_only}/" in only_error(cel(*command, cwd=model.parent), 1)
    assert list(read_only.iterdir()) == []
    code, _, err = cel("evaluate", "--model", model, *listed, "--out", model.parent / "test", cwd=model.parent)
    assert code == 0, err


@pytest.mark.parametrize(
    ("package", "command", "remedy"),
    [
        ("torch", "train run.yaml", "run 'make install' in the checkout, or pip install torch"),
        ("torch", "train run.yaml --nproc 2", "run 'make install' in the checkout, or pip install torch"),
        ("soundfile", "prepare audio --out new", "run 'make install' in the checkout, or pip install soundfile"),
        ("fastapi", "serve --model run --store people.db", "pip install 'cel_dist[serve]'"),
    ],
)
def test_a_package_that_is_missing_is_named(package, command, remedy, small_corpus, tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(
        "import sys\n"
        "class Missing:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        f"        if name == {package!r}:\n"
        "            raise ModuleNotFoundError(f'No module named {name!r}', name=name)\n"
        "sys.meta_path.insert(0, Missing())\n"
    )
    write_config(small_corpus, tmp_path)
    (tmp_path / "audio").symlink_to(small_corpus.audio)
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    said = only_error(cel(*command.split(), cwd=tmp_path, PYTHONPATH=path), 2)
    assert said == (
        f"error: the Python package '{package}' is not installed in {sys.prefix}; {remedy}; 'cel doctor' looks further"
    )


def test_a_run_that_is_beyond_its_new_end_is_told(small_corpus, tmp_path: Path) -> None:
    file = write_config(small_corpus, tmp_path)
    assert cel("train", file, "train.max_steps=4", cwd=tmp_path)[0] == 0
    # As if it had been killed before it was finished.
    (tmp_path / "run" / "summary.json").unlink()
    code, out, err = cel("train", file, "train.max_steps=3", cwd=tmp_path)
    assert code == 0, err
    assert out.startswith("4 steps")
    told = [line for line in err.splitlines() if "end the run at step 3" in line]
    assert len(told) == 1
    assert "step-00000004 is at step 4: nothing is trained, the run is finished as it is" in told[0]
    code, _, err = cel("train", file, "train.max_steps=5", cwd=tmp_path)
    assert code == 0, err
    assert sorted(losses(tmp_path / "run")) == [1, 2, 3, 4, 5]
