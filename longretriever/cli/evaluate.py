"""`evaluate`: which model finds more of what came next in a log?"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from longretriever.cli import options, parsing
from longretriever.console import out, print_json, say, training_bar


def evaluate(
    events: options.Events,
    items: options.Items = None,
    users: options.Users = None,
    models: Annotated[
        str, typer.Option(help="Comma-separated; ebr, mind, ulim, als and bm25 as well.")
    ] = "longretriever,recent,popular,popular-in-context",
    split: options.Split = 0.9,
    k: options.Lengths = "50,200,500",
    minutes: options.Minutes = None,
    select: Annotated[
        str | None, typer.Option(help="Contexts of longretriever and ulim, see retrieve.")
    ] = None,
    merge: Annotated[str | None, typer.Option(help="Of longretriever and ulim, see retrieve.")] = None,
    preset: Annotated[str | None, typer.Option(help="Of longretriever, see train.")] = None,
    encoder: Annotated[str | None, typer.Option(help="Of longretriever, see train.")] = None,
    epochs: Annotated[int | None, typer.Option(min=1, help="At most.")] = None,
    column: options.Columns = None,
    item_column: options.ItemColumns = None,
    user_column: options.UserColumns = None,
    time_unit: options.TimeUnit = None,
    max_rejected: options.MaxRejected = 0.01,
    memory_limit: options.MemoryLimit = None,
    threads: options.Threads = None,
    work: Annotated[Path | None, typer.Option(help="Keep stores and model in this folder.")] = None,
    seed: options.Seed = 1,
    as_json: options.Json = False,
) -> None:
    """Compare models on a log: requests as they came, and one list for the whole future."""
    from longretriever.evaluate.report import table
    from longretriever.evaluate.run import evaluate_log

    config = None
    names = parsing.listed(models)
    if "longretriever" in names:
        config = parsing.configured(
            "longretriever", preset, {"encoder": encoder, "epochs": epochs, "seed": seed}
        )
    with training_bar() as trained:
        result = evaluate_log(
            events,
            items=items,
            users=users,
            models=names,
            quantile=split,
            k=parsing.integers(k, "--k"),
            seed=seed,
            minutes=minutes,
            config=config,
            interests=parsing.interests(select),
            merge=parsing.merge(merge),
            work=work,
            reading=parsing.reading(
                column, item_column, user_column, time_unit, max_rejected, memory_limit, threads
            ),
            said=say,
            trained=trained,
        )
    if as_json:
        print_json(result)
    else:
        out.print(table(result))
