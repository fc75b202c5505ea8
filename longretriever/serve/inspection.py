"""What a person looks at beside candidates: users and their lives, items and what is like them, the model.

Functions of a generation, for the page and for whoever debugs. Searching by text scans ids and titles: some
10 milliseconds for a million of them.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from longretriever.errors import UnknownItem, UnknownUser
from longretriever.events import CATEGORY, ITEM, TITLE, USER
from longretriever.retrieve.interests import Pgin
from longretriever.retrieve.merge import MERGES
from longretriever.saved import package_version
from longretriever.serve import wire
from longretriever.serve.serving import Serving
from longretriever.store.behaviors import Life, titles


def life(
    serving: Serving, user_id: int | str, now: float | None, spans: int, recent: int, categories: int
) -> wire.Life:
    """A user's life before `now`: by category over time, and its newest behaviors. O(events of the user).

    Raises `UnknownUser` for one that neither the store nor the journal knows.
    """
    (of,) = serving.lives([user_id], now)
    rows = of.store.rows_of(of.user)
    if rows.stop == rows.start:
        raise UnknownUser(f"user {user_id!r} is not known: neither the store nor a live event names it.")
    positions = np.arange(rows.start, rows.stop)
    time = np.asarray(of.store.event_time[positions])
    past = positions[time < of.now]
    time = time[time < of.now]
    category = of.store.item_category[of.store.event_item[past]]
    first, last = (int(time.min()), int(time.max())) if len(time) else (None, None)
    edges = np.unique(np.linspace(first or 0, (last or 0) + 1, spans + 1).astype(np.int64))
    return wire.Life(
        user_id,
        of.now,
        len(time),
        len(time) - _stored(serving, of, user_id) if of.is_all else None,
        first,
        last,
        _profile(of),
        edges.tolist(),
        _categories(serving, of, category, time, edges, categories),
        _recent(of, recent),
    )


def _stored(serving: Serving, of: Life, user_id: int | str) -> int:
    """How many of the behaviors of a life the store has."""
    if of.store is serving.store:
        number = of.user
    else:
        known = (
            of.store.stands_for(of.user) if serving.store.user_ids.number_of(user_id) is not None else None
        )
        if known is None or serving.journal.of(user_id, serving.reader.after)[1]:
            return 0
        number = known
    rows = serving.store.rows_of(number)
    return int((serving.store.event_time[rows] < of.now).sum())


def _categories(
    serving: Serving, of: Life, category: np.ndarray, time: np.ndarray, edges: np.ndarray, most: int
) -> list[wire.CategoryOfLife]:
    met, score = of.engagement()
    total = score.sum() or 1.0
    foreseen = _foreseen(serving, of)
    best = np.lexsort((met, -score))[:most]
    out = []
    for c, value in zip(met[best], score[best], strict=True):
        mine = time[category == c]
        counts = np.histogram(mine, edges)[0].tolist()
        (category_id,) = of.store.category_ids.take([c])
        span = len(mine), int(mine.min()), int(mine.max())
        chance = None if foreseen is None else float(foreseen.get(int(c), 0.0))
        out.append(
            wire.CategoryOfLife(category_id, *span, float(value), float(value / total), chance, counts)
        )
    return out


def _foreseen(serving: Serving, of: Life) -> dict[int, float] | None:
    if "pgin" not in serving.selects or not len(of.recent(1).item):
        return None
    own = serving.retriever.interests
    pgin = own if isinstance(own, Pgin) else Pgin().beside(serving.model.path)
    category, probability = pgin.foreseen(of)
    return dict(zip(category.tolist(), probability.tolist(), strict=True))


def _recent(of: Life, most: int) -> list[wire.BehaviorSaid]:
    b, store = of.recent(most), of.store
    columns = zip(
        store.item_ids.take(b.item),
        store.titles(b.item),
        store.category_ids.take(b.category),
        b.time.tolist(),
        [store.behaviors[kind] for kind in b.kind],
        strict=True,
    )
    return [wire.BehaviorSaid(*row) for row in columns][::-1]


def _profile(of: Life) -> dict[str, Any]:
    fields = zip(of.store.profile_fields, of.profile(), strict=True)
    return {field.name: field.values[code - 1] if code else None for field, code in fields}


def users(serving: Serving, like: str | None, limit: int, seed: int) -> wire.UsersFound:
    """Users of the store whose ids begin so; without `like` some drawn by `seed`."""
    store = serving.store
    if like:
        numbers = _beginning(store.user_ids.values, like, limit)
    else:
        rng = np.random.default_rng(seed)
        numbers = np.sort(rng.choice(store.n_users, min(limit, store.n_users), replace=False, shuffle=False))
    found = []
    for number, user_id in zip(numbers.tolist(), store.user_ids.take(numbers), strict=True):
        rows = store.rows_of(number)
        last = store.recent(number, None, 1)
        found.append(wire.UserFound(user_id, rows.stop - rows.start, int(store.event_time[last[0]])))
    return wire.UsersFound(store.n_users, found)


def items(serving: Serving, like: str | None, category_id: str | None, limit: int) -> wire.ItemsFound:
    """Items of the model whose title contains the text, or whose id begins so; of one category if it is said.

    Those that were taken out of the index are not shown. Raises `UnknownCategory`, `InputError`.
    """
    model, table, first = serving.model, serving.model.items, 0
    if category_id is not None:
        first, last = serving.range_of(category_id)
        table = table.slice(first, last - first)
    most = limit + len(model.removed)  # so many may have to be passed over
    if like:
        found = _beginning(table[ITEM].combine_chunks(), like, most)
        if TITLE in table.column_names and len(found) < most:
            titled = _containing(table[TITLE], like)
            found = np.concatenate([found, titled[~np.isin(titled, found)]])
    else:
        found = np.arange(min(most, len(table)))
    numbers = first + found
    return wire.ItemsFound(items_of(serving, numbers[~model.is_removed(numbers)][:limit]))


def categories(serving: Serving, like: str | None, limit: int) -> wire.CategoriesFound:
    """Categories of the model, those with most items first."""
    model = serving.model
    size = np.diff(model.category_start)
    numbers = np.argsort(-size, kind="stable")
    if like:
        match = _beginning(model.category_ids.values, like, len(size))
        numbers = numbers[np.isin(numbers, match)]
    numbers = numbers[:limit]
    behaviors = serving.popular.behaviors[numbers].tolist()
    ids = model.category_ids.take(numbers)
    rows = zip(ids, size[numbers].tolist(), behaviors, strict=True)
    return wire.CategoriesFound(len(size), [wire.CategoryFound(*row) for row in rows])


def similar(serving: Serving, item_id: int | str, k: int) -> wire.Similar:
    """The items of the same category whose vectors are nearest. Raises `UnknownItem`."""
    model = serving.model
    number = model.item_ids.number_of(item_id)
    if number is None:
        raise UnknownItem(f"item {item_id!r} is not among the {model.n_items:,} items of {serving.name}.")
    this = np.array([number])
    vector = model.item_vectors(this)
    query = vector if model.factors is None else model.factors.queries(vector).vector
    found, _ = serving.retriever.index.search(query, model.category_of(this), k + 1)
    near = found[0][(found[0] >= 0) & (found[0] != number)]
    rows = zip(items_of(serving, near[:k]), (model.item_vectors(near) @ vector[0]).tolist(), strict=False)
    like = [wire.SimilarItem(one.item_id, one.title, min(1.0, c)) for one, c in rows]
    return wire.Similar(items_of(serving, this)[0], like)


def items_of(serving: Serving, numbers: np.ndarray) -> list[wire.ItemFound]:
    """What is said of items of the model."""
    model = serving.model
    ids = model.item_ids.take(numbers)
    of = model.category_ids.take(model.category_of(numbers))
    return [wire.ItemFound(*row) for row in zip(ids, titles(model.items, numbers), of, strict=True)]


def facts(serving: Serving, limits: dict[str, float]) -> wire.ModelFacts:
    model, store = serving.model, serving.store
    types = {USER: store.user_ids.values.type, ITEM: model.items[ITEM].type}
    types[CATEGORY] = model.category_ids.values.type
    return wire.ModelFacts(
        model=serving.name,
        method=model.method,
        package=package_version(),
        loaded=serving.loaded,
        made=serving.made,
        clock=serving.source.clock,
        items=model.n_items,
        categories=len(model.category_ids),
        users=store.n_users,
        behaviors=store.n_events,
        first_time=store.first_time,
        last_time=store.last_time,
        live_events=serving.live_events(),
        dimension=model.dim,
        selects=serving.selects,
        merge=model.merge,
        merges=list(MERGES),
        kinds=list(store.behaviors),
        ids={name: "integer" if pa.types.is_integer(dtype) else "string" for name, dtype in types.items()},
        limits=limits,
    )


def _beginning(ids: pa.Array, text: str, limit: int) -> np.ndarray:
    """Where ids begin with this text, the shortest first if they are integers, at most `limit`. O(ids)."""
    if pa.types.is_integer(ids.type):
        digits = text.removeprefix("-")
        if not (digits.isascii() and digits.isdecimal()):
            return np.empty(0, np.int64)
        ids = ids.cast(pa.string())
    at = np.flatnonzero(pc.starts_with(ids, text).to_numpy(zero_copy_only=False))
    length = pc.utf8_length(ids.take(pa.array(at))).to_numpy(zero_copy_only=False)
    return at[np.argsort(length, kind="stable")[:limit]]


def _containing(column: pa.ChunkedArray, text: str) -> np.ndarray:
    found = pc.fill_null(pc.match_substring(column, text, ignore_case=True), False)
    return np.flatnonzero(found.to_numpy())
