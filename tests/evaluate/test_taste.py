"""Worlds where taste is known to be, or not to be; and swaps that keep what they say they keep."""

from __future__ import annotations

import numpy as np
import pytest

from longretriever.evaluate.taste import swapped, taste


def a_world(rng: np.random.Generator, likes: np.ndarray, users=400, categories=3, items=40):
    """Each user meets 6 items of a category, of the half, even or odd, that `likes` [u, category] says."""
    item = np.concatenate(
        [
            c * items + 2 * rng.choice(items // 2, 6, replace=False) + likes[u, c]
            for u in range(users)
            for c in range(categories)
        ]
    )
    return np.repeat(np.arange(users), 6 * categories), item, np.repeat(np.arange(categories), items)


@pytest.mark.parametrize(
    ("shared", "within", "across"),
    [("nothing", 1, 1), ("category", 2, 1), ("all", 2, 2)],
)
def test_taste_is_found_where_it_is(shared, within, across):
    """Of halves, two users who share an item like the same one for certain; two others with chance 1/2."""
    rng = np.random.default_rng(1)
    likes = rng.integers(0, 2, (400, 3))
    if shared == "all":
        likes[:] = likes[:, :1]
    user, item, category = a_world(rng, likes)
    if shared == "nothing":
        item = swapped(user, item, category, rng)
    found = taste(user, item, category, rng)
    assert found["taste_in_category"] == pytest.approx(within, rel=0.08)
    assert found["taste_across"] == pytest.approx(across, rel=0.08)


def test_coming_back_counts_once():
    rng = np.random.default_rng(2)
    user, item, category = a_world(rng, rng.integers(0, 2, (400, 3)))
    once = taste(user, item, category, np.random.default_rng(3))
    again = np.r_[user, user[:500]], np.r_[item, item[:500]]
    assert taste(*again, category, np.random.default_rng(3)) == once


def test_swaps_keep_what_users_and_items_have():
    rng = np.random.default_rng(3)
    pair = rng.choice(50 * 30, 600, replace=False)  # 40% of all: many swaps cannot be
    user, item = np.sort(pair) // 30, np.sort(pair) % 30
    category = np.repeat([0, 1, 2], 10)
    new = swapped(user, item, category, rng)
    assert len(np.unique(user * 30 + new)) == len(pair)
    assert (np.bincount(new) == np.bincount(item)).all()
    assert (category[new] == category[item]).all()
    assert 0.35 < np.isin(user * 30 + new, pair).mean() < 0.5  # 40% by chance alone: nothing is left of it


def test_nobody_shares_anything():
    found = taste(np.arange(5), np.arange(5), np.zeros(5, int), np.random.default_rng(0))
    assert found == {"taste_in_category": None, "taste_across": None}
