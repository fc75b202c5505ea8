"""`experiment ab`: which platform do the people of a simulated market like better?"""

from __future__ import annotations

from typing import Annotated, Any

import typer

from longretriever.cli import options, parsing
from longretriever.cli.experiment.ending import as_typed, say_written
from longretriever.console import out, print_json, say, testing_bar

AB_ARMS = ("MIND=popular,item-to-item,mind", "LongRetriever=popular,item-to-item,longretriever")
"""What is tested unless another test is asked for: who fills the third slot."""


def ab(
    path: options.ReportFolder,
    arm: Annotated[
        list[str] | None,
        typer.Option("--arm", metavar="NAME=ROUTE,ROUTE", help="A platform; the first is the control."),
    ] = None,
    population: options.Population = 2_000,
    behaviors: options.Behaviors = 800_000,
    items: options.MarketItems = None,
    categories: options.MarketCategories = None,
    days: options.TestDays = 7,
    taking_part: options.TakingPart = None,
    k: options.Retrieved = 100,
    minutes: options.EachMinutes = None,
    samples: options.EachSamples = 300_000,
    retrain: Annotated[int, typer.Option(min=0, help="Train again every so many days; 0: never.")] = 0,
    assignments: options.Fields = None,
    aa: Annotated[
        int | None,
        typer.Option("--aa", min=1, help="So many A/A tests of the control instead."),
    ] = None,
    threads: options.Threads = None,
    workers: options.Workers = None,
    seed: options.Seed = 1,
    as_json: options.Json = False,
) -> None:
    """Test platforms on the people of a simulated market; writes report.html, .md and results.json."""
    from longretriever.experiment.ab.plan import Plan
    from longretriever.experiment.ab.report import strict, write
    from longretriever.experiment.ab.routes import known, parse_arm
    from longretriever.experiment.ab.run import run as run_test
    from longretriever.experiment.ab.sanity import run_aa
    from longretriever.experiment.ab.sanity import table as aa_table
    from longretriever.experiment.ab.terminal import tables
    from longretriever.experiment.page import need_extra

    need_extra()
    routes = known(k)
    chosen = tuple(parse_arm(text, routes) for text in arm or AB_ARMS)
    plan = Plan(
        parsing.market(behaviors, population, items, categories, seed),
        chosen,
        users=taking_part,
        days=days,
        retrain=retrain,
        minutes=minutes,
        samples=samples,
        seed=seed,
        threads=threads,
    ).changed(assignments or ())
    with testing_bar() as (trained, lived):
        if aa is not None:
            found = run_aa(plan, aa, path / "work", workers=workers, said=say, trained=trained, tested=lived)
        else:
            told: dict[str, Any] = {"said": say, "trained": trained, "lived": lived, "command": as_typed()}
            result = run_test(plan, path / "work", workers=workers, **told)
    if aa is not None:
        print_json(found) if as_json else out.print(aa_table(found))
        return
    written = write(result, path)
    if as_json:
        print_json(strict(result))
    else:
        for table in tables(result):
            out.print(table)
        say_written(written)
