"""A day of an arm: what is dealt, remembered and written down is what a slow program would say."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from longretriever.experiment.ab import day as module
from longretriever.experiment.ab.day import (
    Candidates,
    Day,
    Numbering,
    Platform,
    Shown,
    _brought,
    _Lately,
    _nth,
    _Pages,
    write,
)
from longretriever.experiment.ab.plan import PlatformConfig
from longretriever.experiment.ab.ranking import Features, Ranker, Statistics
from longretriever.market import Market, MarketConfig
from longretriever.market.feed import PAGE_SECONDS, Feed, FeedConfig
from longretriever.store.behaviors import Life
from longretriever.store.live import Journal, Reader
from tests.worlds import stored, table

DAY = 86_400

# -- dealing out pages


@st.composite
def dealt(draw):
    """Candidates of some visits, one of them perhaps without any, with ties of scores and few categories."""
    visits, n = draw(st.integers(1, 4)), draw(st.integers(0, 30))
    row = np.sort(draw(st.lists(st.integers(0, visits - 1), min_size=n, max_size=n)))
    category = np.array(draw(st.lists(st.integers(0, 3), min_size=n, max_size=n)), np.int64)
    score = np.array(draw(st.lists(st.integers(0, 5), min_size=n, max_size=n)), np.float64)
    slots, most = draw(st.integers(1, 5)), draw(st.integers(1, 3))
    pages = draw(st.integers(1, 4))
    one = st.one_of(st.just(-1.0), st.floats(0, 1, exclude_max=True, width=32))
    explored = np.array(
        draw(st.lists(one, min_size=pages * visits * slots, max_size=pages * visits * slots)), np.float32
    ).reshape(pages, visits, slots)
    stays = [draw(st.lists(st.booleans(), min_size=visits, max_size=visits)) for _ in range(pages)]
    return np.asarray(row, np.int64), category, score, slots, most, explored, stays


def slowly(row, category, score, slots: int, most: int, explored, stays) -> list[list[list[int]]]:
    """Pages of each visit, as lists of candidates; nothing for who has left."""
    out, visits = [], explored.shape[1]
    ranked = [sorted(np.flatnonzero(row == v).tolist(), key=lambda n: (-score[n], n)) for v in range(visits)]
    left, here = [list(of) for of in ranked], set(range(visits))
    for page in range(len(explored)):
        out.append([[] for _ in range(visits)])
        for v in sorted(here):
            chosen: list[int] = []
            for n in left[v]:
                of_one = sum(category[other] == category[n] for other in chosen)
                if of_one < most and len(chosen) < slots:
                    chosen.append(n)
            for slot in range(len(chosen)):
                if explored[page, v, slot] >= 0:
                    n = ranked[v][int(float(explored[page, v, slot]) * len(ranked[v]))]
                    others = chosen[:slot] + chosen[slot + 1 :]
                    fits = sum(category[other] == category[n] for other in others) < most
                    if n in left[v] and n not in chosen and fits:
                        chosen[slot] = n
            left[v] = [n for n in left[v] if n not in chosen]
            out[page][v] = chosen
        here = {v for v in here if stays[page][v]}
    return out


@settings(deadline=None, max_examples=200)
@given(dealt())
def test_pages_are_those_of_a_slow_dealer(given_):
    row, category, score, slots, most, explored, stays = given_
    pages, here = _Pages(row, category, score, slots, most), np.arange(explored.shape[1])
    seen: list[int] = []
    for page, wanted in enumerate(slowly(*given_)):
        found = pages.next(here, explored[page])
        assert found.shape == explored[page].shape
        for v, on_page in enumerate(found.tolist()):
            there = [n for n in on_page if n >= 0]
            assert on_page == wanted[v] + [-1] * (slots - len(wanted[v]))
            assert max(Counter(category[there].tolist()).values(), default=0) <= most
            seen += there
        here = here[np.array(stays[page])[here]]
    assert len(set(seen)) == len(seen), "never twice in a visit"


def test_a_random_candidate_is_any_of_the_visit_and_never_one_that_was_shown():
    pages = _Pages(np.array([0, 0, 0, 0, 1]), np.arange(5), np.array([1.0, 2, 3, 4, 9]), 2, 1)
    here, no = np.arange(2), -1.0
    assert pages.next(here, np.array([[0.99, no], [0.5, no]])).tolist() == [[0, 2], [4, -1]]
    assert pages.next(here, np.array([[0.99, 0.3], [no, no]])).tolist() == [[3, 1], [-1, -1]]


# -- what was shown lately

# Around two midnights, to the second: whether an edge counts must not depend on who is asked beside.
TIMES = [day * DAY + second for day in range(4) for second in (0, 1, 59, 60, DAY // 2, DAY - 1)]
USER, ITEM, TIME = st.integers(0, 3), st.integers(0, 5), st.sampled_from(TIMES)
THREE = st.lists(st.tuples(USER, ITEM, TIME), max_size=25)
CATEGORY_OF = np.array([0, 0, 1, 2, 2, 2])


def columns(rows: Sequence[tuple[int, ...]]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    user, item, time = np.array(rows, np.int64).reshape(-1, 3).T
    return user, item, time


@settings(deadline=None, max_examples=150)
@given(st.lists(THREE, max_size=3), THREE, THREE)
def test_what_was_shown_lately_is_a_count(adds, asked, again):
    lately, shown = _Lately(), [one for rows in adds for one in rows]
    for rows in adds:
        lately.add(*columns(rows))
    for questions in (asked, again):
        user, item, at = columns(questions)
        wanted = [any((u, i) == (s, j) and t >= a - DAY for s, j, t in shown) for u, i, a in questions]
        assert lately.has(user, item, at).tolist() == wanted
        category = CATEGORY_OF[item]
        counts = [
            sum(s == u and CATEGORY_OF[j] == c and a - DAY <= t < a for s, j, t in shown)
            for u, c, a in zip(user, category, at, strict=True)
        ]
        assert lately.of_category(user, category, at, CATEGORY_OF).tolist() == counts


def test_a_question_is_answered_alike_whoever_is_asked_beside():
    """The item was shown to both exactly 24 hours ago."""
    lately, user = _Lately(), np.array([0, 1])
    lately.add(user, np.array([7, 7]), np.array([1000, 1050]))
    at = np.array([1000, 1050]) + DAY
    assert lately.has(user, np.array([7, 7]), at).tolist() == [True, True]
    assert [lately.has(user[n : n + 1], np.array([7]), at[n : n + 1]).item() for n in (0, 1)] == [True, True]


# -- counting


@given(st.lists(st.integers(0, 5), max_size=30))
def test_nth_is_how_many_came_before(key):
    assert _nth(np.array(key, np.int64)).tolist() == [key[:n].count(k) for n, k in enumerate(key)]


@given(st.lists(st.tuples(st.integers(0, 2), st.integers(1, 15)), max_size=30))
def test_brought_counts_candidates_by_route(rows):
    row, routes = np.array(rows, np.int64).reshape(-1, 2).T
    found = Candidates(row, np.arange(len(row)), routes.astype(np.uint32))
    for alone in (0, 1):
        wanted = np.zeros((3, 4), int)
        for visit, bits in rows:
            for route in range(4):
                wanted[visit, route] += bits == 1 << route if alone else bits >> route & 1
        assert _brought(found, 3, 4, alone).tolist() == wanted.tolist()


def test_the_last_route_has_a_bit_too():
    found = Candidates(np.zeros(2, int), np.arange(2), np.array([1 << 31, 1 << 31 | 1], np.uint32))
    assert _brought(found, 1, 32, 0)[0, [0, 31]].tolist() == [1, 2]
    assert _brought(found, 1, 32, 1)[0, [0, 31]].tolist() == [0, 1]


def test_nothing_together_is_nothing():
    found = Shown.together([], 5)
    assert [column.shape for column in found] == [(0,)] * 8 + [(0, 5)]


# -- a whole day

CONFIG = MarketConfig(
    8_000, 80, items=150, categories=5, days=30, seed=3, most=1_000, least=20, item_days=25, gap_tail=2.0
)
BEGIN = CONFIG.end - 5 * DAY
USERS = np.arange(0, 80, 2)
FEED = FeedConfig(slots=3, pages=4, visits=6.0, click=0.5, order=0.0, open_minded=0.6)


@dataclass
class Bringing:
    """Asked like a route; writes down whom it was asked for, and what it brought."""

    brings: Callable[[int, int], list[int]]  # of (user id, n items): items of the store
    asked: dict[tuple[int, float], tuple[list[int], list[tuple[int, int]]]] = field(default_factory=dict)

    def find(self, lives: Sequence[Life], k: int, seed: int) -> list[np.ndarray]:
        found = []
        for life in lives:
            (user,) = life.store.user_ids.take([life.user])
            some = np.array(self.brings(user, len(life.store.category_start)), np.int64)[:k]
            met = life.recent(100_000)
            behaviors = list(zip(met.item.tolist(), met.time.tolist(), strict=True))
            assert (user, life.now) not in self.asked or self.asked[user, life.now][1] == behaviors
            self.asked[user, life.now] = some.tolist(), behaviors
            found.append(some)
        return found


class World:
    def __init__(self, path: Path) -> None:
        self.market = Market(CONFIG)
        log = self.market.log(0, CONFIG.users)
        before = log.time < BEGIN
        rows = table(
            *(column[before] for column in log[:4]), np.array(["click", "cart", "buy"])[log.kind[before]]
        )
        self.store = stored(rows, path)
        self.numbering = Numbering.of(self.store, CONFIG.items)
        events = np.bincount(self.store.event_item, minlength=self.store.n_items) * 1.0
        nothing = np.zeros(self.store.n_items)
        factors = np.zeros((self.store.n_items, 2), np.float32)
        self.features = Features(self.store, factors, Statistics(events, nothing, nothing))

    @contextmanager
    def platform(self, folder: Path, finders: dict, k: int = 60, **options) -> Iterator[Platform]:
        folder.mkdir(exist_ok=True)
        warming_up, draw = options.pop("warming_up", False), options.pop("draw", 0)
        feed = options.pop("feed", FEED)
        with closing(Journal(folder / "live.sqlite")) as journal:
            yield Platform(
                PlatformConfig(**{"explore": 0.1, "most_of_one": 2, **options}),
                finders,
                [k] * len(finders),
                Ranker(self.features, None),
                Reader(self.store, journal),
                Feed(self.market, feed, BEGIN),
                draw,
                warming_up,
            )

    def finders(self) -> dict[str, Bringing]:
        """Of overlapping lists, some of them empty."""
        I = self.store.n_items
        return {
            "even": Bringing(lambda user, _: list(range(0, I, 2))),
            "own": Bringing(lambda user, _: [(user * 7 + n) % I for n in range(user % 50)]),
            "none": Bringing(lambda user, _: []),
            "low": Bringing(lambda user, _: list(range(40)) if user % 4 else []),
        }


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> World:
    return World(tmp_path_factory.mktemp("day") / "store")


@dataclass
class Lived:
    finders: dict[str, Bringing]
    day: Day
    events: list


@pytest.fixture(scope="module")
def lived(world, tmp_path_factory) -> Lived:
    finders = world.finders()
    with world.platform(tmp_path_factory.mktemp("lived"), finders) as platform:
        day = platform.run(USERS, 0)
        journal = platform.reader.journal
        return Lived(finders, day, list(journal.between(0, journal.last())))


def start_of(shown: Shown) -> np.ndarray:
    """When each impression's visit began; none of these visits has a page that is not shown something."""
    began: dict[int, int] = {}
    for visit, time in zip(shown.visit.tolist(), shown.time.tolist(), strict=True):
        began[visit] = min(time, began.get(visit, time))
    return np.array([began[visit] for visit in shown.visit.tolist()])


def rows(shown: Shown) -> list[tuple]:
    """One for each impression, whatever order they came in."""
    few = [column.tolist() for column in shown[:-1]]
    return sorted((*row, feature.tobytes()) for *row, feature in zip(*few, shown.feature, strict=True))


def test_people_come_as_the_feed_says(world, lived):
    feed, count = Feed(world.market, FEED, BEGIN), Counter()
    for visits in feed.visits(USERS, 0):
        count.update(visits.user.tolist())
        for user, time in zip(visits.user.tolist(), visits.time.tolist(), strict=True):
            assert (user, time) in lived.finders["even"].asked
    assert lived.day.visits.tolist() == [count[user] for user in USERS.tolist()]
    assert max(count.values()) >= 5


def test_routes_are_counted_for_what_they_brought(lived):
    retrieved, alone = np.zeros((len(USERS), 4), int), np.zeros((len(USERS), 4), int)
    place = {user: n for n, user in enumerate(USERS.tolist())}
    for user, now in lived.finders["even"].asked:
        lists = [set(route.asked[user, now][0]) for route in lived.finders.values()]
        for r, mine in enumerate(lists):
            others = set().union(*(other for o, other in enumerate(lists) if o != r))
            retrieved[place[user], r] += len(mine)
            alone[place[user], r] += len(mine - others)
    # Two visits in one second would be one key here, so whoever has such a pair is left out.
    once = [sum(user == u for user, _ in lived.finders["even"].asked) for u in USERS.tolist()]
    same = lived.day.visits == once
    assert same.mean() > 0.9
    assert (lived.day.retrieved[same] == retrieved[same]).all()
    assert (lived.day.alone[same] == alone[same]).all()
    assert retrieved[:, 2].sum() == 0
    assert (alone[:, [0, 1, 3]].sum(axis=0) > 0).all()


def test_an_impression_knows_all_routes_that_had_brought_it(world, lived):
    shown, began = lived.day.shown, start_of(lived.day.shown)
    store_item = world.numbering.store_of[shown.item]
    for user, item, time, bits in zip(
        shown.user.tolist(), store_item.tolist(), began.tolist(), shown.routes.tolist(), strict=True
    ):
        brought = [item in route.asked[user, time][0] for route in lived.finders.values()]
        assert bits == sum(1 << r for r, one in enumerate(brought) if one) > 0
    assert len(set(shown.routes.tolist())) >= 5


def test_what_was_done_is_in_the_journal_with_its_kind_and_time(world, lived):
    shown, wanted = lived.day.shown, set()
    category = world.market.category_of(shown.item)
    for n in range(len(shown.user)):
        user, item, c = int(shown.user[n]), int(shown.item[n]), int(category[n])
        clicked = int(shown.time[n]) + 3 * (int(shown.slot[n]) + 1)
        if shown.click[n]:
            wanted.add((user, item, c, clicked, "click"))
        if shown.order[n]:
            wanted.add((user, item, c, clicked + 20, "buy"))
    assert {tuple(event[:5]) for event in lived.events} == wanted
    assert len(lived.events) == len(wanted) > 100
    assert sum(event.behavior == "buy" for event in lived.events) > 20


def test_the_next_visit_of_the_day_sees_it(world, lived):
    known = defaultdict(list)
    for user in USERS.tolist():
        rows_ = world.store.rows_of(world.store.user_number(user))
        known[user] = list(
            zip(world.store.event_item[rows_].tolist(), world.store.event_time[rows_].tolist(), strict=True)
        )
    for event in lived.events:
        known[event.user_id].append((int(world.numbering.store_of[event.item_id]), event.time))
    seen = 0
    for (user, now), (_, behaviors) in lived.finders["own"].asked.items():
        assert sorted(behaviors) == sorted(b for b in known[user] if b[1] < now)
        seen += sum(time >= BEGIN for _, time in behaviors)
    assert seen > 100


def test_pages_follow_each_other_and_slots_are_filled_from_the_first(lived):
    shown, by_page = lived.day.shown, defaultdict(list)
    for visit, time, slot in zip(
        *(column.tolist() for column in (shown.visit, shown.time, shown.slot)), strict=True
    ):
        by_page[visit, time].append(slot)
    assert all(sorted(slots) == list(range(len(slots))) for slots in by_page.values())
    page = (shown.time - start_of(shown)) // PAGE_SECONDS
    assert set(page.tolist()) == {0, 1, 2, 3}
    assert ((shown.time - start_of(shown)) % PAGE_SECONDS == 0).all()


def twice_within_a_day(shown: Shown) -> int:
    by_pair, found = defaultdict(list), 0
    for user, item, time in zip(
        *(column.tolist() for column in (shown.user, shown.item, shown.time)), strict=True
    ):
        by_pair[user, item].append(time)
    for times in by_pair.values():
        times.sort()
        found += sum(b - a < DAY for a, b in pairwise(times))
    return found


def test_nothing_is_shown_twice_within_24_hours_and_something_after_them(world, tmp_path):
    parts = []
    for day in range(3):
        with world.platform(tmp_path, world.finders(), most_of_one=3) as platform:
            for before in parts:
                platform.remember(before)
            parts.append(platform.run(USERS, day).shown)
    shown = Shown.together(parts, 0)
    assert twice_within_a_day(shown) == 0
    assert len(np.unique(shown.user * 1000 + shown.item)) < len(shown.user)


def test_visits_that_overlap_show_nothing_twice(world, tmp_path):
    """With so many visits, some begin before the last page of the one before."""
    feed = FeedConfig(slots=1, pages=5, visits=8.0, more=1.0, more_after_click=1.0)
    everything = {"all": Bringing(lambda user, _: list(range(world.store.n_items)))}
    with world.platform(tmp_path, everything, k=1000, feed=feed) as platform:
        shown = platform.run(np.arange(CONFIG.users), 0).shown
    until: dict[int, int] = {}
    overlaps = 0
    for user, visit, time in sorted(
        set(zip(shown.user.tolist(), shown.visit.tolist(), start_of(shown).tolist(), strict=True)),
        key=lambda one: (one[0], one[2]),
    ):
        overlaps += time <= until.get(user, 0)
        until[user] = int(shown.time[shown.visit == visit].max())
    assert overlaps > 5
    assert twice_within_a_day(shown) == 0


def test_what_is_not_on_offer_is_never_shown(world, lived):
    shown = lived.day.shown
    assert world.market.on_offer(shown.item, start_of(shown)).all()
    brought = {item for route in lived.finders.values() for some, _ in route.asked.values() for item in some}
    market_items = world.numbering.market_of[sorted(brought)]
    assert not world.market.on_offer(market_items, BEGIN + DAY / 2).all()


def test_what_was_shown_today_is_told_to_the_ranker(world, lived):
    shown, began = lived.day.shown, start_of(lived.day.shown)
    category = world.market.category_of(shown.item)
    column = world.features.names.index("category shown today")
    for n in range(0, len(shown.user), 3):
        same = (shown.user == shown.user[n]) & (category == category[n])
        assert shown.feature[n, column] == (same & (shown.time < began[n])).sum()
    assert shown.feature[:, column].max() > 5


def test_who_is_answered_together_changes_nothing(world, lived, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "TOGETHER", 7)
    with world.platform(tmp_path, world.finders()) as platform:
        day = platform.run(USERS, 0)
    assert rows(day.shown) == rows(lived.day.shown)
    for one, other in zip(day[1:], lived.day[1:], strict=True):
        assert (one == other).all()


def test_a_day_that_is_lived_anew_by_a_platform_that_remembers_is_the_same(world, tmp_path):
    with world.platform(tmp_path / "on", world.finders()) as platform:
        first, second = platform.run(USERS, 0), platform.run(USERS, 1)
    with world.platform(tmp_path / "anew", world.finders()) as platform:
        platform.run(USERS, 0)
    with world.platform(tmp_path / "anew", world.finders()) as platform:
        platform.remember(first.shown)
        again = platform.run(USERS, 1)
    assert rows(again.shown) == rows(second.shown)
    with world.platform(tmp_path / "anew", world.finders()) as platform:
        assert rows(platform.run(USERS, 1).shown) != rows(second.shown), "one that forgets shows other things"


def test_the_best_come_first_unless_something_is_explored_or_all_is_random(world, tmp_path):
    def out_of_order(**options) -> float:
        with world.platform(tmp_path / str(options), world.finders(), most_of_one=3, **options) as platform:
            shown = platform.run(USERS, 0).shown
        order = np.lexsort((shown.slot, shown.time, shown.visit))
        score, visit = shown.feature[order, 0], shown.visit[order]
        return float(((np.diff(score) > 0) & (np.diff(visit) == 0)).mean())

    assert out_of_order(explore=0) == 0
    assert 0 < out_of_order(explore=0.1) < 0.2
    assert out_of_order(explore=0, warming_up=True) > 0.35


def test_another_draw_explores_other_things(world, lived, tmp_path):
    found = []
    for draw in (0, 1):
        with world.platform(tmp_path / str(draw), world.finders(), draw=draw) as platform:
            found.append(rows(platform.run(USERS, 0).shown))
    assert found[0] == rows(lived.day.shown) != found[1]


def test_where_nothing_is_brought_nothing_is_shown(world, tmp_path):
    with world.platform(tmp_path, {"none": Bringing(lambda user, _: [])}) as platform:
        day = platform.run(USERS, 0)
        assert platform.reader.journal.count() == 0
    assert len(day.shown.user) == 0
    assert day.shown.feature.shape == (0, len(world.features.names))
    assert day.visits.sum() > 100
    assert day.retrieved.tolist() == [[0]] * len(USERS)


def test_behaviors_are_written_once(tmp_path):
    one = [np.array([3, 4]), np.array([5, 6]), np.array([1, 1]), np.array([1000, 1001])]
    with closing(Journal(tmp_path / "live.sqlite")) as journal:
        for _ in range(2):
            write(journal, *one, "cart")
        write(journal, *(column[:0] for column in one), "cart")
        found = [tuple(event) for event in journal.between(0, journal.last())]
    assert found == [(3, 5, 1, 1000, "cart", None), (4, 6, 1, 1001, "cart", None)]


def test_numbers_of_the_store_and_of_the_market_are_each_others_inverse(world):
    numbers = world.numbering
    assert numbers.market_of.tolist() == world.store.items["item_id"].to_pylist()
    lacking = set(range(CONFIG.items)) - set(numbers.market_of.tolist())
    assert set(np.flatnonzero(numbers.store_of < 0).tolist()) == lacking
    assert (numbers.store_of[numbers.market_of] == np.arange(world.store.n_items)).all()
