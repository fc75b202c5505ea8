"""A store and what has happened since, as one: the lives of some users, with live events in their places.

Nothing of the store is copied. Each of its arrays is stood in for by one that knows where the few live events
belong: what stands at position p is the k-th of them, or the store's own element p, less the live ones
before it. So `Joined` answers every question about lives by the code of `Store`, at the cost of a bisection
among the users' live events. Only a group that has live events is ever copied, and only its times. A live
event that the store has already (same user, item, time and kind) is left out.

n users, E events in the store, B live events of the n users.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import numpy as np
import pyarrow as pa

from longretriever.store.behaviors import Ids, ItemIds, Store


class LiveEvents(NamedTuple):
    """What one user did that the store does not know, in any order; all four have the same length."""

    item: np.ndarray  # item numbers of the store; `n_items` + j for the j-th of `New.item_ids`
    category: np.ndarray  # category numbers of the store
    time: np.ndarray  # seconds since the epoch
    kind: np.ndarray  # codes in the store's `behaviors`; on from there, in `New.behaviors`


@dataclass(frozen=True)
class New:
    """What live events name and the store does not know: items of its categories, kinds of behavior."""

    item_ids: tuple[Any, ...] = ()
    item_category: tuple[int, ...] = ()  # category numbers of the store
    behaviors: tuple[str, ...] = ()


class Joined(Store):
    """Lives of some users out of a store and live events; users are numbered as they are given.

    Of the arrays of `Store`, those of lives are here (the event, group, user and time arrays and `profile`),
    as far as `life` and `histories` ask. `users` are numbers of the store, None for a user it does not know.
    """

    def __init__(
        self,
        store: Store,
        users: Sequence[int | None],
        user_ids: Sequence[int | str],
        live: Sequence[LiveEvents],
        new: New = New(),
    ) -> None:
        self.manifest, self.path, self.fingerprint = store.manifest, store.path, store.fingerprint
        self.behaviors = (*store.behaviors, *new.behaviors)
        self.profile_fields, self.item_fields = store.profile_fields, store.item_fields
        self.category_start, self.category_ids = store.category_start, store.category_ids
        self.n_users, self.n_categories = len(users), store.n_categories
        self.n_items = store.n_items + len(new.item_ids)
        self.user_ids = Ids(pa.chunked_array([pa.array(list(user_ids), store.user_ids.values.type)]))
        self.item_category = _array(_Extended(store.item_category, np.array(new.item_category, np.int32)))
        self.profile = np.stack(
            [np.zeros(len(store.profile_fields), np.int32) if u is None else store.profile[u] for u in users]
        )
        newest = [int(one.time.max()) for one in live if len(one.time)]
        self.first_time, self.last_time = store.first_time, max([int(store.last_time), *newest])
        self._store, self._users, self._new = store, users, new
        self.new_item_ids = new.item_ids
        self._arrange(store, users, live)

    def _arrange(self, store: Store, users: Sequence[int | None], live: Sequence[LiveEvents]) -> None:
        """Find where live events belong among the rows of their users, and in the order of their lives."""
        parts = [_Part.of(store, user, events) for user, events in zip(users, live, strict=True)]
        stored = np.array([part.stop - part.start for part in parts], np.int64)
        added = np.array([len(part.by_row.time) for part in parts], np.int64)
        begin = np.array([part.start for part in parts], np.int64)
        by_row = _Places(begin, stored, added, [part.row_place for part in parts])
        by_time = _Places(begin, stored, added, [part.time_place for part in parts])
        self.n_events = int(by_row.start[-1])
        self._live_times = [part.by_row.time[part.in_time] for part in parts]
        columns = [np.concatenate(column) for column in zip(*(part.by_row for part in parts), strict=True)]
        item, _, time, kind = columns
        self.event_item = _array(_Merged(store.event_item, item, by_row))
        self.event_time = _array(_Merged(store.event_time, time, by_row))
        self.event_behavior = _array(_Merged(store.event_behavior, kind, by_row))
        in_time = np.concatenate([part.in_time + n for part, n in zip(parts, by_row.first, strict=False)])
        self.time_order = _array(_Renumbered(store.time_order, by_row.at[in_time], by_time, by_row))
        time_place = np.empty(len(in_time), np.int64)
        time_place[in_time] = by_time.at
        self.time_position = _array(_Renumbered(store.time_position, time_place, by_row, by_time))
        self.group_category = np.concatenate([part.category for part in parts])
        self.group_start = np.concatenate([[0], np.cumsum(np.concatenate([part.size for part in parts]))])
        self.user_group = np.concatenate([[0], np.cumsum([len(part.category) for part in parts])])

    def stands_for(self, user: int) -> int:
        """The store's own number; of a user that it does not know, one made of his id."""
        known = self._users[user]
        return zlib.crc32(repr(self.user_ids.take([user])[0]).encode()) if known is None else known

    def position(self, user: int, time: float, after: bool = False) -> int:
        """See `Store.position`; of stored events and of live ones by themselves, as it is asked often."""
        known, stored = self._users[user], 0
        if known is not None:
            stored = self._store.position(known, time, after) - self._store.rows_of(known).start
        live = np.searchsorted(self._live_times[user], time, side="right" if after else "left")
        return self.rows_of(user).start + stored + int(live)

    @property
    def item_ids(self) -> ItemIds:
        return _AlsoNew(self._store.item_ids, self._store.n_items, self._new.item_ids)

    def titles(self, items: np.ndarray) -> list[str | None]:
        """Of items of the store; None for new ones."""
        items = np.asarray(items, np.int64)
        known = items < self._store.n_items
        found = iter(self._store.titles(items[known]))
        return [next(found) if one else None for one in known]


class _Part(NamedTuple):
    """One user's live events, sorted both ways, and where they belong among what the store has of him.

    A place counts the user's stored events before it.
    """

    start: int  # rows of the store
    stop: int
    by_row: LiveEvents  # sorted by (category, time), as rows are
    row_place: np.ndarray  # [B] ascending
    in_time: np.ndarray  # [B] which of `by_row`, sorted by time
    time_place: np.ndarray  # [B] ascending
    category: np.ndarray  # of the user's groups, stored and new, ascending
    size: np.ndarray  # of the same

    @classmethod
    def of(cls, store: Store, user: int | None, live: LiveEvents) -> _Part:
        live = LiveEvents(*(np.asarray(column)[np.lexsort((live.time, live.category))] for column in live))
        if user is None:
            none = np.zeros(len(live.time), np.int64)
            category, size = np.unique(live.category, return_counts=True)
            return cls(0, 0, live, none, _in_time(live), none, category, size)
        first, last = int(store.user_group[user]), int(store.user_group[user + 1])
        rows = store.rows_of(user)
        met, starts = store.group_category[first:last], store.group_start[first : last + 1]
        row_place = np.empty(len(live.time), np.int64)
        fresh = np.ones(len(live.time), bool)
        group = np.searchsorted(met, live.category)
        for i, (g, time) in enumerate(zip(group, live.time, strict=True)):
            low = high = int(starts[g])
            if g < len(met) and met[g] == live.category[i]:
                high = int(starts[g + 1])
            if high == low or time > store.event_time[high - 1]:  # as most are: newer than all
                row_place[i] = high - rows.start
                continue
            at, behind = low + np.searchsorted(store.event_time[low:high], [time, time + 1])
            row_place[i] = behind - rows.start
            same = store.event_item[at:behind] == live.item[i]
            fresh[i] = not (same & (store.event_behavior[at:behind] == live.kind[i])).any()
        live, row_place = LiveEvents(*(column[fresh] for column in live)), row_place[fresh]
        in_time = _in_time(live)
        newest = store.event_time[store.time_order[rows.stop - 1]]
        places = [
            rows.stop if time >= newest else store.position(user, time, after=True)
            for time in live.time[in_time]
        ]
        time_place = np.array(places, np.int64)
        category, which = np.unique(np.concatenate([met, live.category]), return_inverse=True)
        size = np.bincount(which, np.concatenate([np.diff(starts), np.ones(len(live.time))])).astype(np.int64)
        return cls(rows.start, rows.stop, live, row_place, in_time, time_place - rows.start, category, size)


def _in_time(live: LiveEvents) -> np.ndarray:
    return np.lexsort((live.item, live.category, live.time))


class _Places:
    """Where, in an order of all events of n users, the live ones stand, and the stored ones of the others.

    start  [n+1] the first position of each user
    first  [n+1] how many live events the users before have
    at     [B] positions of live events, ascending
    """

    def __init__(
        self, begin: np.ndarray, stored: np.ndarray, added: np.ndarray, places: Sequence[np.ndarray]
    ) -> None:
        self.begin = begin
        self.start = np.concatenate([[0], np.cumsum(stored + added)])
        self.first = np.concatenate([[0], np.cumsum(added)])
        self.before = np.concatenate([[0], np.cumsum(stored)])
        owner = np.repeat(np.arange(len(begin)), added)
        place = np.concatenate([np.empty(0, np.int64), *places])
        self.at = self.start[owner] + place + np.arange(len(place)) - self.first[owner]
        self._key = self.before[owner] + place

    def user(self, position: np.ndarray) -> np.ndarray:
        return np.searchsorted(self.start, position, side="right") - 1

    def find(self, position: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Of each position: is it live; which live event; which of the store's; whose."""
        nth = np.searchsorted(self.at, position)
        user = self.user(position)
        stored = self.begin[user] + position - self.start[user] - (nth - self.first[user])
        live = np.zeros(np.shape(position), bool)
        if len(self.at):
            nth = np.minimum(nth, len(self.at) - 1)
            live = self.at[nth] == position
        return live, nth, stored, user

    def of_stored(self, stored: np.ndarray, user: np.ndarray) -> np.ndarray:
        """The positions of the store's events of these users."""
        nth = stored - self.begin[user]
        before = np.searchsorted(self._key, self.before[user] + nth, side="right") - self.first[user]
        return self.start[user] + nth + before


class _Merged:
    """An array of the store with those of live events in their places; by number, slice or array of them."""

    def __init__(self, stored: np.ndarray, live: np.ndarray, places: _Places) -> None:
        self._stored, self._live, self._places = stored, live, places

    def __len__(self) -> int:
        return int(self._places.start[-1])

    def __getitem__(self, at: Any) -> Any:
        if isinstance(at, slice):
            return self._slice(*at.indices(len(self))[:2])
        live, nth, stored, user = self._places.find(np.asarray(at))
        if not len(self._stored):
            return self._live[nth]
        found = self._read(self._stored[np.clip(stored, 0, len(self._stored) - 1)], user)
        return np.where(live, self._live[nth], found) if len(self._live) else found

    def _slice(self, start: int, stop: int) -> np.ndarray:
        p = self._places
        if stop <= start:
            return self._stored[:0]
        user = int(p.user(np.asarray(start)))
        if stop > p.start[user + 1]:
            return np.asarray(self[np.arange(start, stop)])
        low, high = np.searchsorted(p.at, [start, stop])
        first = int(p.begin[user] + start - p.start[user] - (low - p.first[user]))
        stored = self._stored[first : first + stop - start - int(high - low)]
        stored = self._read(stored, np.full(len(stored), user))
        if low == high:
            return stored
        stored = stored.astype(self._live.dtype, copy=False)  # a new kind may be beyond 255
        return np.insert(stored, p.at[low:high] - start - np.arange(high - low), self._live[low:high])

    def _read(self, stored: np.ndarray, user: np.ndarray) -> np.ndarray:
        return stored


class _Renumbered(_Merged):
    """The same where elements are positions themselves, in another order of the same events."""

    def __init__(self, stored: np.ndarray, live: np.ndarray, places: _Places, others: _Places) -> None:
        super().__init__(stored, live, places)
        self._others = others

    def _read(self, stored: np.ndarray, user: np.ndarray) -> np.ndarray:
        return self._others.of_stored(np.asarray(stored, np.int64), user)


def _array(stands_in: _Merged | _Extended) -> np.ndarray:
    """For the type checker: what stands in for an array is asked like one."""
    return cast(np.ndarray, stands_in)


class _Extended:
    """An array and what comes behind it, by number or array of them."""

    def __init__(self, array: np.ndarray, behind: np.ndarray) -> None:
        self._array, self._behind = array, behind

    def __getitem__(self, at: Any) -> Any:
        if not len(self._behind):
            return self._array[at]
        n, at = len(self._array), np.asarray(at)
        found = self._array[np.minimum(at, n - 1)]
        return np.where(at < n, found, self._behind[np.maximum(at - n, 0)])


class _AlsoNew(ItemIds):
    """The ids of a store's items and, behind them, of new ones."""

    def __init__(self, stored: ItemIds, n_items: int, new: tuple[Any, ...]) -> None:
        super().__init__(stored.column)
        self._stored, self._n_items, self._new = stored, n_items, new

    def number_of(self, key: int | str) -> int | None:
        found = self._stored.number_of(key)
        if found is None and key in self._new:
            return self._n_items + self._new.index(key)
        return found

    def take(self, numbers: np.ndarray | Sequence[int]) -> list[Any]:
        numbers = np.asarray(numbers, np.int64)
        known = numbers < self._n_items
        found = iter(self._stored.take(numbers[known]))
        return [
            next(found) if one else self._new[n - self._n_items]
            for n, one in zip(numbers, known, strict=True)
        ]
