"""`generate`: a log to try everything on."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from longretriever.cli import options
from longretriever.console import bar, show


def generate(
    path: Annotated[Path, typer.Argument(help="Folder to write events, items and users to.")],
    events: Annotated[int, typer.Option(min=1, help="Behaviors in the log.")] = 200_000,
    users: Annotated[int | None, typer.Option(min=1, help="Default: events / 100.")] = None,
    items: Annotated[int | None, typer.Option(min=1, help="Default: events / 25.")] = None,
    categories: Annotated[int | None, typer.Option(min=1, help="Default: to suit the events.")] = None,
    string_ids: Annotated[bool, typer.Option("--string-ids", help='Ids such as "u0001234".')] = False,
    seed: options.Seed = 0,
    as_json: options.Json = False,
) -> None:
    """Write the log of a simulated market, of any size, with known true taste."""
    from longretriever.market import Market, MarketConfig

    sizes = {"users": users, "items": items, "categories": categories}
    given = {name: value for name, value in sizes.items() if value is not None}
    config = MarketConfig.of_size(events, seed=seed, string_ids=string_ids, **given)
    with bar("writing events", events) as advance:
        Market(config).write(path, progress=advance)
    facts = {"path": str(path), **asdict(config)}
    show(facts, as_json, {k: facts[k] for k in ("path", "events", "users", "items", "categories", "seed")})
