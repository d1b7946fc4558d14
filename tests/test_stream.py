import json
import os
import shutil
import tarfile

import pytest
import soundfile
import torch

from cel_dist.data.plan import Plan
from cel_dist.data.shards import ShardFolder
from cel_dist.data.stream import SegmentStream
from cel_dist.distributed import World
from cel_dist.errors import CelError, RunError

SEGMENT = 29_040
BATCH = 8


def stream(folder, *, rank=0, size=1, workers=0, segment=SEGMENT, short="drop"):
    shards = ShardFolder.open(folder)
    plan = Plan(shards.index.samples, segment_samples=segment, batch_size=BATCH, short=short, seed=5)
    return SegmentStream(shards, plan, World(rank, size).rows(BATCH), workers)


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
    plan = Plan(shards.index.samples, segment_samples=SEGMENT, batch_size=BATCH, short="drop", seed=5)
    batch, planned = next(source), plan.batch(0, 0)
    for row in range(BATCH):
        audio = originals[int(batch.ids[row])]
        for view, start in enumerate(planned.starts[row]):
            assert (batch.segments[row, view].numpy() == audio[start : start + SEGMENT]).all()


@pytest.mark.parametrize("workers", [1, 2])
def test_any_number_of_workers_gives_the_same_batches(small_corpus, workers):
    expected = take(stream(small_corpus.shards), 7)
    source = stream(small_corpus.shards, workers=workers)
    assert all(same(one, other) for one, other in zip(expected, take(source, 7), strict=True))
    source.close()


@pytest.mark.parametrize("size", [2, 4])
def test_ranks_share_out_the_same_global_batches(small_corpus, size):
    whole = take(stream(small_corpus.shards), 6)
    ranks = [take(stream(small_corpus.shards, rank=rank, size=size), 6) for rank in range(size)]
    for step, batch in enumerate(whole):
        parts = [rank[step] for rank in ranks]
        assert torch.equal(torch.cat([part.segments for part in parts]), batch.segments)
        assert {(part.epoch, part.step) for part in parts} == {(batch.epoch, batch.step)}


@pytest.mark.parametrize("workers", [0, 2])
def test_a_restored_stream_continues_exactly(small_corpus, workers):
    first = stream(small_corpus.shards)
    take(first, 4)
    state = first.state_dict()
    assert state == {"epoch": 0, "step": 4}
    resumed = stream(small_corpus.shards, workers=workers)
    resumed.load_state_dict(state)
    assert all(same(one, other) for one, other in zip(take(first, 4), take(resumed, 4), strict=True))
    resumed.close()


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
    plan = Plan(shards.index.samples, segment_samples=long_segment, batch_size=BATCH, short="repeat", seed=5)
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


@pytest.mark.parametrize("workers", [0, 1])
def test_damaged_audio_stops_the_stream_with_one_line_that_names_the_shard(small_corpus, tmp_path, workers):
    folder = copy(small_corpus, tmp_path)
    index = ShardFolder.open(folder).index
    for tar in folder.glob("*.tar"):
        number = sorted(folder.glob("*.tar")).index(tar)
        with tar.open("r+b") as file:
            for offset in index.offset[index.shard == number]:
                file.seek(int(offset))
                file.write(b"\0" * 44)
    with pytest.raises(RunError, match=r"shard .*tar: the audio at byte \d+ cannot be read") as failure:
        next(stream(folder, workers=workers))
    assert "\n" not in str(failure.value)


def test_a_shard_that_disappears_during_training_is_named(small_corpus, tmp_path):
    folder = copy(small_corpus, tmp_path)
    source = stream(folder)
    for tar in folder.glob("*.tar"):
        tar.unlink()
    with pytest.raises(RunError, match="cel check"):
        next(source)
