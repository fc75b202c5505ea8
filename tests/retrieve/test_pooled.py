"""A pooled list is what brute force over all items says; a long life tells what its last behaviors do not."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pytest

from longretriever import clusters
from longretriever.index import CORPUS
from longretriever.model.config import EbrConfig, TrainConfig
from longretriever.model.exported import Model
from longretriever.model.factors import SURE, user_factor
from longretriever.model.train import train
from longretriever.retrieve.added import add_items, remove_items
from longretriever.retrieve.indexing import index_model
from longretriever.retrieve.merge import Merged, Ranked, probability
from longretriever.retrieve.retriever import Retriever
from longretriever.retrieve.rules import Rules
from longretriever.saved import opening
from longretriever.shards.fleet import Fleet
from longretriever.shards.held import Share
from longretriever.store.behaviors import Life, Store
from longretriever.store.joined import Joined, LiveEvents
from tests.shards.running import nth, shards
from tests.worlds import DAY, START, parity_items, parity_log, stored, table

SHORT = {"dim": 8, "step_samples": 200, "epochs": 1, "warm_start": False, "id_dropout": 0.3}
EBR = EbrConfig(**SHORT, length=8, factors=30.0)
NOW = START + 15 * DAY


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Store:
    path = tmp_path_factory.mktemp("pooled") / "store"
    return stored(parity_log(users=30), path, items=parity_items(np.arange(36)))


@pytest.fixture(scope="module")
def model(store, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("model") / "m"
    train(store, path, EBR)
    return index_model(path).parent


@pytest.fixture
def copied(model, tmp_path) -> Path:
    return Path(shutil.copytree(model, tmp_path / "m"))


def brute(retriever: Retriever, life: Life) -> np.ndarray:
    """[I] log P of every item: unmet ones divide what the vector gives them all; removed ones have none."""
    model = retriever.model
    factors = model.factors
    assert factors is not None
    request = next(r for (r, _), _ in retriever._requests(life, []) if r.category == CORPUS)
    user = model.user_vectors([request]).user[0, 0]
    own = model.corpus_scale * (model.item_vectors(slice(None)).astype(np.float64) @ user)
    rows = life.store.rows_of(life.user)
    past = life.store.event_item[rows][life.store.event_time[rows] < life.now]
    times = np.zeros(model.n_items)
    for number in retriever.numbers.items(np.asarray(past)):
        times[number] += 1
    met = times > 0
    x = user_factor(factors.item[met], SURE * times[met], factors.gram)
    both = own + factors.weight * (factors.item @ x)
    own[model.removed] = both[model.removed] = -np.inf
    p_own = np.exp(own - np.logaddexp.reduce(own))
    p_new = np.where(met, 0.0, np.exp(both - np.logaddexp.reduce(both[~met])))
    with np.errstate(divide="ignore"):
        return np.log(np.where(met, p_own, p_own[~met].sum() * p_new))


def listed(retriever: Retriever, life: Life, k: int, rules: Rules = Rules()) -> Ranked:
    """The list of all items, before it is merged."""
    seen: list[Ranked] = []

    def merge(lists: Sequence[Ranked], k: int) -> Merged:
        seen.extend(lists)
        return probability(lists, k)

    retriever.answer([life], k, merge=merge, rules=rules)
    return next(ranked for ranked in seen if ranked.category == CORPUS)


def assert_is_brute(retriever: Retriever, life: Life, exact: bool = True) -> None:
    wanted = brute(retriever, life)
    found = listed(retriever, life, retriever.model.n_items)
    there = np.flatnonzero(wanted > -np.inf)
    assert sorted(found.item) == there.tolist()
    np.testing.assert_allclose(found.log_prob, wanted[found.item], atol=1e-4 if exact else 0.03)
    assert np.exp(found.log_prob).sum() == pytest.approx(1, abs=1e-4 if exact else 0.03)
    head = listed(retriever, life, 7)
    np.testing.assert_allclose(head.log_prob, np.sort(wanted)[::-1][:7], atol=1e-4 if exact else 0.03)


@pytest.mark.parametrize("exact", [True, False])
def test_lists_are_those_of_brute_force(model, exact):
    retriever = Retriever.load(model, exact=exact)
    for user in range(12):
        assert_is_brute(retriever, retriever.store.life(user, NOW + user * DAY), exact)
    vectors = retriever.corpus_vectors([retriever.store.life(3, NOW)])
    assert vectors.shape == (1, 2 * 8)


def test_factors_change_the_order_and_weight_0_is_the_model_without(store, model, tmp_path):
    for name, weight in (("without", 0.0), ("unfitted", None)):
        train(store, tmp_path / name, replace(EBR, factors=weight, validation=0.0))
        index_model(tmp_path / name)
    without, unfitted = (opening(tmp_path / name, "model") for name in ("without", "unfitted"))
    nothing = {"weight": 0.0, "requests": 0, "gain": 0.0, "gain_error": 0.0, "seconds": 0.0}
    assert unfitted.facts["factors"] == nothing
    assert without.fingerprint == unfitted.fingerprint, "where nothing is held out, nothing is saved"
    assert "item_factor.npy" not in without.files
    pooled, plain = Retriever.load(model), Retriever.load(tmp_path / "without")
    assert plain.model.searched_dim == plain.model.dim
    changed = [pooled.retrieve(u, 36).item_ids != plain.retrieve(u, 36).item_ids for u in range(30)]
    assert np.mean(changed) > 0.5


def test_rules_leave_the_probabilities_of_the_others(model):
    retriever = Retriever.load(model)
    life = retriever.store.life(4, NOW)
    wanted, met = brute(retriever, life), set(life.items().tolist())
    for rules, gone in (
        (Rules(exclude_seen=True), met),
        (Rules(exclude_categories=[1]), set(range(12, 24))),
        (Rules(exclude_items=[30, *met]), {30, *met}),
    ):
        found = listed(retriever, life, 36, rules)
        assert set(found.item.tolist()) == set(range(36)) - gone
        np.testing.assert_allclose(found.log_prob, wanted[found.item], atol=0.03)


def test_live_events_are_part_of_the_life(store, model):
    retriever = Retriever.load(model, exact=True)
    new = np.flatnonzero(~np.isin(np.arange(36), store.life(2, NOW).items()))[:2]
    live = LiveEvents(new, new // 12, np.full(2, NOW - 1), np.zeros(2, np.int64))
    joined = Joined(store, [2], [2], [live])
    assert set(joined.life(0, NOW).items()) == {*store.life(2, NOW).items().tolist(), *new.tolist()}
    assert_is_brute(retriever, joined.life(0, NOW))
    assert_is_brute(retriever, joined.life(0, NOW - 1))


def test_items_added_moved_and_removed(copied):
    before = Model.open(copied)
    assert before.factors is not None
    category = np.append(np.arange(36) // 12, [0, 1])
    category[5] = 2
    given = pa.table({"item_id": [5, 100, 101], "category_id": category[[5, 36, 37]]})
    add_items(copied, given, move=True)
    remove_items(copied, pa.table({"item_id": [20]}))
    retriever = Retriever.load(copied, verify=True)
    after = retriever.model
    assert after.factors is not None
    for item in range(36):
        old, new = before.item_ids.number_of(item), after.item_ids.number_of(item)
        assert np.array_equal(before.factors.item[old], after.factors.item[new])
    for item in (100, 101):
        assert not after.factors.item[after.item_ids.number_of(item)].any()
    assert after.factors.longest == before.factors.longest
    for user in (1, 8):
        life = retriever.store.life(user, NOW)
        assert_is_brute(retriever, life, exact=False)
        assert_is_brute(Retriever.load(copied, exact=True), life)


def test_groups_of_near_items_hold_pooled_vectors(copied, monkeypatch):
    for name, value in {"FROM": 1, "NEAREST": 2, "RECALL": 0.6}.items():
        monkeypatch.setattr(clusters, name, value)
    index_model(copied)
    retriever = Retriever.load(copied)
    assert retriever.index.manifest.facts["clusters"]["probes"] < 16
    for user in range(5):
        life = retriever.store.life(user, NOW)
        found, wanted = listed(retriever, life, 2), brute(retriever, life)
        np.testing.assert_allclose(found.log_prob, wanted[found.item], atol=0.03)


def test_similar_items_are_those_of_the_vectors_alone(model):
    inspection = pytest.importorskip("longretriever.serve.inspection")
    retriever = Retriever.load(model)
    serving = SimpleNamespace(model=retriever.model, retriever=retriever, name="m")
    vectors = retriever.model.item_vectors(slice(0, 12))
    for item in (0, 7):
        cosine = np.delete(vectors @ vectors[item], item)
        found = inspection.similar(serving, item, 4).similar
        np.testing.assert_allclose([one.similarity for one in found], np.sort(cosine)[::-1][:4], atol=1e-3)


def test_shards_answer_as_the_whole_index_and_say_what_is_down(model):
    alone = Retriever.load(model)
    with (
        shards(model, nth(1, 2), nth(2, 2)) as (first, second),
        Fleet([first.url, second.url], look=60) as fleet,
    ):
        through = Retriever.load(model, index=fleet)
        for user in range(6):
            life = alone.store.life(user, NOW + user * DAY)
            found, wanted = (listed(one, life, 36) for one in (through, alone))
            order = np.argsort(found.item), np.argsort(wanted.item)
            assert np.array_equal(found.item[order[0]], wanted.item[order[1]])
            shift = found.log_prob[order[0]] - wanted.log_prob[order[1]]
            np.testing.assert_allclose(shift, 0, atol=2e-3)  # sums of 16-bit cosines, and of 32-bit ones
            heads = [listed(one, life, 5).log_prob for one in (through, alone)]
            np.testing.assert_allclose(*heads, atol=2e-3)
        life = alone.store.life(3, NOW)
        second.stop()
        ((_, end),) = Share((1, 2)).ranges(alone.model.category_start)
        held = alone.model.category_start[end]
        there = life.items()[life.items() < held]
        wanted = brute(alone, life)[:held]
        found = listed(through, life, 36)
        assert sorted(found.item) == [*range(held)]
        assert np.exp(found.log_prob).sum() == pytest.approx(1, abs=0.03)  # among what was searched
        some = np.isin(found.item, there)
        shift = found.log_prob - wanted[found.item]
        for part in (shift[some], shift[~some]):  # within each, as they were
            np.testing.assert_allclose(part, part[0], atol=0.03)
        assert through.answer([life], 36)[0].partial
        first.stop()
        assert len(listed(through, life, 36).item) == 0


def old_taste(users: int = 150, seed: int = 0) -> pa.Table:
    """What each user likes, 12 of 48 items, shows in his first 7 behaviors; 8 follow that say nothing.

    Of most users there is one more then, of what they like.
    """
    rng = np.random.default_rng(seed)
    rows = []
    for user in range(users):
        liked = rng.permutation(12)[:8] + 12 * (user % 4)
        noise = 48 + rng.permutation(12)[:8]
        days = [*range(7), *range(20, 28), *([40] if user >= 40 else [])]
        rows += [
            (user, item, START + d * DAY + user)
            for item, d in zip([*liked[:7], *noise, liked[7]], days, strict=False)
        ]
    user, item, time = (np.array(column) for column in zip(*rows, strict=True))
    return table(user, item, item % 3, time)


@pytest.fixture(scope="module")
def old(tmp_path_factory) -> Path:
    """A store of `old_taste`, and models that read the last 6 behaviors, of which none shows a taste."""
    path = tmp_path_factory.mktemp("old")
    log = stored(old_taste(), path / "store")
    whole = EbrConfig(dim=16, length=6, epochs=4, step_samples=100, validation=0.045, factors=None)
    of_contexts = {"context_length": 6, "interests": None, "validation": 0.045}
    config = TrainConfig(dim=16, epochs=1, step_samples=100, **of_contexts, whole=whole)
    told: list[str] = []
    train(log, path / "with", config, progress=lambda tick: told.append(tick.learning))
    assert told[-1] == "factors", "it takes a while, so it is said"
    train(log, path / "without", replace(whole, factors=0.0))
    for name in ("with", "without"):
        index_model(path / name)
    return path


def liked_found(retriever: Retriever) -> float:
    """Of the first 5 items of the list of all items, which the user has not met: the share that he likes."""
    found = []
    for user in range(40):  # whose last events nobody has learned from
        life = retriever.store.life(user)
        ids = np.array(
            retriever.model.item_ids.take(listed(retriever, life, 5, Rules(exclude_seen=True)).item)
        )
        found.append(np.mean((ids // 12 == user % 4)[ids < 48]))
    return float(np.mean(found))


def test_what_only_the_older_life_tells(old):
    facts = opening(old / "with" / "whole", "model").facts["factors"]
    assert facts["weight"] > 0
    assert facts["gain"] > 2 * facts["gain_error"] > 0
    assert 100 <= facts["requests"] <= 110  # one each of those who have a last event
    assert liked_found(Retriever.load(old / "without")) < 0.5  # chance is 0.25
    assert liked_found(Retriever.load(old / "with", verify=True)) > 0.9
