"""A request's answer is what a slow, obvious program would say; and every promise of the page in docs/."""

from __future__ import annotations

import json
import math
import shutil
from collections import defaultdict
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from longretriever import retrieve
from longretriever.errors import (
    Damaged,
    InputError,
    Mismatch,
    NotSaved,
    UnknownCategory,
    UnknownUser,
)
from longretriever.index import CORPUS, Index, build
from longretriever.model.checkpoint import save_model
from longretriever.model.config import EbrConfig, TrainConfig
from longretriever.model.exported import Model, Request
from longretriever.model.train import Training, train
from longretriever.retrieve import bulk
from longretriever.retrieve.indexing import index_model
from longretriever.retrieve.interests import Contexts, RandomInTop, Top
from longretriever.retrieve.merge import Merged, probability, round_robin
from longretriever.retrieve.retrieval import REASONS, Retrieval
from longretriever.retrieve.retriever import Retriever
from longretriever.retrieve.rules import Rules
from longretriever.store.behaviors import Behaviors, Store
from longretriever.store.ingest import ingest
from longretriever.store.joined import Joined, LiveEvents, New
from tests.worlds import DAY, START, once_log, stored, table

TINY = TrainConfig(
    dim=16,
    heads=2,
    context_length=6,
    recent_length=4,
    overlap=2,
    step_samples=200,
    epochs=2,
    distance=0.0,
    interests=None,
    whole=None,
)
USERS, CATEGORIES, ITEMS = 30, 3, 40  # items of each category
CUT = START + 60 * DAY
GENDERS = ("f", "m", "x")


@dataclass(frozen=True)
class Event:
    user: Any
    item: Any
    category: Any
    time: int
    kind: str


def some_events(seed: int, users: range, start: int, days: int, n: int) -> list[Event]:
    """Many equal times, items met again and again; no item twice at one time by one user."""
    rng = np.random.default_rng(seed)
    found = {}
    for _ in range(n):
        user = int(rng.integers(users.start, users.stop))
        item = int(rng.integers(0, 8) ** 2 * 2 + rng.integers(0, 5)) + 1000
        time = start + int(rng.integers(0, days * 4)) * DAY // 4
        kind = ("buy", "click")[rng.integers(0, 2)]
        found[user, item, time] = Event(user, item, item % CATEGORIES * 10, time, kind)
    return list(found.values())


def logged(events: list[Event], path: Path, text: bool = False) -> Store:
    """A store of these events, with titles and genders; `text` makes strings of the ids."""
    as_id = _as_text if text else int
    log = table(*zip(*[(e.user, e.item, e.category, e.time, e.kind) for e in events], strict=True))
    users = sorted({e.user for e in events})
    items = sorted({(e.item, e.category) for e in events})
    columns = {
        name: [as_id(x) for x in log[name].to_pylist()] for name in ("user_id", "item_id", "category_id")
    }
    ingest(
        pa.table({**dict(zip(log.column_names, log.columns, strict=True)), **columns}),
        path,
        users=pa.table({"user_id": [as_id(u) for u in users], "gender": [gender(u) for u in users]}),
        items=pa.table({"item_id": [as_id(i) for i, _ in items], "title": [f"thing {i}" for i, _ in items]}),
    )
    return Store.open(path)


def _as_text(number: int) -> str:
    return f"[id {number:05d}]"


def gender(user: int) -> str:
    return GENDERS[user % 3] if user >= 0 else "a"  # newer users bring a value that sorts before the others


OLD = some_events(1, range(USERS), START, 100, 1500)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("retriever")
    train(logged(OLD, path / "store"), path / "model", TINY)
    index_model(path / "model")
    return path


@pytest.fixture(scope="module")
def retriever(folder) -> Retriever:
    return Retriever.load(folder / "model", interests=Top(3))


@pytest.fixture(scope="module")
def exact(folder) -> Retriever:
    return Retriever.load(folder / "model", interests=Top(3), exact=True)


# -- the slow, obvious program: lists of events and ids, no store, no index


def life(events: list[Event], user: Any, now: float) -> list[Event]:
    mine = [e for e in events if e.user == user and e.time < now]
    return sorted(mine, key=lambda e: (e.time, e.category, e.item))


def shares(events: list[Event], now: float) -> dict[Any, float]:
    """Equation 3, each category's part of the whole, the largest first."""
    score: dict[Any, float] = defaultdict(float)
    for e in events:
        score[e.category] += 1 / (max(now - e.time, 3600) / DAY)
    total = sum(score.values())
    return {c: score[c] / total for c in sorted(score, key=lambda c: (-score[c], c))}


def in_numbers(model: Model, events: list[Event]) -> Behaviors:
    items, categories = model.items["item_id"].to_pylist(), model.category_ids.values.to_pylist()
    return Behaviors(
        np.array([items.index(e.item) if e.item in items else -1 for e in events], np.int64),
        np.array([categories.index(e.category) for e in events], np.int64),
        np.array([e.time for e in events], np.int64),
        np.array(
            [model.behaviors.index(e.kind) if e.kind in model.behaviors else 0 for e in events], np.int64
        ),
    )


def probabilities(
    model: Model, mine: list[Event], category: Any, user: Any, now: float, returns: float | None = None
) -> list[tuple[Any, float, float]]:
    """Of each item of a category (None: of all): its id, cosine and P(item | user, category).

    `returns` is what the items met there share out instead of what the model says.
    """
    ids, categories = model.items["item_id"].to_pylist(), model.category_ids.values.to_pylist()
    known = [e for e in mine[-model.context_length :] if e.category in categories]
    met = known if category is None else [e for e in mine if e.category == category][-model.context_length :]
    recent = [e for e in mine[-model.recent_length :] if e.category in categories]
    (field,) = model.profile_fields
    code = field.values.index(gender(user)) + 1 if gender(user) in field.values else 0
    at = CORPUS if category is None else categories.index(category)
    request = Request(at, in_numbers(model, met), in_numbers(model, recent), np.array([code]), now)
    vectors = model.user_vectors([request])
    first, stop = (0, len(ids)) if category is None else model.category_start[at : at + 2]
    cosine = model.item_vectors(slice(first, stop)).astype(np.float64) @ vectors.user[0, 0]
    by_vector = np.exp(model.scale * cosine) / np.exp(model.scale * cosine).sum()
    share = np.ones(1) if vectors.shares is None else np.exp(vectors.shares[0].astype(np.float64))
    if returns is not None and met:
        share = np.append(1 - returns, share[1:] / share[1:].sum() * returns)
    found = dict(zip(ids[first:stop], share[0] * by_vector, strict=True))
    for e, part in zip(met, share[1:], strict=False):
        if e.item in found:
            found[e.item] += part
    return [(i, c, found[i]) for i, c in zip(ids[first:stop], cosine, strict=True)]


def obvious(
    model: Model, events: list[Event], user: Any, now: float, contexts: int = 3, returns: float | None = None
) -> list[dict]:
    """All candidates, the best first: item, score, cosine, log_prob."""
    mine = life(events, user, now)
    found = []
    for category, share in list(shares(mine, now).items())[:contexts]:
        if category not in model.category_ids.values.to_pylist():
            continue
        found += [
            {
                "item_id": i,
                "score": math.log(share * p),
                "cosine": c,
                "log_prob": math.log(p),
                "category_id": category,
            }
            for i, c, p in probabilities(model, mine, category, user, now, returns)
        ]
    return sorted(found, key=lambda candidate: -candidate["score"])


def same(answer: Retrieval, wanted: list[dict], precision: float) -> None:
    assert answer.item_ids == [w["item_id"] for w in wanted]
    assert answer.category_ids == [w["category_id"] for w in wanted]
    for name in ("score", "cosine", "log_prob"):
        found = [getattr(c, name) for c in answer.candidates]
        assert found == pytest.approx([w[name] for w in wanted], abs=precision)


@pytest.mark.parametrize("user", range(0, USERS, 7))
@pytest.mark.parametrize("now", [None, CUT, START + DAY // 4])
def test_it_says_what_the_obvious_program_says(exact, user, now):
    answer = exact.retrieve(user, k=50, now=now)
    at = now or max(e.time for e in OLD) + 1
    assert answer.now == at
    assert answer.user_id == user
    same(answer, obvious(exact.model, OLD, user, at)[:50], 1e-4)
    of_all = shares(life(OLD, user, at), at)
    assert [c.category_id for c in answer.contexts] == list(of_all)[:3]
    assert [c.share for c in answer.contexts] == pytest.approx(list(of_all.values())[:3])
    behaviors = [min(TINY.context_length, sum(e.category == c for e in life(OLD, user, at))) for c in of_all]
    assert [c.behaviors for c in answer.contexts] == behaviors
    assert sum(c.candidates for c in answer.contexts) == len(answer)


@pytest.mark.parametrize("k", [1, 3, 20])
def test_a_short_list_is_the_head_of_a_long_one(exact, k):
    """Items met in the context come up however unlike the user vector they are."""
    for user in range(0, USERS, 5):
        same(exact.retrieve(user, k), obvious(exact.model, OLD, user, max(e.time for e in OLD) + 1)[:k], 1e-4)


@pytest.mark.parametrize("now", [CUT, START + DAY])
def test_probabilities_of_a_context_sum_to_one(exact, retriever, now):
    for r, precision in ((exact, 1e-3), (retriever, 0.01)):
        for user in range(0, USERS, 4):
            every, few = (
                np.bincount(answer.source, np.exp([c.log_prob for c in answer.candidates]))
                for answer in (r.retrieve(user, 1000, now=now), r.retrieve(user, 5, now=now))
            )
            np.testing.assert_allclose(every, 1, atol=precision)
            assert (few <= 1 + precision).all()


def test_the_index_says_what_the_scan_says(retriever, exact):
    for user in range(USERS):
        found, wanted = (r.retrieve(user, k=1000).candidates for r in (retriever, exact))
        by_item = {c.item_id: c for c in found}
        assert by_item.keys() == {c.item_id for c in wanted}
        for c in wanted:
            assert by_item[c.item_id].score == pytest.approx(c.score, abs=0.02)
            assert by_item[c.item_id].cosine == pytest.approx(c.cosine, abs=0.001)


def test_ranks_and_titles(retriever):
    candidates = retriever.retrieve(3, k=20).candidates
    assert [c.rank for c in candidates] == list(range(1, 21))
    assert [c.title for c in candidates] == [f"thing {c.item_id}" for c in candidates]
    score = [c.score for c in candidates]
    assert score == sorted(score, reverse=True)


# -- items met before


@pytest.fixture(scope="module")
def returning(tmp_path_factory) -> Retriever:
    """In each category, users go on with their last item nine times of ten."""
    rng, log = np.random.default_rng(0), []
    for user in range(120):
        last: dict[int, int] = {}
        for visit in range(30):
            c = int(rng.integers(3))
            if c not in last or rng.random() > 0.9:
                last[c] = c * 20 + int(rng.integers(20))
            log.append((user, last[c], c, START + visit * DAY + user))
    path = tmp_path_factory.mktemp("returning")
    config = replace(
        TINY, layers=1, recent_length=0, warm_start=False, step_samples=100, epochs=5, patience=9
    )
    config = replace(config, lr=0.02, row_lr=0.02)  # few steps must do
    train(stored(table(*zip(*log, strict=True)), path / "store"), path / "model", config)
    return Retriever.load(path / "model", exact=True, interests=Top(3))


def test_who_returns_to_an_item_is_offered_it_first(returning):
    first, how_likely = [], []
    for user in range(0, 120, 2):
        answer = returning.retrieve(user, 1000)
        candidates = answer.candidates
        for source, category in enumerate(answer.asked_categories):
            mine = np.flatnonzero(answer.source == source)
            last = returning.store.life(user).in_context(int(category)).item[-1]
            first.append(answer.item[mine[0]] == last)
            (at,) = mine[answer.item[mine] == last]
            how_likely.append(math.exp(candidates[at].log_prob))
    assert len(first) > 170
    assert np.mean(first) > 0.9  # the others were met often, and the last but one
    assert 0.8 < np.mean(how_likely) < 0.95  # nine of ten, and now and then by chance


def test_without_what_was_seen_nothing_is_returned_to(returning):
    for user in range(0, 120, 4):
        seen = set(returning.store.life(user).items().tolist())
        few, every = (returning.retrieve(user, k, rules=Rules(exclude_seen=True)) for k in (20, 1000))
        assert not seen & set(every.item.tolist())
        assert len(every) == 60 - len(seen)
        assert few.item_ids == every.item_ids[:20]


@pytest.mark.parametrize("returns", [0.0, 0.3, 1.0])
def test_a_request_may_say_how_much_goes_to_items_met_before(exact, returns):
    for user in range(0, USERS, 7):
        answer = exact.retrieve(user, 1000, now=CUT, rules=Rules(returns=returns))
        wanted = {
            w["item_id"]: w["log_prob"]
            for w in obvious(exact.model, OLD, user, CUT, returns=min(returns, 1 - 1e-12))
        }
        for candidate in answer.candidates:
            p = math.exp(candidate.log_prob)
            assert p == pytest.approx(math.exp(wanted[candidate.item_id]), abs=1e-5)


# -- all items at once


def test_a_search_of_all_items_joins_those_of_the_contexts(folder, exact):
    """As in a method with both: an item counts once, with the sum of its probabilities."""
    model = Model.open(folder / "model")
    model.asks_corpus = True
    r = Retriever(model, exact.index, exact.store, interests=Top(2), merge=probability)
    for user in range(0, USERS, 6):
        answer = r.retrieve(user, 1000, now=CUT)
        mine = life(OLD, user, CUT)
        chosen = list(shares(mine, CUT).items())[:2]
        whole = r.model.whole_share
        asked = [*chosen, (None, sum(share for _, share in chosen) * whole / (1 - whole))]
        assert [(c.category_id, c.share) for c in answer.contexts] == [
            (category, pytest.approx(share)) for category, share in asked
        ]
        total: dict[Any, list[float]] = defaultdict(list)
        for category, share in asked:
            said = {i: share * p for i, _, p in probabilities(model, mine, category, user, CUT)}
            for item in model.items["item_id"].to_pylist():
                total[item].append(said.get(item, 0.0))
        assert len(set(answer.item_ids)) == len(answer.item_ids) == len(total)
        assert answer.score == pytest.approx([math.log(sum(total[i])) for i in answer.item_ids], abs=1e-4)
        assert answer.source.tolist() == [int(np.argmax(total[i])) for i in answer.item_ids]
        assert r.store_categories(answer.asked_categories)[-1] == -1
        for c, source in zip(answer.candidates, answer.source, strict=True):
            assert c.log_prob == pytest.approx(
                math.log(total[c.item_id][source] / asked[source][1]), abs=1e-4
            )
        unseen = r.retrieve(user, 20, now=CUT, rules=Rules(exclude_seen=True)).item_ids
        met = {e.item for e in mine}
        assert sorted(unseen) == sorted([i for i in answer.item_ids if i not in met][:20])


@pytest.fixture(scope="module")
def both(tmp_path_factory) -> Retriever:
    """A model that brings another one for the vector of the user as a whole."""
    path = tmp_path_factory.mktemp("both")
    whole = EbrConfig(dim=8, length=12, layers=1, step_samples=200, epochs=2)
    train(logged(OLD, path / "store"), path / "model", replace(TINY, whole=whole, whole_share=0.25))
    index_model(path / "model")
    return Retriever.load(path / "model", interests=Top(2))


def test_what_the_model_brings_searches_all_items(both):
    alone = Retriever.load(both.model.path / "whole", store=both.store.path)
    contexts = Retriever(both.model, both.index, both.store, interests=Top(2))
    for user in range(0, USERS, 6):
        answer = both.retrieve(user, 1000, now=CUT)
        *of_contexts, of_all = answer.contexts
        assert of_all.category_id is None
        assert of_all.share / sum(c.share for c in answer.contexts) == pytest.approx(0.25)
        total: dict[Any, float] = defaultdict(float)
        for part, share in ((contexts, 1.0), (alone, of_all.share)):
            for c in part.retrieve(user, 1000, now=CUT).candidates:
                total[c.item_id] += share * math.exp(c.score)
        best = dict(sorted(total.items(), key=lambda pair: -pair[1])[:30])
        found = {c.item_id: c.score for c in answer.candidates[:30]}
        assert found == pytest.approx({i: math.log(p) for i, p in best.items()}, abs=1e-4)
        assert [c.category_id for c in of_contexts] == [
            c.category_id for c in contexts.retrieve(user, now=CUT).contexts
        ]


def test_who_has_done_nothing_asks_nothing(both):
    answer = both.retrieve(0, now=START)
    assert (len(answer), answer.contexts) == (0, [])


def test_rules_hold_for_what_is_found_among_all_items(both):
    free = both.retrieve(2, 1000, now=CUT)
    category = free.category_ids[0]
    assert category not in both.retrieve(2, 1000, rules=Rules(exclude_categories=[category])).category_ids
    assert category not in both.retrieve(2, 1000, rules=Rules(quotas={category: 0})).category_ids
    named = {c.category_id for c in free.contexts}
    for asked in (category, next(c for c in free.category_ids if c not in named)):
        capped = both.retrieve(2, 1000, rules=Rules(quotas={asked: 2}), now=CUT)
        assert capped.category_ids.count(asked) == 2
    score = {c.item_id: c.score for c in free.candidates}
    boosted = both.retrieve(2, 1000, rules=Rules(boosts={category: 8}), now=CUT)
    for c in boosted.candidates:
        change = math.log(8) if c.category_id == category else 0
        assert c.score == pytest.approx(score[c.item_id] + change, abs=1e-4)
    met = {e.item for e in life(OLD, 2, CUT)}
    assert not met & set(both.retrieve(2, 1000, now=CUT, rules=Rules(exclude_seen=True)).item_ids)


def test_an_index_of_another_model_is_refused_for_all_items_too(both, folder, tmp_path):
    shutil.copytree(both.model.path, tmp_path / "model")
    shutil.rmtree(tmp_path / "model" / "whole" / "index")
    shutil.copytree(folder / "model" / "index", tmp_path / "model" / "whole" / "index")
    with pytest.raises(Mismatch, match=r"made from another model .*longretriever index .*whole"):
        Retriever.load(tmp_path / "model", store=both.store.path)


# -- live events

LIVE = [
    *some_events(7, range(USERS), START + 100 * DAY, 10, 200),
    *[Event(user, 5002, 5002 % CATEGORIES * 10, START + 111 * DAY, "click") for user in (2, 3)],
    Event(3, 1001, 1001 % CATEGORIES * 10, START + 112 * DAY, "wish"),
]


def joined(store: Store, users: list[int]) -> Joined:
    """The store with what these users did live; item 5002 and the kind "wish" are new."""
    of_user = []
    for user in users:
        mine = [e for e in LIVE if e.user == user]
        item = [store.n_items if e.item == 5002 else store.item_number(e.item) for e in mine]
        kind = [[*store.behaviors, "wish"].index(e.kind) for e in mine]
        category = [store.category_number(e.category) for e in mine]
        columns = item, category, [e.time for e in mine], kind
        of_user.append(LiveEvents(*(np.array(column, np.int64) for column in columns)))
    numbers = [store.user_ids.number_of(user) for user in users]
    new = New((5002,), (store.category_number(5002 % CATEGORIES * 10),), ("wish",))
    return Joined(store, numbers, users, of_user, new)


@pytest.mark.parametrize("now", [START + 100 * DAY, START + 105 * DAY, START + 112 * DAY + 0.5])
def test_live_events_are_read_as_if_the_store_had_them(exact, now):
    users = [2, 3, 11]
    store = joined(exact.store, users)
    answers = exact.answer([store.life(n, now) for n in range(len(users))], 60)
    for user, answer in zip(users, answers, strict=True):
        same(answer, obvious(exact.model, OLD + LIVE, user, now)[:60], 1e-4)
        assert answer.user_id == user


def test_an_item_met_live_is_excluded_and_is_a_reason(exact):
    now = START + 113 * DAY
    life_ = joined(exact.store, [3]).life(0, now)
    met = {e.item for e in life(OLD + LIVE, 3, now)}
    (answer,) = exact.answer([life_], 1000, rules=Rules(exclude_seen=True))
    assert len(answer)
    assert not met & set(answer.item_ids)
    said = [r for c in exact.answer([life_], 60)[0].candidates for r in c.reasons]
    assert {"wish", "click"} <= {r.behavior for r in said}
    assert {r.title for r in said if r.item_id == 5002} == {None}


def test_a_stranger_is_known_by_what_they_do(exact):
    item = exact.store.item_number(1004)
    category = int(exact.store.item_category[item])
    events = LiveEvents(*(np.array([x]) for x in (item, category, START + 9, 0)))
    store = Joined(exact.store, [None, None], [-5, -6], [events, LiveEvents(*[np.empty(0, np.int64)] * 4)])
    known, nobody = exact.answer([store.life(0), store.life(1)], 20)
    assert set(known.category_ids) == {exact.store.category_ids.take([category])[0]}
    assert (known.user_id, len(nobody), nobody.contexts) == (-5, 0, [])


# -- training and serving


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"encoder": "cls", "within": 12},
        {"recent_length": 0},
        {"life_sample": 5},
        {"returns": False, "ages": False},
    ],
    ids=str,
)
def test_a_request_is_answered_as_its_sample_was_trained(tmp_path, options):
    """The same weights, asked just before an event: in a batch by torch, and as a request by ONNX."""
    import torch

    users = pa.table({"user_id": range(5), "gender": [gender(u) for u in range(5)]})
    store = stored(once_log(3, times=None), tmp_path / "store", users=users)
    run = Training(store, replace(TINY, validation=0, warm_start=False, **options))
    run.begin()
    for parameter in run.learner.parameters():  # far from the start, where all vectors are alike
        torch.nn.init.normal_(parameter, std=0.3)
    save_model(run, tmp_path / "model", {}, tmp_path)
    retriever = Retriever.load(tmp_path / "model", exact=True)
    row_of = np.argsort(store.event_item)
    owner = np.repeat(np.arange(store.n_users), np.diff(store.group_start[store.user_group]))
    exact = options.get("encoder") == "cls"  # a packed row may know less of a context than a request does
    compared = 0
    for plan in run.batches.epoch(0, 0):
        (step,) = run.batches.assemble(plan, np.random.default_rng(0))
        with torch.no_grad():
            trained = run.learner(run.rows.weight[torch.from_numpy(step.numbers)], step)
        for s, target in enumerate(store.event_item[row_of[step.numbers[step.target]]]):
            row, category = row_of[target], int(step.category[s])
            life_ = store.life(int(owner[row]), float(store.event_time[row])).lately(options.get("within"))
            met = life_.in_context(category, TINY.context_length).item
            if not exact and len(met) != step.past_count[s]:
                continue
            ((request, _), _) = retriever._requests(life_, [(category, 1.0)])[0]
            served, compared = retriever.model.user_vectors([request]), compared + 1
            np.testing.assert_allclose(served.user[0, 0], trained.user[s], atol=1e-5)
            if trained.shares is not None:
                n = len(met)
                newest_first = np.append(served.shares[0, 0], served.shares[0, 1 : 1 + n][::-1])
                np.testing.assert_allclose(newest_first, trained.shares[s, : 1 + n], atol=1e-4)
    assert compared > (200 if exact else 100)


# -- the last behaviors only


def test_a_model_that_looks_at_the_last_behaviors_sees_no_others(folder, tmp_path):
    """Equal answers, whether the behaviors before them are in the store or not."""
    config = replace(TINY, within=5, epochs=1)
    train(Store.open(folder / "store"), tmp_path / "model", config)
    now = max(e.time for e in OLD) + 1
    last, dropped = [], 0
    for user in range(USERS):
        mine = life(OLD, user, now)
        since = mine[-5].time
        last += [e for e in mine if e.time >= since]
        dropped += sum(e.time < since for e in mine)
    assert dropped > 1000
    short = logged(last, tmp_path / "short")
    a, b = (
        Retriever.load(tmp_path / "model", store=path, exact=True, interests=Top(3))
        for path in (folder / "store", short.path)
    )
    for user in range(USERS):
        one, other = a.retrieve(user, 20, now=now), b.retrieve(user, 20, now=now)
        assert 5 <= sum(c.behaviors for c in one.contexts) < 12
        assert rounded(one) == rounded(other)
    unseen = a.retrieve(3, 1000, now=now, rules=Rules(exclude_seen=True))
    assert not {e.item for e in life(OLD, 3, now)} & set(unseen.item_ids), "those met before are seen, too"


# -- reasons


def test_reasons_are_the_likest_behaviors_of_the_context(retriever):
    model, ids = retriever.model, retriever.model.items["item_id"].to_pylist()
    for user in range(0, USERS, 4):
        mine = life(OLD, user, CUT)
        for candidate in retriever.retrieve(user, k=60, now=CUT).candidates[::7]:
            context = [e for e in mine if e.category == candidate.category_id][-TINY.context_length :]
            last = {e.item: e for e in context}  # of an item met several times, the last time
            vector = model.item_vectors(np.array([ids.index(candidate.item_id)]))[0]
            like = {i: float(model.item_vectors(np.array([ids.index(i)]))[0] @ vector) for i in last}
            best = sorted(like.values(), reverse=True)[:REASONS]
            assert [r.similarity for r in candidate.reasons] == pytest.approx(best, abs=1e-5)
            assert len({r.item_id for r in candidate.reasons}) == len(candidate.reasons)
            for r in candidate.reasons:
                spoke = last[r.item_id]
                assert (r.timestamp, r.behavior, r.title) == (spoke.time, spoke.kind, f"thing {r.item_id}")
                assert r.similarity == pytest.approx(like[r.item_id], abs=1e-5)


def test_where_the_context_is_silent_the_recent_behaviors_speak(folder):
    """A user who never met category 20 is asked about it: no behavior there, so the latest of any speak."""
    events = [e for e in OLD if e.user != 0 or e.category != 20]
    store = logged(events, folder / "silent")
    r = Retriever.load(folder / "model", store=store.path, exact=True, interests=Top(2))
    answer = r.retrieve(0, k=500, rules=Rules(include_categories=[20]))
    first, second, included = answer.contexts
    assert (included.category_id, included.behaviors) == (20, 0)
    assert first.share > second.share == included.share, "wanted no more than the last one chosen"
    recent = {e.item for e in life(events, 0, answer.now)[-TINY.recent_length :]}
    for c in answer.candidates:
        if c.category_id == 20:
            assert c.reasons
            assert {reason.item_id for reason in c.reasons} <= recent


# -- time


@pytest.fixture(scope="module")
def rewritten(folder) -> Retriever:
    """The same model; from CUT on, everything in the store is different, or absent."""
    later = [e for e in some_events(9, range(USERS), CUT, 40, 900) if e.user % 4]
    every = [e for e in OLD if e.time < CUT]
    known = {e.item for e in OLD}
    store = logged(every + [e for e in later if e.item in known], folder / "rewritten")
    return Retriever.load(folder / "model", store=store.path, interests=RandomInTop(2, 3))


def rounded(answer: Retrieval) -> Any:
    """All of it, without the last digits: a sum is rounded differently where zeros are added."""
    return json.loads(json.dumps(answer.as_dict()), parse_float=lambda text: round(float(text), 5))


@settings(max_examples=60, deadline=None)
@given(
    user=st.integers(0, USERS - 1),
    now=st.sampled_from(sorted({e.time for e in OLD if e.time <= CUT} | {CUT})) | st.floats(START - DAY, CUT),
    seed=st.integers(0, 5),
)
def test_nothing_at_or_after_now_counts(retriever, rewritten, user, now, seed):
    a = retriever.retrieve(user, 30, now=now, rng=seed, interests=rewritten.interests)
    b = rewritten.retrieve(user, 30, now=now, rng=seed)
    assert rounded(a) == rounded(b)


def test_what_happens_after_the_cut_counts_after_it(retriever, rewritten):
    """Else the test above could not fail."""
    differs = [
        rounded(retriever.retrieve(u, 30, now=CUT + DAY, interests=Top(3)))
        != rounded(rewritten.retrieve(u, 30, now=CUT + DAY, interests=Top(3)))
        for u in range(USERS)
    ]
    assert np.mean(differs) > 0.5


@pytest.mark.parametrize("now", [math.nan, math.inf, 1_700_000_000_000])
def test_a_now_that_is_no_time_in_seconds(retriever, now):
    with pytest.raises(InputError, match=r"now=.*: expected seconds since 1970.*milliseconds"):
        retriever.retrieve(1, now=now)
    with pytest.raises(InputError, match="expected seconds"):
        list(retriever.retrieve_many([1], now=now))


def test_nobody_yet(retriever):
    answer = retriever.retrieve(1, now=START - 1)
    assert len(answer) == 0
    assert answer.candidates == answer.contexts == answer.item_ids == answer.category_ids == []
    assert answer.as_dict()["candidates"] == []


def test_include_asks_even_for_a_user_without_behaviors(retriever):
    answer = retriever.retrieve(1, 5, now=START - 1, rules=Rules(include_categories=[10]))
    assert [(c.category_id, c.share, c.behaviors, c.candidates) for c in answer.contexts] == [(10, 1.0, 0, 5)]
    assert all(c.reasons == () for c in answer.candidates)


# -- chance


def test_a_seed_repeats_a_draw_and_other_seeds_draw_others(retriever):
    def drawn(rng: Any) -> tuple:
        answer = retriever.retrieve(5, 10, rng=rng, interests=RandomInTop(1, 3))
        return (*[c.category_id for c in answer.contexts], *answer.item_ids)

    assert drawn(3) == drawn(3) == drawn(np.int64(3))
    assert len({drawn(seed) for seed in range(20)}) == 3
    rng = np.random.default_rng(0)
    assert len({drawn(rng) for _ in range(20)}) == 3, "a generator goes on"
    assert drawn(np.random.default_rng(7)) == drawn(np.random.default_rng(7))


def test_one_seed_draws_differently_for_different_users(retriever):
    chosen = [
        retriever.retrieve(u, 1, rng=0, interests=RandomInTop(1, 3)).contexts[0].share
        == max(c.share for c in retriever.retrieve(u, 1, rng=0).contexts)
        for u in range(USERS)
    ]
    assert 0 < np.mean(chosen) < 0.8


# -- several at once


def alike(a: Retrieval, b: Retrieval) -> None:
    assert a.user_id == b.user_id
    assert [c.category_id for c in a.contexts] == [c.category_id for c in b.contexts]
    assert sorted(a.item_ids) == sorted(b.item_ids)
    assert a.score == pytest.approx(b.score, abs=1e-4)
    assert [c.reasons for c in a.candidates[:1]] == [c.reasons for c in b.candidates[:1]]


@pytest.fixture(scope="module")
def sampling(folder) -> Retriever:
    """With an index that takes categories of more than 8 items for large, whose sums are estimates."""
    model = Model.open(folder / "model")
    vectors = model.item_vectors(slice(None))
    build(
        vectors, model.category_start, folder / "sampling", made_from={"model": model.fingerprint}, sample=1
    )
    return Retriever.load(folder / "model", index=folder / "sampling", interests=RandomInTop(2, 3))


@pytest.mark.parametrize(
    "rules", [Rules(), Rules(exclude_seen=True, exclude_items=[1000, 1003])], ids=["", "rules"]
)
def test_many_at_once_equal_one_call_each(sampling, monkeypatch, rules):
    monkeypatch.setattr(retrieve.retriever, "BATCH", 7)
    users = [*range(USERS), 3, 3]
    done: list[int] = []
    many = list(sampling.retrieve_many(users, 5, seed=4, rules=rules, progress=done.append))
    assert done == [7, 14, 21, 28, 32]
    at_once = sampling.answer([sampling.store.life(u) for u in users], 5, rng=4, rules=rules)
    for user, a, b in zip(users, many, at_once, strict=True):
        alone = sampling.retrieve(user, 5, rng=4, rules=rules)
        alike(a, alone)
        alike(b, alone)


def test_lives_of_different_moments_in_one_call(retriever):
    lives = [retriever.store.life(u, now) for u, now in ((1, CUT), (1, START - 1), (2, None), (1, CUT + DAY))]
    for one, answer in zip(lives, retriever.answer(lives, 10), strict=True):
        alike(answer, retriever.retrieve(one.user, 10, now=one.now))
    assert retriever.answer([], 10) == []


# -- rules


def test_exclude_seen(retriever):
    for user in range(0, USERS, 5):
        met = {e.item for e in life(OLD, user, CUT)}
        every, unseen = (
            retriever.retrieve(user, 1000, now=CUT, rules=Rules(exclude_seen=new)).item_ids
            for new in (False, True)
        )
        assert met & set(every)
        assert sorted(unseen) == sorted(set(every) - met)
        few = retriever.retrieve(user, 4, now=CUT, rules=Rules(exclude_seen=True)).item_ids
        assert few == unseen[:4], "those left out must make place for others"


def test_exclude_items(retriever):
    every = retriever.retrieve(2, 1000).item_ids
    unwanted = [*every[:3], 999_999, "no such id"]
    assert retriever.retrieve(2, 1000, rules=Rules(exclude_items=unwanted)).item_ids == every[3:]
    assert retriever.retrieve(2, 5, rules=Rules(exclude_items=every[:1])).item_ids == every[1:6]


def test_exclude_categories(retriever):
    first = retriever.retrieve(2).contexts[0].category_id
    answer = retriever.retrieve(2, 1000, rules=Rules(exclude_categories=[first]))
    assert first not in answer.category_ids
    assert len(answer.contexts) == 2


def test_include_categories(retriever):
    chosen = retriever.retrieve(2, interests=Top(1)).contexts[0].category_id
    others = [c for c in (0, 10, 20) if c != chosen]
    answer = retriever.retrieve(
        2, 1000, interests=Top(1), rules=Rules(include_categories=[*others, chosen, *others])
    )
    assert [c.category_id for c in answer.contexts] == [chosen, *others]
    assert all(c.behaviors > 0 for c in answer.contexts), "asked with the user's behaviors there"
    both = Rules(include_categories=others, exclude_categories=others[:1])
    answer = retriever.retrieve(2, interests=Top(1), rules=both)
    assert [c.category_id for c in answer.contexts] == [chosen, others[1]]


def test_quotas(retriever):
    free = retriever.retrieve(2, 20)
    category = free.category_ids[0]
    answer = retriever.retrieve(2, 20, rules=Rules(quotas={category: 2}))
    assert answer.category_ids.count(category) == 2
    assert len(answer) == 20, "the places go to the other contexts"
    assert [c.item_id for c in free.candidates if c.category_id == category][:2] == [
        c.item_id for c in answer.candidates if c.category_id == category
    ]
    assert category not in retriever.retrieve(2, 20, rules=Rules(quotas={category: 0})).category_ids


def test_boosts(retriever):
    plain = retriever.retrieve(2, 1000)
    category = plain.contexts[-1].category_id
    boosted = {
        c.item_id: c.score for c in retriever.retrieve(2, 1000, rules=Rules(boosts={category: 8})).candidates
    }
    for c in plain.candidates:
        change = math.log(8) if c.category_id == category else 0
        assert boosted[c.item_id] == pytest.approx(c.score + change)


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ({"quotas": {10: -1}}, r"quota of category 10 is -1, expected 0 or more"),
        ({"boosts": {10: 0}}, r"boost of category 10 is 0, expected more than 0\. .*exclude it"),
        ({"boosts": {"x": math.nan}}, r"boost of category 'x' is nan"),
    ],
)
def test_rules_that_cannot_be(rules, message):
    with pytest.raises(InputError, match=message):
        Rules(**rules)


@pytest.mark.parametrize("rule", ["exclude_categories", "include_categories", "quotas", "boosts"])
def test_categories_that_the_model_does_not_know(retriever, rule):
    value = {77: 1} if rule in ("quotas", "boosts") else [77]
    with pytest.raises(
        UnknownCategory, match=r"category 77 is not among the 3 categories of .*model .*such as 0"
    ):
        retriever.retrieve(1, rules=Rules(**{rule: value}))
    with pytest.raises(UnknownCategory, match=r"category '10' is not among"):
        retriever.retrieve(1, rules=Rules(include_categories=["10"]))


# -- k and users


def test_a_k_beyond_the_catalogue_gives_all_there_is(retriever):
    answer = retriever.retrieve(1, 10**9)
    asked = {c.category_id for c in answer.contexts}
    assert sorted(answer.item_ids) == sorted({e.item for e in OLD if e.category in asked})


@pytest.mark.parametrize("k", [0, -1])
def test_a_k_that_is_none(retriever, k):
    with pytest.raises(InputError, match=rf"k={k}, expected at least 1"):
        retriever.retrieve(1, k)


def test_unknown_users(retriever):
    for user in (12345, "1", True):
        with pytest.raises(
            UnknownUser, match=rf"user {user!r} is not among the 30 users .* integers, such as 0"
        ):
            retriever.retrieve(user)


# -- interests and merges of one's own


def test_a_lambda_can_choose_the_contexts(retriever):
    latest = lambda life, rng: Contexts(life.recent(1).category, np.ones(len(life.recent(1).category)))  # noqa: E731
    answer = retriever.retrieve(4, 10, interests=latest)
    assert {c.category_id for c in answer.contexts} == {life(OLD, 4, answer.now)[-1].category}
    assert len(retriever.retrieve(4, 10, now=START - 1, interests=latest)) == 0


def test_a_function_can_merge(retriever):
    def worst_first(lists: Any, k: int) -> Merged:
        merged = round_robin(lists, k)
        return Merged(*(column[::-1] for column in merged))

    usual, turned = retriever.retrieve(4, 9, merge=round_robin), retriever.retrieve(4, 9, merge=worst_first)
    assert turned.item_ids == usual.item_ids[::-1]
    assert [c.cosine for c in turned.candidates] == [c.cosine for c in usual.candidates][::-1]
    mine = Retriever(retriever.model, retriever.index, retriever.store, interests=Top(3), merge=worst_first)
    assert mine.retrieve(4, 9).item_ids == turned.item_ids


# -- a store newer than the model

NEWER = [
    *OLD,
    *some_events(2, range(-4, 6), START + 100 * DAY, 20, 300),  # new users, numbered before the old ones
    *[Event(u, 5 + c, c, START + 121 * DAY + u, "click") for u in range(-2, 9) for c in (0, 10, -7)],
    *[Event(u, -3, -7, START + 122 * DAY - u, "click") for u in range(5, 9)],  # some love it most
    *[Event(u, 1007, 10, START + 122 * DAY, "a wish") for u in range(3)],  # a new kind, that sorts first
]


@pytest.fixture(scope="module")
def newer(folder) -> Retriever:
    """New users, new items of categories 0 and 10, a new category -7, new kinds and profile values."""
    store = logged(NEWER, folder / "newer")
    return Retriever.load(folder / "model", store=store.path, exact=True, interests=Top(3))


def test_numbers_have_moved(newer, exact):
    assert newer.store.category_ids.take([0]) == [-7]
    assert newer.store.user_number(0) != exact.store.user_number(0)
    assert newer.store.item_number(1001) != exact.store.item_number(1001)
    assert newer.store.behaviors[0] != exact.store.behaviors[0]


def test_old_lives_get_old_answers(newer, exact):
    for user in range(USERS):
        before, after = (r.retrieve(user, 40, now=START + 100 * DAY) for r in (exact, newer))
        assert rounded(before) == rounded(after)


@pytest.mark.parametrize("user", [-4, -2, -1, 0, 2, 5, 8, 20])
def test_new_users_items_and_categories(newer, user):
    answer = newer.retrieve(user, 60)
    same(answer, obvious(newer.model, NEWER, user, answer.now)[:60], 1e-4)
    assert -7 not in [c.category_id for c in answer.contexts]
    assert not {5, 15, -2} & set(answer.item_ids), "the model has no vectors of items that it has not seen"


def test_new_items_are_among_the_reasons(newer):
    answer = newer.retrieve(7, 60)
    reasons = {r.item_id: r.title for c in answer.candidates for r in c.reasons}
    assert {5, 15} & reasons.keys()
    assert all(title == f"thing {item_id}" for item_id, title in reasons.items())


def test_excluding_what_only_the_store_knows(newer):
    answer = newer.retrieve(2, 1000, rules=Rules(exclude_seen=True, exclude_items=[5]))
    assert not {e.item for e in life(NEWER, 2, answer.now)} & set(answer.item_ids)


def test_an_item_that_has_changed_its_category_comes_once(folder):
    """The model has it under the old one; in the new one it is a behavior, but nothing to return to."""
    moved = {1002, 1003, 1006, 1012}
    events = [replace(e, category=(e.category + 10) % 30) if e.item in moved else e for e in OLD]
    store = logged(events, folder / "moved")
    r = Retriever.load(folder / "model", store=store.path, exact=True, interests=Top(3))
    lost = 0.0
    for user in range(USERS):
        answer = r.retrieve(user, 1000)
        assert len(set(answer.item_ids)) == len(answer.item_ids)
        same(answer, obvious(r.model, events, user, answer.now), 1e-4)
        for source, category in enumerate(answer.asked_categories):
            mine = answer.source == source
            assert set(r.model.category_of(answer.item[mine])) == {category}
            lost = max(
                lost, 1 - sum(math.exp(c.log_prob) for c, m in zip(answer.candidates, mine, strict=True) if m)
            )
    assert lost > 0.01, "what is due to them goes to nobody"


def test_a_category_that_the_store_does_not_have_can_be_included(folder):
    store = logged([e for e in OLD if e.category != 10], folder / "narrow")
    r = Retriever.load(folder / "model", store=store.path, interests=Top(1))
    answer = r.retrieve(3, 1000, rules=Rules(include_categories=[10]))
    assert answer.category_ids.count(10) == len({e.item for e in OLD if e.category == 10})
    assert r.store_categories(answer.asked_categories)[1] == -1
    assert r.store_items(answer.item[[i for i, c in enumerate(answer.category_ids) if c == 10]]).max() == -1


def test_ids_of_another_type(folder):
    store = logged(OLD, folder / "text ids", text=True)
    with pytest.raises(Mismatch, match=r"the store's ids are large_string, the model's int64.*same type"):
        Retriever.load(folder / "model", store=store.path)


def test_string_ids(folder, tmp_path, exact):
    """The same log with strings as ids that sort alike gives the same answers."""
    train(logged(OLD, tmp_path / "store", text=True), tmp_path / "model", TINY)
    r = Retriever.load(tmp_path / "model", exact=True, interests=Top(3))
    rules = Rules(exclude_items=[_as_text(1000)], exclude_seen=True, quotas={_as_text(10): 3})
    numbers = Rules(exclude_items=[1000], exclude_seen=True, quotas={10: 3})
    for user in (0, 17):
        a, b = r.retrieve(_as_text(user), 30, rules=rules), exact.retrieve(user, 30, rules=numbers)
        assert a.user_id == _as_text(user)
        assert a.item_ids == [_as_text(i) for i in b.item_ids]
        assert a.score == pytest.approx(b.score, abs=1e-4)
    with pytest.raises(UnknownUser, match=r"user 3 is not among .* strings, such as '\[id 00000\]'"):
        r.retrieve(3)


def test_a_log_without_kinds_titles_or_profiles(tmp_path):
    log = table(*zip(*[(e.user, e.item, e.category, e.time) for e in OLD[:400]], strict=True))
    train(stored(log, tmp_path / "store"), tmp_path / "model", TINY)
    r = Retriever.load(tmp_path / "model", exact=True)
    candidate = r.retrieve(int(OLD[0].user), 3).candidates[0]
    assert candidate.title is None
    assert candidate.reasons[0].title is None
    assert candidate.reasons[0].behavior == ""


# -- folders


def test_without_the_store_it_was_trained_on(folder, tmp_path):
    shutil.copytree(folder / "model", tmp_path / "model", ignore=shutil.ignore_patterns("index"))
    manifest = tmp_path / "model" / "manifest.json"
    manifest.write_text(manifest.read_text().replace(str(folder / "store"), str(tmp_path / "moved away")))
    with pytest.raises(NotSaved, match=r"trained on a store that is not there any more.*--store"):
        Retriever.load(tmp_path / "model", exact=True)
    Retriever.load(tmp_path / "model", exact=True, store=folder / "store")
    with pytest.raises(NotSaved, match=r"index: no such folder.*`longretriever index`"):
        Retriever.load(tmp_path / "model", store=folder / "store")


def test_an_index_of_another_model(folder, tmp_path):
    model = Model.open(folder / "model")
    vectors = model.item_vectors(slice(None))
    build(vectors, model.category_start, tmp_path / "index", made_from={"model": "another"})
    with pytest.raises(
        Mismatch, match=r"made from another model than .*model.*`longretriever index .*model`"
    ):
        Retriever.load(folder / "model", index=tmp_path / "index")


@pytest.mark.parametrize("file", ["user_tower.onnx", "item_token.npy", "items.arrow", "index/lists.faiss"])
def test_damaged_folders(folder, tmp_path, file):
    shutil.copytree(folder / "model", tmp_path / "model")
    content = bytearray((tmp_path / "model" / file).read_bytes())
    content[len(content) // 2] ^= 255
    (tmp_path / "model" / file).write_bytes(content)
    with pytest.raises(Damaged, match=rf"{file}: its SHA-256 is not the one written down"):
        Retriever.load(tmp_path / "model", verify=True)


def test_the_index_beside_another_place(folder, tmp_path):
    out = index_model(folder / "model", tmp_path / "elsewhere")
    assert Index.open(out).n_items == Model.open(folder / "model").n_items
    assert Retriever.load(folder / "model", index=out).retrieve(1, 3).item_ids


# -- everyone, to a file


def test_a_file_for_everyone(retriever, tmp_path, monkeypatch):
    monkeypatch.setattr(retrieve.retriever, "BATCH", 2)  # several batches, several row groups
    users, rules = [*range(USERS), 2], Rules(exclude_seen=True, quotas={10: 3})
    out = tmp_path / "deep" / "all.parquet"
    n = retriever.write(users, out, 7, now=CUT, seed=3, rules=rules)
    rows = pq.read_table(out)
    assert rows.column_names == ["user_id", "rank", "item_id", "category_id", "score"]
    assert rows.num_rows == n
    wanted: dict[str, list] = defaultdict(list)
    for user in users:
        answer = retriever.retrieve(user, 7, now=CUT, rng=3, rules=rules)
        wanted["user_id"] += [user] * len(answer)
        wanted["rank"] += [c.rank for c in answer.candidates]
        wanted["item_id"] += answer.item_ids
        wanted["category_id"] += answer.category_ids
        wanted["score"] += answer.score.tolist()
    assert rows["score"].to_pylist() == pytest.approx(wanted.pop("score"), abs=1e-4)
    for name, values in wanted.items():
        assert rows[name].to_pylist() == values


def test_several_processes_write_the_same_file(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(bulk, "PIECE", 7)
    asked = Retriever.load(folder / "model", interests=RandomInTop(2, 3))
    users, told = [*range(USERS), 2], []
    options = {"seed": 3, "rules": Rules(exclude_seen=True)}
    asked.write(users, tmp_path / "one", 7, **options)
    asked.write(users, tmp_path / "two", 7, **options, workers=2, progress=told.append)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
    assert told == [*range(7, len(users), 7), len(users)]
    with pytest.raises(UnknownUser, match="12345"):
        asked.write([*range(9), 12345], tmp_path / "two", 7, workers=2)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()


def test_processes_need_folders_to_open(retriever, tmp_path):
    made = Retriever(retriever.model, retriever.index, retriever.store)
    with pytest.raises(InputError, match=r"workers above 1 need a retriever of `Retriever\.load`"):
        made.write([1], tmp_path / "all", workers=2)
    with pytest.raises(InputError, match="workers=0, expected at least 1"):
        retriever.write([1], tmp_path / "all", workers=0)


def test_nobody_to_a_file(retriever, tmp_path):
    assert retriever.write([], tmp_path / "none.parquet") == 0
    assert retriever.write([1, 2], tmp_path / "early.parquet", now=START - 1) == 0
    for name in ("none", "early"):
        assert pq.read_table(tmp_path / f"{name}.parquet").schema.field("item_id").type == pa.int64()


def test_an_error_leaves_the_old_file(retriever, tmp_path):
    out = tmp_path / "all.parquet"
    retriever.write([1], out, 3)
    before = out.read_bytes()
    for users, k in (([*range(USERS), 12345], 3), ([1], 0)):
        with pytest.raises(InputError):
            retriever.write(users, out, k)
    assert out.read_bytes() == before
    assert [f.name for f in tmp_path.iterdir()] == ["all.parquet"]
