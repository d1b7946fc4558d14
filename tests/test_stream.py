import json
import os
import shutil
import signal
import tarfile
import time

import psutil
import pytest
import soundfile
import torch
from processes import readers_of

from cel_dist.data.folder import Access, ShardFolder
from cel_dist.data.plan import Plan
from cel_dist.data.stream import SegmentStream
from cel_dist.distributed import World
from cel_dist.errors import CelError, RunError

SEGMENT = 29_040
BATCH = 8


def plan_of(shards, *, segment=SEGMENT, short="drop", window=2):
    return Plan(shards.index, segment_samples=segment, batch_size=BATCH, short=short, seed=5, window=window)


def stream(folder, *, rank=0, size=1, workers=0, access=None, max_fault_rate=0.0, **planned):
    shards = ShardFolder.open(folder, access)
    rows = World(rank, size).rows(BATCH)
    return SegmentStream(shards, plan_of(shards, **planned), rows, workers, max_fault_rate=max_fault_rate)


def take(source, count):
    return [next(source) for _ in range(count)]


def same(one, other):
    return (
        (one.epoch, one.step) == (other.epoch, other.step)
        and torch.equal(one.ids, other.ids)
        and torch.equal(one.segments, other.segments)
    )


def test_segments_are_the_samples_of_the_files(small_corpus):
    originals = {}
    for tar in sorted(small_corpus.shards.glob("*.tar")):
        with tarfile.open(tar) as archive:
            for member in archive:
                if member.name.endswith(".json"):
                    path = json.load(archive.extractfile(member))["path"]
                    originals[len(originals)] = soundfile.read(small_corpus.audio / path, dtype="int16")[0]
    source = stream(small_corpus.shards)
    shards = ShardFolder.open(small_corpus.shards)
    plan = plan_of(shards)
    batch, planned = next(source), plan.batch(0, 0)
    for row in range(BATCH):
        audio = originals[int(batch.ids[row])]
        for view, start in enumerate(planned.starts[row]):
            assert (batch.segments[row, view].numpy() == audio[start : start + SEGMENT]).all()


@pytest.mark.parametrize("workers", [0, 1, 2])
@pytest.mark.parametrize("size", [1, 2, 4])
def test_ranks_and_workers_share_out_the_same_global_batches(small_corpus, size, workers):
    expected = take(stream(small_corpus.shards), 12)
    sources = [stream(small_corpus.shards, rank=rank, size=size, workers=workers) for rank in range(size)]
    for batch in expected:
        parts = [next(source) for source in sources]
        assert torch.equal(torch.cat([part.segments for part in parts]), batch.segments)
        assert torch.equal(torch.cat([part.ids for part in parts]), batch.ids)
        assert {(part.epoch, part.step) for part in parts} == {(batch.epoch, batch.step)}
    for source in sources:
        source.close()


def test_a_stream_restored_at_any_step_continues_exactly_with_any_ranks_and_workers(small_corpus):
    whole = stream(small_corpus.shards)
    states, expected = [], []
    for _ in range(11):
        states.append(whole.state_dict())
        expected.append(next(whole))
    for step, state in enumerate(states[:-1]):
        size = (1, 2, 4)[step % 3]
        parts = []
        for rank in range(size):
            # Worker processes take seconds to start: at two of the steps is enough.
            resumed = stream(small_corpus.shards, rank=rank, size=size, workers=2 if step in (3, 6) else 0)
            resumed.load_state_dict(state)
            parts.append(take(resumed, 2))
            resumed.close()
        for number in range(2):
            joined = torch.cat([part[number].segments for part in parts])
            assert torch.equal(joined, expected[step + number].segments)


def test_epochs_follow_each_other_with_another_order(small_corpus):
    source = stream(small_corpus.shards)
    batches = take(source, 10)
    assert [(batch.epoch, batch.step) for batch in batches] == [(epoch, step) for epoch in (0, 1) for step in range(5)]
    first, second = (torch.cat([batch.ids for batch in batches[part : part + 5]]) for part in (0, 5))
    assert sorted(first.tolist()) == sorted(second.tolist())
    assert not torch.equal(first, second)


def test_a_short_utterance_is_repeated_to_make_room(small_corpus):
    shards = ShardFolder.open(small_corpus.shards)
    long_segment = int(shards.index.samples.max())
    source = stream(small_corpus.shards, segment=long_segment, short="repeat")
    plan = plan_of(shards, segment=long_segment, short="repeat")
    batch, planned = next(source), plan.batch(0, 0)
    for row in range(BATCH):
        period = int(shards.index.samples[batch.ids[row]])
        segment, start = batch.segments[row, 0].numpy(), int(planned.starts[row, 0])
        assert (segment[: long_segment - period] == segment[period:]).all()
        assert start < 2 * long_segment


def copy(small_corpus, tmp_path):
    return shutil.copytree(small_corpus.shards, tmp_path / "shards")


def test_a_truncated_shard_is_named_before_anything_is_read(small_corpus, tmp_path):
    folder = copy(small_corpus, tmp_path)
    tar = sorted(folder.glob("*.tar"))[1]
    os.truncate(tar, tar.stat().st_size // 2)
    with pytest.raises(CelError, match=rf"{tar.name}.*bytes, the manifest says"):
        stream(folder)


def test_a_manifest_that_does_not_match_is_refused(small_corpus, tmp_path):
    folder = copy(small_corpus, tmp_path)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["samples"] += 1
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(CelError, match="add up to"):
        stream(folder)


def damage(folder, samples):
    """Overwrite the headers of the audio of some samples."""
    shards = ShardFolder.open(folder)
    for sample in samples:
        shard = shards.manifest.shards[shards.index.shard[sample]]
        with (folder / shard.name).open("r+b") as file:
            file.seek(int(shards.index.offset[sample]))
            file.write(b"\0" * 44)


@pytest.mark.parametrize("workers", [0, 1])
def test_damaged_audio_stops_the_stream_with_one_line_that_names_the_sample(small_corpus, tmp_path, workers):
    folder = copy(small_corpus, tmp_path)
    first = int(next(stream(folder)).ids[0])
    damage(folder, [first])
    named = rf"data.max_fault_rate allows 0 of .* shard .*tar, sample {first:09d}: the audio at byte \d+ cannot be read"
    with pytest.raises(RunError, match=named) as failure:
        next(stream(folder, workers=workers))
    assert "\n" not in str(failure.value)


@pytest.mark.parametrize("size", [1, 2, 4])
def test_another_utterance_of_the_batch_takes_the_place_of_an_unreadable_one(small_corpus, tmp_path, size):
    folder = copy(small_corpus, tmp_path)
    whole = next(stream(folder))
    # The last row of a rank's part and the one behind it, which is another rank's.
    damage(folder, whole.ids[[3, 4]].tolist())
    parts = [next(stream(folder, rank=rank, size=size, max_fault_rate=0.5)) for rank in range(size)]
    ids, segments = torch.cat([part.ids for part in parts]), torch.cat([part.segments for part in parts])
    expected = [0, 1, 2, 5, 5, 5, 6, 7]
    assert torch.equal(ids, whole.ids[expected])
    assert torch.equal(segments, whole.segments[expected])
    faults = [fault for part in parts for fault in part.faults]
    assert [fault.key for fault in faults] == [f"{sample:09d}" for sample in whole.ids[[3, 4]].tolist()]


def test_faults_are_counted_anew_in_every_epoch(small_corpus, tmp_path):
    folder = copy(small_corpus, tmp_path)
    first = int(next(stream(folder)).ids[0])
    damage(folder, [first])
    # One of the 40 of an epoch.
    tolerant = take(stream(folder, max_fault_rate=1 / 40), 15)
    assert sum(len(batch.faults) for batch in tolerant) == 3


@pytest.mark.parametrize(("verify", "is_noticed"), [(True, True), (False, False)])
def test_a_flipped_byte_is_noticed_by_its_checksum_if_that_is_asked_for(small_corpus, tmp_path, verify, is_noticed):
    folder = copy(small_corpus, tmp_path)
    shards = ShardFolder.open(folder)
    tar = folder / shards.manifest.shards[0].name
    with tar.open("r+b") as file:
        file.seek(int(shards.index.offset[0]) + 1001)
        byte = file.read(1)
        file.seek(-1, 1)
        file.write(bytes([byte[0] ^ 1]))
    source = stream(folder, access=Access(verify=verify), max_fault_rate=1.0)
    faults = [fault for batch in take(source, 5) for fault in batch.faults]
    # The five steps of an epoch come by all 15 utterances of the shard.
    assert len(faults) == (15 if is_noticed else 0)
    assert all("sha256" in fault.reason and fault.shard == tar.name for fault in faults)


def test_a_shard_that_disappears_during_training_is_named(small_corpus, tmp_path):
    folder = copy(small_corpus, tmp_path)
    source, other = stream(folder, max_fault_rate=1.0), stream(folder)
    gone = sorted(folder.glob("*.tar"))[0]
    gone.unlink()
    faults = [fault for batch in take(source, 5) for fault in batch.faults]
    assert {fault.shard for fault in faults} == {gone.name}
    assert all("no such file" in fault.reason for fault in faults)
    for tar in folder.glob("*.tar"):
        tar.unlink()
    with pytest.raises(RunError, match="cel check"):
        next(other)


def test_a_reader_process_that_dies_is_an_error_within_ten_seconds(small_corpus):
    source = stream(small_corpus.shards, workers=2)
    next(source)
    # A scheduler that wants the job to end signals all its processes; the trainer needs them until it has ended.
    readers = readers_of()
    for process in (psutil.Process(readers[0]).parent(), *map(psutil.Process, readers)):
        process.send_signal(signal.SIGTERM)
        process.send_signal(signal.SIGUSR1)
    take(source, 40)
    assert readers_of() == readers
    dead = readers[-1]
    os.kill(dead, signal.SIGKILL)
    begin = time.monotonic()
    with pytest.raises(RunError, match=rf"reader process {dead} \(exit code -9\) died"):
        take(source, 1000)
    assert time.monotonic() - begin < 10
    source.close()
