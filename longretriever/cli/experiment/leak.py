"""`experiment leak`: do mixed batches teach taste, or the category alone?"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from longretriever.cli import options, parsing
from longretriever.console import out, print_json, say, training_bar


def leak(
    events: options.Events,
    items: options.Items = None,
    minutes: Annotated[float | None, typer.Option(min=0.01, help="Training of each of the two.")] = None,
    samples: options.Samples = None,
    split: options.Split = 0.9,
    column: options.Columns = None,
    item_column: options.ItemColumns = None,
    time_unit: options.TimeUnit = None,
    max_rejected: options.MaxRejected = 0.01,
    memory_limit: options.MemoryLimit = None,
    threads: options.Threads = None,
    work: Annotated[Path | None, typer.Option(help="Keep stores and models in this folder.")] = None,
    seed: options.Seed = 1,
    as_json: options.Json = False,
) -> None:
    """Does a model trained on mixed batches win them by taste, or by the category alone?"""
    from longretriever.experiment.leak import leak_log, table
    from longretriever.model.config import need_torch

    need_torch()
    with training_bar() as trained:
        result = leak_log(
            events,
            items=items,
            quantile=split,
            minutes=minutes,
            samples=samples,
            seed=seed,
            work=work,
            reading=parsing.reading(
                column, item_column, None, time_unit, max_rejected, memory_limit, threads
            ),
            said=say,
            trained=trained,
        )
    if as_json:
        print_json(result)
    else:
        out.print(table(result))
