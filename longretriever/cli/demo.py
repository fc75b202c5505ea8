"""`demo`: the whole way, on a simulated market."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from longretriever.cli import options
from longretriever.console import out


def demo(
    path: Annotated[Path, typer.Option("--out", help="Folder to work in.")] = Path("demo"),
    events: Annotated[int, typer.Option(min=2_000, help="Behaviors of the simulated log.")] = 400_000,
    minutes: Annotated[float, typer.Option(min=0.01, help="Training at most.")] = 1.5,
    seed: options.Seed = 0,
) -> None:
    """The whole way on a simulated market: log, store, model, index, quality, candidates with reasons."""
    from longretriever.demo import run
    from longretriever.model.config import need_torch

    need_torch()
    run(path, events, minutes, seed, out)
