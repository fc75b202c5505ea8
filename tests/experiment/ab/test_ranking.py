"""Every feature is what a slow program counts; the ranker learns from what was shown, not from the slot."""

from __future__ import annotations

import math
import sys
from contextlib import closing

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from longretriever.errors import MissingExtra
from longretriever.experiment.ab.ranking import Features, Ranker, Statistics, learned, need_sklearn
from longretriever.store.behaviors import Store
from longretriever.store.live import Event, Journal, Reader
from tests.worlds import DAY, START, stored, table

USERS, ITEMS, CATEGORIES = 6, 12, 3
ABOUT = pa.table(
    {
        "item_id": range(ITEMS),
        "category_id": [item % CATEGORIES for item in range(ITEMS)],
        "brand": [("red", "blue", None)[item % 5 % 3] for item in range(ITEMS)],
        "size": [("s", "l")[item // 6] for item in range(ITEMS)],
    }
)
NAMES = [
    *("popularity", "click rate", "click rate of category", "behaviors"),
    *("behaviors in category", "share of category", "engagement", "days since category"),
    *("times met", "like those in category", "like those met lately", "category shown today"),
    *("brand, in category", "brand, anywhere", "size, in category", "size, anywhere"),
]


class Tiny:
    """A log as a list of (user, item, time), its store, and numbers of items by their ids."""

    def __init__(self, path) -> None:
        rng = np.random.default_rng(0)
        user, item = rng.integers(0, USERS, 90), rng.integers(0, ITEMS - 1, 90)
        time = START + rng.integers(0, 40, 90) * DAY + rng.integers(0, 3, 90) * 1800
        log = sorted(set(zip(user.tolist(), item.tolist(), time.tolist(), strict=True)))
        self.log = log
        u, i, t = zip(*log, strict=True)
        category = [item % CATEGORIES for item in i]
        self.store: Store = stored(table(u, i, category, t), path, items=ABOUT)
        self.factor = rng.standard_normal((ITEMS, 4)).astype(np.float32)
        self.factor /= np.linalg.norm(self.factor, axis=1, keepdims=True)
        self.factor[5] = 0  # nobody had met it
        self.shown = rng.integers(0, 60, ITEMS)
        self.shown[2] = 0
        self.clicked = self.shown * rng.integers(0, 4, ITEMS) // 8
        self.events = rng.integers(0, 50, ITEMS)
        ids = self.store.items["item_id"].to_numpy()
        counts = (counts[ids].astype(float) for counts in (self.events, self.shown, self.clicked))
        self.features = Features(self.store, self.factor[ids], Statistics(*counts))
        self.number = {int(item): n for n, item in enumerate(ids)}

    def slowly(self, life: list[tuple[int, int]], now: float, item: int, today: int) -> dict[str, float]:
        """A candidate's features, each by its definition; a life is pairs of item and time."""
        met = [(i, now - time) for i, time in life if time < now]
        mates = range(item % CATEGORIES, ITEMS, CATEGORIES)
        here = [(i, age) for i, age in met if i in mates]
        rate = self.clicked.sum() / self.shown.sum()
        rate = (self.clicked[mates].sum() + 20 * rate) / (self.shown[mates].sum() + 20)
        engaged, in_all = (sum(86_400 / max(age, 3_600) for _, age in of) for of in (here, met))
        found = {
            "popularity": math.log(1 + self.events[item]),
            "click rate": (self.clicked[item] + 20 * rate) / (self.shown[item] + 20),
            "click rate of category": rate,
            "behaviors": math.log(1 + len(met)),
            "behaviors in category": math.log(1 + len(here)),
            "share of category": len(here) / len(met) if met else 0,
            "engagement": engaged / in_all if met else 0,
            "days since category": math.log(1 + min(age for _, age in here) / 86_400) if here else 10,
            "times met": math.log(1 + sum(i == item for i, _ in met)),
            "like those in category": self.alike(item, [i for i, _ in here]),
            "like those met lately": self.alike(item, [i for i, age in met if age < 30 * 86_400]),
            "category shown today": today,
        }
        about = ABOUT.to_pylist()
        for name in ("brand", "size"):
            for where, of in (("in category", here), ("anywhere", met)):
                same = sum(about[i][name] == about[item][name] for i, _ in of)
                found[f"{name}, {where}"] = same / len(of) if of else 0
        return found

    def alike(self, item: int, others: list[int]) -> float:
        """Cosine with the mean of the others; 0 where there is none."""
        mean = [sum(float(self.factor[i][d]) for i in others) for d in range(4)]
        length = math.sqrt(sum(x * x for x in mean))
        return (
            sum(m * float(x) for m, x in zip(mean, self.factor[item], strict=True)) / length if length else 0
        )


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Tiny:
    return Tiny(tmp_path_factory.mktemp("ranking") / "store")


def check(tiny: Tiny, lives, requests, ages) -> None:
    """`requests` are (life, item, shown today); `ages` the (item, time) of each life."""
    owner, item, today = (np.array(column, np.int64) for column in zip(*requests, strict=True))
    number = np.array([tiny.number[i] for i in item.tolist()])
    found = tiny.features.of(lives, number, owner, today)
    assert found.dtype == np.float32
    assert found.shape == (len(requests), len(tiny.features.names))
    for row, (o, i, n) in zip(found, requests, strict=True):
        told = dict(zip(tiny.features.names, row.tolist(), strict=True))
        assert told == pytest.approx(tiny.slowly(ages[o], lives[o].now, i, n), rel=1e-5, abs=1e-6)


def test_names_are_those_of_the_columns(tiny):
    assert tiny.features.names == NAMES


@settings(deadline=None, max_examples=60)
@given(data=st.data())
def test_features_are_what_a_slow_program_counts(tiny, data):
    """At any time, of a behavior or not; some are asked twice, some lives not at all."""
    times = st.sampled_from([time + d for _, _, time in tiny.log for d in (-1, 0, 1, 3600)])
    asked = data.draw(st.lists(st.tuples(st.integers(0, USERS - 1), times), min_size=1, max_size=4))
    one = st.tuples(
        st.integers(0, len(asked) - 1),
        st.integers(0, ITEMS - 1),
        st.integers(0, 9),
    )
    requests = data.draw(st.lists(one, min_size=1, max_size=8))
    lives = [tiny.store.life(tiny.store.user_number(user), now) for user, now in asked]
    check(tiny, lives, requests, [[(i, t) for u, i, t in tiny.log if u == user] for user, _ in asked])


def test_what_has_just_happened_counts_and_items_that_the_store_lacks_do_not(tiny, tmp_path):
    now = START + 41 * DAY
    live = [
        Event(1, 3, 0, now - 100, "click"),
        Event(1, 3, 0, now - 50, "buy"),
        Event(77, 4, 1, now - 9, "x"),
    ]
    after = [Event(1, 4, 1, now, "click"), Event(1, 4, 1, now + 60, "click")]
    strange = [Event(1, 555, 0, now - 30, "click"), Event(77, 555, 0, now - 8, "click")]
    with closing(Journal(tmp_path / "live.sqlite")) as journal:
        journal.append(live + after + strange).result()
        lives = Reader(tiny.store, journal).lives([1, 77, 88, 2], now)
        ages = [[(i, t) for u, i, t in tiny.log if u == user] for user in (1, 77, 88, 2)]
        ages[0] += [(3, now - 100), (3, now - 50)]
        ages[1] += [(4, now - 9)]
        check(tiny, lives, [(o, i, o) for o in range(4) for i in range(ITEMS)], ages)


def test_a_behavior_of_the_very_second_does_not_count(tiny):
    user, item, time = max(tiny.log, key=lambda event: event[2])
    of = tiny.features.names.index("times met")
    number, zero = np.array([tiny.number[item]]), np.zeros(1, np.int64)
    told = [
        tiny.features.of([tiny.store.life(tiny.store.user_number(user), now)], number, zero, zero)[0, of]
        for now in (time, time + 1)
    ]
    assert told[1] > told[0]


def test_nothing_to_rank(tiny):
    none = np.empty(0, np.int64)
    found = tiny.features.of([tiny.store.life(0, START)], none, none, none)
    assert found.shape == (0, len(NAMES))
    assert len(Ranker(tiny.features, None).score(found)) == 0


def test_nothing_was_shown_yet(tiny):
    zero = np.zeros(ITEMS)
    features = Features(tiny.store, tiny.features.factors, Statistics(zero + 3, zero, zero))
    found = features.of([tiny.store.life(0)], np.arange(ITEMS), np.zeros(ITEMS, np.int64), np.zeros(ITEMS))
    assert np.isfinite(found).all()
    assert (found[:, 1:3] == 0).all()
    assert (Ranker(features, None).score(found) == np.float32(math.log(4))).all()


def test_without_trees_the_more_popular_comes_first(tiny):
    life, every = tiny.store.life(0), np.arange(ITEMS)
    found = tiny.features.of([life], every, np.zeros(ITEMS, np.int64), np.zeros(ITEMS))
    score = Ranker(tiny.features, None).score(found)
    events = tiny.events[tiny.store.items["item_id"].to_numpy()]
    assert (np.diff(events[np.argsort(score)]) >= 0).all()


# -- trees


def impressions(n: int, seed: int) -> tuple[np.ndarray, np.ndarray, np.random.Generator]:
    rng = np.random.default_rng(seed)
    return rng.random((n, 4)).astype(np.float32), rng.integers(0, 10, n), rng


def of(trees, feature: np.ndarray) -> np.ndarray:
    return Ranker(None, trees).score(feature)  # type: ignore[arg-type]


def test_an_obvious_rule_is_learned():
    feature, slot, _ = impressions(3_000, 0)
    click = feature[:, 2] > 0.7
    trees = learned(feature, slot, click, np.zeros(len(click), bool), 3.0, 1)
    other, _, _ = impressions(500, 1)
    assert ((of(trees, other) > 0) == (other[:, 2] > 0.7)).mean() > 0.99


def test_the_slot_is_not_taken_for_worth():
    """The better candidates stood further down, where nobody looks: what was clicked more was not better."""
    feature, _, rng = impressions(20_000, 2)
    good = feature[:, 0] > 0.5
    slot = rng.integers(0, 10, len(good))
    further_down = rng.random(len(good)) < 0.9
    slot = np.where(further_down, np.where(good, 5 + slot // 2, slot // 2), slot)
    click = rng.random(len(good)) < np.where(good, 0.5, 0.25) * 0.6**slot
    assert click[good].mean() < 0.5 * click[~good].mean()
    trees = learned(feature, slot, click, np.zeros(len(click), bool), 3.0, 1)
    other, _, _ = impressions(500, 3)
    score, wanted = of(trees, other), other[:, 0] > 0.5
    assert score[wanted].mean() > score[~wanted].mean() + 0.5


def test_an_order_counts_for_several_clicks():
    feature, slot, rng = impressions(4_000, 4)
    bought = feature[:, 1] > 0.5
    click = rng.random(len(bought)) < 0.2
    orders, none = click & bought, np.zeros(len(bought), bool)

    def lead(order: np.ndarray, weight: float) -> float:
        score = of(learned(feature, slot, click, order, weight, 1), feature)
        return float(score[bought].mean() - score[~bought].mean())

    assert abs(lead(none, 3.0)) < 0.3
    assert lead(orders, 0.0) == lead(none, 3.0)
    assert lead(orders, 3.0) == pytest.approx(math.log(4), abs=0.4)


def test_the_same_seed_grows_the_same_trees():
    feature, slot, rng = impressions(2_000, 5)
    click = rng.random(2_000) < feature[:, 0]
    one, two = (learned(feature, slot, click, ~click, 1.0, 8) for _ in range(2))
    assert (of(one, feature) == of(two, feature)).all()
    assert len(np.unique(of(one, feature))) > 100


def test_where_nobody_has_clicked_nothing_is_learned():
    feature, slot, _ = impressions(10, 6)
    none = np.zeros(10, bool)
    assert learned(feature, slot, none, none, 3.0, 1) is None


def test_without_scikit_learn_it_is_said_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn", None)
    with pytest.raises(MissingExtra, match=r"needs scikit-learn .* `pip install 'longretriever\[market\]'`"):
        need_sklearn()
