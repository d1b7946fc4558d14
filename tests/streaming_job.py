"""A job for tests that reads a stream to its end, writes a line a batch, and goes on behind its last line."""

import hashlib
import sys
import time
from pathlib import Path

from cel_dist.data.folder import Access, ShardFolder
from cel_dist.data.plan import Plan
from cel_dist.data.stream import SegmentStream
from cel_dist.errors import RunError

BATCH = 8


def open_stream(location, cache, workers):
    shards = ShardFolder.open(location, Access(cache=Path(cache), patience=20.0))
    plan = Plan(shards.index, segment_samples=9_600, batch_size=BATCH, short="drop", seed=1, window=2)
    return SegmentStream(shards, plan, slice(0, BATCH), int(workers))


def line_of(batch):
    content = hashlib.sha256(batch.ids.numpy().tobytes() + batch.segments.numpy().tobytes()).hexdigest()
    return f"{batch.epoch} {batch.step} {content}\n"


def main(location, cache, workers, log, num_batches):
    log = Path(log)
    done = log.read_text().splitlines()
    source = open_stream(location, cache, workers)
    if done:
        epoch, step = map(int, done[-1].split()[:2])
        source.load_state_dict({"epoch": epoch, "step": step})
        next(source)
    with log.open("a") as file:
        for _ in range(len(done), int(num_batches)):
            # One write of a whole line: a killed process leaves all of it or nothing.
            file.write(line_of(next(source)))
            file.flush()
            # As a training step would, so that there is something left to kill.
            time.sleep(0.05)
    source.close()


if __name__ == "__main__":
    try:
        main(*sys.argv[1:])
    except RunError as error:
        sys.exit(f"error: {error}")
