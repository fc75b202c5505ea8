"""`index`: a model's items can be searched; items come, move and go."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from longretriever.cli import options, parsing
from longretriever.console import bar, show
from longretriever.errors import InputError


def index(
    model: options.ModelFolder,
    path: Annotated[
        str | None,
        typer.Option("--out", help="Folder of the index, or postgresql://...; default MODEL/index."),
    ] = None,
    add: Annotated[
        list[str] | None,
        typer.Option("--add", help="New items to add to the model first: as --items of ingest."),
    ] = None,
    move: Annotated[
        bool, typer.Option("--move", help="With --add: items of another category there go to it.")
    ] = False,
    remove: Annotated[
        list[str] | None,
        typer.Option("--remove", help="Items that shall not be found any more: a file with item_id."),
    ] = None,
    item_column: options.ItemColumns = None,
    max_rejected: options.MaxRejected = 0.01,
    exact: Annotated[
        bool, typer.Option("--exact", help="Search all items by looking at all, however many.")
    ] = False,
    as_json: options.Json = False,
) -> None:
    """Put the item vectors into one FAISS list per category; with --add and --remove, items come and go."""
    from longretriever.pgvector import is_database
    from longretriever.retrieve.added import add_items, remove_items
    from longretriever.retrieve.indexing import WHOLE, index_model

    changes = bool(add or remove)
    if item_column and not changes:
        raise InputError("--item-column is for --add and --remove, the items that come or go.")
    if move and not add:
        raise InputError("--move is for --add: name the items file that says where items are now.")
    if path is not None and changes:
        raise InputError(
            "--add and --remove replace the model together with MODEL/index: index to --out afterwards."
        )
    if exact and changes:
        raise InputError("--add and --remove index as it is always done: index with --exact afterwards.")
    if path is not None and is_database(path):
        _load_into(path, model, as_json)
        return
    found: dict[str, Any] = {}
    with bar("indexing items", None) as advance:
        if not changes:
            index_model(model, path, progress=advance, exact=exact)
        columns = parsing.pairs(item_column, "--item-column")
        given: dict[str, Any] = {"columns": columns, "max_rejected": max_rejected, "progress": advance}
        if remove:
            found["removed"] = remove_items(model, remove, **given).as_dict()
        if add:
            found["items"] = add_items(model, add, move=move, **given).as_dict()
    target = Path(path) if path else model / "index"
    size = sum(f.stat().st_size for f in target.rglob("*") if f.is_file())
    grouped = next(filter(None, map(_groups, (target, model / WHOLE / "index"))), None)
    facts = {"path": str(target), "bytes": size, "clusters": grouped, **found}
    summary = {
        **_removed_summary(found.get("removed")),
        **_added_summary(found.get("items")),
        "index": target,
        "size": f"{size / 1e6:,.1f} MB",
    }
    if grouped:
        summary["all items"] = (
            f"{grouped['number']:,} groups, of which {grouped['probes']:,} are looked at for "
            f"{grouped['recall']:.1%} of the nearest {grouped['k']}"
        )
    show(facts, as_json, summary)


def _load_into(url: str, model: Path, as_json: bool) -> None:
    """The vectors of a model, and of what it brings to search all items, into a database."""
    from longretriever.pgvector import Database
    from longretriever.retrieve.indexing import load_into

    database = Database(url)
    with bar("loading items", None) as advance:
        load_into(database, model, progress=advance)
    facts = {"database": database.where, "models": [fingerprint for fingerprint, _ in database.models()]}
    short = {**facts, "models": ", ".join(f"{one[:12]} ({kind})" for one, kind in database.models())}
    show(facts, as_json, short)


def _groups(index: Path) -> dict[str, Any] | None:
    """How an index searches all items, where it does not look at all of them."""
    from longretriever.saved import opening

    return opening(index, "index").facts.get("clusters") if index.exists() else None


def _removed_summary(removed: Mapping[str, Any] | None) -> dict[str, Any]:
    """What became of items to remove, in words for people; nothing where none were given."""
    if removed is None:
        return {}
    before = f", {removed['already']:,} had been before" if removed["already"] else ""
    unknown = f", {removed['unknown']:,} are not in the model" if removed["unknown"] else ""
    return {
        "rows to remove": _rows(removed["rows"]),
        "removed": f"{removed['removed']:,} items{before}{unknown}",
        "left": f"{removed['left']:,} items",
    }


def _added_summary(added: Mapping[str, Any] | None) -> dict[str, Any]:
    """What became of items to add, in words for people; nothing where none were given."""
    if added is None:
        return {}
    rows, features = added["rows"], added["features"]
    stay = not (added["back"] or added["moved"])
    into = f" in {len(added['categories']):,} categories" if added["added"] else ""
    summary = {
        "rows": _rows(rows),
        "added": f"{added['added']:,} items{into}",
        "already there": f"{added['already']:,} items{', left as they are' if stay else ''}",
    }
    if added["back"]:
        summary["back"] = f"{added['back']:,} of those, which had been removed"
    if added["moved"]:
        summary["moved"] = f"{added['moved']:,} of those, to the category that they have here"
    if added["elsewhere"]:
        summary["elsewhere"] = f"{added['elsewhere']:,} of those have another category here (see --move)"
    for name, found in features.items():
        summary[f"feature {name}"] = ", ".join(f"{n:,} {what}" for what, n in found.items())
    if added["plain"]:
        summary["no feature known"] = f"{added['plain']:,} items: those of one category have one vector"
    return summary


def _rows(rows: Mapping[str, int]) -> str:
    return f"{rows['read']:,} read" + "".join(
        f", {n:,} {why}" for why, n in rows.items() if n and why != "read"
    )
