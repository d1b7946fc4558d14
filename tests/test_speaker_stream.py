"""Batches of speakers read from real shards: the right samples with any ranks and workers, and what cannot be read."""

import json
import shutil
import tarfile

import numpy as np
import pytest
import soundfile
import torch
from test_stream import damage, take

from cel_dist.data.folder import Access, ShardFolder
from cel_dist.data.prepare import prepare
from cel_dist.data.speaker_plan import SpeakerPlan
from cel_dist.data.stream import SegmentStream
from cel_dist.distributed import World
from cel_dist.errors import CelError, RunError

SEGMENT = 9_600
SPEAKERS = 4


@pytest.fixture(scope="module", params=["wav", "flac"])
def any_shards(request, small_corpus, tmp_path_factory):
    return labelled(small_corpus, tmp_path_factory, request.param)


@pytest.fixture(scope="module")
def shards(small_corpus, tmp_path_factory):
    return labelled(small_corpus, tmp_path_factory, "wav")


def labelled(small_corpus, tmp_path_factory, audio_format):
    """Shards of the small corpus that say who speaks: ten speakers with four utterances each."""
    folder = tmp_path_factory.mktemp("labelled")
    names = sorted(path.relative_to(small_corpus.audio).as_posix() for path in small_corpus.audio.rglob("*.wav"))
    (folder / "labels").write_text("".join(f"{name} {name.partition('/')[0]}\n" for name in names))
    prepare(
        small_corpus.audio,
        folder / "shards",
        labels=folder / "labels",
        audio_format=audio_format,
        samples_per_shard=15,
        workers=1,
    )
    return folder / "shards"


def plan_of(shards, *, utterances=2, segment=SEGMENT, speakers=SPEAKERS, **options):
    return SpeakerPlan(
        shards.index,
        segment_samples=segment,
        speakers_per_batch=speakers,
        utterances_per_speaker=utterances,
        **{"short": "drop", "seed": 5, **options},
    )


def stream(location, *, rank=0, size=1, workers=0, access=None, max_fault_rate=0.0, **planned):
    shards = ShardFolder.open(location, access)
    plan = plan_of(shards, **planned)
    return SegmentStream(shards, plan, World(rank, size).rows(plan.batch_size), workers, max_fault_rate=max_fault_rate)


def originals(small_corpus, folder):
    """Speaker and audio of every place of the index."""
    found = []
    for tar in sorted(folder.glob("*.tar")):
        with tarfile.open(tar) as archive:
            for member in archive:
                if member.name.endswith(".json"):
                    described = json.load(archive.extractfile(member))
                    audio, _ = soundfile.read(small_corpus.audio / described["path"], dtype="int16")
                    found.append((described["speaker"], audio))
    return found


@pytest.mark.parametrize("utterances", [1, 2, 6])
def test_segments_are_the_samples_of_their_speakers_files(small_corpus, any_shards, utterances):
    files, plan = originals(small_corpus, any_shards), plan_of(ShardFolder.open(any_shards), utterances=utterances)
    batch, planned = next(stream(any_shards, utterances=utterances)), plan.batch(0, 0)
    assert batch.segments.shape == (SPEAKERS, utterances, SEGMENT)
    assert (batch.utterances.numpy() == planned.utterances).all()
    for row, view in np.ndindex(SPEAKERS, utterances):
        speaker, audio = files[int(batch.utterances[row, view])]
        start = int(planned.starts[row, view])
        assert plan.class_names[int(batch.ids[row])] == speaker
        assert (batch.segments[row, view].numpy() == audio[start : start + SEGMENT]).all()


def test_a_short_utterance_goes_round(small_corpus, any_shards):
    segment = 100_000
    files, plan = (
        originals(small_corpus, any_shards),
        plan_of(ShardFolder.open(any_shards), segment=segment, short="repeat"),
    )
    batch, planned = next(stream(any_shards, segment=segment, short="repeat")), plan.batch(0, 0)
    for row, view in np.ndindex(SPEAKERS, 2):
        _, audio = files[int(batch.utterances[row, view])]
        endless = np.roll(np.tile(audio, 3), -int(planned.starts[row, view]))
        assert (batch.segments[row, view].numpy() == endless[:segment]).all()


@pytest.mark.parametrize(("size", "workers"), [(1, 2), (2, 0), (4, 0)])
def test_ranks_and_workers_share_out_the_same_batches_of_speakers(shards, size, workers):
    expected = take(stream(shards), 12)
    sources = [stream(shards, rank=rank, size=size, workers=workers) for rank in range(size)]
    for batch in expected:
        parts = [next(source) for source in sources]
        for name in ("ids", "utterances", "segments"):
            assert torch.equal(torch.cat([getattr(part, name) for part in parts]), getattr(batch, name))
    for source in sources:
        source.close()


def test_a_stream_goes_on_at_any_step(shards):
    expected = take(stream(shards), 9)
    for step in (1, 4, 5, 8):
        resumed = stream(shards)
        resumed.load_state_dict({"epoch": step // 5, "step": step % 5})
        assert torch.equal(next(resumed).segments, expected[step].segments)


def copy(shards, tmp_path):
    return shutil.copytree(shards, tmp_path / "shards")


@pytest.mark.parametrize("size", [1, 2, 4])
def test_in_place_of_an_unreadable_utterance_comes_another_of_its_speaker(shards, tmp_path, size):
    folder = copy(shards, tmp_path)
    whole, plan = next(stream(folder, utterances=3)), plan_of(ShardFolder.open(folder), utterances=3)
    bad = [int(whole.utterances[0, 1]), *whole.utterances[2, :2].tolist()]
    damage(folder, bad)
    parts = [next(stream(folder, utterances=3, rank=rank, size=size, max_fault_rate=1.0)) for rank in range(size)]
    ids, utterances, segments = (
        torch.cat([getattr(part, name) for part in parts]) for name in ("ids", "utterances", "segments")
    )
    assert torch.equal(ids, whole.ids)
    expected = whole.utterances.clone()
    expected[0, 1] = whole.utterances[0, 2]
    expected[2, :2] = whole.utterances[2, 2]
    assert torch.equal(utterances, expected)
    readable = torch.tensor([[sample not in bad for sample in row] for row in whole.utterances.tolist()])
    assert torch.equal(segments[readable], whole.segments[readable])
    # What stands in is cut elsewhere: a row does not have the same samples twice.
    for row in segments:
        assert len({view.numpy().tobytes() for view in row}) == 3
    faults = [fault for part in parts for fault in part.faults]
    assert sorted(fault.key for fault in faults) == sorted(f"{sample:09d}" for sample in bad)
    # The others go on as they would have.
    assert (plan.batch(0, 0).utterances == whole.utterances.numpy()).all()


@pytest.mark.parametrize("size", [1, 2, 4])
def test_in_place_of_a_row_that_cannot_be_read_comes_the_next_that_can(shards, tmp_path, size):
    folder = copy(shards, tmp_path)
    whole = next(stream(folder))
    # All of row 1, and the first utterance of the one behind it, which is another rank's.
    damage(folder, [*whole.utterances[1].tolist(), int(whole.utterances[2, 0])])
    parts = [next(stream(folder, rank=rank, size=size, max_fault_rate=1.0)) for rank in range(size)]
    ids, utterances, segments = (
        torch.cat([getattr(part, name) for part in parts]) for name in ("ids", "utterances", "segments")
    )
    assert torch.equal(ids, whole.ids[[0, 2, 2, 3]])
    assert utterances[1:3].tolist() == [[int(whole.utterances[2, 1])] * 2] * 2
    assert torch.equal(segments[1], segments[2])
    assert torch.equal(segments[2, 1], whole.segments[2, 1])
    assert torch.equal(segments[[0, 3]], whole.segments[[0, 3]])
    assert sum(len(part.faults) for part in parts) == 3


def test_faults_are_a_share_of_the_utterances_that_are_drawn(shards, tmp_path):
    folder = copy(shards, tmp_path)
    damage(folder, [0])
    # An epoch draws the 40 utterances once.
    assert sum(len(batch.faults) for batch in take(stream(folder, max_fault_rate=1 / 40), 10)) == 2
    with pytest.raises(RunError, match=r"data.max_fault_rate allows 0 of the 40 of a rank; .*sample 000000000"):
        take(stream(folder), 5)


def test_a_batch_of_which_nothing_can_be_read_ends_the_stream(shards, tmp_path):
    folder = copy(shards, tmp_path)
    damage(folder, range(40))
    with pytest.raises(RunError, match=r"no utterance of epoch 0, step 0 can be read; the last: .*; run 'cel check"):
        next(stream(folder, max_fault_rate=1.0))
    with pytest.raises(RunError, match="no utterance of epoch 0"):
        next(stream(folder, speakers=1, max_fault_rate=1.0))


def test_through_a_cache_the_batches_are_the_same_if_it_holds_all_shards(shards, tmp_path):
    expected = take(stream(shards), 6)
    source = stream(shards.as_uri(), access=Access(cache=tmp_path / "cache"))
    for batch in expected:
        assert torch.equal(next(source).segments, batch.segments)
    too_small = Access(cache=tmp_path / "cache", cache_bytes=1 << 20)
    with pytest.raises(CelError, match=r"no room for the 3 shards .*must hold all: raise it, or copy the shards"):
        stream(shards.as_uri(), access=too_small)
