"""Every sample once, its past strictly earlier, its rivals of its own category."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from longretriever.model.batches import Batches, CategoryCache, Rows, Sampling, first_not_before
from tests.worlds import random_log, stored

SMALL = {"context_length": 6, "recent_length": 4, "overlap": 2, "samples": 40}


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return stored(random_log(3), tmp_path_factory.mktemp("batches") / "store")


def samples_of(store, sampling, until=None, seed=0, epoch=0):
    """Every sample of an epoch as plain values: (event row's facts, past items, rivals)."""
    batches = Batches(store, sampling, store.last_time if until is None else until)
    prefix = 1 + store.profile.shape[1]
    for rows in batches.epoch(seed, epoch):
        step = batches.assemble(rows, np.random.default_rng(0))[0]
        place = []  # of each state: the items that it knows
        for bucket in step.buckets:
            for b in range(len(bucket.length)):
                width = bucket.item.shape[1]
                items = step.numbers[bucket.item[b]]
                for token in range(prefix + width):
                    known = token - prefix + 1 if sampling.packed else bucket.length[b]
                    place.append(items[: max(0, known)].tolist())
        for contest in step.contests:
            candidates = step.numbers[contest.candidate]
            for i, s in enumerate(range(contest.samples.start, contest.samples.stop)):
                recent = step.numbers[step.recent[s, : step.recent_count[s]]].tolist()
                yield {
                    "category": int(step.category[s]),
                    "target": int(candidates[contest.target[i]]),
                    "past": place[step.state[s]],
                    "recent": recent,
                    "candidates": candidates.tolist(),
                }


def naive_samples(store, length, recent_length, until):
    """The same by scanning: for each event, the user's earlier items of its category and of any."""
    found = []
    for user in range(store.n_users):
        rows = np.arange(*store.rows_of(user).indices(store.n_events))
        order = rows[np.lexsort((rows, store.event_time[rows]))]
        for row in rows:
            t, c = store.event_time[row], store.item_category[store.event_item[row]]
            if t > until:
                continue
            earlier = [r for r in order if store.event_time[r] < t]
            same = [
                int(store.event_item[r]) for r in earlier if store.item_category[store.event_item[r]] == c
            ]
            recent = [int(store.event_item[r]) for r in earlier][::-1][:recent_length]
            found.append((int(c), int(store.event_item[row]), tuple(same[-length:]), tuple(recent)))
    return sorted(found)


def test_one_sample_a_row_is_the_definition(store):
    sampling = Sampling(packed=False, **SMALL)
    got = sorted(
        (s["category"], s["target"], tuple(s["past"]), tuple(s["recent"]))
        for s in samples_of(store, sampling)
    )
    assert got == naive_samples(store, SMALL["context_length"], SMALL["recent_length"], store.last_time)


@settings(max_examples=8, deadline=None)
@given(seed=st.integers(0, 10_000), overlap=st.integers(1, 5), length=st.integers(5, 9))
def test_packed_pasts_are_strictly_earlier(tmp_path_factory, seed, overlap, length):
    store = stored(random_log(seed, events=200, users=3, times=90), tmp_path_factory.mktemp("p") / "store")
    sampling = Sampling(context_length=length, recent_length=4, overlap=overlap, samples=30)
    truth = {}
    for c, target, past, recent in naive_samples(store, 10_000, 4, store.last_time):
        truth.setdefault((c, target, recent), []).append(past)
    n = 0
    for s in samples_of(store, sampling, seed=seed):
        n += 1
        # the past is an unbroken run of the true one, up to its very end: nothing later, nothing missing
        wanted = truth[s["category"], s["target"], tuple(s["recent"])]
        past = tuple(s["past"])
        assert any(past == full[len(full) - len(past) :] for full in wanted), (s, wanted)
        assert len(past) > 0 or () in wanted
        assert len(past) <= length
    assert n >= 0.7 * store.n_events  # samples are left out only for ties at the start of a row


def test_without_ties_packed_leaves_nothing_out(tmp_path):
    log = random_log(5, events=400, users=4)
    time = 1_600_000_000 + np.random.default_rng(0).permutation(400)
    store = stored(log.set_column(3, "timestamp", [time]), tmp_path / "store")
    assert len(list(samples_of(store, Sampling(**SMALL)))) == store.n_events


def test_a_later_event_never_changes_an_earlier_sample(store):
    until = int(np.median(store.event_time))
    early = list(samples_of(store, Sampling(packed=False, **SMALL), until))
    assert 0 < len(early) < store.n_events
    got = sorted((s["category"], s["target"], tuple(s["past"]), tuple(s["recent"])) for s in early)
    assert got == naive_samples(store, SMALL["context_length"], SMALL["recent_length"], until)


def test_rivals_are_the_whole_category_when_it_fits(store):
    for s in samples_of(store, Sampling(**SMALL)):
        assert s["candidates"] == list(range(*store.category_start[s["category"] : s["category"] + 2]))


def test_a_large_category_competes_by_sample_with_log_q(tmp_path):
    store = stored(random_log(3, items=200), tmp_path / "store")
    sampling = Sampling(**SMALL, whole_category_up_to=20, sampled_negatives=2)
    batches = Batches(store, sampling, store.last_time)
    rows = next(batches.epoch(0, 0))
    step = batches.assemble(rows, np.random.default_rng(0))[0]
    for c in step.contests:
        candidates = step.numbers[c.candidate]
        assert len(set(candidates)) == len(candidates), "an item that is drawn twice would be its own rival"
        category = int(step.category[c.samples.start])
        low, high = store.category_start[category : category + 2]
        assert ((low <= candidates) & (candidates < high)).all()
        n = c.samples.stop - c.samples.start
        count = np.bincount(store.event_item, minlength=store.n_items)
        expected = n * count[candidates] / count[low:high].sum() + 2 / (high - low)
        np.testing.assert_allclose(c.log_q, np.log(1 - np.exp(-expected)), rtol=1e-4)


def test_epochs_differ_and_seeds_repeat(store):
    batches = Batches(store, Sampling(**SMALL), store.last_time)

    def order(seed, epoch):
        return [rows.first.tolist() for step in batches.epoch(seed, epoch) for rows in step]

    assert order(1, 0) == order(1, 0)
    assert order(1, 0) != order(1, 1)
    assert order(1, 0) != order(2, 0)


def test_validation_is_later_and_as_large_as_asked(store):
    batches = Batches(store, Sampling(**SMALL), store.last_time)
    when = int(np.quantile(store.event_time, 0.8))
    steps = batches.after(when, 30, np.random.default_rng(0))
    events = np.concatenate(
        [np.arange(a, b) for s in steps for r in s for a, b in zip(r.first, r.stop, strict=True)]
    )
    assert (store.event_time[events] > when).all()
    assert 30 <= len(events) <= 30 + SMALL["context_length"]


@settings(max_examples=60, deadline=None)
@given(
    pushes=st.lists(st.lists(st.tuples(st.integers(0, 6), st.integers(1, 9)), max_size=8), max_size=10),
    full=st.integers(1, 20),
    wait=st.integers(1, 60),
)
def test_the_cache_loses_nothing_and_starves_no_one(pushes, full, wait):
    cache = CategoryCache(full, wait)
    arrived, seen, released, at = {}, 0, [], 0
    most = max((sum(s for _, s in push) for push in pushes), default=0)  # a push is looked at as a whole
    for push in pushes:
        n = np.array([s for _, s in push], dtype=np.int64)
        first = at + np.cumsum(n) - n
        rows = Rows(np.zeros(len(push), np.int64), first, first, first + n)
        for (c, size), f in zip(push, first, strict=True):
            arrived[int(f)] = (c, size)
        at += int(n.sum())
        released += cache.add(np.array([c for c, _ in push], dtype=np.int64), rows)
        seen += int(n.sum())
        out = {int(f) for _, r in released for f in r.first}
        for f in arrived.keys() - out:
            assert seen - f <= wait + most, "a row has waited too long"
    released += cache.flush()
    assert sorted(int(f) for _, r in released for f in r.first) == sorted(arrived)
    for category, rows in released:
        assert {arrived[int(f)][0] for f in rows.first} == {category}


@given(st.lists(st.lists(st.integers(0, 9), max_size=6), min_size=1, max_size=6), st.integers(0, 10))
def test_bisection_of_many_ranges(parts, when):
    time = np.array([t for part in parts for t in sorted(part)] or [0])
    ends = np.cumsum([len(p) for p in parts])
    low = ends - [len(p) for p in parts]
    got = first_not_before(time, low, ends, np.full(len(parts), when))
    assert got.tolist() == [lo + sum(t < when for t in p) for lo, p in zip(low, parts, strict=True)]


@pytest.mark.parametrize("parts", [1, 2, 3])
def test_parts_hold_the_samples_of_the_whole(store, parts):
    batches = Batches(store, Sampling(**SMALL), store.last_time)
    for plan in batches.epoch(0, 0):
        whole = batches.assemble(plan, np.random.default_rng(0))[0]
        found = batches.assemble(plan, np.random.default_rng(0), parts)
        assert len(found) <= parts
        assert np.array_equal(np.sort(np.concatenate([p.category for p in found])), whole.category)
        assert all(np.array_equal(p.numbers, whole.numbers) for p in found)

    def targets(steps):
        return sorted(
            int(step.numbers[c.candidate][t]) for step in steps for c in step.contests for t in c.target
        )

    assert targets(found) == targets([whole])
