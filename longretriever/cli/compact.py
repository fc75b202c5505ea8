"""`compact`: live events become part of the store."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from longretriever.cli import options
from longretriever.cli.ingest import ingest_summary
from longretriever.console import show, spinner


def compact(
    store: options.StoreFolder,
    live: Annotated[
        str, typer.Option("--live", help="Live events: a file, redis://... or redis+cluster://...")
    ],
    path: Annotated[
        Path | None, typer.Option("--out", help="Folder of the new store; default: in place of the old one.")
    ] = None,
    memory_limit: options.MemoryLimit = None,
    threads: options.Threads = None,
    as_json: options.Json = False,
) -> None:
    """Fold live events into the store, and leave out what of it is forgotten. Writers may go on meanwhile."""
    from longretriever.store.compact import compact as run

    with spinner("checking") as say:
        report = run(store, live, path, memory_limit=memory_limit, threads=threads, progress=say)
    facts = report.as_dict()
    show(facts, as_json, _compact_summary(facts))


def _compact_summary(facts: Mapping[str, Any]) -> dict[str, Any]:
    if facts["ingest"] is None:
        nothing = f"nothing to fold: it has all of {facts['journal']}, up to number {facts['upto']:,}"
        return {"store": facts["store"], "live events": nothing}
    told = ingest_summary(facts["store"], facts["ingest"])
    return {
        "store": facts["store"],
        "live events": f"{facts['live']:,}, numbers {facts['after'] + 1:,} to {facts['upto']:,}"
        f" of {facts['journal']}",
        "forgotten": f"{facts['forgotten']:,} users of the store",
        **{name: told[name] for name in ("events", "rejected", "users", "items", "times")},
        "deleted": f"{facts['deleted']:,} live events that the store had before",
        "seconds": f"{facts['seconds']:.1f}",
    }
