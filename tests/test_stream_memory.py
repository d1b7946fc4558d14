import re
from pathlib import Path

from readers import readers_of
from test_stream import BATCH, plan_of

from cel_dist.data.folder import Access, ShardFolder
from cel_dist.data.stream import SegmentStream


def peak_kib(pid: int) -> int:
    """Peak resident memory of a process so far."""
    return int(re.search(r"VmHWM:\s+(\d+)", Path(f"/proc/{pid}/status").read_text())[1])


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
        peaks.append(peak_kib(reader))
    source.close()
    # The first two epochs open every shard and load every module. One batch is 930 KiB.
    assert peaks[-1] - peaks[1] < 900, peaks
