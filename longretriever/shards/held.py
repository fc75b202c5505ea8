"""What one shard holds: the items of some ranges of categories, searched as the whole index would.

A category is a range of items, so a shard is some ranges of an index: it opens the index folder that all
have, memory-mapped, and touches the pages of its own categories only. It needs neither store nor user tower
nor item ids. The model before the newest is kept as well, for routers that have not gone over yet.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from longretriever.errors import InputError, Mismatch, NotLoaded, SavedError
from longretriever.index import CORPUS, Index
from longretriever.saved import stamp
from longretriever.shards import wire
from longretriever.shards.wire import Found, Holding, Range, Search

INDEXES = ("index", "whole/index")
"""In the folder of a model: of its contexts, and of what it brings to search all items."""


@dataclass(frozen=True)
class Share:
    """Which categories a shard holds: the i-th of n shares of about as many items each, or named ranges."""

    shard: tuple[int, int] | None = None  # i from 1, n
    categories: tuple[Range, ...] = ()

    def __post_init__(self) -> None:
        if (self.shard is None) == (not self.categories):
            raise InputError("a shard holds --shard I/N, or --categories FIRST:END: give one of the two.")
        if self.shard is not None and not 1 <= self.shard[0] <= self.shard[1]:
            raise InputError(f"--shard {self.shard[0]}/{self.shard[1]}: expected I/N, I from 1 to N, as 1/3.")
        for first, end in self.categories:
            if not 0 <= first < end:
                raise InputError(f"--categories {first}:{end}: expected FIRST:END, as 0:2500.")

    def ranges(self, category_start: np.ndarray) -> list[Range]:
        """Of category numbers, ascending and apart. Raises `InputError` for what the index does not have."""
        n = len(category_start) - 1
        if self.shard is not None:
            first, end = cuts(np.diff(category_start), self.shard[1])[self.shard[0] - 1 : self.shard[0] + 1]
            return [(int(first), int(end))] if first < end else []
        if max(end for _, end in self.categories) > n:
            raise InputError(f"--categories {self.categories[-1][1]}: the index has categories 0 to {n - 1}.")
        held = np.zeros(n + 2, np.int8)
        for first, end in self.categories:
            held[first + 1 : end + 1] = 1
        edges = np.flatnonzero(np.diff(held))
        return [(int(first), int(end)) for first, end in edges.reshape(-1, 2)]


def cuts(work_C: np.ndarray, n: int) -> np.ndarray:
    """[n + 1] first categories of n ranges of about equal work, 0 to C; a range may be empty."""
    upto = np.append(0, np.cumsum(work_C, dtype=np.float64))
    at = np.searchsorted(upto, upto[-1] * np.arange(1, n) / n)
    nearer = np.maximum(at - 1, 0)
    goal = upto[-1] * np.arange(1, n) / n
    at = np.where(goal - upto[nearer] < upto[np.minimum(at, len(upto) - 1)] - goal, nearer, at)
    return np.concatenate([[0], np.maximum.accumulate(at), [len(work_C)]]).astype(np.int64)


@dataclass(frozen=True)
class Held:
    """One index and the ranges of it that are answered for."""

    index: Index
    ranges: list[Range]

    @property
    def holding(self) -> Holding:
        start = self.index.category_start
        items = sum(int(start[end] - start[first]) for first, end in self.ranges)
        model = self.index.manifest.made_from["model"]
        return Holding(model, self.ranges, self.index.n_categories, items, self.index.dimension)

    def search(self, asked: Search) -> Found:
        """Raises `InputError`, and `NotLoaded` where categories are asked for that are not held."""
        user_ND, context_N, scale_N = wire.rows_of(asked, self.index.dimension)
        whole_N = context_N == CORPUS
        if (whole_N[:-1] & ~whole_N[1:]).any():
            raise InputError("context: -1 stands before a category, expected those of all items last.")
        self._check_held(context_N[~whole_N], asked.ranges)
        if asked.k < 0 or asked.head < 1 or any(not 0 <= c < self.index.n_categories for c in asked.without):
            raise InputError(
                f"k={asked.k}, head={asked.head}, without={asked.without}: expected 0 or more, 1 or more, "
                "and categories."
            )
        near = part = None
        if not whole_N.all():
            rows = user_ND[~whole_N], context_N[~whole_N]
            near = self.index.nearest(*rows, self._at_most(asked.k, rows[1]), scale_N[~whole_N], asked.head)
        if whole_N.any():
            ranges = [range(*one) for one in asked.ranges]
            held = sum(int(np.diff(self.index.category_start[[r.start, r.stop]])[0]) for r in ranges)
            part = self.index.search_part(
                user_ND[whole_N],
                min(asked.k, max(1, held)),
                scale_N[whole_N],
                ranges,
                asked.without,
                asked.look_at_all,
            )
        return wire.found_of(near, part)

    def _at_most(self, k: int, context: np.ndarray) -> int:
        """No more than the largest of these categories has: who asks for more asks for padding."""
        return min(k, max(1, int(np.diff(self.index.category_start)[context].max(initial=1))))

    def _check_held(self, context: np.ndarray, ranges: Sequence[Range]) -> None:
        mine = np.array(self.ranges, np.int64).reshape(-1, 2)
        for one in ranges:
            if not 0 <= one[0] < one[1] or not ((mine[:, 0] <= one[0]) & (one[1] <= mine[:, 1])).any():
                raise NotLoaded(f"categories {one[0]} to {one[1] - 1} are not all held here: {self._said()}.")
        held = ((mine[:, 0] <= context[:, None]) & (context[:, None] < mine[:, 1])).any(axis=1)
        if not held.all():
            raise NotLoaded(f"category {context[~held][0]} is not held here: {self._said()}.")

    def _said(self) -> str:
        return ", ".join(f"{first}:{end}" for first, end in self.ranges) or "nothing is"


class Shard:
    """One generation of what a shard serves. Safe to share between threads."""

    def __init__(self, model: Path, share: Share, before: Shard | None = None) -> None:
        """Open the indexes of a model folder and search each once. `before` is answered for as well.

        Raises a `SavedError`, `InputError`.
        """
        self.signature = signature(model)
        held = [_open(model / one, share) for one in INDEXES if one == INDEXES[0] or (model / one).exists()]
        self.own = {one.holding.model: one for one in held}
        self.held = {**(before.own if before is not None else {}), **self.own}
        self.loaded = time.time()
        self.name = f"shard-{next(iter(self.own))[:12]}"
        if signature(model) != self.signature:
            raise Mismatch(f"{model} was replaced while it was being opened. It will be tried again.")

    @property
    def facts(self) -> wire.Facts:
        return wire.Facts([self.held[model].holding for model in [*self.own, *(self.held.keys() - self.own)]])

    @property
    def items(self) -> int:
        """Of the newest model's contexts."""
        return next(iter(self.own.values())).holding.items

    def search(self, asked: Search) -> Found:
        """Raises `NotLoaded` for a model or categories that are not held, `InputError`."""
        held = self.held.get(asked.model)
        if held is None:
            models = ", ".join(one[:12] for one in self.held)
            raise NotLoaded(f"model {asked.model[:12]} is not held here, but {models}.")
        return held.search(asked)


def signature(model: Path) -> tuple[Any, ...]:
    """Changes whenever an index of the model is replaced."""
    return tuple(stamp(model.resolve() / one) for one in INDEXES)


def _open(path: Path, share: Share) -> Held:
    index = Index.open(path)
    if index.n_items > wire.MOST_ITEMS:
        raise SavedError(f"{path}: {index.n_items:,} items, expected at most {wire.MOST_ITEMS:,}.")
    held = Held(index, share.ranges(index.category_start))
    for first, _ in held.ranges[:1]:  # what cannot be searched is to be found here
        index.search(np.eye(1, index.dimension, dtype=np.float32), np.array([first]), 1)
    return held
