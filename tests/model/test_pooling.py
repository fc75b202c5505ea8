"""The weight of factors is the likeliest one for what is held out, and 0 where that is not sure to help."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from longretriever.errors import InputError, MissingExtra
from longretriever.model import pooling
from longretriever.model.config import EbrConfig
from longretriever.model.exported import Model
from longretriever.model.pooling import HeldOut, Logits, fitted, held_out, log_likelihood, logits
from longretriever.model.train import train
from tests.worlds import START, random_log, stored

UNTIL = START + 40_000
R, J = 60, 25


def asked(users: np.ndarray) -> HeldOut:
    share = 1 / np.bincount(users)[users]
    return HeldOut([None] * len(users), np.zeros(len(users), np.int64), share / share.sum(), users)  # type: ignore[list-item]


def drawn(right: float, seed: int = 0) -> Logits:
    """Targets drawn from the softmax of `own + right * factor`."""
    rng = np.random.default_rng(seed)
    own, factor = rng.normal(size=(R, J + 1)), rng.normal(size=(R, J + 1))
    of = np.argmax(own + right * factor + rng.gumbel(size=own.shape), axis=1)
    row, others = np.arange(R), own.copy().astype(np.float32)
    others[row, of] = -np.inf
    return Logits(own[row, of], factor[row, of], others, factor.astype(np.float32), 1.0)


@pytest.mark.parametrize("counts", [1.0, 3.5])
def test_the_weight_is_that_of_the_greatest_likelihood(counts):
    of, who = drawn(1.5)._replace(counts=counts), asked(np.arange(R) // 3)
    weight, gain, error = fitted(of, who)
    grid = np.arange(0, 6, 0.01)
    likelihood = [who.share @ log_likelihood(w, of) for w in grid]
    assert weight == pytest.approx(grid[np.argmax(likelihood)], abs=0.01)
    assert gain == pytest.approx(max(likelihood) - likelihood[0], abs=1e-4)
    assert 0 < error < gain


def test_the_likelihood_is_a_softmax_over_what_competes():
    of = drawn(1.0)
    for row, found in enumerate(log_likelihood(0.7, of)):
        there = of.own[row] > -np.inf
        logit = np.append(
            (of.own[row] + 0.7 * of.factor[row])[there], of.target_own[row] + 0.7 * of.target_factor[row]
        )
        assert found == pytest.approx(logit[-1] - np.log(np.exp(logit).sum()), abs=1e-5)


def test_no_weight_where_it_does_not_help():
    who = asked(np.arange(R))
    assert fitted(drawn(-1.0), who) == (0.0, 0.0, 0.0)
    assert fitted(drawn(1.0), asked(np.empty(0, np.int64)))[0] == 0
    assert fitted(drawn(1.5), asked(np.zeros(R, np.int64)))[0] == 0, "one user says nothing of others"
    by_chance = [fitted(drawn(0.0, seed), who) for seed in range(30)]
    assert all((weight > 0) == (gain > error) for weight, gain, error in by_chance)
    assert any(0 < gain <= error for _, gain, error in by_chance), "within its standard error"


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return stored(random_log(3, events=500, users=12, items=60), tmp_path_factory.mktemp("pooling") / "store")


def test_requests_are_of_later_events_and_of_items_not_met(store):
    found = held_out(store, UNTIL, seed=1)
    assert len(found.life) > 20
    for life, target, user in zip(found.life, found.target, found.user, strict=True):
        assert life.user == user
        assert life.now > UNTIL
        assert target not in life.items()
        rows = store.rows_of(int(user))
        assert (life.now, target) in list(zip(store.event_time[rows], store.event_item[rows], strict=True))
    assert np.bincount(found.user).max() <= 5
    of_user = np.bincount(found.user, found.share)
    np.testing.assert_allclose(of_user[of_user > 0], 1 / np.count_nonzero(of_user))
    again, other = held_out(store, UNTIL, seed=1), held_out(store, UNTIL, seed=2)
    assert np.array_equal(found.target, again.target)
    assert not np.array_equal(found.target, other.target)
    none = held_out(store, store.last_time, seed=1)
    assert (len(none.life), len(none.share)) == (0, 0)


def test_logits_are_of_items_not_met_and_drawn_where_there_are_many(store, tmp_path, monkeypatch):
    config = EbrConfig(dim=8, length=6, epochs=1, step_samples=100, validation=0.3)
    train(store, tmp_path / "m", config)
    model, requests = Model.open(tmp_path / "m"), held_out(store, UNTIL, seed=1)
    item_ID = np.random.default_rng(0).normal(size=(store.n_items, 8)).astype(np.float32)
    every = logits(model, item_ID, requests, seed=1)
    assert every.counts == 1
    for row, (life, target) in enumerate(zip(requests.life, requests.target, strict=True)):
        competes = np.setdiff1d(np.arange(store.n_items), [*life.items(), target])
        assert np.array_equal(np.flatnonzero(every.own[row] > -np.inf), competes)
        assert every.target_own[row] == pytest.approx(
            model.corpus_scale * (model.item_vectors(np.array([target])) @ _user(model, life))[0], abs=1e-4
        )
    monkeypatch.setattr(pooling, "_COMPETITORS", 40)
    some = logits(model, item_ID, requests, seed=1)
    assert some.own.shape == some.factor.shape == (len(requests.life), 40)
    assert some.counts == (store.n_items - 1) / 39
    gap = log_likelihood(0.5, some).mean() - log_likelihood(0.5, every).mean()
    assert abs(gap) < 0.3, "an estimate of the same"


def _user(model, life):
    from longretriever.model.exported import Request

    recent = life.recent(6)
    return model.user_vectors([Request(-1, recent, recent, life.profile(), life.now)]).user[0, 0]


def test_wrong_weights_and_a_missing_extra(store, tmp_path, monkeypatch):
    for wrong in (-1.0, float("inf"), float("nan")):
        with pytest.raises(InputError, match=f"factors={wrong}: expected a weight of 0 or more"):
            EbrConfig(factors=wrong)
    monkeypatch.setitem(__import__("sys").modules, "implicit", None)
    config = EbrConfig(dim=8, epochs=1, step_samples=100, warm_start=False, factors=1.0)
    with pytest.raises(MissingExtra, match=r"pip install 'longretriever\[rivals\]'"):
        train(store, tmp_path / "m", replace(config, length=4))
    assert not list(tmp_path.iterdir()), "said before training, not after"
