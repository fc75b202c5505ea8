"""How does an experiment end? It says where its report is, what asked for it, and what failed."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import typer
from rich.markup import escape

from longretriever.console import err, out


def as_typed() -> str:
    """The command itself, for the report to say how it is made again."""
    return shlex.join(["longretriever", *sys.argv[1:]])


def say_written(files: Sequence[Path]) -> None:
    out.print("\nWritten: " + ", ".join(map(str, files)), highlight=False)


def say_failed(runs: Sequence[Mapping[str, Any]]) -> None:
    """What of an experiment failed, which is an error although there is a report."""
    for failure in runs:
        err.print(f"[bold red]failed:[/] {escape(str(failure))}", highlight=False)
    if runs:
        raise typer.Exit(1)
