"""The store against a scan of the log: every question answered twice, the slow way being obviously right."""

from __future__ import annotations

import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from longretriever.errors import Damaged, UnknownCategory, UnknownItem, UnknownUser
from longretriever.events import SECONDS_PER_DAY
from longretriever.store.behaviors import Behaviors, Store, Vocabulary, spread
from longretriever.store.ingest import ingest

Event = tuple[Any, Any, Any, int, str | None]  # user, item, category, time, behavior


class Scan:
    """The same questions, answered by going through all events of the log."""

    def __init__(self, log: list[Event]) -> None:
        votes: dict[Any, Counter[Any]] = {}
        for _, item, category, _, _ in log:
            votes.setdefault(item, Counter())[category] += 1
        category_of = {item: min(v, key=lambda c, v=v: (-v[c], c)) for item, v in votes.items()}
        self.users = sorted({event[0] for event in log})
        self.categories = sorted(set(category_of.values()))
        self.items = sorted(category_of, key=lambda item: (category_of[item], item))
        self.kinds = sorted({event[4] or "" for event in log})
        self.category_of = [self.categories.index(category_of[item]) for item in self.items]
        self.recategorised = sum(category_of[event[1]] != event[2] for event in log)
        self.events = sorted(  # (user, category, time, item, kind), all as numbers
            {
                (
                    self.users.index(user),
                    self.categories.index(category_of[item]),
                    time,
                    self.items.index(item),
                    self.kinds.index(kind or ""),
                )
                for user, item, _, time, kind in log
            }
        )

    def in_context(self, user: int, category: int, before: int, limit: int) -> list[tuple[int, ...]]:
        found = [e for e in self.events if e[0] == user and e[1] == category and e[2] < before]
        return found[-limit:]

    def recent(self, user: int, before: int, limit: int) -> list[tuple[int, ...]]:
        found = [e for e in self.events if e[0] == user and e[2] < before]
        return sorted(found, key=lambda e: e[2])[-limit:]  # sorted is stable: ties stay in order of rows

    def engagement(self, user: int, now: int, floor: int, since: float = -np.inf) -> dict[int, float]:
        scores: dict[int, float] = {}
        for u, category, time, _, _ in self.events:
            if u == user and since <= time < now:
                scores[category] = scores.get(category, 0) + SECONDS_PER_DAY / max(now - time, floor)
        return scores


def table_of(log: list[Event]) -> pa.Table:
    names = ("user_id", "item_id", "category_id", "timestamp", "behavior")
    columns = dict(zip(names, zip(*log, strict=True), strict=True))
    return pa.table({name: pa.array(values) for name, values in columns.items() if set(values) != {None}})


def rows(store: Store, at: slice | np.ndarray) -> list[tuple[int, ...]]:
    """Event rows as (user, category, time, item, kind), by way of the arrays of the store alone."""
    item = store.event_item[at]
    at = np.arange(store.n_events)[at]
    group = np.searchsorted(store.group_start, at, side="right") - 1
    user = np.searchsorted(store.user_group, group, side="right") - 1
    columns = (user, store.group_category[group], store.event_time[at], item, store.event_behavior[at])
    assert np.array_equal(store.item_category[item], store.group_category[group])
    return [tuple(map(int, row)) for row in zip(*columns, strict=True)]


@st.composite
def logs(draw: st.DrawFn) -> list[Event]:
    """Few users, items and times, so that ties, duplicates and items of several categories are common."""
    seed, n = draw(st.integers(0, 2**32 - 1)), draw(st.integers(1, 300))
    users, items, categories = draw(st.integers(1, 12)), draw(st.integers(1, 15)), draw(st.integers(1, 5))
    rng = np.random.default_rng(seed)
    drawn = zip(*(rng.integers(0, top, n).tolist() for top in (users, items, categories, 20, 3)), strict=True)
    named = draw(st.booleans())
    start = draw(st.sampled_from([0, 86_400 * 365 * 30]))
    kinds = draw(st.sampled_from([(None, None, None), (None, "click", "buy"), ("view", "é", "")]))
    return [
        (f"u{u}", f"i{i}", f"c{c}", start + 5_000 * t, kinds[k])
        if named
        else (u * 7, i, c, start + t, kinds[k])
        for u, i, c, t, k in drawn
    ]


@settings(  # without shrinking: each example is a whole ingest
    max_examples=10, deadline=None, phases=[Phase.generate], suppress_health_check=[HealthCheck.too_slow]
)
@given(log=logs(), limit=st.integers(1, 8), floor=st.integers(1, 10_000))
def test_store_agrees_with_a_scan_of_the_log(log: list[Event], limit: int, floor: int) -> None:
    scan = Scan(log)
    with tempfile.TemporaryDirectory() as folder:
        report = ingest(table_of(log), Path(folder) / "store", threads=1)
        store = Store.open(Path(folder) / "store", verify=True)
        assert (report.kept, report.duplicates) == (len(scan.events), len(log) - len(scan.events))
        assert report.recategorised == scan.recategorised
        assert rows(store, slice(None)) == scan.events
        agrees_on_numbers(store, scan)
        times = sorted({event[2] for event in scan.events})
        for user in range(len(scan.users)):
            for now in {times[0], times[len(times) // 2], times[-1], times[-1] + 1}:
                agrees_on_a_request(store, scan, user, now, limit, floor)


def agrees_on_numbers(store: Store, scan: Scan) -> None:
    assert store.user_ids.take(range(store.n_users)) == scan.users
    assert store.category_ids.take(range(store.n_categories)) == scan.categories
    assert store.item_ids.take(range(store.n_items)) == scan.items
    assert store.item_category.tolist() == scan.category_of
    assert [store.user_number(user) for user in scan.users] == list(range(store.n_users))
    assert [store.item_number(item) for item in scan.items] == list(range(store.n_items))
    assert [store.category_number(c) for c in scan.categories] == list(range(store.n_categories))
    assert list(store.behaviors) == scan.kinds
    times = [event[2] for event in scan.events]
    assert (store.first_time, store.last_time) == (min(times), max(times))


def agrees_on_a_request(store: Store, scan: Scan, user: int, now: int, limit: int, floor: int) -> None:
    life = store.life(user, now)
    assert rows(store, store.recent(user, now, limit)) == scan.recent(user, now, limit)
    assert life.recent(limit).item.tolist() == [event[3] for event in scan.recent(user, now, limit)]
    for category in range(store.n_categories):
        expected = scan.in_context(user, category, now, limit)
        assert rows(store, store.in_context(user, category, now, limit)) == expected
        behaviors = life.in_context(category, limit)
        assert [*zip(*map(np.ndarray.tolist, behaviors), strict=True)] == [
            (item, c, time, kind) for _, c, time, item, kind in expected
        ]
    categories, scores = store.engagement(user, now, floor)
    expected_scores = scan.engagement(user, now, floor)
    assert dict(zip(categories.tolist(), scores, strict=True)) == pytest.approx(expected_scores)
    items = sorted({e[3] for e in scan.events if e[0] == user and e[2] < now})
    assert life.items().tolist() == items
    agrees_on_the_last(store, scan, user, now, limit, floor)
    assert life.lately(limit).items().tolist() == items, "of the whole life"


def agrees_on_the_last(store: Store, scan: Scan, user: int, now: int, n: int, floor: int) -> None:
    """A life of its last n behaviors, and of those at the time of the first of them."""
    lately = store.life(user, now).lately(n)
    last = scan.recent(user, now, n)
    since = last[0][2] if last else now
    expected = [e for e in scan.recent(user, now, len(scan.events)) if e[2] >= since]
    assert lately.recent(1000).item.tolist() == [e[3] for e in expected]
    assert lately.recent(2).item.tolist() == [e[3] for e in expected][-2:]
    for category in range(store.n_categories):
        for limit in (1000, 2):
            in_context = lately.in_context(category, limit)
            of_category = [e for e in expected if e[1] == category][-limit:]
            assert in_context.time.tolist() == [e[2] for e in of_category]
            assert in_context.item.tolist() == [e[3] for e in of_category]
    categories, scores = lately.engagement(floor)
    wanted = scan.engagement(user, now, floor, since)
    assert dict(zip(categories.tolist(), scores, strict=True)) == pytest.approx(wanted)


@pytest.fixture(scope="module")
def long(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """One user: a, b, c, d of category x and p, q, r of y, by turns; two at second 40."""
    path = tmp_path_factory.mktemp("long") / "store"
    log = [
        (1, i, c, t, None) for i, c, t in zip("apbqcrd", "xyxyxyx", (10, 20, 30, 40, 40, 60, 70), strict=True)
    ]
    ingest(table_of([*log, (2, "a", "x", 90, None)]), path, threads=1)
    return Store.open(path)


def ids(store: Store, behaviors: Behaviors) -> str:
    return "".join(store.item_ids.take(behaviors.item))


def test_the_last_behaviors_of_a_life(long: Store) -> None:
    life = long.life(0)
    x, y = long.category_number("x"), long.category_number("y")
    assert life.lately(None) is life
    for n, of_x, of_y in ((1, "d", ""), (2, "d", "r"), (3, "cd", "qr"), (4, "cd", "qr"), (5, "bcd", "qr")):
        lately = life.lately(n)
        assert (ids(long, lately.in_context(x)), ids(long, lately.in_context(y))) == (of_x, of_y)
        assert sorted(ids(long, lately.recent())) == sorted(of_x + of_y)
        assert len(lately.items()) == 7, "what was met long ago was met, too"
        assert set(lately.engagement()[0]) == {c for c, met in ((x, of_x), (y, of_y)) if met}
    assert ids(long, life.lately(100).recent()) == ids(long, life.recent())


def test_behaviors_spread_over_a_life() -> None:
    """After the newest, older ones in the middle of as many equal parts of the rest; all of a short life."""
    place, count = spread(np.array([0, 1, 3, 5, 7, 100]), 3, 4)
    looked_at = [row[:n].tolist() for row, n in zip(place, count, strict=True)]
    assert looked_at[:3] == [[], [0], [2, 1, 0]]
    assert looked_at[3:5] == [[4, 3, 2, 1, 0], [6, 5, 4, 3, 2, 1, 0]]
    assert looked_at[5] == [99, 98, 97, 84, 60, 36, 12]
    assert place.shape == (6, 7)
    for newest, older in ((3, 0), (0, 4)):
        place, count = spread(np.array([0, 2, 50]), newest, older)
        assert count.tolist() == [0, 2, newest + older]
        assert place[2].tolist() == ([49, 48, 47] if newest else [43, 31, 18, 6])
        assert place[1, :2].tolist() == [1, 0]


def test_the_newest_and_some_of_the_rest(long: Store) -> None:
    life = long.life(0)
    whole = ids(long, life.recent())
    assert ids(long, life.sampled(2, 0)) == whole[-2:]
    assert ids(long, life.sampled(2, 1)) == whole[2] + whole[-2:]
    assert ids(long, life.sampled(3, 9)) == whole
    assert ids(long, life.lately(3).sampled(1, 1)) == whole[4] + whole[-1], "of the four since second 40"
    assert ids(long, long.life(0, 5).sampled(3, 3)) == ""


def test_the_last_of_the_last(long: Store) -> None:
    life = long.life(0, 65)
    assert ids(long, life.lately(1).lately(5).recent()) == "r"
    assert ids(long, life.lately(5).lately(1).recent()) == "r"
    assert ids(long, life.lately(3).in_context(long.category_number("x"))) == "c"
    nobody = long.life(0, 5).lately(3)
    assert len(nobody.recent().item) == len(nobody.items()) == len(nobody.engagement()[0]) == 0


def test_arrays_keep_their_promises(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    columns = {"user_id": 300, "item_id": 200, "category_id": 20, "timestamp": 500}
    log = pa.table({name: rng.integers(0, top, 20_000) for name, top in columns.items()})
    ingest(log, tmp_path / "store", threads=1)
    store = Store.open(tmp_path / "store")
    for user in range(store.n_users):
        own = store.rows_of(user)
        order = store.time_order[own]
        assert np.array_equal(np.sort(order), np.arange(own.start, own.stop))
        assert np.array_equal(order, own.start + np.argsort(store.event_time[own], kind="stable"))
        assert np.array_equal(store.time_order[store.time_position[own]], np.arange(own.start, own.stop))
    assert np.array_equal(store.category_group, np.argsort(store.group_category, kind="stable"))
    for category in range(store.n_categories):
        start, stop = store.category_group_start[category : category + 2]
        assert set(store.group_category[store.category_group[start:stop]]) == {category}


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Store:
    path = tmp_path_factory.mktemp("small") / "store"
    log: list[Event] = [(1, "a", "x", 10, None), (1, "b", "y", 10, None), (2, "a", "x", 30, None)]
    ingest(table_of(log), path, threads=1)
    return Store.open(path)


def test_a_request_does_not_see_its_own_instant(small: Store) -> None:
    assert len(small.life(0, 10).recent().item) == 0
    assert len(small.life(0, 10.5).recent().item) == 2
    assert len(small.life(1).recent().item) == 1, "no time means just after the last event"


def test_unknown_ids_name_themselves_and_what_there_is(small: Store) -> None:
    with pytest.raises(UnknownUser, match=r"user 7 is not among the 2 users of .*integers, such as 1"):
        small.user_number(7)
    with pytest.raises(UnknownUser, match="user '1' is not among"):
        small.user_number("1")
    with pytest.raises(UnknownItem, match=r"item 'z' is not among the 2 items .*such as 'a'"):
        small.item_number("z")
    with pytest.raises(UnknownCategory, match="category 'z' is not among the 2 categories"):
        small.category_number("z")


def test_a_category_never_met_is_an_empty_context(small: Store) -> None:
    assert small.in_context(1, 1) == slice(0, 0)


def test_a_cut_off_array_is_damaged(small: Store, tmp_path: Path) -> None:
    for file in small.path.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "event_item.npy").write_bytes((tmp_path / "event_item.npy").read_bytes()[:-1])
    with pytest.raises(Damaged, match=r"event_item\.npy: \d+ bytes, expected \d+"):
        Store.open(tmp_path)


def test_codes_of_a_vocabulary_in_another() -> None:
    old, new = Vocabulary("color", ("blue", "red")), Vocabulary("color", ("green", "red"))
    assert old.codes_in(new).tolist() == [0, 0, 2]
