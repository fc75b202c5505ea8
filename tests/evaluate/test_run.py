"""An evaluation from a log: what comes after T teaches nothing, and the figures are of the very requests."""

from __future__ import annotations

import csv
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest

from longretriever.errors import InputError
from longretriever.evaluate.rivals import train_counts
from longretriever.evaluate.run import Retrieved, evaluate_log
from longretriever.evaluate.split import split
from longretriever.model.config import EbrConfig, PginConfig, TrainConfig
from longretriever.model.exported import Model
from longretriever.retrieve.interests import Top
from longretriever.retrieve.retriever import Retriever
from longretriever.retrieve.rules import Rules
from longretriever.saved import opening
from longretriever.store.behaviors import Store
from tests.worlds import parity_log

TINY = TrainConfig(
    dim=16,
    context_length=8,
    recent_length=4,
    overlap=2,
    step_samples=100,
    epochs=1,
    layers=1,
    dropout=0.1,
    whole=EbrConfig(dim=16, length=16, step_samples=100, epochs=1, layers=1),
    interests=PginConfig(dim=8, recent_length=4, categories=8, step_samples=100, epochs=2),
)
LOG = parity_log(users=40)
T = split(LOG).T
USERS = pa.table(
    {"user_id": range(-9, 40), "team": ["ABC"[user % 3] if user >= 0 else "0" for user in range(-9, 40)]}
)
ITEMS = pa.table({"item_id": range(200), "color": [item % 5 if item < 36 else -1 for item in range(200)]})


def with_future(rows: list[dict]) -> pa.Table:
    """The log with other events after T."""
    return pa.concat_tables(
        [LOG.filter(pc.less_equal(LOG["timestamp"], T)), pa.Table.from_pylist(rows, LOG.schema)]
    )


FUTURE = LOG.filter(pc.greater(LOG["timestamp"], T)).to_pylist()
OTHER_FUTURE = with_future(
    [
        {**row, "user_id": -1 - i % 3, "item_id": 100 + i % 7, "category_id": -4}
        if i % 2
        else {**row, "item_id": 5, "category_id": 0}
        for i, row in enumerate(FUTURE)
    ]
)


def run(events: object, work: Path, **options) -> dict:
    given = {"models": ["longretriever"], "config": TINY, "k": (5, 50)}
    return evaluate_log(events, work=work, **{**given, **options})


SIDES = {"items": ITEMS, "users": USERS}


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory) -> tuple[Path, dict]:
    work = tmp_path_factory.mktemp("evaluated")
    return work, run(LOG, work, **SIDES)


class Stopped(Exception):
    pass


def stopped(store: Store, path: Path, config: TrainConfig, **rest: object) -> None:
    raise Stopped(config)


def fingerprint(work: Path, name: str) -> str:
    return opening(work / name, "model" if name == "model" else "store", verify=True).fingerprint


def test_what_comes_after_the_cut_leaves_no_trace_in_the_model(evaluated, tmp_path):
    """New users, new items, a new category, and the old users doing something else."""
    assert split(OTHER_FUTURE).T == T
    mixed_up = OTHER_FUTURE.take(np.random.default_rng(0).permutation(OTHER_FUTURE.num_rows))
    result = run(mixed_up, tmp_path, **SIDES)
    assert result["data"]["items"] == 36 + 7
    assert result["data"]["users"] == 40 + 3
    assert fingerprint(tmp_path, "full") != fingerprint(evaluated[0], "full")
    assert fingerprint(tmp_path, "train") == fingerprint(evaluated[0], "train")
    assert fingerprint(tmp_path, "model") == fingerprint(evaluated[0], "model")


def test_what_is_missing_after_the_cut_leaves_no_trace_either(evaluated, tmp_path):
    shorter = with_future(FUTURE[::2])
    place = np.count_nonzero(LOG["timestamp"].to_numpy() <= T) - 1  # of T among the sorted times
    run(shorter, tmp_path, quantile=place / (shorter.num_rows - 1), **SIDES)
    assert fingerprint(tmp_path, "model") == fingerprint(evaluated[0], "model")


def test_what_comes_before_the_cut_does_leave_a_trace(evaluated, tmp_path, monkeypatch):
    """Else the tests above could not fail."""
    earlier = LOG.to_pylist()
    assert earlier[3]["timestamp"] < T
    earlier[3] = {**earlier[3], "timestamp": earlier[3]["timestamp"] + 1}
    monkeypatch.setattr("longretriever.model.train.train", stopped)
    with pytest.raises(Stopped):
        run(pa.Table.from_pylist(earlier, LOG.schema), tmp_path, **SIDES)
    assert fingerprint(tmp_path, "train") != fingerprint(evaluated[0], "train")


def test_lists_hold_items_of_train_and_are_those_of_single_requests(tmp_path):
    """In a store with a future of new items, for users old and new, at moments before and after T."""
    rows = [
        {**row, "item_id": 200 + i % 9, "category_id": -7} if i % 2 else row for i, row in enumerate(FUTURE)
    ]
    run(with_future(rows), tmp_path)
    retriever = Retriever.load(tmp_path / "model", store=tmp_path / "full", interests=Top(20))
    full = retriever.store
    in_train = train_counts(full, T) > 0
    assert not in_train.all()
    users, before = np.arange(40), np.linspace(full.first_time, full.last_time, 40)
    for new in (False, True):
        lists = Retrieved(retriever, {}, seed=1).recommend(users, before, 30, new)
        for user, at, row, contexts in zip(users, before, lists.item, lists.contexts, strict=True):
            answer = retriever.retrieve(int(user), 30, now=at, rng=1, rules=Rules(exclude_seen=new))
            shown = row[row >= 0]
            assert full.item_ids.take(shown) == answer.item_ids
            asked = [full.category_ids.take([c])[0] if c >= 0 else None for c in contexts]  # None: all items
            assert asked == [c.category_id for c in answer.contexts]
            assert in_train[shown].all()
            assert not (new and set(full.life(int(user), at).items()) & set(shown))


def test_it_finds_what_only_the_context_tells(tmp_path):
    """Users like the even or the odd items of a category; popularity cannot know which."""
    config = replace(TINY, epochs=8, row_lr=0.1, validation=0)
    names = ["longretriever", "popular-in-context"]
    result = evaluate_log(parity_log(users=90), models=names, config=config, k=(6, 18), work=tmp_path)
    ours, popular = (result["models"][name]["live"]["all"] for name in names)
    assert ours["recall@18"] > 0.8  # half of the items; popularity finds half of the targets
    assert popular["recall@18"] < 0.65
    assert result["models"]["longretriever"]["training"]["samples"] == 8 * result["data"]["train_events"]


# -- options


def test_the_work_folder_is_kept_and_can_be_used_again(evaluated):
    work, result = evaluated
    assert not list(work.glob(".*"))
    again = run(LOG, work, **SIDES)
    Store.open(work / "full", verify=True)
    for name in ("data", "models"):
        assert again[name].keys() == result[name].keys()
    assert again["models"]["longretriever"]["live"] == result["models"]["longretriever"]["live"]


@pytest.mark.parametrize(
    ("options", "seed", "minutes"),
    [
        ({"config": replace(TINY, seed=7, minutes=3.0)}, 7, 3.0),
        ({"config": replace(TINY, seed=7, minutes=3.0), "minutes": 2.0}, 7, 2.0),
        ({"config": None, "seed": 5}, 5, None),
    ],
)
def test_settings_are_those_of_the_config_unless_given(tmp_path, monkeypatch, options, seed, minutes):
    monkeypatch.setattr("longretriever.model.train.train", stopped)
    with pytest.raises(Stopped) as stop:
        run(LOG, tmp_path, **options)
    used = stop.value.args[0]
    assert (used.seed, used.minutes) == (seed, minutes)


def test_an_unfinished_training_of_other_settings_is_not_in_the_way(tmp_path):
    def stop_after_the_first_epoch(tick) -> None:
        if tick.position.epoch == 1:
            raise Stopped

    with pytest.raises(Stopped):
        run(LOG, tmp_path, config=replace(TINY, epochs=2), trained=stop_after_the_first_epoch)
    assert list(tmp_path.glob(".model.training"))
    run(LOG, tmp_path, config=replace(TINY, dim=8))
    assert Model.open(tmp_path / "model").config["dim"] == 8
    assert not list(tmp_path.glob(".*"))


def test_a_text_log_with_other_names_and_mixed_ids(tmp_path):
    """Ids that are all digits in the items file are strings where the log has others."""
    with (tmp_path / "log.csv").open("w") as file:
        out = csv.writer(file)
        out.writerow(["who", "item_id", "category_id", "timestamp"])
        for row in LOG.to_pylist():
            item = row["item_id"] or "zero"
            out.writerow([row["user_id"], item, row["category_id"], row["timestamp"]])
    with (tmp_path / "items.csv").open("w") as file:
        out = csv.writer(file)
        out.writerows([["number", "color"], *([item, item % 5] for item in range(1, 50))])
    reading = {"columns": {"user_id": "who"}, "item_columns": {"item_id": "number"}, "threads": 1}
    said: list[str] = []
    run(
        str(tmp_path / "log.csv"),
        tmp_path / "work",
        **{"items": str(tmp_path / "items.csv"), "users": None, "reading": reading, "said": said.append},
    )
    store = Store.open(tmp_path / "work" / "train")
    assert [field.name for field in store.item_fields] == ["color"]
    assert store.item_number("zero") is not None
    assert "longretriever: learning" in said


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"models": ["longretriever", "foo"]},
            r"models \['foo'\]: expected some of longretriever, .*recent, ",
        ),
        ({"models": []}, r"models \[\]: expected some of"),
        ({"k": ()}, r"k is \[\], expected at least one list length"),
        ({"k": (5, 0)}, r"k is \[5, 0\], expected"),
        ({"quantile": 1.5}, "quantile is 1.5"),
    ],
)
def test_what_cannot_be_is_said_before_anything_is_trained(tmp_path, options, message):
    with pytest.raises(InputError, match=message):
        run(LOG, tmp_path / "work", **options)
    assert not (tmp_path / "work").exists()
