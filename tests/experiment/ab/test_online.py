"""Online figures are those of their definitions, by hand; and chance is what enumeration says it is."""

from __future__ import annotations

import itertools
import math
import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from longretriever.experiment.ab import online
from longretriever.experiment.ab.day import Day, Shown
from longretriever.experiment.ab.online import FIGURES, OF_ROUTE, Sums, _difference, compare, summary, value

# Items 0 to 5 are of the categories 0 0 1 1 2 2; users 3 and 8 take part, and 11, who never comes.
CATEGORY_OF, USERS = np.array([0, 0, 1, 1, 2, 2]), np.array([3, 8, 11])
A, B, C = 1, 2, 4
NAN = float("nan")


def day(impressions: list[tuple], retrieved: list[list[int]], alone: list[list[int]]) -> Day:
    """Impressions are (user, item, click, order, routes)."""
    user, item, click, order, routes = zip(*impressions, strict=True) if impressions else [()] * 5
    n = len(user)
    zero = np.zeros(n, np.int64)
    what = np.array(click, bool), np.array(order, bool), np.array(routes, np.uint32), np.zeros((n, 1))
    users, items = np.array(user, np.int64), np.array(item, np.int64)
    shown = Shown(users, items, zero, zero, zero, *what)
    return Day(shown, np.ones(len(USERS), np.int64), np.array(retrieved), np.array(alone))


FIRST = day(
    [
        (3, 0, True, False, A),
        (3, 1, True, True, A | B),
        (3, 2, False, False, B),
        (3, 4, False, False, A),
        (8, 5, False, False, B),
    ],
    [[6, 4, 0], [2, 5, 0], [0, 0, 0]],
    [[3, 1, 0], [0, 3, 0], [0, 0, 0]],
)
SECOND = day(
    [
        (8, 0, True, False, A | B),
        (8, 2, True, True, A),
        (8, 3, True, True, B),
        (3, 3, False, False, A | B),
    ],
    [[2, 2, 0], [3, 3, 1], [0, 0, 0]],
    [[0, 0, 0], [1, 2, 1], [0, 0, 0]],
)


def of(sums: tuple[np.ndarray, np.ndarray]) -> list[tuple[float, float]]:
    return list(zip(*(column.tolist() for column in sums), strict=True))


BY_HAND = {
    "pv": [(5, 1), (4, 1), (0, 1)],
    "uv_ctr": [(1, 2), (1, 2), (0, 0)],
    "uv_cvr": [(1, 2), (1, 2), (0, 0)],
    "orders": [(1, 1), (2, 1), (0, 1)],
    "clicks": [(2, 1), (3, 1), (0, 1)],
    "ctr": [(2, 5), (3, 4), (0, 0)],
    "cvr": [(1, 2), (2, 3), (0, 0)],
    "exposed_categories": [(3 + 1, 2), (1 + 2, 2), (0, 0)],
    "clicked_categories": [(1 + 0, 2), (0 + 2, 2), (0, 0)],
}


def test_figures_of_an_arm_are_those_by_hand():
    found = online.of_arm([FIRST, SECOND], USERS, CATEGORY_OF)
    assert {name: of(sums) for name, sums in found.items()} == BY_HAND
    assert list(found) == list(FIGURES)
    assert value(found["pv"]) == 3
    assert value(found["ctr"]) == 5 / 9
    assert value(found["exposed_categories"]) == 7 / 4
    assert {name: one["value"] for name, one in summary(found, 0).items()} == {
        name: value(sums) for name, sums in found.items()
    }


def test_figures_of_routes_are_those_by_hand():
    found = online.of_routes([FIRST, SECOND], USERS, ["a", "b", "c"])
    assert {figure: of(sums) for figure, sums in found["a"].items()} == {
        "aer": [(3 + 1, 8), (0 + 2, 5), (0, 0)],
        "uer": [(2 + 0, 3), (0 + 1, 1), (0, 0)],
        "ctr": [(2, 4), (2, 2), (0, 0)],
        "cvr": [(1, 2), (1, 2), (0, 0)],
        "ctr_cvr": [(1, 4), (1, 2), (0, 0)],
        "unique_share": [(3, 8), (1, 5), (0, 0)],
        "exposed_share": [(4, 5), (2, 4), (0, 0)],
    }
    assert {figure: of(sums) for figure, sums in found["b"].items()} == {
        "aer": [(2 + 1, 6), (1 + 2, 8), (0, 0)],
        "uer": [(1 + 0, 1), (1 + 1, 5), (0, 0)],
        "ctr": [(1, 3), (2, 3), (0, 0)],
        "cvr": [(1, 1), (1, 2), (0, 0)],
        "ctr_cvr": [(1, 3), (1, 3), (0, 0)],
        "unique_share": [(1, 6), (5, 8), (0, 0)],
        "exposed_share": [(3, 5), (3, 4), (0, 0)],
    }
    assert {name: value(sums) for name, sums in found["c"].items()} == pytest.approx(
        {"aer": 0, "uer": 0, "ctr": NAN, "cvr": NAN, "ctr_cvr": NAN, "unique_share": 1, "exposed_share": 0},
        nan_ok=True,
    )
    assert list(found["a"]) == list(OF_ROUTE)


def test_a_day_without_an_impression_counts_for_nothing_but_its_length():
    nothing = day([], [[0, 0, 0]] * 3, [[0, 0, 0]] * 3)
    found = online.of_arm([FIRST, SECOND, nothing, nothing], USERS, CATEGORY_OF)
    assert {name: of(sums) for name, sums in found.items()} == BY_HAND
    assert (
        online.of_routes([nothing], USERS, ["a"])["a"]["aer"][1].sum()
        == online.of_arm([nothing], USERS, CATEGORY_OF)["ctr"][1].sum()
        == 0
    )


# -- nothing to divide by


def test_where_there_is_nothing_to_divide_by_it_is_nan_and_nobody_is_warned():
    zero, some = np.zeros(4), np.arange(4.0)
    sums = {"never": (zero, zero), "some": (some, some + 1)}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = summary(sums, 0)
        (never, row) = compare(sums, sums, 0, flips=20)
    assert math.isnan(found["never"]["value"])
    assert np.isnan(found["never"]["interval"]).all()
    assert np.isfinite(found["some"]["interval"]).all()
    assert all(math.isnan(never[name]) for name in ("treatment", "control", "lift", "p"))
    assert np.isnan(never["interval"]).all()
    assert row["p"] == 1


def test_a_lift_over_nothing_is_nan():
    (row,) = compare({"x": (np.ones(5), np.ones(5))}, {"x": (np.zeros(5), np.ones(5))}, 0)
    assert (row["treatment"], row["control"]) == (1, 0)
    assert math.isnan(row["lift"])
    assert row["p"] < 0.2


# -- how sure

LITTLE = st.lists(
    st.tuples(*[st.integers(0, 3), st.integers(0, 3)] * 2).map(
        lambda v: (v[0], v[0] + v[1], v[2], v[2] + v[3])  # nothing above is more than what is below
    ),
    min_size=1,
    max_size=7,
)


def ratio(above: float, below: float) -> float:
    return above / below if below else NAN


def enumerated(people: list[tuple[int, int, int, int]]) -> float:
    """The share of all exchanges whose difference is at least as far from 0 as the one found."""
    differences = []
    for exchanged in itertools.product((False, True), repeat=len(people)):
        lives = [
            (c, d, a, b) if x else (a, b, c, d) for x, (a, b, c, d) in zip(exchanged, people, strict=True)
        ]
        t, tb, c, cb = (sum(column) for column in zip(*lives, strict=True))
        differences.append(ratio(t, tb) - ratio(c, cb))
    if math.isnan(differences[0]):
        return NAN
    return sum(abs(d) >= abs(differences[0]) - 1e-12 for d in differences) / len(differences)


def one(people) -> tuple[Sums, Sums]:
    t, tb, c, cb = (np.array(column, float) for column in zip(*people, strict=True))
    return {"x": (t, tb)}, {"x": (c, cb)}


@settings(deadline=None, max_examples=40)
@given(LITTLE)
def test_p_is_the_share_of_all_exchanges(people):
    treatment, control = one(people)
    (row,) = compare(treatment, control, 3, flips=3000)
    wanted = enumerated(people)
    if math.isnan(wanted):
        assert math.isnan(row["p"])
    else:
        assert row["p"] == pytest.approx(wanted, abs=5 * math.sqrt(wanted * (1 - wanted) / 3000) + 0.001)


def test_nothing_is_surer_than_the_number_of_exchanges():
    (row,) = compare(*one([(1, 1, 0, 1)] * 40), 0, flips=99)
    assert row["p"] == 0.01


@settings(deadline=None, max_examples=30)
@given(LITTLE)
def test_equal_arms_have_a_p_of_1_and_no_lift(people):
    sums, _ = one(people)
    (row,) = compare(sums, sums, 0, flips=50)
    if value(sums["x"]) > 0:
        assert (row["p"], row["lift"], row["interval"]) == (1, 0, [0, 0])


@given(st.integers(1, 5), st.data())
def test_the_difference_is_of_the_two_ratios(M, data):
    numbers = st.lists(st.integers(1, 50), min_size=M, max_size=M)
    t, tb, c, cb = (np.array(data.draw(numbers), float) for _ in range(4))
    found = _difference(np.hstack([t - c, tb - cb])[None], [t + c, tb + cb])
    assert found[0] == pytest.approx(t / tb - c / cb)


def test_comparisons_are_of_figures_that_both_have_in_order():
    pair = np.ones(4), np.ones(4)
    found = compare({"b": pair, "a": pair, "mine": pair}, {"a": pair, "b": pair, "yours": pair}, 0, flips=5)
    assert [row["figure"] for row in found] == ["b", "a"]


def drawn(rng: np.random.Generator, users: int, chance: float) -> tuple[np.ndarray, np.ndarray]:
    """Clicks and impressions of users who differ a lot."""
    shown = 1 + rng.poisson(rng.gamma(1, 10, users))
    return rng.binomial(shown, np.clip(chance * rng.lognormal(-0.1, 0.4, users), 0, 1)) * 1.0, shown * 1.0


def test_intervals_cover_what_is_true_as_often_as_they_say():
    """200 tests of 80 users; the lift is a third."""
    covers, covered, sure = [], [], []
    for n in range(200):
        rng = np.random.default_rng(n)
        control, treatment = drawn(rng, 80, 0.15), drawn(rng, 80, 0.2)
        (row,) = compare({"x": treatment}, {"x": control}, n, flips=100)
        found = summary({"x": control}, n, resamples=200)["x"]["interval"]
        covers.append(row["interval"][0] < 1 / 3 < row["interval"][1])
        covered.append(found[0] < 0.15 < found[1])
        (same,) = compare({"x": drawn(rng, 80, 0.15)}, {"x": control}, n, flips=100)
        sure.append(same["p"] < 0.05)
    assert 0.9 < np.mean(covers) < 0.99
    assert 0.9 < np.mean(covered) < 0.99
    assert 0.01 < np.mean(sure) < 0.1


def test_the_interval_is_that_of_a_slow_bootstrap():
    rng = np.random.default_rng(5)
    t, c = drawn(rng, 30, 0.3), drawn(rng, 30, 0.2)
    lifts = []
    for _ in range(4000):
        who = rng.integers(0, 30, 30)
        lifts.append(ratio(t[0][who].sum(), t[1][who].sum()) / ratio(c[0][who].sum(), c[1][who].sum()) - 1)
    (row,) = compare({"x": t}, {"x": c}, 1, flips=5)
    assert row["interval"] == pytest.approx(np.quantile(lifts, [0.025, 0.975]), abs=0.07)
    assert row["lift"] == pytest.approx(value(t) / value(c) - 1)


def test_the_same_seed_gives_the_same():
    rng = np.random.default_rng(6)
    t, c = {"x": drawn(rng, 30, 0.3)}, {"x": drawn(rng, 30, 0.25)}
    assert compare(t, c, 1) == compare(t, c, 1) != compare(t, c, 2)
    assert summary(t, 1) == summary(t, 1) != summary(t, 2)


def test_exchanges_beyond_what_is_held_at_once_count_too(monkeypatch):
    monkeypatch.setattr(online, "_AT_ONCE", 100)
    (row,) = compare(*one([(1, 1, 0, 1)] * 3), 0, flips=4001)
    assert row["p"] == pytest.approx(0.25, abs=0.035)
