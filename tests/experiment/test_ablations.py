from __future__ import annotations

from dataclasses import fields, replace

import pytest

from longretriever import EbrConfig, MindConfig, PginConfig, RandomInTop, Top, TrainConfig, UlimConfig
from longretriever.experiment.ablations import OURS, PAPER, PARTS, RECENT_BEHAVIORS, arms
from longretriever.experiment.plan import Plan


def named() -> dict:
    return {arm.name: arm for arm in arms()}


def test_the_first_arm_is_the_model_as_it_comes():
    assert arms()[0].name == OURS
    assert arms()[0].learn == TrainConfig()
    assert arms()[0].interests is None


@pytest.mark.parametrize("part", PARTS)
def test_every_part_is_a_plan_that_can_be_run(part):
    chosen = arms((part,))
    plan = Plan(tuple(chosen), minutes=1.0)
    runs = plan.runs({"train": "a", "full": "b"})
    assert len({run.name for run in runs}) == len(runs), "two arms would find the same"


def test_all_systems_of_the_papers_are_there():
    found = {type(arm.learn) for arm in named().values()}
    assert {TrainConfig, EbrConfig, MindConfig, UlimConfig} <= found


def test_the_papers_ablations_differ_from_the_papers_system_in_one_thing():
    arm = named()
    paper = arm[PAPER]
    assert paper.interests == RandomInTop(5, 20)
    assert (arm["Top 5"].learn, arm["Top 5"].interests) == (paper.learn, Top(5))  # Table 3
    short = arm["without long sequence"]  # Table 4
    assert short.learn == replace(paper.learn, within=RECENT_BEHAVIORS)
    mixed = arm["without in-context training"]  # Table 5
    assert mixed.learn == replace(paper.learn, mixed=True)
    for one in (short, mixed):
        assert one.interests == paper.interests
        assert one.against == PAPER


def test_of_what_we_added_one_thing_is_left_out_at_a_time():
    plain = TrainConfig()
    for arm in arms(("ours",))[1:]:
        changed = changes(arm.learn, plain)
        for beside in ("whole", "interests"):
            if getattr(arm.learn, beside) is not None:
                changed |= changes(getattr(arm.learn, beside), getattr(plain, beside))
                changed -= {beside}
        assert len(changed) + (arm.interests is not None) == 1, (arm.name, changed)


def changes(one, other) -> set[str]:
    return {field.name for field in fields(one) if getattr(one, field.name) != getattr(other, field.name)}


def test_ulims_own_ablations():
    arm = named()
    ulim = arm["ULIM"].learn
    assert arm["ULIM, no pointer"].learn == replace(ulim, interests=PginConfig(pointer=False))
    assert arm["ULIM, no generator"].learn == replace(ulim, interests=PginConfig(generator=False))
    assert arm["ULIM, self-attention"].learn == replace(ulim, attention="self")
    assert arm["ULIM, half the sequence"].learn.recent_length * 2 == ulim.recent_length
    assert [arm[f"ULIM, K = {k}"].interests.k for k in (1, 5, 10, 50)] == [1, 5, 10, 50]
