"""Factors know what groups of items there are, and nothing of what follows; counts are those of a scan."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from longretriever.errors import MissingExtra
from longretriever.model import warm
from longretriever.model.warm import SPREAD, interactions, item_factors
from longretriever.store.behaviors import Store
from tests.worlds import START, random_log, stored, table

UNTIL = START + 1_000


def grouped(future: bool = False) -> pa.Table:
    """Even users meet even items, odd users odd ones; categories are of both. Then, perhaps, a future."""
    rng = np.random.default_rng(1)
    user = np.repeat(np.arange(30), 15)
    item = 2 * rng.integers(0, 15, len(user)) + user % 2
    log = table(user, item, item // 2 % 3, START + rng.integers(0, 1_001, len(user)))
    if not future:
        return log
    user, item = rng.integers(-9, 40, 300), rng.choice([-7, *range(30), 50, 51], 300)
    return pa.concat_tables([log, table(user, item, item // 2 % 3, UNTIL + rng.integers(1, 99, 300))])


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Store:
    return stored(grouped(), tmp_path_factory.mktemp("grouped") / "store")


@pytest.fixture(scope="module")
def longer(tmp_path_factory) -> Store:
    return stored(grouped(future=True), tmp_path_factory.mktemp("longer") / "store")


# -- counts


@pytest.mark.parametrize("chunk", [1, 40, 1 << 22])
@pytest.mark.parametrize(("until", "after"), [(30_000, None), (30_000, 12_000), (-1, None), (10**6, 30_000)])
def test_pairs_are_counted_as_by_a_scan_of_the_log(tmp_path, monkeypatch, chunk, until, after) -> None:
    monkeypatch.setattr(warm, "_CHUNK", chunk)
    store = stored(random_log(5, users=9), tmp_path / "store")
    until, after = START + until, None if after is None else START + after
    expected: Counter = Counter()
    for user in range(store.n_users):
        rows = store.rows_of(user)
        for item, time in zip(store.event_item[rows], store.event_time[rows], strict=True):
            expected[user, int(item)] += time <= until and (after is None or time > after)
    found = interactions(store, until, after)
    assert found.shape == (store.n_users, store.n_items)
    assert found.dtype == np.float32
    assert {pair: n for pair, n in expected.items() if n} == {
        (int(u), int(i)): int(found[u, i]) for u, i in zip(*found.nonzero(), strict=True)
    }
    assert found.nnz == sum(n > 0 for n in expected.values())  # each pair once


# -- factors


def test_items_of_one_group_are_alike(store: Store) -> None:
    factor = item_factors(store, UNTIL, 2, seed=0)
    direction = factor / np.linalg.norm(factor, axis=1, keepdims=True)
    odd = store.items["item_id"].to_numpy() % 2
    cosine = direction @ direction.T
    together = odd[:, None] == odd
    others = ~np.eye(len(odd), dtype=bool)
    assert cosine[together & others].min() > cosine[~together].max()


def test_shape_and_scale(longer: Store) -> None:
    factor = item_factors(longer, UNTIL, 12, seed=0)
    assert factor.shape == (longer.n_items, 12)
    assert factor.dtype == np.float32
    late = np.isin(longer.items["item_id"].to_numpy(), [-7, 50, 51])
    assert late.sum() == 3
    assert (factor[late] == 0).all()
    assert factor[~late].std() == pytest.approx(SPREAD, rel=1e-4)


def test_what_follows_changes_nothing(store: Store, longer: Store) -> None:
    """Not even new users and items, whose numbers come before and between the others'."""
    known = np.isin(longer.items["item_id"].to_numpy(), store.items["item_id"].to_numpy())
    assert longer.items["item_id"].to_numpy()[known].tolist() == store.items["item_id"].to_pylist()
    assert np.flatnonzero(~known)[0] < len(store.items)
    expected = item_factors(store, UNTIL, 8, seed=2)
    assert np.array_equal(item_factors(longer, UNTIL, 8, seed=2)[known], expected)
    assert not np.array_equal(item_factors(longer, longer.last_time, 8, seed=2)[known], expected)


def test_the_same_seed_gives_the_same_factors_on_any_number_of_threads(store: Store) -> None:
    one = item_factors(store, UNTIL, 8, seed=2, threads=1)
    assert np.array_equal(one, item_factors(store, UNTIL, 8, seed=2, threads=1))
    assert np.array_equal(one, item_factors(store, UNTIL, 8, seed=2, threads=2))
    assert np.array_equal(one, item_factors(store, UNTIL, 8, seed=2))
    assert not np.array_equal(one, item_factors(store, UNTIL, 8, seed=3))


def test_before_the_first_event_all_is_zero(store: Store) -> None:
    factor = item_factors(store, store.first_time - 1, 8, seed=0)
    assert factor.shape == (store.n_items, 8)
    assert not factor.any()


def test_without_implicit_it_is_said_what_to_install(store: Store, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "implicit", None)
    with pytest.raises(MissingExtra, match=r"pip install 'longretriever\[rivals\]'"):
        item_factors(store, UNTIL, 8, seed=0)


def test_torch_is_not_needed() -> None:
    assert "import torch" not in Path(warm.__file__).read_text()
