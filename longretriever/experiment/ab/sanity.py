"""Does the test find effects that are not there? A/A tests: twice the same platform, with different luck.

Each one is a whole A/B test of its own (users drawn, warm-up, ranker, days), whose two arms differ in nothing
but the dice of their people. At a level of 5% about 5% of them may find something; more would mean that the
intervals of real tests cannot be believed.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.table import Table

from longretriever.errors import InputError
from longretriever.experiment.ab.plan import Plan
from longretriever.experiment.ab.ranking import need_sklearn
from longretriever.experiment.ab.report import label
from longretriever.experiment.ab.run import Test, processes
from longretriever.experiment.apart import learn_apart
from longretriever.experiment.runs import Learn, alone
from longretriever.retrieve.bulk import cores

if TYPE_CHECKING:
    from longretriever.model.train import Tick

LEVEL = 0.05


def run_aa(
    plan: Plan,
    runs: int,
    work: str | os.PathLike[str],
    *,
    workers: int | None = None,
    said: Callable[[str], None] | None = None,
    trained: Callable[[Tick], None] | None = None,
    tested: Callable[[int, int], None] | None = None,
    learn: Learn = learn_apart,
) -> dict[str, Any]:
    """A/A tests of the plan's control: how often each figure's p is under 5%, and its interval misses 0.

    Each draws other users (if `plan.users` are fewer than there are) and another luck; all share the world
    and the models. `workers` tests run at a time. `tested` is told how many are over, of how many.
    """
    if runs < 1:
        raise InputError(f"{runs} A/A tests, expected at least 1.")
    need_sklearn()
    folder, found = Path(work), []
    with alone(folder), processes(min(workers or cores(), runs)) as pool:
        Test(nth(plan, 0), folder, learn, said or (lambda line: None), trained).prepare()
        for n, waiting in enumerate([pool(_once, plan, folder, n, learn) for n in range(runs)]):
            found.append(waiting())
            if tested:
                tested(n + 1, runs)
    return {"runs": runs, "level": LEVEL, "figures": _false_positives(found)}


def _once(plan: Plan, folder: Path, n: int, learn: Learn) -> list[dict[str, Any]]:
    test = Test(nth(plan, n), folder, learn, lambda line: None, None)
    test.path.mkdir(exist_ok=True)
    test.live(1, lambda done, total: None)
    return test.result("", "")["comparisons"]


def nth(plan: Plan, n: int) -> Plan:
    """The n-th A/A test of this plan's control."""
    control = plan.arms[0]
    arms = tuple(
        replace(control, name=f"{control.name}, {which}", luck=1 + 2 * n + i, against=None)
        for i, which in enumerate(("once", "again"))
    )
    return replace(plan, arms=arms, draw=plan.draw + n)


def _false_positives(found: Sequence[Sequence[Mapping[str, Any]]]) -> dict[str, dict[str, float]]:
    """Figure -> shares of runs, each with its standard error, and the smallest p of all."""
    out = {}
    for figure in [row["figure"] for row in found[0]]:
        rows = [row for run_ in found for row in run_ if row["figure"] == figure]
        sure = np.array([row["p"] < LEVEL for row in rows])
        missed = np.array([row["interval"][0] > 0 or row["interval"][1] < 0 for row in rows])
        out[figure] = {
            "p_under_level": float(sure.mean()),
            "interval_misses_0": float(missed.mean()),
            "standard_error": float(np.sqrt(LEVEL * (1 - LEVEL) / len(rows))),
            "least_p": float(np.fmin.reduce([row["p"] for row in rows])),
        }
    return out


def table(result: Mapping[str, Any]) -> Table:
    """How often each figure was found to differ, for a terminal."""
    level = result["level"]
    grid = Table(
        title=f"{result['runs']} A/A tests: share that finds something at {level:.0%}",
        title_justify="left",
        box=None,
        padding=(0, 2, 0, 0),
    )
    for name in ("", f"p < {level:g}", "interval misses 0", "± by chance"):
        grid.add_column(name, justify="left" if name == "" else "right")
    for figure, of in result["figures"].items():
        shares = (of["p_under_level"], of["interval_misses_0"], 1.96 * of["standard_error"])
        grid.add_row(label(figure), *(f"{share:.1%}" for share in shares))
    return grid
