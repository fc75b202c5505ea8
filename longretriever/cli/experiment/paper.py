"""`experiment paper`: do the claims of LongRetriever's tables hold in simulated markets?"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from longretriever.cli import options, parsing
from longretriever.cli.experiment.ending import as_typed, say_written
from longretriever.console import out, print_json, say, testing_bar


def paper(
    path: options.ReportFolder,
    worlds: Annotated[int, typer.Option(min=2, help="Markets of different seeds.")] = 5,
    sweep_worlds: Annotated[
        int, typer.Option(min=0, help="Markets for each value of the sweeps; 0: none.")
    ] = 1,
    sweep_days: Annotated[int, typer.Option(min=1, help="Days of a test in the sweeps.")] = 3,
    swept: Annotated[
        str, typer.Option("--sweeps", help="Comma-separated: lives, interests, taste, drift.")
    ] = "lives,interests,taste,drift",
    paper_figures: Annotated[
        Path | None, typer.Option(help="JSON of the paper's own lifts, to be printed beside.")
    ] = None,
    population: options.Population = 2_000,
    behaviors: options.Behaviors = 800_000,
    items: options.MarketItems = 60_000,
    categories: options.MarketCategories = 300,
    days: options.TestDays = 7,
    taking_part: options.TakingPart = None,
    k: options.Retrieved = 100,
    minutes: options.EachMinutes = None,
    samples: options.EachSamples = 400_000,
    assignments: options.Fields = None,
    threads: options.Threads = None,
    workers: options.Workers = None,
    seed: options.Seed = 1,
    as_json: options.Json = False,
) -> None:
    """LongRetriever's Tables 1 to 5 again, in simulated markets, and in which of them each claim holds."""
    from longretriever.experiment.ab.plan import Plan
    from longretriever.experiment.ab.report import strict
    from longretriever.experiment.page import need_extra
    from longretriever.experiment.paper import arms, read_figures, run_paper
    from longretriever.experiment.paper_report import table, write

    need_extra()
    of_paper = read_figures(paper_figures) if paper_figures else None
    plan = Plan(
        parsing.market(behaviors, population, items, categories, seed),
        arms(k),
        users=taking_part,
        days=days,
        minutes=minutes,
        samples=samples,
        seed=seed,
        threads=threads,
    ).changed(assignments or ())
    with testing_bar() as (trained, lived):
        result = run_paper(
            plan,
            path / "work",
            worlds=worlds,
            sweep_worlds=sweep_worlds,
            sweep_days=sweep_days,
            swept=parsing.listed(swept),
            figures_of_paper=of_paper,
            workers=workers,
            said=say,
            trained=trained,
            lived=lived,
            command=as_typed(),
        )
    written = write(result, path)
    if as_json:
        print_json(strict(result))
    else:
        out.print(table(result))
        say_written(written)
