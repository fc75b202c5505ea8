"""A world small enough to count by hand, and every metric against a loop."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from longretriever.evaluate import metrics

LISTS = np.array([[4, 2, 7, 1], [5, 0, 3, -1], [6, -1, -1, -1], [-1, -1, -1, -1]])
TARGETS = [np.array([2, 7, 9]), np.array([8]), np.array([6, 0]), np.array([1])]
CATEGORY = np.array([0, 0, 0, 1, 1, 1, 2, 2, 2, 2])  # of items 0..9


def test_one_target_by_hand() -> None:
    rank = metrics.ranks(LISTS, np.array([7, 5, 0, 3]))
    assert rank.tolist() == [2, 0, math.inf, math.inf]
    assert metrics.recall_at(rank, 2).tolist() == [0, 1, 0, 0]
    assert metrics.recall_at(rank, 10).tolist() == [1, 1, 0, 0]
    assert metrics.reciprocal_rank(rank).tolist() == [1 / 3, 1, 0, 0]


def test_several_targets_by_hand() -> None:
    hit, size = metrics.hits(LISTS, TARGETS), metrics.sizes(TARGETS)
    assert hit.astype(int).tolist() == [[0, 1, 1, 0], [0, 0, 0, 0], [1, 0, 0, 0], [0, 0, 0, 0]]
    assert size.tolist() == [3, 1, 2, 1]
    assert metrics.recall(hit, size, 2).tolist() == [1 / 3, 0, 1 / 2, 0]
    assert metrics.recall(hit, size, 50).tolist() == [2 / 3, 0, 1 / 2, 0]
    assert metrics.hit_rate(hit, 1).tolist() == [0, 0, 1, 0]
    assert metrics.hit_rate(hit, 50).tolist() == [1, 0, 1, 0]
    second, third = 1 / math.log2(3), 1 / math.log2(4)
    assert metrics.ndcg(hit, size, 50) == pytest.approx(
        [(second + third) / (1 + second + third), 0, 1 / (1 + second), 0]
    )
    assert metrics.ndcg(hit, size, 1).tolist() == [0, 0, 1, 0]  # ideal over min(2, 1) targets


def test_what_lists_are_made_of_by_hand() -> None:
    assert metrics.categories(LISTS, CATEGORY, 50).tolist() == [3, 2, 1, 0]
    assert metrics.categories(LISTS, CATEGORY, 2).tolist() == [2, 2, 1, 0]
    shown = np.array([1, 1, 1, 0, 1, 1, 1, 1, 1, 0], dtype=bool)  # 3 and 9 are no catalogue items
    assert metrics.coverage(LISTS, shown, 50)[0] == 7 / 8
    assert metrics.coverage(LISTS, shown, 1)[0] == 3 / 8


def test_selection_by_hand() -> None:
    chosen = [np.array([1, 2]), np.array([0]), np.array([], dtype=int)]
    wanted = [np.array([2, 2, 0, 5]), np.array([0]), np.array([1])]
    assert metrics.selected(chosen, wanted).tolist() == [0.5, 1, 0]


@st.composite
def worlds(draw: st.DrawFn) -> tuple[np.ndarray, list[np.ndarray]]:
    """Some lists of distinct items with padding, and targets for each."""
    n, places = draw(st.integers(1, 6)), draw(st.integers(1, 12))
    item = np.full((n, places), -1)
    for row in item:
        found = draw(st.lists(st.integers(0, 15), unique=True, max_size=places))
        row[: len(found)] = found
    targets = [draw(st.lists(st.integers(0, 18), unique=True, min_size=1, max_size=8)) for _ in range(n)]
    return item, [np.array(t) for t in targets]


@settings(deadline=None)
@given(worlds(), st.integers(1, 15))
def test_metrics_agree_with_a_loop(world: tuple[np.ndarray, list[np.ndarray]], k: int) -> None:
    item, targets = world
    category = np.arange(20) % 4
    hit, size = metrics.hits(item, targets), metrics.sizes(targets)
    rank = metrics.ranks(item, np.array([t[0] for t in targets]))
    for row, (places, wanted) in enumerate(zip(item.tolist(), targets, strict=True)):
        head, wanted = [i for i in places[:k] if i >= 0], wanted.tolist()
        found = [i for i in head if i in wanted]
        gain = sum(1 / math.log2(at + 2) for at, i in enumerate(head) if i in wanted)
        ideal = sum(1 / math.log2(at + 2) for at in range(min(len(wanted), k)))
        assert metrics.recall(hit, size, k)[row] == len(found) / len(wanted)
        assert metrics.ndcg(hit, size, k)[row] == pytest.approx(gain / ideal)
        assert metrics.hit_rate(hit, k)[row] == bool(found)
        assert metrics.categories(item, category, k)[row] == len({category[i] for i in head})
        assert metrics.recall_at(rank, k)[row] == (wanted[0] in head)
        reciprocal = 1 / (places.index(wanted[0]) + 1) if wanted[0] in places else 0
        assert metrics.reciprocal_rank(rank)[row] == reciprocal


@settings(deadline=None)
@given(worlds())
def test_coverage_is_the_union_and_its_interval_the_jackknife(world: tuple) -> None:
    item, _ = world
    shown = np.arange(20) % 3 > 0
    figure, low, high = metrics.coverage(item, shown)

    def union(rows: np.ndarray) -> float:
        return len({i for i in rows.ravel().tolist() if i >= 0 and shown[i]}) / shown.sum()

    assert figure == union(item)
    without = np.array([union(np.delete(item, row, axis=0)) for row in range(len(item))])
    error = math.sqrt((len(item) - 1) * without.var())
    assert low == pytest.approx(max(0, figure - 1.96 * error))
    assert high == pytest.approx(min(1, figure + 1.96 * error))


def test_intervals_hold_the_truth_about_as_often_as_they_say() -> None:
    rng = np.random.default_rng(0)
    held = 0
    for _ in range(100):
        taste = rng.random(80) * 0.6  # mean 0.3, users differ
        user = np.repeat(np.arange(80), rng.integers(1, 6, 80))
        value = (rng.random(len(user)) < taste[user]).astype(float)
        low, high = metrics.interval(value[:, None], user, rng, resamples=300)[:, 0]
        held += low <= 0.3 <= high
    assert 87 <= held <= 100


def test_requests_of_one_user_count_as_one_observation() -> None:
    user = np.repeat(np.arange(40), 25)
    value = np.repeat(np.arange(40) % 2, 25).astype(float)[:, None]
    low, high = metrics.interval(value, user, np.random.default_rng(1))[:, 0]
    apart = metrics.interval(value, np.arange(1000), np.random.default_rng(1))[:, 0]
    assert high - low > 4 * (apart[1] - apart[0])


def test_intervals_are_of_the_mean_over_requests() -> None:
    value = np.array([[1.0, 3.0], [1.0, 3.0], [1.0, 3.0]])
    ends = metrics.interval(value, np.array([7, 7, 9]), np.random.default_rng(1))
    assert ends.tolist() == [[1, 3], [1, 3]]
    assert np.isnan(metrics.interval(np.empty((0, 2)), np.empty(0, int), np.random.default_rng(1))).all()


def test_a_paired_difference_is_surer_than_two_figures() -> None:
    rng = np.random.default_rng(2)
    hard = rng.random(300)
    ours, theirs = hard + 0.02, hard + 0.001 * rng.standard_normal(300)
    user = np.arange(300)
    both = metrics.interval(np.stack([ours, theirs], axis=1), user, np.random.default_rng(1))
    assert both[0, 0] < both[1, 1]  # the intervals overlap
    low, high = metrics.interval((ours - theirs)[:, None], user, np.random.default_rng(1))[:, 0]
    assert 0.019 < low < 0.02 < high < 0.021


def test_an_interval_of_a_ratio_is_of_sum_by_sum() -> None:
    rng = np.random.default_rng(4)
    whole, user = rng.integers(0, 5, 300), rng.integers(0, 60, 300)
    part = rng.binomial(whole, 0.3)
    columns = np.stack([part, whole, 0 * part], axis=1)
    wholes = np.stack([whole, np.ones(300), 0 * whole], axis=1)
    ends = metrics.ratio_interval(columns, wholes, user, np.random.default_rng(1))
    assert ends[0, 0] < part.sum() / whole.sum() < ends[1, 0]
    assert ends[1, 0] - ends[0, 0] < 0.15
    mean = metrics.interval(whole[:, None].astype(float), user, np.random.default_rng(1))
    assert ends[:, 1].tolist() == mean[:, 0].tolist()  # a mean is a ratio too, of the same users
    assert np.isnan(ends[:, 2]).all()


def test_a_ratio_whose_whole_one_user_has_alone_is_drawn_with_this_user() -> None:
    ends = metrics.ratio_interval(
        np.array([[1.0], [0.0]]), np.array([[4.0], [0.0]]), np.arange(2), np.random.default_rng(1)
    )
    assert ends[:, 0].tolist() == [0.25, 0.25]


def test_the_same_seed_gives_the_same_interval() -> None:
    value, user = np.random.default_rng(3).random((50, 1)), np.arange(50)
    ends = [metrics.interval(value, user, np.random.default_rng(5)).tolist() for _ in range(2)]
    assert ends[0] == ends[1]


# -- is it more than chance?


def every_flip(difference: np.ndarray, user: np.ndarray) -> float:
    """The exact p-value, by trying all signs."""
    total = np.bincount(user, weights=difference)
    sums = [abs(np.dot(signs, total)) for signs in itertools.product((-1, 1), repeat=len(total))]
    return float(np.mean([s >= abs(total.sum()) - 1e-9 for s in sums]))


@pytest.mark.parametrize("seed", range(6))
def test_random_flips_come_near_to_all_flips(seed: int) -> None:
    rng = np.random.default_rng(seed)
    user = np.repeat(np.arange(9), rng.integers(1, 4, 9))
    difference = rng.integers(-1, 2, (len(user), 2)) + np.array([0.0, 0.3])
    p = metrics.sign_flip(difference, user * 10, rng, flips=20_000)
    assert p == pytest.approx([every_flip(column, user) for column in difference.T], abs=0.015)


def test_equal_models_are_alike_for_sure() -> None:
    nothing, user = np.zeros((50, 2)), np.arange(50) // 3
    assert metrics.sign_flip(nothing, user, np.random.default_rng(1), flips=99).tolist() == [1, 1]
    assert np.isnan(metrics.sign_flip(nothing[:0], user[:0], np.random.default_rng(1))).all()


def test_a_clearly_better_model_is_found_and_no_p_is_zero() -> None:
    rng = np.random.default_rng(1)
    better = 0.1 + 0.2 * rng.standard_normal((400, 1))
    p = metrics.sign_flip(better, np.arange(400) // 2, rng, flips=999)
    assert p == pytest.approx(1 / 1000)
    assert metrics.sign_flip(-better, np.arange(400) // 2, rng, flips=999) == pytest.approx(p)


def test_the_same_generator_gives_the_same_p_in_one_go_and_nearly_so_in_several(monkeypatch) -> None:
    difference, user = np.random.default_rng(3).standard_normal((60, 2)), np.arange(60) // 2
    p = [metrics.sign_flip(difference, user, np.random.default_rng(5)).tolist() for _ in range(2)]
    monkeypatch.setattr(metrics, "_SIGNS_AT_ONCE", 30 * 77)
    assert p[0] == p[1]
    assert p[0] == pytest.approx(metrics.sign_flip(difference, user, np.random.default_rng(5)), abs=0.02)


@pytest.mark.parametrize(("worst", "low", "high"), [(50, 0.032, 0.068), (1, 0.02, 0.068)])
def test_p_under_five_percent_is_found_between_equals_in_five_percent(worst, low, high) -> None:
    """600 A/A data sets, several requests a user, of users who differ in how hard they are.

    Bounds are two standard errors. Where all values are 0 or 1 (`worst` place 1), ties make p cautious.
    """
    rng = np.random.default_rng(7)
    found = 0
    for _ in range(600):
        user = np.repeat(np.arange(60), rng.integers(1, 6, 60))
        hard = rng.random(60)[user]
        ours, theirs = (
            (rng.random(len(user)) < hard) / rng.integers(1, worst + 1, len(user)) for _ in range(2)
        )
        p = metrics.sign_flip((ours - theirs)[:, None], user, rng, flips=399)[0]
        found += p < 0.05
    assert low < found / 600 < high


def test_requests_of_one_user_flip_together() -> None:
    """25 requests of each of 8 users who differ: as 200 requests of 200 users it would look sure."""
    total = np.array([1, 1, 1, -1, 1, 1, -1, 1.0])
    difference, user = np.repeat(total, 25)[:, None], np.repeat(np.arange(8), 25)
    rng = np.random.default_rng(0)
    assert metrics.sign_flip(difference, user, rng)[0] > 0.2
    assert metrics.sign_flip(difference, np.arange(200), rng)[0] < 0.001


def test_holm_by_hand() -> None:
    assert metrics.holm(np.array([0.01, 0.04, 0.03, 0.005])) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert metrics.holm(np.array([0.6, 0.9])) == pytest.approx([1, 1])
    assert metrics.holm(np.array([])).tolist() == []
