"""The simulated market: what it claims of its world is measured in its logs."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import tracemalloc
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from longretriever.errors import Damaged, InputError, Mismatch, NotSaved
from longretriever.market import log as module
from longretriever.market.log import BEHAVIORS, PROFILE, Log, Market, MarketConfig

DAY = 86_400


@pytest.fixture(scope="module")
def medium() -> tuple[Market, Log]:
    market = Market(MarketConfig.of_size(200_000, seed=3))
    return market, market.log(0, market.config.users)


@pytest.fixture(scope="module")
def small() -> tuple[Market, Log]:
    """Few users with long lives among few items: every probability can be counted."""
    market = Market(MarketConfig(20_000, 20, items=240, categories=6, days=60, seed=5, styles=8, most=2_000))
    return market, market.log(0, 20)


def hashes(folder: Path) -> dict[str, str]:
    return {f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in sorted(folder.iterdir())}


def same_user(log: Log) -> np.ndarray:
    """[E-1] whether an event and the next one are of the same user."""
    return log.user[1:] == log.user[:-1]


# -- the configuration


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"users": 0}, "users is 0, expected at least 1"),
        ({"categories": 500}, "500 categories but 100 items. Every category needs an item"),
        ({"events": 99}, "10 users of 10 to 100,000 behaviors make 100 to 1,000,000 events, not 99"),
        ({"events": 5_000, "most": 100}, "make 100 to 1,000 events, not 5,000. Change users, events"),
        ({"repeat": 1.5}, "repeat is 1.5, expected a share from 0 to 1"),
        ({"common": 0.7, "moving": 0.7}, r"common \+ moving is 1.4, expected at most 1"),
        ({"popularity_tail": 1.0}, "popularity_tail is 1.0, expected 0 to below 1"),
        ({"days": 0}, "days is 0, expected at least 1"),
        ({"drift_days": 0}, "drift_days is 0, expected at least 0.1"),
        ({"fewest_interests": 9, "most_interests": 3}, "9 to 3 interests, expected the fewest first"),
        ({"seed": -1}, "seed is -1, expected at least 0"),
        ({"sharpness": float("nan")}, "sharpness is nan, expected at least 0"),
        ({"end": 1_000}, "expected a time within 1970-2099"),
        ({"quality": -0.1}, "quality is -0.1, expected at least 0"),
        ({"thrift": -1}, "thrift is -1, expected at least 0"),
        ({"item_days": -7}, "item_days is -7, expected at least 0"),
        ({"item_days": float("nan")}, "item_days is nan, expected at least 0"),
    ],
)
def test_an_impossible_market_is_refused_with_the_reason(fields: dict[str, float], message: str) -> None:
    with pytest.raises(InputError, match=message):
        MarketConfig(**{"events": 1_000, "users": 10, "items": 100, "categories": 5, **fields})


@pytest.mark.parametrize("events", [10, 1_000, 200_000, 100_000_000])
def test_every_size_has_a_sensible_market(events: int) -> None:
    config = MarketConfig.of_size(events)
    assert config.events == events
    assert config.users == max(1, events // 100)
    assert config.categories <= config.items


def test_the_sizes_at_both_ends_of_the_range() -> None:
    big, demo = MarketConfig.of_size(100_000_000), MarketConfig.of_size(200_000, seed=4, string_ids=True)
    assert (big.users, big.items, big.categories, big.most) == (1_000_000, 4_000_000, 10_000, 100_000)
    assert (demo.users, demo.items, demo.categories) == (2_000, 8_000, 101)
    assert (demo.seed, demo.string_ids) == (4, True)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 300), st.integers(1, 30), st.integers(0, 300), st.floats(0, 1))
def test_activity_adds_up_to_the_events_within_its_bounds(
    users: int, least: int, room: int, fill: float
) -> None:
    most = least + room
    events = users * least + round(fill * users * room)
    config = MarketConfig(events, users, items=9, categories=2, least=least, most=most)
    count = module._activity(config, np.random.default_rng(0))
    assert count.sum() == events
    assert least <= count.min()
    assert count.max() <= most


# -- the same seed, the same bytes


@pytest.mark.parametrize("string_ids", [False, True])
def test_bytes_depend_on_the_seed_and_not_on_the_chunk(
    tmp_path: Path, string_ids: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_ROW_GROUP", 7_000)
    config = MarketConfig.of_size(30_000, seed=1, string_ids=string_ids)
    for chunk in (1, 5_000, 1 << 20):
        Market(config).write(tmp_path / str(chunk), chunk=chunk)
    first = hashes(tmp_path / "1")
    assert hashes(tmp_path / "5000") == first == hashes(tmp_path / str(1 << 20))
    Market(dataclasses.replace(config, seed=2)).write(tmp_path / "other")
    assert hashes(tmp_path / "other")["events.parquet"] != first["events.parquet"]


def test_a_life_can_be_drawn_by_itself(medium: tuple[Market, Log]) -> None:
    market, log = medium
    for user in (0, 17, 1_999):
        alone = market.log(user, user + 1)
        for column, whole in zip(alone, log, strict=True):
            np.testing.assert_array_equal(column, whole[log.user == user])


def test_a_market_is_loaded_from_what_it_wrote(tmp_path: Path) -> None:
    written = []
    market = Market(MarketConfig.of_size(20_000, seed=8, string_ids=True, curiosity=0.3))
    market.write(tmp_path / "m", progress=written.append)
    again = Market.load(tmp_path / "m")
    assert again.config == market.config
    assert written == [20_000]
    for column, expected in zip(again.log(0, 50), market.log(0, 50), strict=True):
        np.testing.assert_array_equal(column, expected)
    at = market.config.end
    np.testing.assert_array_equal(again.taste([1, 2], [3, 4], at), market.taste([1, 2], [3, 4], at))


def test_a_folder_that_is_no_market_is_refused(tmp_path: Path) -> None:
    with pytest.raises(NotSaved, match=r"so .* is not a market\. Make one with `longretriever generate`"):
        Market.load(tmp_path)
    for content, error in (
        ("{", Damaged),
        (json.dumps({"format": 9, "config": {}}), Mismatch),
        (json.dumps({"format": 1, "config": {"planets": 3}}), Damaged),
    ):
        (tmp_path / "market.json").write_text(content)
        with pytest.raises(error, match="Make one with"):
            Market.load(tmp_path)


def test_a_failure_leaves_the_older_market_as_it_was(tmp_path: Path) -> None:
    market = Market(MarketConfig.of_size(2_000))
    market.write(tmp_path / "m")
    before = hashes(tmp_path / "m")

    def fail(_: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Market(MarketConfig.of_size(4_000)).write(tmp_path / "m", progress=fail)
    assert hashes(tmp_path / "m") == before
    assert [f.name for f in tmp_path.iterdir()] == ["m"]


# -- the files


@pytest.mark.parametrize("string_ids", [False, True])
def test_the_tables_say_what_the_log_says(tmp_path: Path, string_ids: bool) -> None:
    market = Market(MarketConfig.of_size(20_000, string_ids=string_ids))
    market.write(tmp_path / "m")
    events, items, users = (
        pq.read_table(tmp_path / "m" / f"{n}.parquet") for n in ("events", "items", "users")
    )
    id_type = pa.string() if string_ids else pa.int64()
    assert dict(zip(events.schema.names, events.schema.types, strict=True)) == {
        "user_id": id_type,
        "item_id": id_type,
        "category_id": id_type,
        "timestamp": pa.int64(),
        "behavior": pa.string(),
    }
    assert items.schema.names == ["item_id", "category_id", "title", "brand", "price_band"]
    assert users.schema.names == ["user_id", *PROFILE]
    assert (events.num_rows, items.num_rows, users.num_rows) == (20_000, 800, 200)

    log = market.log(0, 200)
    name = "{letter}{number:0{width}d}" if string_ids else "{number}"
    for letter, column, numbers, width in (
        ("u", "user_id", log.user, 3),
        ("i", "item_id", log.item, 3),
        ("c", "category_id", log.category, 2),
    ):
        expected = [name.format(letter=letter, number=n, width=width) for n in numbers]
        assert [str(value) for value in events[column].to_pylist()] == expected
    np.testing.assert_array_equal(events["timestamp"].to_numpy(), log.time)
    assert events["behavior"].to_pylist() == [BEHAVIORS[k] for k in log.kind]
    of_item = dict(zip(items["item_id"].to_pylist(), items["category_id"].to_pylist(), strict=True))
    assert [of_item[i] for i in events["item_id"].to_pylist()] == events["category_id"].to_pylist()
    assert items["title"][0].as_py()[-4:].isdigit()
    assert len(set(items["title"].to_pylist())) == 800


def test_memory_does_not_grow_with_the_events(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_ROW_GROUP", 10_000)

    def peak(events: int) -> int:
        market = Market(MarketConfig(events, users=events // 100, items=2_000, categories=20, most=1_000))
        tracemalloc.start()
        market.write(tmp_path / str(events), chunk=5_000)
        try:
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    peak(20_000)  # what is imported and cached at the first write
    assert peak(400_000) < 1.3 * peak(50_000)


# -- the shape of the log


def test_times_lie_inside_the_window_and_seldom_tie(medium: tuple[Market, Log]) -> None:
    market, log = medium
    assert market.config.start < log.time.min()
    assert log.time.max() < market.config.end
    gap = np.diff(log.time)[same_user(log)]
    assert gap.min() >= 0
    assert (gap == 0).mean() < 0.01


@pytest.mark.parametrize("days", [1, 30])
def test_crowded_lives_fit_into_a_short_window(days: int) -> None:
    market = Market(MarketConfig(200_000, users=4, items=50, categories=3, days=days, end=1_700_000_000))
    log = market.log(0, 4)
    assert market.config.start < log.time.min()
    assert log.time.max() < 1_700_000_000
    assert (np.diff(log.time)[same_user(log)] >= 0).all()


def test_sizes_have_long_tails(medium: tuple[Market, Log]) -> None:
    market, log = medium
    config = market.config

    def share_of_top_percent(counts: np.ndarray) -> float:
        return float(np.sort(counts)[-max(1, len(counts) // 100) :].sum() / counts.sum())

    activity = np.bincount(log.user, minlength=config.users)
    np.testing.assert_array_equal(activity, market.behaviors_of(np.arange(config.users)))
    assert activity.min() == 10
    assert 1_500 < activity.max() <= config.most
    assert share_of_top_percent(activity) > 0.1
    assert share_of_top_percent(np.bincount(log.item, minlength=config.items)) > 0.08
    sizes = np.bincount(market.category_of(np.arange(config.items)))
    assert len(sizes) == config.categories
    assert share_of_top_percent(sizes) > 0.05
    assert sizes.max() > 8 * np.median(sizes)


def test_gaps_tell_sessions_from_absences(medium: tuple[Market, Log]) -> None:
    market, log = medium
    gap = np.diff(log.time)[same_user(log)]
    assert np.quantile(gap, 0.8) < 300
    assert np.quantile(gap, 0.95) > DAY
    assert (gap > 1_800).mean() == pytest.approx(1 / market.config.session_events, abs=0.03)


def test_sessions_stay_in_a_category(medium: tuple[Market, Log]) -> None:
    _, log = medium
    within = same_user(log) & (np.diff(log.time) < 300)
    stays = (log.category[1:] == log.category[:-1])[within].mean()
    shuffled = np.lexsort((np.random.default_rng(0).random(len(log.user)), log.user))  # within each user
    chance = (log.category[shuffled][1:] == log.category[shuffled][:-1])[same_user(log)].mean()
    assert stays > 0.85 > 0.6 > chance


@pytest.mark.parametrize("repeat", [0.0, 0.25, 0.6])
def test_repeats_come_at_the_configured_rate(repeat: float) -> None:
    """In a category so large that nothing is met twice by accident, save that a first cannot come back."""
    config = MarketConfig(
        40_000, 40, items=400_000, categories=4, repeat=repeat, popularity_tail=0.0, sharpness=0.0, most=5_000
    )
    log = Market(config).log(0, 40)
    met = np.unique(log.user.astype(np.int64) * config.items + log.item)
    assert 1 - len(met) / config.events == pytest.approx(repeat, abs=0.02)


def test_a_category_of_one_item_and_one_style_works() -> None:
    config = MarketConfig(
        500, 5, items=3, categories=3, styles=1, personas=1, dimensions=1, fewest_interests=1
    )
    market = Market(config)
    log = market.log(0, 5)
    np.testing.assert_array_equal(log.category, market.category_of(log.item))
    assert market.next_item(0, 1, config.end, history=[int(market.items_of(1)[0])] * 3).tolist() == [1.0]


# -- fast paths against slow truths


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 2**32), st.integers(1, 40), st.integers(1, 60))
def test_pick_is_inversion_of_the_running_sum(seed: int, places: int, n: int) -> None:
    rng = np.random.default_rng(seed)
    weight = rng.exponential(size=(5, places)).astype(np.float32) * (rng.random((5, places)) < 0.6)
    weight[:, rng.integers(places)] += 1
    row, draw = rng.integers(5, size=n), rng.random(n, dtype=np.float32)
    picked = module._pick(weight, draw, row)
    for r, d, found in zip(row, draw, picked, strict=True):
        running = np.cumsum(weight[r])  # float32, one after the other, as in the fast path
        assert found == np.flatnonzero(running > d * running[-1])[0]
        assert weight[r, found] > 0


def test_what_is_copied_is_an_earlier_item_of_the_same_user_and_category(small: tuple[Market, Log]) -> None:
    """Follows the log one event after the other, with the same draws and the rule of the docs."""
    market, log = small
    event = np.arange(len(log.item))
    back, lag = market._draw("back", event) < market.config.repeat, market._draw("lag", event)
    history: dict[tuple[int, int], list[int]] = {}
    copies = 0
    for e in event:
        met = history.setdefault((int(log.user[e]), int(log.category[e])), [])
        if back[e] and met:
            behind = min(int(np.exp(lag[e] * np.log(len(met) + 1.0))), len(met))
            assert log.item[e] == met[-behind]
            copies += 1
        met.append(int(log.item[e]))
    assert copies > 4_000


# -- the oracle


def surprise(chances: list[np.ndarray], chosen: list[int]) -> float:
    """Standard deviations by which the log-likelihood of what was chosen misses its expectation."""
    total = variance = 0.0
    for p, c in zip(chances, chosen, strict=True):
        log_p = np.log(p, where=p > 0, out=np.zeros_like(p))
        mean = p @ log_p
        total += log_p[c] - mean
        variance += p @ log_p**2 - mean**2
    return abs(total) / np.sqrt(variance)


def item_choices(
    market: Market, log: Log, every: int
) -> tuple[list[np.ndarray], list[int], list[np.ndarray]]:
    """For some events: the oracle's chances, the place chosen and the items they are of."""
    chances, chosen, items = [], [], []
    first = np.flatnonzero(np.append(True, ~same_user(log)))
    for e in range(0, len(log.item), every):
        c = int(log.category[e])
        life = slice(int(first[np.searchsorted(first, e, side="right") - 1]), e)
        met = log.item[life][log.category[life] == c]
        chances.append(market.next_item(int(log.user[e]), c, log.time[e], met))
        items.append(market.items_of(c))
        chosen.append(int(np.flatnonzero(items[-1] == log.item[e])[0]))
    return chances, chosen, items


def test_items_are_chosen_with_the_stated_chances(small: tuple[Market, Log]) -> None:
    market, log = small
    chances, chosen, items = item_choices(market, log, every=5)
    for p in chances[::50]:
        assert p.sum() == pytest.approx(1, abs=1e-6)
    assert surprise(chances, chosen) < 4

    expected, variance, found = np.zeros(240), np.zeros(240), np.zeros(240)
    for p, c, numbers in zip(chances, chosen, items, strict=True):
        expected[numbers] += p
        variance[numbers] += p * (1 - p)
        found[numbers[c]] += 1
    chi2 = ((found - expected) ** 2 / variance).mean()  # about 1, give or take sqrt(2 / 240)
    assert 0.6 < chi2 < 1.4


def test_the_statistics_would_notice_a_wrong_oracle(small: tuple[Market, Log]) -> None:
    """Asked about another user, or two drift periods late, the chances do not fit."""
    market, log = small
    other = log._replace(user=(log.user + 1) % 20)
    assert surprise(*item_choices(market, other, every=20)[:2]) > 6
    later = log._replace(time=log.time + 60 * DAY)
    assert surprise(*item_choices(market, later, every=6)[:2]) > 6


def test_categories_are_chosen_with_the_stated_chances(small: tuple[Market, Log]) -> None:
    market, log = small
    new = np.flatnonzero(np.append(True, ~same_user(log)))
    chances, chosen = [], []
    for e in range(0, len(log.item), 5):
        current = None if e in new else int(log.category[e - 1])
        chances.append(market.next_category(int(log.user[e]), log.time[e], current))
        chosen.append(int(log.category[e]))
    for p in chances[::50]:
        assert p.sum() == pytest.approx(1, abs=1e-6)
    assert surprise(chances, chosen) < 4


def test_taste_and_popularity_make_the_chance_of_an_item(small: tuple[Market, Log]) -> None:
    """chance / exp(taste) is the item's popularity: the same for every user and time, up to a factor."""
    market, _ = small
    items = market.items_of(2)
    popularity = []
    for user, at in ((0, market.config.start), (7, market.config.end), (7, market.config.end - 20 * DAY)):
        taste = market.taste(np.full(len(items), user), items, at)
        weight = market.next_item(user, 2, at) / np.exp(taste)
        popularity.append(weight / weight.sum())
    np.testing.assert_allclose(popularity[0], popularity[1], rtol=1e-4)
    np.testing.assert_allclose(popularity[0], popularity[2], rtol=1e-4)


def test_the_oracle_beats_popularity_and_recency_does_not_suffice(medium: tuple[Market, Log]) -> None:
    market, log = medium
    popular = np.bincount(log.item, minlength=market.config.items)
    hits = np.zeros(2)
    chosen_rows = np.random.default_rng(0).integers(len(log.item), size=600)
    for e in chosen_rows:
        items = market.items_of(int(log.category[e]))
        first = int(np.searchsorted(log.user, log.user[e]))
        met = log.item[first:e][log.category[first:e] == log.category[e]]
        chance = market.next_item(int(log.user[e]), int(log.category[e]), log.time[e], met)
        target = int(np.flatnonzero(items == log.item[e])[0])
        for k, score in enumerate((chance, popular[items])):
            hits[k] += (score > score[target]).sum() < 10
    oracle, popularity = hits / len(chosen_rows)
    assert oracle > 1.5 * popularity


def test_taste_has_the_stated_spread_and_common_share() -> None:
    config = MarketConfig(400_000, 20_000, items=3_000, categories=30, seed=2)
    market = Market(config)
    rng = np.random.default_rng(0)
    users = np.arange(20_000)
    styles = market.style_of(np.arange(3_000))
    by_style = [np.flatnonzero(styles == g) for g in range(config.styles)]
    g = rng.integers(config.styles, size=20_000)
    a, b = (np.array([rng.choice(by_style[s]) for s in g]) for _ in range(2))
    apart = market.category_of(a) != market.category_of(b)
    taste_a, taste_b = market.taste(users, a, config.end), market.taste(users, b, config.end)
    assert taste_a.std() == pytest.approx(config.sharpness, rel=0.08)
    correlation = np.corrcoef(taste_a[apart], taste_b[apart])[0, 1]
    assert correlation == pytest.approx(config.common, abs=0.06)


def test_taste_and_interests_drift_and_some_of_them_lasts(medium: tuple[Market, Log]) -> None:
    market, _ = medium
    config = market.config
    users, items = np.arange(2_000), np.random.default_rng(0).integers(config.items, size=2_000)

    def alike(days: float) -> float:
        earlier = market.taste(users, items, config.end - days * DAY)
        return float(np.corrcoef(market.taste(users, items, config.end), earlier)[0, 1])

    assert alike(0.1) > 0.99
    assert alike(0.1) > alike(15) > alike(70)
    assert alike(70) == pytest.approx(1 - config.moving, abs=0.06)
    assert alike(300) == pytest.approx(1 - config.moving, abs=0.06)

    def moved(days: float) -> float:
        pairs = [
            (market.interests(u, config.end), market.interests(u, config.end - days * DAY)) for u in range(50)
        ]
        return float(np.mean([np.abs(p - q).sum() / 2 for p, q in pairs]))

    assert moved(0.1) < 0.02 < 0.15 < moved(70) < 0.8  # the weights move, the categories last


def test_users_have_several_lasting_interests(medium: tuple[Market, Log]) -> None:
    market, _ = medium
    many = [
        (
            market.interests(u, market.config.end)
            > market.config.curiosity * market.category_popularity + 1e-9
        ).sum()
        for u in range(200)
    ]
    assert min(many) >= 1
    assert np.mean(many) > 3


def test_profile_fields_tell_of_interests(medium: tuple[Market, Log]) -> None:
    """Naive Bayes over the three fields finds a user's top category far oftener than popularity does."""
    market, log = medium
    config = market.config
    share = np.zeros((config.users, config.categories))
    np.add.at(share, (log.user, log.category), 1)
    share /= share.sum(axis=1, keepdims=True)
    train, test = np.arange(0, config.users, 2), np.arange(1, config.users, 2)
    overall = share[train].mean(axis=0) + 1e-6
    score = np.log(overall)[None].repeat(len(test), axis=0)
    for name, values in PROFILE.items():
        value = market.profile_of(name, np.arange(config.users))
        for v in range(len(values)):
            alike = share[train][value[train] == v]
            smoothed = (alike.sum(axis=0) + 20 * overall) / (len(alike) + 20)
            score[value[test] == v] += np.log(smoothed / overall)
    top = share[test].argmax(axis=1)
    assert (score.argmax(axis=1) == top).mean() > 1.5 * (top == overall.argmax()).mean()


def test_item_features_tell_of_the_style(medium: tuple[Market, Log]) -> None:
    market, _ = medium
    items = np.arange(market.config.items)
    assert (market.brands_of(items) // 2 == market.style_of(items)).mean() == pytest.approx(0.7, abs=0.03)


def test_ids_tell_nothing_of_style_or_popularity(medium: tuple[Market, Log]) -> None:
    market, log = medium
    popular = np.bincount(log.item, minlength=market.config.items)
    for c in range(0, market.config.categories, 20):
        items = np.sort(market.items_of(c))
        assert abs(np.corrcoef(np.arange(len(items)), popular[items])[0, 1]) < 4.5 / np.sqrt(len(items))


# -- what items are worth


@pytest.fixture(scope="module")
def priced() -> tuple[Market, Log]:
    """Items differ in worth and nothing comes back, so that a purchase has the chance buy * exp(worth)."""
    config = MarketConfig.of_size(200_000, seed=4, quality=0.6, thrift=0.4, repeat=0.0, buy=0.05, cart=0.1)
    return Market(config), Market(config).log(0, config.users)


def test_worth_decides_about_carts_and_purchases_and_nothing_else(priced: tuple[Market, Log]) -> None:
    market, log = priced
    worth = market.worth(log.user, log.item)
    for kinds, share in ((("buy",), 0.05), (("buy", "cart"), 0.15)):
        found = np.isin(log.kind, [BEHAVIORS.index(kind) for kind in kinds])
        chance = np.minimum(1, share * np.exp(worth))
        for part in (worth < -0.8, (worth >= -0.8) & (worth < 0), (worth >= 0) & (worth < 0.8), worth > 0.8):
            assert part.sum() > 5_000
            spread = np.sqrt((chance * (1 - chance))[part].sum())
            assert abs((found - chance)[part].sum()) < 4 * spread
        top = worth > 0.8
        assert found[top].mean() > 2 * share
    plain = Market(dataclasses.replace(market.config, quality=0, thrift=0)).log(0, 100)
    for column, expected in zip(plain[:4], market.log(0, 100)[:4], strict=True):
        np.testing.assert_array_equal(column, expected)


def test_quality_and_thrift_have_the_stated_spread(priced: tuple[Market, Log]) -> None:
    market, log = priced
    quality = market.quality_of(np.arange(market.config.items))
    assert quality.mean() == pytest.approx(0, abs=0.03)
    assert quality.std() == pytest.approx(0.6, rel=0.04)
    thrift = market.thrift_of(np.arange(market.config.users))
    assert 0 <= thrift.min() < 0.02
    assert 0.78 < thrift.max() < 0.8
    assert thrift.mean() == pytest.approx(0.4, rel=0.05)

    band, minds = market.price_bands_of(log.item), market.thrift_of(log.user)
    worth = market.worth(log.user, log.item) - market.quality_of(log.item)
    np.testing.assert_allclose(worth, -minds * (band - 2))
    bought = log.kind == BEHAVIORS.index("buy")

    def dear_to_cheap(who: np.ndarray) -> float:
        return float(bought[who & (band == 4)].mean() / bought[who & (band == 0)].mean())

    assert dear_to_cheap(minds > 0.6) < 0.15 < 0.4 < dear_to_cheap(minds < 0.2)


def test_without_worth_all_items_are_bought_alike(medium: tuple[Market, Log]) -> None:
    market, log = medium
    assert not market.worth(log.user[:1_000], log.item[:1_000]).any()
    assert not market.quality_of([0, 1]).any()
    assert not market.thrift_of([0, 1]).any()


# -- items that come and go


@pytest.fixture(scope="module")
def passing() -> tuple[Market, Log]:
    """Few users with long lives among few items, of which a quarter is on offer: some styles have none."""
    config = MarketConfig(20_000, 20, items=240, categories=6, days=60, seed=5, styles=8, most=2_000)
    market = Market(dataclasses.replace(config, item_days=20))
    return market, market.log(0, 20)


@pytest.mark.parametrize(("days", "item_days"), [(60, 20.0), (60, 0.5), (30, 300.0)])
def test_the_same_share_of_the_items_is_on_offer_at_all_times(days: float, item_days: float) -> None:
    market = Market(MarketConfig(1_000, 10, items=30_000, categories=5, days=days, item_days=item_days))
    share = item_days / (days + item_days)
    for at in np.linspace(market.config.start, market.config.end, 7):
        found = market.on_offer(np.arange(30_000), at).mean()
        assert abs(found - share) < 4.5 * np.sqrt(share * (1 - share) / 30_000)


def test_an_item_comes_once_and_stays_as_long_as_asked() -> None:
    market = Market(MarketConfig(1_000, 10, items=500, categories=5, days=60, item_days=20))
    at = np.arange(market.config.start - 21 * DAY, market.config.end + 21 * DAY, DAY / 4)
    offered = market.on_offer(np.arange(500)[:, None], at[None])
    assert (np.abs(np.diff(offered.astype(int), axis=1)).sum(axis=1) == 2).all()
    assert set(offered.sum(axis=1).tolist()) <= {79, 80, 81}
    always = Market(MarketConfig(1_000, 10, items=500, categories=5))
    assert always.on_offer(np.arange(500)[:, None], at[None]).all()


@pytest.mark.parametrize(("items", "least"), [(4_000, 0.75), (40_000, 0.95)])
def test_most_new_choices_are_on_offer(items: int, least: float) -> None:
    """Of half the items, looking by style; a style of few items may have none on offer."""
    config = MarketConfig.of_size(100_000, seed=2, items=items, repeat=0.0, days=60, item_days=60.0)
    log = Market(config).log(0, config.users)
    assert Market(config).on_offer(log.item, log.time).mean() > least
    always = Market(dataclasses.replace(config, item_days=0.0)).log(0, config.users)
    assert Market(config).on_offer(always.item, always.time).mean() == pytest.approx(0.5, abs=0.05)
    for name in ("user", "category", "time", "kind"):
        np.testing.assert_array_equal(getattr(log, name), getattr(always, name))


def test_what_is_on_offer_is_chosen_with_the_stated_chances(passing: tuple[Market, Log]) -> None:
    market, log = passing
    chances, chosen, items = item_choices(market, log, every=5)
    assert surprise(chances, chosen) < 4
    expected, variance, found = np.zeros(240), np.zeros(240), np.zeros(240)
    for p, c, numbers in zip(chances, chosen, items, strict=True):
        expected[numbers] += p
        variance[numbers] += p * (1 - p)
        found[numbers[c]] += 1
    assert 0.6 < ((found - expected) ** 2 / variance).mean() < 1.4
    always = Market(dataclasses.replace(market.config, item_days=0.0))
    careless, chosen_10th, _ = item_choices(always, log, every=10)
    gain = [np.log(p[c] / q[c]) for p, q, c in zip(chances[::2], careless, chosen_10th, strict=True)]
    assert np.mean(gain) > 0.2  # nats of a choice, by knowing what is on offer


def test_looking_again_finds_each_item_as_often_as_stated(passing: tuple[Market, Log]) -> None:
    """Each style by itself, where all, some or none of its items are on offer."""
    market, _ = passing
    G, looks, at = market.config.styles, 20_000, market.config.end - 30.0 * DAY
    kinds = set()
    for category in range(6):
        items = market.items_of(category)
        style, p = market.style_of(items), market.next_item(3, category, at)
        assert p.sum() == pytest.approx(1, abs=1e-6)
        for g in np.unique(style):
            mine = items[style == g]
            event = np.arange(looks) + looks * (category * G + g)
            drawn = market._by_rank(np.full(looks, category * G + g), event, np.full(looks, at))
            found = (drawn[:, None] == mine).sum(axis=0)
            expected = looks * p[style == g] / p[style == g].sum()
            assert found.sum() == looks
            assert (np.abs(found - expected) < 5 * np.sqrt(expected) + 1).all()
            kinds.add((bool(market.on_offer(mine, at).any()), bool(market.on_offer(mine, at).all())))
    assert kinds >= {(False, False), (True, False)}


def test_chances_add_up_whatever_is_on_offer(passing: tuple[Market, Log]) -> None:
    market, _ = passing
    for at in np.linspace(market.config.start - 30 * DAY, market.config.end + 30 * DAY, 12):
        for category in range(6):
            items = market.items_of(category)
            assert market.next_item(1, category, at).sum() == pytest.approx(1, abs=1e-6)
            assert market.next_item(1, category, at, items[:3]).sum() == pytest.approx(1, abs=1e-6)
    nothing = market.config.end + 30 * DAY  # all are gone, so the last of eight looks stands
    always = Market(dataclasses.replace(market.config, item_days=0.0))
    np.testing.assert_allclose(market.next_item(1, 2, nothing), always.next_item(1, 2, nothing), rtol=1e-6)


# -- a choice of category by itself


def test_choices_are_those_of_the_log_and_of_the_interests(medium: tuple[Market, Log]) -> None:
    market, log = medium
    first = np.flatnonzero(np.append(True, ~same_user(log)))
    chosen = market.choices(log.user[first], log.time[first], first)
    np.testing.assert_array_equal(chosen, log.category[first])
    rng = np.random.default_rng(0)
    for user in (0, 77):
        at = market.config.end - 20.0 * DAY
        number = market.config.events + rng.integers(10**12, size=20_000)
        found = market.choices(np.full(20_000, user), np.full(20_000, at), number)
        expected = 20_000 * market.interests(user, at)
        count = np.bincount(found, minlength=market.config.categories)
        assert (np.abs(count - expected) < 4.5 * np.sqrt(expected) + 2).all()


def test_unknown_numbers_are_refused(small: tuple[Market, Log]) -> None:
    market, _ = small
    with pytest.raises(InputError, match="user number 20 is not in this market, which has 0 to 19"):
        market.taste([20], [0], 0)
    with pytest.raises(InputError, match="item number -1 is not in this market"):
        market.taste([0], [-1], 0)
    with pytest.raises(InputError, match="category number 6 is not in this market"):
        market.items_of(6)
    stranger = int(market.items_of(1)[0])
    with pytest.raises(InputError, match="the history holds items of other categories than 0"):
        market.next_item(0, 0, market.config.end, [stranger])
