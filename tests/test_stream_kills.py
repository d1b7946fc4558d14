"""Whatever is killed at whatever moment: the next start of a job goes on exactly."""

import itertools
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
from processes import readers_of
from stores import nginx
from streaming_job import lines

from cel_dist.data.prepare import prepare

BATCHES = 200


def downloader_of(cache: Path) -> int | None:
    """The process that holds the lock of a cache."""
    try:
        inode = os.stat(cache / "lock").st_ino
    except FileNotFoundError:
        return None
    for line in Path("/proc/locks").read_text().splitlines():
        words = line.split()
        if words[1] == "FLOCK" and int(words[5].rpartition(":")[2]) == inode:
            return int(words[4])
    return None


def victim(job: subprocess.Popen, cache: Path, kind: str) -> int:
    """A process of the job to kill, as soon as there is one of this kind."""
    while job.poll() is None:
        if kind == "reader" and (readers := readers_of(job.pid)):
            return readers[-1]
        downloader = downloader_of(cache)
        if kind == "downloader" and downloader is not None and psutil.Process(downloader).parents():
            return downloader
        time.sleep(0.01)
    raise AssertionError(f"no {kind}: {job.stderr.read()}")


# Without reader processes the job downloads for itself, at any moment. With them, it starts in seconds.
KILLS = [(0, "job")] * 15 + [(2, "reader"), (2, "downloader"), (2, "job")] * 2


def test_twenty_kills_lose_nothing_and_repeat_nothing(small_corpus, tmp_path):
    shards = tmp_path / "shards"
    prepare(small_corpus.audio, shards, samples_per_shard=5, workers=1)
    expected = list(itertools.islice(lines(shards, tmp_path), BATCHES))
    log, cache = tmp_path / "log", tmp_path / "cache"
    log.touch()
    rng = random.Random(0)
    assert len(KILLS) > 20
    # So slow that downloads are on their way most of the time.
    with nginx(shards, tmp_path / "nginx", "limit_rate 300k;") as server:
        program = Path(__file__).with_name("streaming_job.py")
        # The last start is left to read to the end.
        for workers, kind in [*KILLS, (1, None)]:
            command = [sys.executable, program, server.url, cache, workers, log, BATCHES]
            job = subprocess.Popen([str(part) for part in command], stderr=subprocess.PIPE, text=True)
            try:
                pid = None
                if kind == "job":
                    time.sleep(rng.uniform(0.4, 1.6) + 2.0 * workers)
                    pid = job.pid
                elif kind:
                    pid = victim(job, cache, kind)
                    time.sleep(rng.uniform(0.0, 0.3))
                if pid:
                    os.kill(pid, signal.SIGKILL)
                _, errors = job.communicate(timeout=60)
                expected_code = {None: 0, job.pid: -signal.SIGKILL}.get(pid, 1)
                assert job.returncode == expected_code, errors
                # A job that lost a reader names it.
                assert expected_code != 1 or f"reader process {pid} " in errors, errors
            finally:
                job.kill()
                job.wait()
            done = log.read_text().splitlines(keepends=True)
            assert done == expected[: len(done)]
            # What was fetched goes now and then, so that there is more to fetch.
            for path in list(cache.glob("*.tar"))[: rng.randrange(4)]:
                path.unlink()
    assert done == expected
