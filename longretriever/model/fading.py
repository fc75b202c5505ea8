"""How fast does a log fade? Where items live for days, last month's events teach about items that are dead.

On news the item that is read next appeared hours ago, and training on all of a fortnight spends itself on
items that nobody will read again. A shop's or a film's items live as long as the log, and every event counts.
"""

from __future__ import annotations

import numpy as np

from longretriever.events import SECONDS_PER_DAY
from longretriever.store.behaviors import Store

_NEWEST = 0.1  # of the events: whose items tell how old items are
_LONG = 0.1  # of the log's span: items of that age and more do not fade
_OF_AGE = 0.15  # of the usual age of an item, in which an event's weight halves
_LEAST = 0.005  # of the log's span
_CHUNK = 1 << 22  # events looked at at once


def half_life(store: Store) -> float:
    """Days in which the weight of an event should halve; 0 where items live long and nothing fades.

    The usual age of items is the median, over the log's newest tenth of events, of the time since the item's
    first event, first events left out. If that is a tenth of the log's span or more, or items occur once, the
    answer is 0. Costs two passes over the events (some 10 ns each), and memory for one time per item.
    """
    first = np.full(store.n_items, np.iinfo(np.int64).max)
    for at in range(0, store.n_events, _CHUNK):
        part = slice(at, at + _CHUNK)
        np.minimum.at(first, store.event_item[part], store.event_time[part])
    part = _sample(store)
    time, item = store.event_time[part], store.event_item[part]
    late = time >= newest_from(store, _NEWEST)
    ages = time[late] - first[item[late]]
    ages, span = ages[ages > 0], float(store.last_time - time.min())
    if len(ages) == 0 or np.median(ages) >= _LONG * span:
        return 0.0
    return float(max(_LEAST * span, _OF_AGE * np.median(ages))) / SECONDS_PER_DAY


def newest_from(store: Store, share: float) -> int:
    """The time from which on the newest `share` of the events lies (of a sample, if many)."""
    return int(np.quantile(store.event_time[_sample(store)], 1 - share, method="lower"))


def _sample(store: Store) -> slice:
    return slice(None, None, max(1, store.n_events // 2_000_000))


def oldest(until: int, days: float, drawn: np.ndarray) -> np.ndarray:
    """[n] the first time whose `weight` reaches what was drawn, in (0, 1]."""
    return np.ceil(until + days * SECONDS_PER_DAY * np.log2(drawn)).astype(np.int64)


def weight(time: np.ndarray, until: int, days: float) -> np.ndarray:
    """[n] in (0, 1]: how much events of these times count at `until`; all alike for a half-life of 0."""
    if days == 0:
        return np.ones(len(time))
    return np.exp2(-np.maximum(0, until - time) / (days * SECONDS_PER_DAY))
