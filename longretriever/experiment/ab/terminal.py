"""An A/B test on a terminal: arms, routes, and lifts drawn as whiskers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich import table as rich
from rich.text import Text as Line

from longretriever.experiment.ab.report import (
    BESIDE,
    STAR,
    Result,
    label,
    lift_cell,
    percent,
    star,
    strict,
    value_cell,
)
from longretriever.experiment.page import Cell, handfuls, many

_WIDTH = 16  # of a column
_WHISKER = 41  # of the plot


def tables(result: Result) -> list[rich.Table]:
    """The arms, a few at a time beside the control, then the routes of each arm. 100 columns are enough."""
    result = strict(result)
    of_arms = [_of_arms(result, names) for names in handfuls(list(result["arms"]), BESIDE)]
    if result["comparisons"]:
        key = f"Lifts in %, 95% intervals below.\n{STAR} more than chance (Holm-corrected)."
        of_arms[-1].caption = key
    return [*of_arms, *(_of_routes(result, name) for name in result["arms"])]


def _of_arms(result: Result, names: Sequence[str]) -> rich.Table:
    arms, figures = result["arms"], list(result["figures"])
    columns = {names[0]: [value_cell(arms[names[0]]["figures"][figure]) for figure in figures]}
    columns |= {name: [lift_cell(result, name, figure) for figure in figures] for name in names[1:]}
    return _grid(f"A/B test of {many(len(arms), 'arm')}", "figure", list(map(label, figures)), columns)


def _of_routes(result: Result, name: str) -> rich.Table:
    routes = result["arms"][name]["routes"]
    heads = {figure: label(figure).replace(" ", "\n") for figure in result["of_route"]}
    columns = {head: [value_cell(of[f]) for of in routes.values()] for f, head in heads.items()}
    return _grid(f"Routes of {name}", "route", list(routes), columns)


def _grid(title: str, first: str, rows: Sequence[str], columns: Mapping[str, Sequence[Cell]]) -> rich.Table:
    grid = rich.Table(
        title=Line(f"\n{title}"), title_justify="left", caption_justify="left", box=None, padding=(0, 2, 0, 0)
    )
    grid.add_column(first, max_width=20, overflow="fold")
    lines = [list(_lines(name, cells)) for name, cells in columns.items()]
    for name, of in zip(columns, lines, strict=True):
        wide = max((line.plain.index("\n") for line in of), default=0)
        grid.add_column(Line(name, justify="right"), max_width=max(_WIDTH, wide), overflow="fold")
    for row, *cells in zip(rows, *lines, strict=True):
        grid.add_row(Line(row), *cells)
    return grid


def _lines(head: str, cells: Sequence[Cell]) -> Iterator[Line]:
    """A column. Padded here, since rich would put a star where the last digit of the others is."""
    star = " " * any(cell.text.endswith(STAR) for cell in cells)
    texts = [
        (cell.text + star * (not cell.text.endswith(STAR)), "".join(cell.small).replace("%", "") + star)
        for cell in cells
    ]
    wide = max(min(max(map(len, head.split("\n"))), _WIDTH), *(len(text) for pair in texts for text in pair))
    for cell, (above, below) in zip(cells, texts, strict=True):
        bold = "bold" if cell.bold else ""
        yield Line.assemble((above.rjust(wide), bold), "\n", (below.rjust(wide), "dim"))


# -- a plot


def whiskers(result: Result, figures: Sequence[str]) -> rich.Table:
    """Lifts of some figures with their intervals, around the line where nothing changes."""
    rows = [row for row in strict(result)["comparisons"] if row["figure"] in figures]
    rows = [row for row in rows if None not in (row["lift"], *row["interval"])]
    reach = max((abs(end) for row in rows for end in row["interval"]), default=0.01)
    grid = rich.Table(title=f"Lifts, −{reach:.0%} to +{reach:.0%}", title_justify="left", box=None)
    grid.add_column("")
    grid.add_column(justify="right")
    grid.add_column(no_wrap=True)
    for row in rows:
        lift = percent(row["lift"]) + (star(row) or " ")
        grid.add_row(f"{row['arm']}: {label(row['figure'])}", lift, _whisker(row, reach))
    return grid


def _whisker(row: Mapping[str, Any], reach: float) -> str:
    """ "  ├──●──┤ │", the bar standing at 0."""
    low, high = (_place(end, reach) for end in row["interval"])
    line = [" "] * _WHISKER
    line[low : high + 1] = "─" * (high + 1 - low)
    line[_WHISKER // 2] = "│" if line[_WHISKER // 2] == " " else "┼"
    line[low], line[high] = "├", "┤"
    line[_place(row["lift"], reach)] = "●"
    return "".join(line)


def _place(value: float, reach: float) -> int:
    return round((min(1.0, max(-1.0, value / reach)) + 1) / 2 * (_WHISKER - 1))
