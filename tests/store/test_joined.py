"""A store and live events, joined, answer as one store of all of them does."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from longretriever.model.history import histories
from longretriever.store.behaviors import Store
from longretriever.store.joined import Joined, LiveEvents, New
from tests.worlds import START, stored, table

USERS, ITEMS, CATEGORIES = 6, 30, 4
STRANGER = 99
few = settings(  # each example is two ingests
    max_examples=15, deadline=None, phases=[Phase.generate], suppress_health_check=list(HealthCheck)
)


def log_of(seed: int, events: int) -> pa.Table:
    """No two events of a user at one time; every category and kind occurs early, so that a store knows it."""
    rng = np.random.default_rng(seed)
    item = np.concatenate([np.arange(CATEGORIES), rng.integers(0, ITEMS, events)])
    user = np.concatenate([np.zeros(CATEGORIES, int), rng.integers(0, USERS, events)])
    kind = np.array(["click", "buy"])[
        np.concatenate([[0, 1] * (CATEGORIES // 2), rng.integers(0, 2, events)])
    ]
    time = (
        START
        + np.concatenate([np.arange(CATEGORIES), CATEGORIES + rng.permutation(10 * events)[:events]]) * 97
    )
    return table(user, item, item % CATEGORIES, time, kind)


def parted(log: pa.Table, late: np.ndarray, path, users: list[int]) -> tuple[Joined, Store]:
    """The log as a store of what is not `late` joined with the rest, and as one store."""
    base, whole = stored(log.filter(~late), path / "base"), stored(log, path / "whole")
    live = log.filter(late)
    new = sorted({i for i in live["item_id"].to_pylist() if base.item_ids.number_of(i) is None})
    known = {**{i: base.n_items + n for n, i in enumerate(new)}}
    of_user = []
    for user in users:
        mine = live.filter(pa.compute.equal(live["user_id"], user)).to_pydict()
        item = [known.get(i, base.item_ids.number_of(i)) for i in mine["item_id"]]
        category = [base.category_number(c) for c in mine["category_id"]]
        kind = [base.behaviors.index(k) for k in mine["behavior"]]
        of_user.append(
            LiveEvents(*(np.array(x, np.int64) for x in (item, category, mine["timestamp"], kind)))
        )
    numbers = [base.user_ids.number_of(user) for user in users]
    return Joined(base, numbers, users, of_user, New(tuple(new), tuple(i % CATEGORIES for i in new))), whole


def told(store: Store, user: int, now: float) -> dict:
    """Everything that a request asks of a life, by ids."""
    life = store.life(user, now)

    def said(b):
        kinds = [store.behaviors[k] for k in b.kind]
        return list(
            zip(store.item_ids.take(b.item), b.category.tolist(), b.time.tolist(), kinds, strict=True)
        )

    category, score = life.engagement()
    return {
        "recent": said(life.recent(5)),
        "all": said(life.recent(10_000)),
        "sampled": said(life.sampled(3, 4)),
        "contexts": [said(life.in_context(c, 3)) for c in range(store.n_categories)],
        "lately": [said(life.lately(4).in_context(c)) for c in range(store.n_categories)],
        "engagement": dict(zip(category.tolist(), score.round(9).tolist(), strict=True)),
        "items": sorted(store.item_ids.take(life.items())),
    }


def moments(log: pa.Table) -> list[float]:
    time = np.sort(log["timestamp"].to_numpy())
    return [float(time[0]), float(time[len(time) // 2]), time[-3] + 0.5, float(time[-1]), float(time[-1] + 1)]


@few
@given(
    seed=st.integers(0, 1000), events=st.integers(1, 120), share=st.floats(0, 1), out_of_order=st.booleans()
)
def test_lives_are_those_of_one_store(tmp_path_factory, seed, events, share, out_of_order):
    log, path, rng = log_of(seed, events), tmp_path_factory.mktemp("joined"), np.random.default_rng(seed)
    time = log["timestamp"].to_numpy()
    late = rng.random(len(time)) < share if out_of_order else time > np.quantile(time, 1 - share)
    late[:CATEGORIES] = False
    users = [int(u) for u in rng.permutation(USERS)[: rng.integers(1, USERS + 1)]]
    users = [u for u in users if u in log["user_id"].to_pylist()] or [0]
    joined, whole = parted(log, late, path, users)
    for n, user in enumerate(users):
        for now in moments(log):
            assert told(joined, n, now) == told(whole, whole.user_number(user), now)
    there = np.array([whole.user_number(user) for user in users])
    for now in moments(log):
        when = np.full(len(users), now)
        a = histories(joined, np.arange(len(users)), when, categories=3, recent=6)
        b = histories(whole, there, when, categories=3, recent=6)
        for field in ("category", "feature", "recent", "age", "general"):
            np.testing.assert_array_equal(getattr(a, field), getattr(b, field), err_msg=field)


def test_of_equal_times_the_live_event_is_the_later(tmp_path):
    base = stored(table([1, 1], [3, 4], [0, 0], [START, START + 5]), tmp_path / "base")
    live = LiveEvents(*(np.array([x]) for x in (base.item_number(3), 0, START + 5, 0)))
    joined = Joined(base, [0], [1], [live])
    assert joined.item_ids.take(joined.life(0, START + 6).recent().item) == [3, 4, 3]
    assert len(joined.life(0, START + 5).recent().item) == 1


def test_who_is_nowhere_has_no_life(tmp_path):
    base = stored(log_of(1, 20), tmp_path / "base")
    joined = Joined(base, [None], [STRANGER], [LiveEvents(*[np.empty(0, np.int64)] * 4)])
    now = joined.last_time + 1
    assert told(joined, 0, now) == {
        "recent": [],
        "all": [],
        "sampled": [],
        "contexts": [[]] * CATEGORIES,
        "lately": [[]] * CATEGORIES,
        "engagement": {},
        "items": [],
    }
    assert joined.user_ids.take([0]) == [STRANGER]


@pytest.mark.parametrize("number", [None, 0])
def test_titles_and_new_kinds(tmp_path, number):
    items = pa.table({"item_id": [1, 2], "category_id": [0, 0], "title": ["one", "two"]})
    base = stored(
        table([5, 5], [1, 2], [0, 0], [START, START + 1], ["click", "click"]), tmp_path / "base", items=items
    )
    live = LiveEvents(np.array([2, 0]), np.array([0, 0]), np.array([START + 9, START + 7]), np.array([1, 0]))
    joined = Joined(base, [number], [5], [live], New((77,), (0,), ("wish",)))
    met = joined.life(0).recent(2)
    assert joined.item_ids.take(met.item) == [1, 77]
    assert joined.titles(met.item) == ["one", None]
    assert [joined.behaviors[k] for k in met.kind] == ["click", "wish"]
    assert joined.item_ids.number_of(77) == 2
    assert met.category.tolist() == [0, 0]


def one_user(path, kinds: list[str]) -> Store:
    """Items 1, 2 and 2 again at seconds 0, 5 and 5, the last two of different kinds."""
    return stored(table([7] * 3, [1, 2, 2], [0] * 3, [START, START + 5, START + 5], kinds), path / "base")


def test_what_the_store_has_already_is_left_out(tmp_path):
    """The same user, item, time and kind; all else is another event."""
    base = one_user(tmp_path, ["a", "a", "b"])
    sent = [(1, 0, 0), (1, 5, 0), (1, 0, 1), (2, 5, 0), (2, 5, 1), (2, 5, 2), (3, 0, 0), (2, 4, 0)]
    item, time, kind = (np.array(column, np.int64) for column in zip(*sent, strict=True))
    number = np.array([0, base.item_number(1), base.item_number(2), 2])
    live = LiveEvents(number[item], np.zeros(len(sent), np.int64), START + time, kind)
    joined = Joined(base, [0], [7], [live], New((3,), (0,), ("c",)))
    met = joined.life(0, START + 10).in_context(0, 100)
    found = sorted(zip(joined.item_ids.take(met.item), met.time - START, met.kind, strict=True))
    assert found == [(1, 0, 0), (1, 0, 1), (1, 5, 0), (2, 4, 0), (2, 5, 0), (2, 5, 1), (2, 5, 2), (3, 0, 0)]
    known = Joined(base, [0], [7], [LiveEvents(*(column[[0, 3, 4]] for column in live))])
    assert told(known, 0, START + 10) == told(base, 0, START + 10)


def test_more_new_kinds_than_a_store_could_hold(tmp_path):
    base = one_user(tmp_path, ["a", "a", "b"])
    n = 300
    live = LiveEvents(np.zeros(n, int), np.zeros(n, int), START + 100 + np.arange(n), 2 + np.arange(n))
    joined = Joined(base, [0], [7], [live], New(behaviors=tuple(f"kind {i}" for i in range(n))))
    for met in (joined.life(0).in_context(0, n), joined.life(0).recent(n)):
        assert [joined.behaviors[kind] for kind in met.kind] == [f"kind {i}" for i in range(n)]
