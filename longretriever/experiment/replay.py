"""Which route alone finds what people really did next? Several retrieval routes, replayed over a real log.

At the time of each held-out live request (`evaluate/split.py`) every route, frozen at T, gives one list, and
the lists are held against what that user met from then on. It is the offline analogue of two online figures
of the LongRetriever paper (arXiv 2508.15486): AER, the share of what a route retrieved that was exposed, and
UER, the same of what this route alone retrieved; in replay, "exposed" becomes "the user met it next".
`docs/experiment.md` has the definitions in words.

Trainings and files are those of `runs.py`; what is kept of a run is its lists, in `lists/`. `overlap.py` has
the figures.

Axes: N requests, k places of a list.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from longretriever.errors import InputError, LongRetrieverError
from longretriever.evaluate.report import ask
from longretriever.evaluate.rivals import Recommender
from longretriever.evaluate.split import LiveRequests, Split
from longretriever.events import SECONDS_PER_DAY
from longretriever.experiment.ablations import OURS, PAPER, arms
from longretriever.experiment.apart import learn_apart
from longretriever.experiment.overlap import Overlap, Pairs, compare
from longretriever.experiment.plan import Arm, Plan
from longretriever.experiment.runs import FORMAT, Bench, Learn, Measured, main_length, opened, what_is
from longretriever.model.config import need_torch

if TYPE_CHECKING:
    from longretriever.model.train import Tick

ROUTES = (OURS, PAPER, "ULIM", "EBR", "MIND", "BM25", "recent", "popular")
"""What is replayed unless asked otherwise."""

PARTS = ("all", "new")
"""Which of the live requests: every figure exists for both."""


def routes(only: Sequence[str] | None = None) -> list[Arm]:
    """The arms of these names, of the systems that `ablations.arms` knows; by default `ROUTES`."""
    named = {arm.name: arm for arm in arms(("systems",))}
    strange = [name for name in only or () if name not in named]
    if strange:
        raise InputError(f"route {strange[0]!r}: expected one of {'; '.join(named)}.")
    return [arm for name, arm in named.items() if name in (only or ROUTES)]


def replay(
    events: Any,
    arms: Sequence[Arm],
    *,
    work: str | os.PathLike[str],
    items: Any = None,
    users: Any = None,
    seeds: Sequence[int] = (1, 2, 3),
    minutes: float | None = None,
    samples: int | None = None,
    quantile: float = 0.9,
    k: Sequence[int] = (200,),
    horizon: float = 1.0,
    request_seed: int = 1,
    reading: Mapping[str, Any] | None = None,
    said: Callable[[str], None] | None = None,
    trained: Callable[[Tick], None] | None = None,
    planned: Callable[[int, int], None] | None = None,
    command: str = "",
    date: str | None = None,
    learn: Learn = learn_apart,
) -> dict[str, Any]:
    """Train the routes, ask all of them the live requests of one log, and say who found what; for JSON.

    Each route gives one list of `max(k)` items for a request, and every figure is made for the first `k` of
    it, for each k. `horizon` is in days. The other arguments, what stays in `work`, and what a second call
    skips are as in `runs.run`; lists do not depend on `horizon`, nor on the smaller of `k`.

    A route that fails with any seed is left out of all figures, and named. Raises `InputError` for what
    cannot be replayed, `LongRetrieverError` when fewer than two routes have answered.
    """
    reading, say = dict(reading or {}), said or (lambda _: None)
    lengths = tuple(sorted(set(k)))
    plan = Plan(tuple(arms), tuple(seeds), minutes, samples, lengths, request_seed, reading.get("threads"))
    plan = replace(plan, k=lengths[-1:])
    _check(plan, horizon)
    with opened(Listed, plan, work, (events, items, users), quantile, reading, say, learn) as bench:
        measured, failed = bench.run(say, trained, planned or (lambda done, total: None))
    of_arm = bench.of_arm(measured)
    whole = [(a, of_arm[a.name]) for a in plan.arms if len(of_arm[a.name]) == len(plan.seeds_of(a))]
    if len(whole) < 2:
        raise LongRetrieverError(
            f"{len(whole)} of {len(plan.arms)} routes answered with every seed, expected two or more to "
            f"compare. The first failure: {failed[0]['why']}"
        )
    say("comparing")
    found: dict[str, dict[str, Any]] = {str(n): {} for n in lengths}
    main: list[Overlap] = []
    for part in PARTS:
        met = met_next(bench.cut, bench.live[part], horizon, new=part == "new")
        for n in lengths:  # one at a time: the pairs of a part take hundreds of megabytes
            overlap = _overlap(bench, whole, part, n, met)
            found[str(n)][part] = overlap.found(request_seed)
            main += [overlap] if n == main_length(lengths) else []
    record = bench.record(measured, command, date)
    return {
        "format": FORMAT,
        **record,
        "plan": {**record["plan"], "k": list(lengths), "horizon_days": horizon},
        "arms": {arm.name: {**what_is(plan, arm, runs), "against": None} for arm, runs in whole},
        "found": found,
        "comparisons": compare(main, request_seed),
        "failed": failed,
    }


def _overlap(
    bench: Listed,
    routes: Sequence[tuple[Arm, Mapping[int, Measured[np.ndarray]]]],
    part: str,
    k: int,
    met: Sequence[np.ndarray],
) -> Overlap:
    """The first k of all lists for one part of the requests; what has no seed stands beside each seed."""
    requests, first, seeds = bench.live[part], bench.plan.seeds[0], []
    for seed in dict.fromkeys(seed for _, runs in routes for seed in runs):
        lists = [
            runs[seed if arm.learn is not None else first].values["live", part][:, :k] for arm, runs in routes
        ]
        seeds.append(Pairs.of(lists, requests.target, met))
    return Overlap([arm.name for arm, _ in routes], part, requests.user, seeds)


def _check(plan: Plan, horizon: float) -> None:
    if len(plan.arms) < 2:
        raise InputError(
            f"a replay of {plan.arms[0].name!r} alone, expected two or more routes: it says what one of them "
            "finds that the others do not. Name another one."
        )
    if not (math.isfinite(horizon) and horizon >= 0):
        raise InputError(f"the horizon is {horizon} days, expected 0 or more, such as 1.")
    if any(arm.learn is not None for arm in plan.arms):
        need_torch()


class Listed(Bench[np.ndarray]):
    """What a replay asks: the live requests alone, of whose answers the lists are kept."""

    kept = "lists"

    @property
    def asked(self) -> int:
        return sum(len(requests.user) for requests in self.live.values())

    def ask(self, model: Recommender) -> dict[tuple[str, str], np.ndarray]:
        (k,) = self.plan.k
        return {
            ("live", part): ask(model, self.cut, r.user, r.before, k, new=part == "new").item.astype(np.int32)
            for part, r in self.live.items()
        }

    def arrays(self, values: Mapping[tuple[str, str], np.ndarray]) -> dict[str, np.ndarray]:
        return {"/".join(part): item_Nk for part, item_Nk in values.items()}

    def values(self, arrays: Mapping[str, np.ndarray]) -> dict[tuple[str, str], np.ndarray]:
        values = {("live", part): arrays[f"live/{part}"] for part in PARTS}
        for (_, part), item_Nk in values.items():
            n = len(self.live[part].user)
            if item_Nk.ndim != 2 or len(item_Nk) != n or item_Nk.max(initial=-1) >= self.cut.n_items:
                raise ValueError(f"there are not {n} lists of live {part}")
        return values


def met_next(cut: Split, requests: LiveRequests, horizon: float, new: bool = False) -> list[np.ndarray]:
    """N arrays: the distinct items that occur in train which the user met in [before, before + horizon days].

    Both ends count, so the target is always among them. With `new`, only items not in the history, which is
    what the user met strictly before.
    """
    found = []
    for user, now in zip(requests.user, requests.before, strict=True):
        mine = slice(cut.user_start[user], cut.user_start[user + 1])
        item, time = cut.item[mine], cut.time[mine]
        begin = np.searchsorted(time, now)
        end = np.searchsorted(time, now + horizon * SECONDS_PER_DAY, side="right")
        items = np.unique(item[begin:end])
        items = items[cut.in_train[items]]
        found.append(np.setdiff1d(items, item[:begin]) if new else items)
    return found
