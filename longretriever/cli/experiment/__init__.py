"""Which system is better, and is that more than chance? `experiment`: a file for each of its commands."""

from __future__ import annotations

from collections.abc import Callable

import typer

from longretriever.cli.experiment import ab, ablations, leak, likeness, paper, replay

COMMANDS: tuple[Callable[..., None], ...] = (
    ablations.ablations,
    leak.leak,
    replay.replay,
    likeness.likeness,
    ab.ab,
    paper.paper,
)

app = typer.Typer(help="Compare systems, with intervals and tests.", no_args_is_help=True)
for command in COMMANDS:
    app.command()(command)
