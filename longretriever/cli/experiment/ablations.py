"""`experiment ablations`: what does each part of a system bring?"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Annotated, Any

import typer

from longretriever.cli import options, parsing
from longretriever.cli.experiment.ending import as_typed, say_failed, say_written
from longretriever.console import out, print_json, say, training_bar
from longretriever.errors import InputError


def ablations(
    events: options.Events,
    path: options.ReportFolder,
    items: options.Items = None,
    users: options.Users = None,
    parts: Annotated[
        str, typer.Option(help="Comma-separated: systems, paper, ours, ulim.")
    ] = "systems,paper,ours,ulim",
    only: Annotated[
        list[str] | None, typer.Option(help="An arm to run, by its name; the default model is always run.")
    ] = None,
    seeds: options.Trainings = 3,
    minutes: options.Minutes = None,
    samples: options.Samples = None,
    split: options.Split = 0.9,
    k: options.Lengths = "50,200,500",
    column: options.Columns = None,
    item_column: options.ItemColumns = None,
    user_column: options.UserColumns = None,
    time_unit: options.TimeUnit = None,
    max_rejected: options.MaxRejected = 0.01,
    memory_limit: options.MemoryLimit = None,
    threads: options.Threads = None,
    seed: options.Seed = 1,
    as_json: options.Json = False,
) -> None:
    """Train and compare the papers' systems and their ablations; writes report.html, .md and results.json."""
    from longretriever.experiment.ablations import PARTS, arms
    from longretriever.experiment.dossier import write
    from longretriever.experiment.page import need_extra
    from longretriever.experiment.runs import main_metric
    from longretriever.experiment.runs import run as run_plan

    need_extra()
    names = tuple(parsing.listed(parts))
    if not names or set(names) - set(PARTS):
        raise InputError(f"--parts {parts}: expected some of {', '.join(PARTS)}.")
    chosen = arms(names)
    strange = set(only or ()) - {arm.name for arm in chosen}
    if strange:
        raise InputError(f"--only {strange.pop()}: expected one of {'; '.join(arm.name for arm in chosen)}.")
    if only:
        wanted = {chosen[0].name, *only}
        chosen = [
            arm if arm.against in wanted else replace(arm, against=None)
            for arm in chosen
            if arm.name in wanted
        ]
    chosen_k = parsing.integers(k, "--k")
    with training_bar() as trained:
        result = run_plan(
            events,
            chosen,
            work=path / "work",
            items=items,
            users=users,
            seeds=tuple(range(seed, seed + seeds)),
            minutes=minutes,
            samples=samples,
            quantile=split,
            k=chosen_k,
            reading=parsing.reading(
                column, item_column, user_column, time_unit, max_rejected, memory_limit, threads
            ),
            said=say,
            trained=trained,
            planned=lambda done, total: say(f"{done} of {total} done"),
            command=as_typed(),
        )
    written = write(result, path)
    if as_json:
        print_json(result)
    else:
        _show_arms(result["arms"], main_metric(chosen_k))
        say_written(written)
    say_failed(result["failed"])


def _show_arms(arms: Mapping[str, Any], metric: str) -> None:
    """The main figures, one line an arm; the report has the rest."""
    from rich.table import Table

    columns = [(p, part) for p in ("batch", "live") for part in ("all", "new")]
    grid = Table(title=f"{metric}, mean over seeds", title_justify="left", box=None, padding=(0, 1, 0, 0))
    grid.add_column("")
    for protocol, part in columns:
        grid.add_column(f"{protocol}\n{part.upper()}", justify="right")
    for name, figures in arms.items():
        cells = [figures[protocol][part][metric] for protocol, part in columns]
        grid.add_row(name, *["–" if c is None else f"{c:.3f}".removeprefix("0") for c in cells])
    out.print(grid)
