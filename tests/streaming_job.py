"""A job for tests that reads batches, writes a line for each, and goes on behind its last line.

With reader processes it is a stream. Without, it is the reader alone, which starts in a moment: no torch.
"""

import hashlib
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from cel_dist.data.folder import Access, ShardFolder
from cel_dist.data.plan import Plan
from cel_dist.data.reader import SegmentReader
from cel_dist.errors import RunError

BATCH = 8


def lines(location, cache, workers=0, begin=(0, 0)) -> Iterator[str]:
    """A line for each batch from a position on, without end."""
    shards = ShardFolder.open(location, Access(cache=Path(cache), patience=20.0))
    plan = Plan(shards.index, segment_samples=9_600, batch_size=BATCH, short="drop", seed=1, window=2)
    position = begin[0] * plan.steps_per_epoch + begin[1]
    if workers == 0:
        reader = SegmentReader(shards, plan)
        while True:
            planned = plan.batch(*divmod(position, plan.steps_per_epoch))
            read = reader.read(planned, slice(0, BATCH))
            yield _line(planned.epoch, planned.step, read.ids, read.segments)
            position += 1
    from cel_dist.data.stream import SegmentStream

    source = SegmentStream(shards, plan, slice(0, BATCH), workers)
    source.load_state_dict({"epoch": begin[0], "step": begin[1]})
    for batch in source:
        yield _line(batch.epoch, batch.step, batch.ids.numpy(), batch.segments.numpy())


def _line(epoch, step, ids, segments):
    return f"{epoch} {step} {hashlib.sha256(ids.tobytes() + segments.tobytes()).hexdigest()}\n"


def main(location, cache, workers, log, num_batches):
    log = Path(log)
    done = log.read_text().splitlines()
    begin = tuple(map(int, done[-1].split()[:2])) if done else (0, 0)
    coming = lines(location, cache, int(workers), begin)
    if done:
        next(coming)
    with log.open("a") as file:
        for _ in range(len(done), int(num_batches)):
            # One write of a whole line: a killed process leaves all of it or nothing.
            file.write(next(coming))
            file.flush()
            # As a training step would, so that there is something left to kill.
            time.sleep(0.05)


if __name__ == "__main__":
    try:
        main(*sys.argv[1:])
    except RunError as error:
        sys.exit(f"error: {error}")
