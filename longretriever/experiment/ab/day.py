"""One day of one arm: who comes, what the routes bring, what is shown, what becomes of it.

Users do not meet within a day, and what the platform has counted is last midnight's, so everyone's first
visit is answered together, then everyone's second. What people do is on the disk of the arm's journal before
their next visit is answered, which therefore sees it.

Axes: V visits, n candidates of all visits (ordered by visit), S slots, R routes, U users, X impressions.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from longretriever.events import ITEM, SECONDS_PER_DAY
from longretriever.experiment.ab.plan import Finder, PlatformConfig
from longretriever.experiment.ab.ranking import Ranker
from longretriever.market.feed import PAGE_SECONDS, Feed, Reaction, Visits, order_time
from longretriever.store.behaviors import Store
from longretriever.store.live import Event, LiveJournal, Reader

TOGETHER = 512  # visits whose candidates are held at once


class Shown(NamedTuple):
    """Impressions; all are [X] but for `feature` [X, F]."""

    user: np.ndarray  # user numbers of the market
    item: np.ndarray  # item numbers of the market
    visit: np.ndarray  # number of the visit
    time: np.ndarray  # unix seconds of the page
    slot: np.ndarray  # on its page, from 0
    click: np.ndarray  # bool
    order: np.ndarray  # bool
    routes: np.ndarray  # uint32, a bit for each route of the arm that had retrieved it
    feature: np.ndarray  # float32, as they were when it was shown

    @classmethod
    def together(cls, parts: Sequence[Shown], features: int) -> Shown:
        """Several as one."""
        if not parts:
            number, flag = np.empty(0, np.int64), np.empty(0, bool)
            bits, feature = np.empty(0, np.uint32), np.empty((0, features), np.float32)
            return cls(number, number, number, number, number, flag, flag, bits, feature)
        return cls(*(np.concatenate(column) for column in zip(*parts, strict=True)))


class Day(NamedTuple):
    """All that is kept of an arm's day.

    visits     [U] how often each user of the test came
    retrieved  [U, R] candidates that each route brought him; alone [U, R] those that no other route brought
    """

    shown: Shown
    visits: np.ndarray
    retrieved: np.ndarray
    alone: np.ndarray


@dataclass
class Numbering:
    """Item numbers of the market and of the store; users and ids are the market's own numbers."""

    market_of: np.ndarray  # [I of the store]
    store_of: np.ndarray  # [I of the market], -1 where the store lacks it

    @classmethod
    def of(cls, store: Store, items: int) -> Numbering:
        market_of = store.items[ITEM].to_numpy().astype(np.int64)
        store_of = np.full(items, -1, np.int64)
        store_of[market_of] = np.arange(len(market_of))
        return cls(market_of, store_of)


class Candidates(NamedTuple):
    """What the routes brought, each item of a visit once; all are [n], ordered by visit and item."""

    row: np.ndarray  # which visit
    item: np.ndarray  # item numbers of the store
    routes: np.ndarray  # uint32, a bit for each route


class Platform:
    """An arm on one day: its routes, the ranker of all arms, the journal of what its users do."""

    def __init__(
        self,
        config: PlatformConfig,
        finders: Mapping[str, Finder],
        lengths: Sequence[int],
        ranker: Ranker,
        reader: Reader,
        feed: Feed,
        draw: int,
        warming_up: bool,
    ) -> None:
        self.config, self.finders, self.lengths, self.ranker = config, finders, lengths, ranker
        self.reader, self.feed, self.draw, self.warming_up = reader, feed, draw, warming_up
        self.numbering = Numbering.of(reader.store, feed.market.config.items)
        self._today = _Lately()

    def remember(self, before: Shown) -> None:
        """Take over what was shown on the days before: nothing is shown again within 24 hours."""
        self.feed.remember(before.user, before.item, before.time, before.click)
        self._today.add(before.user, self.numbering.store_of[before.item], before.time)

    def run(self, users: np.ndarray, day: int) -> Day:
        """A day of these users (sorted user numbers of the market)."""
        visits, pair = np.zeros(len(users), np.int64), np.zeros((2, len(users), len(self.finders)), np.int64)
        parts: list[Shown] = []
        for nth, round_ in enumerate(self.feed.visits(users, day)):
            for at in range(0, len(round_.user), TOGETHER):
                some = round_.pick(np.arange(at, min(at + TOGETHER, len(round_.user))))
                place = np.searchsorted(users, some.user)
                visits[place] += 1
                candidates, counts = self._retrieve(some, day * 100 + nth)
                pair[:, place] += counts  # nobody comes twice in a round
                parts += self._show(some, candidates)
        return Day(Shown.together(parts, len(self.ranker.features.names)), visits, pair[0], pair[1])

    def _retrieve(self, visits: Visits, round_: int) -> tuple[Candidates, np.ndarray]:
        """The union of what all routes bring, and [2, V, R] how much each brought, and it alone."""
        at_once = self.reader.lives(visits.user.tolist(), float(visits.time.max()))
        self._lives = [replace(life, now=float(t)) for life, t in zip(at_once, visits.time, strict=True)]
        I, row, item, bit = self.reader.store.n_items, [], [], []
        for route, (finder, k) in enumerate(zip(self.finders.values(), self.lengths, strict=True)):
            lists = finder.find(self._lives, k, self.draw * 100_000 + round_)
            row.append(np.repeat(np.arange(len(lists)), [len(items) for items in lists]))
            item.append(np.concatenate(lists).astype(np.int64))
            bit.append(np.full(len(item[-1]), 1 << route, np.uint32))
        pair, place = np.unique(np.concatenate(row) * I + np.concatenate(item), return_inverse=True)
        routes = np.zeros(len(pair), np.uint32)
        np.bitwise_or.at(routes, place, np.concatenate(bit))
        found = Candidates(pair // I, pair % I, routes)
        return found, np.stack(
            [_brought(found, len(visits.user), len(self.finders), alone) for alone in (0, 1)]
        )

    def _show(self, visits: Visits, found: Candidates) -> Iterator[Shown]:
        """Page after page of each visit, until all have left."""
        at = visits.time[found.row]
        offered = self.feed.market.on_offer(self.numbering.market_of[found.item], at)
        user = visits.user[found.row]
        offered &= ~self._today.has(user, found.item, at)
        found, user, at = Candidates(*(column[offered] for column in found)), user[offered], at[offered]
        category = self.ranker.features.category[found.item]
        today = self._today.of_category(user, category, at, self.ranker.features.category)
        feature = self.ranker.features.of(self._lives, found.item, found.row, today)
        luck = self.feed.market._draw(
            f"order of {self.draw}", visits.number[found.row] * 1_000_003 + found.item
        )
        score = luck if self.warming_up else self.ranker.score(feature)
        pages = _Pages(found.row, category, score, self.feed.config.slots, self.config.most_of_one)
        here = np.arange(len(visits.user))
        for page in range(self.feed.config.pages):
            chosen_VS = pages.next(here, self._explored(visits, page))
            there, item_VS = chosen_VS >= 0, np.full(chosen_VS.shape, -1, np.int64)
            item_VS[there] = self.numbering.market_of[found.item[chosen_VS[there]]]
            reaction = self.feed.react(visits.pick(here), item_VS[here], page)
            yield self._seen(visits.pick(here), chosen_VS[here], reaction, page, found, feature)
            here = here[reaction.goes_on]
            if len(here) == 0:
                break

    def _explored(self, visits: Visits, page: int) -> np.ndarray:
        """[V, S] for each slot a number in [0, 1) that picks a random candidate, or -1."""
        slots = self.feed.config.slots
        number = (visits.number[:, None] * 10 + page) * 100 + np.arange(slots)
        draw = self.feed.market._draw(f"explore {self.draw}", number)
        which = self.feed.market._draw(f"explored {self.draw}", number)
        return np.where(draw < (0 if self.warming_up else self.config.explore), which, -1)

    def _seen(
        self,
        visits: Visits,
        chosen_VS: np.ndarray,
        reaction: Reaction,
        page: int,
        found: Candidates,
        feature: np.ndarray,
    ) -> Shown:
        """What became of a page, after its behaviors are on the disk."""
        row, slot = np.nonzero(chosen_VS >= 0)
        at = chosen_VS[row, slot]
        click, order = reaction.click[row, slot], reaction.order[row, slot]
        item, user = self.numbering.market_of[found.item[at]], visits.user[row]
        time = visits.time[row] + page * PAGE_SECONDS
        self._journal(user, item, reaction.time[row, slot], click, order)
        self._today.add(user, found.item[at], time)
        return Shown(user, item, visits.number[row], time, slot, click, order, found.routes[at], feature[at])

    def _journal(
        self, user: np.ndarray, item: np.ndarray, time: np.ndarray, click: np.ndarray, order: np.ndarray
    ) -> None:
        category = self.feed.market.category_of(item)
        for which, kind, when in ((click, "click", time), (order, "buy", order_time(time))):
            write(self.reader.journal, user[which], item[which], category[which], when[which], kind)


def write(
    journal: LiveJournal,
    user: np.ndarray,
    item: np.ndarray,
    category: np.ndarray,
    time: np.ndarray,
    kind: str,
) -> None:
    """Put behaviors into a journal; those that it has already are not written again."""
    columns = (column.tolist() for column in (user, item, category, time))
    events = [Event(u, i, c, t, kind) for u, i, c, t in zip(*columns, strict=True)]
    if events:
        journal.append(events).result()


def _brought(found: Candidates, visits: int, routes: int, alone: int) -> np.ndarray:
    """[V, R] how many candidates each route brought each visit, or it alone."""
    out = np.zeros((visits, routes), np.int64)
    for route in range(routes):
        bit = np.uint32(1 << route)
        mine = found.routes == bit if alone else (found.routes & bit) > 0
        out[:, route] = np.bincount(found.row[mine], minlength=visits)
    return out


class _Pages:
    """Deals out candidates: the best first, but no more than so many of one category on a page."""

    def __init__(
        self, row: np.ndarray, category: np.ndarray, score: np.ndarray, slots: int, most_of_one: int
    ) -> None:
        order = np.lexsort((-score, row))
        self.row, self.category, self.order = row[order], category[order], order
        self.slots, self.most = slots, most_of_one
        self.left = np.ones(len(row), bool)

    def next(self, here: np.ndarray, explored_VS: np.ndarray) -> np.ndarray:
        """[V, S] the next page of the visits `here`: places of candidates as they were given, or -1."""
        page_VS = np.full(explored_VS.shape, -1, np.int64)
        left = np.flatnonzero(self.left & np.isin(self.row, here))
        row = self.row[left]
        of_one = _nth(row * (1 + self.category.max(initial=0)) + self.category[left])
        left, row = left[of_one < self.most], row[of_one < self.most]
        nth = _nth(row)
        best = nth < self.slots
        page_VS[row[best], nth[best]] = left[best]
        for visit, slot in np.argwhere(explored_VS >= 0):
            mine = np.searchsorted(self.row, [visit, visit + 1])
            other = mine[0] + int(explored_VS[visit, slot] * (mine[1] - mine[0]))
            if page_VS[visit, slot] >= 0 and self._fits(other, page_VS[visit], slot):
                page_VS[visit, slot] = other
        there = page_VS >= 0
        self.left[page_VS[there]] = False
        page_VS[there] = self.order[page_VS[there]]
        return page_VS

    def _fits(self, other: int, page_S: np.ndarray, slot: int) -> bool:
        """Whether this candidate may take the slot of a page."""
        beside = np.delete(page_S, slot)
        of_one = np.count_nonzero(self.category[beside[beside >= 0]] == self.category[other])
        return bool(self.left[other] and other not in page_S and of_one < self.most)


def _nth(key: np.ndarray) -> np.ndarray:
    """[n] the how-manieth of its key each element is, from 0."""
    order = np.argsort(key, kind="stable")
    first = np.flatnonzero(np.diff(key[order], prepend=-1))
    size = np.diff(np.append(first, len(key)))
    nth = np.empty(len(key), np.int64)
    nth[order] = np.arange(len(key)) - np.repeat(first, size)
    return nth


class _Lately:
    """What was shown to whom, and when; asked for the 24 hours before a visit, first second included."""

    def __init__(self) -> None:
        self._columns: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []

    def add(self, user: np.ndarray, item: np.ndarray, time: np.ndarray) -> None:
        """Impressions; all are [n], items of the store."""
        self._columns.append((user, item, time))

    def _all(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        if len(self._columns) > 1:
            user, item, time = (np.concatenate(column) for column in zip(*self._columns, strict=True))
            self._columns = [(user, item, time)]
        if not self._columns:
            return np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0, np.int64)
        return self._columns[0]

    def has(self, user: np.ndarray, item: np.ndarray, at: np.ndarray) -> np.ndarray:
        """[n] whether each user was shown each item since a day before `at`.

        Also after `at`: the visit before may have pages that are later than the beginning of this one.
        """
        return self._count(user, item, at, None) > 0

    def of_category(
        self, user: np.ndarray, category: np.ndarray, at: np.ndarray, category_of: np.ndarray
    ) -> np.ndarray:
        """[n] how many items of each category each user was shown within a day before `at`."""
        return self._count(user, category, at, category_of)

    def _count(self, user: np.ndarray, what: np.ndarray, at: np.ndarray, of: np.ndarray | None) -> np.ndarray:
        shown_user, shown_item, time = self._all()
        if len(time) == 0 or len(user) == 0:
            return np.zeros(len(user), np.int64)
        recent = (time >= at.min() - SECONDS_PER_DAY) & np.isin(shown_user, np.unique(user))
        shown_user, time = shown_user[recent], time[recent]
        shown = shown_item[recent] if of is None else of[shown_item[recent]]
        span = 1 + max(int(what.max()), int(shown.max(initial=0)))
        # Seconds behind keys in one number: times of a key lie behind all those of the keys before it.
        begin = int(min(time.min(initial=at.min()), at.min())) - SECONDS_PER_DAY
        seconds = int(max(time.max(initial=0), at.max())) - begin + 1
        line = np.sort((shown_user * span + shown) * seconds + time - begin)
        key = (user * span + what) * seconds
        until = key + seconds if of is None else key + at - begin
        return np.searchsorted(line, until) - np.searchsorted(line, key + at - begin - SECONDS_PER_DAY)
