"""Which candidates are shown? Gradient-boosted trees that have learned only from what was shown, of features
that any platform has: counts out of the log, counts out of the feed, and factors of items. Never the truth,
and never which route brought a candidate, so that no route is favored.

Axes: n candidates, E behaviors of the lives asked about, F features, I items, C categories, D of a factor.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from longretriever.errors import MissingExtra
from longretriever.events import SECONDS_PER_DAY
from longretriever.store.behaviors import FLOOR, Life, Store

CLICKS_BEFORE = 20.0
"""So many impressions at the average rate come before an item's own, or its rate would be all noise."""


def need_sklearn() -> None:
    """Raises `MissingExtra` unless scikit-learn can be imported."""
    try:
        import sklearn  # noqa: F401
    except ImportError as error:
        raise MissingExtra(
            f"the ranker of an A/B test needs scikit-learn ({error}). Install it with "
            "`pip install 'longretriever[market]'`."
        ) from error


@dataclass(frozen=True)
class Statistics:
    """What the platform has counted up to last midnight, over all arms together.

    events   [I] behaviors in the week before, those in the feed (clicks) as the mean of the arms
    shown    [I] impressions in the feed since the warm-up
    clicked  [I] clicks there
    """

    events: np.ndarray
    shown: np.ndarray
    clicked: np.ndarray


class Features:
    """What the ranker is told of each candidate, from a life strictly before the request.

    `factors` [I, D] are of unit length, or zero for an item that nobody had met.
    """

    def __init__(self, store: Store, factors: np.ndarray, statistics: Statistics) -> None:
        self.store, self.factors = store, factors
        self.category = store.item_category.astype(np.int64)
        self.fields = [(field.name, field.size) for field in store.item_fields]
        rate = statistics.clicked.sum() / max(1.0, statistics.shown.sum())
        of_category = _rate(*_by(self.category, statistics, store.n_categories), rate)
        self._of_item = np.stack(
            [
                np.log1p(statistics.events),
                _rate(statistics.clicked, statistics.shown, of_category[self.category]),
                of_category[self.category],
            ],
            axis=1,
        ).astype(np.float32)

    @property
    def names(self) -> list[str]:
        """What the columns are, in order."""
        fields = [f"{name}, {where}" for name, _ in self.fields for where in ("in category", "anywhere")]
        return [
            *("popularity", "click rate", "click rate of category", "behaviors"),
            *("behaviors in category", "share of category", "engagement", "days since category"),
            *("times met", "like those in category", "like those met lately", "category shown today"),
            *fields,
        ]

    def of(self, lives: Sequence[Life], item: np.ndarray, owner: np.ndarray, today: np.ndarray) -> np.ndarray:
        """[n, F] float32 of candidates `item` (of the store) for `lives[owner]`, both [n].

        `today` [n] is how many items of its category the user has been shown within a day.
        """
        met = _met(lives, self.store.n_items)
        C, category = self.store.n_categories, self.category[item]
        weight = SECONDS_PER_DAY / np.maximum(met.age, FLOOR)
        group, asked = met.owner * C + self.category[met.item], owner * C + category
        in_category = _Sums(group, np.stack([np.ones(len(group)), weight], axis=1))
        count, engaged = in_category.of(asked).T
        lived = np.bincount(met.owner, minlength=len(lives))[owner]
        all_engaged = np.bincount(met.owner, weight, minlength=len(lives))[owner]
        newest = _Sums(group, -met.age[:, None], np.maximum).of(asked)[:, 0]
        columns = [
            np.log1p(lived),
            np.log1p(count),
            count / np.maximum(lived, 1),
            engaged / np.maximum(all_engaged, 1e-9),
            np.where(count > 0, np.log1p(-newest / SECONDS_PER_DAY), 10.0),
            np.log1p(_counted(met.owner * self.store.n_items + met.item, owner * self.store.n_items + item)),
            *self._likeness(met, group, item, asked, owner),
            today,
        ]
        for at, (_, size) in enumerate(self.fields):
            value = self.store.item_feature[:, at].astype(np.int64)
            same = _counted(group * size + value[met.item], asked * size + value[item])
            anywhere = _counted(met.owner * size + value[met.item], owner * size + value[item])
            columns += [same / np.maximum(count, 1), anywhere / np.maximum(lived, 1)]
        return np.column_stack([self._of_item[item], *columns]).astype(np.float32)

    def _likeness(
        self, met: _Met, group: np.ndarray, item: np.ndarray, asked: np.ndarray, owner: np.ndarray
    ) -> list[np.ndarray]:
        """Cosine of each candidate with what the user met in its category, and with his last month."""
        found = []
        month = met.age < 30 * SECONDS_PER_DAY
        for key, wanted, which in ((group, asked, slice(None)), (met.owner, owner, month)):
            mean = _Sums(key[which], self.factors[met.item[which]]).of(wanted)
            length = np.maximum(np.linalg.norm(mean, axis=1), 1e-9)
            found.append((mean * self.factors[item]).sum(axis=1) / length)
        return found


class Ranker:
    """Orders candidates by `trees`, or by popularity where there are none yet."""

    def __init__(self, features: Features, trees: Any) -> None:
        self.features, self.trees = features, trees

    def score(self, feature: np.ndarray) -> np.ndarray:
        """[n] log-odds of a click in the first slot, clicks that end in an order counted several times."""
        if self.trees is None or len(feature) == 0:
            return feature[:, 0].astype(np.float64)
        first = np.zeros((len(feature), 1), np.float32)
        return self.trees.decision_function(np.hstack([feature, first]))


def learned(
    feature: np.ndarray,
    slot: np.ndarray,
    click: np.ndarray,
    order: np.ndarray,
    order_weight: float,
    seed: int,
) -> Any:
    """Trees for a `Ranker`, from impressions: their features as they were, slots, clicks, orders (all [n]).

    The slot is a feature too, so that what the eye does is not taken for what an item is worth. An order
    counts as `order_weight` clicks more. None where nobody has clicked yet.
    """
    need_sklearn()
    from sklearn.ensemble import HistGradientBoostingClassifier

    if not click.any():
        return None
    trees = HistGradientBoostingClassifier(
        max_iter=80, learning_rate=0.1, max_leaf_nodes=31, early_stopping=False, random_state=seed
    )
    return trees.fit(np.column_stack([feature, slot]), click, np.where(order, 1 + order_weight, 1.0))


@dataclass(frozen=True)
class _Met:
    """Behaviors before each request, all lives one after the other; all are [E]."""

    owner: np.ndarray
    item: np.ndarray
    age: np.ndarray  # seconds


def _met(lives: Sequence[Life], n_items: int) -> _Met:
    owner, item, age = [], [], []
    for i, life in enumerate(lives):
        rows = life.store.rows_of(life.user)
        time, met = np.asarray(life.store.event_time[rows]), np.asarray(life.store.event_item[rows])
        before = (time < life.now) & (met < n_items)
        item.append(met[before].astype(np.int64))
        age.append(life.now - time[before].astype(np.float64))
        owner.append(np.full(len(item[-1]), i))
    return _Met(np.concatenate(owner), np.concatenate(item), np.concatenate(age))


class _Sums:
    """Sums (or what else `how` makes of equal keys) of rows of values, by key."""

    def __init__(self, key: np.ndarray, value: np.ndarray, how: np.ufunc = np.add) -> None:
        order = np.argsort(key, kind="stable")
        self.key, first = np.unique(key[order], return_index=True)
        self.value = how.reduceat(value[order], first, axis=0) if len(first) else value

    def of(self, key: np.ndarray) -> np.ndarray:
        """[n, ...] of each key; 0 for one that is not there."""
        found = np.zeros((len(key), self.value.shape[1]), self.value.dtype)
        place = np.searchsorted(self.key, key)
        there = place < len(self.key)
        there[there] = self.key[place[there]] == key[there]
        found[there] = self.value[place[there]]
        return found


def _counted(key: np.ndarray, asked: np.ndarray) -> np.ndarray:
    return _Sums(key, np.ones((len(key), 1))).of(asked)[:, 0]


def _by(category: np.ndarray, s: Statistics, categories: int) -> tuple[np.ndarray, np.ndarray]:
    clicked, shown = (np.bincount(category, of, minlength=categories) for of in (s.clicked, s.shown))
    return clicked, shown


def _rate(clicked: np.ndarray, shown: np.ndarray, prior: np.ndarray | float) -> np.ndarray:
    return (clicked + CLICKS_BEFORE * prior) / (shown + CLICKS_BEFORE)
