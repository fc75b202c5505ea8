"""A log in, a table of models out: what `longretriever evaluate` does, and the same from Python.

The log is read as it is, cut by the protocol (`split.py`), and ingested twice: its train part, which is all
that a model may learn from, and the whole, whose behaviors are the histories at request time. Our model then
answers through the very calls that serve users: ingest, train, index, `Retriever`.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from longretriever.errors import InputError, Mismatch
from longretriever.evaluate.collaborative import ALS, BM25
from longretriever.evaluate.report import evaluate
from longretriever.evaluate.rivals import Lists, Popular, PopularInContext, Recent, Recommender
from longretriever.evaluate.split import Split, split
from longretriever.events import CATEGORY, ITEM
from longretriever.model.config import LEARNED, configuration, need_torch
from longretriever.model.warm import need_implicit
from longretriever.retrieve.indexing import index_model
from longretriever.retrieve.interests import Interests
from longretriever.retrieve.merge import Merge
from longretriever.retrieve.retriever import BATCH, WHOLE, Retriever
from longretriever.retrieve.rules import Rules
from longretriever.saved import opening
from longretriever.store.behaviors import Store
from longretriever.store.ingest import ingest, read_events, read_table

if TYPE_CHECKING:
    from longretriever.model.config import TrainConfig
    from longretriever.model.train import Tick

USUAL = ("longretriever", "recent", "popular", "popular-in-context")
"""What is compared unless asked otherwise; of the other `MODELS`, the last two need `implicit`."""
MODELS = (*LEARNED, *USUAL[1:], "als", "bm25")


class Retrieved:
    """A `Retriever` as a `Recommender`: the product's own path, asked by the evaluation."""

    def __init__(self, retriever: Retriever, facts: Mapping[str, Any], seed: int = 0) -> None:
        self.retriever, self.facts, self.seed = retriever, facts, seed

    def recommend(self, users: np.ndarray, before: np.ndarray, k: int, new: bool) -> Lists:
        """See `Recommender`; users are numbers of the retriever's store."""
        item = np.full((len(users), k), -1, np.int64)
        contexts: list[np.ndarray] = []
        rules = Rules(exclude_seen=new)
        for at in range(0, len(users), BATCH):
            part = slice(at, at + BATCH)
            lives = [
                self.retriever.store.life(int(u), float(t))
                for u, t in zip(users[part], before[part], strict=True)
            ]
            for i, answer in enumerate(self.retriever.answer(lives, k, rng=self.seed, rules=rules), start=at):
                item[i, : len(answer)] = self.retriever.store_items(answer.item)
                contexts.append(self.retriever.store_categories(answer.asked_categories))
        return Lists(item, contexts)


def evaluate_log(
    events: Any,
    *,
    items: Any = None,
    users: Any = None,
    models: Sequence[str] = USUAL,
    quantile: float = 0.9,
    k: Sequence[int] = (50, 200, 500),
    seed: int = 1,
    minutes: float | None = None,
    config: TrainConfig | None = None,
    interests: Interests | None = None,
    merge: Merge | None = None,
    work: str | os.PathLike[str] | None = None,
    reading: Mapping[str, Any] | None = None,
    said: Callable[[str], None] | None = None,
    trained: Callable[[Tick], None] | None = None,
) -> dict[str, Any]:
    """Evaluate models by name on one log; the dict of `report.evaluate`.

    `events`, `items`, `users` and the options in `reading` are those of `ingest`. `minutes` bounds the
    training of each model. `interests` and `merge` are for LongRetriever and ULIM, whose own are the 20
    likeliest contexts and probability. `config` is LongRetriever's. `seed` draws the requests, and trains
    unless `config` has its own; `minutes` overrides those of `config`. Stores and models stay in `work` if it
    is given, and a call of the same settings goes on from an unfinished training there. `said` is told what
    goes on, `trained` each step of training.

    Raises `InputError` for an unknown model, `MissingExtra` for one whose library is not installed,
    `EventsError` for a log that cannot be read or cut.
    """
    strange = [name for name in models if name not in MODELS]
    if strange or not models:
        raise InputError(f"models {strange or list(models)}: expected some of {', '.join(MODELS)}.")
    if {"als", "bm25"} & set(models):  # this and the next: before anything is trained
        need_implicit()
    if min(k, default=0) < 1:
        raise InputError(f"k is {list(k)}, expected at least one list length of 1 or more, such as 50.")
    say = said or (lambda _: None)
    reading = dict(reading or {})
    with nullcontext(str(work)) if work else tempfile.TemporaryDirectory(prefix="longretriever-") as folder:
        say("reading the log")
        cut, tables = read_split(events, items, users, quantile, reading)
        say(f"{cut.full.num_rows:,} events after the filter, {cut.train.num_rows:,} of them to learn from")
        full = store_of(cut.full, Path(folder) / "full", tables, reading)
        recommenders: dict[str, Recommender] = {}
        for name in models:
            say(f"{name}: learning")
            if name in LEARNED:
                train_store = store_of(cut.train, Path(folder) / "train", tables, reading)
                settings = replace(configuration(name), seed=seed)
                if config and name == "longretriever":
                    settings = config
                if minutes is not None:
                    settings = replace(settings, minutes=minutes)
                path = Path(folder) / ("model" if name == "longretriever" else name)
                facts = learn(train_store, path, settings, trained, reading.get("threads"))
                own = name not in ("longretriever", "ulim")  # asks no contexts, so there is nothing to choose
                retriever = Retriever.load(
                    path, store=full.path, interests=interests, merge=None if own else merge
                )
                recommenders[name] = Retrieved(retriever, facts, seed)
            else:
                recommenders[name] = counted(_rival(name, seed, reading.get("threads")), full, cut.T)
        return evaluate(full, cut, recommenders, k, seed, say)


_READ = ("columns", "item_columns", "time_unit", "max_rejected", "memory_limit", "threads")
_INGEST = ("profile", "item_features", "memory_limit", "threads")


def _only(options: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    return {name: options[name] for name in names if name in options}


def _rival(name: str, seed: int, threads: int | None) -> Callable[[Store, int], Recommender]:
    makers: dict[str, Callable[[Store, int], Recommender]] = {
        "recent": Recent,
        "popular": Popular,
        "popular-in-context": PopularInContext,
        "als": partial(ALS, seed=seed, threads=threads),
        "bm25": partial(BM25, threads=threads),
    }
    return makers[name]


def counted(rival: Callable[[Store, int], Recommender], full: Store, T: int) -> Recommender:
    """A rival that has counted what it needs; its `facts` say how long that took."""
    began = time.perf_counter()
    made: Any = rival(full, T)
    made.facts = {**getattr(made, "facts", {}), "train_seconds": round(time.perf_counter() - began, 3)}
    return made


def learn(
    train_store: Store,
    path: Path,
    config: Any,
    trained: Callable[[Tick], None] | None = None,
    threads: int | None = None,
) -> dict[str, Any]:
    """Train a model of this configuration at `path` and index it; returns how training went.

    Goes on from an unfinished training of the same settings there, and discards one of others.
    """
    need_torch()
    from longretriever.model.train import train

    try:
        at = train(train_store, path, config, progress=trained, threads=threads)
    except Mismatch:  # an unfinished training of other settings or another log: of no use here
        at = train(train_store, path, config, progress=trained, threads=threads, fresh=True)
    index_model(path)
    parameters = dict(opening(path, "model").facts["parameters"])
    if "whole" in at.beside:
        for what, number in opening(path / WHOLE, "model").facts["parameters"].items():
            parameters[what] += number
    return {
        "train_seconds": round(at.all_seconds, 1),
        "samples_per_second": round(at.samples / max(at.seconds, 1e-9), 1),
        "training": {
            "samples": at.samples,
            "epochs": at.epoch,
            "waiting_share": round(at.waiting / max(at.seconds, 1e-9), 4),
            "padded_share": round(1 - at.tokens / max(at.padded, 1), 4),
            "validation": [round(v, 4) for v in at.validation],
            "curve": [[round(s, 1), n, round(v, 4)] for s, n, v in at.curve],
            "ended": at.finished,
            "seconds_beside": {name: round(of["seconds"], 1) for name, of in at.beside.items()},
        },
        "parameters": parameters,
    }


def read_split(
    events: Any, items: Any, users: Any, quantile: float, reading: Mapping[str, Any]
) -> tuple[Split, dict[str, pa.Table]]:
    """A log cut at T, and the items and users tables that go into its stores (see `store_of`)."""
    cut = split(read_events(events, items=items, **_only(reading, _READ)), quantile)
    return cut, _side_tables(cut, items, users, reading)


def _side_tables(cut: Split, items: Any, users: Any, reading: Mapping[str, Any]) -> dict[str, pa.Table]:
    """The items and users files, where given, cut to what the split knows and without categories: the split
    has given each item one already."""
    tables = {}
    if items is not None:
        table = read_table(items, "items", reading.get("item_columns"))
        item_id = table[ITEM].cast(cut.item_ids.type)  # 17 in a file of numbers may be "17" in the log
        table = table.set_column(table.schema.get_field_index(ITEM), ITEM, item_id)
        table = table.filter(pc.is_in(item_id, value_set=cut.item_ids))
        tables["items"] = table.drop_columns([c for c in (CATEGORY,) if c in table.column_names])
    if users is not None:
        tables["users"] = read_table(users, "users", reading.get("user_columns"))
    return tables


def store_of(
    events: pa.Table, out: Path, tables: Mapping[str, pa.Table], reading: Mapping[str, Any]
) -> Store:
    """A part of a split, ingested to `out` with the tables of `read_split`."""
    tables = dict(tables)
    if "items" in tables:  # an item that does not occur in this part must not get a number
        tables["items"] = tables["items"].filter(
            pc.is_in(tables["items"][ITEM], value_set=pc.unique(events[ITEM]))
        )
    ingest(events, out, **tables, **_only(reading, _INGEST))
    return Store.open(out)
