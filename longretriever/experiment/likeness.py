"""How like is a generated log to real ones? The same figures of each, side by side, and what would mend them.

All logs, the generated one too, take the product's own way, ingest to a store, and are described by one
function (`evaluate.describe`). A figure of it that lies within the range of the real logs is *inside*; within
a factor of 1.25 of the nearer end it is *near*; else *outside*, and `MOVES` says which parameters of the
market to turn. Few logs make a wide range, so each real log is left out in turn, and held against the others.
"""

from __future__ import annotations

import math
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from rich.markup import escape
from rich.table import Table as Grid

from longretriever.errors import InputError
from longretriever.evaluate.describe import curves, describe
from longretriever.experiment import page, plots
from longretriever.experiment.figures import JUDGED, MOVES, SIZES, Figure
from longretriever.experiment.page import Block, Cell, Plots, Points, Section, Table, Text
from longretriever.experiment.runs import environment
from longretriever.market import Market, MarketConfig
from longretriever.saved import opening
from longretriever.store.behaviors import Store
from longretriever.store.ingest import ingest

GENERATED = "generated"
NEAR = 1.25
LEAST, MOST = 1_000, 1_000_000
"""Events of the log that is generated: as many as the median of the real ones has, within these."""

# -- from logs to figures


def likeness(
    logs: Mapping[str, Any],
    *,
    items: Mapping[str, Any] | None = None,
    events: int | None = None,
    market: str | os.PathLike[str] | None = None,
    seed: int = 0,
    work: str | os.PathLike[str] | None = None,
    reading: Mapping[str, Any] | None = None,
    said: Callable[[str], None] | None = None,
    command: str = "",
) -> dict[str, Any]:
    """Describe real logs and a generated one by the same figures, and compare; a dict for JSON.

    `logs` and `items`: by name, whatever `ingest` reads; `reading` are its options, for the real logs. The
    generated log is that of the folder `market`, or else of `MarketConfig.of_size(events, seed)`. Stores stay
    in `work` if it is given.

    Raises `InputError` for names that cannot be, `EventsError` for a log that cannot be read, `SavedError`
    for a folder that is no market.
    """
    _check(logs, items or {}, events, market)
    say, began, reading = said or (lambda _: None), time.perf_counter(), dict(reading or {})
    given = Market.load(market) if market is not None else None  # before anything is read
    with nullcontext(str(work)) if work else tempfile.TemporaryDirectory(prefix="longretriever-") as folder:
        described, sizes = {}, []
        for name, log in logs.items():
            say(f"{name}: reading")
            ingest(log, Path(folder) / name, items=(items or {}).get(name), **reading)
            described[name] = _described(Path(folder) / name, seed)
            sizes.append(described[name]["figures"]["events"])
        wanted = events or min(MOST, max(LEAST, int(np.median(sizes))))
        made = given or Market(MarketConfig.of_size(wanted, seed=seed))
        path = Path(market) if market is not None else Path(folder) / "market"
        if given is None:
            say(f"{GENERATED}: drawing {wanted:,} events")
            made.write(path)
        opening(path, "market")  # says so where a file is missing
        own = {name: reading[name] for name in ("memory_limit", "threads") if name in reading}
        ingest(path / "events.parquet", Path(folder) / GENERATED, **own)
        generated = _described(Path(folder) / GENERATED, seed)
    real = {name: log["figures"] for name, log in described.items()}
    compared = compare(real, generated["figures"])
    facts = {"command": command, "date": datetime.now(UTC).isoformat(timespec="seconds"), "seed": seed}
    return {
        "logs": described,
        GENERATED: {**generated, "config": asdict(made.config)},
        "compared": compared,
        "summary": summary(compared),
        "left_out": left_out(real, generated["figures"]),
        "made": {**facts, **environment(), "seconds": round(time.perf_counter() - began, 1)},
    }


def _check(logs: Mapping[str, Any], items: Mapping[str, Any], events: int | None, market: Any) -> None:
    if not logs:
        raise InputError("no real log is given, expected at least one: NAME=FILE.")
    for name in logs:
        if name in (GENERATED, "market", ".", "..") or Path(name).name != name:
            raise InputError(
                f"a real log is named {name!r}, which is taken or no name of a folder. Choose another name."
            )
    if strange := [name for name in items if name not in logs]:
        raise InputError(f"items for {strange[0]!r}, but the logs are {', '.join(logs)}. Name one of these.")
    if events is not None and market is not None:
        raise InputError(f"{market} is a log of its own size: leave {events:,} events out, or the market.")


def _described(store: Path, seed: int) -> dict[str, Any]:
    opened = Store.open(store)
    return {"figures": describe(opened, seed), "curves": curves(opened)}


def compare(
    real: Mapping[str, Mapping[str, float | None]], generated: Mapping[str, float | None]
) -> list[dict[str, Any]]:
    """For each judged figure: the range of the real logs, and where the generated one's lies.

    found    inside, near or outside; None where the figure is missing
    factor   generated / the nearer end of the range, None where one of the two is not above 0; 1 inside
    turn     parameters to raise and to lower, where it is not inside
    """
    rows = []
    for figure in (figure for group in JUDGED.values() for figure in group):
        values = [v for figures in real.values() if (v := figures[figure.name]) is not None]
        ours = generated[figure.name]
        low, high = min(values, default=None), max(values, default=None)
        row = {"figure": figure.name, "low": low, "high": high, "generated": ours}
        rows.append({**row, **_found(figure.name, low, high, ours)})
    return rows


def _found(name: str, low: float | None, high: float | None, ours: float | None) -> dict[str, Any]:
    if low is None or high is None or ours is None:
        return {"found": None, "factor": None, "turn": {}}
    if low <= ours <= high:
        return {"found": "inside", "factor": 1.0, "turn": {}}
    end, needed = (low, 1) if ours < low else (high, -1)
    factor = ours / end if ours > 0 and end > 0 else None
    near = factor is not None and abs(math.log(factor)) <= math.log(NEAR)
    words = {1: "raise", -1: "lower"}
    turn = {parameter: words[needed * way] for parameter, way in MOVES.get(name, {}).items()}
    return {"found": "near" if near else "outside", "factor": factor, "turn": turn}


def summary(compared: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    """How many figures are inside, near and outside."""
    return {how: sum(row["found"] == how for row in compared) for how in ("inside", "near", "outside")}


def left_out(
    real: Mapping[str, Mapping[str, float | None]], generated: Mapping[str, float | None]
) -> dict[str, dict[str, dict[str, int]]]:
    """Each real log, and the generated one, against the other real logs: what a log that is real would have.

    Of three logs or more, since two have no range to be within once one is left out.
    """
    found = {}
    for name in real if len(real) > 2 else ():
        others = {other: figures for other, figures in real.items() if other != name}
        found[name] = {
            "itself": summary(compare(others, real[name])),
            GENERATED: summary(compare(others, generated)),
        }
    return found


# -- to read


def table(result: Mapping[str, Any]) -> Grid:
    """What `likeness` found, to print."""
    names = list(result["logs"])
    grid = Grid(box=None, padding=(0, 2, 0, 0))
    grid.add_column("", overflow="fold")
    for name in (*names, GENERATED):
        grid.add_column(escape(name), justify="right", overflow="fold")
    grid.add_column("", no_wrap=True)
    for title, figures in {"Size": SIZES, **JUDGED}.items():
        grid.add_row(f"[bold]{title}[/]")
        for figure in figures:
            style = {"outside": "red", "near": "yellow"}.get(_row(result, figure).get("found", ""), "")
            verdict = f"[{style}]{_verdict(result, figure)}[/]" if style else _verdict(result, figure)
            grid.add_row(f"  {figure.label}", *_values(result, figure), verdict)
    return grid


def in_short(result: Mapping[str, Any]) -> str:
    of, total = result["summary"], sum(result["summary"].values())
    return (
        f"Of {total} figures of the generated log, {of['inside']} are within the range of the real ones, "
        f"{of['near']} within a factor of {NEAR:g} of it, and {of['outside']} outside."
    )


def _row(result: Mapping[str, Any], figure: Figure) -> Mapping[str, Any]:
    return next((row for row in result["compared"] if row["figure"] == figure.name), {})


def _values(result: Mapping[str, Any], figure: Figure) -> list[str]:
    logs = [*result["logs"].values(), result[GENERATED]]
    return [figure.text(log["figures"][figure.name]) for log in logs]


def _verdict(result: Mapping[str, Any], figure: Figure) -> str:
    row = _row(result, figure)
    if row.get("found") in (None, "inside"):
        return row.get("found") or ""
    side, factor = "above" if row["generated"] > row["high"] else "below", row["factor"]
    return side if factor is None else f"{max(factor, 1 / factor):.3g} times {side}"


def _turns(row: Mapping[str, Any]) -> str:
    return ", ".join(f"{how} {name}" for name, how in row["turn"].items()) or "no parameter moves it"


# -- the report


def write(result: Mapping[str, Any], out: str | os.PathLike[str]) -> list[Path]:
    """Write `results.json`, `report.md` and `report.html` into the folder `out`, and return their paths.

    Raises `MissingExtra` as `page.write` does.
    """
    return page.write(out, result, "A generated log beside real ones", sections(result))


def sections(result: Mapping[str, Any]) -> list[Section]:
    return [
        Section("In short", list(_summary(result))),
        Section("Pictures", [Text("The thick line is the generated log."), _pictures(result)]),
        Section("Size", [Text("Asked for when a log is generated, and not judged."), _table(result, SIZES)]),
        *(Section(title, [_table(result, figures)]) for title, figures in JUDGED.items()),
        Section("How to read this", [Points(_HOW_TO_READ)]),
        Section("What produced it", list(_made(result))),
    ]


_HOW_TO_READ = (
    "Inside: within the smallest and the largest of the real logs; with one log, it is that very value.",
    "Coming back and the next category: shares of the behaviors whose user has an earlier one. Behaviors of "
    "one second do not know of each other.",
    "Top 1, 5, 20: the categories that the user had most behaviors in so far, or those with the highest sum "
    "of 1 / age (Equation 3).",
    "Told by the current one: the share of the entropy of the next category that goes once the current one "
    "is known.",
    "A gap lies between two successive times of a user. One above half an hour ends a session.",
    "Burstiness: (sd - mean) / (sd + mean) of a user's gaps; -1 is a clock, 0 pure chance, 1 a single burst.",
    "Alike: the share of a user's other items that another user of one of his items has met too, divided by "
    "that share when items are swapped at random within categories, which keeps how busy people are and how "
    "popular items. 1 is chance. People who are there at the same time meet the same items, so not all of it "
    "is taste.",
)


def _summary(result: Mapping[str, Any]) -> Iterator[Block]:
    yield Text(in_short(result))
    if result["left_out"]:
        yield Text(
            "What would a real log have? Each is left out in turn, and held against the others; and the "
            "generated one against the same."
        )
        head = [(who, how) for who in ("the log left out", GENERATED) for how in result["summary"]]
        counted = [
            (name, [Cell(str(n)) for who in ("itself", GENERATED) for n in of[who].values()])
            for name, of in result["left_out"].items()
        ]
        yield Table("left out", head, counted)
    rows = []
    for title, figures in JUDGED.items():
        for figure in figures:
            row = _row(result, figure)
            if row["turn"] or row["found"] in ("near", "outside"):
                texts = (figure.text(row["generated"]), _range(figure, row), _verdict(result, figure))
                bold = row["found"] == "outside"
                cells = [*map(Cell, texts[:2]), Cell(texts[2], bold=bold), Cell(_turns(row), prose=True)]
                rows.append((f"{title}: {figure.label}", cells))
    if rows:
        yield Table("not inside", [("", h) for h in (GENERATED, "real", "", "to bring it there")], rows)


def _range(figure: Figure, row: Mapping[str, Any]) -> str:
    low, high = figure.text(row["low"]), figure.text(row["high"])
    return low if low == high else f"{low} to {high}"


def _table(result: Mapping[str, Any], figures: Sequence[Figure]) -> Table:
    head = [("", name) for name in (*result["logs"], GENERATED, "")]
    rows = []
    for figure in figures:
        verdict = Cell(_verdict(result, figure), bold=_row(result, figure).get("found") == "outside")
        rows.append((figure.label, [*map(Cell, _values(result, figure)), verdict]))
    return Table("figure", head, rows)


_CLOCK = {"1 s": 1, "1 min": 60, "1 h": 3_600, "1 d": 86_400, "30 d": 2_592_000, "3 y": 94_608_000}


def _pictures(result: Mapping[str, Any]) -> Plots:
    logs = {**result["logs"], GENERATED: result[GENERATED]}
    drawn: tuple[tuple[str, str, str, str, Mapping[str, float] | None], ...] = (
        ("activity", "Users with at least so many behaviors", "behaviors", "share of users", None),
        ("gaps", "Gaps of at least so long", "", "share of gaps", _CLOCK),
        ("categories", "Categories, the largest first", "place", "share of events", None),
    )
    panels: list[tuple[str, Callable[[str], str]]] = []
    for curve, title, x, y, marks in drawn:
        lines = [log["curves"][curve] for log in logs.values()]
        panels.append((title, partial(plots.overlaid, lines, x, y, marks=marks)))
    return Plots(panels, legend=list(logs))


def _made(result: Mapping[str, Any]) -> Iterator[Block]:
    rows = [(name, [Cell(str(value), prose=True)]) for name, value in result["made"].items() if value != ""]
    yield Table("", [("", "")], rows)
    yield page.code("Configuration of the market", result[GENERATED]["config"])
