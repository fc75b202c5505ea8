"""What has a user done in each category, and how long ago? The numbers by which a next category is foreseen.

Of every category that a user met: how often, and how long ago the 1st, 2nd, 4th, ... 32nd last behavior in it
was, in time and in behaviors of any category. A handful of look-ups in the store for each category, however
long the life: nothing is summed over behaviors. The same in training and in serving.

n requests, P categories of a request, R recent behaviors, F features.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from longretriever.model.age import age_class
from longretriever.model.batches import first_not_before
from longretriever.store.behaviors import Store

LAST = np.array([1, 2, 4, 8, 16, 32])
"""Which behaviors of a category, counted from the last, are looked at."""

FEATURES = 1 + 3 * len(LAST)
"""Of a category: log of the count; of each in `LAST` whether it is there, log age, log behaviors ago."""

GENERAL = 2
"""Of a user: log of all behaviors, log age of the last."""


@dataclass(frozen=True)
class Histories:
    """n users at a moment each.

    category  [n, P] categories met, the lately met first; -1 pads
    feature   [n, P, F] see `FEATURES`; all about 0 to 1
    recent    [n, R] categories of the last behaviors, newest first; -1 pads
    age       [n, R] age classes of the same, 0 pads
    general   [n, 2] see `GENERAL`
    """

    category: np.ndarray
    feature: np.ndarray
    recent: np.ndarray
    age: np.ndarray
    general: np.ndarray


def histories(
    store: Store,
    user: np.ndarray,
    now: np.ndarray,
    *,
    categories: int,
    recent: int,
    since: np.ndarray | None = None,
) -> Histories:
    """What these users did strictly before `now` [n] (and not before `since` [n]), in seconds.

    Of users of more than `categories` categories, those met last. O(categories met * log behaviors) each.
    """
    n = len(user)
    first, last = store.user_group[user].astype(np.int64), store.user_group[user + 1].astype(np.int64)
    owner = np.repeat(np.arange(n), last - first)
    group = np.arange(len(owner)) - np.repeat(np.cumsum(last - first) - (last - first), last - first)
    group += first[owner]
    low, high = store.group_start[group], store.group_start[group + 1]
    stop = first_not_before(store.event_time, low, high, now[owner])
    if since is not None:
        low = first_not_before(store.event_time, low, stop, since[owner])
    met = stop > low
    owner, group, low, stop = owner[met], group[met], low[met], stop[met]
    count = np.bincount(owner, weights=stop - low, minlength=n).astype(np.int64)
    begin = store.group_start[store.user_group[user]].astype(np.int64)
    end = begin + count
    if since is not None:
        end = _positions_before(store, begin, store.group_start[store.user_group[user + 1]], now)
    newest_time = store.event_time[stop - 1]
    order = np.lexsort((-newest_time, owner))
    owner, group, low, stop = owner[order], group[order], low[order], stop[order]
    place = np.arange(len(owner)) - np.searchsorted(owner, owner)
    kept = place < categories
    owner, group, low, stop, place = owner[kept], group[kept], low[kept], stop[kept], place[kept]

    width = max(1, int(place.max(initial=0)) + 1)
    category = np.full((n, width), -1, np.int64)
    category[owner, place] = store.group_category[group]
    feature = np.zeros((n, width, FEATURES), np.float32)
    feature[owner, place] = _features(store, now[owner], end[owner], low, stop)

    at = end[:, None] - 1 - np.arange(recent)
    there = np.arange(recent) < np.minimum(count, recent)[:, None]
    row = store.time_order[np.where(there, at, begin[:, None])]
    age = age_class(now[:, None] - store.event_time[row])
    since_last = np.where(there[:, 0], now - store.event_time[row[:, 0]], 0)
    return Histories(
        category,
        feature,
        np.where(there, store.item_category[store.event_item[row]], -1).astype(np.int64),
        np.where(there, age, 0),
        np.stack([_log(count, 17), _log(since_last / 60, 24)], axis=1).astype(np.float32),
    )


def _features(
    store: Store, now: np.ndarray, end: np.ndarray, low: np.ndarray, stop: np.ndarray
) -> np.ndarray:
    """[n, F] of one category each, whose behaviors are the rows `low` to `stop` - 1."""
    there = (stop - low)[:, None] >= LAST
    row = np.where(there, stop[:, None] - LAST, low[:, None])
    age = _log((now[:, None] - store.event_time[row]) / 60, 24)
    ago = _log(end[:, None] - store.time_position[row].astype(np.int64), 17)
    return np.concatenate([_log(stop - low, 17)[:, None], there, there * age, there * ago], axis=1)


def _log(x: np.ndarray, scale: float) -> np.ndarray:
    """About 0 to 1: 2^17 behaviors, and 2^24 minutes, are long lives."""
    return np.log2(1 + np.maximum(x, 0)) / scale


def _positions_before(store: Store, begin: np.ndarray, end: np.ndarray, now: np.ndarray) -> np.ndarray:
    """Where, in the order of each life, the first behavior at or after `now` stands."""
    return first_not_before(_InOrder(store), begin, end, now)


class _InOrder:
    """Times in the order of lives."""

    def __init__(self, store: Store) -> None:
        self.store = store

    def __len__(self) -> int:
        return self.store.n_events

    def __getitem__(self, at: np.ndarray, /) -> np.ndarray:
        return self.store.event_time[self.store.time_order[at]]
