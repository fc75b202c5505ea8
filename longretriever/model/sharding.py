"""Who learns from what, and who keeps which item rows? N shards of about as much work, on any processes.

Where batches are of one category, a shard is a set of categories: their samples, and the rows of their
items, which no other shard then needs. A category that holds more than a shard's share is split: each piece
has some of its users, and a range of its items, whose rows the other pieces ask for. Where items of all
categories meet in a batch, a shard is a range of users, and for the rows a range of items.

The plan depends on the store, the configuration and N alone, so a training that was killed goes on with its
shards on more or fewer processes. Work is counted, not categories: a sample costs its way through the
towers and a score for each item that competes, a batch also the vectors of those items.

N shards, C categories, R ranges of item numbers.
"""

from __future__ import annotations

import hashlib
import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Protocol

import numpy as np

from longretriever.errors import InputError
from longretriever.model.batches import Batches, Cost
from longretriever.store.behaviors import Store

if TYPE_CHECKING:
    from longretriever.model.exchange import Wire

_EVEN = 1.1  # the fullest shard may have so many times the mean before a category is split
_OF_SAMPLE = 20  # scores of an item as dear as a sample's way through the towers, for each unit of width
_OF_VECTOR = 40  # the same, of making one item's vector and updating its row
_FINE = 1_000_000  # samples are summed as whole millionths, which come to the same in any order
_CHUNK = 1 << 20  # lines counted at once


class ByUser(Protocol):
    """Samples of which a shard is a range of users."""

    def expected_of_users(self) -> np.ndarray: ...  # [U]


@dataclass(frozen=True)
class Piece:
    """A category, or one of several parts of it."""

    category: int
    nth: int
    of: int
    shard: int


@dataclass(frozen=True)
class Plan:
    """What each shard learns from, and whose each item row is.

    start    [R + 1] where ranges of item numbers begin, ascending, and the number of items
    owner    [R] the shard that keeps the rows of each range
    samples  [N] of an epoch, expected
    work     [N] the same in what they cost, in scores of an item
    pieces   of categories, where a shard is a set of those
    users    [N + 1] where each shard's users begin, where it is a range of those
    mine     shards of this process, ascending
    """

    start: np.ndarray
    owner: np.ndarray
    samples: np.ndarray
    work: np.ndarray
    pieces: tuple[Piece, ...]
    users: np.ndarray | None
    mine: tuple[int, ...]

    @property
    def shards(self) -> int:
        return len(self.samples)

    @property
    def digest(self) -> str:
        """The same for the same plan, whatever process asks."""
        cuts = np.zeros(0) if self.users is None else self.users
        told = (self.start, self.owner, self.samples, cuts)
        return hashlib.sha256(b"".join(x.astype(np.int64).tobytes() for x in told)).hexdigest()[:16]

    def process_of(self, numbers: np.ndarray, world: int) -> np.ndarray:
        """Which process keeps the rows of these items."""
        return process_of(self.owner[self._range(numbers)], self.shards, world)

    def place(self, numbers: np.ndarray) -> np.ndarray:
        """Where, among the rows of this process, those of these items of its own are."""
        return numbers + self._shift[self._range(numbers)]

    def ranges(self, shard: int) -> list[slice]:
        """Of items, ascending: their rows stand in this order, after those of shards before."""
        of = np.flatnonzero(self.owner == shard)
        return [slice(int(self.start[r]), int(self.start[r + 1])) for r in of]

    def _range(self, numbers: np.ndarray) -> np.ndarray:
        return np.searchsorted(self.start, numbers, side="right") - 1

    @cached_property
    def _shift(self) -> np.ndarray:
        """[R] from an item number to its place here."""
        size, found, at = np.diff(self.start), np.zeros(len(self.owner), np.int64), 0
        for shard in self.mine:
            for r in np.flatnonzero(self.owner == shard):
                found[r], at = at - self.start[r], at + size[r]
        return found


def process_of(shard: np.ndarray, shards: int, world: int) -> np.ndarray:
    """Shards lie on processes in their order, as many on each as can be."""
    return shard * min(world, shards) // shards


def plan_of(lessons: Batches | ByUser, store: Store, shards: int, dim: int, wire: Wire) -> Plan:
    """Share the samples and the item rows of a training out. Each process counts a part of the lines."""
    if shards > store.n_users:
        raise InputError(f"shards={shards}: more than the {store.n_users:,} users of the store. Take fewer.")
    mine = np.flatnonzero(process_of(np.arange(shards), shards, wire.world) == wire.rank)
    if isinstance(lessons, Batches) and lessons.by_category:
        return _by_category(lessons, store, shards, dim, wire, mine)
    return _by_user(lessons, store, shards, mine)


# -- shards of users


def _by_user(lessons: ByUser, store: Store, shards: int, mine: np.ndarray) -> Plan:
    expected = np.r_[0, np.cumsum(np.rint(lessons.expected_of_users() * _FINE).astype(np.int64))]
    users = np.searchsorted(expected, expected[-1] * np.arange(1, shards) // shards)
    users = np.r_[0, users, store.n_users]
    samples = np.diff(expected[users]) / _FINE
    start = store.n_items * np.arange(shards + 1) // shards
    return Plan(start, np.arange(shards), samples, samples, (), users, _ints(mine))


# -- shards of categories


def _by_category(lessons: Batches, store: Store, shards: int, dim: int, wire: Wire, mine: np.ndarray) -> Plan:
    samples_C, lines_C = _counted(lessons, store, wire)
    costs = category_costs(lessons, dim)
    s = lessons.sampling
    steps = max(1.0, samples_C.sum() / s.samples)
    # a buffer is released when full, or some times an epoch; never more often than lines come into it
    batches_C = np.maximum(samples_C / s.samples * shards, np.minimum(lines_C, steps / s.max_wait))
    work_C = samples_C * costs.of_sample + batches_C * costs.of_batch
    pieces = allot(work_C, lines_C, shards)
    samples, work = np.zeros(shards), np.zeros(shards)
    for p in pieces:
        samples[p.shard] += samples_C[p.category] / p.of
        work[p.shard] += work_C[p.category] / p.of
    start, owner = _item_ranges(pieces, store)
    return Plan(start, owner, samples, work, pieces, None, _ints(mine))


def category_costs(lessons: Batches, dim: int) -> Cost:
    """What a sample and a batch of each category cost, in scores of an item; without a budget."""
    s = lessons.sampling
    items_C = np.diff(lessons.store.category_start).astype(np.int64)
    width_C = np.where(
        items_C <= s.whole_up_to, items_C, np.minimum(items_C, s.sampled_negatives + s.samples)
    )
    return Cost(float("inf"), _OF_SAMPLE * dim + width_C.astype(float), _OF_VECTOR * width_C.astype(float))


def _counted(lessons: Batches, store: Store, wire: Wire) -> tuple[np.ndarray, np.ndarray]:
    """[C] expected samples of an epoch, and lines that have some."""
    n_lines, total = len(lessons.lines.start) - 1, np.zeros((2, store.n_categories), np.int64)
    for at in range(wire.rank * _CHUNK, n_lines, wire.world * _CHUNK):
        rows = lessons.rows(np.arange(at, min(at + _CHUNK, n_lines)), None)
        category = store.group_category[rows.group]
        fine = np.rint(lessons.expected(rows) * _FINE)
        total[0] += np.bincount(category, fine, store.n_categories).astype(np.int64)
        some = store.group_category[np.unique(rows.group)]
        total[1] += np.bincount(some, minlength=store.n_categories)
    total = wire.total(total)
    return total[0] / _FINE, total[1]


def allot(work_C: np.ndarray, lines_C: np.ndarray, shards: int) -> tuple[Piece, ...]:
    """Share categories out, the dearest first, each to the shard that has least.

    If the fullest shard then has over `_EVEN` times the mean, its dearest category is cut into one piece
    more, and all are shared out anew; not into more pieces than it has lines.
    """
    of_C = np.minimum(np.maximum(1, work_C * shards // max(work_C.sum(), 1e-9)), np.maximum(1, lines_C))
    of_C = np.minimum(of_C.astype(np.int64), shards)
    while True:
        pieces, load = _dealt(work_C, of_C, shards)
        if shards == 1 or load.max() <= _EVEN * load.mean():
            return pieces
        on_fullest = {p.category for p in pieces if p.shard == load.argmax()}
        cut = [c for c in on_fullest if of_C[c] < min(shards, lines_C[c])]
        if not cut:
            return pieces
        of_C[max(cut, key=lambda c: (work_C[c] / of_C[c], c))] += 1


def _dealt(work_C: np.ndarray, of_C: np.ndarray, shards: int) -> tuple[tuple[Piece, ...], np.ndarray]:
    """Pieces with their shards, by category; and what each shard has to do."""
    category = np.repeat(np.arange(len(of_C)), of_C)
    nth = np.arange(len(category)) - np.repeat(np.cumsum(of_C) - of_C, of_C)
    each = (work_C / of_C)[category]
    least = [(0.0, s) for s in range(shards)]
    shard, load = np.zeros(len(category), np.int64), np.zeros(shards)
    for i in np.argsort(-each, kind="stable"):
        has, s = heapq.heappop(least)
        shard[i], load[s] = s, has + each[i]
        heapq.heappush(least, (load[s], s))
    columns = zip(category.tolist(), nth.tolist(), of_C[category].tolist(), shard.tolist(), strict=True)
    return tuple(Piece(*column) for column in columns), load


def _item_ranges(pieces: Sequence[Piece], store: Store) -> tuple[np.ndarray, np.ndarray]:
    """[R + 1] and [R]: ranges of item numbers and their shards; neighbours of one shard are one range."""
    low, high = store.category_start[:-1].astype(np.int64), store.category_start[1:].astype(np.int64)
    start: list[int] = []
    owner: list[int] = []
    for p in pieces:
        at = low[p.category] + (high - low)[p.category] * p.nth // p.of
        if not owner or owner[-1] != p.shard:
            start.append(int(at))
            owner.append(p.shard)
    return np.array([*start, store.n_items]), np.array(owner)


# -- what a shard learns from


def shard_of(lessons: Batches, plan: Plan, nth: int, dim: int) -> Batches:
    """The samples of a shard, in steps of as much work as those of the others."""
    store, s = lessons.store, lessons.sampling
    steps = max(1.0, plan.samples.sum() / s.samples)
    if plan.users is not None:
        a, b = int(plan.users[nth]), int(plan.users[nth + 1])
        if lessons.lines.order is None:
            a, b = int(store.user_group[a]), int(store.user_group[b])
        lines, of_sample, of_batch = (
            np.arange(a, b),
            np.ones(store.n_categories),
            np.zeros(store.n_categories),
        )
    else:
        lines = _lines(lessons, plan, nth)
        _, of_sample, of_batch = category_costs(lessons, dim)
    samples = max(1, round(s.samples * plan.samples[nth] / max(plan.samples.sum(), 1e-9)))
    return lessons.shard(nth, lines, samples, Cost(plan.work[nth] / steps, of_sample, of_batch))


def _lines(lessons: Batches, plan: Plan, nth: int) -> np.ndarray:
    """Ascending: the lines of a shard's categories; of a category that is split, those of its pieces."""
    store = lessons.store
    mine = [p for p in plan.pieces if p.shard == nth]
    whole = np.zeros(store.n_categories, bool)
    whole[[p.category for p in mine if p.of == 1]] = True
    found = [_where(store.group_category, whole)]
    for category in {p.category for p in mine if p.of > 1}:
        one = np.zeros(store.n_categories, bool)
        one[category] = True
        lines = _where(store.group_category, one)
        rows = lessons.rows(lines, None)
        each = np.bincount(np.searchsorted(lines, rows.group), lessons.expected(rows), len(lines))
        total = (
            np.cumsum(each) - each / 2
        )  # by the middle of a line, so that all that have none are somewhere
        for p in (p for p in mine if p.category == category):
            bounds = np.array([p.nth, p.nth + 1]) / p.of * each.sum()
            a, b = np.searchsorted(total, bounds)
            found.append(lines[0 if p.nth == 0 else a : len(lines) if p.nth + 1 == p.of else b])
    return np.sort(np.concatenate(found))


def _where(category: np.ndarray, wanted_C: np.ndarray) -> np.ndarray:
    """Positions of wanted categories, without a mask as long as the store."""
    parts = [
        at + np.flatnonzero(wanted_C[category[at : at + _CHUNK]]) for at in range(0, len(category), _CHUNK)
    ]
    return np.concatenate([np.zeros(0, np.int64), *parts])


def _ints(x: np.ndarray) -> tuple[int, ...]:
    return tuple(x.tolist())
