"""What can be asked for in a terminal? One command for each stage, each in the file of its name.

Results go to stdout, as tables for people or, with `--json`, as one JSON object; progress goes to stderr.
Exit codes: 0 done, 1 an error that is said in one line, 2 a wrong option, 130 stopped by Ctrl-C.
What takes long to import is imported by the command that needs it, so that help comes at once.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Annotated

import typer
from rich.markup import escape

from longretriever import __version__
from longretriever.cli import (
    compact,
    demo,
    evaluate,
    experiment,
    export,
    generate,
    index,
    ingest,
    retrieve,
    serve,
    train,
    verify,
)
from longretriever.console import err
from longretriever.errors import LongRetrieverError

COMMANDS: tuple[Callable[..., None], ...] = (
    generate.generate,
    ingest.ingest,
    train.train,
    index.index,
    retrieve.retrieve,
    serve.serve,
    serve.serve_shard,
    export.export,
    evaluate.evaluate,
    compact.compact,
    verify.verify,
    demo.demo,
)
"""In the order in which help lists them, about that in which data flows."""

app = typer.Typer(
    help="Candidates out of millions of items for each request, from a user's whole life of behaviors.",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "auto_envvar_prefix": "LONGRETRIEVER"},
)
app.add_typer(experiment.app, name="experiment")
for command in COMMANDS:
    app.command()(command)


def _say_version(wanted: bool) -> None:
    if wanted:
        print(__version__)
        raise typer.Exit


@app.callback()
def _of_all_commands(
    version: Annotated[
        bool,
        typer.Option(
            "--version",
            is_eager=True,
            callback=_say_version,
            allow_from_autoenv=False,  # who sets LONGRETRIEVER_VERSION means something else
            help="Print the version.",
        ),
    ] = False,
) -> None:
    """What comes before a command."""


def main() -> None:
    """The entry point: errors of the package and of the disk become one line on stderr."""
    try:
        app()
    except (LongRetrieverError, OSError) as error:
        err.print(f"[bold red]error:[/] {escape(str(error))}", highlight=False, soft_wrap=True)
        sys.exit(1)
