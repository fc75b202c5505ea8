"""The split against a re-implementation that follows the protocol line by line, on logs full of ties."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from longretriever.errors import EventsError, InputError
from longretriever.evaluate.split import Split, nearest_quantile, split

DATA = Path(__file__).parents[2] / "../shared/data"


def log_of(rows: list[tuple], ids: type = int) -> pa.Table:
    """Rows of (user, item, category, time)."""
    columns = list(zip(*rows, strict=True)) if rows else [[]] * 4
    kind = pa.int64() if ids is int else pa.string()
    names = ["user_id", "item_id", "category_id"]
    table = {n: pa.array([ids(v) for v in c], kind) for n, c in zip(names, columns[:3], strict=True)}
    table["timestamp"] = pa.array(columns[3], pa.int64())
    table["behavior"] = pa.array(["click"] * len(rows))
    return pa.table(table)


def random_log(seed: int, n: int = 400, users: int = 12, items: int = 30, span: int = 60) -> pa.Table:
    """Users and items of uneven frequency, one category for each item, times that often tie."""
    rng = np.random.default_rng(seed)
    user = (users * rng.random(n) ** 2).astype(int)
    item = (items * rng.random(n) ** 2).astype(int)
    time = 1_000_000 + 3_600 * rng.integers(span, size=n)
    return log_of(
        [(int(u) * 7, int(i) * 3, int(i) % 5, int(t)) for u, i, t in zip(user, item, time, strict=True)]
    )


def histories(parts: Split) -> dict[int, list[tuple[int, int]]]:
    """user number -> (time, item number), by time, ties in the log's order; read off `full` row by row."""
    users = sorted(set(parts.full["user_id"].to_pylist()))
    number = {key: at for at, key in enumerate(parts.item_ids.to_pylist())}
    lives: dict[int, list[tuple[int, int]]] = {at: [] for at in range(len(users))}
    for row in parts.full.to_pylist():
        lives[users.index(row["user_id"])].append((row["timestamp"], number[row["item_id"]]))
    return {user: sorted(life, key=lambda event: event[0]) for user, life in lives.items()}


def slow_live(parts: Split, n: int, per_user: int, seed: int) -> list[tuple]:
    lives, T = histories(parts), parts.T
    trained = {item for life in lives.values() for time, item in life if time <= T}
    rng = np.random.default_rng(seed)
    drawn: list[tuple] = []
    for user in rng.permutation(len(lives)):
        life = lives[int(user)]
        test = [at for at, (time, _) in enumerate(life) if time > T]
        if not test or len(test) == len(life):
            continue
        for at in rng.permutation(test)[:per_user]:
            time, item = life[at]
            history = [i for t, i in life if t < time]
            if item in trained:
                drawn.append((user, time, item, item not in history, len(history)))
        if len(drawn) >= n:
            break
    return drawn


def slow_batch(parts: Split, n: int, seed: int) -> list[tuple]:
    lives, T = histories(parts), parts.T
    trained = {item for life in lives.values() for time, item in life if time <= T}
    both = [u for u, life in lives.items() if life[0][0] <= T < life[-1][0]]
    answers = []
    for user in np.random.default_rng(seed).permutation(sorted(both))[:n]:
        before = [i for t, i in lives[user] if t <= T]
        target = {i for t, i in lives[user] if t > T}
        new = {i for i in target if i in trained and i not in before}
        answers.append((user, sorted(target), sorted(new), len(before)))
    return answers


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from([3, 40, 3000]), st.sampled_from([1, 5]))
def test_live_requests_are_drawn_as_the_protocol_says(seed: int, n: int, per_user: int) -> None:
    parts = split(random_log(seed, n=300, items=90), min_events=1)
    got = parts.live(n, per_user, seed=seed % 7)
    rows = list(zip(got.user, got.before, got.target, got.new, got.history, strict=True))
    assert rows == slow_live(parts, n, per_user, seed % 7)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from([2, 1000]))
def test_batch_requests_are_drawn_as_the_protocol_says(seed: int, n: int) -> None:
    parts = split(random_log(seed, n=150, items=60), min_events=1)
    got = parts.batch(n, seed=seed % 7)
    rows = [
        (user, list(target), list(new), history)
        for user, target, new, history in zip(got.user, got.target, got.new_target, got.history, strict=True)
    ]
    assert rows == slow_batch(parts, n, seed % 7)
    assert set(got.before) == {parts.T + 1}


def test_only_new_keeps_the_requests_that_have_new_targets() -> None:
    parts = split(random_log(3, n=150, items=60), min_events=1)
    live, batch = parts.live(), parts.batch()
    assert 0 < len(live.only_new().user) < len(live.user)
    assert live.only_new().new.all()
    assert list(live.only_new().target) == [t for t, new in zip(live.target, live.new, strict=True) if new]
    has = [u for u, new in zip(batch.user, batch.new_target, strict=True) if len(new)]
    assert 0 < len(has) < len(batch.user)
    assert list(batch.only_new().user) == has
    assert all(len(target) for target in batch.only_new().target)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 1_000), st.integers(1, 5))
def test_the_filter_drops_items_then_users_twice(seed: int, least: int) -> None:
    log = random_log(seed, n=400, users=40, items=80)
    rows = log.to_pylist()
    for _ in range(2):
        for name in ("item_id", "user_id"):
            count = Counter(row[name] for row in rows)
            rows = [row for row in rows if count[row[name]] >= least]
    assert split(log, min_events=least).full.to_pylist() == rows


def test_train_is_every_event_at_or_before_t() -> None:
    rows = [(user, 1, 0, time) for user in (1, 2) for time in range(10, 20)]
    parts = split(log_of(rows), quantile=0.5)
    assert parts.T == 15  # twenty times, places 9.5 -> 10: the later of the two in the middle
    assert parts.train["timestamp"].to_pylist() == [*range(10, 16)] * 2
    assert parts.full.num_rows == 20


def test_equal_times_at_t_all_go_to_train() -> None:
    times = [1, 2, 3, 4, 5, 5, 5, 5, 5, 6]
    parts = split(log_of([(at % 2, 0, 0, time) for at, time in enumerate(times)]), 0.6, min_events=1)
    assert parts.T == 5
    assert parts.train.num_rows == 9


def test_a_category_is_the_most_frequent_one_before_t() -> None:
    late = [(1, 9, 0, 100), (2, 9, 0, 100)]
    rows = [
        *[(1, 10, 3, 1), (1, 10, 4, 2), (2, 10, 4, 3)],  # 4 leads
        *[(1, 11, 8, 1), (2, 11, 7, 2)],  # a tie: the smaller
        *[(1, 12, 5, 1), (2, 12, 6, 101), (1, 12, 6, 102)],  # what follows T does not count
        *[(1, 13, 2, 101), (2, 13, 1, 102), (2, 13, 1, 103)],  # where there is nothing else, it does
        *late,
    ]
    parts = split(log_of(rows), quantile=0.4, min_events=1)
    assert parts.T < 100
    assert dict(
        zip(parts.full["item_id"].to_pylist(), parts.full["category_id"].to_pylist(), strict=True)
    ) == {10: 4, 11: 7, 12: 5, 13: 1, 9: 0}


@pytest.mark.parametrize("ids", [int, str])
def test_users_and_items_are_numbered_as_in_the_store(ids: type) -> None:
    parts = split(
        log_of([(u, i, c, t) for u in (10, 9) for t, (i, c) in enumerate([(5, 20), (30, 3), (4, 20)])], ids),
        0.5,
        1,
    )
    assert parts.user_ids.to_pylist() == sorted(map(ids, (9, 10)))
    assert parts.category_ids.to_pylist() == sorted(map(ids, (3, 20)))
    by_category = sorted([(ids(20), ids(5)), (ids(3), ids(30)), (ids(20), ids(4))])
    assert parts.item_ids.to_pylist() == [item for _, item in by_category]
    assert [parts.category_ids[int(c)].as_py() for c in parts.item_category] == [c for c, _ in by_category]


def test_exact_duplicates_count() -> None:
    rows = [(1, 1, 0, 1), (2, 1, 0, 1), (1, 1, 0, 9), (1, 1, 0, 9), (1, 1, 0, 9)]
    parts = split(log_of(rows), quantile=0.3, min_events=1)
    assert len(parts.live().user) == 3


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10_000))
def test_nothing_after_t_changes_train(seed: int) -> None:
    log = random_log(seed)
    parts = split(log, min_events=1)
    rng = np.random.default_rng(seed)
    time = log["timestamp"].to_numpy().copy()
    late = np.flatnonzero(time > parts.T)
    time[late] += rng.integers(0, 100_000, len(late))
    item = log["item_id"].to_numpy().copy()
    item[late] = rng.permutation(item[late])
    category = log["category_id"].to_numpy().copy()
    category[late] = rng.integers(0, 5, len(late))
    changed = log.set_column(1, "item_id", pa.array(item)).set_column(2, "category_id", pa.array(category))
    again = split(changed.set_column(3, "timestamp", pa.array(time)), min_events=1)
    assert again.T == parts.T
    assert again.train.equals(parts.train)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 50), min_size=1, max_size=40), st.floats(0, 1))
def test_nearest_quantile_is_the_one_of_polars(values: list[int], q: float) -> None:
    polars = pytest.importorskip("polars")
    assert nearest_quantile(np.array(values), q) == polars.Series(values).quantile(q)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "none of the 0 events is left"),
        ([(1, 1, 0, t) for t in range(4)], "none of the 4 events is left .* Pass a longer log"),
        ([(1, 1, 0, t) for t in range(10)], "all 10 events left by the filter are of one user"),
        ([(u, 1, 0, 7) for u in (1, 2) for _ in range(5)], "all 10 events .* have the timestamp 7"),
        ([(u, 1, 0, min(t, 2)) for u in (1, 2) for t in range(50)], "no event is after T = 2"),
    ],
)
def test_a_log_that_cannot_be_split_says_why(rows: list[tuple], message: str) -> None:
    with pytest.raises(EventsError, match=message):
        split(log_of(rows))


def test_a_log_without_users_on_both_sides_has_no_requests() -> None:
    parts = split(log_of([(u, 1, 0, 10 * u + t) for u in (1, 2) for t in range(5)]), quantile=0.4)
    with pytest.raises(EventsError, match="no live request can be drawn"):
        parts.live()
    with pytest.raises(EventsError, match="none of the 2 users has events both at or before T = 14"):
        parts.batch()


def test_wrong_input_says_what_was_wanted() -> None:
    log = random_log(1)
    with pytest.raises(InputError, match=r"quantile is 90, expected a number between 0 and 1"):
        split(log, quantile=90)
    with pytest.raises(EventsError, match="but no category_id"):
        split(log.drop_columns(["category_id"]))
    holes = log.set_column(2, "category_id", pa.array([None] * log.num_rows, pa.int64()))
    with pytest.raises(EventsError, match="400 events have no category_id"):
        split(holes)


@pytest.mark.skipif(not (DATA / "oss_ports").exists(), reason="the real log is not here")
def test_the_real_log_has_the_protocols_counts() -> None:
    parts = split(pa.parquet.read_table(DATA / "oss_ports/events.parquet"))
    assert (parts.n_users, parts.n_items, len(parts.category_ids)) == (3646, 42559, 768)
    assert (parts.train.num_rows, parts.full.num_rows) == (723_273, 803_636)
    assert len(parts.batch().user) == 823
