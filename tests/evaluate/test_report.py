"""The report has the contracted keys, gives a clairvoyant full marks, and refuses lists that flatter."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pyarrow.parquet
import pytest
from rich.console import Console

from longretriever.errors import InputError, Mismatch
from longretriever.evaluate.report import Values, evaluate, measure_batch, measure_live, summary, table
from longretriever.evaluate.rivals import Lists, Popular, PopularInContext, Recent
from longretriever.evaluate.split import Split, split
from longretriever.store.behaviors import Store
from tests.evaluate.test_rivals import store_of
from tests.evaluate.test_split import log_of, random_log

DOCS = Path(__file__).parents[2] / "docs/evaluate.md"
LIVE = ["recall@10", "recall@50", "recall@200", "recall@500", "mrr"]
BATCH = ["recall@50", "recall@200", "recall@500", "ndcg@50", "hit@50", "categories@50", "coverage@50"]


class Clairvoyant:
    """Looks the answers up in the split, which no model can."""

    def __init__(self, parts: Split) -> None:
        self.facts = {"train_seconds": 1.5, "samples_per_second": 20_000, "window": "all"}
        live, batch = parts.live(), parts.batch()
        self.next = dict(zip(zip(live.user, live.before, strict=True), live.target, strict=True))
        self.later = {
            new: dict(zip(b.user, b.target, strict=True))
            for new, b in ((False, batch), (True, batch.only_new()))
        }
        self.T, self.category = parts.T, parts.item_category

    def recommend(self, users: np.ndarray, before: np.ndarray, k: int, new: bool) -> Lists:
        item = np.full((len(users), k), -1)
        for row, user, now in zip(item, users, before, strict=True):
            known = self.later[new][user] if now == self.T + 1 else [self.next[user, now]]
            row[: len(known)] = known
        return Lists(item, [self.category[row[row >= 0]] for row in item])


def world(seed: int = 0, n: int = 600) -> tuple[Split, Store]:
    """No two events at one time, so that a time says which event is meant."""
    log = random_log(seed, n=n, items=120)
    times = np.random.default_rng(seed).permutation(n) * 3600
    parts = split(log.set_column(3, "timestamp", pyarrow.array(times)), min_events=1)
    return parts, store_of(parts)


@pytest.fixture(scope="module")
def result() -> dict:
    parts, store = world()
    models = {
        "clairvoyant": Clairvoyant(parts),
        "recent": Recent(store, parts.T),
        "popular": Popular(store, parts.T),
        "popular-in-context": PopularInContext(store, parts.T),
    }
    return evaluate(store, parts, models)


def test_the_keys_are_the_contracted_ones(result: dict) -> None:
    assert list(result) == ["data", "models"]
    assert list(result["models"]) == ["clairvoyant", "recent", "popular", "popular-in-context"]
    extra = {"selection", "requests", "users", "intervals", "by_history"}
    for answers in result["models"].values():
        assert {"live", "batch", "train_seconds", "samples_per_second"} <= set(answers)
        for protocol, names in (("live", LIVE), ("batch", BATCH)):
            assert list(answers[protocol]) == ["all", "new"]
            for figures in answers[protocol].values():
                assert set(figures) == {*names, *extra}
                assert set(names) <= set(figures["intervals"]) <= {*names, "selection"}
                for name, (low, high) in figures["intervals"].items():
                    assert low <= figures[name] <= high
    json.dumps(result, allow_nan=False)


def test_the_keys_follow_k() -> None:
    parts, store = world()
    answers = evaluate(store, parts, {"recent": Recent(store, parts.T)}, k=(3,))["models"]["recent"]
    assert [name for name in answers["live"]["all"] if "@" in name] == ["recall@3", "recall@10"]
    assert [name for name in answers["batch"]["all"] if name.startswith("recall")] == ["recall@3"]
    assert answers["batch"]["all"]["categories@50"] > 0
    with pytest.raises(InputError, match=r"k is \[0\], expected at least one list length of 1 or more"):
        evaluate(store, parts, {}, k=[0])


def test_a_clairvoyant_gets_full_marks(result: dict) -> None:
    answers = result["models"]["clairvoyant"]
    for part in ("all", "new"):
        assert {answers["live"][part][name] for name in [*LIVE, "selection"]} == {1}
        reached = ["recall@50", "recall@500", "ndcg@50", "hit@50", "selection"]
        assert {answers["batch"][part][name] for name in reached} == {1}


def test_facts_of_a_model_stand_beside_its_figures(result: dict) -> None:
    assert result["models"]["clairvoyant"]["train_seconds"] == 1.5
    assert result["models"]["clairvoyant"]["window"] == "all"
    assert result["models"]["recent"]["train_seconds"] is None
    assert result["models"]["popular"]["window_days"] in (1, 7, 30)


def test_lengths_of_history_share_out_the_requests(result: dict) -> None:
    for answers in result["models"].values():
        for protocol in ("live", "batch"):
            for figures in answers[protocol].values():
                groups = figures["by_history"]
                assert set(groups) <= {"1-9", "10-49", "50-199", "200-999", "1000+"}
                assert sum(group["requests"] for group in groups.values()) == figures["requests"]
                mean = sum(group["recall@50"] * group["requests"] for group in groups.values())
                assert mean / figures["requests"] == pytest.approx(figures["recall@50"], abs=1e-5)


def test_groups_of_history_start_where_they_say() -> None:
    history = np.array([1, 9, 10, 49, 50, 199, 200, 999, 1000, 50_000])
    groups = summary(Values(np.arange(10), history, {"mrr": np.arange(10.0)}))["by_history"]
    assert {name: group["mrr"] for name, group in groups.items()} == {
        "1-9": 0.5,
        "10-49": 2.5,
        "50-199": 4.5,
        "200-999": 6.5,
        "1000+": 8.5,
    }


@pytest.mark.parametrize("seed", [1, 2])
def test_each_model_is_asked_each_protocol_all_and_new(seed: int) -> None:
    parts, store = world()
    calls = []

    class Listening(Recent):
        def recommend(self, users: np.ndarray, before: np.ndarray, k: int, new: bool) -> Lists:
            calls.append((users.tolist(), before.tolist(), k, new))
            return super().recommend(users, before, k, new)

    evaluate(store, parts, {"listening": Listening(store, parts.T)}, seed=seed)
    live, batch = parts.live(seed=seed), parts.batch(seed=seed)
    assert calls == [
        (asked.user.tolist(), asked.before.tolist(), 500, new)
        for asked, new in (
            (live, False),
            (live.only_new(), True),
            (batch, False),
            (batch.only_new(), True),
        )
    ]


def test_live_figures_agree_with_a_loop() -> None:
    parts, store = world()
    live, model = parts.live(), Popular(store, parts.T, days=7)
    rank = []
    for user, now, target in zip(live.user, live.before, live.target, strict=True):
        shown = model.recommend(np.array([user]), np.array([now]), 20, new=False).item[0].tolist()
        rank.append(shown.index(target) + 1 if target in shown else None)
    figures = summary(measure_live(model, parts, live, k=(20,)))
    assert figures["recall@10"] == pytest.approx(np.mean([r is not None and r <= 10 for r in rank]), abs=1e-6)
    assert figures["recall@20"] == pytest.approx(np.mean([r is not None for r in rank]), abs=1e-6)
    assert figures["mrr"] == pytest.approx(np.mean([1 / r if r else 0 for r in rank]), abs=1e-6)
    assert 0 < figures["recall@10"] < figures["recall@20"] < 1


def test_values_of_two_models_are_for_the_same_requests() -> None:
    parts, store = world()
    requests = parts.batch()
    one, other = (
        measure_batch(m, parts, requests) for m in (Recent(store, parts.T), Popular(store, parts.T))
    )
    assert (one.user == other.user).all()
    assert {len(v) for v in one.metric.values()} == {len(requests.user)}


def test_data_says_what_was_asked(result: dict) -> None:
    parts, _ = world()
    data = result["data"]
    assert data["events"] == data["train_events"] + data["test_events"] == 600
    assert (data["users"], data["items"], data["T"]) == (parts.n_users, parts.n_items, parts.T)
    assert data["train_items"] == len(set(parts.train["item_id"].to_pylist()))
    assert data["live"] == {"requests": len(parts.live().user), "new_requests": int(parts.live().new.sum())}


def test_the_same_seed_gives_the_same_result(result: dict) -> None:
    parts, store = world()
    again = evaluate(store, parts, {"recent": Recent(store, parts.T)})
    assert again["data"] == result["data"]
    assert again["models"]["recent"] == result["models"]["recent"]


def test_where_nobody_meets_anything_new_the_figures_are_none() -> None:
    rows = [(user, user, 0, 10 * t + user) for user in (1, 2) for t in range(20)]
    parts = split(log_of(rows))
    store = store_of(parts)
    found = evaluate(store, parts, {"recent": Recent(store, parts.T)})
    figures = found["models"]["recent"]["live"]["new"]
    assert figures["requests"] == 0
    assert figures["mrr"] is None
    assert figures["intervals"]["mrr"] == [None, None]
    assert found["models"]["recent"]["batch"]["new"]["coverage@50"] is None
    assert "–" in printed(found)
    json.dumps(found, allow_nan=False)


class Fixed:
    def __init__(self, lists: Lists) -> None:
        self.lists = lists

    def recommend(self, users: np.ndarray, before: np.ndarray, k: int, new: bool) -> Lists:
        item = np.broadcast_to(self.lists.item, (len(users), self.lists.item.shape[-1]))
        return Lists(item, self.lists.contexts)


@pytest.mark.parametrize(
    ("lists", "message"),
    [
        (Lists(np.array([4, 2, 4, -1])), "Fixed lists item number 4 twice for request 0"),
        (Lists(np.array([4, 9999])), "item numbers from 4 to 9999; the store's are 0 to"),
        (Lists(np.array([4, -2])), "item numbers from -2 to 4"),
        (Lists(np.arange(99)), r"for 50 items with lists of shape \(\d+, 99\)"),
        (Lists(np.arange(5), [np.array([1])]), r"chose contexts for 1 requests of \d+"),
    ],
)
def test_lists_that_are_none_are_refused(lists: Lists, message: str) -> None:
    parts, store = world()
    with pytest.raises(InputError, match=message):
        evaluate(store, parts, {"fixed": Fixed(lists)}, k=(50,))


def test_a_store_of_another_log_is_refused() -> None:
    parts, store = world()
    for other in (
        world(seed=1, n=500)[0],
        split(log_of([(u, "a", "b", t) for u in "xy" for t in range(9)], str)),
    ):
        with pytest.raises(Mismatch, match=r"the store is of another log, .* Ingest `split.full`"):
            evaluate(store, other, {"recent": Recent(store, parts.T)})


def test_progress_is_told_who_answers() -> None:
    parts, store = world()
    told: list[str] = []
    evaluate(store, parts, {"recent": Recent(store, parts.T)}, progress=told.append)
    assert len(told) == 2
    assert re.match(r"recent: \d+ live requests", told[0])


def printed(result: dict, color: bool = False) -> str:
    console = Console(width=80, force_terminal=color, color_system="standard" if color else None)
    with console.capture() as captured:
        console.print(table(result))
    return captured.get()


def test_tables_show_every_figure_in_80_columns(result: dict) -> None:
    text = printed(result)
    assert "…" not in text
    for name, answers in result["models"].items():
        row = next(line for line in text.splitlines() if line.startswith(name))
        shown = [answers["live"][part][m] for part in ("all", "new") for m in LIVE]
        assert row.split()[1:] == [f"{value:.3f}".removeprefix("0") for value in shown]
    assert "±" in text


def test_the_best_of_a_column_is_bold(result: dict) -> None:
    lines = printed(result, color=True).splitlines()
    models = result["models"]
    for name, answers in models.items():
        best = [
            answers["live"][part][m] == max(other["live"][part][m] for other in models.values())
            for part in ("all", "new")
            for m in LIVE
        ]
        row = next(line for line in lines if line.startswith(name))
        assert row.count("\x1b[1m") == sum(best)
    assert lines[-1].count("\x1b[1m") == 0


def test_a_table_needs_a_model() -> None:
    with pytest.raises(InputError, match="no model in this result"):
        table({"data": {}, "models": {}})
