"""`experiment likeness`: how like is a generated log to real ones?"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from longretriever.cli import options, parsing
from longretriever.cli.experiment.ending import as_typed
from longretriever.console import out, print_json, say


def likeness(
    log: Annotated[
        list[str],
        typer.Option("--log", metavar="NAME=FILE", help="A real log: file, folder or glob; give several."),
    ],
    path: Annotated[Path, typer.Option("--out", help="Folder for the report.")],
    items: Annotated[
        list[str] | None,
        typer.Option("--items", metavar="NAME=FILE", help="Items of the log of this name: their categories."),
    ] = None,
    events: Annotated[
        int | None,
        typer.Option(min=10, help="Of the generated log; default: as the real ones, at most a million."),
    ] = None,
    market: Annotated[
        Path | None, typer.Option(help="Folder of a market that was generated, instead of a new one.")
    ] = None,
    column: options.Columns = None,
    item_column: options.ItemColumns = None,
    time_unit: options.TimeUnit = None,
    max_rejected: options.MaxRejected = 0.01,
    memory_limit: options.MemoryLimit = None,
    threads: options.Threads = None,
    work: Annotated[Path | None, typer.Option(help="Keep stores and market in this folder.")] = None,
    seed: options.Seed = 0,
    as_json: options.Json = False,
) -> None:
    """How like is a generated log to real ones? Writes report.html, report.md and results.json."""
    from longretriever.experiment.likeness import in_short, table, write
    from longretriever.experiment.likeness import likeness as compare_logs
    from longretriever.experiment.page import need_extra

    need_extra()
    result = compare_logs(
        parsing.named_files(log, "--log"),
        items=parsing.named_files(items, "--items"),
        events=events,
        market=market,
        seed=seed,
        work=work,
        reading=parsing.reading(column, item_column, None, time_unit, max_rejected, memory_limit, threads),
        said=say,
        command=as_typed(),
    )
    written = write(result, path)
    if as_json:
        print_json(result)
    else:
        out.print(table(result))
        out.print(f"\n{in_short(result)}\nWritten: " + ", ".join(map(str, written)), highlight=False)
