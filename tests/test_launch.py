"""The launch scripts, run as they are from a checkout: the real launchers, and a stand-in for Slurm alone."""

import contextlib
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from cel_dist.distributed import free_port

PROJECT = Path(__file__).resolve().parent.parent
SCRIPTS = sorted((PROJECT / "launch").iterdir())


@pytest.fixture
def checkout(tmp_path) -> Path:
    """The scripts beside a .venv, whose programs are those that run this test."""
    folder = tmp_path / "checkout"
    shutil.copytree(PROJECT / "launch", folder / "launch")
    (folder / ".venv").mkdir()
    (folder / ".venv" / "bin").symlink_to(Path(sys.executable).parent)
    return folder


@pytest.fixture
def config(small_corpus, tmp_path) -> Path:
    """One short step on the small corpus."""
    tree = {
        "run": {"dir": str(tmp_path / "run")},
        "data": {"shards": str(small_corpus.shards), "segment_frames": 16, "workers": 0},
        "augment": {"profile": 0},
        "encoder": {"embedding_dim": 16},
        "train": {"batch_size": 4, "threads": 1},
        "tracking": {"enabled": False},
    }
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(tree))
    return file


def bash(script: Path, *arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    inherited = {name: value for name, value in os.environ.items() if name not in ("NPROC", "NODE_RANK", "MASTER_ADDR")}
    return subprocess.run(
        ["bash", script, *map(str, arguments)],
        env={**inherited, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def steps_of(tmp_path: Path) -> int:
    return int(yaml.safe_load((tmp_path / "run" / "summary.json").read_text())["steps"])


@pytest.mark.parametrize(
    "script", [*SCRIPTS, PROJECT / "scripts/install.sh", PROJECT / ".ci/run"], ids=lambda p: p.name
)
def test_scripts_are_valid_bash(script):
    done = subprocess.run(["bash", "-n", script], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(
    ("script", "arguments", "environment", "message"),
    [
        ("local.sh", [], {}, "usage: "),
        ("multinode.sh", ["hosts"], {}, "usage: "),
        ("multinode.sh", ["absent", "config.yaml"], {}, "error: cannot read the hostfile absent"),
        ("multinode.sh", [os.devnull, "config.yaml"], {"NODE_RANK": "1"}, "error: NODE_RANK is set but MASTER_ADDR"),
        ("slurm.sbatch", [], {}, "usage: "),
    ],
)
def test_wrong_usage_is_one_line_and_exit_code_2(script, arguments, environment, message):
    done = bash(PROJECT / "launch" / script, *arguments, **environment)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(message)
    assert done.stderr.count("\n") == 1


def test_local_trains_with_the_processes_asked_for_beside_another_job(checkout, config, tmp_path):
    with contextlib.ExitStack() as stack:
        # Another job sits at the launcher's default port; if it is no socket of this test's, so much the better.
        with contextlib.suppress(OSError):
            stack.enter_context(socket.create_server(("127.0.0.1", 29500)))
        done = bash(checkout / "launch/local.sh", config, "train.max_steps=1", NPROC="2")
    assert done.returncode == 0, done.stderr[-3000:]
    assert "2 ranks x 2 utterances" in done.stderr
    assert steps_of(tmp_path) == 1


def test_multinode_trains_its_node_of_a_hostfile_without_ssh(checkout, config, tmp_path):
    hostfile = tmp_path / "hosts"
    hostfile.write_text("127.0.0.1 slots=1\n")
    place = {"NODE_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    done = bash(checkout / "launch/multinode.sh", hostfile, config, "train.max_steps=1", **place)
    assert done.returncode == 0, done.stderr[-3000:]
    assert steps_of(tmp_path) == 1


def test_slurm_starts_a_torchrun_that_trains(checkout, config, tmp_path):
    """Slurm itself is not here: its programs are replaced by what they do on a job of one node, this one."""
    programs = tmp_path / "slurm"
    programs.mkdir()
    (programs / "scontrol").write_text("#!/bin/sh\necho 127.0.0.1\necho another\n")
    (programs / "srun").write_text('#!/bin/sh\nwhile [ "${1#--}" != "$1" ]; do shift; done\nexec "$@"\n')
    for program in programs.iterdir():
        program.chmod(0o755)
    job = {
        "SLURM_JOB_ID": str(os.getpid() % 12_000),
        "SLURM_JOB_NUM_NODES": "1",
        "SLURM_JOB_NODELIST": "node[1-2]",
        "SLURM_SUBMIT_DIR": str(checkout),
        "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}",
    }
    done = bash(checkout / "launch/slurm.sbatch", config, "train.max_steps=1", **job)
    assert done.returncode == 0, done.stderr[-3000:]
    assert steps_of(tmp_path) == 1
