import itertools
import pickle
import tracemalloc

import numpy as np
import pytest

from cel_dist.data.index import Index
from cel_dist.data.speaker_plan import SpeakerPlan
from cel_dist.errors import CelError

SEGMENT = 100
# Of 14 speakers: how many utterances each has.
COUNTS = [1, 2, 3, 5, 5, 6, 7, 8, 8, 9, 10, 12, 20, 30]


def index_of(speakers, lengths=None, shard_size=10):
    """An index of which the plan reads lengths, shards and speakers; -1 is unknown."""
    speakers = np.asarray(speakers, np.int32)
    nothing = np.zeros(len(speakers), np.int64)
    lengths = np.full(len(speakers), 3 * SEGMENT) if lengths is None else np.asarray(lengths)
    names = np.array([f"id{code:03d}" for code in range(speakers.max(initial=-1) + 1)], np.str_)
    return Index((np.arange(len(speakers)) // shard_size).astype(np.int32), nothing, nothing, lengths, speakers, names)


def spoken(counts, seed=0):
    """Speakers that talk so often, in a random order."""
    return np.random.default_rng(seed).permutation(np.repeat(np.arange(len(counts)), counts))


def plan_of(index, speakers=5, utterances=2, seed=3, short="drop", **options):
    return SpeakerPlan(
        index,
        segment_samples=SEGMENT,
        speakers_per_batch=speakers,
        utterances_per_speaker=utterances,
        short=short,
        seed=seed,
        **options,
    )


def plan(counts=COUNTS, speakers=5, utterances=2, **options):
    return plan_of(index_of(spoken(counts)), speakers, utterances, **options)


def epoch_of(ordered, epoch):
    return [ordered.batch(epoch, step) for step in range(ordered.steps_per_epoch)]


def random_options(number):
    """A corpus and options drawn by a number: few and many speakers, that talk about alike or not at all alike."""
    rng = np.random.default_rng(number)
    counts = np.ceil(rng.lognormal(rng.uniform(0, 3), rng.uniform(0, 2), size=rng.integers(3, 40))).astype(int)
    options = {
        "speakers": int(rng.integers(2, len(counts) + 1)),
        "utterances": int(rng.integers(1, 6)),
        "max_segments": int(rng.integers(6, 60)),
        "remainder": ["drop", "wrap"][number % 2],
        "seed": number,
    }
    return np.minimum(counts, 300), options


@pytest.mark.parametrize("number", range(24))
def test_no_batch_of_any_corpus_holds_a_speaker_twice(number):
    counts, options = random_options(number)
    index = index_of(spoken(counts, number))
    ordered = plan_of(index, **options)
    utterances, steps = options["utterances"], ordered.steps_per_epoch
    groups = np.minimum(-(-counts // utterances), options["max_segments"] // utterances)
    for epoch in range(2):
        dealt = np.zeros(len(counts), int)
        for batch in epoch_of(ordered, epoch):
            assert batch.ids.shape == (options["speakers"],)
            assert batch.utterances.shape == batch.starts.shape == (options["speakers"], options["utterances"])
            assert len(set(batch.ids.tolist())) == options["speakers"]
            assert (index.speaker[batch.utterances] == batch.ids[:, None]).all()
            dealt[batch.ids] += 1
        assert ordered.num_left_out == utterances * (groups.sum() - np.minimum(groups, dealt).sum())
        if options["remainder"] == "drop":
            assert (dealt <= groups).all()
            # One batch more would lack a speaker.
            assert np.minimum(groups, steps + 1).sum() < (steps + 1) * options["speakers"]
        else:
            assert (dealt <= groups + 1).all()
            assert (dealt >= np.minimum(groups, steps)).all()


@pytest.mark.parametrize("number", range(12))
def test_a_row_repeats_an_utterance_only_where_its_speaker_has_too_few(number):
    counts, options = random_options(number)
    ordered = plan_of(index_of(spoken(counts, number)), **options)
    for batch in epoch_of(ordered, 0):
        different = [len(set(row)) for row in batch.utterances.tolist()]
        assert different == np.minimum(counts[batch.ids], options["utterances"]).tolist()


def test_an_epoch_takes_what_it_can_of_each_speaker():
    # Nobody talks more than there are batches, and all groups find a place.
    counts = [4, 4, 6, 6, 6, 8, 8, 8]
    ordered = plan(counts, speakers=5)
    assert (ordered.steps_per_epoch, ordered.num_left_out) == (5, 0)
    for epoch in range(3):
        drawn = np.concatenate([batch.utterances.ravel() for batch in epoch_of(ordered, epoch)])
        assert sorted(drawn.tolist()) == ordered.usable().tolist() == list(range(50))


def test_an_incomplete_group_is_filled_with_utterances_of_its_speaker():
    ordered = plan([5] * 10, speakers=5, utterances=3)
    assert (ordered.steps_per_epoch, ordered.num_left_out) == (4, 0)
    filled = set()
    for epoch in range(10):
        batches = epoch_of(ordered, epoch)
        drawn, times = np.unique(np.concatenate([batch.utterances for batch in batches]), return_counts=True)
        assert len(drawn) == 50
        assert sorted(times.tolist()) == [1] * 40 + [2] * 10
        filled |= set(drawn[times == 2].tolist())
        # What came twice was cut in two places.
        places = {(s, p) for b in batches for s, p in zip(b.utterances.flat, b.starts.flat, strict=True)}
        assert len(places) > 55
    assert len(filled) > 40


def test_no_speaker_has_more_segments_than_may_be_and_others_in_each_epoch():
    ordered = plan([40] * 6, speakers=3, utterances=3, max_segments=10)
    reached = set()
    for epoch in range(12):
        batches = epoch_of(ordered, epoch)
        counts = np.bincount(np.concatenate([batch.ids for batch in batches]))
        # Three whole groups of three are nine.
        assert counts.tolist() == [3] * 6
        drawn = np.concatenate([batch.utterances.ravel() for batch in batches]).tolist()
        assert len(set(drawn)) == len(drawn) == 54
        reached |= set(drawn)
    assert len(reached) > 0.9 * 240
    assert plan([40] * 6, speakers=3, utterances=3, max_segments=13).steps_per_epoch == 8


def test_over_the_epochs_every_utterance_comes_even_of_who_talks_too_much():
    # An epoch of ten batches has room for 20 of the 200 utterances of the talkative speaker.
    ordered = plan([200, 14, 14, 14, 14, 14, 14], speakers=5, max_segments=1000)
    assert (ordered.steps_per_epoch, ordered.num_left_out) == (10, 200 + 6 * 14 - 10 * 5 * 2)
    reached = set()
    for epoch in range(100):
        reached |= set(np.concatenate([batch.utterances.ravel() for batch in epoch_of(ordered, epoch)]).tolist())
    assert reached == set(range(284))


def test_all_speakers_meet():
    ordered = plan([60] * 30, speakers=10)
    met = np.zeros((30, 30), int)
    for epoch in range(4):
        for batch in epoch_of(ordered, epoch):
            met[np.ix_(batch.ids, batch.ids)] += 1
    pairs = met[np.triu_indices(30, 1)]
    # As often as chance has it: 4 epochs of 90 batches, two given speakers in 10 * 9 / (30 * 29) of them.
    assert pairs.mean() == pytest.approx(360 * 90 / 870)
    assert pairs.std() < 0.5 * pairs.mean()
    # Neighbouring batches have no more speakers in common than any.
    common = [len(set(one.ids) & set(two.ids)) for one, two in itertools.pairwise(epoch_of(ordered, 0))]
    assert np.mean(common) == pytest.approx(10 / 3, abs=0.6)


def test_what_fills_no_batch_is_another_part_each_time():
    ordered = plan(COUNTS, speakers=5)
    assert 0 < ordered.num_left_out < 5 * 2 + 30
    reached = set()
    for epoch in range(40):
        reached |= set(np.concatenate([batch.utterances.ravel() for batch in epoch_of(ordered, epoch)]).tolist())
    assert len(reached) == len(ordered) == sum(COUNTS)
    # Five of 140 groups are not one speaker's.
    even = plan([20] * 14, speakers=9)
    assert (even.steps_per_epoch, even.num_left_out) == (15, 10)
    drawn = [np.concatenate([batch.ids for batch in epoch_of(even, epoch)]) for epoch in range(10)]
    assert np.mean([10 - np.bincount(ids).min() for ids in drawn]) < 2.5


def test_wrapping_adds_a_batch_that_takes_everything():
    counts = [6, 6, 6, 6, 6, 6, 6]
    dropped, wrapped = (plan(counts, speakers=5, remainder=remainder) for remainder in ("drop", "wrap"))
    assert (dropped.steps_per_epoch, dropped.num_left_out) == (4, 2)
    assert (wrapped.steps_per_epoch, wrapped.num_left_out) == (5, 0)
    more = set()
    for epoch in range(20):
        batches = epoch_of(wrapped, epoch)
        assert {s for batch in batches for s in batch.utterances.flat} == set(range(42))
        rows = np.bincount(np.concatenate([batch.ids for batch in batches]))
        assert sorted(rows.tolist()) == [3] * 3 + [4] * 4
        more |= set(np.flatnonzero(rows == 4).tolist())
    assert more == set(range(7))
    assert plan([6] * 5, speakers=5, remainder="wrap").steps_per_epoch == 3


def test_batches_are_functions_of_seed_and_epoch_alone():
    first, again = plan(), pickle.loads(pickle.dumps(plan()))
    again.batch(4, 1)
    for epoch, step in [(0, 0), (1, 2), (0, 0), (7, 3)]:
        one, other = first.batch(epoch, step), again.batch(epoch, step)
        for name in ("ids", "utterances", "starts"):
            assert (getattr(one, name) == getattr(other, name)).all()
    for other in (first.batch(1, 0), plan(seed=4).batch(0, 0)):
        assert (other.utterances != first.batch(0, 0).utterances).any()


def test_ids_are_places_among_the_sorted_names_of_who_is_drawn():
    speakers = spoken([3, 1, 4, 2, 5, 4])
    lengths = np.where(speakers == 2, SEGMENT - 1, SEGMENT)
    speakers[np.flatnonzero(speakers == 4)[:2]] = -1
    index = index_of(speakers, lengths)
    repeating, dropping = (plan_of(index, 3, too_few=too_few) for too_few in ("repeat", "drop"))
    assert repeating.class_names == ["id000", "id001", "id003", "id004", "id005"]
    assert dropping.class_names == ["id000", "id003", "id004", "id005"]
    assert (repeating.num_speakers_left_out, dropping.num_speakers_left_out) == (1, 2)
    for ordered in (repeating, dropping):
        assert (ordered.num_unlabelled, ordered.num_short) == (2, 4)
        assert len(ordered) + ordered.num_dropped == len(index)
        assert (
            ordered.usable().tolist()
            == np.flatnonzero(np.isin(speakers, [int(name[2:]) for name in ordered.class_names])).tolist()
        )
        for epoch in range(3):
            for batch in epoch_of(ordered, epoch):
                names = index.speaker_names[speakers[batch.utterances]]
                assert (names == np.array(ordered.class_names)[batch.ids][:, None]).all()


@pytest.mark.parametrize(("short", "length", "usable"), [("drop", 99, 0), ("overlap", 99, 0), ("repeat", 10, 20)])
def test_what_is_shorter_than_a_segment_is_repeated_or_left_out(short, length, usable):
    lengths = [length] * 20 + [SEGMENT] * 20
    ordered = plan_of(index_of([0, 1, 2, 3] * 10, lengths), speakers=4, short=short)
    assert (len(ordered), ordered.num_short) == (20 + usable, 20)
    batch = ordered.batch(0, 0)
    # The whole of what just fits; a repeated one may begin anywhere.
    starts = batch.starts[batch.utterances >= 20]
    assert (starts == 0).all()
    assert ((batch.starts >= 0) & (batch.starts < length)).all()


def test_segments_lie_anywhere_in_an_utterance():
    ordered = plan_of(index_of([0, 1] * 4, [SEGMENT + 3] * 8), speakers=2)
    starts = [ordered.batch(epoch, step).starts.ravel() for epoch in range(50) for step in range(2)]
    assert np.bincount(np.concatenate(starts)).tolist() == pytest.approx([100] * 4, abs=40)


@pytest.mark.parametrize(
    ("length", "apart"),
    [(3 * SEGMENT, SEGMENT), (4 * SEGMENT, SEGMENT), (2 * SEGMENT, SEGMENT // 2), (SEGMENT + 2, 1), (SEGMENT, 0)],
)
def test_segments_of_one_utterance_lie_apart_as_far_as_there_is_room(length, apart):
    ordered = plan_of(index_of([0, 1], [length] * 2), speakers=2, utterances=3)
    orders = set()
    for epoch in range(60):
        starts = ordered.batch(epoch, 0).starts
        assert starts.min() >= 0
        assert starts.max() + SEGMENT <= length
        assert np.diff(np.sort(starts, axis=1), axis=1).min() >= apart
        orders |= {tuple(row) for row in starts.argsort(axis=1).tolist()}
    assert len(orders) == (6 if apart else 1)


def test_segments_of_one_short_utterance_that_goes_round_begin_elsewhere():
    # Half a segment: what begins a whole number of periods later would be the same samples.
    ordered = plan_of(index_of([0, 1], [SEGMENT // 2] * 2), speakers=2, short="repeat")
    for epoch in range(20):
        starts = ordered.batch(epoch, 0).starts
        assert (np.abs(np.diff(starts, axis=1)) == SEGMENT // 4).all()
        assert starts.max() < SEGMENT // 2


def test_all_shards_are_read_all_the_time():
    ordered = plan()
    assert ordered.max_shards_at_once == -(-sum(COUNTS) // 10)
    for window in itertools.islice(ordered.windows(3, 1), 3):
        assert sorted(window) == list(range(ordered.max_shards_at_once))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (
            {"speakers": 15, "utterances": 3},
            r"train.batch_size=45 with labels.utterances=3 takes 15 speakers, and 14 of 14 .* train.batch_size=42 or",
        ),
        ({"utterances": 9, "too_few": "drop"}, r"5 of 14 have 9 or more .*labels.too_few=drop"),
        ({"utterances": 99, "too_few": "drop"}, r"0 of 14 have 99 or more .*drop\); prepare more speakers"),
        ({"utterances": 5, "max_segments": 4}, "labels.max_segments=4 is less than labels.utterances=5"),
    ],
)
def test_options_that_do_not_fit_the_data_are_named(options, words):
    with pytest.raises(CelError, match=words):
        plan(**{"speakers": 6, **options})


def test_shards_without_labels_say_how_to_get_them():
    with pytest.raises(CelError, match=r"do not say who speaks.*cel prepare' with --labels FILE"):
        plan_of(index_of([-1] * 30))


def test_there_is_no_step_behind_the_end_of_an_epoch():
    with pytest.raises(IndexError):
        plan().batch(0, plan().steps_per_epoch)


def test_what_is_drawn_and_left_out_can_be_told():
    told = plan(COUNTS, speakers=5, utterances=3, too_few="drop").describe()
    assert told.startswith(f"{sum(COUNTS) - 3} utterances of 12 speakers")
    assert "2 speakers left out" in told


def test_an_epoch_of_a_million_utterances_takes_little_memory():
    speakers = spoken(np.random.default_rng(0).integers(20, 350, 5994))
    index = index_of(speakers, shard_size=1000)
    ordered = plan_of(index, speakers=200)
    tracemalloc.start()
    ordered.batch(0, 0)
    size, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(index) > 1_000_000
    assert size < 12 << 20
    assert peak < 48 << 20
    assert ordered.num_left_out < 400
