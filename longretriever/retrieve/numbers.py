"""How a model and a store of different days understand each other: numbers are matched by id, once."""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow.compute

from longretriever.errors import Mismatch
from longretriever.events import ITEM
from longretriever.model.exported import Model
from longretriever.model.factors import MOST, READ, Met
from longretriever.store.behaviors import Behaviors, Life, Store, Vocabulary

if TYPE_CHECKING:
    from longretriever.retrieve.interests import Contexts


class Numbers:
    """From the store's numbers to the model's, by id: the store may be of a later day than the model.

    item, category [store numbers] -> model numbers or -1; kind -> model codes or 0; `*_of_model` the inverse.
    """

    def __init__(self, store: Store, model: Model) -> None:
        self.same = model.manifest.made_from.get("store") == store.fingerprint
        self.item = matched(store.items[ITEM], model.items[ITEM])
        self.category = matched(store.category_ids.values, model.category_ids.values)
        self.item_of_model = inverse(self.item, model.n_items)
        self.category_of_model = inverse(self.category, len(model.category_ids))
        known = {kind: code for code, kind in enumerate(model.behaviors)}
        self.kind = np.array([known.get(kind, 0) for kind in store.behaviors] or [0], np.int64)
        self.profile = ProfileCodes(store, model.profile_fields)
        self._new_item, self._number_of = np.full(1, -1), model.item_ids.number_of

    def of(self, store: Store) -> Numbers:
        """The same for a store joined with live events, which may name items that only the model knows."""
        if not store.new_item_ids:
            return self
        numbers, found = copy(self), map(self._number_of, store.new_item_ids)
        numbers._new_item = np.array([-1 if number is None else number for number in found])
        return numbers

    def items(self, items: np.ndarray) -> np.ndarray:
        """Those that the model knows."""
        found = self._items(items)
        return found[found >= 0]

    def met(self, life: Life) -> Met:
        """What factors read of a life: items that the model knows, and how often each was met."""
        items, count = life.counts(READ, MOST)
        found = self._items(items)
        return Met(found[found >= 0], count[found >= 0])

    def _items(self, items: np.ndarray) -> np.ndarray:
        """Numbers of the model, -1 of what it does not know."""
        known, beyond = len(self.item), np.clip(items - len(self.item), 0, len(self._new_item) - 1)
        return np.where(items < known, self.item[np.minimum(items, known - 1)], self._new_item[beyond])

    def contexts(self, chosen: Contexts) -> Contexts:
        """Those that the model knows."""
        category = self.category[chosen.category]
        return replace(chosen, category=category).only(category >= 0)

    def known(self, b: Behaviors) -> Behaviors:
        """Those of a category that the model knows; of the others it can say nothing."""
        return b if self.same else b.pick(self.category[b.category] >= 0)

    def behaviors(self, b: Behaviors) -> Behaviors:
        """Known ones in the model's numbers; an item that the model has never seen is -1."""
        if self.same and b.item.max(initial=0) < len(self.item) and b.kind.max(initial=0) < len(self.kind):
            return b
        kind = np.where(b.kind < len(self.kind), self.kind[np.minimum(b.kind, len(self.kind) - 1)], 0)
        return Behaviors(self._items(b.item), self.category[b.category], b.time, kind)


class ProfileCodes:
    """From the store's codes of profile fields to a model's."""

    def __init__(self, store: Store, fields: Sequence[Vocabulary]) -> None:
        mine = {field.name: (i, field) for i, field in enumerate(store.profile_fields)}
        self._fields = [
            (mine[f.name][0], mine[f.name][1].codes_in(f)) if f.name in mine else None for f in fields
        ]

    def __call__(self, codes: np.ndarray) -> np.ndarray:
        """[P] from the store's [P']; 0 where the store lacks a field or the model a value."""
        return np.array(
            [0 if field is None else field[1][codes[field[0]]] for field in self._fields], np.int64
        )


def matched(ids: Any, among: Any) -> np.ndarray:
    """[len(ids)] where each id stands in `among`, -1 where it does not."""
    if ids.type != among.type:
        raise Mismatch(
            f"the store's ids are {ids.type}, the model's {among.type}. "
            "Ingest the log with ids of the same type."
        )
    found = pyarrow.compute.fill_null(pyarrow.compute.index_in(ids, value_set=among), -1).to_numpy()
    pyarrow.default_memory_pool().release_unused()  # a hash table of all ids, in each process that serves
    return found.astype(np.int64)


def inverse(numbers: np.ndarray, size: int) -> np.ndarray:
    """[size] where each of 0 .. size - 1 stands in `numbers`, -1 where it does not."""
    out = np.full(size, -1, np.int64)
    at = np.flatnonzero(numbers >= 0)
    out[numbers[at]] = at
    return out
