"""Ranks that are lost, stand still, fail or never come: who is named, by whom, and that nobody is left behind."""

import itertools
import os
import select
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from forked_ranks import Rank, Ranks

from cel_dist.distributed import free_port

PEER_SECONDS, STEP_SECONDS = 3.0, 2.0


class Job:
    """Ranks that add up numbers, step by step."""

    def __init__(self, ranks: Ranks, folder: Path, places: list[int], size: int, **limits: float) -> None:
        port = str(free_port())
        self.ranks = {
            rank: Rank(
                ranks,
                folder / f"rank {rank}",
                {
                    "RANK": str(rank),
                    "LOCAL_RANK": str(rank),
                    "WORLD_SIZE": str(size),
                    "LOCAL_WORLD_SIZE": str(size),
                    "MASTER_ADDR": "127.0.0.1",
                    "MASTER_PORT": port,
                    "LIMITS": ",".join(f"{name}={value}" for name, value in limits.items()),
                },
            )
            for rank in places
        }

    def errors(self, *ranks: int) -> tuple[list[str], list[int], str]:
        """Lines of the ranks together that begin with `error:`, their exit codes, and all they said."""
        codes = [self.ranks[rank].wait() for rank in ranks]
        said = "".join(self.ranks[rank].errors() for rank in ranks)
        return [line for line in said.splitlines() if line.startswith("error:")], codes, said


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    started = Ranks(Path(__file__).stem)
    yield started
    started.close()


@pytest.fixture
def job(ranks, tmp_path) -> Iterator[Callable[..., Job]]:
    jobs: list[Job] = []

    def start(places=(0, 1, 2), size=3, **limits) -> Job:
        folder = tmp_path / str(len(jobs))
        limits = {"peer": PEER_SECONDS, "step": STEP_SECONDS, "start": 60.0, **limits}
        jobs.append(Job(ranks, folder, list(places), size, **limits))
        return jobs[-1]

    yield start
    for rank in (rank for job in jobs for rank in job.ranks.values()):
        rank.send(signal.SIGKILL)
        rank.wait()


def test_a_killed_rank_is_named_once_and_at_once(job):
    running = job(peer=20.0)
    running.ranks[0].wait_for("step 3")
    running.ranks[2].send(signal.SIGKILL)
    killed = time.monotonic()
    (line,), codes, _ = running.errors(0, 1)
    # Long before a rank that is silent would be missed.
    assert time.monotonic() - killed < 10
    assert codes == [1, 1]
    assert line.startswith("error: rank 2 on ")
    assert "(127.0.0.1) ended without a word, last at " in line
    assert line.endswith("run the same command again: it goes on from the last checkpoint")


def test_rank_0_is_named_by_one_rank_of_each_machine(job):
    running = job(peer=20.0)
    running.ranks[1].wait_for("step 3")
    running.ranks[0].send(signal.SIGKILL)
    (line,), codes, _ = running.errors(1, 2)
    assert codes == [1, 1]
    assert line.startswith("error: rank 0 on ")
    assert "ended without a word" in line


def test_a_rank_that_stands_still_is_missed_and_one_that_paused_is_not(job):
    running = job()
    running.ranks[0].wait_for("step 3")
    stopped = running.ranks[1]
    stopped.send(signal.SIGSTOP)
    # What is tested is that nothing happens meanwhile.
    time.sleep(PEER_SECONDS / 2)
    stopped.send(signal.SIGCONT)
    running.ranks[1].tell("go on")
    running.ranks[1].wait_for("go on")
    stopped.send(signal.SIGSTOP)
    (line,), codes, _ = running.errors(0, 2)
    assert codes == [1, 1]
    assert line.startswith("error: rank 1 on ")
    assert "not heard of for 3 s, last at step " in line
    # It comes back to a job that has ended, and does not say that the others are to blame.
    stopped.send(signal.SIGCONT)
    lines, codes, _ = running.errors(1)
    assert (len(lines), codes) == (0, [1])


def test_a_rank_that_hangs_is_named_with_what_it_does_and_shows_its_stack(job):
    running = job()
    running.ranks[0].wait_for("step 3")
    running.ranks[1].tell("hang")
    (line,), codes, said = running.errors(0, 1, 2)
    assert codes == [1, 1, 1]
    assert line.startswith("error: rank 1 on ")
    assert "did not come on from step " in line
    assert " (waiting for data) for 2 s; the others wait at step " in line
    assert "(adding); rank 1 in test_watchdog.py:" in line
    assert "(hang)" in line
    assert "rank 1 is here:\n" in said


def test_the_timeout_is_long_at_the_first_step_and_where_one_works_for_all_and_short_afterwards(job):
    running = job(start=30.0, step=1.0)
    running.ranks[1].tell("pause for 2.5")
    running.ranks[1].wait_for("pause")
    running.ranks[0].wait_for("step 3")
    running.ranks[0].tell("work alone for 2.5")
    running.ranks[0].wait_for("work alone")
    running.ranks[1].tell("pause for 9")
    (line,), _, _ = running.errors(0, 1, 2)
    assert line.startswith("error: rank 1 on ")


def test_where_no_rank_is_seen_to_be_behind_the_places_of_all_are_said(job):
    running = job(step=1.0)
    running.ranks[0].wait_for("step 3")
    running.ranks[2].tell("hang unseen")
    lines, codes, said = running.errors(0, 1, 2)
    assert codes == [1, 1, 1]
    assert len(lines) == 1
    assert "no rank came on from step " in lines[0]
    assert "rank 2 in test_watchdog.py:" in lines[0]
    assert "(hang)" in lines[0]
    assert said.count("is here:\n") == 3


def test_what_a_rank_says_of_its_own_failure_is_not_buried(job):
    running = job()
    running.ranks[0].wait_for("step 3")
    running.ranks[2].tell("fail")
    lines, codes, said = running.errors(0, 1, 2)
    assert codes == [1, 1, 1]
    assert lines == ["error: the disk of rank 2 is full"]
    assert "Connection closed" not in said


def test_ranks_that_never_join_are_named(job):
    running = job([0, 2], size=4, start=1.0)
    lines, codes, _ = running.errors(0, 2)
    assert codes == [1, 1]
    (line,) = lines
    assert line.startswith("error: ranks 1, 3 of 4 did not join within 1 s (engine.start_timeout_seconds); the others")


def main() -> int:
    """One rank, which does at each step what it read on stdin."""
    import logging

    import torch

    from cel_dist.config import EngineSection
    from cel_dist.distributed import World
    from cel_dist.errors import CelError, RunError
    from cel_dist.process_group import process_group
    from cel_dist.train import _is_said_here

    logging.basicConfig(format="%(message)s")
    torch.set_num_threads(1)
    limits = dict(pair.split("=") for pair in os.environ["LIMITS"].split(","))
    settings = EngineSection(**{f"{name}_timeout_seconds": float(value) for name, value in limits.items()})
    world = World.from_environment()
    try:
        with process_group(world, settings) as (_, watchdog):
            for step in itertools.count(1):
                order, _, seconds = told().partition(" for ")
                watchdog.at(step, "waiting for data")
                if order == "hang":
                    hang()
                elif order == "fail":
                    raise RunError(f"the disk of rank {world.rank} is full")
                elif order == "pause":
                    time.sleep(float(seconds))
                watchdog.at(step, "adding")
                if order == "hang unseen":
                    hang()
                torch.distributed.all_reduce(torch.ones(1))
                watchdog.at(step, "resting", alone=True)
                # Two cores are enough for three ranks that do nothing.
                time.sleep(float(seconds) if order == "work alone" else 0.01)
                torch.distributed.all_reduce(torch.ones(1))
                if order or step == 3:
                    print(order or "step 3", flush=True)
    except (CelError, RunError) as error:
        if _is_said_here(error):
            print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def told() -> str:
    """What stands on stdin by now."""
    return sys.stdin.readline().strip() if select.select([sys.stdin], [], [], 0)[0] else ""


def hang() -> None:
    while True:
        time.sleep(1000)
