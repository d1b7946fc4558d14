import itertools
import tracemalloc

import numpy as np
import pytest

from cel_dist.data.index import Index
from cel_dist.data.permutation import KeyedPermutation
from cel_dist.data.plan import Plan
from cel_dist.distributed import World
from cel_dist.errors import CelError

SEGMENT = 100
LENGTHS = np.random.default_rng(0).integers(50, 1000, size=203)


def index_of(lengths, shard_size):
    """An index of which the plan reads lengths and shards alone."""
    lengths = np.asarray(lengths)
    nothing = np.zeros(len(lengths), np.int64)
    unknown = np.full(len(lengths), -1, np.int32)
    shard = (np.arange(len(lengths)) // shard_size).astype(np.int32)
    return Index(shard, nothing, nothing, lengths, unknown, np.zeros(0, np.str_))


def plan(short="drop", batch_size=16, seed=3, lengths=LENGTHS, shard_size=10, **options):
    index = index_of(lengths, shard_size)
    return Plan(index, segment_samples=SEGMENT, batch_size=batch_size, short=short, seed=seed, **options)


def epoch_ids(plan, epoch):
    return np.concatenate([plan.batch(epoch, step).ids for step in range(plan.steps_per_epoch)])


@pytest.mark.parametrize("window", [1, 3, 100])
@pytest.mark.parametrize("shard_size", [1, 10, 203])
def test_an_epoch_takes_every_usable_utterance_at_most_once(window, shard_size):
    ordered = plan(window=window, shard_size=shard_size)
    for epoch in range(3):
        ids = epoch_ids(ordered, epoch)
        assert len(set(ids.tolist())) == len(ids) == ordered.steps_per_epoch * 16
        assert (LENGTHS[ids] >= 2 * SEGMENT).all()


def test_a_batch_of_one_takes_all_that_is_usable():
    ids = epoch_ids(plan(batch_size=1), 0)
    assert sorted(ids.tolist()) == plan().usable().tolist() == np.flatnonzero(LENGTHS >= 2 * SEGMENT).tolist()


def test_wrapping_fills_the_last_batch_from_the_beginning_of_the_epoch():
    dropped, wrapped = plan(), plan(remainder="wrap")
    missing = 16 * wrapped.steps_per_epoch - len(wrapped)
    assert 0 < missing < 16
    ids = epoch_ids(wrapped, 1)
    assert ids[: 16 * dropped.steps_per_epoch].tolist() == epoch_ids(dropped, 1).tolist()
    assert sorted(ids[: len(wrapped)].tolist()) == wrapped.usable().tolist()
    assert ids[len(wrapped) :].tolist() == ids[:missing].tolist()
    assert len(set(ids[-16:].tolist())) == 16


def test_an_epoch_goes_through_the_shards_window_by_window():
    ordered = plan(window=3, batch_size=1)
    for epoch in range(2):
        shards = epoch_ids(ordered, epoch) // 10
        windows = ordered.windows(epoch, 0)
        position = 0
        for window in (next(windows) for _ in range(7)):
            count = int(np.isin(ordered.usable() // 10, window).sum())
            assert set(shards[position : position + count].tolist()) <= set(window)
            position += count
        assert position == len(ordered)


def test_the_windows_from_a_step_on_begin_with_the_one_that_the_step_is_in():
    ordered = plan(window=3, batch_size=16)
    for step in range(ordered.steps_per_epoch):
        first = int(ordered.batch(1, step).ids[0]) // 10
        assert first in next(ordered.windows(1, step))
    # The shards of the last window come last, and behind it those of the next epoch.
    last, following = itertools.islice(ordered.windows(1, ordered.steps_per_epoch - 1), 2)
    assert int(ordered.batch(1, ordered.steps_per_epoch - 1).ids[-1]) // 10 in [*last, *following]
    *_, behind = itertools.islice(ordered.windows(1, 0), 8)
    assert behind == next(ordered.windows(2, 0))


def test_a_batch_lies_in_no_more_shards_than_the_plan_says():
    for window, batch_size in ((1, 16), (3, 16), (2, 60)):
        ordered = plan(window=window, batch_size=batch_size)
        for step in range(ordered.steps_per_epoch):
            assert len(set((ordered.batch(0, step).ids // 10).tolist())) <= ordered.max_shards_at_once


def test_the_memory_of_a_plan_does_not_grow_with_the_utterances():
    lengths = np.broadcast_to(np.int64(2 * SEGMENT), 10_000_000)
    index = Index(*(np.broadcast_to(np.int32(0), len(lengths)),) * 3, lengths, lengths, np.zeros(0, np.str_))
    tracemalloc.start()
    ordered = Plan(index, segment_samples=SEGMENT, batch_size=1000, short="overlap", seed=0)
    tracemalloc.reset_peak()
    before = tracemalloc.get_traced_memory()[0]
    ids = [ordered.batch(0, step).ids for step in (0, 1, ordered.steps_per_epoch - 1)]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(set(np.concatenate(ids).tolist())) == 3000
    assert peak - before < 2 << 20


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
def test_the_rows_of_the_ranks_make_up_the_global_batch(size):
    rows = np.arange(16)
    assert np.concatenate([rows[World(rank, size).rows(16)] for rank in range(size)]).tolist() == rows.tolist()


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


@pytest.mark.parametrize("size", [1, 2, 3, 5, 16, 17, 1000, 4097])
def test_a_keyed_permutation_is_one(size):
    shuffled = KeyedPermutation(size, np.random.default_rng(size))(np.arange(size))
    assert sorted(shuffled.tolist()) == list(range(size))
    again = KeyedPermutation(size, np.random.default_rng(size))
    assert [int(again(np.array([place]))[0]) for place in range(min(size, 20))] == shuffled[:20].tolist()


@pytest.mark.parametrize("size", [3, 5, 12])
def test_keyed_permutations_send_places_everywhere_alike(size):
    # Where two places go, over many keys: each of the size (size - 1) outcomes equally often, by a chi-squared test.
    rng, draws = np.random.default_rng(0), 400 * size
    counts = np.zeros((size, size))
    for _ in range(draws):
        first, second = KeyedPermutation(size, rng)(np.array([0, size - 1]))
        counts[first, second] += 1
    expected = draws / (size * (size - 1))
    outcomes = counts[~np.eye(size, dtype=bool)]
    chi2 = ((outcomes - expected) ** 2 / expected).sum()
    freedom = len(outcomes) - 1
    assert np.trace(counts) == 0
    assert abs(chi2 - freedom) < 4 * np.sqrt(2 * freedom)


def test_neighbours_do_not_stay_together():
    shuffled = KeyedPermutation(100_000, np.random.default_rng(1))(np.arange(100_000))
    steps = np.abs(np.diff(shuffled))
    # Of random places the mean distance is a third of the range.
    assert abs(steps.mean() - 100_000 / 3) < 500
    assert (steps < 10).mean() < 5e-4
