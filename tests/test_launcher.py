"""The command `cel train` starts ranks with, what it refuses, and the processes of a launch: who is told, who ends."""

import base64
import functools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from processes import has_ended
from training_runs import CEL, ENVIRONMENT, write_config

from cel_dist.cli.app import run as cel
from cel_dist.data.files import sole_writer
from cel_dist.errors import EXIT_PREEMPTED, CelError, PreemptedError, RunError
from cel_dist.launcher import Placement, launcher_command
from cel_dist.launcher.command import device_ids
from cel_dist.launcher.hostfile import read_hostfile
from cel_dist.launcher.nodes import write_environment
from cel_dist.launcher.process import LaunchProcess
from cel_dist.launcher.restarts import Progress, what_ended
from cel_dist.launcher.training import _raise_unless_worth_another_start, _train


@pytest.fixture
def config(small_corpus, tmp_path):
    """Writes a configuration of a run in the test's folder."""
    return functools.partial(write_config, small_corpus, tmp_path)


@pytest.fixture
def hostfile(tmp_path) -> Path:
    file = tmp_path / "hosts"
    file.write_text("# two of them\n\nfirst.example slots=2\n10.0.0.2\tslots=4  # the new one\n")
    return file


def test_a_hostfile_is_read_or_its_fault_named(hostfile):
    assert read_hostfile(hostfile) == {"first.example": 2, "10.0.0.2": 4}
    for text, message in {
        "": "names no node",
        "a\n": "line 1: 'a' is no node",
        "# a\na slots=0\n": "line 2: 'a slots=0' is no node",
        "a slots=2 b slots=2\n": "line 1: 'a slots=2 b slots=2' is no node",
        "a;reboot slots=2\n": "line 1: 'a;reboot slots=2' is no node",
        "-oProxyCommand=x slots=2\n": "is no node",
        "a slots=2\na slots=3\n": "line 2: a is there twice",
    }.items():
        hostfile.write_text(text)
        with pytest.raises(CelError, match=message) as caught:
            read_hostfile(hostfile)
        assert str(hostfile) in str(caught.value)
    with pytest.raises(CelError, match=r"cannot read the hostfile .*absent \(no such file or directory\)"):
        read_hostfile(hostfile.parent / "absent")
    hostfile.write_bytes(b"\xff")
    with pytest.raises(CelError, match="is no text"):
        read_hostfile(hostfile)


def world_info(devices: dict[str, list[str]]) -> str:
    return base64.urlsafe_b64encode(json.dumps(devices).encode()).decode()


def test_a_dry_run_prints_the_command_and_starts_nothing(config, hostfile, tmp_path, capfd, monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    file = config()
    train = ["train", str(file), "run.name=two words", "--resume", "none", "--dry-run"]
    assert cel([*train, "--nproc", "2", "--master-port", "4711"]) == 0
    expected = (
        f"--node_rank 0 --master_addr 127.0.0.1 --master_port 4711 --module cel_dist.train {file} 'run.name=two words' "
        "--resume none"
    )
    start = f"{sys.executable} -m cel_dist.launcher.node --world_info {world_info({'localhost': ['0', '1']})}"
    assert capfd.readouterr().out == f"{start} {expected}\n"
    assert cel([*train, "--hostfile", str(hostfile), "--json"]) == 0
    command = json.loads(capfd.readouterr().out)["command"]
    assert command[1:5] == ["-m", "deepspeed.launcher.runner", "--hostfile", str(hostfile)]
    assert "--no_ssh" not in command
    # A path that all nodes see, where the variables for them will be.
    assert command[command.index("--venv_script") + 1] == str(tmp_path / "run" / ".environment")
    assert cel([*train, "--hostfile", str(hostfile), "--no-ssh", "--node-rank", "1", "--json"]) == 0
    command = json.loads(capfd.readouterr().out)["command"]
    meeting = ["--node_rank", "1", "--master_addr", "first.example", "--master_port", "29500"]
    assert command[2:11] == ["cel_dist.launcher.node", "--world_info", command[4], *meeting]
    slots = {"first.example": ["0", "1"], "10.0.0.2": ["0", "1", "2", "3"]}
    assert command[4] == world_info(slots)
    # The devices of the user hold for this node alone.
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,6,7")
    there = Placement(hostfile=hostfile, node_rank=0, master_addr="10.0.0.9", master_port=5)
    command = launcher_command(file, [], there, resume="auto")
    assert command[4] == world_info({**slots, "first.example": ["4", "6"]})
    assert command[7:11] == ["--master_addr", "10.0.0.9", "--master_port", "5"]
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("visible", "devices"),
    [
        (None, ["0", "1"]),
        ("3,1", ["3", "1"]),
        ("7,5,3", ["7", "5"]),
        ("MIG-8b3a,GPU-71a3", ["MIG-8b3a", "GPU-71a3"]),
        *((none, ["-1", "-1"]) for none in ("", "-1", "NoDevFiles", "void", "none", "-1,0,1")),
        ("3", "names 1 device for 2 processes; unset it, name 2, or start fewer with --nproc 1"),
        ("3,3", "names 1 device for 2"),
        ("3,-1,5", "names 1 device for 2"),
    ],
)
def test_the_ranks_get_the_devices_that_the_user_names(visible, devices):
    if isinstance(devices, list):
        assert device_ids(2, visible) == devices
        return
    with pytest.raises(CelError, match=f"CUDA_VISIBLE_DEVICES={visible} {devices}"):
        device_ids(2, visible)


# Rank 0 says through a pipe what it was told; rank 1, when it has read that, prints both and is killed.
TOLD = """
import json, os, signal, sys
names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "CUDA_VISIBLE_DEVICES")
told = json.dumps({name: os.environ.get(name) for name in names})
if os.environ["RANK"] == "0":
    print(told, file=open(sys.argv[2], "w"), flush=True)
else:
    print("told", open(sys.argv[2]).read() + told, flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_the_launcher_of_a_node_tells_ranks_their_place_and_how_one_was_killed(tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,3,1")
    script, pipe = tmp_path / "rank.py", tmp_path / "pipe"
    script.write_text(TOLD)
    os.mkfifo(pipe)
    command = launcher_command(script, [], Placement(2), resume="auto")
    command = command[: command.index("--module")]
    done = subprocess.run([*command, script, pipe], capture_output=True, check=False)
    assert what_ended(done.returncode, over_ssh=False) == "a rank was killed by SIGKILL"
    first, second = done.stdout.decode().partition("told ")[2].splitlines()[:2]
    told = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "CUDA_VISIBLE_DEVICES": "5,3"}
    assert json.loads(first) == {"RANK": "0", "LOCAL_RANK": "0", **told}
    assert json.loads(second) == {"RANK": "1", "LOCAL_RANK": "1", **told}


# Ends as a rank does that has written its checkpoint.
ASKED = """
import os, signal, sys, time
for number in (signal.SIGTERM, signal.SIGUSR1):
    signal.signal(number, lambda number, frame: sys.exit(75))
os.write(1, b"ready\\n")
time.sleep(60)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_what_asks_all_processes_of_a_job_to_end_is_not_taken_for_a_failure(tmp_path, number):
    script = tmp_path / "rank.py"
    script.write_text(ASKED)
    command = launcher_command(script, [], Placement(2), resume="auto")
    command = command[: command.index("--module")]
    with subprocess.Popen([*command, script], stdout=subprocess.PIPE, start_new_session=True) as process:
        ready = 0
        while ready < 2:
            ready += process.stdout.readline() == b"ready\n"
        os.killpg(process.pid, number)
    assert process.returncode == 75


def test_options_that_do_not_fit_each_other_are_refused_in_a_line(config, hostfile, capfd):
    file, hosts = str(config()), ["--hostfile", str(hostfile)]
    for options, message in {
        ("--dry-run",): "--dry-run needs processes to start; say how many with --nproc",
        ("--max-restarts", "1"): "--max-restarts needs processes to start",
        ("--master-port", "1"): "--master-port needs processes to start",
        ("--nproc", "0"): "--nproc 0: at least one process is needed",
        ("--nproc", "2", "--max-restarts", "-1"): "--max-restarts -1: give 0 or more",
        ("--nproc", "2", "--master-port", "65536"): "--master-port 65536: ports are 1 to 65535",
        ("--nproc", "2", "--master-addr", "a"): "--master-addr is for several nodes",
        ("--nproc", "2", "--no-ssh", "--node-rank", "0"): "--no-ssh is for several nodes",
        (*hosts, "--no-ssh"): "--no-ssh and --node-rank belong together",
        (*hosts, "--node-rank", "0"): "--no-ssh and --node-rank belong together",
        (*hosts, "--no-ssh", "--node-rank", "2"): f"--node-rank 2: {hostfile} names 2 nodes, 0 to 1",
        # Six ranks, as the hostfile says; four, as --nproc says instead.
        (*hosts, "--no-ssh", "--node-rank", "0"): "train.batch_size=8 does not divide by 6 ranks",
        (*hosts, "--nproc", "5", "--no-ssh", "--node-rank", "0"): "train.batch_size=8 does not divide by 10 ranks",
    }.items():
        assert cel(["train", file, *options]) == 2
        said = capfd.readouterr()
        assert said.out == ""
        assert said.err.startswith(f"error: {message}")
        assert said.err.count("\n") == 1


def test_variables_for_the_nodes_survive_their_shell_and_other_eyes(tmp_path):
    file = tmp_path / "run" / ".environment"
    values = {"MLFLOW_TRACKING_PASSWORD": 'it\'s $HOME `id`\n"two"', "AWS_REGION": "x", "EDITOR": "ed", "HOME": "/"}
    write_environment(file, values)
    assert file.stat().st_mode & 0o777 == 0o600
    program = "import json, os; print(json.dumps(dict(os.environ)))"
    shell = ["env", "-i", "bash", "-c", 'source "$0"; "$1" -c "$2"', file, sys.executable, program]
    seen = json.loads(subprocess.run(shell, capture_output=True, check=True, text=True).stdout)
    assert {name: seen.get(name) for name in values} == {**values, "EDITOR": None, "HOME": None}


def test_exit_codes_say_what_ended_and_what_is_not_started_again(tmp_path):
    assert what_ended(1, over_ssh=True) == "a rank ended with code 1"
    assert what_ended(256 - 9, over_ssh=True) == "a rank was killed by SIGKILL"
    assert what_ended(137, over_ssh=True) == "the launcher of a node was killed by SIGKILL"
    assert what_ended(255, over_ssh=True) == "ssh could not reach a node, or lost it"
    assert what_ended(255, over_ssh=False) == "a rank was killed by SIGHUP"
    term, usr1 = signal.SIGTERM, signal.SIGUSR1
    for code, requests, error in [
        (1, [], None),
        (247, [], None),
        (0, [], None),
        (2, [], CelError),
        (75, [], PreemptedError),
        (75, [usr1], PreemptedError),
        # Ranks that had no checkpoint to write yet.
        (256 - usr1, [usr1], PreemptedError),
        (-term, [term], PreemptedError),
        (1, [term], RunError),
        (1, [term, term], RunError),
    ]:
        process = LaunchProcess(None)
        process.requests = requests
        if error is None:
            _raise_unless_worth_another_start(code, process, tmp_path)
            continue
        with pytest.raises(RunError if error is not CelError else CelError) as caught:
            _raise_unless_worth_another_start(code, process, tmp_path)
        assert type(caught.value) is error


def test_only_what_may_help_is_tried_again_and_from_what_was_saved(tmp_path):
    asked_for = []

    def train(code: int, max_restarts: int) -> None:
        program = """
import os, sys
made = os.path.join(sys.argv[1], "checkpoints", f"step-{sys.argv[2]}")
os.makedirs(made)
open(os.path.join(made, "state.json"), "w").close()
sys.exit(int(sys.argv[3]))
"""

        def command(resume: str) -> list[str]:
            asked_for.append(resume)
            # The second start saves, the others end as they are.
            saving = (
                [program, str(run), "00000007"] if len(asked_for) == 2 else ["import sys; sys.exit(int(sys.argv[1]))"]
            )
            return [sys.executable, "-c", *saving, str(code)]

        with LaunchProcess(None) as process:
            _train(command, process, Placement(1), {}, run, "there", max_restarts)

    run = tmp_path / "run"
    with pytest.raises(CelError, match="training did not start"):
        train(2, 3)
    with pytest.raises(PreemptedError):
        train(75, 3)
    assert asked_for == ["there", "there"]
    asked_for.clear()
    shutil.rmtree(run)
    with pytest.raises(
        RunError, match="a rank ended with code 3, after 4 restarts; the last 3 starts made no step; its"
    ):
        train(3, 4)
    assert asked_for == ["there", "there", "auto", "auto", "auto"]


def test_a_run_that_fails_goes_on_and_one_that_is_asked_ends(config, tmp_path):
    file, run = config(data={"segment_frames": 16}, encoder={"embedding_dim": 16}), tmp_path / "run"
    options = ["--nproc", "1", "--max-restarts", "2", "train.epochs=40", "checkpoint.every_steps=1"]
    command = [*CEL, "train", str(file), *options]
    process = subprocess.Popen(command, env=ENVIRONMENT, stderr=subprocess.PIPE, text=True)
    said, starts, last = [], [], 0
    for line in process.stderr:
        said.append(line)
        if begins := re.search(r"from step (\d+) to", line):
            starts.append(int(begins[1]))
        # At the second step of a start, when the checkpoint of its first one is complete.
        elif (step := re.match(r"step +(\d+)\b", line)) and int(step[1]) == starts[-1] + 2 > last:
            last = int(step[1])
            (node,) = psutil.Process(process.pid).children()
            (rank,) = node.children()
            if len(starts) == 1:
                node.kill()
            else:
                process.send_signal(signal.SIGUSR1)
    assert process.wait() == EXIT_PREEMPTED, "".join(said)[-3000:]
    text = "".join(said)
    assert "training failed: the launcher was killed by SIGKILL" in text
    assert "; restart 1 of 2, from step-0" in text
    assert said[-1].startswith("error: training was asked to end (SIGUSR1) and did; run the same command again")
    # What a start had saved, the next one went on from.
    assert len(starts) == 2
    assert starts[0] == 0 < starts[1]
    assert has_ended(rank)
    with sole_writer(run):
        assert Progress.of(run).step >= starts[1] + 2
