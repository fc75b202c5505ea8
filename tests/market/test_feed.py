"""People in front of a feed: what they do fits the stated chances, and depends on what they saw alone."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from longretriever.errors import InputError
from longretriever.market import feed as module
from longretriever.market.feed import Feed, FeedConfig, Reaction, Visits, order_time
from longretriever.market.log import Market, MarketConfig

DAY = 86_400
PLAIN = FeedConfig(
    slots=1, open_minded=1, attention=1, tiring=0, known=1, click=-1.0
)  # only the taste decides
SEVERAL = FeedConfig(slots=4, visits=1.3, rest_hours=3, tiring=0.3, attention=0.8, open_minded=0.3)


@pytest.fixture(scope="module")
def market() -> Market:
    return Market(
        MarketConfig(
            60_000, 3_000, items=600, categories=12, days=60, seed=7, most=1_000, quality=0.6, thrift=0.4
        )
    )


def opened(market: Market, config: FeedConfig, luck: int = 0) -> Feed:
    return Feed(market, config, begin(market), luck)


def begin(market: Market) -> float:
    return market.config.end - 10.0 * DAY


def everyone(market: Market) -> np.ndarray:
    return np.arange(market.config.users)


def coming(feed: Feed, days: int) -> Iterator[Visits]:
    """Every visit of these days."""
    for day in range(days):
        yield from feed.visits(everyone(feed.market), day)


def pages_of(feed: Feed, visits: Visits, page: int, salt: int = 0) -> np.ndarray:
    """[V, S] a page that depends on nothing but the visit, some of its slots empty."""
    number = (visits.number[:, None] * 10 + page) * 100 + np.arange(feed.config.slots)
    item = (feed.market._draw(f"test {salt}", number) * feed.market.config.items).astype(np.int64)
    return np.where(feed.market._draw("test, empty", number) < 0.1, -1, item)


def lived(feed: Feed, days: range, users: np.ndarray, salt: int = 0) -> dict[tuple[int, int], tuple]:
    """All pages of these days: (number of the visit, page) -> user, items, clicks, orders, goes on."""
    found = {}
    for day in days:
        for visits in feed.visits(users, day):
            here = visits
            for page in range(feed.config.pages):
                item_VS = pages_of(feed, here, page, salt)
                reaction = feed.react(here, item_VS, page)
                for v, number in enumerate(here.number.tolist()):
                    seen = item_VS[v].tolist(), reaction.click[v].tolist(), reaction.order[v].tolist()
                    found[number, page] = int(here.user[v]), *seen, bool(reaction.goes_on[v])
                here = here.pick(reaction.goes_on)
                if len(here.user) == 0:
                    break
    return found


def z(found: np.ndarray, chance: np.ndarray) -> float:
    """Standard deviations by which a count of independent events misses its expectation."""
    return abs((found - chance).sum()) / np.sqrt((chance * (1 - chance)).sum())


def fits(found: np.ndarray, chance: np.ndarray) -> bool:
    """Overall, and in each fifth by chance."""
    fifths = np.array_split(np.argsort(chance), 5)
    return z(found, chance) < 4 and max(z(found[part], chance[part]) for part in fifths) < 4.5


def logistic(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def one_each(feed: Feed, days: int, page: int = 0) -> Iterator[tuple[Visits, np.ndarray, Reaction]]:
    """Visits that are shown one item each, with the item [V] and what came of it."""
    for visits in coming(feed, days):
        item = pages_of(feed, visits, page)[:, 0]
        visits, item = visits.pick(item >= 0), item[item >= 0]
        yield visits, item, feed.react(visits, item[:, None], page)


# -- the configuration


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        *(
            ({name: 1.2}, f"feed: {name} is 1.2, expected a share from 0 to 1")
            for name in ("more", "more_after_click", "open_minded", "attention", "known")
        ),
        *(({name: 0}, f"feed: {name} is 0, expected at least 1") for name in ("slots", "pages", "in_mind")),
        *(
            ({name: -0.5}, f"feed: {name} is -0.5, expected at least 0")
            for name in ("visits", "visit_spread", "tiring", "order_taste")
        ),
        ({"rest_hours": 0}, r"feed: rest_hours is 0, expected at least 0\.01"),
        ({"in_mind": 65}, "feed: in_mind is 65, expected at most 64"),
        ({"known": float("nan")}, "feed: known is nan, expected a share"),
        ({"tiring": float("nan")}, "feed: tiring is nan, expected at least 0"),
        ({"click": float("nan")}, "feed: click is nan, expected log-odds"),
        ({"order": float("nan")}, "feed: order is nan, expected log-odds"),
    ],
)
def test_an_impossible_feed_is_refused_with_the_reason(fields: dict[str, float], message: str) -> None:
    with pytest.raises(InputError, match=message):
        FeedConfig(**fields)  # type: ignore[arg-type]


@pytest.mark.parametrize("day", [-1, 1_000])
def test_a_day_that_cannot_be_numbered_is_refused(market: Market, day: int) -> None:
    with pytest.raises(InputError, match=f"day {day}: expected 0 to 999"):
        next(opened(market, PLAIN).visits(everyone(market), day))


# -- paired by design


def test_who_is_shown_the_same_does_the_same_whatever_others_are_shown(market: Market) -> None:
    some = np.arange(0, market.config.users, 3)
    all_ = lived(opened(market, SEVERAL), range(3), everyone(market))
    alone = lived(opened(market, SEVERAL), range(3), some)
    assert len(alone) > 2_000
    assert sum(any(clicks) for _, _, clicks, *_ in alone.values()) > 200
    assert alone == {key: seen for key, seen in all_.items() if seen[0] % 3 == 0}

    mixed = opened(market, SEVERAL)  # the others get other pages in the same batches
    for visits in coming(mixed, 3):
        same = visits.user % 3 == 0
        for page in range(SEVERAL.pages):
            item_VS = np.where(
                same[:, None], pages_of(mixed, visits, page), pages_of(mixed, visits, page, salt=1)
            )
            reaction = mixed.react(visits, item_VS, page)
            for v in np.flatnonzero(same):
                seen = item_VS[v].tolist(), reaction.click[v].tolist(), reaction.order[v].tolist()
                expected = alone[int(visits.number[v]), page]
                assert expected == (int(visits.user[v]), *seen, bool(reaction.goes_on[v]))
            visits, same = visits.pick(reaction.goes_on), same[reaction.goes_on]
            if len(visits.user) == 0:
                break


def test_what_a_visit_does_depends_on_no_batch_and_no_order(market: Market) -> None:
    together, apart = opened(market, SEVERAL), opened(market, SEVERAL)
    rng = np.random.default_rng(0)
    for visits in coming(together, 2):
        item_VS = pages_of(together, visits, 0)
        whole = together.react(visits, item_VS, 0)
        for part in np.array_split(rng.permutation(len(visits.user)), 3):
            reaction = apart.react(visits.pick(part), item_VS[part], 0)
            for column, expected in zip(reaction, whole, strict=True):
                np.testing.assert_array_equal(column, expected[part])


def test_the_same_people_come_but_their_luck_differs(market: Market) -> None:
    first, again, other = (opened(market, PLAIN, luck) for luck in (0, 0, 1))
    differ = clicks = 0
    for a, b, c in zip(*(coming(feed, 2) for feed in (first, again, other)), strict=True):
        for x, y in zip((*a, *a), (*b, *c), strict=True):
            np.testing.assert_array_equal(x, y)
        np.testing.assert_array_equal(first._in_mind(a), other._in_mind(a))
        item_VS = pages_of(first, a, 0)
        reactions = [feed.react(a, item_VS, 0) for feed in (first, again, other)]
        for x, y in zip(reactions[0], reactions[1], strict=True):
            np.testing.assert_array_equal(x, y)
        differ += (reactions[0].click != reactions[2].click).sum()
        clicks += reactions[0].click.sum()
    assert 0.5 * clicks < differ < 2 * clicks


def test_an_earlier_run_can_be_taken_over_exactly(market: Market) -> None:
    """Shown the same two days, one page after the other or all at once, the third day is the same."""
    went_on, took_over = opened(market, SEVERAL), opened(market, SEVERAL)
    for visits in coming(went_on, 2):
        for page in range(2):
            item_VS = pages_of(went_on, visits, page)
            reaction = went_on.react(visits, item_VS, page)
            row, slot = np.nonzero(item_VS >= 0)
            time = visits.time[row] + page * module.PAGE_SECONDS
            took_over.remember(visits.user[row], item_VS[row, slot], time, reaction.click[row, slot])
    everything = opened(market, SEVERAL)
    lines: list[list[np.ndarray]] = []
    feed = opened(market, SEVERAL)
    for visits in coming(feed, 2):
        for page in range(2):
            item_VS = pages_of(feed, visits, page)
            click = feed.react(visits, item_VS, page).click
            row, slot = np.nonzero(item_VS >= 0)
            time = visits.time[row] + page * module.PAGE_SECONDS
            lines.append([visits.user[row], item_VS[row, slot], time, click[row, slot]])
    everything.remember(*map(np.concatenate, zip(*lines, strict=True)))

    expected = lived(went_on, range(2, 3), everyone(market))
    assert lived(took_over, range(2, 3), everyone(market)) == expected
    assert lived(everything, range(2, 3), everyone(market)) == expected
    assert lived(opened(market, SEVERAL), range(2, 3), everyone(market)) != expected
    for fresh in (took_over, everything):
        np.testing.assert_array_equal(fresh._tired.count, went_on._tired.count)
        np.testing.assert_array_equal(fresh._met[1], went_on._met[1])


# -- when they come


@pytest.mark.parametrize("mean", [0.4, 1.0, 2.5])
def test_visits_have_the_asked_mean_and_fall_within_their_day(market: Market, mean: float) -> None:
    feed = opened(market, FeedConfig(visits=mean))
    count = np.zeros((4, market.config.users))
    times, numbers = [], []
    for day in range(4):
        last = np.full(market.config.users, -1.0)
        for nth, visits in enumerate(feed.visits(everyone(market), day)):
            assert (count[day, visits.user] == nth).all()  # everyone's first, second and so on
            count[day, visits.user] += 1
            assert (visits.time >= last[visits.user]).all()
            last[visits.user] = visits.time
            times.append(visits.time - begin(market) - day * DAY)
            numbers.append(visits.number)
    second, number = np.concatenate(times), np.concatenate(numbers)
    assert len(np.unique(number)) == len(number)
    assert second.min() >= 0
    assert second.max() < DAY
    assert second.mean() == pytest.approx(DAY / 2, rel=0.03)
    assert second.std() == pytest.approx(DAY / np.sqrt(12), rel=0.03)
    assert count.mean() == pytest.approx(mean, rel=0.08)  # 0.8 / sqrt(3,000) of it for the rates, twice that
    assert np.corrcoef(count[0], count[3])[0, 1] > 0.1  # whoever comes often does so on all days


def test_without_spread_the_counts_are_those_of_poisson(market: Market) -> None:
    feed = opened(market, FeedConfig(visits=1.5, visit_spread=0))
    count = np.zeros((4, market.config.users), int)
    for day in range(4):
        for visits in feed.visits(everyone(market), day):
            count[day, visits.user] += 1
    share = np.bincount(count.ravel(), minlength=11)[:6] / count.size
    pmf = poisson_pmf(1.5)[:6]
    assert (np.abs(share - pmf) < 4 * np.sqrt(pmf / count.size)).all()
    assert abs(np.corrcoef(count[0], count[1])[0, 1]) < 4.5 / np.sqrt(market.config.users)


@pytest.mark.parametrize("mean", [0, 1_000.0])
def test_nobody_comes_oftener_than_ten_times_a_day(market: Market, mean: float) -> None:
    rounds = list(opened(market, FeedConfig(visits=mean, visit_spread=0)).visits(everyone(market), 0))
    assert [len(visits.user) for visits in rounds] == [market.config.users] * (10 if mean else 0)


def test_a_subset_of_users_comes_as_it_would_among_all(market: Market) -> None:
    feed = opened(market, FeedConfig(visits=2))
    some = np.array([5, 700, 2_999])
    rounds = zip(feed.visits(some, 3), feed.visits(everyone(market), 3), strict=False)
    for few, all_ in rounds:
        for column, whole in zip(few, all_.pick(np.isin(all_.user, some)), strict=True):
            np.testing.assert_array_equal(column, whole)


def test_users_in_32_bits_are_numbered_like_others() -> None:
    """As a log has them: user 214,749 times 10,000 would not fit."""
    world = Market(MarketConfig(220_000, 220_000, items=9, categories=2, least=1))
    feed = opened(world, FeedConfig(visits=5))
    last = np.arange(219_000, 220_000)
    narrow, wide = (next(feed.visits(last.astype(kind), 9)) for kind in (np.int32, np.int64))
    for column, expected in zip(narrow, wide, strict=True):
        np.testing.assert_array_equal(column, expected)
    assert narrow.number.min() > 2**31


# -- what they click


def test_taste_decides_about_a_click(market: Market) -> None:
    feed, found, chance = opened(market, PLAIN), [], []
    for visits, item, reaction in one_each(feed, 5):
        found.append(reaction.click[:, 0])
        chance.append(logistic(PLAIN.click + market.taste(visits.user, item, visits.time)))
    assert fits(np.concatenate(found), np.concatenate(chance))
    flat = np.full(sum(map(len, chance)), np.concatenate(chance).mean())
    assert not fits(np.concatenate(found), np.roll(np.concatenate(chance), 1))  # nor would a wrong taste
    assert z(np.concatenate(found), 0.93 * flat) > 4  # nor a chance that is 7% lower


def test_later_slots_are_looked_at_less(market: Market) -> None:
    config = dataclasses.replace(PLAIN, slots=8, attention=0.8, click=1.0)
    feed, found, chance = opened(market, config), [], []
    for visits in coming(feed, 2):
        item_VS = pages_of(feed, visits, 0)
        reaction = feed.react(visits, item_VS, 0)
        row, slot = np.nonzero(item_VS >= 0)
        taste = market.taste(visits.user[row], item_VS[row, slot], visits.time[row])
        found.append(np.stack([slot, reaction.click[row, slot]]))
        chance.append(logistic(1.0 + taste) * 0.8**slot)
    (slot, click), p = np.concatenate(found, axis=1), np.concatenate(chance)
    for s in range(8):
        assert z(click[slot == s], p[slot == s]) < 4
    assert z(click[slot == 7], p[slot == 7] / 0.8) > 4


@pytest.mark.parametrize("in_mind", [1, 5, 64])
def test_what_a_visit_is_not_open_to_is_clicked_less(market: Market, in_mind: int) -> None:
    config = dataclasses.replace(PLAIN, open_minded=0.2, in_mind=in_mind, click=1.0)
    feed, found, chance, careless = opened(market, config), [], [], []
    for visits, item, reaction in one_each(feed, 1):
        category = market.category_of(item)
        interest = np.array(
            [market.interests(u, t)[c] for u, t, c in zip(visits.user, visits.time, category, strict=True)]
        )
        open_to = 1 - (1 - interest) ** in_mind
        liked = logistic(1.0 + market.taste(visits.user, item, visits.time))
        found.append(reaction.click[:, 0])
        chance.append(liked * (open_to + (1 - open_to) * 0.2))
        careless.append(liked)
    assert fits(np.concatenate(found), np.concatenate(chance))
    assert z(np.concatenate(found), np.concatenate(careless)) > 4


def test_what_is_in_mind_is_drawn_from_the_interests_of_the_moment(market: Market) -> None:
    feed = opened(market, FeedConfig(visits=10, visit_spread=0, in_mind=20))
    found, expected, draws = np.zeros(12), np.zeros(12), 0
    for day in range(2):
        for visits in feed.visits(np.arange(40), day):
            found += np.bincount(feed._in_mind(visits).ravel(), minlength=12)
            draws += 20 * len(visits.user)
            for user, time in zip(visits.user, visits.time, strict=True):
                expected += 20 * market.interests(int(user), float(time))
    assert draws > 10_000
    assert (np.abs(found - expected) < 4.5 * np.sqrt(expected)).all()


def test_what_was_met_before_is_clicked_less(market: Market) -> None:
    """In the log before the feed began; what is met in the log later does not count."""
    feed = opened(market, dataclasses.replace(PLAIN, known=0.3, click=2.0))
    log = market.log(0, market.config.users)
    newest = np.append(log.user[1:] != log.user[:-1], True)  # each user's last behavior
    item_of = log.item[newest].astype(np.int64)
    before = {
        (int(u), int(i)) for u, i, t in zip(log.user, log.item, log.time, strict=True) if t < begin(market)
    }
    found, chance, known = [], [], []
    for day in range(3):
        for visits in feed.visits(everyone(market), day):
            item = item_of[visits.user]
            seen = feed.has_met(visits.user, item)
            for u, i, s in zip(visits.user.tolist(), item.tolist(), seen.tolist(), strict=True):
                assert s == ((u, i) in before)
            reaction = feed.react(visits, item[:, None], 0)
            before |= {(int(u), int(item_of[u])) for u in visits.user[reaction.click[:, 0]]}
            found.append(reaction.click[:, 0])
            known.append(seen)
            chance.append(logistic(2.0 + market.taste(visits.user, item, visits.time)))
    click, p, seen = np.concatenate(found), np.concatenate(chance), np.concatenate(known)
    assert seen.sum() > 1_000
    assert (~seen).sum() > 100
    assert fits(click[seen], 0.3 * p[seen])
    assert z(click[~seen], p[~seen]) < 4


def test_what_was_met_elsewhere_counts_too(market: Market) -> None:
    feed = opened(market, PLAIN)
    users, items = np.arange(200), np.full(200, 17)
    before = feed.has_met(users, items)
    feed.meets(users[::2], items[::2])
    np.testing.assert_array_equal(feed.has_met(users, items), before | (users % 2 == 0))
    feed.react(next(feed.visits(users, 0)), np.full((len(next(feed.visits(users, 0)).user), 1), 18), 0)
    assert feed.has_met(users, items)[::2].all()


def test_more_of_a_category_tires_and_rest_helps(market: Market) -> None:
    """Against lists of all that was shown, one after the other."""
    config = dataclasses.replace(PLAIN, slots=3, tiring=0.5, rest_hours=5, click=2.0, visits=3)
    feed, found, chance, fresh = opened(market, config), [], [], []
    shown: dict[tuple[int, int], list[float]] = defaultdict(list)
    for visits in coming(feed, 2):
        for page in range(2):
            item_VS = pages_of(feed, visits, page)
            reaction = feed.react(visits, item_VS, page)
            row, slot = np.nonzero(item_VS >= 0)
            user, item = visits.user[row].tolist(), item_VS[row, slot]
            category, at = market.category_of(item).tolist(), visits.time[row] + page * 60
            left = [
                sum(0.5 ** ((t - s) / 18_000) for s in shown[u, c])
                for u, c, t in zip(user, category, at, strict=True)
            ]
            for u, c, t in zip(user, category, at, strict=True):  # a page does not tire of itself
                shown[u, c].append(t)
            liked = logistic(2.0 + market.taste(np.array(user), item, visits.time[row]))
            found.append(reaction.click[row, slot])
            chance.append(liked * np.exp(-0.5 * np.array(left)))
            fresh.append(liked)
    assert fits(np.concatenate(found), np.concatenate(chance))
    assert z(np.concatenate(found), np.concatenate(fresh)) > 6


def test_all_of_it_multiplies(market: Market) -> None:
    config = FeedConfig(slots=6, click=0.5, tiring=0.2, known=0.5, attention=0.9, open_minded=0.4, in_mind=3)
    feed, found, chance = opened(market, config), [], []
    shown: dict[tuple[int, int], list[float]] = defaultdict(list)
    for visits in coming(feed, 2):
        for page in range(2):
            item_VS = pages_of(feed, visits, page)
            row, slot = np.nonzero(item_VS >= 0)
            user, item = visits.user[row], item_VS[row, slot]
            category, at = market.category_of(item), visits.time[row] + page * 60
            open_to = (feed._in_mind(visits)[row] == category[:, None]).any(axis=1)
            met = feed.has_met(user, item)
            left = [
                sum(0.5 ** ((t - s) / 43_200) for s in shown[int(u), int(c)])
                for u, c, t in zip(user, category, at, strict=True)
            ]
            for u, c, t in zip(user, category, at, strict=True):
                shown[int(u), int(c)].append(float(t))
            found.append(feed.react(visits, item_VS, page).click[row, slot])
            chance.append(
                logistic(0.5 + market.taste(user, item, visits.time[row]))
                * 0.9**slot
                * np.where(open_to, 1, 0.4)
                * np.where(met, 0.5, 1)
                * np.exp(-0.2 * np.array(left))
            )
    assert fits(np.concatenate(found), np.concatenate(chance))


# -- what comes after a click


def test_orders_follow_clicks_by_taste_and_worth(market: Market) -> None:
    config = dataclasses.replace(PLAIN, order=-1.0, order_taste=0.5)
    found, chance, worths = [], [], []
    for visits, item, reaction in one_each(opened(market, config), 5):
        click, order = reaction.click[:, 0], reaction.order[:, 0]
        assert not (order & ~click).any()
        user, item, time = visits.user[click], item[click], visits.time[click]
        taste, worth = market.taste(user, item, time), market.worth(user, item)
        found.append(order[click])
        chance.append(logistic(-1.0 + 0.5 * taste + worth))
        worths.append(worth)
    order, p, worth = (np.concatenate(parts) for parts in (found, chance, worths))
    assert fits(order, p)
    for part in (worth < -0.5, worth > 0.5):
        assert z(order[part], p[part]) < 4
        assert z(order[part], np.full(part.sum(), p.mean())) > 4


def test_without_its_share_taste_does_not_count_for_an_order(market: Market) -> None:
    config = dataclasses.replace(PLAIN, click=np.inf, order=-2.0, order_taste=0)
    found, chance = [], []
    for visits, item, reaction in one_each(opened(market, config), 2):
        assert reaction.click.all()
        found.append(reaction.order[:, 0])
        chance.append(logistic(-2.0 + market.worth(visits.user, item)))
    assert fits(np.concatenate(found), np.concatenate(chance))


def test_who_clicks_reads_on_but_not_for_ever(market: Market) -> None:
    feed = opened(market, FeedConfig(pages=3, more=0.4, more_after_click=0.9, click=0.0))
    went_on, clicked = [], []
    for visits in coming(feed, 3):
        for page in range(3):
            reaction = feed.react(visits, pages_of(feed, visits, page), page)
            if page == 2:
                assert not reaction.goes_on.any()
            else:
                went_on.append(reaction.goes_on)
                clicked.append(reaction.click.any(axis=1))
    more, click = np.concatenate(went_on), np.concatenate(clicked)
    assert click.sum() > 1_000
    assert (~click).sum() > 1_000
    assert z(more[click], np.full(click.sum(), 0.9)) < 4
    assert z(more[~click], np.full((~click).sum(), 0.4)) < 4


def test_a_click_comes_three_seconds_a_slot_after_its_page(market: Market) -> None:
    feed = opened(market, FeedConfig(slots=4))
    visits = next(feed.visits(everyone(market), 0))
    for page in (0, 3):
        time_VS = feed.react(visits, pages_of(feed, visits, page), page).time
        expected = visits.time[:, None] + 60 * page + [3, 6, 9, 12]
        np.testing.assert_array_equal(time_VS, expected)
        np.testing.assert_array_equal(order_time(time_VS), expected + 20)


def test_empty_slots_are_never_clicked_and_tire_nobody(market: Market) -> None:
    feed = opened(market, dataclasses.replace(SEVERAL, click=np.inf, attention=1, open_minded=1, known=1))
    visits = next(feed.visits(everyone(market), 0))
    item_VS = pages_of(feed, visits, 0)
    nothing = feed.react(visits, np.full_like(item_VS, -1), 0)
    assert not nothing.click.any()
    assert not nothing.order.any()
    np.testing.assert_array_equal(feed.react(visits, item_VS, 1).click, item_VS >= 0)  # nor were they tired
    nobody = feed.react(visits.pick(np.array([], int)), item_VS[:0], 2)
    assert [len(column) for column in nobody] == [0, 0, 0, 0]


# -- fast paths against slow truths


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 4), st.integers(0, 40_000), st.booleans()), max_size=40),
    st.sampled_from([20.0, 3_600.0, 43_200.0, 1e9]),
)
def test_counts_fade_by_half(added: list[tuple[int, int, bool]], half: float) -> None:
    """Of keys in any order, together or one by one; of times up to 80,000 half times after the first."""
    begun = 1_700_000_000
    fading, at = module._Fading(half, begun), begun
    naive: dict[int, list[int]] = defaultdict(list)
    waiting: list[tuple[int, int]] = []
    every = np.arange(5)

    def asked(now: int) -> None:
        if waiting:
            fading.add(*np.array(waiting).T)
            waiting.clear()
        expected = [sum(0.5 ** ((now - t) / half) for t in naive[k]) for k in every.tolist()]
        np.testing.assert_allclose(fading.of(every, np.full(5, now)), expected, rtol=1e-9, atol=1e-300)

    for key, later, asks in added:
        at += later
        naive[key].append(at)
        waiting.append((key, at))
        if asks:
            asked(at + 7)
    asked(at + 30)


def test_a_count_does_not_overflow_in_a_long_run(market: Market) -> None:
    """1,000 days of 12 hours are 2,000 half times; 2 ** 2,000 is no number."""
    feed = opened(market, FeedConfig())
    user, item = np.array([3]), np.array([4])
    for day in (0, 999):
        feed.remember(user, item, np.array([begin(market) + day * DAY]), np.array([False]))
    group = feed._group(user, market.category_of(item))
    at = begin(market) + 999.5 * DAY
    assert feed._tired.of(group, np.array([at])).tolist() == pytest.approx([0.5])


def poisson_pmf(rate: float) -> np.ndarray:
    """0 to 9, and 10 or more."""
    pmf = np.exp(-rate) * rate ** np.arange(10) / np.cumprod([1, *range(1, 10)])
    return np.append(pmf, 1 - pmf.sum())


@settings(max_examples=40, deadline=None)
@given(st.floats(0, 30))
def test_counts_of_visits_are_those_of_poisson(rate: float) -> None:
    draw = (np.arange(20_000) + 0.5) / 20_000
    count = module._poisson(np.full(20_000, rate), draw, 10)
    np.testing.assert_allclose(np.bincount(count, minlength=11) / 20_000, poisson_pmf(rate), atol=2e-4)
    assert (np.diff(count) >= 0).all()
