"""What do people do with what they are shown? The market's other half: visits, pages, clicks, orders.

The log (`log.py`) is what people do by themselves. Here they open a feed, look at pages of items that
somebody chose for them, click by the same true taste, order, tire, and go on or leave. Nothing here knows how
the items were chosen. The formulas stand in `docs/market.md`.

Every random number is a hash of the seed and of what it is for (this item in this visit, say), so two worlds
that show the same thing see the same reaction, and differ only where what they show differs: paired by
design. A visit's number is its user's place times `_DAYS` days of `_VISITS` visits.

Axes: V visits, S slots of a page, n items shown, M categories in mind.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from longretriever.errors import InputError
from longretriever.events import SECONDS_PER_DAY
from longretriever.market.log import Market, _hash, _root, _uniform

_DAYS, _VISITS = 1_000, 10  # at most, so that visits can be numbered
_MIND = 64  # categories in mind, at most
PAGE_SECONDS = 60
"""Between two pages of a visit; a click comes 3 seconds a slot after its page, an order 20 seconds later."""
_SLOT_SECONDS, _ORDER_SECONDS = 3, 20


@dataclass(frozen=True)
class FeedConfig:
    """Everything that decides what people do in the feed, beside the market. Raises `InputError`."""

    slots: int = 10  # items of a page
    pages: int = 5  # of a visit, at most
    visits: float = 1.0  # of a user a day, on average
    visit_spread: float = 0.7  # standard deviation of the log of that over users
    more: float = 0.5  # chance to go on to another page after one without a click ...
    more_after_click: float = 0.8  # ... and after one with a click

    in_mind: int = 5  # categories that a visit is open to, drawn from the user's interests of the moment
    open_minded: float = 0.1  # what is left of the attraction of an item of another category
    attention: float = 0.93  # chance to look at a slot, of that of the slot before
    tiring: float = 0.04  # log factor that each item shown of a category takes from those shown later ...
    rest_hours: float = 12.0  # ... half forgotten after so long
    known: float = 0.6  # factor of an item that the user has met before

    click: float = -2.5  # log-odds of a click on an item of average taste that is looked at and wanted
    order: float = -3.5  # log-odds of an order after a click on an item of average taste and worth
    order_taste: float = 0.5  # how much of the taste comes on top of that, beside the worth

    def __post_init__(self) -> None:
        shares = ("more", "more_after_click", "open_minded", "attention", "known")
        lowest = {"slots": 1, "pages": 1, "in_mind": 1, "visits": 0, "visit_spread": 0, "tiring": 0}
        for name in shares:
            if not 0 <= getattr(self, name) <= 1:
                raise InputError(f"feed: {name} is {getattr(self, name)}, expected a share from 0 to 1.")
        for name, least in {**lowest, "rest_hours": 0.01, "order_taste": 0}.items():
            if not getattr(self, name) >= least:
                raise InputError(f"feed: {name} is {getattr(self, name)}, expected at least {least}.")
        if self.in_mind > _MIND:
            raise InputError(f"feed: in_mind is {self.in_mind}, expected at most {_MIND}.")


class Visits(NamedTuple):
    """Some openings of the feed; all are [V]."""

    user: np.ndarray  # user numbers of the market
    time: np.ndarray  # unix seconds, whole
    number: np.ndarray  # of the visit, no two alike

    def pick(self, which: np.ndarray) -> Visits:
        """Those at these positions, or where this mask is set."""
        return Visits(*(column[which] for column in self))


class Reaction(NamedTuple):
    """What came of pages shown."""

    click: np.ndarray  # [V, S] bool
    order: np.ndarray  # [V, S] bool: after the click
    time: np.ndarray  # [V, S] unix seconds of the click, if there is one
    goes_on: np.ndarray  # [V] bool: asks for another page


def order_time(click_time: np.ndarray) -> np.ndarray:
    """Unix seconds of the order after a click."""
    return click_time + _ORDER_SECONDS


class Feed:
    """The people of a market in front of a feed, from `begin` (unix seconds) on.

    It remembers what they were shown, as far as that tires them, and what they have met: 8 bytes for each
    distinct (user, item) of the log before `begin`. Feeds of another `luck` have the same people come at the
    same times with the same in mind, but the dice of what they click, order and read on fall differently.
    """

    def __init__(self, market: Market, config: FeedConfig, begin: float, luck: int = 0) -> None:
        self.market, self.config, self.begin, self.luck = market, config, begin, luck
        log = market.log(0, market.config.users)
        before = log.time < begin
        self._met = [np.unique(self._pair(log.user[before], log.item[before]))]
        self._tired = _Fading(config.rest_hours * 3600, begin)

    def _pair(self, user: np.ndarray, item: np.ndarray) -> np.ndarray:
        return user.astype(np.int64) * self.market.config.items + item

    def _group(self, user: np.ndarray, category: np.ndarray) -> np.ndarray:
        return user.astype(np.int64) * self.market.config.categories + category

    # -- when they come

    def visits(self, users: np.ndarray, day: int) -> Iterator[Visits]:
        """The visits of these users on the `day`-th day from `begin`: everyone's first, second, and so on.

        Their number is Poisson with a rate of the user's own, at most 10; their times are even over the day.
        """
        if not 0 <= day < _DAYS:
            raise InputError(f"day {day}: expected 0 to {_DAYS - 1}.")
        c = self.config
        spread = c.visit_spread * self.market._normal("visit rate", users) - 0.5 * c.visit_spread**2
        count = _poisson(c.visits * np.exp(spread), self.market._draw("visits", users * _DAYS + day), _VISITS)
        number = (users[:, None] * _DAYS + day) * _VISITS + np.arange(_VISITS)
        second = (self.market._draw("visit time", number) * SECONDS_PER_DAY).astype(np.int64)
        second[np.arange(_VISITS) >= count[:, None]] = SECONDS_PER_DAY  # what does not take place comes last
        second.sort(axis=1)
        for nth in range(int(count.max(initial=0))):
            who = np.flatnonzero(count > nth)
            time = int(self.begin) + day * SECONDS_PER_DAY + second[who, nth]
            yield Visits(users[who], time, number[who, nth])

    # -- what they do

    def react(self, visits: Visits, item_VS: np.ndarray, page: int) -> Reaction:
        """What each visit does with its page of items (item numbers of the market; -1 is an empty slot)."""
        c, market = self.config, self.market
        row, slot = np.nonzero(item_VS >= 0)
        user, item = visits.user[row], item_VS[row, slot].astype(np.int64)
        at = (visits.time + page * PAGE_SECONDS)[row]
        category = market.category_of(item)
        taste = market.taste(user, item, visits.time[row])
        wanted = np.where((self._in_mind(visits)[row] == category[:, None]).any(axis=1), 1.0, c.open_minded)
        chance = c.attention**slot * wanted * _logistic(c.click + taste)
        chance *= np.exp(-c.tiring * self._tired.of(self._group(user, category), at))
        chance *= np.where(self.has_met(user, item), c.known, 1.0)
        click = self._luck("click", visits.number[row], item) < chance
        buying = _logistic(c.order + c.order_taste * taste + market.worth(user, item))
        order = click & (self._luck("order", visits.number[row], item) < buying)
        self._shown(user, item, category, at, click)

        clicks_VS, orders_VS = np.zeros(item_VS.shape, bool), np.zeros(item_VS.shape, bool)
        clicks_VS[row, slot], orders_VS[row, slot] = click, order
        second_S = page * PAGE_SECONDS + _SLOT_SECONDS * np.arange(1, item_VS.shape[1] + 1)
        time_VS = visits.time[:, None] + second_S
        more = np.where(clicks_VS.any(axis=1), c.more_after_click, c.more)
        goes_on = self._luck("more", visits.number, np.array(page)) < more
        goes_on &= page + 1 < c.pages
        return Reaction(clicks_VS, orders_VS, time_VS, goes_on)

    def remember(self, user: np.ndarray, item: np.ndarray, at: np.ndarray, click: np.ndarray) -> None:
        """Take over what was shown in an earlier run of the same days; all are [n]."""
        self._shown(user, item, self.market.category_of(item), at, click)

    def meets(self, user: np.ndarray, item: np.ndarray) -> None:
        """These users have met these items elsewhere."""
        self._met.append(np.unique(self._pair(user, item)))

    def has_met(self, user: np.ndarray, item: np.ndarray) -> np.ndarray:
        """[n] whether each user has met each item, in the log or by a click."""
        pair = self._pair(user, item)
        found = np.zeros(len(pair), bool)
        for known in self._met:
            found |= _within(known, pair)[0]
        return found

    def _shown(
        self, user: np.ndarray, item: np.ndarray, category: np.ndarray, at: np.ndarray, click: np.ndarray
    ) -> None:
        self._tired.add(self._group(user, category), at)
        clicked = np.unique(self._pair(user[click], item[click]))
        if len(self._met) == 1:
            self._met.append(clicked)
        else:
            self._met[1:] = [np.unique(np.concatenate([*self._met[1:], clicked]))]

    def _in_mind(self, visits: Visits) -> np.ndarray:
        """[V, M] the categories that each visit is open to; one may come twice."""
        M, shape = self.config.in_mind, (len(visits.user), self.config.in_mind)
        number = self.market.config.events + visits.number[:, None] * _MIND + np.arange(M)
        user, time = (np.broadcast_to(column[:, None], shape).ravel() for column in visits[:2])
        return self.market.choices(user, time, number.ravel()).reshape(shape)

    def _luck(self, purpose: str, visit: np.ndarray, item: np.ndarray) -> np.ndarray:
        key = _hash(_root(self.market.config.seed, f"feed {purpose} {self.luck}"), visit)
        return _uniform(_hash(key, item))


class _Fading:
    """Counts that fade by half in `half` seconds, by key. Held as of `zero`, where they were larger."""

    def __init__(self, half: float, zero: float) -> None:
        self.half, self.zero = half, zero
        self.key: np.ndarray = np.empty(0, np.int64)
        self.count: np.ndarray = np.empty(0)  # float64

    def of(self, key: np.ndarray, at: np.ndarray) -> np.ndarray:
        """[n] what is left of the count of each key."""
        there, place = _within(self.key, key)
        found = np.zeros(len(key))
        found[there] = self.count[place[there]]
        return found * np.exp2(-(at - self.zero) / self.half)

    def add(self, key: np.ndarray, at: np.ndarray) -> None:
        """Count each key once more."""
        self.key, place = np.unique(np.concatenate([self.key, key]), return_inverse=True)
        added = np.concatenate([self.count, np.exp2((at - self.zero) / self.half)])
        self.count = np.bincount(place, added, minlength=len(self.key))


def _within(known: np.ndarray, key: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """[n] whether each key is among the sorted `known`, and where it would stand."""
    place = np.searchsorted(known, key)
    there = place < len(known)
    there[there] = known[place[there]] == key[there]
    return there, place


def _poisson(rate: np.ndarray, draw: np.ndarray, most: int) -> np.ndarray:
    """[n] Poisson numbers of these rates, at most `most`, by inversion of one uniform each."""
    term = np.exp(-rate)
    running, count = term, np.zeros(len(rate), np.int64)
    for n in range(1, most + 1):
        count += draw >= running
        term = term * rate / n
        running = running + term
    return count


def _logistic(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))
