"""The index of a model: one list per category, and groups of near items where all items are asked."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np

from longretriever import clusters
from longretriever.clusters import Clustering
from longretriever.errors import NotSaved, SavedError
from longretriever.events import ITEM
from longretriever.index import CLUSTERS, ExactIndex, build
from longretriever.model.exported import Model
from longretriever.pgvector import Database
from longretriever.retrieve.numbers import matched
from longretriever.retrieve.retriever import WHOLE, Retriever, Searched, trained_on
from longretriever.saved import opening

CARRIED = 0.1  # groups are made anew once so large a share of the items has come or gone

_QUERIES = 256
_CHUNK = 1 << 16


def index_model(
    path: str | os.PathLike[str],
    out: str | os.PathLike[str] | None = None,
    progress: Callable[[int, int], None] | None = None,
    *,
    exact: bool = False,
    before: str | os.PathLike[str] | None = None,
) -> Path:
    """Build the index of a model folder, by default inside it, and return where it is.

    Where the model brings another to search all items, that gets its index as well, inside its own folder.
    Of more than 100,000 items, a search of all of them looks at the nearest groups only, as many as find 98%
    of the nearest 500 for users of the store; `exact`, or a store that is not there any more, has it look at
    all. Repeats itself exactly, on one machine with one number of threads.

    `before` is a folder of the same model with a few items less or more: its groups are taken over, which
    saves nearly all of the time, unless the number of items has changed by a tenth since they were made.
    """
    path = Path(path)
    model = Model.open(path)
    asked = None if exact else model
    older = None if before is None else Path(before)
    if (path / WHOLE).exists():
        whole = Model.open(path / WHOLE)
        _index(whole, path / WHOLE / "index", asked, None, older and older / WHOLE)
        asked = None
    return _index(model, Path(out) if out else path / "index", asked, progress, older)


def load_into(
    database: Database,
    path: str | os.PathLike[str],
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Put the vectors of a model folder into a database, with those that it brings to search all items.

    Each of the two appears at once, the other way round from how they are asked for: whoever finds the
    model's finds what goes with it. Raises `RequestFailed` or a `SavedError`.
    """
    path = Path(path)
    models = {"contexts": Model.open(path)}
    if (path / WHOLE).exists():
        models = {"whole": Model.open(path / WHOLE), **models}
    for kind, model in models.items():
        database.load(model, kind, progress if kind == "contexts" else None)


def _index(
    model: Model,
    target: Path,
    asked: Model | None,
    progress: Callable[[int, int], None] | None,
    before: Path | None,
) -> Path:
    """`asked` is the model whose users' vectors search all items here; None: all are looked at."""
    chunks = (model.searched_vectors(slice(at, at + _CHUNK)) for at in range(0, model.n_items, _CHUNK))
    clustering = None
    if asked is not None and model.asks_corpus and model.n_items >= clusters.FROM:
        clustering = (_carried(model, before) if before is not None else None) or _clustering(model, asked)
    build(
        chunks,
        model.category_start,
        target,
        made_from={"model": model.fingerprint},
        without=model.removed,
        clustering=clustering,
        progress=progress,
    )
    return target


def _carried(model: Model, before: Path) -> Clustering | None:
    """The groups of an older index, its items found by their ids; None where they are not to be used."""
    try:
        old, index = Model.open(before), opening(before / "index", "index")
    except SavedError:
        return None
    facts = index.facts.get("clusters") if index.made_from.get("model") == old.fingerprint else None
    now = model.n_items - len(model.removed)
    if facts is None or abs(now - facts.get("items", 0)) > CARRIED * now:
        return None
    number = matched(old.items[ITEM], model.items[ITEM])
    moved = old.category_of(np.arange(old.n_items)) != model.category_of(number)
    number[moved | np.isin(number, model.removed)] = -1
    there = number.copy()
    there[old.removed] = -1  # the groups did not hold them
    holds = np.zeros(model.n_items, bool)
    holds[there[there >= 0]] = True
    return Clustering(clusters.carried(index.path / CLUSTERS, number), holds, facts=facts)


def _clustering(model: Model, asked: Model) -> Clustering | None:
    """Groups of this model's items, and vectors of users who are asked about often; None without a store."""
    try:
        store = trained_on(asked, False)
    except NotSaved:
        return None
    whole = None if model is asked else Searched(model, _unsearched(model))
    retriever = Retriever(asked, _unsearched(asked), store, whole=whole)
    queries = busy_users_vectors(retriever, _QUERIES, np.random.default_rng(0))
    if len(queries) == 0:
        return None
    groups = clusters.empty(clusters.centres(model.searched_vectors, model.n_items))
    return Clustering(groups, queries=queries[:_QUERIES])


def busy_users_vectors(retriever: Retriever, n: int, rng: np.random.Generator) -> np.ndarray:
    """[about n, D] what searches all items for users drawn by their number of behaviors, as requests come."""
    store = retriever.store
    size = np.diff(store.group_start[store.user_group])
    users = rng.choice(store.n_users, min(n, store.n_users), replace=False, p=size / size.sum())
    return retriever.corpus_vectors([store.life(int(user)) for user in users])


def _unsearched(model: Model) -> ExactIndex:
    """What a retriever needs that makes vectors only."""
    return ExactIndex(model.item_token, model.category_start)
