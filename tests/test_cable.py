"""The cable between two hosts, cut while they train."""

import re
import subprocess
import threading
import time

import psutil
import pytest
from hosts import two_hosts
from training_runs import CEL, losses, records, train_job, write_config
from worlds import run_world

# More than it takes before the cable is cut for good.
STEPS = 100_000


@pytest.fixture
def hosts(tmp_path):
    with two_hosts(tmp_path / "hosts") as hosts:
        yield hosts


class Training:
    """`cel train` on the first host, with a rank on each."""

    def __init__(self, hosts, arguments):
        command = [*CEL, "train", *arguments]
        self.process = hosts.start(0, command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL)
        self.lines = []
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self):
        self.lines.extend(self.process.stderr)

    @property
    def said(self):
        return "".join(self.lines)

    def wait_for_step(self, run, step):
        while not (run / "metrics.jsonl").exists() or len(records(run)) < step:
            assert self.process.poll() is None, self.said[-5000:]
            time.sleep(0.05)

    def end(self):
        code = self.process.wait(timeout=120)
        self._reader.join()
        return code


def test_a_cut_of_two_seconds_costs_nothing_and_one_for_good_ends_all_and_loses_nothing(hosts, small_corpus, tmp_path):
    file = write_config(
        small_corpus,
        tmp_path,
        data={"segment_frames": 16},
        augment={"profile": 0},
        encoder={"embedding_dim": 16},
        train={"max_steps": STEPS, "epochs": STEPS},
        checkpoint={"every_steps": 20},
    )
    run, hostfile = tmp_path / "run", tmp_path / "hostfile"
    hostfile.write_text("".join(f"{address} slots=1\n" for address in hosts.addresses))
    arguments = [file, "--hostfile", hostfile]
    training = Training(hosts, arguments)
    training.wait_for_step(run, 3)
    hosts.cut()
    time.sleep(2)
    before = len(records(run))
    hosts.mend()
    training.wait_for_step(run, before + 5)

    of_the_run = [
        process for host in (0, 1) for process in map(psutil.Process, hosts.processes(host)) if is_ours(process)
    ]
    assert len([process for process in of_the_run if "cel_dist.train" in process.cmdline()]) >= 2
    hosts.cut()
    begin = time.monotonic()
    # Waited for as what it is, a child: its exit code is given to one alone.
    others = [process for process in of_the_run if process.pid != training.process.pid]
    _, left = psutil.wait_procs(others, timeout=60)
    assert not left, f"{[process.cmdline() for process in left]}\n{training.said[-5000:]}"
    assert training.end() == 1
    seconds = time.monotonic() - begin
    assert seconds < 60
    print(f"all {len(of_the_run)} processes ended {seconds:.1f} s after the cut")
    (line,) = re.findall(r"^.*error: rank 1 on .* not heard of for .*$", training.said, re.MULTILINE)
    assert hosts.addresses[1] in line
    assert "goes on from the last checkpoint" in line

    # Nobody holds the run folder any more, and nothing is missing from it; on one host, which starts sooner.
    steps = len(records(run)) + 5
    for outcome in run_world(2, train_job, file, [f"train.max_steps={steps}"], folder=tmp_path / "world"):
        assert outcome["steps"] == steps, outcome
    assert list(losses(run)) == list(range(1, steps + 1))


def is_ours(process):
    """Not the servers of ssh, which were there before."""
    return not process.name().startswith("sshd")
