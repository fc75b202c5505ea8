"""Equal names mean equal runs: what decides a result is in its name, and nothing else is."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import pytest

from longretriever.errors import InputError
from longretriever.evaluate.rivals import Popular, Recent
from longretriever.experiment.plan import Arm, Plan, described
from longretriever.retrieve import merge
from longretriever.retrieve.interests import RandomInTop, Top

LOG = {"split": "s", "full": "f", "train": "t"}


@dataclass(frozen=True)
class Config:
    width: int = 8
    seed: int = 0
    minutes: float | None = None
    samples: int | None = None


@dataclass(frozen=True)
class Unbounded:
    seed: int = 0


OURS = Arm("ours", learn=Config())
RECENT = Arm("recent", rival=Recent)
PLAN = Plan((OURS, RECENT), seeds=(1, 2))


def names(plan: Plan, log: dict[str, str] = LOG) -> set[str]:
    return {run.name for run in plan.runs(log)}


def models(plan: Plan, log: dict[str, str] = LOG) -> set[str]:
    return {run.model for run in plan.runs(log) if run.config is not None}


def test_rivals_run_once_and_come_first_then_every_arm_with_each_seed():
    plan = Plan((OURS, RECENT, Arm("wide", learn=Config(width=16))), seeds=(3, 1))
    assert [run.title for run in plan.runs(LOG)] == [
        "recent",
        "ours, seed 3",
        "wide, seed 3",
        "ours, seed 1",
        "wide, seed 1",
    ]
    assert [run.config.seed for run in plan.runs(LOG) if run.config] == [3, 3, 1, 1]


def test_what_is_said_of_an_arm_changes_no_name():
    other = replace(OURS, name="another", about="words", against="recent")
    assert names(Plan((other, RECENT), seeds=(1, 2))) == names(PLAN)
    assert names(Plan((RECENT, OURS), seeds=(2, 1))) >= names(PLAN) - {PLAN.runs(LOG)[0].name}


@pytest.mark.parametrize(
    "asked",
    [
        {"interests": Top(5)},
        {"interests": RandomInTop(5, 20)},
        {"merge": merge.score},
        {"merge": merge.quota},
        {"asking": {"exact": True}},
    ],
)
def test_another_way_of_asking_is_another_run_of_the_same_model(asked):
    plan = Plan((replace(OURS, **asked), RECENT), seeds=(1, 2))
    assert models(plan) == models(PLAN)
    assert len(names(plan) & names(PLAN)) == 1  # of the rival


@pytest.mark.parametrize(
    ("changes", "log"),
    [
        ({"arms": (replace(OURS, learn=Config(width=9)), RECENT)}, LOG),
        ({"minutes": 5.0}, LOG),
        ({"samples": 100}, LOG),
        ({"threads": 1}, LOG),
        ({"seeds": (3, 4)}, LOG),
        ({}, LOG | {"train": "another"}),
    ],
)
def test_what_decides_a_training_is_in_the_name_of_the_model(changes, log):
    plan = replace(PLAN, **changes)
    assert not models(plan, log) & models(PLAN)
    assert not {r.name for r in plan.runs(log) if r.config} & names(PLAN)


@pytest.mark.parametrize(
    ("changes", "log"),
    [
        ({"k": (50,)}, LOG),
        ({"request_seed": 2}, LOG),
        ({}, LOG | {"full": "another"}),
        ({}, LOG | {"split": "another"}),
    ],
)
def test_what_decides_the_requests_is_in_the_name_of_the_run_alone(changes, log):
    plan = replace(PLAN, **changes)
    assert not names(plan, log) & names(PLAN)
    assert models(plan, log) == models(PLAN)


def test_another_version_of_the_package_repeats_everything(monkeypatch):
    before = names(PLAN)
    monkeypatch.setattr("longretriever.experiment.plan.package_version", lambda: "99")
    assert not names(PLAN) & before


def test_bounds_that_are_not_given_stay_as_configured():
    learn = Config(minutes=3.0, samples=7)
    assert Arm("a", learn=learn).config(5, None, None) == Config(seed=5, minutes=3.0, samples=7)
    assert Arm("a", learn=learn).config(5, 1.0, 9) == Config(seed=5, minutes=1.0, samples=9)
    assert Arm("a", learn=Unbounded()).config(5, None, None) == Unbounded(5)
    assert RECENT.config(5, 1.0, None) is None


def test_asking_leaves_to_the_model_what_is_not_given():
    assert OURS.load == {}
    arm = replace(OURS, interests=Top(3), asking={"exact": True})
    assert arm.load == {"interests": Top(3), "exact": True}


def test_arms_are_compared_with_the_first_unless_they_say_otherwise():
    plan = Plan((OURS, RECENT, Arm("popular", rival=Popular, against="recent")))
    assert [plan.against(arm) for arm in plan.arms] == [None, "ours", "recent"]


# -- descriptions


def test_descriptions_tell_values_apart():
    values = [
        None,
        1,
        "1",
        [1],
        Top(5),
        Top(6),
        RandomInTop(5, 5),
        {"n": 5},
        merge.quota,
        merge.score,
        Recent,
        partial(Recent, T=1),
        partial(Recent, T=2),
        partial(Popular, T=1),
    ]
    told = [repr(described(value)) for value in values]
    assert len(set(told)) == len(values)
    assert described(Top(5)) == {"is": "longretriever.retrieve.interests.Top", "n": 5, "floor": 3600}
    assert described(Path("a/b")) == "a/b"
    assert json.dumps(described([1.5, math.inf]), allow_nan=False) == '[1.5, "inf"]'


@pytest.mark.parametrize("value", [lambda life, rng: None, [object()], {"a": iter(())}])
def test_what_has_no_description_is_refused(value):
    with pytest.raises(InputError, match="cannot be told from another of its kind"):
        described(value)


# -- what cannot be


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"arms": ()}, r"arms \[\]: expected at least one"),
        ({"arms": (OURS, OURS)}, r"arms \['ours', 'ours'\]: expected .* a name of its own"),
        ({"seeds": ()}, r"seeds \[\]: expected at least one"),
        ({"seeds": (1, 1)}, r"seeds \[1, 1\]: expected at least one, none of them twice"),
        ({"k": (50, 0)}, r"k is \[50, 0\], expected"),
        ({"arms": (OURS, replace(RECENT, against="us"))}, r"'recent' is to be compared with 'us', expected"),
        (
            {"arms": (replace(OURS, against="ours"),)},
            "'ours' is to be compared with 'ours', expected another",
        ),
        ({"arms": (Arm("x", learn=Unbounded()),), "minutes": 1.0}, "Unbounded has no field 'minutes'"),
        ({"arms": (replace(OURS, merge=lambda lists, k: None),)}, "cannot be told from another"),
    ],
)
def test_a_plan_that_cannot_be_is_refused_at_once(options, message):
    with pytest.raises(InputError, match=message):
        Plan(**{"arms": (OURS, RECENT), **options})


@pytest.mark.parametrize("given", [{}, {"learn": Config(), "rival": Recent}, {"learn": Config}, {"learn": 5}])
def test_an_arm_is_one_thing(given):
    with pytest.raises(InputError, match=r"arm 'x': .*expected"):
        Arm("x", **given)
