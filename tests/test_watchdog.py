"""Ranks that are lost, stand still, fail or never come: who is named, by whom, and that nobody is left behind."""

import signal
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from forked_ranks import Rank, Ranks
from torch.distributed import TCPStore
from training_runs import write_config

from cel_dist.distributed import World, free_port
from cel_dist.watch import Limits, Watchdog
from cel_dist.watch.roster import Position, Roster

PEER_SECONDS, STEP_SECONDS = 3.0, 2.0


class Job:
    """Ranks that do `WHAT`; by default they add up numbers, step by step."""

    def __init__(self, ranks: Ranks, folder: Path, places: list[int], size: int, **more: str) -> None:
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
                    **more,
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
    started = Ranks("watched_ranks")
    yield started
    started.close()


@pytest.fixture
def job(ranks, tmp_path) -> Iterator[Callable[..., Job]]:
    jobs: list[Job] = []

    def start(places=(0, 1, 2), size=3, what="add", config="", port="", environment=None, **limits) -> Job:
        limits = {"peer": PEER_SECONDS, "step": STEP_SECONDS, "start": 60.0, **limits}
        environment = {
            "WHAT": what,
            "CONFIG": config,
            "LIMITS": ",".join(f"{name}={value}" for name, value in limits.items()),
            "MASTER_PORT": port or str(free_port()),
            **(environment or {}),
        }
        jobs.append(Job(ranks, tmp_path / "jobs" / str(len(jobs)), list(places), size, **environment))
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
    # What another thread does at the store meanwhile is its own.
    running.ranks[1].tell("store")
    running.ranks[1].wait_for("store")
    running.ranks[0].send(signal.SIGKILL)
    (line,), codes, _ = running.errors(1, 2)
    assert codes == [1, 1]
    assert line.startswith("error: rank 0 on ")
    assert "ended without a word" in line


def test_a_rank_that_stands_still_is_missed_and_one_that_paused_is_not(job):
    # On a machine that is busy it may be slow besides, which is no silence.
    running = job(step=30.0)
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
    assert "(adding); rank 1 in watched_ranks.py:" in line
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


def test_collectives_may_take_a_little_longer_than_the_watchdog_allows():
    allowed = []
    watchdog = Watchdog(World(), Limits(start=1800.0, step=600.0, peer=30.0), on_patience=allowed.append)
    for step in (7, 8, 9):
        watchdog.at(step, "waiting for data")
        watchdog.at(step, "computing")
    assert allowed == [660.0]
    watchdog.at(10, "evaluating", alone=True)
    watchdog.at(10, "waiting for data")
    assert allowed == [660.0, 1860.0, 660.0]


def test_the_timeout_of_all_groups_can_be_changed_while_they_are_in_use(job):
    running = job([0, 1], size=2, what="late")
    for rank in (0, 1):
        running.ranks[rank].wait_for("default group: late and in time")
    running.ranks[0].wait_for("another group: Timed out waiting 500ms for recv operation to complete")


def test_where_no_rank_is_seen_to_be_behind_the_places_of_all_are_said(job):
    running = job(step=1.0)
    running.ranks[0].wait_for("step 3")
    running.ranks[2].tell("hang unseen")
    lines, codes, said = running.errors(0, 1, 2)
    assert codes == [1, 1, 1]
    assert len(lines) == 1
    assert "no rank came on from step " in lines[0]
    assert "rank 2 in watched_ranks.py:" in lines[0]
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


def test_machines_that_are_gone_are_named_with_all_their_ranks():
    limits = Limits(start=1800.0, step=600.0, peer=30.0)
    roster = Roster(range(8), limits, 0.0)
    for rank in range(8):
        roster.came(rank, f"node-{rank // 3}", f"10.0.0.{rank // 3}", 0.0)
    for now in (3.0, 6.0, 30.0, 35.0):
        for rank in (0, 1, 2, *((3, 4, 5) if now < 5 else ()), *((6, 7) if now < 7 else ())):
            roster.beat(rank, Position(2 * now, 117, "computing", False), now)
    assert roster.lost(32.9, asked=False) is None
    finding = roster.lost(33.5, asked=False)
    assert (finding.kind, finding.ranks) == ("lost", (3, 4, 5, 6, 7))
    assert finding.text.startswith(
        "ranks 3-5 on node-1 (10.0.0.1) and ranks 6, 7 on node-2 (10.0.0.2) not heard of for 30 s, last at step 117"
    )
    # A watching process that stood still itself has no reason to complain.
    roster.forgive(10.0)
    assert roster.lost(43.0, asked=False) is None
    # Words are heard before silence.
    roster.failed(6, "the disk is full", 44.0)
    assert roster.lost(44.0, asked=False) is None
    assert roster.lost(44.0, asked=True).text == "rank 6 on node-2 (10.0.0.2) failed: the disk is full"
    assert roster.lost(74.1, asked=False).kind == "failed"


def test_a_connection_that_is_cut_is_made_again_and_strangers_are_not_heard(job):
    running = job([0], what="reconnect")
    lines, codes, said = running.errors(0)
    assert (lines, codes) == ([], [0]), said


def test_a_run_ends_with_exit_code_1_when_a_rank_stops_or_is_killed_and_goes_on(job, small_corpus, tmp_path):
    metrics = tmp_path / "run" / "metrics.jsonl"
    for sent, steps, said in ((signal.SIGSTOP, 3, "not heard of for 3 s"), (signal.SIGKILL, 6, "ended without a word")):
        config = write_config(
            small_corpus,
            tmp_path,
            train={"epochs": 1000},
            engine={"peer_timeout_seconds": PEER_SECONDS},
        )
        running = job([0, 1], size=2, what="train", config=str(config))
        while not metrics.exists() or len(metrics.read_text().splitlines()) < steps:
            assert running.ranks[0].poll() is None, running.ranks[0].errors()
            time.sleep(0.01)
        running.ranks[1].send(sent)
        (line,), codes, log = running.errors(0)
        assert codes == [1]
        assert line.startswith("error: rank 1 on ")
        assert said in line
        assert "Traceback" not in log
        running.ranks[1].send(signal.SIGKILL)
    assert "from step 2 to" in log or "from step 4 to" in log


def test_ranks_that_start_again_at_the_same_store_do_not_take_what_was_said_there_for_an_answer(job):
    # As torchrun serves one.
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    for _ in range(2):
        running = job([0, 1], size=2, port=str(store.port), environment={"TORCHELASTIC_USE_AGENT_STORE": "True"})
        running.ranks[1].wait_for("step 3")
        running.ranks[1].send(signal.SIGKILL)
        (line,), _, _ = running.errors(0)
        assert line.startswith("error: rank 1 on ")


def test_a_port_that_is_in_use_is_bad_input(job):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        running = job([0], port=str(taken.getsockname()[1]))
        lines, codes, _ = running.errors(0)
    assert codes == [2]
    assert lines[0].startswith("error: port 127.0.0.1:")
    assert lines[0].endswith("is in use; choose another one (MASTER_PORT, or --master_port)")


def test_ranks_that_never_join_are_named(job):
    running = job([0, 2], size=4, start=1.0)
    lines, codes, _ = running.errors(0, 2)
    assert codes == [1, 1]
    (line,) = lines
    assert line.startswith("error: ranks 1, 3 of 4 did not join within 1 s (engine.start_timeout_seconds); the others")
