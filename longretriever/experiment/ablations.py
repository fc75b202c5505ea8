"""Which part of LongRetriever does what? The papers' systems, their ablations and ours, as arms of one plan.

Every arm is a configuration or a way of asking, so each is also what a user can train and serve. Numbers of
tables are those of LongRetriever (arXiv 2508.15486) and of ULIM (arXiv 2507.10097).
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

from longretriever.evaluate.collaborative import ALS, BM25
from longretriever.evaluate.rivals import Popular, PopularInContext, Recent
from longretriever.experiment.plan import Arm
from longretriever.model.config import EbrConfig, PginConfig, TrainConfig, configuration, need_torch
from longretriever.retrieve.interests import Interests, Pgin, RandomInTop, Top
from longretriever.retrieve.merge import quota

OURS = "LongRetriever"
PAPER = "LongRetriever, paper"
SAMPLES: dict[str, Any] = {"most": TrainConfig.most, "half_life": TrainConfig.half_life}
"""Which samples are learned from: a choice of ours, which the papers' systems get as well."""
RECENT_BEHAVIORS = 200
"""What "without long sequence" still sees: as many as the paper's EBR."""


def arms(parts: tuple[str, ...] = ("systems", "paper", "ours", "ulim")) -> list[Arm]:
    """The arms of these parts, each once; the first is `LongRetriever` as it comes.

    systems  whole systems: ours, the paper's, ULIM, EBR, MIND, and rivals that only count
    paper    the ablations of LongRetriever's Tables 3, 4 and 5
    ours     what we added to the paper, one left out at a time; what we tried besides, one added
    ulim     ULIM's own ablations
    """
    need_torch()
    made = {"systems": _systems, "paper": _paper, "ours": _ours, "ulim": _ulim}
    found = {arm.name: arm for arm in [Arm(OURS, "As it comes.", learn=TrainConfig())]}
    for part in parts:
        for arm in made[part]():
            found.setdefault(arm.name, arm)
    return list(found.values())


PARTS = ("systems", "paper", "ours", "ulim")


def _plain(**changes: Any) -> TrainConfig:
    """The paper's tower and objective, trained by the fast encoder on the same samples as ours."""
    return TrainConfig.paper(encoder="packed", **SAMPLES, **changes)


def _papers() -> Arm:
    about = "The paper's tower and Random 5 in Top 20, with our fast encoder."
    return Arm(PAPER, about, learn=_plain(), interests=RandomInTop(5, 20))


def _systems() -> list[Arm]:
    return [
        _papers(),
        Arm("ULIM", "A vector for each of K categories and one for all.", configuration("ulim")),
        Arm("EBR", "One vector from the last 200 behaviors, tuned.", configuration("ebr")),
        Arm(
            "EBR, paper",
            "In-batch negatives alone, both directions.",
            EbrConfig.paper(**SAMPLES),
        ),
        Arm("MIND", "Several vectors by dynamic routing.", configuration("mind")),
        Arm("ALS", "Factors of the user-item matrix, weights tuned.", rival=partial(ALS, seed=1)),
        Arm("BM25", "Nearest neighbours of items.", rival=BM25),
        Arm("recent", "The user's own last items.", rival=Recent),
        Arm("popular", "What most users met lately.", rival=Popular),
        Arm("popular in context", "What is popular in the user's categories.", rival=PopularInContext),
    ]


def _paper() -> list[Arm]:
    plain = partial(Arm, against=PAPER)
    return [
        _papers(),
        plain("Top 5", "Table 3: always the five best contexts.", learn=_plain(), interests=Top(5)),
        plain("Top 20", "All of the top 20.", learn=_plain(), interests=Top(20)),
        plain(
            "without long sequence",
            f"Table 4: only the last {RECENT_BEHAVIORS} behaviors are looked at.",
            learn=_plain(within=RECENT_BEHAVIORS),
            interests=RandomInTop(5, 20),
        ),
        plain(
            "without in-context training",
            "Table 5, its training: batches mix categories.",
            learn=_plain(mixed=True),
            interests=RandomInTop(5, 20),
        ),
        plain("without in-context", "Table 5: mixed batches, one vector, one search.", configuration("ebr")),
        plain("quotas", "Lists merged by quota, not by probability.", learn=_plain(), merge=quota),
    ]


def _ours() -> list[Arm]:
    whole = TrainConfig()
    without: dict[str, tuple[TrainConfig, Interests | None]] = {
        "next category by Equation 3": (whole, Top(20)),
        "20 contexts": (whole, Pgin(20)),
        "without a vector of all items": (replace(whole, whole=None), None),
        "all samples of heavy users": (_every_sample(), None),
        "with short-term vector": (replace(whole, recent_length=20), None),
        "without means of behaviors": (_no_bag(), None),
        "without ages": (replace(whole, ages=False), None),
        "without returns": (replace(whole, returns=False), None),
        "without warm start": (replace(whole, warm_start=False), None),
        "with requests at a distance": (_at_a_distance(), None),
        "without factors": (replace(whole, whole=EbrConfig()), None),
    }
    return [
        Arm(name, "The default but for this.", learn=config, interests=interests)
        for name, (config, interests) in without.items()
    ]


def _every_sample() -> TrainConfig:
    return TrainConfig(most=None, whole=EbrConfig(most=None, factors=None), interests=PginConfig(most=None))


def _at_a_distance() -> TrainConfig:
    return TrainConfig(distance=0.5, interests=PginConfig(distance=0.5))


def _no_bag() -> TrainConfig:
    return TrainConfig(bag=False, whole=EbrConfig(bag=False, factors=None))


def _ulim() -> list[Arm]:
    from longretriever.model.baselines.ulim import UlimConfig

    ulim = UlimConfig()
    half = replace(ulim, context_length=ulim.context_length // 2, recent_length=ulim.recent_length // 2)
    changed: dict[str, tuple[Any, Interests | None]] = {
        "ULIM": (ulim, None),
        "ULIM, half the sequence": (half, None),
        "ULIM, self-attention": (replace(ulim, attention="self"), None),
        "ULIM, no pointer": (replace(ulim, interests=PginConfig(pointer=False)), None),
        "ULIM, no generator": (replace(ulim, interests=PginConfig(generator=False)), None),
        **{f"ULIM, K = {k}": (ulim, Pgin(k)) for k in (1, 5, 10, 50)},
    }
    return [
        Arm(name, "", learn=config, interests=interests, against=None if name == "ULIM" else "ULIM")
        for name, (config, interests) in changed.items()
    ]
