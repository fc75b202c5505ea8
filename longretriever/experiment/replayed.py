"""What does a replay say, and on what grounds? Its result as tables to print and as a report.

The report is made as that of `dossier.py`, which has the sections that both share. Where a figure needs
explaining, the report does it beside the table.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Group
from rich.table import Table as Grid
from rich.text import Text as Styled

from longretriever.experiment import dossier, page, plots
from longretriever.experiment.dossier import signed
from longretriever.experiment.page import (
    NONE,
    Block,
    Cell,
    Plots,
    Points,
    Section,
    Table,
    Text,
    digits,
    many,
    probability,
)
from longretriever.experiment.runs import SURE, exchanges, main_length

Result = Mapping[str, Any]

TOGETHER = "all together"
LABELS = {
    "items": "items",
    "next": "next R",
    "recall": "recall",
    "aer": "AER",
    "alone": "alone",
    "uer": "UER",
    "unique_items": "only it",
    "unique": "share",
    "unique_targets": "only it, next",
    "unique_next": "share, next",
    "adds": "adds",
    "adds_next": "adds, next",
}
"""All figures, in the order of the report's columns; `docs/experiment.md` says what each is."""
PRINTED = ("items", "next", "recall", "aer", "alone", "uer", "unique_items", "unique", "adds")
PLOTTED = {"uer": "UER: of what it alone retrieved, met", "unique": "Of all that was found, only by it"}
COUNTS = ("unique_items", "unique_targets")
SMALL = ("aer", "uer")  # a handful among hundreds: as percent
VERDICTS = {"more": "more", "less": "less", "undecided": "not told apart"}


# -- to print


def tables(result: Result) -> Group:
    """For each length of list and each part: the figures of all routes, and in which order they help."""
    shown: list[Any] = []
    for k, found in result["found"].items():
        for part, of in found.items():
            shown += [*([""] if shown else []), _grid(result, k, part, of)]
            shown += [Styled(_order(of))] if of["requests"] else []
    return Group(*shown)


def _grid(result: Result, k: str, part: str, of: Mapping[str, Any]) -> Grid:
    title = f"{part.upper()}, {k} items a route: {_counted(result, of)}"
    grid = Grid(title=title, title_justify="left", box=None, padding=(0, 1, 0, 0))
    grid.add_column("")
    for figure in PRINTED:
        grid.add_column(LABELS[figure], justify="right", no_wrap=True)
    for name, figures in _rows(of):
        cells = [_cell(of, figures, figure) for figure in PRINTED]
        grid.add_row(name, *[Styled(cell.text, style="bold" if cell.bold else "") for cell in cells])
    return grid


def _order(of: Mapping[str, Any]) -> str:
    steps = [f"{step['route']} {digits(step['recall'])}" for step in of["order"]]
    return f"Recall, best first: {' + '.join(steps)}"


# -- the report


def write(result: Result, out: str | os.PathLike[str]) -> list[Path]:
    """Write results.json, report.md and report.html into the folder `out`; see `dossier.write`."""
    title = f"{many(len(result['arms']), 'route')} replayed on a log of {result['data']['events']:,} events"
    return page.write(out, result, title, sections(result))


def sections(result: Result) -> list[Section]:
    """The whole report, in the order in which it is read; sections without content are left out."""
    all_of_it = [
        Section("In short", list(_in_short(result))),
        *(Section(f"{part.upper()}: who found what", list(_part(result, part))) for part in ("all", "new")),
        Section("Who else found it", list(_shared(result))),
        Section("Which routes to have", list(_orders(result))),
        Section("Differences", list(_differences(result))),
        Section("Learning curves", list(dossier.curves(result))),
        Section("What it cost", list(dossier.cost(result))),
        Section("What failed", list(dossier.failed(result))),
        Section("How to read this", [Text(text) for text in _how_to_read(result)]),
        Section("What produced it", list(dossier.made(result))),
    ]
    return [section for section in all_of_it if section.blocks]


def _in_short(result: Result) -> Iterator[Block]:
    data, plan = result["data"], result["plan"]
    yield Text(
        f"Learned from {data['train_events']:,} events of {data['users']:,} users with "
        f"{data['train_items']:,} items in {data['categories']:,} categories; then each route was asked, "
        f"before {data['live']['requests']:,} later events, for {_k(result)} items, and its lists are held "
        f"against what that user met {_within(result)}. Each learned route was trained with "
        f"{many(len(plan['seeds']), 'seed')}, {dossier.bounds(plan)}."
    )
    if result["failed"]:
        names = ", ".join(dict.fromkeys(one["arm"] for one in result["failed"]))
        yield Text(f"Without {names}, which failed: what only they find, no figure here knows. See below.")
    yield Points([_said(part, of) for part, of in _main(result).items() if of["requests"]])


def _said(part: str, of: Mapping[str, Any]) -> str:
    first, last = of["order"][0], of["order"][-1]
    by_adds = sorted(of["routes"], key=lambda name: -of["routes"][name]["adds"])
    adds = ", ".join(
        f"{name} {digits(of['routes'][name]['adds'])} ({_number(of['routes'][name]['unique_items'])} items)"
        for name in by_adds
    )
    return (
        f"{part.upper()}: {first['route']} finds {digits(first['recall'])} of what was met, all together "
        f"{digits(last['recall'])}. What would be lost without each: {adds}."
    )


def _part(result: Result, part: str) -> Iterator[Block]:
    for k, found in result["found"].items():
        of = found[part]
        if of["requests"]:
            yield Text(f"{k} items a route: {_counted(result, of)}.")
            rows = [(name, [_cell(of, figures, figure) for figure in LABELS]) for name, figures in _rows(of)]
            yield Table("route", [("", label) for label in LABELS.values()], rows)
    of = _main(result)[part]
    if of["requests"]:
        panels = []
        for figure, title in PLOTTED.items():
            lines = [
                (n, f[figure], f["intervals"][figure])
                for n, f in of["routes"].items()
                if f[figure] is not None
            ]
            panels.append((f"{part.upper()}: {title}", partial(plots.dots, lines)))
        yield Plots(panels)


def _shared(result: Result) -> Iterator[Block]:
    yield Text(
        f"Of what the route of the row retrieved, or found, with {_k(result)} items: the share that the "
        "route of the column did too."
    )
    for part, of in _main(result).items():
        for key, what in (("shared", "retrieved"), ("shared_found", "found")):
            if of["requests"]:
                names = list(of[key])
                rows = [
                    (row, [Cell("" if row == column else digits(of[key][row][column])) for column in names])
                    for row in names
                ]
                yield Table("route", [("", name) for name in names], rows, f"{part.upper()}: {what}")


def _orders(result: Result) -> Iterator[Block]:
    yield Text(
        "The best route by recall first, then the one that adds most to those above it. The figures are of "
        f"all down to the line, with {_k(result)} items of each."
    )
    for part, of in _main(result).items():
        if of["requests"]:
            rows = [(s["route"], [Cell(digits(s["recall"])), Cell(digits(s["next"]))]) for s in of["order"]]
            yield Table("and then", [("", "recall"), ("", "next R")], rows, part.upper())


def _differences(result: Result) -> Iterator[Block]:
    rows = result["comparisons"]
    if not rows:
        return
    yield Text(
        f"Each route less {rows[0]['against']}, on the same requests: its recall, and what it adds to all "
        f"others, with {_k(result)} items. p is the share of {exchanges(len(rows)):,} random exchanges of "
        "the two, user by user, that come out as far apart, corrected by Holm for these "
        f"{len(rows)} comparisons; more or less is said where that is under {SURE:g}."
    )
    panels: list[tuple[str, Callable[[str], str]]] = []
    for part, metric in dict.fromkeys((row["part"], row["metric"]) for row in rows):
        chosen = [row for row in rows if (row["part"], row["metric"]) == (part, metric)]
        panels.append((f"{part.upper()}, {LABELS[metric]}", partial(plots.differences, chosen)))
    yield Plots(panels)
    heads = ("difference", "95%", "p", "p corrected", "")
    lines = [
        (
            f"{row['arm']}: {LABELS[row['metric']]} {row['part'].upper()}",
            [
                Cell(signed(row["difference"])),
                Cell(" to ".join(signed(end) for end in row["interval"])),
                Cell(probability(row["p"])),
                Cell(probability(row["p_holm"])),
                Cell(VERDICTS[row["found"]], bold=row["found"] != "undecided"),
            ],
        )
        for row in rows
    ]
    yield Table("figure", [("", head) for head in heads], lines)


def _how_to_read(result: Result) -> Iterator[str]:
    yield (
        "ALL counts every item. NEW has only the requests before an item that the user had not met, counts "
        "of what followed only such items, and has lists that leave out what the user had met. Items that do "
        "not occur in what was learned from count nowhere."
    )
    yield (
        "next R: how often the item of the very event was in the list. recall: the share of what the user "
        f"met {_within(result)} that was in it. AER: of what was retrieved, the share that was met. UER: the "
        "same of what this route alone retrieved, which is the share called alone. only it: items that were "
        "met and that no other route had retrieved; share: of all that any route found. adds: the recall "
        "that all together would lose without the route."
    )
    yield (
        "A route is alone only among those asked: two that are alike hide each other, and neither adds much "
        "while the other is there. Nobody was shown anything: an item that the user would have liked, and "
        "never met, counts as a miss; what was shown at that time is favoured."
    )
    yield (
        "± is half of a 95% interval, by a bootstrap over users. With several seeds a figure is of all of "
        "them together, and counts are means; results.json has every seed."
    )


# -- cells and words


def _rows(of: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any]]]:
    return [*of["routes"].items(), (TOGETHER, of["together"])]


def _cell(of: Mapping[str, Any], figures: Mapping[str, Any], figure: str) -> Cell:
    value = figures.get(figure)
    if value is None:
        return Cell(NONE)
    others = [route[figure] or 0 for route in of["routes"].values()]
    bold = figure not in ("items", "alone") and value == max(others) > 0 and figures is not of["together"]
    if figure in COUNTS:
        return Cell(_number(value), bold=bold)
    low, high = figures["intervals"][figure]
    said = _percent if figure in SMALL else _number if figure == "items" else digits
    small = () if figure == "items" or low is None else (f"±{said((high - low) / 2)}",)
    return Cell(said(value), small, bold)


def _number(value: float) -> str:
    return f"{value:,.0f}"


def _percent(value: float) -> str:
    return f"{100 * value:.2f}%"


def _main(result: Result) -> Mapping[str, Any]:
    return result["found"][_k(result)]


def _k(result: Result) -> str:
    return str(main_length(result["plan"]["k"]))


def _within(result: Result) -> str:
    days = result["plan"]["horizon_days"]
    return f"within {days:g} day{'' if days == 1 else 's'}" if days else "at that very time"


def _counted(result: Result, of: Mapping[str, Any]) -> str:
    return f"{of['requests']:,} requests, {of['met']:,} items met {_within(result)}"
