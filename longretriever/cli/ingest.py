"""`ingest`: log files become a store."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from longretriever.cli import options, parsing
from longretriever.console import day, show, spinner


def ingest(
    events: options.Events,
    path: Annotated[Path, typer.Option("--out", help="Folder of the store.")],
    items: options.Items = None,
    users: options.Users = None,
    column: options.Columns = None,
    item_column: options.ItemColumns = None,
    user_column: options.UserColumns = None,
    time_unit: options.TimeUnit = None,
    max_rejected: options.MaxRejected = 0.01,
    memory_limit: options.MemoryLimit = None,
    threads: options.Threads = None,
    profile: Annotated[
        list[str] | None, typer.Option(help="Profile field to use; default all that suit.")
    ] = None,
    item_feature: Annotated[
        list[str] | None, typer.Option(help="Item feature to use; default all that suit.")
    ] = None,
    engine: Annotated[str, typer.Option(help="duckdb, or spark for a cluster.")] = "duckdb",
    spark_master: Annotated[
        str | None,
        typer.Option(
            "--spark-master", metavar="URL", help="local[4], spark://host:7077; default as submitted."
        ),
    ] = None,
    parts_by: Annotated[
        str | None,
        typer.Option("--parts-by", help="Cut the store by user (to serve) or category (to train)."),
    ] = None,
    parts: Annotated[
        int | None, typer.Option("--parts", min=1, help="How many stores to cut it into.")
    ] = None,
    as_json: options.Json = False,
) -> None:
    """Turn log files into a store: numbered, sorted, deduplicated, memory-mapped."""
    from longretriever.store.ingest import ingest as run

    with spinner("reading") as say:
        report = run(
            events,
            path,
            items=items,
            users=users,
            **parsing.reading(
                column, item_column, user_column, time_unit, max_rejected, memory_limit, threads
            ),
            engine=parsing.engine(engine, spark_master),
            parts=parsing.parts(parts_by, parts),
            profile=profile,
            item_features=item_feature,
            progress=say,
        )
    facts = report.as_dict()
    show({"path": str(path), **facts}, as_json, ingest_summary(str(path), facts))


def ingest_summary(path: str, facts: Mapping[str, Any]) -> dict[str, Any]:
    rejected = facts["rejected"]
    reasons = "; ".join(f"{n:,} {reason}" for reason, n in rejected.items())
    return {
        "store": path,
        "events": f"{facts['read']:,} read, {facts['kept']:,} kept, {facts['duplicates']:,} duplicates",
        "rejected": f"{sum(rejected.values()):,}"
        + (f" ({reasons}): see {path}/rejected.parquet" if reasons else ""),
        "users": f"{facts['users']:,}",
        "items": f"{facts['items']:,} in {facts['categories']:,} categories",
        "times": f"{facts['time_unit']}, {day(facts['first_time'])} to {day(facts['last_time'])}",
        "other category": f"{facts['recategorised']:,} events counted under their item's usual one",
        **_parts_summary(facts["parts"]),
        "columns": ", ".join(facts["columns_used"]),
        **{f"skipped {name}": why for name, why in facts["columns_skipped"].items()},
        **{f"note {i}": note for i, note in enumerate(facts["notes"], start=1)},
        "seconds": ", ".join(f"{stage} {s:.1f}" for stage, s in facts["seconds"].items()),
    }


def _parts_summary(parts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    return {
        part["folder"]: f"{part['events']:,} events of {part['users']:,} users, "
        f"{'users' if part['by'] == 'user' else 'categories'} {part['first']} to {part['last']}"
        for part in parts
    }
