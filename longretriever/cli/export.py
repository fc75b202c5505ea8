"""`export`: the item vectors, for other databases."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from longretriever.cli import options
from longretriever.console import bar, show


def export(
    model: options.ModelFolder,
    path: Annotated[Path, typer.Option("--out", help="Parquet file.")],
    space: Annotated[
        str | None, typer.Option(help="contexts or whole: only these vectors. Default: all that there are.")
    ] = None,
    as_json: options.Json = False,
) -> None:
    """Write the item vectors to a Parquet file, for Milvus, Qdrant, pgvector and the like."""
    from longretriever.retrieve.export import export as run

    with bar("items", None) as advance:
        rows = run(model, path, space, progress=advance)
    show({"path": str(path), "rows": rows, "bytes": path.stat().st_size}, as_json)
