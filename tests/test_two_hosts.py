"""Training over two hosts, which are network namespaces joined by a cable, as a user starts it there."""

import shlex
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import yaml
from hosts import two_hosts
from training_runs import CEL, copy_of_scripts, losses, train_job, write_config
from worlds import run_world

STEPS = 3


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("two_hosts")


@pytest.fixture(scope="module")
def config(small_corpus, folder) -> Path:
    """Three steps of two ranks, a checkpoint after each."""
    return write_config(
        small_corpus,
        folder,
        data={"segment_frames": 16},
        augment={"profile": 1},
        encoder={"embedding_dim": 16},
        train={"max_steps": STEPS},
        checkpoint={"every_steps": 1},
    )


@pytest.fixture(scope="module")
def on_one_host(config, folder) -> Path:
    """The run folder of the same training by two ranks of one host."""
    run = folder / "one"
    run_world(2, train_job, config, [f"run.dir={run}"], folder=folder / "world")
    return run


@pytest.fixture(scope="module")
def hosts(folder):
    with two_hosts(folder / "hosts") as hosts:
        yield hosts


@pytest.fixture(scope="module")
def hostfile(hosts, folder) -> Path:
    file = folder / "hostfile"
    file.write_text("".join(f"{address} slots=1\n" for address in hosts.addresses))
    return file


def test_ssh_reaches_both_and_a_lost_connection_costs_a_restart(hosts, hostfile, config, on_one_host, folder):
    run, strange = folder / "ssh", "it's 100%h of `id` $HOME"
    options = ["--hostfile", hostfile, "--max-restarts", "1", f"run.dir={run}", f"run.name={strange}"]
    process = hosts.start(0, [*CEL, "train", config, *options], stderr=subprocess.PIPE, stdout=subprocess.DEVNULL)
    said = []
    for line in process.stderr:
        said.append(line)
        if "from step 0 to" in line and not any("restart 1" in former for former in said):
            # The server's end of the connection to the second host.
            (server,) = [psutil.Process(pid) for pid in hosts.processes(1) if is_session(pid)]
            far = server.children(recursive=True)
            server.kill()
            # What it started there does not go on by itself.
            assert psutil.wait_procs(far, timeout=30)[1] == []
    assert process.wait() == 0, "".join(said)[-5000:]
    assert "ssh could not reach a node, or lost it; restart 1 of 1" in "".join(said)
    assert losses(run) == losses(on_one_host)
    assert yaml.safe_load((run / "config.yaml").read_text())["run"]["name"] == strange
    # It held the variables of the nodes.
    assert not (run / ".environment").exists()


def is_session(pid: int) -> bool:
    return "notty" in " ".join(psutil.Process(pid).cmdline())


def test_without_ssh_each_host_starts_its_own(hosts, hostfile, config, on_one_host, folder):
    run = folder / "no_ssh"
    script = copy_of_scripts(folder / "checkout") / "launch" / "multinode.sh"
    command = [script, hostfile, config, f"run.dir={run}"]
    ends = [hosts.start(host, command, environment={"NODE_RANK": str(host)}, stderr=subprocess.PIPE) for host in (1, 0)]
    said = [process.communicate()[1] for process in ends]
    assert [process.returncode for process in ends] == [0, 0], said
    assert losses(run) == losses(on_one_host)


# Starts a rank through ssh, as `cel train` does with the launcher between them.
DRIVER = """
import sys
from pathlib import Path
from cel_dist.launcher.process import LaunchProcess
with LaunchProcess(sys.argv[1]) as process:
    print(process.run(sys.argv[3:], Path(sys.argv[2])), *[request.name for request in process.requests])
"""
RANK = """
import signal, sys
signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})
print("up", flush=True)
signal.sigwait({signal.SIGUSR1})
sys.exit(75)
"""


def test_a_signal_reaches_the_ranks_behind_ssh(hosts, folder):
    variables, address = folder / "signals" / ".environment", hosts.addresses[1]
    rank = f"source {variables} && exec {shlex.join([sys.executable, '-c', RANK, 'cel_dist.train'])}"
    command = [sys.executable, "-c", DRIVER, address, variables, "ssh", address, rank]
    process = hosts.start(0, command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stderr.readline() == "up\n"
    process.send_signal(signal.SIGUSR1)
    assert process.communicate()[0] == "75 SIGUSR1\n"
    assert not variables.exists()


def test_a_host_that_cannot_be_reached_is_named(hosts, hostfile, config, folder):
    hosts.cut()
    command = [*CEL, "train", config, "--hostfile", hostfile, f"run.dir={folder / 'cut'}"]
    wait = "import sys; from cel_dist.launcher.nodes import wait_until_reachable as w; w(sys.argv[1:], lambda: False)"
    try:
        process = hosts.start(0, command, stderr=subprocess.PIPE)
        message = process.communicate()[1]
        # A restart waits for it.
        waiting = hosts.start(0, [sys.executable, "-c", wait, *hosts.addresses], stderr=subprocess.PIPE)
        assert waiting.stderr.readline().startswith("waiting at most 600 s for what is lost: ")
    finally:
        hosts.mend()
    assert waiting.communicate()[1] == ""
    assert waiting.returncode == 0
    assert process.returncode == 2
    assert message.startswith("error: cannot start on all nodes through ssh (")
    assert hosts.addresses[1] in message
    assert message.count("\n") == 1
    assert not (folder / "cut").exists()
