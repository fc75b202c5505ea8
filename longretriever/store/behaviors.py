"""The store: "the last L behaviors of user u in category c before time t" is a slice of an array.

Behaviors are sorted by (user, category, time), so a hard search is a binary search for the category
among the user's groups and one for the time inside the group; nothing is scanned or copied, and every
array is memory-mapped, so a store opens in milliseconds and its pages are shared between processes.

Numbers: users, categories and items are numbered 0.. by sorted id; items are sorted by (category, id),
so a category is a range of item numbers. An "event row" is a position in the `event_*` arrays.
"""

from __future__ import annotations

import bisect
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute
import pyarrow.ipc

from longretriever.errors import Damaged, UnknownCategory, UnknownItem, UnknownUser
from longretriever.events import CATEGORY, ITEM, SECONDS_PER_DAY, TITLE, USER
from longretriever.saved import Manifest, opening

FLOOR = 3_600
"""Seconds: a behavior counts as at least this old in Equation 3, so that the newest is not infinite."""


@dataclass(frozen=True)
class Vocabulary:
    """A categorical field: `values[code - 1]` is the value of `code`; code 0 is missing or unknown."""

    name: str
    values: tuple[Any, ...]

    @property
    def size(self) -> int:
        return len(self.values) + 1

    def codes_in(self, other: Vocabulary) -> np.ndarray:
        """[size] for each code here, the code of the same value in `other` (0 where it has none)."""
        known = {value: code for code, value in enumerate(other.values, start=1)}
        return np.array([0, *(known.get(value, 0) for value in self.values)], dtype=np.int32)


class Ids:
    """Sorted ids, kept in a memory-mapped Arrow file: number -> id by position, id -> number by bisection.

    A lookup costs about 20 reads of the file for a million ids (3 microseconds for integers, 40 for strings);
    nothing is held in memory.
    """

    def __init__(self, column: pa.ChunkedArray) -> None:
        self.values = column.combine_chunks() if column.num_chunks != 1 else column.chunk(0)

    def __len__(self) -> int:
        return len(self.values)

    @property
    def are_integers(self) -> bool:
        return bool(pa.types.is_integer(self.values.type))

    def number_of(self, key: int | str) -> int | None:
        """The number of an id, None when it is not here (or is of the other type)."""
        if isinstance(key, np.generic):
            key = key.item()
        if isinstance(key, bool) or isinstance(key, int) != self.are_integers:
            return None
        if isinstance(key, int):
            at = int(np.searchsorted(self._numbers, key)) if abs(key) < 1 << 63 else len(self)
        else:
            at = bisect.bisect_left(_Lazy(self.values), key)
        return at if at < len(self.values) and self.values[at].as_py() == key else None

    @cached_property
    def _numbers(self) -> np.ndarray:
        """Integer ids as an array over the same memory."""
        return self.values.to_numpy()

    def take(self, numbers: np.ndarray | Sequence[int]) -> list[Any]:
        return _taken(self.values, numbers)


class ItemIds:
    """Ids in order of item numbers, which is not their own order: id -> number through a sorted copy.

    The copy is made at the first look-up, in 0.5 s for a million ids.
    """

    def __init__(self, column: pa.ChunkedArray) -> None:
        self.column = column

    @cached_property
    def _sorted(self) -> tuple[np.ndarray, Ids]:
        order = pa.compute.sort_indices(self.column)
        return order.to_numpy(), Ids(self.column.take(order))

    def number_of(self, key: int | str) -> int | None:
        """The number of an id, None when it is not here (or is of the other type)."""
        order, ids = self._sorted
        number = ids.number_of(key)
        return None if number is None else int(order[number])

    def take(self, numbers: np.ndarray | Sequence[int]) -> list[Any]:
        return _taken(self.column, numbers)


def _taken(column: pa.Array | pa.ChunkedArray, numbers: np.ndarray | Sequence[int]) -> list[Any]:
    found = column.take(pa.array(np.asarray(numbers, dtype=np.int64)))
    if pa.types.is_integer(column.type):  # no ids are null; five times as fast
        return found.to_numpy().tolist()
    return found.to_pylist()


class _Lazy:
    """A sequence view that turns one Arrow value at a time into a Python value, for `bisect`."""

    def __init__(self, values: pa.Array) -> None:
        self.values = values

    def __len__(self) -> int:
        return len(self.values)

    def __getitem__(self, at: int) -> Any:
        return self.values[at].as_py()


class Store:
    """A folder written by `longretriever ingest`, opened read-only.

    E events, G groups (one for each user and category that met), U users, I items, C categories.

    event_item      [E] item numbers
    event_time      [E] seconds since the epoch, ascending within a group; equal times by item number
    event_behavior  [E] code of the kind of behavior in `behaviors`
    group_category  [G] ascending within a user
    group_start     [G+1] first event row of each group
    user_group      [U+1] first group of each user
    category_start  [C+1] first item number of each category
    category_group  [G] group numbers sorted by (category, user); ranges in `category_group_start` [C+1]
    time_order      [E] event rows of each user, sorted by (time, row), inside the user's own range of rows
    time_position   [E] where in `time_order` an event row stands
    profile         [U, P] codes of the profile fields;  `profile_fields` names them
    item_feature    [I, F] codes of the item features;  `item_fields` names them
    """

    new_item_ids: tuple[int | str, ...] = ()  # of items behind its own, where live events name some

    def __init__(self, manifest: Manifest) -> None:
        self.manifest = manifest
        self.path = manifest.path
        self.fingerprint = manifest.fingerprint
        load = manifest.load_array
        self.event_item = load("event_item")
        self.event_time = load("event_time")
        self.event_behavior = load("event_behavior")
        self.group_category = load("group_category")
        self.group_start = load("group_start")
        self.user_group = load("user_group")
        self.category_start = load("category_start")
        self.category_group = load("category_group")
        self.category_group_start = load("category_group_start")
        self.time_order = load("time_order")
        self.time_position = load("time_position")
        self.profile = load("profile")
        self.item_feature = load("item_feature")
        facts = manifest.facts
        self.behaviors: tuple[str, ...] = tuple(facts["behaviors"])
        self.profile_fields = vocabularies(facts["profile_fields"])
        self.item_fields = vocabularies(facts["item_fields"])
        self.first_time, self.last_time = facts["first_time"], facts["last_time"]
        self.user_ids = Ids(self._table("users")[USER])
        self.category_ids = Ids(self._table("categories")[CATEGORY])
        self.n_events, self.n_items = len(self.event_item), int(self.category_start[-1])
        self.n_users, self.n_categories = len(self.user_group) - 1, len(self.category_start) - 1

    @classmethod
    def open(cls, path: str | os.PathLike[str], verify: bool = False) -> Store:
        """Open a store folder; `verify=True` also hashes every file. Raises a `SavedError`."""
        return cls(opening(path, "store", verify))

    def _table(self, name: str) -> pa.Table:
        return read_arrow(self.path / f"{name}.arrow")

    @cached_property
    def items(self) -> pa.Table:
        """[I] item_id, and title where the log's owner gave one; the row is the item number."""
        return self._table("items")

    @cached_property
    def item_category(self) -> np.ndarray:
        """[I] the category number of each item."""
        return np.repeat(np.arange(self.n_categories, dtype=np.int32), np.diff(self.category_start))

    @cached_property
    def item_ids(self) -> ItemIds:
        return ItemIds(self.items[ITEM])

    def titles(self, items: np.ndarray) -> list[str | None]:
        """Of item numbers; None where the log's owner gave none."""
        return titles(self.items, items)

    # -- ids and numbers

    def user_number(self, user_id: int | str) -> int:
        number = self.user_ids.number_of(user_id)
        if number is None:
            raise UnknownUser(
                f"user {user_id!r} is not among the {self.n_users:,} users of {self.path} "
                f"(their ids are {_kind(self.user_ids)}, such as {self.user_ids.values[0].as_py()!r})."
            )
        return number

    def item_number(self, item_id: int | str) -> int:
        number = self.item_ids.number_of(item_id)
        if number is None:
            raise UnknownItem(
                f"item {item_id!r} is not among the {self.n_items:,} items of {self.path} "
                f"(such as {self.items[ITEM][0].as_py()!r})."
            )
        return number

    def category_number(self, category_id: int | str) -> int:
        number = self.category_ids.number_of(category_id)
        if number is None:
            raise UnknownCategory(
                f"category {category_id!r} is not among the {self.n_categories:,} categories of {self.path} "
                f"(their ids are {_kind(self.category_ids)}, "
                f"such as {self.category_ids.values[0].as_py()!r})."
            )
        return number

    # -- the questions of a request

    def life(self, user: int, now: float | None = None) -> Life:
        """The user's behaviors strictly before `now`; None is just after the store's last event."""
        return Life(self, user, self.last_time + 1 if now is None else now)

    def stands_for(self, user: int) -> int:
        """A number that is this user's alone, by which what is drawn for him differs from others'."""
        return user

    def rows_of(self, user: int) -> slice:
        """All event rows of a user, sorted by (category, time). O(1)."""
        first, last = self.user_group[user], self.user_group[user + 1]
        return slice(int(self.group_start[first]), int(self.group_start[last]))

    def in_context(self, user: int, category: int, before: float | None = None, limit: int = 50) -> slice:
        """Hard search: rows of the last `limit` behaviors in this category strictly before `before`.

        Oldest first; an empty slice where there are none. O(log groups + log events of the group).
        """
        first, last = int(self.user_group[user]), int(self.user_group[user + 1])
        group = first + int(np.searchsorted(self.group_category[first:last], category))
        if group == last or self.group_category[group] != category:
            return slice(0, 0)
        start, stop = int(self.group_start[group]), int(self.group_start[group + 1])
        if before is not None:
            stop = start + int(np.searchsorted(self.event_time[start:stop], before, side="left"))
        return slice(max(start, stop - limit), stop)

    def recent(self, user: int, before: float | None = None, limit: int = 20) -> np.ndarray:
        """[<= limit] rows of the last behaviors of any category strictly before `before`, oldest first."""
        rows = self.rows_of(user)
        stop = rows.stop if before is None else self.position(user, before)
        return np.asarray(self.time_order[max(rows.start, stop - limit) : stop])

    def position(self, user: int, time: float, after: bool = False) -> int:
        """Where in `time_order` the user's first event at `time` or later stands, or just after `time`.

        O(log events of the user).
        """
        rows, bisected = self.rows_of(user), bisect.bisect_right if after else bisect.bisect_left
        in_order = range(rows.start, rows.stop)
        return rows.start + bisected(in_order, time, key=lambda at: self.event_time[self.time_order[at]])

    def engagement(
        self, user: int, now: float | None = None, floor: float = FLOOR, since: float = -np.inf
    ) -> tuple[np.ndarray, np.ndarray]:
        """Equation 3 for every category that the user met before `now`.

        Returns category numbers and `Score_c = sum over b in c of 1 / t_b`, t_b the age of b in days, at
        least `floor` seconds. Behaviors at or after `now`, or before `since`, do not count; `now=None` is
        just after the store's last event. O(events of the user).
        """
        now = self.last_time + 1 if now is None else now
        first, last = int(self.user_group[user]), int(self.user_group[user + 1])
        rows = self.rows_of(user)
        if rows.stop == rows.start:
            return np.empty(0, np.int32), np.empty(0)
        age = np.subtract(now, self.event_time[rows], dtype=np.float64)
        future = age <= 0 if age.min() <= 0 else None  # a long life is read as few times as can be
        weight = np.maximum(age, floor)
        np.divide(SECONDS_PER_DAY, weight, out=weight)
        if future is not None:
            weight[future] = 0.0
        if since > -np.inf:
            weight[age > now - since] = 0.0
        score = np.add.reduceat(weight, self.group_start[first:last] - rows.start)
        met = score > 0
        return np.asarray(self.group_category[first:last])[met], score[met]


class Behaviors(NamedTuple):
    """Some behaviors of one user, oldest first; all four have the same length [n]."""

    item: np.ndarray  # item numbers
    category: np.ndarray  # category numbers
    time: np.ndarray  # seconds since the epoch, ascending
    kind: np.ndarray  # codes of the kind of behavior

    def pick(self, which: np.ndarray) -> Behaviors:
        """Those at these positions, or where this mask is set."""
        return Behaviors(*(column[which] for column in self))


@dataclass(frozen=True)
class Life:
    """What one user did strictly before `now` and not before `since`: all a request may know of him.

    Retrieval asks only a Life, so that no behavior at or after the request can slip in.
    """

    store: Store
    user: int
    now: float
    since: float = -np.inf
    is_all: bool = True  # False: live events could not be had

    def lately(self, behaviors: int | None) -> Life:
        """The last so many behaviors (and those of the same second as the first of them); None: all."""
        if behaviors is None:
            return self
        rows = self.store.recent(self.user, self.now, behaviors)
        since = float(self.store.event_time[rows[0]]) if len(rows) else -np.inf
        return replace(self, since=max(self.since, since))

    def engagement(self, floor: float = FLOOR) -> tuple[np.ndarray, np.ndarray]:
        """Categories met and their Equation 3 scores; see `Store.engagement`."""
        return self.store.engagement(self.user, self.now, floor, self.since)

    def in_context(self, category: int, limit: int = 50) -> Behaviors:
        """The last `limit` behaviors in this category, oldest first: `S_u(c)`."""
        return self._behaviors(self.store.in_context(self.user, category, self.now, limit))

    def recent(self, limit: int = 20) -> Behaviors:
        """The last `limit` behaviors of any category, oldest first."""
        return self._behaviors(self.store.recent(self.user, self.now, limit))

    def sampled(self, newest: int, older: int) -> Behaviors:
        """The `newest` last behaviors and `older` ones spread evenly over the rest, oldest first.

        O(events of the user) unless `older` is 0.
        """
        if older == 0:
            return self.recent(newest)
        rows = self.store.recent(self.user, self.now, self.store.n_events)
        rows = rows[self.store.event_time[rows] >= self.since]
        place, count = spread(np.array([len(rows)]), newest, older)
        return self._behaviors(rows[place[0, : count[0]][::-1]])

    def items(self) -> np.ndarray:
        """Sorted distinct items met, also before `since`. O(events of the user)."""
        rows = self.store.rows_of(self.user)
        return np.unique(self.store.event_item[rows][self.store.event_time[rows] < self.now])

    def counts(self, behaviors: int, most: int) -> tuple[np.ndarray, np.ndarray]:
        """[n] distinct items of the last so many behaviors, sorted, and how often each was met in them.

        Of more than `most` items, those met last. O(behaviors log behaviors), however long the life.
        """
        rows = self.store.recent(self.user, self.now, behaviors)[::-1]
        rows = rows[self.store.event_time[rows] >= self.since]
        item, newest, n = np.unique(self.store.event_item[rows], return_index=True, return_counts=True)
        kept = np.sort(np.argsort(newest)[:most])
        return item[kept], n[kept]

    def profile(self) -> np.ndarray:
        """[P] codes of the profile fields."""
        return np.asarray(self.store.profile[self.user])

    def _behaviors(self, rows: slice | np.ndarray) -> Behaviors:
        store = self.store
        item, time = store.event_item[rows], store.event_time[rows]
        found = Behaviors(item, store.item_category[item], time, store.event_behavior[rows])
        return found if self.since == -np.inf else found.pick(time >= self.since)


def spread(lived: np.ndarray, newest: int, older: int) -> tuple[np.ndarray, np.ndarray]:
    """Which behaviors of lives of these lengths [n] are looked at, and how many.

    Returns places in the life [n, newest + older], from 0, the oldest: the `newest` last, newest first, and
    then `older` of what is before them, evenly spread, newest first too; 0 pads. Lives of at most
    newest + older behaviors are looked at whole.
    """
    last = lived[:, None] - 1 - np.arange(newest)
    rest = np.maximum(lived - newest, 0)[:, None]
    taken = np.minimum(rest, older)
    nth = taken - 1 - np.arange(older)
    between = (2 * nth + 1) * rest // np.maximum(2 * taken, 1)
    place = np.concatenate([last, np.where(nth >= 0, between, -1)], axis=1)
    count = np.minimum(lived, newest) + taken[:, 0]
    if older:  # a short life leaves a gap between its newest and nothing older, but then all of it is there
        place = np.where(np.arange(newest + older) < count[:, None], place, -1)
    return np.maximum(place, 0), count


def read_arrow(file: Path) -> pa.Table:
    """A memory-mapped Arrow IPC file as a table."""
    try:
        return pa.ipc.open_file(pa.memory_map(str(file))).read_all()
    except pa.ArrowInvalid as error:
        raise Damaged(f"{file}: not an Arrow file ({error}). Restore it, or ingest the log again.") from error


def titles(items: pa.Table, numbers: np.ndarray) -> list[str | None]:
    """The titles of these rows of an items table, None where it has none."""
    if TITLE not in items.column_names:
        return [None] * len(numbers)
    return items[TITLE].take(pa.array(np.asarray(numbers, np.int64))).to_pylist()


def vocabularies(fields: list[dict[str, Any]]) -> tuple[Vocabulary, ...]:
    return tuple(Vocabulary(field["name"], tuple(field["values"])) for field in fields)


def _kind(ids: Ids) -> str:
    return "integers" if ids.are_integers else "strings"
