"""Each rival against the plainest way to say what it does, on a store made in memory."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from longretriever.errors import InputError
from longretriever.evaluate.rivals import Popular, PopularInContext, Recent, recall_by_window, train_counts
from longretriever.evaluate.split import Split, split
from longretriever.store.behaviors import Ids, Store
from longretriever.store.ingest import ingest
from tests.evaluate.test_split import log_of, random_log

DAY = 86_400


def rare(seed: int, users: int = 25) -> Split:
    """Some items and users of this log occur only after T, some users only at the end of train."""
    return split(random_log(seed, n=250, users=users, items=90, span=400), min_events=1)


def store_of(parts: Split) -> Store:
    """What `ingest` makes of `parts.full`, without the disk: the arrays that an evaluation reads."""
    user = np.repeat(np.arange(parts.n_users), np.diff(parts.user_start))
    rows = np.stack([user, parts.item_category[parts.item], parts.time, parts.item], axis=1)
    user, category, time, item = np.unique(rows, axis=0).T
    first = np.flatnonzero(np.r_[True, (np.diff(user) != 0) | (np.diff(category) != 0)])
    store = object.__new__(Store)
    vars(store).update(
        path="memory",
        event_item=item,
        event_time=time,
        event_behavior=np.zeros(len(item), np.int32),
        group_category=category[first],
        group_start=np.r_[first, len(user)],
        user_group=np.searchsorted(user[first], np.arange(parts.n_users + 1)),
        category_start=np.searchsorted(parts.item_category, np.arange(len(parts.category_ids) + 1)),
        time_order=np.lexsort((np.arange(len(user)), time, user)),
        user_ids=Ids(pa.chunked_array([parts.user_ids])),
        category_ids=Ids(pa.chunked_array([parts.category_ids])),
        items=pa.table({"item_id": parts.item_ids}),
        last_time=int(time.max()),
        n_events=len(item),
        n_items=parts.n_items,
        n_users=parts.n_users,
        n_categories=len(parts.category_ids),
    )
    return store


@pytest.mark.parametrize("ids", [int, str])
def test_the_store_that_ingest_makes_has_the_splits_numbers(tmp_path: Path, ids: type) -> None:
    log = [tuple(row.values())[:4] for row in random_log(4).to_pylist()]
    parts = split(log_of(log, ids), min_events=2)
    ingest(parts.full, tmp_path / "full")
    made, expected = Store.open(tmp_path / "full"), store_of(parts)
    for name in ("event_item", "event_time", "group_start", "group_category", "user_group", "category_start"):
        assert np.array_equal(getattr(made, name), getattr(expected, name)), name
    assert np.array_equal(made.time_order, expected.time_order)
    assert made.user_ids.values.to_pylist() == parts.user_ids.to_pylist()
    assert made.items["item_id"].to_pylist() == parts.item_ids.to_pylist()
    assert made.category_ids.values.to_pylist() == parts.category_ids.to_pylist()


def events_of(store: Store) -> list[tuple[int, int, int, int]]:
    """(user, time, row, item) of every event; equal times of a user by row, as the store has it."""
    return sorted(
        (user, int(store.event_time[row]), row, int(store.event_item[row]))
        for user in range(store.n_users)
        for row in range(store.rows_of(user).start, store.rows_of(user).stop)
    )


def asked(parts: Split, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Some users and times, before and after T, on and between the times of events."""
    rng = np.random.default_rng(seed)
    late = [parts.time.max() + 1] * 10
    times = np.r_[rng.choice(parts.time, 15), rng.choice(parts.time, 5) + 1, late, parts.T, parts.T + 1, 0]
    return rng.integers(parts.n_users, size=len(times)), times


def rows_of(lists: np.ndarray) -> list[list[int]]:
    """The lists without their padding, which must all be at the end."""
    rows = [[int(item) for item in row if item >= 0] for row in lists]
    assert all((row[len(kept) :] == -1).all() for row, kept in zip(lists, rows, strict=True))
    return rows


worlds = given(st.integers(0, 1_000), st.sampled_from([1, 5, 100]), st.booleans())


@settings(max_examples=15, deadline=None)
@worlds
def test_recent_lists_distinct_train_items_newest_first(seed: int, k: int, new: bool) -> None:
    parts = rare(seed)
    store = store_of(parts)
    users, before, events = *asked(parts, seed), events_of(store)
    expected = []
    for user, now in zip(users, before, strict=True):
        life = [item for u, time, _, item in reversed(events) if u == user and time < now]
        trained = [item for item in dict.fromkeys(life) if parts.in_train[item]]
        expected.append([] if new else trained[:k])
    assert rows_of(Recent(store, parts.T).recommend(users, before, k, new).item) == expected


@settings(max_examples=15, deadline=None)
@worlds
def test_popular_lists_by_events_in_the_window_then_in_train(seed: int, k: int, new: bool) -> None:
    parts = rare(seed)
    store = store_of(parts)
    users, before, events = *asked(parts, seed), events_of(store)
    train = [(time, item) for _, time, _, item in events if time <= parts.T]
    count = Counter(item for _, item in train)
    latest = Counter(item for time, item in train if time > parts.T - DAY)
    ranking = sorted(count, key=lambda item: (-latest[item], -count[item], item))
    expected = []
    for user, now in zip(users, before, strict=True):
        met = {item for u, time, _, item in events if u == user and time < now}
        expected.append([item for item in ranking if not (new and item in met)][:k])
    assert rows_of(Popular(store, parts.T, days=1).recommend(users, before, k, new).item) == expected


@settings(max_examples=15, deadline=None)
@worlds
def test_popular_in_context_adds_the_logs_of_both_shares(seed: int, k: int, new: bool) -> None:
    parts = rare(seed)
    store = store_of(parts)
    users, before, events = *asked(parts, seed), events_of(store)
    lists = PopularInContext(store, parts.T, top=2).recommend(users, before, k, new)
    count, category = train_counts(store, parts.T), parts.item_category
    assert lists.contexts is not None
    for row, user, now, chosen in zip(rows_of(lists.item), users, before, lists.contexts, strict=True):
        life = [(time, item) for u, time, _, item in events if u == user and time < now]
        score: Counter = Counter()
        for time, item in life:
            score[int(category[item])] += DAY / max(now - time, 3600)
        top = sorted(score, key=lambda c: (-score[c], c))[:2]
        assert sorted(chosen) == sorted(top)
        met = {item for _, item in life}
        value = {
            int(item): math.log(score[c] / sum(score[t] for t in top))
            + math.log(count[item] / count[category == c].sum())
            for c in top
            for item in np.flatnonzero((category == c) & (count > 0))
            if not (new and item in met)
        }
        assert [value[item] for item in row] == pytest.approx(sorted(value.values(), reverse=True)[:k])


def all_rivals(store: Store, T: int) -> list:
    return [Recent(store, T), Popular(store, T), PopularInContext(store, T)]


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 1_000))
def test_lists_at_t_do_not_depend_on_what_follows(seed: int) -> None:
    log = random_log(seed, span=2000)
    parts = split(log, min_events=1)
    late = np.flatnonzero(log["timestamp"].to_numpy() > parts.T)
    rng = np.random.default_rng(seed)
    item = log["item_id"].to_numpy().copy()
    item[late] = rng.permutation(item[late])
    user = log["user_id"].to_numpy().copy()
    user[late] = rng.permutation(user[late])
    category = pa.array(item // 3 % 5)
    changed = log.set_column(0, "user_id", pa.array(user)).set_column(1, "item_id", pa.array(item))
    again = split(changed.set_column(2, "category_id", category), min_events=1)
    everyone = np.arange(parts.n_users)
    at_t = np.full(len(everyone), parts.T + 1)
    for one, other in zip(
        all_rivals(store_of(parts), parts.T), all_rivals(store_of(again), again.T), strict=True
    ):
        for new in (False, True):
            lists = [model.recommend(everyone, at_t, 20, new).item.tolist() for model in (one, other)]
            assert lists[0] == lists[1]


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 1_000), st.booleans())
def test_only_train_items_are_listed_and_new_lists_hold_none_of_the_history(seed: int, new: bool) -> None:
    parts = rare(seed)
    store = store_of(parts)
    users, before = asked(parts, seed)
    for rival in all_rivals(store, parts.T):
        for user, now, row in zip(
            users, before, rows_of(rival.recommend(users, before, 50, new).item), strict=True
        ):
            assert parts.in_train[row].all()
            assert len(set(row)) == len(row)
            if new:
                assert not np.isin(row, store.life(int(user), now).items()).any()


def test_the_window_is_chosen_on_the_end_of_train() -> None:
    # 40 days: train ends in day 36, its last tenth starts in day 32. From day 31 on, item 2 replaces item 1.
    rows = [
        (user, 1 if day < 31 else 2, 0, day * DAY + hour * 3600)
        for day in range(40)
        for user in (1, 2)
        for hour in range(4)
    ]
    parts = split(log_of(rows))
    store = store_of(parts)
    assert recall_by_window(store, parts.T, k=1) == {1: 1.0, 7: 0.0, 30: 0.0}
    assert recall_by_window(store, parts.T, k=2) == {1: 1.0, 7: 1.0, 30: 1.0}
    assert Popular(store, parts.T).facts["window_days"] == 30  # at k = 50 all are as good: the most counts
    assert Popular(store, parts.T, days=7).facts == {"window_days": 7}


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 1_000), st.integers(1, 10))
def test_the_windows_recall_is_the_batch_protocols_inside_train(seed: int, k: int) -> None:
    parts = rare(seed, users=100)
    store = store_of(parts)
    train = [(user, time, item) for user, time, _, item in events_of(store) if time <= parts.T]
    times = sorted(time for _, time, _ in train)
    cut = times[math.floor(0.9 * (len(times) - 1) + 0.5)]
    known = {user for user, time, _ in train if time <= cut}
    targets = {u: {i for v, t, i in train if v == u and t > cut} for u in known}
    for days, value in recall_by_window(store, parts.T, k=k).items():
        shown = Popular(store, cut, days).ranking[:k].tolist()
        recalls = [len(items.intersection(shown)) / len(items) for items in targets.values() if items]
        assert value == pytest.approx(np.mean(recalls))


def test_a_store_without_train_says_so() -> None:
    parts = split(random_log(1), min_events=1)
    with pytest.raises(InputError, match="no event at or before T = 5"):
        Popular(store_of(parts), 5)
