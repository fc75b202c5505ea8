"""`experiment replay`: which retrieval route alone finds what users did next?"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from longretriever.cli import options, parsing
from longretriever.cli.experiment.ending import as_typed, say_failed, say_written
from longretriever.console import out, print_json, say, training_bar


def replay(
    events: options.Events,
    path: options.ReportFolder,
    items: options.Items = None,
    users: options.Users = None,
    only: Annotated[
        list[str] | None, typer.Option(help="A route, by its name; at least two. Default: the usual eight.")
    ] = None,
    horizon: Annotated[float, typer.Option(help="Days after the request that count as next.")] = 1.0,
    seeds: options.Trainings = 3,
    minutes: options.Minutes = None,
    samples: options.Samples = None,
    split: options.Split = 0.9,
    k: Annotated[str, typer.Option("--k", help="Items of each route's list, comma-separated.")] = "200",
    column: options.Columns = None,
    item_column: options.ItemColumns = None,
    user_column: options.UserColumns = None,
    time_unit: options.TimeUnit = None,
    max_rejected: options.MaxRejected = 0.01,
    memory_limit: options.MemoryLimit = None,
    threads: options.Threads = None,
    work: Annotated[
        Path | None, typer.Option(help="Folder of stores, models and lists; default: work in the report's.")
    ] = None,
    seed: options.Seed = 1,
    as_json: options.Json = False,
) -> None:
    """Replay retrieval routes over the log: which alone finds what users did next? Writes a report."""
    from longretriever.experiment.page import need_extra
    from longretriever.experiment.replay import replay as run
    from longretriever.experiment.replay import routes
    from longretriever.experiment.replayed import tables, write

    need_extra()
    with training_bar() as trained:
        result = run(
            events,
            routes(only),
            work=work or path / "work",
            items=items,
            users=users,
            seeds=tuple(range(seed, seed + seeds)),
            minutes=minutes,
            samples=samples,
            quantile=split,
            k=parsing.integers(k, "--k"),
            horizon=horizon,
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
        out.print(tables(result))
        say_written(written)
    say_failed(result["failed"])
