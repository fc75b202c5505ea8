"""Both rivals against dense arithmetic, in worlds where people and items fall into two groups."""

from __future__ import annotations

import inspect
import sys
import warnings
from collections import Counter

import numpy as np
import pyarrow as pa
import pytest
import threadpoolctl
from hypothesis import given, settings
from hypothesis import strategies as st

from longretriever.errors import InputError, MissingExtra
from longretriever.evaluate import collaborative
from longretriever.evaluate.collaborative import ALS, BM25, GRID, Weighting, recall_by_weighting
from longretriever.evaluate.report import measure_batch
from longretriever.evaluate.rivals import Recommender, train_counts
from longretriever.evaluate.run import evaluate_log
from longretriever.evaluate.split import Split, split
from longretriever.store.behaviors import Store
from tests.evaluate.test_rivals import asked, events_of, rare, rows_of, store_of
from tests.evaluate.test_split import log_of, random_log
from tests.worlds import parity_log

DAY = 86_400
LAST = 30 * DAY  # train's last second, in the worlds of two groups
ITEMS = 20  # of a group; every category has items of both


def two_groups(seed: int = 0, users: int = 30, visits: int = 12) -> list[tuple]:
    """Even users meet items 0-19, odd users items 20-39, each about half of them, in 30 days."""
    rng = np.random.default_rng(seed)
    rows = []
    for user in range(users):
        items = user % 2 * ITEMS + rng.integers(ITEMS, size=visits)
        times = np.sort(rng.choice(LAST, visits, replace=False))
        rows += [(user, int(i), int(i) % 3, int(t)) for i, t in zip(items, times, strict=True)]
    return rows


def named(parts: Split, shown: list[int]) -> list[int]:
    return parts.item_ids.take(pa.array(shown, pa.int64())).to_pylist()


def group_of(parts: Split, shown: list[int]) -> list[int]:
    return [item // ITEMS for item in named(parts, shown)]


def made(rows: list[tuple]) -> tuple[Split, Store]:
    parts = split(log_of(rows), min_events=1)
    return parts, store_of(parts)


def rivals(full: Store, T: int) -> list[Recommender]:
    return [ALS(full, T, weighting=GRID[-1], dim=8), BM25(full, T)]


# -- what they find


@pytest.mark.parametrize("which", [0, 1], ids=["als", "bm25"])
def test_new_items_are_of_the_users_group(which: int) -> None:
    parts, full = made(two_groups())
    users = np.arange(parts.n_users)
    lists = rivals(full, LAST)[which].recommend(users, np.full(len(users), LAST), 5, new=True)
    for user, shown in zip(users, rows_of(lists.item), strict=True):
        assert group_of(parts, shown) == [user % 2] * 5


@pytest.mark.parametrize("which", [0, 1], ids=["als", "bm25"])
def test_a_user_who_turns_after_t_is_known_anew_but_only_from_what_is_earlier(which: int) -> None:
    turned = [(0, ITEMS + i % 10, (ITEMS + i % 10) % 3, LAST + DAY + i) for i in range(100)]
    parts, full = made([*two_groups(), *turned, *[(0, 0, 0, 1)]])
    model = rivals(full, LAST)[which]
    ask = np.array([LAST + DAY, LAST + 2 * DAY])  # the first when it begins, so without it
    before, after = rows_of(model.recommend(np.zeros(2, int), ask, 3, new=True).item)
    assert group_of(parts, before) == [0, 0, 0]
    assert group_of(parts, after) == [1, 1, 1]


# -- the arithmetic


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 1_000), st.sampled_from(GRID), st.booleans())
def test_als_solves_for_the_user_as_dense_arithmetic_does(seed: int, weighting: Weighting, new: bool) -> None:
    parts = rare(seed)
    full = store_of(parts)
    model = ALS(full, parts.T, seed, threads=1, weighting=weighting, dim=4)
    users, before = asked(parts, seed)
    lists = model.recommend(users, before, 7, new)
    Y = np.zeros((full.n_items, 4))
    Y[model.shown] = model.factor
    for user, now, shown in zip(users, before, rows_of(lists.item), strict=True):
        met = Counter(i for u, t, _, i in events_of(full) if u == user and t < now and parts.in_train[i])
        wanted, confidence = np.zeros(full.n_items), np.ones(full.n_items)
        for item, n in met.items():
            wanted[item], confidence[item] = 1, weighting.of(np.array(float(n)))
        left = Y.T @ np.diag(confidence) @ Y + weighting.regularization * np.eye(4)
        score = Y @ np.linalg.solve(left, Y.T @ np.diag(confidence) @ wanted)
        listable = {i: score[i] for i in np.flatnonzero(parts.in_train) if met and not (new and i in met)}
        assert [score[i] for i in shown] == pytest.approx(sorted(listable.values(), reverse=True)[:7])
        assert set(shown) <= set(listable)


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 1_000), st.booleans())
def test_bm25_sums_similarities_as_dense_arithmetic_does(seed: int, new: bool) -> None:
    parts = rare(seed)
    full = store_of(parts)
    count = np.zeros((parts.n_users, parts.n_items))
    for user, time, _, item in events_of(full):
        count[user, item] += time <= parts.T
    count = count[count.any(axis=1)][:, parts.in_train]
    length = count.sum(axis=0) / count.sum(axis=0).mean()
    rarity = np.log(count.shape[1]) - np.log1p((count > 0).sum(axis=1))
    weight = count * 2.2 / (1.2 * (0.25 + 0.75 * length) + count) * rarity[:, None]
    similarity = weight.T @ weight
    shown = np.flatnonzero(parts.in_train)
    place = {int(item): at for at, item in enumerate(shown)}

    users, before = asked(parts, seed)
    lists = BM25(full, parts.T).recommend(users, before, 7, new)
    for user, now, row in zip(users, before, rows_of(lists.item), strict=True):
        met = Counter(place[i] for u, t, _, i in events_of(full) if u == user and t < now and i in place)
        score = sum((n * similarity[at] for at, n in met.items()), np.zeros(len(shown)))
        listable = [s for at, s in enumerate(score) if s > 0 and not (new and at in met)]
        found = [score[place[item]] for item in row if score[place[item]] > 1e-12]
        assert found == pytest.approx(sorted(listable, reverse=True)[:7])


def test_bm25_keeps_only_the_nearest() -> None:
    _, full = made(two_groups())
    one = BM25(full, LAST, K=1)
    assert (one.similarity.indices == np.arange(len(one.shown))).all()  # nobody is nearer than oneself
    lists = one.recommend(np.arange(5), np.full(5, LAST), 50, new=True)
    assert (lists.item == -1).all()


# -- what a list may hold


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 1_000), st.booleans(), st.sampled_from([1, 9, 200]))
def test_only_train_items_are_listed_once_and_new_lists_hold_none_of_the_history(
    seed: int, new: bool, k: int
) -> None:
    parts = rare(seed)
    full = store_of(parts)
    users, before = asked(parts, seed)
    for rival in rivals(full, parts.T):
        lists = rival.recommend(users, before, k, new).item
        assert lists.shape == (len(users), k)
        for user, now, row in zip(users, before, rows_of(lists), strict=True):
            assert parts.in_train[row].all()
            assert len(set(row)) == len(row)
            if new:
                assert not np.isin(row, full.life(int(user), int(now)).items()).any()


def test_a_user_of_whom_nothing_is_known_gets_nothing() -> None:
    _, full = made([*two_groups(), (99, 500, 1, LAST + 5)])  # only an item that train lacks
    for rival in rivals(full, LAST):
        asked_twice = rival.recommend(np.array([30, 0]), np.array([LAST + 9, 0]), 3, new=False)
        assert (asked_twice.item == -1).all()


# -- what follows T, seeds, threads


@pytest.mark.parametrize("seed", range(3))
def test_lists_at_t_do_not_depend_on_what_follows(seed: int) -> None:
    """Not even on new users and items that take their numbers between the others'."""
    rng = np.random.default_rng(seed)
    known = two_groups(seed)
    other = [
        (int(u), int(i), int(i) % 3, LAST + int(t))
        for u, i, t in zip(
            rng.integers(-5, 40, 200),
            rng.choice([-3, *range(2 * ITEMS), 77], 200),
            rng.integers(0, DAY, 200),
            strict=True,
        )
    ]
    answers = []
    for rows in ([*known, (0, 0, 0, LAST)], [*known, *other]):
        parts, full = made(rows)
        users = np.searchsorted(parts.user_ids.to_numpy(), np.arange(30))
        models = [ALS(full, LAST - 1, dim=6), *rivals(full, LAST - 1)]
        lists = [m.recommend(users, np.full(30, LAST), 9, new).item for m in models for new in (True, False)]
        answers.append([models[0].facts, [[named(parts, row) for row in rows_of(shown)] for shown in lists]])
    assert len(parts.item_ids) > 2 * ITEMS
    assert answers[0] == answers[1]


def test_the_same_seed_gives_the_same_factors_and_lists_on_any_number_of_threads() -> None:
    _, full = made(two_groups())
    one, again, two = (ALS(full, LAST, seed=3, threads=threads, dim=8) for threads in (1, 1, 2))
    assert np.array_equal(one.factor, again.factor)
    assert np.array_equal(one.factor, two.factor)
    assert one.facts == two.facts
    assert not np.array_equal(one.factor, ALS(full, LAST, seed=4, weighting=one.weighting, dim=8).factor)
    first, second = (BM25(full, LAST, threads=threads).similarity for threads in (1, 2))
    assert (first != second).nnz == 0


def test_learning_warns_of_nothing_though_blas_has_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("implicit.utils._checked_blas_config", False)
    _, full = made(two_groups())
    with threadpoolctl.threadpool_limits(2, "blas"), warnings.catch_warnings():
        warnings.simplefilter("error")
        rivals(full, LAST)
        after = {p["num_threads"] for p in threadpoolctl.threadpool_info() if p["user_api"] == "blas"}
    assert after == {2}  # the limit is gone with its reason


# -- the choice of weights


def test_weights_are_chosen_by_the_mean_of_all_and_new(monkeypatch: pytest.MonkeyPatch) -> None:
    _, full = made(two_groups())
    assert list(ALS(full, LAST, dim=4).facts["validation_recall@200"]) == [str(one) for one in GRID]
    fared = {GRID[at]: {"all": a, "new": n} for at, (a, n) in enumerate([(0.6, 0.1), (0.4, 0.4), (0.1, 0.5)])}
    monkeypatch.setattr(collaborative, "recall_by_weighting", lambda *_: fared)
    model = ALS(full, LAST, dim=4)
    assert model.weighting == GRID[1]
    assert model.facts == {
        "weighting": str(GRID[1]),
        "validation_recall@200": {str(one): recall for one, recall in fared.items()},
    }
    assert ALS(full, LAST, weighting=GRID[0], dim=4).facts["validation_recall@200"] == {}


@pytest.mark.parametrize("seed", range(3))
def test_the_recall_of_weights_is_the_batch_protocols_inside_train(seed: int) -> None:
    unheard_of = [(user, 90 + user % 6, 0, int(0.85 * LAST) + user) for user in range(20)]  # by the inner cut
    parts, full = made([*two_groups(seed, users=40, visits=30), *unheard_of])
    inner = split(parts.train, min_events=1)
    requests = inner.batch(n=10**6)
    found = recall_by_weighting(full, parts.T, dim=4, k=5)
    assert len({tuple(recall.values()) for recall in found.values()}) > 1
    for weighting, recall in found.items():
        model = ALS(store_of(inner), inner.T, weighting=weighting, dim=4)
        for new, asks in ((False, requests), (True, requests.only_new())):
            expected = measure_batch(model, inner, asks, (5,), new).metric["recall@5"].mean()
            assert recall["new" if new else "all"] == pytest.approx(expected, abs=1e-6)


def test_confidence_grows_with_counts_as_named() -> None:
    count = np.array([1.0, 3.0])
    assert Weighting(40, False, 0.1).of(count).tolist() == [40, 120]
    assert Weighting(10, True, 0.1).of(count).tolist() == pytest.approx(
        [1 + 10 * np.log(2), 1 + 10 * np.log(4)]
    )
    assert str(Weighting(10, True, 0.1)) == "log counts x 10, regularization 0.1"
    assert str(Weighting(40, False, 100)) == "counts x 40, regularization 100"


# -- by name


def test_both_can_be_asked_by_name_but_are_not_asked_unnamed(tmp_path) -> None:
    result = evaluate_log(parity_log(), models=["recent", "als", "bm25"], k=(10,), reading={"threads": 1})
    assert list(result["models"]) == ["recent", "als", "bm25"]
    assert result["models"]["als"]["weighting"] in {str(weighting) for weighting in GRID}
    assert result["models"]["als"]["train_seconds"] > 0
    assert result["models"]["bm25"]["live"]["all"]["recall@10"] > 0.3
    usual = inspect.signature(evaluate_log).parameters["models"].default
    assert not {"als", "bm25"} & set(usual)
    with pytest.raises(InputError, match=r"expected some of longretriever, .*, als, bm25\.$"):
        evaluate_log(parity_log(), models=["alz"], work=tmp_path / "work")


def test_without_implicit_it_is_said_what_to_install_before_anything_is_trained(
    tmp_path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "implicit", None)
    _, full = made(two_groups())
    for model in (ALS, BM25):
        with pytest.raises(MissingExtra, match=r"pip install 'longretriever\[rivals\]'"):
            model(full, LAST)
    with pytest.raises(MissingExtra, match="implicit"):
        evaluate_log(parity_log(), models=["recent", "bm25"], work=tmp_path / "work")
    assert not (tmp_path / "work").exists()


@pytest.mark.parametrize("model", [ALS, BM25])
def test_a_store_without_train_says_so(model: type) -> None:
    parts = split(random_log(1), min_events=1)
    full = store_of(parts)
    assert train_counts(full, 5).sum() == 0
    with pytest.raises(InputError, match="no event at or before T = 5"):
        model(full, 5)
