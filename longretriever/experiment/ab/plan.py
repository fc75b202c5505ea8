"""What is tested in the simulated market? Arms, each a set of retrieval routes before the same ranker."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass, replace
from typing import Any, Protocol

import numpy as np

from longretriever.errors import InputError
from longretriever.events import SECONDS_PER_DAY
from longretriever.experiment.plan import Asked, described
from longretriever.market import MarketConfig
from longretriever.market.feed import FeedConfig
from longretriever.retrieve.interests import Interests
from longretriever.retrieve.merge import Merge
from longretriever.retrieve.rules import Rules
from longretriever.store.behaviors import Life, Store

MOST_ROUTES = 32
"""Of all arms together: which routes brought an item is a bit mask."""


LIKE_REAL: Mapping[str, float] = {
    **{"stay": 0.35, "gap_tail": 2.0, "session_events": 4.0, "popularity_tail": 0.65, "curiosity": 0.2},
    **{"quality": 0.5, "thrift": 0.2},
}
"""Fields of a market whose log is like real ones in 37 of 39 figures (`docs/market.md`), and whose items are
not all worth the same. Chosen by those figures alone, before any test was run."""


def world(events: int, users: int, seed: int = 1, **others: Any) -> MarketConfig:
    """The market that tests are run in unless another is given; `others` are fields set by hand."""
    return MarketConfig.of_size(events, seed=seed, users=users, **{**LIKE_REAL, **others})


class Finder(Protocol):
    """What a route is once it is ready: one method."""

    def find(self, lives: Sequence[Life], k: int, seed: int) -> list[np.ndarray]:
        """For each life at most `k` distinct item numbers of the store, best first; `seed` draws."""
        ...


@dataclass(frozen=True)
class Route(Asked):
    """One way to candidates. Routes of equal name are the same route, in whichever arms they are.

    name       as it stands in the report
    learn      a training configuration; routes with equal ones share their trainings
    counted    instead of `learn`: what makes a `Finder` of a store: the one before the test, or, where models
               are trained again, that which they are trained on
    interests, merge, asking   how a learned model is asked; see `experiment.plan.Arm`
    rules      and what is demanded of it
    k          candidates of a request
    """

    name: str
    learn: Any = None
    counted: Callable[[Store], Finder] | None = None
    interests: Interests | None = None
    merge: Merge | None = None
    asking: Mapping[str, Any] = field(default_factory=dict)
    rules: Rules = Rules()
    k: int = 100

    def __post_init__(self) -> None:
        if (self.learn is None) == (self.counted is None):
            raise InputError(f"route {self.name!r}: expected either learn= or counted=.")
        if self.learn is not None and (isinstance(self.learn, type) or not is_dataclass(self.learn)):
            raise InputError(f"route {self.name!r}: learn={self.learn!r}, expected a training configuration.")
        if self.k < 1:
            raise InputError(f"route {self.name!r}: k is {self.k}, expected at least 1.")


@dataclass(frozen=True)
class Arm:
    """One version of the platform. The first arm of a plan is the control.

    luck     draws the reactions of people: arms of the same luck are paired; the same platform with another
             luck makes an A/A test, which must find nothing
    against  name of the arm that it is compared with; None: the control
    """

    name: str
    routes: tuple[Route, ...]
    about: str = ""
    luck: int = 0
    against: str | None = None

    def __post_init__(self) -> None:
        names = [route.name for route in self.routes]
        if not names or len(set(names)) < len(names):
            raise InputError(f"arm {self.name!r} has the routes {names}, expected at least one, each once.")


@dataclass(frozen=True)
class PlatformConfig:
    """What stands behind the routes, the same in all arms.

    warm_up        days before the test on which the control's routes are shown in random order, so that the
                   ranker has something to learn from; nothing of it counts
    explore        share of slots that a random candidate gets, so that the ranker goes on learning
    most_of_one    items of one category on a page, at most
    order_weight   how many clicks more an order counts for in the ranker, beside its own
    ranker_rows    impressions that the ranker learns from, the newest
    """

    warm_up: int = 1
    explore: float = 0.05
    most_of_one: int = 4
    order_weight: float = 3.0
    ranker_rows: int = 400_000

    def __post_init__(self) -> None:
        if min(self.warm_up, self.most_of_one, self.ranker_rows) < 1 or not self.order_weight >= 0:
            raise InputError(
                f"{self}: warm_up, most_of_one and ranker_rows are at least 1, order_weight at least 0."
            )
        if not 0 <= self.explore <= 1:
            raise InputError(f"explore is {self.explore}, expected a share from 0 to 1.")


@dataclass(frozen=True)
class Plan:
    """All that decides what a test finds: equal plans, equal results.

    users    how many of the market's users take part; None: all
    draw     draws those users, what the platform explores, and the contexts that routes draw
    days     of the test, after the warm-up; the market's log must be longer
    retrain  train all models again every so many days, each arm's on what its own users did; 0: never
    minutes, samples  bounds of each training; None: as its configuration has it
    seed     of the trainings and of the ranker; the world has its own, in `market`
    """

    market: MarketConfig
    arms: tuple[Arm, ...]
    feed: FeedConfig = FeedConfig()
    platform: PlatformConfig = PlatformConfig()
    users: int | None = None
    days: int = 7
    retrain: int = 0
    minutes: float | None = None
    samples: int | None = None
    seed: int = 1
    draw: int = 0
    threads: int | None = None

    def __post_init__(self) -> None:
        names = [arm.name for arm in self.arms]
        if not names or len(set(names)) < len(names) or not all(names):
            raise InputError(f"arms {names}: expected at least one, each with a name of its own.")
        for arm in self.arms:
            if arm.against is not None and (arm.against not in names or arm.against == arm.name):
                raise InputError(
                    f"arm {arm.name!r} is to be compared with {arm.against!r}, expected another of {names}."
                )
        if self.days < 1 or self.retrain < 0:
            raise InputError(
                f"{self.days} days, retraining after {self.retrain}: expected at least 1, and 0 or more."
            )
        if min(self.seed, self.draw) < 0:
            raise InputError(f"seed is {self.seed}, draw is {self.draw}: expected at least 0.")
        if self.market.string_ids:
            raise InputError("the market has string ids, expected integers: leave string_ids out.")
        if self.market.days < 2 * (self.days + self.platform.warm_up):
            raise InputError(
                f"a market of {self.market.days:g} days is short for {self.platform.warm_up} of warm-up and "
                f"{self.days} of test: too little would be left to learn from. Ask for at least "
                f"{2 * (self.days + self.platform.warm_up)}."
            )
        if self.users is not None and not 1 <= self.users <= self.market.users:
            raise InputError(
                f"{self.users:,} users, expected 1 to {self.market.users:,}, those of the market."
            )
        if len(self.routes) > MOST_ROUTES:
            raise InputError(
                f"{len(self.routes)} routes, expected at most {MOST_ROUTES} in all arms together."
            )
        for route in self.routes:  # whatever is wrong with a configuration is said before the first hour
            strange = {"seed", "minutes", "samples"} - {f.name for f in fields(route.learn or self)}
            if strange:
                raise InputError(
                    f"route {route.name!r}: {type(route.learn).__name__} has no field {strange.pop()!r}, "
                    "which a plan sets."
                )
            described([route.learn, route.counted, route.load, route.rules])

    def changed(self, assignments: Sequence[str]) -> Plan:
        """With fields set by "market.FIELD=VALUE", "feed.FIELD=VALUE" or "platform.FIELD=VALUE"."""
        found: dict[str, dict[str, Any]] = {"market": {}, "feed": {}, "platform": {}}
        for text in assignments:
            where, _, value = text.partition("=")
            group, _, name = where.partition(".")
            named = [f.name for f in fields(getattr(self, group))] if group in found else list(found)
            if name not in named:
                raise InputError(
                    f"{text!r}: expected market.FIELD=VALUE, feed.FIELD=VALUE or platform.FIELD=VALUE, and "
                    f"{where!r} to begin with or name one of {', '.join(named)}."
                )
            found[group][name] = _like(getattr(getattr(self, group), name), value, text)
        return replace(self, **{g: replace(getattr(self, g), **of) for g, of in found.items()})

    @property
    def routes(self) -> tuple[Route, ...]:
        """The routes of all arms, each once, in order. Raises `InputError` where two have one name."""
        found: dict[str, Route] = {}
        for arm in self.arms:
            for route in arm.routes:
                if found.setdefault(route.name, route) != route:
                    raise InputError(
                        f"two different routes are called {route.name!r}. Give each its own name."
                    )
        return tuple(found.values())

    def against(self, arm: Arm) -> str | None:
        """The name of the arm that this one is compared with; None for the control, unless it has one."""
        return arm.against or (None if arm == self.arms[0] else self.arms[0].name)

    def taking_part(self) -> np.ndarray:
        """[U] the users of the market who take part, sorted."""
        everyone = np.random.default_rng([self.draw, 7]).permutation(self.market.users)
        return np.sort(everyone[: self.users])

    @property
    def begin(self) -> int:
        """Unix seconds of the first day of the warm-up: all before it can be learned from."""
        return self.market.end - (self.days + self.platform.warm_up) * SECONDS_PER_DAY


def _like(now: Any, value: str, text: str) -> Any:
    """A value of the same kind as the one that it replaces."""
    if isinstance(now, bool):
        kinds = {"true": True, "false": False}
        if value.lower() in kinds:
            return kinds[value.lower()]
    else:
        try:
            return type(now)(value)
        except ValueError:
            pass
    raise InputError(f"{text!r}: {value!r} is no {type(now).__name__}, as {now!r} is.")
