"""A user's factor is what the formula says; padded vectors search by the pooled sum; counts are a scan's."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from longretriever.errors import Damaged
from longretriever.model.factors import NOTHING, REGULARIZATION, SURE, Factors, Met, gram, user_factor
from longretriever.saved import opening, writing
from tests.worlds import START, random_log, stored

ITEMS, DIM, WIDTH, SCALE, WEIGHT = 40, 5, 3, 6.0, 2.5


@pytest.fixture
def factors() -> Factors:
    item_ID = np.random.default_rng(0).normal(size=(ITEMS, DIM)).astype(np.float32)
    item_ID[7] = 0  # nobody has met it
    return Factors.of(item_ID, SCALE, WEIGHT)


def unit_vectors(n: int, seed: int) -> np.ndarray:
    x = np.random.default_rng(seed).normal(size=(n, WIDTH))
    return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)


def test_the_users_factor_has_the_least_error_over_all_items(factors):
    """Hu, Koren, Volinsky (2008): min over x of sum_i c_i (p_i - x·y_i)² + λ|x|², over all items."""
    met = Met(np.array([3, 12, 31]), np.array([1, 4, 2]))
    confidence, wanted = np.ones(ITEMS), np.zeros(ITEMS)
    for item, times in zip(*met, strict=True):
        confidence[item], wanted[item] = SURE * times, 1.0
    left, right = REGULARIZATION * np.eye(DIM), np.zeros(DIM)
    for c, p, y in zip(confidence, wanted, factors.item.astype(np.float64), strict=True):
        left += c * np.outer(y, y)
        right += c * p * y
    np.testing.assert_allclose(factors.of_user(met), np.linalg.inv(left) @ right, rtol=1e-9)


def test_who_met_nothing_that_has_a_factor_has_none(factors):
    for met in (NOTHING, Met(np.array([7]), np.array([3]))):
        assert np.array_equal(factors.of_user(met), np.zeros(DIM))
    one = user_factor(np.zeros((0, DIM)), np.zeros(0), gram(factors.item, 1.0))
    assert np.array_equal(one, np.zeros(DIM))


def test_cosines_of_padded_vectors_are_the_pooled_logits(factors):
    vector_Id, user_nd = unit_vectors(ITEMS, 1), unit_vectors(4, 2)
    lives = [NOTHING, *(Met(np.array([i, 20 + i]), np.array([i, 1])) for i in (1, 2, 9))]
    items = factors.items(vector_Id, SCALE, slice(None))
    assert items.shape == (ITEMS, factors.width(WIDTH))
    np.testing.assert_allclose(np.linalg.norm(items, axis=1), 1, atol=1e-6)
    pooled, alone = factors.queries(user_nd, factors.of_users(lives)), factors.queries(user_nd)
    for row, (user, met) in enumerate(zip(user_nd, lives, strict=True)):
        own = SCALE * vector_Id @ user
        wanted = own + WEIGHT * factors.item @ factors.of_user(met)
        for query, logits in ((pooled, wanted), (alone, own)):
            assert np.linalg.norm(query.vector[row]) == pytest.approx(1)
            np.testing.assert_allclose(query.scale[row] * items @ query.vector[row], logits, atol=2e-5)
    some = np.array([5, 7, 2])
    assert np.array_equal(factors.items(vector_Id[some], SCALE, some), items[some])


def test_saved_and_opened_again(factors, tmp_path):
    with writing(tmp_path / "m", "model") as folder:
        factors.save(folder)
    opened = Factors.opened(opening(tmp_path / "m", "model"))
    assert opened is not None
    assert (opened.weight, opened.longest) == (factors.weight, factors.longest)
    assert np.array_equal(opened.item, factors.item)
    assert np.array_equal(opened.gram, factors.gram)
    with writing(tmp_path / "other", "model") as folder:
        Factors.of(factors.item, SCALE, WEIGHT + 1).save(folder)
    prints = [opening(tmp_path / name, "model").fingerprint for name in ("m", "other")]
    assert prints[0] != prints[1], "an index of another weight must not be taken for this one's"
    with writing(tmp_path / "none", "model"):
        pass
    assert Factors.opened(opening(tmp_path / "none", "model")) is None
    (tmp_path / "m" / "factor_gram.npy").unlink()
    with pytest.raises(Damaged, match=r"factor_gram\.npy: missing"):
        opening(tmp_path / "m", "model")


def test_counts_are_those_of_a_scan_of_the_life(tmp_path):
    store = stored(random_log(3), tmp_path / "store")
    for user in range(store.n_users):
        now, since = START + 40_000, START + 9_000
        for life in (store.life(user, now), store.life(user, now).lately(11), store.life(user, since)):
            rows = store.rows_of(user)
            events = zip(store.event_item[rows], store.event_time[rows], strict=True)
            lived = [item for item, time in events if life.since <= time < life.now]
            item, times = life.counts(1000, 1000)
            assert dict(zip(item.tolist(), times.tolist(), strict=True)) == Counter(lived)
            assert item.tolist() == sorted(set(lived))
            newest = life.recent(10).item.tolist()[::-1]
            few, times = life.counts(10, 3)
            assert few.tolist() == sorted(list(dict.fromkeys(newest))[:3])
            assert times.tolist() == [newest.count(i) for i in few]
