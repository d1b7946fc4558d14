"""The processes of a launch on a node: whom signals reach, and who ends with whom."""

import os
import signal
import subprocess
import sys

import psutil
import pytest
from processes import has_ended

from cel_dist.launcher.ranks import LAUNCH, end_processes, processes_of, ranks_of, signal_ranks

# Stands for `cel train` or the server of ssh: names the launch, and starts the launcher of the node.
TOP = """
import os, subprocess, sys
from cel_dist.launcher.ranks import LAUNCH, new_launch
how, *node = sys.argv[1:]
if how != "none":
    os.environ[LAUNCH] = new_launch(over_ssh=how == "ssh")
print(os.environ.get(LAUNCH, ""), flush=True)
subprocess.run(node, start_new_session=how == "ssh")
"""
# Stands for that launcher.
NODE = "import subprocess, sys; subprocess.run(sys.argv[2:])"
# As that of DeepSpeed does, which asks the ranks and waits for them.
PATIENT_NODE = f"import signal; signal.signal(signal.SIGTERM, lambda number, frame: None); {NODE}"
RANK = """
from cel_dist.launcher.ranks import end_with_launcher
end_with_launcher()
print("up", flush=True)
input()
print("still there", flush=True)
"""


class Tree:
    """A rank, its launcher on the node, and what stands for the launch; ready when made."""

    def __init__(self, how: str, *arguments: str) -> None:
        rank = [sys.executable, "-c", RANK, "cel_dist.train", *arguments]
        command = [sys.executable, "-c", TOP, how, sys.executable, "-c", NODE, "--module", *rank]
        environment = {name: value for name, value in os.environ.items() if name != LAUNCH}
        self.process = subprocess.Popen(
            command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.launch = self.process.stdout.readline().strip()
        assert self.process.stdout.readline() == "up\n"
        self.top = psutil.Process(self.process.pid)
        (self.node,) = self.top.children()
        (self.rank,) = self.node.children()

    def close(self) -> None:
        for process in (self.rank, self.node, self.top):
            if process.is_running():
                process.kill()
        self.process.communicate()


@pytest.fixture
def tree():
    """Makes trees, nothing of which outlives the test."""
    made = []

    def make(how: str, *arguments: str) -> Tree:
        made.append(Tree(how, *arguments))
        return made[-1]

    yield make
    for each in made:
        each.close()


def test_signals_reach_the_ranks_of_a_launch_and_nothing_else(tree):
    ours, others = tree("here"), tree("here")
    assert ranks_of(ours.launch) == [ours.rank]
    assert processes_of(ours.launch) == [ours.node, ours.rank]
    assert signal_ranks(ours.launch, signal.SIGUSR1) == 1
    assert has_ended(ours.rank)
    # What was in between saw a child end, no signal.
    assert ours.process.wait(timeout=30) == 0
    assert others.rank.is_running()
    end_processes(others.launch, patience_seconds=30)
    assert has_ended(others.rank)
    assert others.process.wait(timeout=30) == 0


@pytest.mark.parametrize(
    ("how", "arguments", "killed"),
    [("here", (), "top"), ("here", (), "node"), ("ssh", (), "top"), ("none", ("--local_rank=0",), "node")],
)
def test_a_rank_ends_with_what_started_it(tree, how, arguments, killed):
    one = tree(how, *arguments)
    getattr(one, killed).kill()
    assert has_ended(one.rank)


def test_a_rank_that_no_launcher_started_stays_and_one_that_comes_too_late_ends(tree):
    one = tree("none")
    one.node.kill()
    assert has_ended(one.node)
    one.process.stdin.write("\n")
    one.process.stdin.flush()
    assert one.process.stdout.readline() == "still there\n"
    late = [sys.executable, "-c", RANK]
    gone = {**os.environ, LAUNCH: f"here:{one.node.pid}:0"}
    done = subprocess.run(late, env=gone, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "error: what started this rank is gone, so it ends; start again with --resume auto\n"


# Runs its arguments as a launcher would be run, and says how that ended.
DRIVER = """
import signal, sys
# A shell that runs the tests in its background has everything below it ignore Ctrl-C.
signal.signal(signal.SIGINT, signal.default_int_handler)
from cel_dist.launcher.process import LaunchProcess
with LaunchProcess(None) as process:
    code = process.run(sys.argv[1:], None)
    print(code, *[request.name for request in process.requests], process.found_no_rank)
"""
# A rank that needs its time for the checkpoint, whatever it is sent meanwhile.
SLOW = """
import signal
from cel_dist.launcher.ranks import end_with_launcher
signal.signal(signal.SIGTERM, signal.SIG_IGN)
# Before there is a second thread, which would have it open, and end the process where this one does not wait yet.
signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})
end_with_launcher()
print("up", flush=True)
while signal.sigwait({signal.SIGUSR1}):
    print("asked", flush=True)
"""


@pytest.mark.parametrize(
    ("name", "signals", "outcome"),
    [
        ("cel_dist.train", [signal.SIGUSR1, signal.SIGTERM], f"{-signal.SIGKILL} SIGUSR1 SIGTERM False\n"),
        ("no rank", [signal.SIGUSR1], f"{-signal.SIGKILL} SIGUSR1 True\n"),
        ("cel_dist.train", [signal.SIGINT], ""),
    ],
    ids=["second signal", "before the ranks", "ctrl-c"],
)
def test_what_does_not_end_when_asked_ends_at_the_second_signal(name, signals, outcome):
    node = [sys.executable, "-c", PATIENT_NODE, "--module", sys.executable, "-c", SLOW, name]
    command = [sys.executable, "-c", DRIVER, *node]
    # To the whole group, as a terminal and some schedulers send them.
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "start_new_session": True}
    process = subprocess.Popen(command, **options)
    assert process.stderr.readline() == "up\n"
    (rank,) = psutil.Process(process.pid).children()[0].children()
    for number in signals:
        os.killpg(process.pid, number)
        if number == signal.SIGUSR1 and name == "cel_dist.train":
            # Behind what the launcher says of the signal.
            assert "asked\n" in iter(process.stderr.readline, "")
    # Less than what ends that are asked for may take.
    said, _ = process.communicate(timeout=20)
    assert said == outcome
    assert has_ended(rank)
