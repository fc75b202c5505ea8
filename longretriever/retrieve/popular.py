"""What is answered where nothing is known of a user: what is popular now, by category.

The categories of most behaviors in the newest days of the store, each with its items of most behaviors there;
places in proportion to the categories' shares (`merge.quota`), so that the largest does not take all.
"""

from __future__ import annotations

import numpy as np

from longretriever.events import SECONDS_PER_DAY
from longretriever.model.exported import Model, Request
from longretriever.retrieve.interests import Contexts
from longretriever.retrieve.merge import Merge, Ranked, quota
from longretriever.retrieve.numbers import Numbers
from longretriever.retrieve.retrieval import Asked, Retrieval
from longretriever.retrieve.rules import Ruled, Rules
from longretriever.store.behaviors import Behaviors, Life, Store

DAYS = 30
CATEGORIES = 20
_CHUNK = 1 << 24  # events that are looked at together

_NOTHING = Behaviors(*np.empty((4, 0), np.int64))


class Popular:
    """Counts of a store's newest days in the numbers of a model; reads all times of the store once."""

    def __init__(self, store: Store, model: Model, numbers: Numbers, days: int = DAYS) -> None:
        self.model = model
        count = _counts(store, store.last_time - days * SECONDS_PER_DAY)
        there = (numbers.item >= 0) & ~model.is_removed(numbers.item)
        known = np.flatnonzero((count > 0) & there)
        item, count = numbers.item[known], count[known]
        category = model.category_of(item)
        order = np.lexsort((item, -count, category))
        self._item, self._count = item[order], count[order]
        self._start = np.searchsorted(category[order], np.arange(len(model.category_start)))
        self.behaviors = np.diff(np.append(0, np.cumsum(self._count))[self._start])  # [C] in those days
        best = np.argsort(-self.behaviors, kind="stable")[:CATEGORIES]
        best = best[self.behaviors[best] > 0]
        self._contexts = Contexts(best, self.behaviors[best] / max(1, self.behaviors.sum()))

    def answer(self, life: Life, k: int, rules: Rules = Rules(), merge: Merge = quota) -> Retrieval:
        """Up to k candidates that take nothing of the life but its `now` into account.

        Rules hold as for others; for a category that is included, its popular items. A context's share is its
        part of the behaviors, an item's probability in it the same within.
        """
        ruled = Ruled(rules, self.model)
        nobody = np.zeros(len(self.model.profile_fields), np.int64)
        asked = []
        for category, share in ruled.contexts(self._contexts):
            ranked = self._of(category, share, k, ruled.items)
            request = Request(category, _NOTHING, _NOTHING, nobody, life.now)
            asked.append(Asked(request, _NOTHING, share, ranked))
        return Retrieval(self.model, life, asked, merge(ruled.lists([a.answer for a in asked]), k))

    def _of(self, category: int, share: float, k: int, unwanted: np.ndarray) -> Ranked:
        here = slice(self._start[category], self._start[category + 1])
        item, count = self._item[here], self._count[here]
        log_prob = np.log(count / max(1, count.sum()))
        wanted = np.flatnonzero(~np.isin(item, unwanted))[:k]
        return Ranked(category, share, item[wanted], np.zeros(len(wanted), np.float32), log_prob[wanted])


def _counts(store: Store, since: float) -> np.ndarray:
    """[I] behaviors of each item after `since`."""
    count = np.zeros(store.n_items, np.int64)
    for at in range(0, store.n_events, _CHUNK):
        part = slice(at, at + _CHUNK)
        late = store.event_time[part] > since
        count += np.bincount(store.event_item[part][late], minlength=store.n_items)
    return count
