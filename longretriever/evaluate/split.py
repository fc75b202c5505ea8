"""What may a model learn from, and what is it asked? One log, cut by time at T, so that nothing leaks.

T is the 0.9 quantile of the timestamps; train is every event at or before T. From what follows, two kinds of
requests are drawn: live (just before each event) and batch (once, at T). `docs/evaluate.md` has the protocol
in words; the draws follow it to the letter, so that figures of other systems compare.

Numbers of users, categories and items are those of the store that `ingest` makes from `Split.full`: users
and categories by sorted id, items by (category, id). Axes: U users, I items, E events, R live requests,
Q batch requests.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from longretriever.errors import EventsError, InputError
from longretriever.events import CATEGORY, ITEM, TIME, USER


@dataclass(frozen=True)
class LiveRequests:
    """Each asks, just before an event of the test part happens, what the user will meet next.

    user     [R] user numbers, at most a few requests each
    before   [R] seconds: only behaviors strictly earlier count
    target   [R] the item of the event; it occurs in train
    new      [R] whether the user's history up to then lacks the target
    history  [R] how many events that history has, exact duplicates included
    """

    user: np.ndarray
    before: np.ndarray
    target: np.ndarray
    new: np.ndarray
    history: np.ndarray

    def only_new(self) -> LiveRequests:
        """NEW: the requests whose target is not in the history."""
        new = self.new
        return LiveRequests(
            self.user[new], self.before[new], self.target[new], self.new[new], self.history[new]
        )


@dataclass(frozen=True)
class BatchRequests:
    """Each asks at T for one list that is to hold all that the user will meet.

    user        [Q] user numbers, distinct
    before      [Q] T + 1 throughout: the history is the user's train events
    target      Q arrays of the user's distinct items after T, sorted; some may not occur in train
    new_target  Q arrays: those of them that occur in train, but not in the user's history; may be empty
    history     [Q] how many events the history has, exact duplicates included
    """

    user: np.ndarray
    before: np.ndarray
    target: tuple[np.ndarray, ...]
    new_target: tuple[np.ndarray, ...]
    history: np.ndarray

    def only_new(self) -> BatchRequests:
        """NEW: the new targets of the users who have any."""
        has = np.array([len(items) > 0 for items in self.new_target], dtype=bool)
        target = tuple(items for items in self.new_target if len(items))
        return BatchRequests(self.user[has], self.before[has], target, target, self.history[has])


@dataclass(frozen=True)
class Split:
    """A log cut at T; made by `split`.

    full           the events left by the filter, in the log's order, one category for each item
    T              seconds: train <= T < test
    user_ids       [U] sorted; the position is the user's number
    category_ids   sorted; the position is the category's number
    item_ids       [I] sorted by (category, id); the position is the item's number
    item_category  [I] category numbers
    in_train       [I] whether the item occurs in train: the catalogue of what can be shown
    user_start     [U+1] where the events of each user start in the next two
    item           [E] item numbers, sorted by (user, time, place in the log)
    time           [E] seconds, ascending within a user
    """

    full: pa.Table
    T: int
    user_ids: pa.Array
    category_ids: pa.Array
    item_ids: pa.Array
    item_category: np.ndarray
    in_train: np.ndarray
    user_start: np.ndarray
    item: np.ndarray
    time: np.ndarray

    @cached_property
    def train(self) -> pa.Table:
        """The events at or before T: all that a model, and any statistic of users or items, may see."""
        return self.full.filter(pc.less_equal(self.full[TIME], self.T))

    @property
    def n_users(self) -> int:
        return len(self.user_ids)

    @property
    def n_items(self) -> int:
        return len(self.item_ids)

    @cached_property
    def test_start(self) -> np.ndarray:
        """[U] where in `item` and `time` each user's first event after T stands."""
        is_train = np.r_[0, np.cumsum(self.time <= self.T)]
        return self.user_start[:-1] + np.diff(is_train[self.user_start])

    @cached_property
    def testable(self) -> np.ndarray:
        """[U] whether the user has at least one event on each side of T."""
        return (self.user_start[:-1] < self.test_start) & (self.test_start < self.user_start[1:])

    def live(self, n: int = 3000, per_user: int = 5, seed: int = 1) -> LiveRequests:
        """Draw about `n` test events as requests, at most `per_user` of each user.

        Users come in the order of `default_rng(seed).permutation(U)`, and the same generator permutes the
        test events of each who has events on both sides of T; the first `per_user` are taken, of those the
        ones whose item occurs in train. Drawing stops at the end of the user who brings the count to `n`,
        so a few more than `n` may come. Raises `EventsError` when there are none.
        """
        rng = np.random.default_rng(seed)
        drawn: list[int] = []
        for user in rng.permutation(self.n_users):
            if not self.testable[user]:
                continue
            rows = rng.permutation(np.arange(self.test_start[user], self.user_start[user + 1]))[:per_user]
            drawn.extend(rows[self.in_train[self.item[rows]]])
            if len(drawn) >= n:
                break
        if not drawn:
            raise EventsError(
                f"no live request can be drawn: no user with events at or before T = {self.T} meets after it "
                "an item that occurs in train. Pass a smaller quantile, or a log that goes on longer."
            )
        return self._live_requests(np.array(drawn))

    def _live_requests(self, row: np.ndarray) -> LiveRequests:
        user = np.searchsorted(self.user_start, row, side="right") - 1
        start = self.user_start[user]
        history = np.array(
            [
                np.searchsorted(self.time[first:at], self.time[at])
                for first, at in zip(start, row, strict=True)
            ]
        )
        new = [
            self.item[at] not in self.item[first : first + length]
            for first, at, length in zip(start, row, history, strict=True)
        ]
        return LiveRequests(user, self.time[row], self.item[row], np.array(new), history)

    def batch(self, n: int = 1000, seed: int = 1) -> BatchRequests:
        """Ask at T for the first `n` of `default_rng(seed).permutation` of the users with both sides.

        Raises `EventsError` when there is no such user.
        """
        user = np.random.default_rng(seed).permutation(np.flatnonzero(self.testable))[:n]
        if len(user) == 0:
            raise EventsError(
                f"no batch request can be drawn: none of the {self.n_users:,} users has events both at or "
                f"before T = {self.T} and after it. Pass another quantile, or a log that goes on longer."
            )
        target, new_target = [], []
        for start, cut, stop in zip(
            self.user_start[user], self.test_start[user], self.user_start[user + 1], strict=True
        ):
            items = np.unique(self.item[cut:stop])
            target.append(items)
            new_target.append(items[self.in_train[items] & ~np.isin(items, self.item[start:cut])])
        history = self.test_start[user] - self.user_start[user]
        return BatchRequests(user, np.full(len(user), self.T + 1), tuple(target), tuple(new_target), history)


def split(events: pa.Table, quantile: float = 0.9, min_events: int = 5) -> Split:
    """Filter a log, give each item one category, and cut it at T.

    `events` has user_id, item_id, category_id, timestamp (seconds) and what else there is; exact duplicates
    are kept and count, here and in the draws, as they did when the protocol's figures were made.

    Twice, items under `min_events` events are dropped and then users under `min_events`. T is the `quantile`
    of the timestamps left. An item's category is its most frequent one among all events of the log at or
    before T (among all events where it has none there), the smallest id where two tie.

    Raises `EventsError` when this leaves nothing to learn from or to ask.
    """
    if not 0 < quantile < 1:
        raise InputError(f"quantile is {quantile}, expected a number between 0 and 1, such as 0.9.")
    _check_columns(events)
    user, _ = _ranks(events[USER])
    item, _ = _ranks(events[ITEM])
    time = events[TIME].to_numpy()
    kept = _frequent(user, item, min_events)
    _check_enough(user[kept], time[kept], len(time), min_events)
    T = nearest_quantile(time[kept], quantile)
    if time[kept].max() <= T:
        raise EventsError(
            f"no event is after T = {T}, the {quantile} quantile of the {kept.sum():,} timestamps left: "
            "too many events share the last one, so there is no test part. Pass a smaller quantile."
        )
    category, category_ids = _ranks(events[CATEGORY])
    one = _most_frequent(item, category, time <= T)[item]
    at = events.schema.get_field_index(CATEGORY)
    full = events.set_column(at, CATEGORY, category_ids.take(pa.array(one))).filter(pa.array(kept))
    return _numbered(full, T)


def nearest_quantile(values: np.ndarray, q: float) -> int:
    """The value that stands nearest to a share `q` of the way through the sorted values.

    Halfway between two it is the later one, as Polars has it; NumPy's "nearest" takes the even place.
    """
    place = int(np.floor(q * (len(values) - 1) + 0.5))
    return int(np.partition(values, place)[place])


def _check_columns(events: pa.Table) -> None:
    for name in (USER, ITEM, CATEGORY, TIME):
        if name not in events.column_names:
            raise EventsError(
                f"the events have the columns {', '.join(events.column_names)}, but no {name}. "
                "Rename a column, or join the items."
            )
        if events[name].null_count:
            raise EventsError(
                f"{events[name].null_count:,} events have no {name}. Read the log with `read_events`, which "
                "sets such rows aside, or drop them."
            )


def _check_enough(user: np.ndarray, time: np.ndarray, n_before: int, min_events: int) -> None:
    if len(user) == 0:
        raise EventsError(
            f"none of the {n_before:,} events is left after twice dropping items under {min_events} events "
            f"and then users under {min_events}. Pass a longer log."
        )
    if np.all(user == user[0]):
        raise EventsError(
            f"all {len(user):,} events left by the filter are of one user; figures and their intervals are "
            "over users, at least two are needed. Pass a longer log."
        )
    if time.min() == time.max():
        raise EventsError(
            f"all {len(time):,} events left by the filter have the timestamp {time[0]}; to cut the log by "
            "time they must differ. Check which column is the timestamp."
        )


def _frequent(user: np.ndarray, item: np.ndarray, least: int) -> np.ndarray:
    """[E] which events the filter keeps."""
    kept = np.ones(len(user), dtype=bool)
    for _ in range(2):
        for key in (item, user):
            count = np.bincount(key[kept], minlength=key.max(initial=0) + 1)
            kept &= count[key] >= least
    return kept


def _most_frequent(item: np.ndarray, category: np.ndarray, early: np.ndarray) -> np.ndarray:
    """[items] the most frequent category of each, among its early events where it has any; ties smallest."""
    has_early = np.bincount(item, weights=early) > 0
    counts = early | ~has_early[item]
    span = int(category.max()) + 1
    pair, count = np.unique(item[counts] * span + category[counts], return_counts=True)
    best = np.lexsort((pair % span, -count, pair // span))
    _, first = np.unique((pair // span)[best], return_index=True)
    return (pair % span)[best[first]]


def _ranks(column: pa.ChunkedArray) -> tuple[np.ndarray, pa.Array]:
    """[E] the dense rank of each id, and the distinct ids in that order."""
    encoded = column.combine_chunks().dictionary_encode()
    order = pc.sort_indices(encoded.dictionary).to_numpy().astype(np.int64)
    rank = np.empty(len(order), dtype=np.int64)
    rank[order] = np.arange(len(order))
    return rank[encoded.indices.to_numpy()], encoded.dictionary.take(pa.array(order))


def _numbered(full: pa.Table, T: int) -> Split:
    user, user_ids = _ranks(full[USER])
    item, item_ids = _ranks(full[ITEM])
    category, category_ids = _ranks(full[CATEGORY])
    category_of = np.zeros(len(item_ids), dtype=np.int64)
    category_of[item] = category
    by_category = np.argsort(category_of, kind="stable")
    number = np.empty(len(item_ids), dtype=np.int64)
    number[by_category] = np.arange(len(item_ids))

    time = full[TIME].to_numpy()
    order = np.lexsort((time, user))
    item, time = number[item[order]], time[order]
    return Split(
        full=full,
        T=T,
        user_ids=user_ids,
        category_ids=category_ids,
        item_ids=item_ids.take(pa.array(by_category)),
        item_category=category_of[by_category],
        in_train=np.bincount(item[time <= T], minlength=len(item_ids)) > 0,
        user_start=np.searchsorted(user[order], np.arange(len(user_ids) + 1)),
        item=item,
        time=time,
    )
