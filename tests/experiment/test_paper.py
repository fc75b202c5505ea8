"""A claim holds where its effect has the claimed sign in the mean over worlds, by more than worlds differ."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.stats import t, ttest_1samp

from longretriever.errors import InputError
from longretriever.experiment import paper
from longretriever.experiment.ab.plan import Plan, world
from longretriever.market import MarketConfig

NAN = float("nan")
BASE = world(20_000, 200)
ALL = (*paper.CLAIMS, *paper.OURS_TOO)


def test_the_interval_over_worlds_is_students_t():
    values = [0.02, 0.05, -0.01, 0.03]
    found = paper._over(values, [[9, 9]] * 4)
    half = t.ppf(0.975, 3) * np.std(values, ddof=1) / 2
    assert found["mean"] == pytest.approx(0.0225)
    assert found["interval"] == pytest.approx([0.0225 - half, 0.0225 + half])
    expected = ttest_1samp(values, 0).confidence_interval(0.95)
    assert found["interval"] == pytest.approx([expected.low, expected.high])
    assert found["by_world"] == values
    assert paper._over([0.1, 0.3], [[9, 9]] * 2)["interval"] == pytest.approx(
        [0.2 - 1.2706205, 0.2 + 1.2706205]
    )


def test_the_interval_of_a_single_world_is_that_of_its_users():
    assert paper._over([0.02], [[0.01, 0.05]]) == {
        "mean": 0.02,
        "interval": [0.01, 0.05],
        "by_world": [0.02],
    }


@pytest.mark.parametrize(
    ("interval", "more", "expected"),
    [
        ([0.01, 0.02], True, "holds"),
        ([0.01, 0.02], False, "fails"),
        ([-0.02, -0.01], True, "fails"),
        ([-0.02, -0.01], False, "holds"),
        ([-0.01, 0.02], True, "undecided"),
        ([-0.01, 0.02], False, "undecided"),
        ([0.0, 0.02], True, "undecided"),
        ([NAN, NAN], True, "undecided"),
    ],
)
def test_a_claim_holds_where_the_whole_interval_is_on_its_side(interval, more, expected):
    assert paper.verdict({"interval": interval}, more) == expected


def test_the_same_lift_in_all_worlds_is_decided_but_no_lift_is_not():
    assert paper.verdict(paper._over([0.1, 0.1], [[-1, 1]]), True) == "holds"
    assert paper.verdict(paper._over([0.0, 0.0], [[-1, 1]]), True) == "undecided"


def outcome(lift: float, p: float = 0.01, without: str = "") -> dict:
    """What is looked at of the result of a test: every claim's comparison, and others that must not count."""
    rows = [
        {
            "arm": claim.arm,
            "against": claim.against,
            "figure": figure,
            "lift": lift * (1 if claim.more else -1) + m / 10,
            "interval": [lift - 1, lift + 1],
            "p": p,
        }
        for claim in ALL
        for m, figure in enumerate((paper.MAIN, *(f for f in paper.SHOWN if f != paper.MAIN)))
        if claim.arm != without
    ]
    other = {"arm": paper.PAPER, "against": "EBR", "figure": paper.MAIN, "lift": -9, "interval": [-9, -9]}
    return {"comparisons": [{**other, "p": 0.0}, *rows]}


def test_every_claim_is_judged_over_the_worlds():
    tests = [outcome(0.02), outcome(0.03, p=0.2), outcome(0.025)]
    found = paper.judged(tests)
    assert [claim["arm"] for claim in found] == [claim.arm for claim in ALL]
    for claim in found:
        sign = 1 if claim["more"] else -1
        lift = claim["figures"][paper.MAIN]
        assert lift["mean"] == pytest.approx(sign * 0.025)
        assert lift["by_world"] == pytest.approx([sign * 0.02, sign * 0.03, sign * 0.025])
        assert lift["sure_worlds"] == 2
        half = 4.3026527 * 0.005 / math.sqrt(3)
        assert lift["interval"] == pytest.approx([sign * 0.025 - half, sign * 0.025 + half])
        assert claim["verdict"] == "holds"
        assert list(claim["figures"]) == list(paper.SHOWN)
        assert claim["figures"]["pv"]["mean"] == pytest.approx(sign * 0.025 + 0.1)


def test_worlds_that_disagree_leave_a_claim_undecided_and_the_other_sign_makes_it_fail():
    assert {c["verdict"] for c in paper.judged([outcome(0.3), outcome(-0.2)])} == {"undecided"}
    assert {c["verdict"] for c in paper.judged([outcome(-0.2), outcome(-0.21)])} == {"fails"}


def test_a_claim_whose_arm_is_missing_is_left_out_and_a_lift_that_is_none_is_undecided():
    found = paper.judged([outcome(0.02, without="Top 5"), outcome(0.03, without="Top 5")])
    assert [claim["arm"] for claim in found] == [claim.arm for claim in ALL if claim.arm != "Top 5"]
    found = paper.judged([outcome(0.02), outcome(NAN, p=NAN)])
    assert {claim["verdict"] for claim in found} == {"undecided"}
    assert {claim["figures"][paper.MAIN]["sure_worlds"] for claim in found} == {1}


def test_routes_are_those_that_an_arm_is_named_for():
    figures = {name: {"value": 0.2, "interval": [0.1, 0.3]} for name in paper.ROUTE_FIGURES}
    more = {name: {"value": 0.4, "interval": [0.1, 0.3]} for name in paper.ROUTE_FIGURES}
    tests = [
        {"arms": {"MIND": {"routes": {"popular": figures, "MIND": of}}, "x": {"routes": {"y": of}}}}
        for of in (figures, more)
    ]
    found = paper.routes_compared(tests)
    assert list(found) == ["MIND"]
    assert list(found["MIND"]) == list(paper.ROUTE_FIGURES)
    assert found["MIND"]["uer"]["mean"] == pytest.approx(0.3)
    assert found["MIND"]["uer"]["by_world"] == [0.2, 0.4]


def test_every_value_of_a_sweep_makes_a_market_that_differs_in_it_alone():
    found = {sweep.name: sweep.values for sweep in paper.sweeps(BASE)}
    assert len(found) == 4
    for values in found.values():
        assert len({value for value, _ in values}) == len(values) == 3
        for _, changes in values:
            market = paper.replace(BASE, **changes)
            assert isinstance(market, MarketConfig)
            differs = {name for name in vars(BASE) if getattr(market, name) != getattr(BASE, name)}
            assert differs <= set(changes)
            assert market.seed == BASE.seed


def test_a_sweep_does_what_its_values_say():
    lives, interests, common, drift = ([paper.replace(BASE, **c) for _, c in s.values] for s in _swept())
    assert [market.events / market.users for market in lives] == [100, 400, 1_600]
    assert [(m.fewest_interests, m.most_interests) for m in interests] == [(2, 4), (5, 20), (20, 60)]
    assert [market.common for market in common] == [0, 0.35, 0.8]
    own = [market.moving / (1 - market.common) for market in common]
    assert own == pytest.approx([BASE.moving / (1 - BASE.common)] * 3), (
        "what is a category's own drifts alike"
    )
    assert [market.drift_days for market in drift] == [7, 30, 365]


def _swept() -> tuple[paper.Sweep, ...]:
    return paper.sweeps(BASE)


def test_every_arm_has_the_base_routes_and_its_own():
    arms = paper.arms(k=40)
    names = [arm.name for arm in arms]
    assert names == ["MIND", *(claim.arm for claim in ALL)]
    assert len(set(names)) == len(names)
    for arm in arms:
        assert [route.name for route in arm.routes] == ["popular", "item-to-item", arm.name]
        assert {route.k for route in arm.routes} == {40}
    against = {arm.name: arm.against for arm in arms}
    assert against == {"MIND": None, **{claim.arm: claim.against for claim in ALL}}
    assert len({repr(arm.routes[-1]) for arm in arms}) == len(arms), "no two are the same system"
    Plan(market=BASE, arms=arms)  # raises where arms do not fit together


def test_one_world_is_too_few(tmp_path):
    with pytest.raises(InputError, match="1 worlds, expected at least 2"):
        paper.run_paper(Plan(market=BASE, arms=paper.arms()), tmp_path, worlds=1)


def test_a_sweep_that_does_not_exist_is_said_before_anything_is_lived(tmp_path):
    plan = Plan(world(20_000, 200), paper.arms())
    with pytest.raises(InputError, match="sweep 'weather': expected some of lives, interests, taste, drift"):
        paper.run_paper(plan, tmp_path, swept=("weather",))
    with pytest.raises(InputError, match="3 worlds for the sweeps, expected at most the 2 of the tables"):
        paper.run_paper(plan, tmp_path, worlds=2, sweep_worlds=3)
