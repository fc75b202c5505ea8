"""Hand-known figures of tiny logs; and what is counted without loops, against loops over each life."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from longretriever.evaluate import describe as described
from longretriever.evaluate.describe import describe
from longretriever.store.behaviors import Store
from tests.worlds import DAY, START, stored, table

CATEGORIES = 3


def a_log(rows: list[tuple[int, int, int]], path: Path) -> Store:
    """Rows of user, item, seconds from the start; an item's category is its number modulo 3."""
    user, item, time = zip(*rows, strict=True)
    return stored(
        table(user, item, [i % CATEGORIES for i in item], [START + t for t in time]), path, threads=1
    )


# -- known by hand


def test_a_log_known_by_hand(tmp_path):
    """User 1: items 0 0 1 0 within a minute, 3 a day later; user 2: item 0 and, in the same second, 4."""
    rows = [(1, 0, 0), (1, 0, 10), (1, 1, 20), (1, 0, 50), (1, 3, DAY), (2, 0, 0), (2, 4, 0)]
    found = describe(a_log(rows, tmp_path / "store"))
    expected = {
        **{"events": 7, "users": 2, "items": 4, "categories": 2, "days": 1},
        **{"events_per_item": 7 / 4, "items_per_category": 2},
        **{"behaviors_mean": 3.5, "behaviors_median": 3.5, "behaviors_max": 5, "busiest_users": 5 / 7},
        "behaviors_gini": (5 - 2) / (2 * 7),
        # of categories 0 and 1: 5 and 2 events; user 1 has 4 and 1, user 2 has 1 and 1
        **{"largest_category": 5 / 7, "top_10_categories": 1, "user_categories": 2},
        "user_effective_categories": (5 / 4**0.8 + 2) / 2,
        "top_items": 4 / 7,
        # next are the last four of user 1: items 0 1 0 3
        **{"item_again": 2 / 4, "item_lately": 2 / 4, "category_again": 3 / 4},
        **{"stay": 2 / 4, "in_top_1": 3 / 4, "in_top_5": 3 / 4, "by_recency_1": 3 / 4},
        **{"same_second": 1 / 7, "gap_median": 20, "gap_in_session": 3 / 4, "session_events": 7 / 3},
        **{"active_days": 1.5, "burstiness": None, "active_share": None, "life_share": None},
    }
    assert {name: found[name] for name in expected} == pytest.approx(expected)


def test_a_category_that_the_current_one_tells(tmp_path):
    rows = [(user, at % 2, 100 * at) for user in (1, 2) for at in range(101)]
    found = describe(a_log(rows, tmp_path / "store"))
    assert found["stay"] == 0
    assert found["entropy"] == pytest.approx(1 + 1 / (2 * 200 * np.log(2)))
    assert found["entropy_given_current"] == pytest.approx(0)
    assert found["told_by_current"] == pytest.approx(1)
    assert found["burstiness"] == pytest.approx(-1)  # a clock
    assert (found["active_days"], found["active_share"], found["life_share"]) == (1, 1, 1)


def test_what_comes_by_lot_is_told_by_nothing(tmp_path):
    rng = np.random.default_rng(1)
    rows = [(user, int(rng.integers(3)), 100 * at) for user in range(20) for at in range(200)]
    found = describe(a_log(rows, tmp_path / "store"))
    assert found["stay"] == pytest.approx(1 / 3, abs=0.02)
    assert found["in_top_1"] == pytest.approx(1 / 3, abs=0.02)
    assert found["told_by_current"] == pytest.approx(0, abs=0.003)
    gaps = rng.exponential(3000, (20, 400)).astype(int) + 1
    rows = [(user, 0, int(t)) for user in range(20) for t in np.cumsum(gaps[user])]
    assert describe(a_log(rows, tmp_path / "store"))["burstiness"] == pytest.approx(0, abs=0.03)


def test_recency_and_count_disagree(tmp_path):
    """Ten behaviors in category 0 a year ago; since yesterday category 1 twice, then again."""
    rows = [(1, 0, at * 60) for at in range(10)] + [(1, 1, 365 * DAY + at * 7200) for at in range(3)]
    found = describe(a_log(rows, tmp_path / "store"))
    assert found["in_top_1"] == pytest.approx(9 / 12)
    assert found["by_recency_1"] == pytest.approx(11 / 12)


def test_one_behavior_a_user_has_nothing_next(tmp_path):
    found = describe(a_log([(user, user, 5) for user in range(4)], tmp_path / "store"))
    assert (found["item_again"], found["stay"], found["entropy"], found["gap_median"]) == (None,) * 4
    assert (found["taste_in_category"], found["life_share"]) == (None, None)
    assert (found["behaviors_gini"], found["session_events"], found["same_second"]) == (0, 1, 0)


def test_curves_begin_and_end_where_the_log_does(tmp_path):
    store = a_log([(1, 0, 0), (1, 1, 10), (1, 3, 500), (2, 0, 0)], tmp_path / "store")
    found = described.curves(store)
    assert found["activity"] == [[1, 1], [3, 0.5]]
    assert found["gaps"] == [[10, 1], [490, 0.5]]
    assert found["categories"] == [[1, 0.75], [2, 0.25]]


# -- against loops


@settings(max_examples=12, deadline=None)
@given(seed=st.integers(0, 10**6), events=st.integers(2, 400), times=st.sampled_from([4, 15, 60]))
def test_as_by_hand_in_any_log(seed, events, times, tmp_path_factory):
    """Of six users, eight items and two kinds of behavior, many of the same second."""
    rng = np.random.default_rng(seed)
    user, item, kind = (
        rng.integers(6, size=events),
        rng.integers(8, size=events),
        rng.integers(2, size=events),
    )
    time = START + 700 * rng.integers(times, size=events)
    log = table(user, item, item % CATEGORIES, time, np.array(["click", "buy"])[kind])
    store = stored(log, tmp_path_factory.mktemp("any") / "store", threads=1)
    lives = described.lives_of(store)
    found = {**described.repeats(lives), **described.rhythm(lives)}
    found |= described.next_category(store, lives, np.random.default_rng(0))
    columns = (user, item, (time - START) // 700, kind)
    truth = by_loops(set(zip(*(c.tolist() for c in columns), strict=True)))
    low, high = truth.pop("stay")
    for name, value in truth.items():
        assert found[name] == pytest.approx(value), name
    if low is None:
        assert found["stay"] is None
    else:
        assert low - 1e-9 <= found["stay"] <= high + 1e-9  # of several of one second, one is drawn


def by_loops(events: set[tuple[int, int, int, int]]) -> dict:
    """Figures of (user, item, time, kind), time in steps of 700 seconds; `stay` as its least and most."""
    again, lately, category, least, most, tops, gaps = [], [], [], [], [], {1: [], 5: [], 20: []}, []
    sessions = 0
    for user in {u for u, *_ in events}:
        life = sorted((t, i % CATEGORIES, i, kind) for u, i, t, kind in events if u == user)
        times = sorted({t for t, *_ in life})
        gaps += [700 * (b - a) for a, b in pairwise(times)]
        sessions += 1 + sum(b - a > 2 for a, b in pairwise(times))
        for t, c, i, _ in life:
            before = [e for e in life if e[0] < t]
            if not before:
                continue
            again.append(i in [e[2] for e in before])
            lately.append(i in [e[2] for e in before[-10:]])
            category.append(c in [e[1] for e in before])
            latest = {e[1] for e in before if e[0] == before[-1][0]}
            least.append(latest == {c})
            most.append(c in latest)
            count = Counter(e[1] for e in before)
            ahead, level = sum(n > count[c] for n in count.values()), list(count.values()).count(count[c])
            for k, chances in tops.items():
                chances.append(min(1.0, max(0.0, (k - ahead) / level)) if c in count else 0.0)
    mean = lambda values: float(np.mean(values)) if len(values) else None  # noqa: E731
    return {
        **{"item_again": mean(again), "item_lately": mean(lately), "category_again": mean(category)},
        **{f"in_top_{k}": mean(chances) for k, chances in tops.items()},
        "gap_median": float(np.median(gaps)) if gaps else None,
        "gap_in_session": mean(np.array(gaps) <= 1800),
        "session_events": len(events) / sessions,
        "stay": (mean(least), mean(most)),
    }
