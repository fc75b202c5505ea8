"""Shards divide the samples and the item rows, cost alike, and a giant category does not weigh one down."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from longretriever.model.batches import Batches, Sampling
from longretriever.model.config import PginConfig
from longretriever.model.exchange import Wire
from longretriever.model.pgin import Lessons
from longretriever.model.sharding import allot, category_costs, plan_of, process_of, shard_of
from longretriever.store.behaviors import Store
from tests.worlds import START, random_log, stored, table

SAMPLING = Sampling(context_length=8, overlap=2, recent_length=0, samples=200, whole_up_to=50)
LIFE = replace(SAMPLING, along="life", mixed=True)
DIM = 4


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Store:
    log = random_log(3, events=2000, users=40, items=120, categories=12, times=500)
    return stored(log, tmp_path_factory.mktemp("shards") / "store")


@pytest.fixture(scope="module")
def giant(tmp_path_factory) -> Store:
    """One category has four of five events."""
    rng = np.random.default_rng(0)
    category = np.where(rng.random(6000) < 0.8, 0, rng.integers(1, 20, 6000))
    item = category * 40 + rng.integers(0, 40, 6000)
    time = START + rng.integers(0, 2000, 6000) * 1000
    log = table(rng.integers(0, 150, 6000), item, category, time)
    return stored(log, tmp_path_factory.mktemp("giant") / "store")


def shared(store: Store, sampling: Sampling, shards: int, wire=None):
    whole = Batches(store, sampling, store.last_time)
    plan = plan_of(whole, store, shards, DIM, wire or Wire())
    return whole, plan, [shard_of(whole, plan, nth, DIM) for nth in range(shards)]


def learned(batches: Batches) -> np.ndarray:
    """Positions of all targets of an epoch, ascending."""
    rows = [rows for step in batches.epoch(0, 0) for rows in step]
    return np.sort(
        np.concatenate([np.arange(a, b) for r in rows for a, b in zip(r.first, r.stop, strict=True)])
    )


@pytest.mark.parametrize("sampling", [SAMPLING, LIFE], ids=["contexts", "lives"])
@pytest.mark.parametrize("shards", [2, 3, 5])
def test_every_sample_is_of_one_shard(store, giant, sampling, shards):
    for given in (store, giant):
        whole, plan, parts = shared(given, sampling, shards)
        each = [learned(part) for part in parts]
        np.testing.assert_array_equal(np.sort(np.concatenate(each)), learned(whole))
        assert [len(found) for found in each] == pytest.approx(plan.samples.tolist(), rel=0.03)


@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_every_item_row_has_one_place(giant, world):
    places: list[list[int]] = []
    numbers = np.arange(giant.n_items)
    for rank in range(world):
        wire = SimpleNamespace(rank=rank, world=world, total=Wire().total)
        plan = plan_of(Batches(giant, LIFE, giant.last_time), giant, 3, DIM, wire)
        mine = numbers[plan.process_of(numbers, world) == rank]
        places.append(sorted(plan.place(mine).tolist()))
        in_ranges = [
            n for shard in plan.mine for part in plan.ranges(shard) for n in range(part.start, part.stop)
        ]
        assert sorted(in_ranges) == mine.tolist()
        np.testing.assert_array_equal(plan.place(np.array(in_ranges, int)), np.arange(len(mine)))
    assert sum(map(len, places)) == giant.n_items
    assert all(p == list(range(len(p))) for p in places)


def test_shards_lie_evenly_on_processes():
    assert process_of(np.arange(4), 4, 2).tolist() == [0, 0, 1, 1]
    assert process_of(np.arange(3), 3, 2).tolist() == [0, 0, 1]
    assert process_of(np.arange(2), 2, 3).tolist() == [0, 1], "one has nothing to do"


def test_the_plan_is_the_same_whoever_counts(giant):
    whole = Batches(giant, SAMPLING, giant.last_time)
    alone = plan_of(whole, giant, 3, DIM, Wire())
    counted: list[np.ndarray] = []
    for rank in range(2):
        note = SimpleNamespace(rank=rank, world=2, total=lambda x: (counted.append(x.copy()), x)[1])
        plan_of(whole, giant, 3, DIM, note)
    told = SimpleNamespace(rank=1, world=2, total=lambda x: counted[0] + counted[1])
    assert plan_of(whole, giant, 3, DIM, told).digest == alone.digest


@pytest.mark.parametrize("shards", [2, 3, 4])
def test_a_giant_category_is_split_so_that_shards_cost_alike(giant, shards):
    whole, plan, parts = shared(giant, SAMPLING, shards)
    assert plan.work.max() <= 1.1 * plan.work.mean()
    assert sum(p.category == 0 for p in plan.pieces) >= 2
    cost = category_costs(whole, DIM)
    spent, steps = [], []
    for part in parts:
        made = list(part.epoch(0, 0))
        category = [giant.group_category[rows.group[0]] for step in made for rows in step]
        samples = [rows.samples.sum() for step in made for rows in step]
        spent.append((cost.of_sample[category] * samples + cost.of_batch[category]).sum())
        steps.append(len(made))
    assert max(spent) <= 1.15 * np.mean(spent), "what is really done, and not what was foreseen"
    assert max(steps) - min(steps) <= 0.15 * np.mean(steps) + 1
    rows = {shard: sum(p.stop - p.start for p in plan.ranges(shard)) for shard in range(shards)}
    assert min(rows.values()) > 0


def test_by_count_of_categories_it_would_not_be_even(giant):
    """So that the test above can fail."""
    samples = np.bincount(giant.item_category[giant.event_item], minlength=giant.n_categories)
    by_count = [samples[nth::2].sum() for nth in range(2)]
    assert max(by_count) > 1.5 * np.mean(by_count)


def test_whole_categories_need_no_rows_of_others(store):
    _, plan, parts = shared(store, SAMPLING, 3)
    assert all(p.of == 1 for p in plan.pieces)
    for nth, part in enumerate(parts):
        for step in part.epoch(0, 0):
            for made in part.assemble(step, np.random.default_rng(0)):
                assert (plan.process_of(made.numbers, 3) == nth).all()


def test_allotment_is_even_or_cannot_be_split():
    rng = np.random.default_rng(0)
    for shards in (1, 2, 3, 7):
        work = rng.pareto(1.0, 30)
        pieces = allot(work, np.full(30, 100), shards)
        load = np.bincount([p.shard for p in pieces], [work[p.category] / p.of for p in pieces], shards)
        assert load.max() <= 1.1 * load.mean()
        assert load.sum() == pytest.approx(work.sum())
    alone = allot(np.array([5.0, 1.0]), np.array([1, 1]), 2)
    assert [(p.of, p.shard) for p in alone] == [(1, 0), (1, 1)], "one line cannot be split"


def test_steps_of_a_shard_cost_alike(giant):
    whole, plan, (part, _) = shared(giant, SAMPLING, 2)
    cost = category_costs(whole, DIM)
    spent = []
    for step in part.epoch(0, 0):
        category = [giant.group_category[rows.group[0]] for rows in step]
        samples = [rows.samples.sum() for rows in step]
        spent.append((cost.of_sample[category] * samples + cost.of_batch[category]).sum())
    assert np.median(spent[:-1]) == pytest.approx(plan.work[0] / (plan.samples.sum() / 200), rel=0.2)


def test_where_making_vectors_costs_more_than_a_step_may_steps_still_learn(giant):
    """Tiny steps over wide softmaxes: no step of one row after the other."""
    parts = shared(giant, replace(SAMPLING, samples=20), 2)[2]
    assert np.mean([sum(r.samples.sum() for r in step) for step in parts[0].epoch(0, 0)]) > 4


def test_users_are_shared_out_for_the_next_category(store):
    config = PginConfig(recent_length=4, step_samples=50, most=None)
    whole = Lessons(store, config, store.last_time, held_out=False)
    plan = plan_of(whole, store, 3, DIM, Wire())
    parts = [whole.shard(nth, slice(*plan.users[nth : nth + 2]), 17) for nth in range(3)]
    found = [np.sort(np.concatenate(list(part.epoch(0, 0)))) for part in parts]
    np.testing.assert_array_equal(np.concatenate(found), np.arange(store.n_events))
    assert [part.n_samples for part in parts] == pytest.approx(plan.samples.tolist(), abs=1)
    assert plan.samples.max() < 1.1 * plan.samples.mean()
    late = store.last_time - 100_000
    after = [np.concatenate(part.after(late, 10_000, np.random.default_rng(0))) for part in parts]
    assert sum(map(len, after)) == (store.event_time > late).sum()
    thinned = Lessons(store, replace(config, most=10, half_life=3.0), store.last_time, held_out=False)
    assert thinned.expected_of_users().sum() == pytest.approx(thinned.n_samples, abs=1)
