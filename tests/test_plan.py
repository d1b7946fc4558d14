import numpy as np
import pytest

from cel_dist.data.plan import Plan
from cel_dist.distributed import World
from cel_dist.errors import CelError

SEGMENT = 100
LENGTHS = np.random.default_rng(0).integers(50, 1000, size=203)


def plan(short="drop", batch_size=16, seed=3, lengths=LENGTHS):
    return Plan(lengths, segment_samples=SEGMENT, batch_size=batch_size, short=short, seed=seed)


def epoch_ids(plan, epoch):
    return np.concatenate([plan.batch(epoch, step).ids for step in range(plan.steps_per_epoch)])


def test_an_epoch_takes_every_usable_utterance_at_most_once():
    ids = epoch_ids(plan(), 0)
    assert len(set(ids.tolist())) == len(ids) == plan().steps_per_epoch * 16
    assert (LENGTHS[ids] >= 2 * SEGMENT).all()


def test_order_and_segments_are_functions_of_seed_and_epoch_alone():
    first, again = plan(), plan()
    again.batch(4, 1)
    for epoch, step in [(0, 0), (1, 2), (0, 0)]:
        one, other = first.batch(epoch, step), again.batch(epoch, step)
        assert (one.ids == other.ids).all()
        assert (one.starts == other.starts).all()
    assert (epoch_ids(first, 0) != epoch_ids(first, 1)).any()
    assert (epoch_ids(first, 0) != epoch_ids(plan(seed=4), 0)).any()


def test_every_epoch_leaves_out_other_utterances():
    reached = set()
    for epoch in range(20):
        reached |= set(epoch_ids(plan(), epoch).tolist())
    assert len(reached) == len(plan())


@pytest.mark.parametrize("size", [1, 2, 4])
def test_ranks_slice_the_same_global_batch(size):
    whole = plan().batch(2, 3)
    parts = [whole.rows(World(rank, size).rows(16)) for rank in range(size)]
    assert (np.concatenate([part.ids for part in parts]) == whole.ids).all()
    assert (np.concatenate([part.starts for part in parts]) == whole.starts).all()


def test_a_batch_that_does_not_divide_names_the_next_one_that_does():
    with pytest.raises(CelError, match="the next that does is 18"):
        World(0, 3).rows(16)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"LOCAL_WORLD_SIZE": "two"}, "LOCAL_WORLD_SIZE must be numbers.*'two'"),
        ({"LOCAL_SIZE": "x"}, "LOCAL_SIZE must be numbers"),
        ({"RANK": ""}, "must be numbers"),
        ({"LOCAL_RANK": None}, "LOCAL_RANK is not"),
        ({"RANK": "2"}, "RANK=2, WORLD_SIZE=2"),
        ({"LOCAL_WORLD_SIZE": "-1"}, "LOCAL_WORLD_SIZE=-1"),
    ],
)
def test_an_environment_of_no_job_is_refused(change, words):
    environment = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", **change}
    with pytest.raises(CelError, match=words):
        World.from_environment({name: value for name, value in environment.items() if value is not None})


def test_segments_do_not_overlap_lie_inside_and_come_in_both_orders():
    batches = [plan().batch(epoch, step) for epoch in range(5) for step in range(plan().steps_per_epoch)]
    ids = np.concatenate([batch.ids for batch in batches])
    starts = np.concatenate([batch.starts for batch in batches])
    assert starts.min() >= 0
    assert (starts.max(axis=1) + SEGMENT <= LENGTHS[ids]).all()
    assert (abs(starts[:, 0] - starts[:, 1]) >= SEGMENT).all()
    assert 0.4 < (starts[:, 0] < starts[:, 1]).mean() < 0.6


def test_segments_reach_every_place_of_an_utterance():
    one = plan(batch_size=1, lengths=np.array([2 * SEGMENT + 3]))
    places = {tuple(sorted(one.batch(epoch, 0).starts[0].tolist())) for epoch in range(300)}
    assert places == {(a, b + SEGMENT) for a in range(4) for b in range(a, 4)}


def test_overlap_takes_what_holds_one_segment_and_overlaps_no_more_than_it_must():
    lengths = np.array([99, 100, 150, 199, 200] * 10)
    overlapping = plan("overlap", batch_size=40, lengths=lengths)
    assert (len(overlapping), overlapping.num_short, overlapping.num_dropped) == (40, 40, 10)
    batch = overlapping.batch(0, 0)
    assert (batch.starts.min(axis=1) == 0).all()
    assert (batch.starts.max(axis=1) == lengths[batch.ids] - SEGMENT).all()


def test_repeat_takes_everything_and_never_overlaps():
    lengths = np.array([10, 99, 150, 250] * 10)
    repeating = plan("repeat", batch_size=40, lengths=lengths)
    assert (len(repeating), repeating.num_dropped) == (40, 0)
    starts = np.sort(repeating.batch(0, 0).starts, axis=1)
    assert (starts[:, 1] - starts[:, 0] >= SEGMENT).all()


def test_a_batch_larger_than_the_data_says_what_to_do():
    with pytest.raises(CelError, match=r"train.batch_size=300 is larger than the data.*data.short"):
        plan(batch_size=300)


def test_there_is_no_step_behind_the_end_of_an_epoch():
    with pytest.raises(IndexError):
        plan().batch(0, plan().steps_per_epoch)
