"""A simulated market: what would this user truly like next? Here it can be asked, and logs of any size drawn.

A user opens sessions, each in a category of his interests, and picks items by an exact softmax over ALL
items of the category: taste · style of the item + popularity of the item. The items of a category share
few styles (32), so the softmax over 40,000 items costs 32 numbers; and a random number is a hash of the
seed and of what it is for, so that nothing is held per user but a count, a life can be drawn by itself,
and 100 million events stream through bounded memory. The formulas stand in `docs/market.md`.

Numbers: users, items and categories are numbered 0..; an id is that number, or "u0001234" of it. A "slot"
is an item's place in the order of (category, style, popularity), most popular first; item numbers are a
random permutation of slots, so that no id gives its style or popularity away. An "event number" counts
the events of the whole market, user after user.

Axes: U users, V visits (stays in one category), E events, I items, C categories, P personas, K interests
of a user, G styles, D dimensions of taste, H vectors of the bank.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from longretriever.errors import Damaged, InputError, Mismatch, NotSaved
from longretriever.events import BEHAVIOR, CATEGORY, ITEM, LATEST, SECONDS_PER_DAY, TIME, TITLE, USER
from longretriever.saved import writing

BEHAVIORS = ("click", "cart", "buy")
PROFILE = {
    "age_band": ("18-24", "25-34", "35-44", "45-54", "55-64", "65+"),
    "gender": ("female", "male", "undisclosed"),
    "region": ("north", "north-east", "east", "south-east", "south", "south-west", "west", "north-west"),
}
PRICE_BANDS = ("lowest", "low", "middle", "high", "highest")
BRANDS_PER_STYLE = 2

_CONFIG, _FORMAT = "market.json", 1
_ROW_GROUP = 1 << 19  # rows of a Parquet row group
_LOOKS = 8  # for an item on offer; whoever has not found one by then takes the last
_BANK = 1 << 12  # vectors; a taste adds up four of them, so no two are alike, and they stay in the cache
_NOT_HERE = "Make one with `longretriever generate`."

_NOUNS = [
    *("lamp", "chair", "table", "sofa", "shelf", "rug", "mirror", "kettle", "pan", "knife", "mug", "bottle"),
    *("shirt", "dress", "coat", "shoe", "boot", "hat", "scarf", "belt", "watch", "ring", "bag", "wallet"),
    *("phone", "laptop", "camera", "speaker", "keyboard", "drone", "tent", "bicycle", "helmet", "puzzle"),
]
_KINDS = [
    *("desk", "garden", "travel", "kitchen", "winter", "summer", "sport", "office", "kids", "vintage"),
    *("folding", "silver", "wooden", "leather", "cotton", "compact", "outdoor", "bedroom", "gift", "studio"),
]


@dataclass(frozen=True)
class MarketConfig:
    """Everything that decides a market: equal configurations make equal logs, byte for byte.

    `users * least <= events <= users * most` and `categories <= items`; other values raise `InputError`.
    """

    events: int  # behaviors in the log, exactly
    users: int
    items: int
    categories: int
    days: float = 365.0  # length of the log
    end: int = 1_767_225_600  # unix seconds; every behavior is strictly earlier (default 2026-01-01 UTC)
    seed: int = 0
    string_ids: bool = False  # ids such as "u0001234" instead of integers

    least: int = 10  # behaviors of the least active user
    most: int = 100_000  # behaviors the most active user may have; in between a bounded Pareto law
    category_tail: float = 0.7  # the k-th largest category has items in proportion to k ** -category_tail
    category_spread: float = 0.8  # standard deviation of a category's log popularity beyond its size
    style_spread: float = 0.7  # the same of a style within a category
    popularity_tail: float = 0.5  # chance of the k-th item of a style: about k ** -popularity_tail

    styles: int = 32  # styles an item can have; the same ones in all categories
    dimensions: int = 8  # of the space in which tastes and styles are vectors
    sharpness: float = 1.8  # standard deviation of taste · style over users: 0 = only popularity counts
    common: float = 0.35  # share of a taste's variance that is the same in all categories
    moving: float = 0.4  # share of it that is a category's own and drifts; the rest is its own and lasts
    drift_days: float = 30.0  # what drifts is wholly renewed within twice this time

    personas: int = 32  # hidden kinds of user, each with categories and a taste of its own
    persona_taste: float = 0.5  # share of the variance of the common taste that a persona's users have alike
    persona_interest: float = 2.0  # standard deviation of a persona's log preference for a category
    profile: float = 0.8  # chance that a profile field shows the value typical of the persona
    feature: float = 0.7  # chance that an item's feature shows the value typical of its style

    fewest_interests: int = 5  # lasting interests (categories) of a user: from this many ...
    most_interests: int = 20  # ... to this many, growing with the cube root of his number of behaviors
    interest_drift: float = 1.0  # standard deviation, over time, of the log weight of an interest
    curiosity: float = 0.1  # chance that a visit goes to any category by its popularity, not to an interest

    session_events: float = 8.0  # behaviors of a session, on average
    stay: float = 0.85  # chance, within a session, to stay in the category without a new choice of one
    gap_seconds: float = 45.0  # between behaviors of a session, on average
    gap_tail: float = 1.2  # Pareto exponent of the gaps between sessions; lower is burstier
    repeat: float = 0.25  # chance to come back to an item met before in the category
    cart: float = 0.06  # chance that a behavior is a cart (twice that when coming back) ...
    buy: float = 0.02  # ... or a purchase (twice that when coming back), else a click
    quality: float = 0.0  # standard deviation of an item's quality, a log factor of both chances
    thrift: float = 0.0  # how much a price band above the middle takes from them, as a log factor, on average
    item_days: float = 0.0  # how long an item is on offer, from a moment of its own; 0: always

    def __post_init__(self) -> None:
        for wrong, message in _faults(self):
            if wrong:
                raise InputError(f"a market cannot be made: {message}")

    @classmethod
    def of_size(cls, events: int, seed: int = 0, string_ids: bool = False, **others: Any) -> MarketConfig:
        """Users, items and categories to suit a number of events; `others` are fields set by hand.

        100 events per user and 25 per item; 10,000 categories at 100M events, 100 at 200,000.
        """
        sizes = {
            "users": max(1, events // 100),
            "items": max(1, events // 25),
            "categories": max(1, round(10_000 * (max(events, 1) / 1e8) ** 0.74)),
            "most": min(100_000, max(1_000, events // 100)),
        }
        return cls(events=events, seed=seed, string_ids=string_ids, **{**sizes, **others})

    @property
    def start(self) -> float:
        """Unix seconds; every behavior is strictly later."""
        return self.end - self.days * SECONDS_PER_DAY


_AT_LEAST = {
    **dict.fromkeys(("events", "users", "items", "categories", "styles", "dimensions", "personas"), 1),
    **dict.fromkeys(("least", "most", "fewest_interests", "most_interests", "session_events", "days"), 1),
    **dict.fromkeys(("sharpness", "persona_interest", "interest_drift", "cart", "buy", "seed"), 0),
    **dict.fromkeys(("category_tail", "category_spread", "style_spread", "gap_seconds"), 0),
    **{"gap_tail": 0.5, "drift_days": 0.1, "quality": 0, "thrift": 0, "item_days": 0},
}
_SHARES = ("common", "moving", "persona_taste", "profile", "feature", "curiosity", "stay", "repeat")


def _faults(c: MarketConfig) -> Iterator[tuple[bool, str]]:
    """Pairs of "this is wrong" and what to say of it; a NaN is wrong too."""
    for name, lowest in _AT_LEAST.items():
        yield not getattr(c, name) >= lowest, f"{name} is {getattr(c, name)}, expected at least {lowest}."
    for name in _SHARES:
        yield not 0 <= getattr(c, name) <= 1, f"{name} is {getattr(c, name)}, expected a share from 0 to 1."
    yield (
        c.categories > c.items,
        f"{c.categories:,} categories but {c.items:,} items. Every category needs an item: "
        "ask for fewer categories or more items.",
    )
    yield (
        not c.users * c.least <= c.events <= c.users * c.most,
        f"{c.users:,} users of {c.least:,} to {c.most:,} behaviors make {c.users * c.least:,} to "
        f"{c.users * c.most:,} events, not {c.events:,}. Change users, events, least or most.",
    )
    yield (
        max(c.users, c.items) > 2**31 - 1,
        f"{c.users:,} users and {c.items:,} items, expected at most {2**31 - 1:,} of each.",
    )
    yield c.common + c.moving > 1, f"common + moving is {c.common + c.moving}, expected at most 1."
    yield c.cart + c.buy > 0.5, f"cart + buy is {c.cart + c.buy}, expected at most 0.5."
    yield not 0 <= c.popularity_tail < 1, f"popularity_tail is {c.popularity_tail}, expected 0 to below 1."
    yield (
        c.fewest_interests > c.most_interests,
        f"{c.fewest_interests} to {c.most_interests} interests, expected the fewest first.",
    )
    yield (
        not 0 <= c.start < c.end < LATEST,
        f"it would last from {c.start:.0f} to {c.end} unix seconds, expected a time within 1970-2099.",
    )


class Log(NamedTuple):
    """Some events, by user and then by time; all are [E]."""

    user: np.ndarray  # int32 user numbers
    item: np.ndarray  # int32 item numbers
    category: np.ndarray  # int32 category numbers
    time: np.ndarray  # int64 unix seconds, ascending within a user; ties keep their order
    kind: np.ndarray  # int8 codes: places in BEHAVIORS


class _People(NamedTuple):
    """What is fixed about some users. Everything but the count of behaviors is a hash of the user number."""

    hash: np.ndarray  # [U] uint64
    interest: np.ndarray  # [U, K] category numbers; may name one twice
    weight: np.ndarray  # [U, K] of each interest before drift; 0 beyond the user's number of them
    phase: np.ndarray  # [U] where in a drift period the user's clock starts, 0 to 1
    common: np.ndarray  # [U, G] what the common part of the taste adds to the logit of each style


class _Visits(NamedTuple):
    """Runs of behaviors between two choices of a category, in order of users and time."""

    start: np.ndarray  # [V] row of the first event
    length: np.ndarray  # [V] events
    row: np.ndarray  # [V] place of the user among those drawn
    time: np.ndarray  # [V] unix seconds of the first event: taste is taken as of then
    category: np.ndarray  # [V]
    of: np.ndarray  # [E] the visit of each event


class Market:
    """The world that a configuration describes: ask it for the truth, or have it write a log.

    Holds 8 bytes per user and 8 per item, and tables of categories x styles and of categories x personas.
    """

    def __init__(self, config: MarketConfig) -> None:
        self.config = config
        self._first_event = np.concatenate([[0], np.cumsum(_activity(config, self._rng("activity")))])
        self._make_catalogue(self._rng("catalogue"))
        self._make_tastes(self._rng("tastes"))
        self._make_personas(self._rng("personas"))

    def _rng(self, purpose: str) -> np.random.Generator:
        return np.random.default_rng([self.config.seed, *purpose.encode()])

    def _hash(self, purpose: str, numbers: np.ndarray) -> np.ndarray:
        return _hash(_root(self.config.seed, purpose), numbers)

    def _draw(self, purpose: str, numbers: np.ndarray) -> np.ndarray:
        """float32 in [0, 1), of the shape of `numbers`: the same for the same seed, purpose and number."""
        return _uniform(self._hash(purpose, numbers))

    def _normal(self, purpose: str, numbers: np.ndarray) -> np.ndarray:
        """Standard normal numbers of the shape of `numbers`, drawn likewise."""
        radius = np.sqrt(-2 * np.log(1 - self._draw(purpose, numbers).astype(np.float64)))
        return radius * np.cos(2 * np.pi * self._draw(f"{purpose}, angle", numbers))

    def _make_catalogue(self, rng: np.random.Generator) -> None:
        c = self.config
        size_C = _category_sizes(c, rng)
        popularity_C = size_C * rng.lognormal(0.0, c.category_spread, c.categories)
        self.category_popularity = popularity_C / popularity_C.sum()
        count_CG = rng.multinomial(size_C, np.full(c.styles, 1 / c.styles))
        with np.errstate(divide="ignore"):  # a style without items has no mass
            self._log_mass_CG = np.log(count_CG) + rng.normal(0.0, c.style_spread, count_CG.shape)
        self._log_mass_CG = (self._log_mass_CG - np.log(size_C)[:, None]).astype(np.float32)
        self._cell_start = np.concatenate([[0], np.cumsum(count_CG.ravel())])  # [C*G+1] slots
        self._item_at = rng.permutation(c.items).astype(np.int32)  # [I] item number of a slot
        self._slot_of = np.empty_like(self._item_at)  # [I] the inverse
        self._slot_of[self._item_at] = np.arange(c.items, dtype=np.int32)

    def _make_tastes(self, rng: np.random.Generator) -> None:
        c = self.config
        style_GD = rng.standard_normal((c.styles, c.dimensions))
        self.style_vectors = style_GD / np.linalg.norm(style_GD, axis=1, keepdims=True)  # [G, D] of length 1
        bank_HD = rng.standard_normal((_BANK, c.dimensions))
        # Taste enters the softmax only through its products with the styles, so those are what is kept.
        self._bank_HG = (c.sharpness * bank_HD @ self.style_vectors.T).astype(np.float32)
        self._bank_HK = rng.standard_normal((_BANK, c.most_interests)).astype(np.float32)

    def _make_personas(self, rng: np.random.Generator) -> None:
        c = self.config
        vector_PD = rng.standard_normal((c.personas, c.dimensions))
        self._persona_PG = (c.sharpness * vector_PD @ self.style_vectors.T).astype(np.float32)
        love_PC = self.category_popularity * np.exp(
            rng.normal(0.0, c.persona_interest, (c.personas, c.categories))
        )
        self._persona_category = _stacked_cumulative(love_PC)
        self._any_category = _stacked_cumulative(self.category_popularity[None])
        self._typical = {name: rng.integers(len(values), size=c.personas) for name, values in PROFILE.items()}

    # -- what is true of users and items

    def taste(
        self, users: np.ndarray | Sequence[int], items: np.ndarray | Sequence[int], at: float | np.ndarray
    ) -> np.ndarray:
        """[n] true affinity of user and item numbers (both [n]) at unix seconds `at` (a number or [n]).

        taste · style of the item, mean 0 and standard deviation `sharpness` over users: a log-odds, before
        the popularity of the item. O(n * styles).
        """
        users, items = self._checked("user", users), self._checked("item", items)
        category, style = self._category_and_style(items)
        at = np.broadcast_to(np.asarray(at, dtype=np.float64), users.shape)
        who, rows = np.unique(users, return_inverse=True)
        logit_nG = self._style_logits(self._people(who), rows, category, at)
        return logit_nG[np.arange(len(users)), style].astype(np.float64)

    def interests(self, user: int, at: float) -> np.ndarray:
        """[C] the chance of each category when the user chooses one at unix seconds `at`; adds up to 1.

        A new choice is made by the first behavior of a session, and within it with chance 1 - `stay`.
        """
        people = self._people(self._checked("user", [user]))
        weight_K = self._interest_weights(people, np.zeros(1, np.intp), np.array([float(at)]))[0]
        chance = self.config.curiosity * self.category_popularity
        share = (1 - self.config.curiosity) / weight_K.sum(dtype=np.float64)
        np.add.at(chance, people.interest[0], share * weight_K)
        return chance

    def next_category(self, user: int, at: float, current: int | None = None) -> np.ndarray:
        """[C] the chance that the user's next behavior, at `at`, is in each category; adds up to 1.

        `current` is the category of his last behavior; None for his first.
        """
        chance = self.interests(user, at)
        if current is None:
            return chance
        self._checked("category", [current])
        choose = self._choose_category
        chance *= choose
        chance[current] += 1 - choose
        return chance

    def next_item(self, user: int, category: int, at: float, history: Sequence[int] = ()) -> np.ndarray:
        """[n] the chance of each of `items_of(category)` when the user's next behavior, at `at`, is in it.

        `history`: the item numbers of ALL his behaviors in this category so far, oldest first. This is the
        distribution that the log is drawn from; it adds up to 1. O(items of the category + history).
        """
        slots = self._slots_of(category)
        first_cell = category * self.config.styles
        size_G = np.diff(self._cell_start[first_cell : first_cell + self.config.styles + 1])
        people = self._people(self._checked("user", [user]))
        where = np.zeros(1, np.intp), np.array([category]), np.array([float(at)])
        chance_G = self._style_weights(people, *where)[0].astype(np.float64)
        chance_G /= chance_G.sum()
        chance = np.repeat(chance_G, size_G) * self._found(
            self._popularity_in_style(size_G), slots, size_G, at
        )
        if len(history) == 0:
            return chance
        place = self._slot_of[self._checked("item", history)] - slots.start
        if place.min() < 0 or place.max() >= len(chance):
            raise InputError(f"the history holds items of other categories than {category}. Leave them out.")
        lag = np.arange(len(place), 0, -1)
        back = np.log((lag + 1) / lag) / np.log(len(place) + 1)
        return (1 - self.config.repeat) * chance + np.bincount(
            place, self.config.repeat * back, minlength=len(chance)
        )

    def items_of(self, category: int) -> np.ndarray:
        """The item numbers of a category, by style and then by popularity."""
        return self._item_at[self._slots_of(category)]

    def category_of(self, items: np.ndarray | Sequence[int]) -> np.ndarray:
        """[n] the category numbers of item numbers."""
        return self._category_and_style(self._checked("item", items))[0]

    def style_of(self, items: np.ndarray | Sequence[int]) -> np.ndarray:
        """[n] the styles of item numbers: rows of `style_vectors`."""
        return self._category_and_style(self._checked("item", items))[1]

    def quality_of(self, items: np.ndarray | Sequence[int]) -> np.ndarray:
        """[n] what an item is worth beyond taste, mean 0 and standard deviation `quality`; nobody sees it."""
        return self.config.quality * self._normal("quality", self._checked("item", items))

    def thrift_of(self, users: np.ndarray | Sequence[int]) -> np.ndarray:
        """[n] how much each user minds a price band above the middle: 0 to twice `thrift`, evenly."""
        return 2 * self.config.thrift * self._draw("thrift", self._checked("user", users)).astype(np.float64)

    def worth(self, users: np.ndarray | Sequence[int], items: np.ndarray | Sequence[int]) -> np.ndarray:
        """[n] quality less what the price takes from it, for users and items [n] each.

        The log factor of the chances to put into the cart and to buy.
        """
        above = self.price_bands_of(self._checked("item", items)) - len(PRICE_BANDS) // 2
        return self.quality_of(items) - self.thrift_of(users) * above

    def on_offer(self, items: np.ndarray | Sequence[int], at: float | np.ndarray) -> np.ndarray:
        """[n] whether each item is on offer at unix seconds `at` (a number or [n]).

        Items come evenly over the log and `item_days` before it, so the same share is on offer at all times.
        """
        return self._on_offer(self._checked("item", items), np.asarray(at, np.float64))

    def _on_offer(self, items: np.ndarray, at: np.ndarray) -> np.ndarray:
        c = self.config
        if not c.item_days:
            return np.ones(np.broadcast_shapes(items.shape, at.shape), bool)
        age = (
            (at - c.start) / SECONDS_PER_DAY
            + c.item_days
            - self._draw("arrives", items) * (c.days + c.item_days)
        )
        return (age >= 0) & (age < c.item_days)

    def profile_of(self, field: str, users: np.ndarray | Sequence[int]) -> np.ndarray:
        """[n] places in `PROFILE[field]`: the persona's typical value with chance `profile`, else any."""
        users = self._checked("user", users)
        any_ = (self._draw(field, users) * len(PROFILE[field])).astype(np.int64)
        typical = self._draw(f"typical {field}", users) < self.config.profile
        return np.where(typical, self._typical[field][self._persona_of(users)], any_)

    def behaviors_of(self, users: np.ndarray | Sequence[int]) -> np.ndarray:
        """[n] how many behaviors these user numbers have in the log."""
        users = self._checked("user", users)
        return self._first_event[users + 1] - self._first_event[users]

    def choices(
        self, users: np.ndarray | Sequence[int], at: np.ndarray, numbers: np.ndarray | Sequence[int]
    ) -> np.ndarray:
        """[n] a category for each user at unix seconds `at`, drawn from `interests`; all three are [n].

        Equal `numbers` draw equally; those of the log are its event numbers, 0 to `events` - 1.
        """
        who, rows = np.unique(self._checked("user", users), return_inverse=True)
        return self._visited(
            self._people(who), rows, np.asarray(at, np.float64), np.asarray(numbers, np.int64)
        )

    def _checked(self, what: str, numbers: np.ndarray | Sequence[int]) -> np.ndarray:
        found = np.asarray(numbers, dtype=np.int64)
        limit = {"user": self.config.users, "item": self.config.items, "category": self.config.categories}[
            what
        ]
        if found.size and not 0 <= found.min() <= found.max() < limit:
            wrong = found.min() if found.min() < 0 else found.max()
            raise InputError(f"{what} number {wrong} is not in this market, which has 0 to {limit - 1:,}.")
        return found

    def _slots_of(self, category: int) -> slice:
        self._checked("category", [category])
        styles = self.config.styles
        return slice(int(self._cell_start[category * styles]), int(self._cell_start[(category + 1) * styles]))

    def _category_and_style(self, items: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        cell = np.searchsorted(self._cell_start, self._slot_of[items], side="right") - 1
        return np.divmod(cell, self.config.styles)

    def _popularity_in_style(self, size_G: np.ndarray) -> np.ndarray:
        """[n] the chance of each item given its style, slots in order."""
        rank = _places(size_G)
        size = np.repeat(size_G, size_G)
        power = 1 - self.config.popularity_tail
        return ((rank + 1) / size) ** power - (rank / size) ** power

    def _found(self, chance: np.ndarray, slots: slice, size_G: np.ndarray, at: float) -> np.ndarray:
        """[n] the chance of each item given its style, from that of a single look: see `_by_rank`."""
        offered = self._on_offer(self._item_at[slots].astype(np.int64), np.asarray(at, np.float64))
        if offered.all():
            return chance
        style = np.repeat(np.arange(len(size_G)), size_G)
        gone = np.bincount(style, chance * ~offered, minlength=len(size_G))[style]
        with np.errstate(divide="ignore", invalid="ignore"):
            again = np.where(gone < 1, (1 - gone**_LOOKS) / (1 - gone), 0.0)
        return chance * np.where(offered, again, gone ** (_LOOKS - 1))

    @property
    def _choose_category(self) -> float:
        """The chance that a behavior that is not a user's first starts with a new choice of category."""
        return 1 - (1 - 1 / self.config.session_events) * self.config.stay

    # -- the parts of a taste

    def _persona_of(self, users: np.ndarray) -> np.ndarray:
        return (self._hash("persona", users) % np.uint64(self.config.personas)).astype(np.intp)

    def _people(self, users: np.ndarray) -> _People:
        c = self.config
        hash_U = self._hash("user", users)
        persona = self._persona_of(users)
        common_UG = np.sqrt(np.float32(c.common * c.persona_taste)) * self._persona_PG[persona]
        own = np.sqrt(np.float32(c.common * (1 - c.persona_taste)))
        common_UG += own * self._bank_HG[_vector_of(hash_U)]
        interest, weight = self._lasting_interests(users, persona)
        phase = self._draw("phase", users).astype(np.float64)
        return _People(hash_U, interest, weight, phase, common_UG)

    def _lasting_interests(self, users: np.ndarray, persona: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """[U, K] category numbers drawn as the persona likes them, and their weights 1, 1/2, 1/3 ..."""
        c = self.config
        busy = np.cbrt(self.behaviors_of(users) / c.least) * (0.5 + self._draw("interests", users))
        count = np.rint(np.clip(c.fewest_interests * busy, c.fewest_interests, c.most_interests))
        has = np.arange(c.most_interests) < count[:, None]
        user, k = np.nonzero(has)
        draw = self._draw("interest", users[user] * c.most_interests + k)
        interest = np.zeros(has.shape, np.int64)
        interest[user, k] = _drawn(self._persona_category, persona[user], draw, c.categories)
        return interest, (has / np.arange(1, c.most_interests + 1)).astype(np.float32)

    def _moving(
        self, bank: np.ndarray, key: np.ndarray, people: _People, rows: np.ndarray, at: np.ndarray
    ) -> np.ndarray:
        """[V, G or K] what drifts, of users `rows` at times `at` (both [V]); `key` [V] says of what.

        cos a times the vector of this drift period plus sin a times that of the next: its variance is the
        same at all times, and it turns evenly from one to the other.
        """
        c = self.config
        clock = (at - c.start) / (c.drift_days * SECONDS_PER_DAY) + people.phase[rows]
        period = np.floor(clock)
        turn = ((clock - period) * (np.pi / 2)).astype(np.float32)[:, None]
        period = period.astype(np.int64)
        moving = bank[_vector_of(_hash(key, period))]
        moving *= np.cos(turn)
        next_ = bank[_vector_of(_hash(key, period + 1))]
        next_ *= np.sin(turn)
        moving += next_
        return moving

    def _interest_weights(self, people: _People, rows: np.ndarray, at: np.ndarray) -> np.ndarray:
        """[V, K] the weight of each lasting interest of users `rows` at times `at`."""
        key = people.hash[rows] ^ _root(self.config.seed, "interest drift")
        weight = self._moving(self._bank_HK, key, people, rows, at)
        weight *= np.float32(self.config.interest_drift)
        np.exp(weight, out=weight)
        weight *= people.weight[rows]
        return weight

    def _style_logits(
        self, people: _People, rows: np.ndarray, category: np.ndarray, at: np.ndarray
    ) -> np.ndarray:
        """[V, G] taste · style of users `rows` in these categories at these times (all [V])."""
        c = self.config
        key = _hash(people.hash[rows], category)
        logit = self._moving(self._bank_HG, key, people, rows, at)
        logit *= np.sqrt(np.float32(c.moving))
        lasting = self._bank_HG[_vector_of(key)]
        lasting *= np.sqrt(np.float32(max(0.0, 1 - c.common - c.moving)))
        logit += lasting
        logit += people.common[rows]
        return logit

    def _style_weights(
        self, people: _People, rows: np.ndarray, category: np.ndarray, at: np.ndarray
    ) -> np.ndarray:
        """[V, G] the softmax numerators of the styles; 0 for one that the category has no item of."""
        logit = self._style_logits(people, rows, category, at)
        logit += self._log_mass_CG[category]
        return np.exp(logit, out=logit)

    # -- drawing a log

    def log(self, first: int, stop: int) -> Log:
        """All events of users `first` to `stop` - 1, the same ones whichever users are asked for together."""
        self._checked("user", [first, stop - 1])
        users = np.arange(first, stop)
        length = self.behaviors_of(users)
        event = np.arange(self._first_event[first], self._first_event[stop])
        row = np.repeat(np.arange(len(users)), length)
        start = np.cumsum(length) - length
        fate = self._draw("fate", event)
        opens = fate < 1 / self.config.session_events
        chooses = fate < self._choose_category
        opens[start] = chooses[start] = True
        time = self._times(users, row, start, event, opens)

        people = self._people(users)
        visit_start = np.flatnonzero(chooses)
        visit_row, visit_time = row[visit_start], time[visit_start].astype(np.float64)
        category = self._visited(people, visit_row, visit_time, event[visit_start])
        length = np.diff(visit_start, append=len(event))
        visit_of = np.repeat(np.arange(len(length)), length)
        visit = _Visits(visit_start, length, visit_row, visit_time, category, visit_of)
        source = self._sources(visit, event)
        item = self._items(people, visit, event, source)
        kind = self._kinds(first + row, item, event, source != np.arange(len(event)))
        return Log((first + row).astype(np.int32), item, category.astype(np.int32)[visit_of], time, kind)

    def _times(
        self, users: np.ndarray, row: np.ndarray, start: np.ndarray, event: np.ndarray, opens: np.ndarray
    ) -> np.ndarray:
        """[E] unix seconds: long-tailed gaps before sessions, short ones within, fitted into each life.

        All sums are of integers, so that they do not depend on which users are drawn together.
        """
        c = self.config
        rest = 1 - self._draw("gap", event)  # never 0
        within = np.where(opens, 0, (-c.gap_seconds * np.log(rest)).astype(np.int64) + 1)
        between = np.where(opens, _long_gap(rest, c.gap_tail), 0)
        last = np.append(start[1:], len(event)) - 1
        within, between = _running(within, start, row), _running(between, start, row)
        after = _long_gap(1 - self._draw("end", users), c.gap_tail)
        arrival = self._draw("arrival", users).astype(np.float64) * 0.5
        span = (1 - arrival) * c.days * SECONDS_PER_DAY - 2
        busy = np.minimum(1.0, 0.5 * span / np.maximum(within[last], 1))  # a crowded life is pressed together
        idle = (span - busy * within[last]) / (between[last] + after)
        elapsed = busy[row] * within + idle[row] * between
        begin = c.end - 1 - span
        return np.floor(begin[row] + elapsed).astype(np.int64)

    def _visited(self, people: _People, row: np.ndarray, at: np.ndarray, event: np.ndarray) -> np.ndarray:
        """[V] the category of each visit."""
        chosen = _pick(
            self._interest_weights(people, row, at), self._draw("choice", event), np.arange(len(row))
        )
        curious = self._draw("curious", event) < self.config.curiosity
        category = people.interest[row, chosen]
        anywhere = self._draw("anywhere", event[curious])
        category[curious] = _drawn(
            self._any_category, np.zeros_like(anywhere), anywhere, self.config.categories
        )
        return category

    def _sources(self, visit: _Visits, event: np.ndarray) -> np.ndarray:
        """[E] for each event the row of the event whose item it has: its own, or an earlier one's.

        A coming back goes `lag` behaviors back in the same category, lag log-uniform over those there are.
        """
        order = np.argsort(visit.row * self.config.categories + visit.category, kind="stable")
        length = visit.length[order]
        begin = np.cumsum(length) - length  # where each visit begins when all are put in this order
        same = np.zeros(len(order), bool)
        same[1:] = (np.diff(visit.row[order]) == 0) & (np.diff(visit.category[order]) == 0)
        group_begin = np.maximum.accumulate(np.where(same, 0, begin))
        place = np.empty((2, len(order)), np.int64)
        place[:, order] = begin, group_begin
        row_at = np.repeat(visit.start[order] - begin, length) + np.arange(len(event))

        back = np.flatnonzero(self._draw("back", event) < self.config.repeat)
        of = visit.of[back]
        position = place[0][of] + back - visit.start[of]
        known = position - place[1][of]
        back, position, known = back[known > 0], position[known > 0], known[known > 0]
        draw = self._draw("lag", event[back])
        lag = np.minimum(np.exp(draw * np.log(known + 1.0)).astype(np.int64), known)
        source = np.arange(len(event))
        source[back] = row_at[position - lag]
        return _followed(source, back)

    def _items(self, people: _People, visit: _Visits, event: np.ndarray, source: np.ndarray) -> np.ndarray:
        """[E] item numbers: a style by taste, then an item of it by popularity; or what the source has."""
        fresh = np.flatnonzero(source == np.arange(len(event)))
        of = visit.of[fresh]
        weight = self._style_weights(people, visit.row, visit.category, visit.time)
        style = _pick(weight, self._draw("style", event[fresh]), of)
        item = np.empty(len(event), np.int32)
        item[fresh] = self._by_rank(
            visit.category[of] * self.config.styles + style, event[fresh], visit.time[of]
        )
        return item[source]

    def _by_rank(self, cell: np.ndarray, event: np.ndarray, at: np.ndarray) -> np.ndarray:
        """[n] an item of each cell (a style of a category) by popularity; again, if it is not on offer."""
        first, size = self._cell_start[cell], self._cell_start[cell + 1] - self._cell_start[cell]
        item = np.empty(len(cell), np.int32)
        left = np.arange(len(cell))
        for look in range(_LOOKS if self.config.item_days else 1):
            part = self._draw(f"rank {look}" if look else "rank", event[left]).astype(np.float64)
            rank = (size[left] * part ** (1 / (1 - self.config.popularity_tail))).astype(np.int64)
            item[left] = self._item_at[first[left] + np.minimum(rank, size[left] - 1)]
            left = left[~self._on_offer(item[left].astype(np.int64), at[left])]
        return item

    def _kinds(self, user: np.ndarray, item: np.ndarray, event: np.ndarray, again: np.ndarray) -> np.ndarray:
        draw = self._draw("kind", event) * np.where(again, np.float32(0.5), np.float32(1.0))
        if self.config.quality or self.config.thrift:
            draw *= np.exp(-self.worth(user, item)).astype(np.float32)
        buy, cart = self.config.buy, self.config.buy + self.config.cart
        return (draw < cart).astype(np.int8) + (draw < buy)

    def brands_of(self, items: np.ndarray) -> np.ndarray:
        """[n] codes: one of the brands of the item's style with chance `feature`, else any brand."""
        own = self.style_of(items) * BRANDS_PER_STYLE
        own += (self._draw("which brand", items) * BRANDS_PER_STYLE).astype(np.int64)
        any_ = (self._draw("brand", items) * self.config.styles * BRANDS_PER_STYLE).astype(np.int64)
        return np.where(self._draw("true brand", items) < self.config.feature, own, any_)

    def price_bands_of(self, items: np.ndarray) -> np.ndarray:
        """[n] codes: the place of the item's style along the first dimension of taste, or any band."""
        order = np.argsort(np.argsort(self.style_vectors[:, 0]))
        own = (order * len(PRICE_BANDS) // self.config.styles)[self.style_of(items)]
        any_ = (self._draw("price", items) * len(PRICE_BANDS)).astype(np.int64)
        return np.where(self._draw("true price", items) < self.config.feature, own, any_)

    # -- writing

    def write(
        self,
        folder: str | os.PathLike[str],
        progress: Callable[[int], None] | None = None,
        chunk: int = 1 << 14,
    ) -> None:
        """Write `events.parquet`, `items.parquet`, `users.parquet` and `market.json` to a folder.

        Events come by user, then by time. The folder appears once it is whole, and replaces an older one that
        this package wrote. `progress` is told the events written so far. `chunk` is how many events are drawn
        at once (never less than one user's life): it decides speed and memory, not a byte of the result.
        """
        with writing(folder, "market") as partial:
            partial.facts["config"] = dataclasses.asdict(self.config)
            described = {"format": _FORMAT, "config": partial.facts["config"]}
            (partial.path / _CONFIG).write_text(json.dumps(described, indent=1) + "\n")
            self._write_items(partial.path / "items.parquet")
            self._write_users(partial.path / "users.parquet")
            self._write_events(partial.path / "events.parquet", progress, chunk)

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> Market:
        """The market that wrote this folder. Reads only its `market.json`."""
        file = Path(folder) / _CONFIG
        if not file.is_file():
            raise NotSaved(f"{file}: no such file, so {folder} is not a market. {_NOT_HERE}")
        try:
            saved = json.loads(file.read_text())
            found, config = saved["format"], saved["config"]
        except (ValueError, KeyError, TypeError) as error:
            raise Damaged(f"{file}: unreadable ({type(error).__name__}: {error}). {_NOT_HERE}") from error
        if found != _FORMAT:
            raise Mismatch(f"{file} has format {found}, this version reads format {_FORMAT}. {_NOT_HERE}")
        try:
            return cls(MarketConfig(**config))
        except TypeError as error:
            raise Damaged(f"{file}: {error}. {_NOT_HERE}") from error

    def _write_items(self, file: Path) -> None:
        c = self.config
        category = self.category_of(np.arange(c.items))
        order = np.argsort(category, kind="stable")
        in_category = np.empty_like(order)
        in_category[order] = _places(np.bincount(category, minlength=c.categories))
        names = pa.array(_category_names(c.categories))
        brands = pa.array([f"brand {code:02d}" for code in range(c.styles * BRANDS_PER_STYLE)])
        with _TableFile(file) as out:
            for rows in _blocks(c.items):
                columns = {ITEM: self._ids("i", rows), CATEGORY: self._ids("c", category[rows])}
                number = _numbered("", in_category[rows], 4)
                columns[TITLE] = pc.binary_join_element_wise(names.take(category[rows]), number, " ")
                columns["brand"] = brands.take(self.brands_of(rows))
                columns["price_band"] = pa.array(PRICE_BANDS).take(self.price_bands_of(rows))
                out.write(columns)

    def _write_users(self, file: Path) -> None:
        with _TableFile(file) as out:
            for users in _blocks(self.config.users):
                columns = {USER: self._ids("u", users)}
                for name, values in PROFILE.items():
                    columns[name] = pa.array(values).take(self.profile_of(name, users))
                out.write(columns)

    def _write_events(self, file: Path, progress: Callable[[int], None] | None, chunk: int) -> None:
        logs = (self.log(first, stop) for first, stop in self._runs_of_users(chunk))
        categories = np.arange(self.config.categories)
        written = 0
        with _TableFile(file, plain=(ITEM, TIME)) as out:
            for log in _regrouped(logs, _ROW_GROUP):
                first = log.user[0]
                columns = {
                    USER: _named(self._ids("u", np.arange(first, log.user[-1] + 1)), log.user - first),
                    ITEM: self._ids("i", log.item),
                    CATEGORY: _named(self._ids("c", categories), log.category),
                    TIME: log.time,
                    BEHAVIOR: _named(pa.array(BEHAVIORS), log.kind),
                }
                out.write(columns)
                written += len(log.item)
                if progress is not None:
                    progress(written)

    def _runs_of_users(self, events: int) -> Iterator[tuple[int, int]]:
        """(first, stop) of users who together have at most this many events, or of one user who has more."""
        first = 0
        while first < self.config.users:
            limit = self._first_event[first] + events
            stop = max(first + 1, int(np.searchsorted(self._first_event, limit, side="right")) - 1)
            yield first, stop
            first = stop

    def _ids(self, letter: str, numbers: np.ndarray) -> pa.Array:
        c = self.config
        if not c.string_ids:
            return pa.array(numbers, pa.int64())
        count = {"u": c.users, "i": c.items, "c": c.categories}[letter]
        return _numbered(letter, numbers, len(str(count - 1)))


# -- randomness: a hash of what it is for


@cache
def _root(seed: int, purpose: str) -> np.uint64:
    return np.uint64(np.random.SeedSequence([seed, *purpose.encode()]).generate_state(1, np.uint64)[0])


def _hash(key: np.ndarray | np.uint64, numbers: np.ndarray) -> np.ndarray:
    """uint64 of the joint shape: element `numbers` of the SplitMix64 sequence that `key` starts.

    (Steele, Lea, Flood: Fast splittable pseudorandom number generators, OOPSLA 2014.) Unlike a NumPy
    generator's, any element costs the same, about 4 ns: a user's life needs nothing of the users before him.
    """
    mixed = key + numbers.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    mixed ^= mixed >> np.uint64(30)
    mixed *= np.uint64(0xBF58476D1CE4E5B9)
    mixed ^= mixed >> np.uint64(27)
    mixed *= np.uint64(0x94D049BB133111EB)
    mixed ^= mixed >> np.uint64(31)
    return mixed


def _uniform(hashes: np.ndarray) -> np.ndarray:
    """float32 in [0, 1)."""
    return (hashes >> np.uint64(40)).astype(np.float32) * np.float32(2.0**-24)


def _vector_of(hashes: np.ndarray) -> np.ndarray:
    return (hashes >> np.uint64(20) & np.uint64(_BANK - 1)).astype(np.intp)


# -- sampling


def _pick(weight_VK: np.ndarray, draw: np.ndarray, row: np.ndarray) -> np.ndarray:
    """[n] a place in each of `weight_VK[row]`, as likely as its weight says; `draw` [n] decides which.

    Sums over rows of the transpose and one binary search for all: four times as fast as `cumsum` along the
    short axis and comparing whole rows.
    """
    V, K = weight_VK.shape
    running_KV = np.ascontiguousarray(weight_VK.T)
    for k in range(1, K):
        running_KV[k] += running_KV[k - 1]
    flat = running_KV.ravel()
    target = draw * flat[(K - 1) * V + row]
    found = np.zeros(len(row), np.intp)
    step = 1 << (K - 1).bit_length() >> 1
    while step:  # a place of no weight does not exceed what the place before it did not
        found += step * (flat[np.minimum(found + (step - 1), K - 1) * V + row] <= target)
        step >>= 1
    return found


def _stacked_cumulative(weight_PC: np.ndarray) -> np.ndarray:
    """[P*C] row p holds p + its running shares, so that all rows together are sorted."""
    running = np.cumsum(weight_PC, axis=1)
    running /= running[:, -1:]
    return (running + np.arange(len(running))[:, None]).ravel()


def _drawn(stacked: np.ndarray, row: np.ndarray, draw: np.ndarray, columns: int) -> np.ndarray:
    """Columns drawn from these rows of `_stacked_cumulative`; row + draw is exact, as draw has 24 bits."""
    return np.searchsorted(stacked, row + draw.astype(np.float64), side="right") - row * columns


def _long_gap(rest: np.ndarray, tail: float) -> np.ndarray:
    """Pareto integers of at least 1,000 from uniforms in (0, 1]."""
    return (1_000 * rest.astype(np.float64) ** (-1 / tail)).astype(np.int64)


def _running(values: np.ndarray, start: np.ndarray, row: np.ndarray) -> np.ndarray:
    """[E] running sums within each row, whose first event stands at `start`."""
    total = np.cumsum(values)
    return total - (total[start] - values[start])[row]


def _followed(source: np.ndarray, back: np.ndarray) -> np.ndarray:
    """`source` with chains (copies of copies) followed to their beginning; only rows `back` are copies."""
    while len(back):
        further = source[source[back]]
        moved = further != source[back]
        source[back] = further
        back = back[moved]
    return source


def _places(sizes: np.ndarray) -> np.ndarray:
    """[sum of sizes] 0, 1, 2 ... afresh for each size."""
    return np.arange(sizes.sum()) - np.repeat(np.cumsum(sizes) - sizes, sizes)


# -- sizes with long tails that add up exactly


def _activity(c: MarketConfig, rng: np.random.Generator) -> np.ndarray:
    """[U] behaviors of each user, from `least` to `most` by a bounded Pareto law, adding up to `events`."""
    quantile = (np.arange(min(c.users, 10_000)) + 0.5) / min(c.users, 10_000)
    low, high = -5.0, 50.0
    for _ in range(60):
        middle = (low + high) / 2
        more = _bounded_pareto(quantile, middle, c.least, c.most).mean() * c.users > c.events
        low, high = (middle, high) if more else (low, middle)
    quantile = (np.arange(c.users) + 0.5) / c.users
    count = np.rint(_bounded_pareto(quantile, low, c.least, c.most)).astype(np.int64)
    while left := c.events - count.sum():  # a few events, a rounding per user at most
        room = np.flatnonzero(count < c.most if left > 0 else count > c.least)
        count[room[: abs(left)]] += np.sign(left)
    return rng.permutation(count)


def _bounded_pareto(quantile: np.ndarray, exponent: float, low: float, high: float) -> np.ndarray:
    if abs(exponent) < 1e-9:
        return low * (high / low) ** quantile
    return low * (1 - quantile * (1 - (low / high) ** exponent)) ** (-1 / exponent)


def _category_sizes(c: MarketConfig, rng: np.random.Generator) -> np.ndarray:
    """[C] items of each category, at least 1, adding up to `items`; in no order."""
    share = np.arange(1.0, c.categories + 1) ** -c.category_tail
    size = 1 + np.floor((c.items - c.categories) * share / share.sum()).astype(np.int64)
    size[: c.items - size.sum()] += 1
    return rng.permutation(size)


# -- tables


def _category_names(count: int) -> list[str]:
    """Readable and all different: lamp, chair ... desk lamp ... desk lamp 2 ..."""
    bare = [*_NOUNS, *(f"{kind} {noun}" for kind in _KINDS for noun in _NOUNS)]
    again = (f"{name} {round_}" for round_ in range(2, count // len(bare) + 2) for name in bare)
    return [*bare, *again][:count]


def _numbered(letter: str, numbers: np.ndarray, width: int) -> pa.Array:
    """Strings such as "u0001234": a letter and at least `width` digits. About 4 ns per digit."""
    width = max(width, len(str(numbers.max(initial=0))))
    text = np.empty((len(numbers), len(letter) + width), np.uint8)
    text[:, : len(letter)] = np.frombuffer(letter.encode(), np.uint8)
    for place in range(text.shape[1] - 1, len(letter) - 1, -1):
        numbers, digit = np.divmod(numbers, 10)
        text[:, place] = digit + ord("0")
    offset = np.arange(len(text) + 1, dtype=np.int32) * text.shape[1]
    return pa.StringArray.from_buffers(len(text), pa.py_buffer(offset), pa.py_buffer(text))


def _blocks(count: int) -> Iterator[np.ndarray]:
    """0 .. count - 1, a row group at a time."""
    for first in range(0, count, _ROW_GROUP):
        yield np.arange(first, min(first + _ROW_GROUP, count))


def _regrouped(logs: Iterable[Log], size: int) -> Iterator[Log]:
    """The same events in logs of exactly this size (the last may be smaller)."""
    waiting: list[Log] = []
    held = 0
    for log in logs:
        waiting.append(log)
        held += len(log.item)
        while held >= size:
            whole = Log(*map(np.concatenate, zip(*waiting, strict=True)))
            yield Log(*(column[:size] for column in whole))
            waiting, held = [Log(*(column[size:] for column in whole))], held - size
    if held:
        yield Log(*map(np.concatenate, zip(*waiting, strict=True)))


def _named(names: pa.Array, codes: np.ndarray) -> pa.Array:
    """`names[codes]`; strings stay a dictionary, which Parquet takes over without hashing every row."""
    if pa.types.is_string(names.type):
        return pa.DictionaryArray.from_arrays(pa.array(codes, pa.int32()), names)
    return names.take(pa.array(codes))


class _TableFile:
    """A Parquet file written a row group at a time; the first one decides the columns.

    `plain` columns, of mostly different values, are spared the search for a dictionary; the integers among
    them are written as differences.
    """

    def __init__(self, file: Path, plain: tuple[str, ...] = ()) -> None:
        self.file, self.plain = file, plain
        self.writer: pq.ParquetWriter | None = None

    def __enter__(self) -> _TableFile:
        return self

    def __exit__(self, *_: object) -> None:
        if self.writer is not None:
            self.writer.close()

    def write(self, columns: dict[str, Any]) -> None:
        table = pa.table(columns)
        if self.writer is None:
            self.writer = self._opened(table.schema)
        self.writer.write_table(table)

    def _opened(self, schema: pa.Schema) -> pq.ParquetWriter:
        encoding = {n: "DELTA_BINARY_PACKED" for n in self.plain if pa.types.is_integer(schema.field(n).type)}
        return pq.ParquetWriter(
            self.file,
            schema,
            compression="zstd",
            use_dictionary=[name for name in schema.names if name not in self.plain],
            column_encoding=encoding or None,
            store_schema=False,  # it would bring the dictionaries back as types of their own
        )
