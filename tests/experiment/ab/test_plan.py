"""A plan says what is wrong with it before anything is run, what was found, and what was wanted."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest

from longretriever.errors import InputError
from longretriever.experiment.ab.plan import (
    LIKE_REAL,
    MOST_ROUTES,
    Arm,
    Plan,
    PlatformConfig,
    Route,
    world,
)
from longretriever.experiment.ab.routes import ItemToItem, Popular
from longretriever.market import MarketConfig
from longretriever.retrieve.interests import Top
from longretriever.retrieve.merge import score

DAY = 86_400


@dataclass(frozen=True)
class Config:
    dim: int = 8


POPULAR, NEAR = Route("popular", counted=Popular), Route("near", counted=ItemToItem)
CONTROL, MORE = Arm("control", (POPULAR,)), Arm("more", (POPULAR, NEAR))
MARKET = world(2_000, 20, days=30.0)
PLAN = Plan(MARKET, (CONTROL, MORE))


def fault(text: str):
    return pytest.raises(InputError, match=text)


def many(n: int) -> tuple[Route, ...]:
    return tuple(Route(f"r{i}", counted=Popular) for i in range(n))


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({}, r"^route 'x': expected either learn= or counted=\.$"),
        ({"learn": Config(), "counted": Popular}, r"^route 'x': expected either learn= or counted=\.$"),
        ({"learn": Config}, r"^route 'x': learn=<class .*Config'>, expected a training configuration\.$"),
        ({"learn": "best"}, r"^route 'x': learn='best', expected a training configuration\.$"),
        ({"counted": Popular, "k": 0}, r"^route 'x': k is 0, expected at least 1\.$"),
    ],
)
def test_a_wrong_route_is_told(given: dict[str, Any], said: str):
    with fault(said):
        Route("x", **given)


def test_a_route_is_asked_with_what_is_not_left_to_the_model():
    assert Route("x", learn=Config()).load == {}
    given = Route("x", learn=Config(), interests=Top(3), merge=score, asking={"exact": True}).load
    assert given == {"interests": Top(3), "merge": score, "exact": True}


@pytest.mark.parametrize(
    ("routes", "said"),
    [
        ((), r"^arm 'a' has the routes \[\], expected at least one, each once\.$"),
        ((POPULAR, NEAR, POPULAR), r"routes \['popular', 'near', 'popular'\], expected at least one, each"),
    ],
)
def test_a_wrong_arm_is_told(routes: tuple[Route, ...], said: str):
    with fault(said):
        Arm("a", routes)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"warm_up": 0}, r"warm_up=0, .*: warm_up, most_of_one and ranker_rows are at least 1"),
        ({"most_of_one": 0}, r"most_of_one=0, .*: warm_up, most_of_one and ranker_rows are at least 1"),
        ({"ranker_rows": 0}, r"ranker_rows=0\): warm_up, most_of_one and ranker_rows are at least 1"),
        ({"order_weight": -0.1}, r"order_weight=-0\.1, .* order_weight at least 0\.$"),
        ({"order_weight": float("nan")}, r"order_weight=nan, .* order_weight at least 0\.$"),
        ({"explore": 1.1}, r"^explore is 1\.1, expected a share from 0 to 1\.$"),
        ({"explore": -0.1}, r"^explore is -0\.1, expected a share from 0 to 1\.$"),
        ({"explore": float("nan")}, r"^explore is nan, expected a share from 0 to 1\.$"),
    ],
)
def test_a_wrong_platform_is_told(given: dict[str, Any], said: str):
    with fault(said):
        PlatformConfig(**given)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"arms": ()}, r"^arms \[\]: expected at least one, each with a name of its own\.$"),
        ({"arms": (CONTROL, CONTROL)}, r"^arms \['control', 'control'\]: expected at least one, each with a"),
        ({"arms": (Arm("", (POPULAR,)),)}, r"^arms \[''\]: expected at least one, each with a name"),
        (
            {"arms": (CONTROL, replace(MORE, against="none"))},
            r"^arm 'more' is to be compared with 'none', expected another of \['control', 'more'\]\.$",
        ),
        ({"arms": (CONTROL, replace(MORE, against="more"))}, r"^arm 'more' is to be compared with 'more'"),
        ({"days": 0}, r"^0 days, retraining after 0: expected at least 1, and 0 or more\.$"),
        ({"retrain": -1}, r"^7 days, retraining after -1: expected at least 1, and 0 or more\.$"),
        (
            {"days": 15},
            r"^a market of 30 days is short for 1 of warm-up and 15 of test: .* Ask for at least 32\.$",
        ),
        ({"days": 12, "platform": PlatformConfig(warm_up=4)}, r"30 days is short for 4 of .* least 32\.$"),
        ({"users": 0}, r"^0 users, expected 1 to 20, those of the market\.$"),
        ({"users": 21}, r"^21 users, expected 1 to 20, those of the market\.$"),
        ({"arms": (Arm("a", many(MOST_ROUTES + 1)),)}, r"^33 routes, expected at most 32 in all arms"),
        (
            {"arms": (CONTROL, Arm("b", (replace(POPULAR, k=7),)))},
            r"^two different routes are called 'popular'\. Give each its own name\.$",
        ),
        (
            {"arms": (Arm("a", (Route("x", counted=lambda store: None),)),)},  # type: ignore[arg-type, return-value]
            r"lambda.* cannot be told from another of its kind",
        ),
        ({"seed": -1}, r"^seed is -1, draw is 0: expected at least 0\.$"),
        ({"draw": -2}, r"^seed is 1, draw is -2: expected at least 0\.$"),
        (
            {"market": replace(MARKET, string_ids=True)},
            r"^the market has string ids, expected integers: leave string_ids out\.$",
        ),
    ],
)
def test_a_wrong_plan_is_told(given: dict[str, Any], said: str):
    with fault(said):
        replace(PLAN, **given)


def test_what_is_just_allowed_is_not_refused():
    replace(PLAN, days=14, users=20, platform=PlatformConfig(explore=1, order_weight=0))
    replace(PLAN, days=1, users=1, arms=(Arm("a", many(MOST_ROUTES)),))


def test_routes_of_all_arms_come_once_in_order():
    again = Route("popular", counted=Popular)
    other = Route("more popular", counted=Popular)
    arms = (Arm("a", (NEAR,)), Arm("b", (again, NEAR, other)), Arm("c", (POPULAR,)))
    assert replace(PLAN, arms=arms).routes == (NEAR, POPULAR, other)


def test_arms_are_compared_with_the_control_unless_they_say():
    last = replace(MORE, name="last", against="more")
    plan = replace(PLAN, arms=(CONTROL, MORE, last))
    assert [plan.against(arm) for arm in plan.arms] == [None, "control", "more"]
    led = replace(PLAN, arms=(replace(CONTROL, against="more"), MORE))
    assert [led.against(arm) for arm in led.arms] == ["more", "control"]


def test_the_test_is_the_end_of_the_log():
    plan = replace(PLAN, days=3, platform=PlatformConfig(warm_up=2))
    assert plan.begin == MARKET.end - 5 * DAY


def test_the_world_is_like_real_logs_but_for_what_is_set_by_hand():
    found = world(4_000, 30, seed=5, stay=0.5, days=90.0)
    assert {name: getattr(found, name) for name in LIKE_REAL} == {**LIKE_REAL, "stay": 0.5}
    assert (found.events, found.users, found.seed, found.days) == (4_000, 30, 5, 90)
    assert found.items == MarketConfig.of_size(4_000).items
