"""What must a retriever beat to be worth its training? Three rivals that count and remember, in seconds.

The user's most recent items, which are hard to beat where people repeat; popularity before T, hard to beat
where items live for a day; and popularity inside the categories that Equation 3 says the user cares about.
None looks past T for a statistic of items, and none shows an item that does not occur in train.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np

from longretriever.errors import InputError
from longretriever.evaluate.split import nearest_quantile
from longretriever.events import SECONDS_PER_DAY
from longretriever.store.behaviors import Store

WINDOWS = (1, 7, 30)
"""Days of train's end that popularity may be counted in."""


class Lists(NamedTuple):
    """The answers to n requests.

    item      [n, k] item numbers of the store, distinct within a row, best first, padded with -1
    contexts  n arrays of the category numbers that were chosen for each; None where nothing is chosen
    """

    item: np.ndarray
    contexts: Sequence[np.ndarray] | None = None


class Recommender(Protocol):
    """What is evaluated: one method.

    A recommender may also carry `facts`, a mapping that is put beside its figures, such as `train_seconds`
    and `samples_per_second`.
    """

    def recommend(self, users: np.ndarray, before: np.ndarray, k: int, new: bool) -> Lists:
        """The `k` best items for each request.

        `users` [n] are user numbers of the store of the full log; of each, only behaviors strictly earlier
        than `before` [n] (seconds) may be used. With `new`, no item of that history is in the list.
        """
        ...


class Recent:
    """The user's distinct most recent items, newest first; nothing at all when only new items count."""

    def __init__(self, full: Store, T: int) -> None:
        self.full, self.in_train = full, train_counts(full, T) > 0

    def recommend(self, users: np.ndarray, before: np.ndarray, k: int, new: bool) -> Lists:
        item = np.full((len(users), k), -1, dtype=np.int64)
        if not new:
            for row, user, now in zip(item, users, before, strict=True):
                _fill(row, self._latest(int(user), int(now)))
        return Lists(item)

    def _latest(self, user: int, now: int) -> np.ndarray:
        newest_first = self.full.event_item[self.full.recent(user, now, self.full.n_events)[::-1]]
        newest_first = newest_first[self.in_train[newest_first]]
        _, first = np.unique(newest_first, return_index=True)
        return newest_first[np.sort(first)]


class Popular:
    """The items with the most events in the last `days` before T; beyond these, in all of train.

    `days=None` takes the one of `WINDOWS` with the best recall@50 on a slice cut from the end of train; see
    `recall_by_window`. `facts` says which, and how each fared.
    """

    def __init__(self, full: Store, T: int, days: int | None = None) -> None:
        self.full = full
        self.facts: Mapping[str, Any] = {"window_days": days}
        if days is None:
            recall = recall_by_window(full, T)
            days = max(recall, key=lambda window: (recall[window], window))
            validation = {str(window): round(value, 6) for window, value in recall.items()}
            self.facts = {"window_days": days, "validation_recall@50": validation}
        self.ranking = _most_popular(full, T, days)

    def recommend(self, users: np.ndarray, before: np.ndarray, k: int, new: bool) -> Lists:
        item = np.full((len(users), k), -1, dtype=np.int64)
        if not new:
            shown = self.ranking[:k]
            item[:, : len(shown)] = shown
            return Lists(item)
        mask = _Mask(self.full)
        for row, user, now in zip(item, users, before, strict=True):
            mask.set(int(user), int(now))
            _fill(row, mask.unseen(self.ranking, k))
        return Lists(item)


class PopularInContext:
    """The most popular items of the user's `top` categories by Equation 3, merged by probability.

    An item's score is the log of its category's share of the user's engagement plus the log of its own share
    of the category's train events.
    """

    def __init__(self, full: Store, T: int, top: int = 20) -> None:
        self.full, self.top = full, top
        count = train_counts(full, T)
        start = full.category_start.astype(np.int64)
        ranking = np.lexsort((np.arange(full.n_items), -count, full.item_category))
        in_category = np.r_[0, np.cumsum(count)][start]
        with np.errstate(divide="ignore", invalid="ignore"):
            share = np.log(count) - np.log(np.diff(in_category))[full.item_category]
        self.log_share = share
        alive = np.diff(np.r_[0, np.cumsum(count > 0)][start])
        self.ranking = [ranking[at : at + n] for at, n in zip(start[:-1], alive, strict=True)]

    def recommend(self, users: np.ndarray, before: np.ndarray, k: int, new: bool) -> Lists:
        item = np.full((len(users), k), -1, dtype=np.int64)
        contexts = []
        mask = _Mask(self.full)
        for row, user, now in zip(item, users, before, strict=True):
            if new:
                mask.set(int(user), int(now))
            category, score = self._choose(int(user), int(now))
            contexts.append(category)
            _fill(row, self._best(category, score, mask, k))
        return Lists(item, contexts)

    def _choose(self, user: int, now: int) -> tuple[np.ndarray, np.ndarray]:
        category, score = self.full.engagement(user, now)
        best = np.argsort(-score, kind="stable")[: self.top]
        return category[best], score[best]

    def _best(self, category: np.ndarray, score: np.ndarray, mask: _Mask, k: int) -> np.ndarray:
        if len(category) == 0:
            return np.empty(0, dtype=np.int64)
        candidates = [mask.unseen(self.ranking[c], k) for c in category]
        prior = np.repeat(np.log(score / score.sum()), [len(items) for items in candidates])
        item = np.concatenate(candidates)
        return item[np.argsort(-(prior + self.log_share[item]), kind="stable")[:k]]


def train_counts(full: Store, T: int) -> np.ndarray:
    """[I] how many events at or before T each item has."""
    return np.bincount(full.event_item[full.event_time <= T], minlength=full.n_items)


def recall_by_window(full: Store, T: int, windows: Sequence[int] = WINDOWS, k: int = 50) -> dict[int, float]:
    """Mean recall@k, on the last tenth of train, of what was popular in the last 1, 7, 30 days before it.

    The slice is cut as the log is: at the 0.9 quantile of train's timestamps, asking all users with events
    on both sides once, with repeats.
    """
    user = np.repeat(np.arange(full.n_users), np.diff(full.group_start[full.user_group]))
    in_train = full.event_time <= T
    user, item, time = user[in_train], full.event_item[in_train].astype(np.int64), full.event_time[in_train]
    if len(time) == 0:
        raise InputError(f"the store has no event at or before T = {T}; pass the store of the full log.")
    cut = nearest_quantile(time, 0.9)
    known = np.bincount(user[time <= cut], minlength=full.n_users) > 0
    asked = (time > cut) & known[user]
    pair = np.unique(user[asked] * full.n_items + item[asked])
    user, item = np.divmod(pair, full.n_items)
    size = np.maximum(1, np.bincount(user))
    n_asked = max(1, len(np.unique(user)))
    recall = {}
    for days in windows:
        hit = np.isin(item, _most_popular(full, cut, days)[:k])
        recall[days] = float((np.bincount(user, weights=hit) / size).sum() / n_asked)
    return recall


def _most_popular(full: Store, T: int, days: int) -> np.ndarray:
    """Items of train by events in the last `days` before T, then in all of train, then by number."""
    count = train_counts(full, T)
    latest = count - train_counts(full, T - days * SECONDS_PER_DAY)
    order = np.lexsort((-count, -latest))
    return order[count[order] > 0]


class _Mask:
    """Which items one user has met, as a bit for each item: set in O(history), no allocation per request."""

    def __init__(self, full: Store) -> None:
        self.full = full
        self.met = np.zeros(full.n_items, dtype=bool)
        self.items = np.empty(0, dtype=np.int64)

    def set(self, user: int, now: int) -> None:
        """Mask what the user met strictly before `now`."""
        self.met[self.items] = False
        self.items = self.full.life(user, now).items()
        self.met[self.items] = True

    def unseen(self, ranking: np.ndarray, k: int) -> np.ndarray:
        """The first `k` of a ranking that are not masked."""
        head = ranking[: k + len(self.items)]
        return head[~self.met[head]][:k]


def _fill(row: np.ndarray, items: np.ndarray) -> None:
    n = min(len(row), len(items))
    row[:n] = items[:n]
