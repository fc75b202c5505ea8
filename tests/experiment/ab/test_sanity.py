"""A/A tests differ in luck alone, and say how often they found something all the same."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from longretriever.errors import InputError
from longretriever.experiment.ab import online, sanity
from longretriever.experiment.ab.plan import Arm, Plan, PlatformConfig, Route, world
from longretriever.experiment.ab.routes import ItemToItem, Popular
from longretriever.experiment.ab.sanity import _false_positives, nth, run_aa
from longretriever.market.feed import FeedConfig

POPULAR, NEAR = Route("popular", counted=Popular, k=30), Route("item-to-item", counted=ItemToItem, k=30)
PLAN = Plan(
    world(8_000, 60, days=20.0, most=1_000),
    (Arm("control", (POPULAR, NEAR), about="As it is.", luck=5, against="more"), Arm("more", (POPULAR,))),
    feed=FeedConfig(slots=4, pages=2),
    platform=PlatformConfig(most_of_one=2),
    days=1,
    users=50,
    draw=7,
    threads=1,
)


def test_the_arms_are_the_control_twice_and_differ_in_luck_alone():
    plans = [nth(PLAN, n) for n in range(4)]
    for n, plan in enumerate(plans):
        once, again = plan.arms
        assert (once.name, again.name) == ("control, once", "control, again")
        assert replace(once, name="", luck=0) == replace(again, name="", luck=0)
        assert once.routes == PLAN.arms[0].routes
        assert plan.against(again) == once.name
        assert plan.against(once) is None
        assert replace(plan, arms=PLAN.arms, draw=7) == PLAN
        assert plan.draw == 7 + n
    lucks = [arm.luck for plan in plans for arm in plan.arms]
    assert len(set(lucks)) == len(lucks)


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("work")


def test_shares_are_shares_and_the_same_again(work):
    told: list[tuple[int, int]] = []
    said: list[str] = []
    found = run_aa(PLAN, 3, work, workers=1, tested=lambda *n: told.append(n), said=said.append)
    assert told == [(1, 3), (2, 3), (3, 3)]
    assert len([line for line in said if "ingesting" in line]) == 1, "one world for all"
    assert len(list(work.glob("world-*"))) == 1
    assert len(list(work.glob("test-*"))) == 3
    assert (found["runs"], found["level"]) == (3, 0.05)
    assert list(found["figures"]) == list(online.FIGURES)
    for of in found["figures"].values():
        for share in ("p_under_level", "interval_misses_0"):
            assert of[share] in (0, 1 / 3, 2 / 3, 1)
        assert of["standard_error"] == pytest.approx(np.sqrt(0.05 * 0.95 / 3))
        assert 0 < of["least_p"] <= 1
    assert len({of["least_p"] for of in found["figures"].values()}) > 4
    again = run_aa(PLAN, 3, work, workers=1, said=said.append)
    assert json.dumps(again) == json.dumps(found)


def row(figure: str, p: float, low: float, high: float) -> dict:
    return {"figure": figure, "p": p, "interval": [low, high]}


def test_false_positives_are_counted_by_hand():
    nan = float("nan")
    found = _false_positives(
        [
            [row("a", 0.04, -1, 1), row("b", nan, nan, nan)],
            [row("a", 0.05, 0.1, 1), row("b", 0.3, -1, 1)],
            [row("a", 0.01, -1, -0.1), row("b", 0.2, -1, 1)],
            [row("a", 0.9, 0, 0), row("b", 0.02, -1, 1)],
        ]
    )
    error = np.sqrt(0.05 * 0.95 / 4)
    assert found["a"] == {
        "p_under_level": 0.5,
        "interval_misses_0": 0.5,
        "standard_error": error,
        "least_p": 0.01,
    }
    assert found["b"] == {
        "p_under_level": 0.25,
        "interval_misses_0": 0,
        "standard_error": error,
        "least_p": 0.02,
    }


def test_what_learns_is_what_was_given(work, monkeypatch):
    """Also when models are trained again within a test."""

    def learn(store, out, config, threads, trained):
        raise AssertionError

    given = []
    monkeypatch.setattr(sanity.Test, "live", lambda self, *rest: given.append(self.learn))
    monkeypatch.setattr(sanity.Test, "result", lambda self, *rest: {"comparisons": [row("a", 1, 0, 0)]})
    run_aa(PLAN, 2, work, workers=1, learn=learn)
    assert given == [learn, learn]


def test_no_tests_are_too_few(tmp_path):
    with pytest.raises(InputError, match=r"^0 A/A tests, expected at least 1\.$"):
        run_aa(PLAN, 0, tmp_path / "work")
    assert not (tmp_path / "work").exists()
