"""Whatever is killed at whatever moment: the next start of a job goes on exactly."""

import itertools
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

from readers import readers_of
from stores import nginx
from streaming_job import line_of, open_stream

from cel_dist.data.prepare import prepare

KILLS = 21
BATCHES = 300


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
    """A process to kill; the job itself where there is no such one at the moment."""
    if kind == "downloader":
        return downloader_of(cache) or job.pid
    readers = readers_of(job.pid)
    return readers[-1] if kind == "reader" and readers else job.pid


def test_twenty_kills_lose_nothing_and_repeat_nothing(small_corpus, tmp_path):
    shards = tmp_path / "shards"
    prepare(small_corpus.audio, shards, samples_per_shard=5, workers=1)
    expected = [line_of(batch) for batch in itertools.islice(open_stream(shards, tmp_path, 0), BATCHES)]
    log, cache = tmp_path / "log", tmp_path / "cache"
    log.touch()
    rng = random.Random(0)
    killed = {"job": 0, "reader": 0, "downloader": 0}
    # So slow that downloads are on their way most of the time.
    with nginx(shards, tmp_path / "nginx", "limit_rate 1500k;") as server:
        program = Path(__file__).with_name("streaming_job.py")
        # The last start is left to read to the end.
        for number in range(KILLS + 1):
            workers = (0, 1, 2)[number % 3]
            command = [sys.executable, program, server.url, cache, workers, log, BATCHES]
            job = subprocess.Popen([str(part) for part in command], stderr=subprocess.PIPE, text=True)
            try:
                if number < KILLS:
                    kind = rng.choice(list(killed))
                    time.sleep(rng.uniform(1.0, 4.0))
                    pid = victim(job, cache, kind)
                    os.kill(pid, signal.SIGKILL)
                    killed["job" if pid == job.pid else kind] += 1
                    _, errors = job.communicate(timeout=10)
                    # A job that lost a reader says so.
                    assert pid == job.pid or (job.returncode == 1 and f"{pid}" in errors), errors
                else:
                    _, errors = job.communicate(timeout=60)
                    assert job.returncode == 0, errors
            finally:
                job.kill()
                job.wait()
            done = log.read_text().splitlines(keepends=True)
            assert done == expected[: len(done)]
    assert done == expected
    assert min(killed.values()) > 0
