from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from longretriever.errors import InputError
from longretriever.index import CORPUS
from longretriever.retrieve.merge import (
    Merge,
    Ranked,
    boosted,
    capped,
    probability,
    quota,
    round_robin,
    score,
)

MERGES = [probability, quota, round_robin, score]


def ranked(category: int, share: float, cosine: list[float], scale: float = 20.0) -> Ranked:
    """Items are numbered 1000 * category + rank, so the tests can read them."""
    best_first = np.array(sorted(cosine, reverse=True))
    log_prob = scale * best_first - np.log(np.exp(scale * best_first).sum() + 1)
    return Ranked(category, share, 1000 * category + np.arange(len(cosine)), best_first, log_prob)


cosines = st.lists(st.sampled_from([-0.5, 0.0, 0.25, 0.5, 1.0]) | st.floats(-1, 1), max_size=12)
shares = st.sampled_from([0.1, 0.2, 0.2, 0.5]) | st.floats(1e-3, 1)


@st.composite
def some_lists(draw: st.DrawFn) -> list[Ranked]:
    categories = draw(st.lists(st.integers(0, 50), max_size=6, unique=True))
    return [ranked(c, draw(shares), draw(cosines)) for c in categories]


def naive(lists: list[Ranked], k: int, next_score: Callable[[Ranked, int], float]) -> list[tuple]:
    """The slow truth: k times, take the head that scores highest, the earlier list's where equal."""
    taken, result = [0] * len(lists), []
    while len(result) < k:
        heads = [
            (-next_score(one, taken[at]), at) for at, one in enumerate(lists) if taken[at] < len(one.item)
        ]
        if not heads:
            break
        negative, at = min(heads)
        result.append((lists[at].item[taken[at]], at, -negative))
        taken[at] += 1
    return result


NEXT_SCORE = {
    probability: lambda one, r: math.log(one.share) + one.log_prob[r],
    quota: lambda one, r: -(r + 0.5) / one.share,
    round_robin: lambda one, r: -r,
    score: lambda one, r: one.cosine[r],
}


@pytest.mark.parametrize("merge", MERGES)
@settings(max_examples=50)
@given(lists=some_lists(), k=st.integers(0, 80))
def test_each_merge_is_what_a_loop_does(merge: Merge, lists: list[Ranked], k: int) -> None:
    merged = merge(lists, k)
    expected = naive(lists, k, NEXT_SCORE[merge])
    assert merged.item.tolist() == [item for item, _, _ in expected]
    assert merged.source.tolist() == [source for _, source, _ in expected]
    np.testing.assert_allclose(merged.score, [s for _, _, s in expected])


@pytest.mark.parametrize("merge", MERGES)
@settings(max_examples=50)
@given(lists=some_lists(), k=st.integers(0, 80))
def test_a_merge_keeps_each_lists_order_loses_nothing_and_extends(
    merge: Merge, lists: list[Ranked], k: int
) -> None:
    merged = merge(lists, k)
    assert len(merged.item) == min(k, sum(len(one.item) for one in lists))
    assert (np.diff(merged.score) <= 0).all()
    for at, one in enumerate(lists):
        own = merged.item[merged.source == at]
        assert own.tolist() == one.item[: len(own)].tolist()
    assert merge(lists, k + 5).item[: len(merged.item)].tolist() == merged.item.tolist()


@given(st.lists(shares, min_size=1, max_size=6), st.integers(1, 200))
def test_quota_gives_places_in_proportion(parts: list[float], k: int) -> None:
    lists = [ranked(c, share, [0.5] * 200) for c, share in enumerate(parts)]
    places = np.bincount(quota(lists, k).source, minlength=len(parts))
    of_all = np.array(parts) / sum(parts)
    assert (abs(places - k * of_all) <= 0.5 + of_all * len(parts) / 2 + 1e-6).all()


def test_quota_hands_on_what_a_short_list_leaves() -> None:
    lists = [ranked(1, 0.5, [0.1] * 2), ranked(2, 0.3, [0.1] * 50), ranked(3, 0.1, [0.1] * 50)]
    assert np.bincount(quota(lists, 42).source).tolist() == [2, 30, 10]


def test_probability_weighs_the_context_and_the_item_within_it() -> None:
    """A sure item of a half-wanted context goes before one of a hundred of a wanted one."""
    sure = Ranked(1, 0.4, np.array([10]), np.array([0.2]), np.log([0.9]))
    many = Ranked(2, 0.6, np.array([20, 21]), np.array([0.9, 0.8]), np.log([0.01, 0.01]))
    assert probability([many, sure], 3).item.tolist() == [10, 20, 21]
    assert score([many, sure], 3).item.tolist() == [20, 21, 10]
    np.testing.assert_allclose(np.exp(probability([many, sure], 3).score), [0.36, 0.006, 0.006])


# -- lists that overlap


@st.composite
def overlapping(draw: st.DrawFn) -> list[Ranked]:
    """Some lists search all items, and find those of the others."""
    categories = draw(
        st.permutations([CORPUS] * draw(st.integers(1, 3)) + [3, 4, 5][: draw(st.integers(0, 3))])
    )
    lists = []
    for c in categories:
        one = ranked(c, draw(shares), draw(cosines))
        first = 0 if c == CORPUS else 10 * (c - 3)
        items = draw(st.permutations(range(first, first + (30 if c == CORPUS else 12))))
        lists.append(
            Ranked(c, one.share, np.array(items[: len(one.item)], np.int64), one.cosine, one.log_prob)
        )
    return lists


TOGETHER = {probability: lambda scores: math.log(sum(map(math.exp, scores)))}


@pytest.mark.parametrize("merge", MERGES)
@settings(max_examples=50)
@given(lists=overlapping(), k=st.integers(0, 50))
def test_an_item_of_several_lists_counts_once(merge: Merge, lists: list[Ranked], k: int) -> None:
    """With the sum of its probabilities, or its best score; under the list that says the most for it."""
    found: dict[int, list[tuple[float, int]]] = {}
    for at, one in enumerate(lists):
        for r, item in enumerate(one.item.tolist()):
            found.setdefault(item, []).append((NEXT_SCORE[merge](one, r), at))
    scores = {item: TOGETHER.get(merge, max)([s for s, _ in said]) for item, said in found.items()}
    merged = merge(lists, k)
    assert len(set(merged.item.tolist())) == len(merged.item) == min(k, len(found))
    assert (np.diff(merged.score) <= 0).all()
    np.testing.assert_allclose(merged.score, [scores[item] for item in merged.item.tolist()])
    np.testing.assert_allclose(merged.score, sorted(scores.values(), reverse=True)[:k])
    for item, source in zip(merged.item.tolist(), merged.source.tolist(), strict=True):
        assert source == max(found[item], key=lambda said: (said[0], -said[1]))[1]
    longer = merge(lists, k + 5)
    assert longer.item[: len(merged.item)].tolist() == merged.item.tolist()


@pytest.mark.parametrize("merge", MERGES)
@settings(max_examples=50)
@given(lists=some_lists().filter(bool), k=st.integers(0, 60))
def test_a_list_of_all_items_that_shares_none_changes_nothing(
    merge: Merge, lists: list[Ranked], k: int
) -> None:
    of_all = [dataclasses.replace(lists[0], category=CORPUS), *lists[1:]]
    for got, expected in zip(merge(of_all, k), merge(lists, k), strict=True):
        np.testing.assert_array_equal(got, expected)


def test_several_lists_of_all_items_are_several_interests_of_one_user() -> None:
    a = Ranked(CORPUS, 0.5, np.array([7, 8, 9]), np.array([0.9, 0.5, 0.1]), np.log([0.4, 0.3, 0.1]))
    b = Ranked(CORPUS, 0.5, np.array([9, 8, 5]), np.array([0.8, 0.6, 0.2]), np.log([0.6, 0.3, 0.02]))
    merged = probability([a, b], 9)
    assert merged.item.tolist() == [9, 8, 7, 5]
    np.testing.assert_allclose(np.exp(merged.score), [0.35, 0.3, 0.2, 0.01])
    assert merged.source.tolist() == [1, 0, 0, 1], "of equal scores the earlier list"
    assert score([a, b], 9).item.tolist() == [7, 9, 8, 5]
    assert score([a, b], 9).source.tolist() == [0, 1, 1, 1]
    assert round_robin([a, b], 9).item.tolist() == [7, 9, 8, 5]
    assert round_robin([a, b], 3).source.tolist() == [0, 1, 0]
    assert quota([a, b], 2).item.tolist() == [7, 9]


def test_of_equal_sums_the_one_met_first_comes_first() -> None:
    """The place of an item is that in the list which says the most for it."""
    a = Ranked(CORPUS, 1.0, np.array([4, 2, 6]), np.zeros(3), np.log([0.25, 0.25, 0.25]))
    b = Ranked(3, 1.0, np.array([6, 1, 2]), np.zeros(3), np.log([0.5, 0.25, 0.25]))
    c = Ranked(4, 1.0, np.array([1]), np.zeros(1), np.log([0.5]))
    merged = probability([a, b, c], 9)
    assert merged.item.tolist() == [6, 1, 2, 4]
    np.testing.assert_allclose(np.exp(merged.score), [0.75, 0.75, 0.5, 0.25])
    assert merged.source.tolist() == [1, 2, 0, 0]


# -- caps and boosts


@pytest.mark.parametrize("merge", MERGES)
@settings(max_examples=50)
@given(some_lists(), st.dictionaries(st.integers(0, 50), st.integers(0, 5), max_size=20), st.integers(0, 60))
def test_caps_hold_and_their_places_go_to_others(
    merge: Merge, lists: list[Ranked], quotas: dict[int, int], k: int
) -> None:
    merged = merge(capped(lists, quotas), k)
    left = [min(len(one.item), quotas.get(one.category, 99)) for one in lists]
    places = np.bincount(merged.source, minlength=len(lists))
    assert all(places <= left)
    assert len(merged.item) == min(k, sum(left))


@pytest.mark.parametrize("merge", MERGES)
@settings(max_examples=50)
@given(lists=some_lists(), k=st.integers(0, 60))
def test_boosts_of_one_and_caps_of_others_change_nothing(merge: Merge, lists: list[Ranked], k: int) -> None:
    same = boosted(capped(lists, {99: 0}), {one.category: 1.0 for one in lists})
    for got, expected in zip(merge(same, k), merge(lists, k), strict=True):
        np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize("merge", MERGES)
@settings(max_examples=50)
@given(lists=some_lists().filter(bool), k=st.integers(0, 60), boost=st.floats(1, 1e3))
def test_a_boost_never_costs_its_category_a_place(
    merge: Merge, lists: list[Ranked], k: int, boost: float
) -> None:
    before, after = (np.sum(merge(some, k).source == 0) for some in (lists, first_boosted(lists, boost)))
    assert after >= before if merge in (probability, quota) else after == before


def first_boosted(lists: list[Ranked], boost: float) -> list[Ranked]:
    return boosted(lists, {lists[0].category: boost})


def test_a_boost_multiplies_the_places_of_a_quota() -> None:
    lists = [ranked(1, 0.2, [0.5] * 90), ranked(2, 0.2, [0.5] * 90)]
    assert np.bincount(quota(boosted(lists, {1: 2.0}), 60).source).tolist() == [40, 20]
    assert probability(boosted(lists, {1: 2.0}), 1).score == pytest.approx(
        probability(lists, 1).score + math.log(2)
    )


# -- what cannot be merged


def test_no_lists_and_no_places() -> None:
    for merge in MERGES:
        assert [len(part) for part in merge([], 5)] == [0, 0, 0]
        assert [len(part) for part in merge([ranked(1, 0.5, [0.5])], 0)] == [0, 0, 0]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda: probability([], -1), r"k=-1, expected 0 or more"),
        (lambda: quota([ranked(1, 0.5, [1])] * 2, 5), r"categories \[1, 1\]: expected one for each category"),
        (lambda: ranked(1, 0.0, [1]), r"category 1: share=0.0, expected more than 0"),
        (lambda: ranked(1, math.nan, [1]), r"category 1: share=nan, expected more than 0"),
        (
            lambda: Ranked(7, 0.5, np.arange(3), np.zeros(2), np.zeros(3)),
            r"category 7: 3 items, 2 cosines and 3 log_probs",
        ),
        (lambda: capped([], {4: -1}), r"quota of category 4 is -1, expected 0 or more items"),
        (lambda: boosted([], {4: 0.0}), r"boost of category 4 is 0.0, .* give it a quota of 0"),
        (lambda: boosted([], {4: math.inf}), r"boost of category 4 is inf"),
    ],
)
def test_what_cannot_be_merged_is_refused(wrong, message: str) -> None:
    with pytest.raises(InputError, match=message):
        wrong()
