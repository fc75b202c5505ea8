"""Do the paper's claims hold, and in which worlds? Its Tables 1 to 5 again, in several simulated markets.

LongRetriever (arXiv 2508.15486) compares routes in a live A/B test. Here the same arms stand in front of the
same ranker in markets of different seeds; a claim holds where its effect has the claimed sign in the mean
over worlds, by more than worlds differ. Nothing is tuned to make a table come out: instead, sweeps change one
property of the world at a time and say where each claim holds and where it fails.

Axes: W worlds.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from longretriever.errors import InputError
from longretriever.evaluate import metrics
from longretriever.experiment.ab.plan import Arm, Plan
from longretriever.experiment.ab.routes import NEW_ITEMS, known
from longretriever.experiment.ab.run import run
from longretriever.experiment.ablations import OURS, PAPER
from longretriever.experiment.apart import learn_apart
from longretriever.experiment.runs import SURE, Learn, environment, made
from longretriever.market import MarketConfig

if TYPE_CHECKING:
    from longretriever.model.train import Tick

FORMAT = 1
SHOWN = ("pv", "uv_ctr", "uv_cvr", "orders", "clicks", "exposed_categories", "clicked_categories")
"""Figures of the tables. `MAIN` decides: fixed beforehand, and the one that people bring most of."""
MAIN = "clicks"
ROUTE_FIGURES = ("aer", "uer", "ctr_cvr")


@dataclass(frozen=True)
class Claim:
    """What a table of the paper says: `arm` has more (or less) of the main figure than `against`."""

    table: int
    arm: str
    against: str
    more: bool
    says: str


CLAIMS = (
    Claim(1, PAPER, "MIND", True, "LongRetriever in MIND's place brings more"),
    Claim(3, "Top 5", PAPER, False, "always the five best contexts bring less than Random 5 in Top 20"),
    Claim(4, "without long sequence", PAPER, False, "only the last 200 behaviors bring less"),
    Claim(5, "without in-context training", PAPER, False, "mixed batches bring less"),
    Claim(5, "without in-context", PAPER, False, "mixed batches, one vector and one search bring less"),
)
OURS_TOO = (
    Claim(0, OURS, PAPER, True, "LongRetriever as it comes here brings more than the paper's"),
    Claim(0, NEW_ITEMS, PAPER, True, "the same without what the user has met brings more than the paper's"),
)
"""Not of the paper: what this package adds to it."""


@dataclass(frozen=True)
class Sweep:
    """One property of the world at several values, and for each the fields that make it so.

    key  names it in options of commands
    """

    key: str
    name: str
    values: tuple[tuple[str, Mapping[str, Any]], ...]


def sweeps(base: MarketConfig) -> tuple[Sweep, ...]:
    """How long lives are, how many interests there are, how separate tastes are, how fast they turn."""
    own = base.moving / max(1e-9, 1 - base.common)
    return (
        Sweep(
            "lives",
            "behaviors of a life",
            tuple((f"{n:,}", _lives(base, n)) for n in (100, 400, 1_600)),
        ),
        Sweep(
            "interests",
            "interests",
            tuple(
                (f"{few} to {most}", {"fewest_interests": few, "most_interests": most})
                for few, most in ((2, 4), (5, 20), (20, 60))
            ),
        ),
        Sweep(
            "taste",
            "taste shared by all categories",
            tuple((f"{c:.0%}", {"common": c, "moving": own * (1 - c)}) for c in (0.0, 0.35, 0.8)),
        ),
        Sweep(
            "drift", "drift period, days", tuple((f"{d:g}", {"drift_days": d}) for d in (7.0, 30.0, 365.0))
        ),
    )


def _lives(base: MarketConfig, behaviors: int) -> dict[str, Any]:
    return {
        "events": base.users * behaviors,
        "least": min(base.least, behaviors // 2),
        "most": 100 * behaviors,
    }


def arms(k: int = 100) -> tuple[Arm, ...]:
    """The arms of all tables: popular and item-to-item, and one system in the slot that is tested."""
    routes = known(k)
    base = (routes["popular"], routes["item-to-item"])
    by_name = {route.name: route for route in routes.values()}
    tested = ["MIND", *(claim.arm for claim in (*CLAIMS, *OURS_TOO))]
    against = {claim.arm: claim.against for claim in (*CLAIMS, *OURS_TOO)}
    return tuple(Arm(name, (*base, by_name[name]), against=against.get(name)) for name in tested)


def run_paper(
    plan: Plan,
    work: str | os.PathLike[str],
    *,
    worlds: int = 5,
    sweep_worlds: int = 0,
    sweep_days: int = 3,
    swept: Sequence[str] = ("lives", "interests", "taste", "drift"),
    figures_of_paper: Mapping[str, Any] | None = None,
    workers: int | None = None,
    said: Callable[[str], None] | None = None,
    trained: Callable[[Tick], None] | None = None,
    lived: Callable[[int, int], None] | None = None,
    command: str = "",
    date: str | None = None,
    learn: Learn = learn_apart,
) -> dict[str, Any]:
    """All tables over `worlds` markets, whose seeds follow that of `plan.market`; a dict that JSON can hold.

    `plan.arms` are usually `arms()`. With `sweep_worlds`, every value of the `swept` ones of `sweeps` is
    tried in so many worlds, for `sweep_days` days. `figures_of_paper` (table -> arm -> figure -> lift) is
    printed beside what came out. Finished days lie in `work`, and a second call goes on.

    Costs worlds * (trainings + arms * days); see `experiment.ab.run.run` for what is raised.
    """
    if worlds < 2:
        raise InputError(
            f"{worlds} worlds, expected at least 2: a claim is judged by how much worlds differ."
        )
    if sweep_worlds > worlds:
        raise InputError(
            f"{sweep_worlds} worlds for the sweeps, expected at most the {worlds} of the tables."
        )
    chosen = [sweep for sweep in sweeps(plan.market) if sweep.key in swept]
    strange = set(swept) - {sweep.key for sweep in chosen}
    if strange:
        keys = ", ".join(sweep.key for sweep in sweeps(plan.market))
        raise InputError(f"sweep {strange.pop()!r}: expected some of {keys}.")
    say = said or (lambda line: None)
    options: dict[str, Any] = {"workers": workers, "trained": trained, "lived": lived, "learn": learn}

    def live(plan: Plan, what: str) -> dict[str, Any]:
        say(what)
        return run(plan, Path(work), said=lambda line: say(f"  {line}"), **options)

    seeds = [plan.market.seed + n for n in range(worlds)]
    found = [live(_in_world(plan, seed, {}), f"world {seed}") for seed in seeds]
    maps = []
    for sweep in chosen if sweep_worlds else ():
        points = []
        for value, changes in sweep.values:
            tests = [
                live(
                    _in_world(replace(plan, days=sweep_days), seed, changes), f"{sweep.name} {value}, {seed}"
                )
                for seed in seeds[:sweep_worlds]
            ]
            points.append({"value": value, "changes": dict(changes), "claims": judged(tests)})
        maps.append({"name": sweep.name, "points": points})
    return {
        "format": FORMAT,
        "worlds": seeds,
        "main": MAIN,
        "sweep": {"worlds": sweep_worlds, "days": sweep_days},
        "claims": judged(found),
        "routes": routes_compared(found),
        "arms": {
            name: {figure: _of([test["arms"][name]["figures"][figure] for test in found]) for figure in SHOWN}
            for name in found[0]["arms"]
        },
        "of_paper": figures_of_paper or {},
        "sweeps": maps,
        "plan": found[0]["plan"],
        "definitions": {"figures": found[0]["figures"], "of_route": found[0]["of_route"]},
        "made": {
            **made(command, date),
            "environment": environment(),
            "configurations": found[0]["routes"],
        },
    }


def _in_world(plan: Plan, seed: int, changes: Mapping[str, Any]) -> Plan:
    return replace(plan, market=replace(plan.market, **{**changes, "seed": seed}))


def read_figures(file: Path) -> dict[str, Any]:
    """The paper's own lifts: {"Table 1": {"ARM": {"FIGURE": 0.01}}}, as fractions; for `run_paper`.

    They are not part of this package. Raises `InputError` for a file that says something else.
    """
    try:
        found = json.loads(file.read_text())
        lifts = [
            float(lift) for arms in found.values() for figures in arms.values() for lift in figures.values()
        ]
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise InputError(
            f"{file}: {type(error).__name__}: {error}. Expected JSON such as "
            '{"Table 1": {"LongRetriever, paper": {"uv_ctr": 0.01}}}.'
        ) from error
    strange = {n for arms in found.values() for figures in arms.values() for n in figures} - set(SHOWN)
    if strange or not lifts:
        raise InputError(f"{file}: found the figures {sorted(strange)}, expected some of {', '.join(SHOWN)}.")
    return found


# -- what the worlds say together


def judged(tests: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Every claim over some worlds: lifts of the figures, and whether the main one has the claimed sign."""
    out = []
    for claim in (*CLAIMS, *OURS_TOO):
        lifts = {figure: [_row(test, claim, figure) for test in tests] for figure in SHOWN}
        if any(row is None for row in lifts[MAIN]):
            continue  # an arm that this plan does not have
        of_figure = {}
        for name, rows in lifts.items():
            one = [row for row in rows if row]
            of_figure[name] = _over([row["lift"] for row in one], [row["interval"] for row in one])
            sign = 1 if claim.more else -1
            of_figure[name]["sure_worlds"] = sum(row["p"] < SURE and sign * row["lift"] > 0 for row in one)
        out.append({**asdict(claim), "figures": of_figure, "verdict": verdict(of_figure[MAIN], claim.more)})
    return out


def _row(test: Mapping[str, Any], claim: Claim, figure: str) -> Mapping[str, Any] | None:
    for row in test["comparisons"]:
        if (row["arm"], row["against"], row["figure"]) == (claim.arm, claim.against, figure):
            return row
    return None


def routes_compared(tests: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Table 2: the figures of each tested route, in its own arm, over the worlds."""
    found = {}
    for name in tests[0]["arms"]:
        if all(name in test["arms"][name]["routes"] for test in tests):
            found[name] = {
                figure: _of([test["arms"][name]["routes"][name][figure] for test in tests])
                for figure in ROUTE_FIGURES
            }
    return found


def verdict(lift: Mapping[str, Any], more: bool) -> str:
    """ "holds", "fails" (the effect is the other way round), or "undecided"."""
    low, high = lift["interval"]
    if low > 0 or high < 0:
        return "holds" if (low > 0) == more else "fails"
    return "undecided"


def _of(figures: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    return _over([one["value"] for one in figures], [one["interval"] for one in figures])


def _over(values: Sequence[float], intervals: Sequence[Sequence[float]]) -> dict[str, Any]:
    """The mean over worlds, its 95% interval, and each world's value.

    The interval is Student's t, worlds being independent; of a single world it is that of its users.
    """
    from scipy.stats import t

    array = np.array(values, np.float64)
    mean, n = float(array.mean()), len(array)
    interval = [float(end) for end in intervals[0]]
    if n > 1:
        half = float(t.ppf(0.5 + metrics.CONFIDENCE / 2, n - 1) * array.std(ddof=1) / np.sqrt(n))
        interval = [mean - half, mean + half]
    return {"mean": mean, "interval": interval, "by_world": [float(value) for value in array]}
