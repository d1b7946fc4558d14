import os
import re
import time
from pathlib import Path

import pytest
from processes import readers_of
from test_stream import BATCH, SEGMENT, plan_of

from cel_dist.data.folder import Access, ShardFolder
from cel_dist.data.stream import SegmentStream

BATCH_BYTES = BATCH * 2 * 2 * SEGMENT


def peak_bytes(pid: int) -> int:
    """Peak resident memory of a process so far."""
    return 1024 * int(re.search(r"VmHWM:\s+(\d+)", Path(f"/proc/{pid}/status").read_text())[1])


def offered(pid: int) -> int:
    """Number of batches that a reader has put into shared memory and nobody has taken: three tensors each."""
    links = [os.readlink(link) for link in Path(f"/proc/{pid}/fd").iterdir() if link.is_symlink()]
    return sum("/torch_" in link for link in links) // 3


def test_the_peak_memory_of_a_reader_does_not_grow_over_ten_epochs(small_corpus, tmp_path):
    # Through the cache, which has more to forget than local shards.
    shards = ShardFolder.open(small_corpus.shards.as_uri(), Access(cache=tmp_path / "cache"))
    plan = plan_of(shards)
    source = SegmentStream(shards, plan, slice(0, BATCH), 1, prefetch_bytes=0)
    peaks = []
    for _ in range(12):
        for _ in range(plan.steps_per_epoch):
            next(source)
        (reader,) = readers_of()
        peaks.append(peak_bytes(reader))
    source.close()
    # The first two epochs open every shard and load every module.
    assert peaks[-1] - peaks[1] < BATCH_BYTES, peaks


@pytest.mark.parametrize("num_batches", [2, 6])
def test_a_reader_reads_ahead_as_many_bytes_as_it_may(small_corpus, num_batches):
    shards = ShardFolder.open(small_corpus.shards)
    prefetch = num_batches * BATCH_BYTES
    source = SegmentStream(shards, plan_of(shards), slice(0, BATCH), 1, prefetch_bytes=prefetch)
    try:
        next(source)
        (reader,) = readers_of()
        deadline = time.monotonic() + 10
        while offered(reader) < num_batches and time.monotonic() < deadline:
            time.sleep(0.01)
        # There it stays; the one that was just taken may not be let go yet.
        time.sleep(0.3)
        assert num_batches <= offered(reader) <= num_batches + 1
    finally:
        source.close()
