"""Do the paper's claims hold, in which worlds, and by how much? The dict of `paper.run_paper`, to be read.

It becomes `results.json`, `report.md` and `report.html`, or a table for a terminal. Judged is one figure of
each claim, `paper.MAIN`, which was fixed beforehand; all others are shown beside it. A figure that had
nothing to divide by is NaN there, None here and in JSON, and "–" to the reader.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Group
from rich.table import Table as Grid
from rich.text import Text as Line

from longretriever.experiment import page, plots
from longretriever.experiment.ab.report import digits, label, percent, planned, strict
from longretriever.experiment.page import NONE, Block, Cell, Plots, Points, Section, Table, Text, many
from longretriever.experiment.paper import MAIN, ROUTE_FIGURES, SHOWN

Result = Mapping[str, Any]
Claim = Mapping[str, Any]  # one of result["claims"]
Over = Mapping[str, Any]  # a figure over worlds: its mean, interval and value by world

TABLES = {
    1: "LongRetriever in MIND's place",
    2: "routes",
    3: "which contexts are asked",
    4: "the long sequence",
    5: "in-context training",
    0: "This package's own",
}
"""Those of the paper in its order, then what this package adds."""
VERDICTS = ("holds", "fails", "undecided")
_COLORS = {"holds": "more", "fails": "less", "undecided": "undecided"}  # as `plots.differences` calls them


def write(result: Result, folder: str | os.PathLike[str]) -> list[Path]:
    """Write the three files into a folder, and return their paths. Raises `MissingExtra` as `page.write`."""
    result = strict(result)
    return page.write(folder, result, title_of(result), sections(result))


def title_of(result: Result) -> str:
    return f"LongRetriever's Tables 1 to 5 in {many(len(result['worlds']), 'simulated market')}"


def sections(result: Result) -> list[Section]:
    """The whole report of a `strict` result, in the order in which it is read; empty ones are left out."""
    made = [
        Section("In short", list(_in_short(result))),
        *(Section(_named(table), list(_table(result, table))) for table in TABLES),
        Section("Where it holds", list(_where(result))),
        Section("All arms", list(_arms(result))),
        Section("How to read this", [Text(text) for text in _how_to_read(result)]),
        Section("What produced it", list(_made(result))),
    ]
    return [section for section in made if section.blocks]


# -- the sections


def _in_short(result: Result) -> Iterator[Block]:
    plan, claims = result["plan"], result["claims"]
    found = [claim["verdict"] for claim in claims if claim["table"]]
    hold, fail, undecided = map(found.count, VERDICTS)
    yield Text(
        f"Of {many(len(found), 'claim')} of the paper, here {hold} hold, {fail} fail and {undecided} are "
        f"undecided: in {many(len(result['worlds']), 'world')} of {many(plan['users'], 'user')} and "
        f"{many(plan['days'], 'day')}. What decides is {label(MAIN)}: its mean lift over the worlds, "
        "with a 95% interval."
    )
    yield Points([_sentence(claim) for claim in claims])
    if not result["of_paper"]:
        yield Text(
            "The paper's own figures are not printed beside these, since they were not given: "
            "--paper-figures FILE gives them."
        )
    drawn = [_drawn(claim) for claim in claims if _is_known(claim["figures"][MAIN])]
    if drawn:
        yield Text(
            "Large: the mean over worlds and its interval. Small, below: each world. Green holds, red fails, "
            "an empty circle is undecided; which side of 0 is claimed is in the sentences above."
        )
        panel: Callable[[str], str] = partial(plots.differences, drawn)
        yield Plots([(f"{label(MAIN)}, lift in %, over worlds", panel)])


def _sentence(claim: Claim) -> str:
    """What is claimed, whether it holds, and by how much, in how many worlds."""
    over = claim["figures"][MAIN]
    verdict = "it is undecided" if claim["verdict"] == "undecided" else f"it {claim['verdict']}"
    return (
        f"{_table_of(claim)}: {claim['says']}. Here {verdict}: {percent(over['mean'])} {label(MAIN)} "
        f"({_span(over)}), {_name(claim)}. {_agree(claim, MAIN)} worlds have the claimed sign; in "
        f"{over['sure_worlds']} the difference is more than chance by itself."
    )


def _drawn(claim: Claim) -> dict[str, Any]:
    over = claim["figures"][MAIN]
    return {
        "arm": claim["arm"],
        "against": claim["against"],
        "found": _COLORS[claim["verdict"]],
        "difference": 100 * over["mean"],
        "interval": [100 * end for end in over["interval"]],
        "each": [100 * value for value in over["by_world"] if value is not None],
    }


def _table(result: Result, table: int) -> Iterator[Block]:
    """One table of the paper; Table 2 is of routes, the others of claims."""
    if table == 2:
        yield from _routes(result)
        return
    claims = [claim for claim in result["claims"] if claim["table"] == table]
    for claim in claims:
        yield Text(_sentence(claim))
    for claim in claims:
        theirs = _of_paper(result, table, claim["arm"])
        heads = ["lift", "95%", "worlds as claimed", "sure by itself", *(["the paper"] if theirs else [])]
        rows = [(_figure(name), _lifts(claim, name, theirs)) for name in SHOWN if name in claim["figures"]]
        yield Table("figure", [("", head) for head in heads], rows, _name(claim))
    worlds = [("world", str(seed)) for seed in result["worlds"]]
    for claim in claims:
        own = [
            (label(name), [Cell(percent(lift)) for lift in of["by_world"]])
            for name, of in claim["figures"].items()
        ]
        yield Table("figure", worlds, own, f"{_name(claim)}: each world's lift", folded=True)


def _lifts(claim: Claim, figure: str, theirs: Mapping[str, Any]) -> list[Cell]:
    over = claim["figures"][figure]
    ours = (percent(over["mean"]), _span(over), _agree(claim, figure), str(over["sure_worlds"]))
    cells = [Cell(ours[0], bold=_side(over) != 0), *map(Cell, ours[1:])]
    return [*cells, Cell(percent(theirs.get(figure)))] if theirs else cells


def _routes(result: Result) -> Iterator[Block]:
    """Table 2: what a route in the tested slot contributes to its arm."""
    routes, meaning = result["routes"], result["definitions"]["of_route"]
    if not routes:
        return
    yield Text("Each route in the tested slot of its own arm, beside the same two others. Means over worlds.")
    yield Points([f"{label(name)}: {meaning[name]}." for name in ROUTE_FIGURES])
    theirs = {name: given for name in routes if (given := _of_paper(result, 2, name))}
    head = [("", label(figure)) for figure in ROUTE_FIGURES]
    head += [("the paper, lift", label(figure)) for figure in ROUTE_FIGURES if theirs]
    rows = []
    for name, of in routes.items():
        cells = [_mean(of[figure]) for figure in ROUTE_FIGURES]
        cells += [Cell(percent(theirs.get(name, {}).get(figure))) for figure in ROUTE_FIGURES if theirs]
        rows.append((name, cells))
    yield Table("route", head, rows)


def _where(result: Result) -> Iterator[Block]:
    """One property of the world after the other: where claims hold, and where they fail."""
    worlds, days = many(result["sweep"]["worlds"], "world"), many(result["sweep"]["days"], "day")
    for n, sweep in enumerate(result["sweeps"]):
        if n == 0:
            yield Text(
                "One property of the market at a time is changed; the rest is as in the tables above, but "
                f"with {worlds} and {days}. A cell has the lift of {label(MAIN)}, its interval, and what "
                "becomes of the claim."
            )
        points = {point["value"]: point["claims"] for point in sweep["points"]}
        found = {_name(claim): [_same(claim, of) for of in points.values()] for claim in result["claims"]}
        rows = [(name, [_judged(claim) for claim in of]) for name, of in found.items()]
        yield Table("claim", [("", value) for value in points], rows, sweep["name"].capitalize())
        yield Points([_where_holds(claim, points) for claim in result["claims"]])
        lines = [[_in_percent(claim) for claim in of] for of in found.values()]
        drawn: Callable[[str], str] = partial(plots.by_value, lines, list(points), sweep["name"], "lift in %")
        yield Plots([(f"{label(MAIN)}, lift by {sweep['name']}", drawn)], legend=list(found))


def _where_holds(claim: Claim, points: Mapping[str, Sequence[Claim]]) -> str:
    verdicts = {value: one["verdict"] for value, of in points.items() if (one := _same(claim, of))}
    told = [
        f"{verdict} at {' and '.join(where)}"
        for verdict in VERDICTS
        if (where := [value for value, one in verdicts.items() if one == verdict])
    ]
    return f"{_table_of(claim)}, {claim['says']}: {'; '.join(told) or 'not tried'}."


def _same(claim: Claim, among: Sequence[Claim]) -> Claim | None:
    key = (claim["arm"], claim["against"])
    return next((one for one in among if (one["arm"], one["against"]) == key), None)


def _judged(claim: Claim | None) -> Cell:
    if claim is None:
        return Cell(NONE)
    over, verdict = claim["figures"][MAIN], claim["verdict"]
    return Cell(f"{percent(over['mean'])} {verdict}", (_span(over),), verdict != "undecided")


def _in_percent(claim: Claim | None) -> float | None:
    mean = claim["figures"][MAIN]["mean"] if claim else None
    return None if mean is None else 100 * mean


def _arms(result: Result) -> Iterator[Block]:
    yield Text("Means over worlds; ± is half of its 95% interval, had other worlds been drawn.")
    yield Points([f"{label(name)}: {result['definitions']['figures'][name]}." for name in SHOWN])
    rows = [(name, [_mean(of[figure]) for figure in SHOWN]) for name, of in result["arms"].items()]
    yield Table("arm", [("", label(figure)) for figure in SHOWN], rows)


def _how_to_read(result: Result) -> Iterator[str]:
    yield (
        "A world is a simulated market with a seed of its own: other items, other people with other tastes, "
        "another log, and models trained on that log. Within a world all arms meet the same people and have "
        "the same ranker; they differ in the route that is tested."
    )
    yield (
        "A claim says that an arm brings more, or less, than another. It is judged by one figure, "
        f"{label(MAIN)} ({result['definitions']['figures'][MAIN]}), fixed beforehand: it holds where the 95% "
        "interval of the mean lift is on the claimed side of 0, fails where it is on the other, and is "
        "undecided where 0 is within, which does not mean that there is no difference: it may be as large as "
        "the interval says. Lifts are relative: +5% of .20 is .21. The other figures decide nothing; theirs "
        "are bold where 0 is outside of the interval."
    )
    yield (
        "Intervals are Student's t over worlds, which are independent: they say where the mean of all worlds "
        "of this kind may lie. Where there is a single world, the interval is a bootstrap over its users "
        "and speaks of that world alone. “Sure by itself” counts worlds that have the claimed sign and in "
        "which p over users is under .05, uncorrected."
    )
    swept = sum(len(point["claims"]) for sweep in result["sweeps"] for point in sweep["points"])
    yield (
        f"There are {many(len(result['claims']) + swept, 'verdict')} here, not corrected for their number: "
        "of differences that do not exist, 1 in 20 is still said to hold or fail."
    )
    yield (
        "Nothing is tuned to make a table come out. Still, a simulated market says what follows from its "
        "assumptions, which docs/market.md lists, and not what a platform will see."
    )


def _made(result: Result) -> Iterator[Block]:
    made = result["made"]
    told, parts = planned(result["plan"])
    seeds = ", ".join(map(str, result["worlds"]))
    yield page.facts({"command": made["command"], "date": made["date"], "seeds of worlds": seeds, **told})
    yield page.facts({name: value or NONE for name, value in made["environment"].items()})
    for what, config in parts.items():
        first = ", first world" if what == "market" else ""
        yield page.code(f"Configuration of the {what}{first}", config)
    if result["sweeps"]:
        changes = {s["name"]: {p["value"]: p["changes"] for p in s["points"]} for s in result["sweeps"]}
        yield page.code("What is changed in the market, by property and value", changes)
    for name, config in made["configurations"].items():
        yield page.code(f"Configuration of route {name}", config)


# -- for a terminal


def table(result: Result) -> Group:
    """The claims, and below them the routes of Table 2. 100 columns are enough."""
    result = strict(result)
    return Group(_of_claims(result), "", _of_routes(result))


def _of_claims(result: Result) -> Grid:
    grid = _grid(f"{title_of(result)}: lift of {label(MAIN)}")
    for head in ("table", "claim"):
        grid.add_column(head, overflow="fold")
    for head in ("lift", "95% over worlds", "as claimed", "sure"):
        grid.add_column(head, justify="right", no_wrap=True)
    grid.add_column("", no_wrap=True)
    for claim in result["claims"]:
        over, verdict = claim["figures"][MAIN], claim["verdict"]
        says = f"{claim['arm']}\n{'more' if claim['more'] else 'less'} than {claim['against']}"
        texts = (percent(over["mean"]), _span(over), _agree(claim, MAIN), str(over["sure_worlds"]))
        style = {"holds": "green", "fails": "red"}.get(verdict, "")
        grid.add_row(str(claim["table"] or "own"), Line(says), *texts, Line(verdict, style=style))
    grid.caption = (
        "As claimed: worlds with the claimed sign. Sure: worlds where it is more than chance by itself."
    )
    return grid


def _of_routes(result: Result) -> Grid:
    grid = _grid("Table 2: routes, each in its own arm; means over worlds")
    grid.add_column("route", overflow="fold")
    for figure in ROUTE_FIGURES:
        grid.add_column(label(figure), justify="right", no_wrap=True)
    for name, of in result["routes"].items():
        cells = (_mean(of[figure]) for figure in ROUTE_FIGURES)
        grid.add_row(Line(name), *(" ".join([cell.text, *cell.small]) for cell in cells))
    return grid


def _grid(title: str) -> Grid:
    left: Any = {"title_justify": "left", "caption_justify": "left"}
    return Grid(title=Line(title), box=None, padding=(0, 2, 0, 0), **left)


# -- words and digits


def _named(table: int) -> str:
    return f"Table {table}: {TABLES[table]}" if table else TABLES[table]


def _table_of(claim: Claim) -> str:
    return f"Table {claim['table']}" if claim["table"] else TABLES[0]


def _name(claim: Claim) -> str:
    return f"{claim['arm']} against {claim['against']}"


def _figure(name: str) -> str:
    return f"{label(name)}, which decides" if name == MAIN else label(name)


def _of_paper(result: Result, table: int, arm: str) -> Mapping[str, Any]:
    given: Mapping[str, Any] = result["of_paper"].get(f"Table {table}", {}).get(arm, {})
    return given


def _is_known(over: Over) -> bool:
    return None not in (over["mean"], *over["interval"])


def _side(over: Over) -> int:
    """1 or -1 where the whole interval is above or below 0, else 0."""
    if not _is_known(over):
        return 0
    low, high = over["interval"]
    return (low > 0) - (high < 0)


def _span(over: Over) -> str:
    return " to ".join(map(percent, over["interval"])) if _is_known(over) else NONE


def _agree(claim: Claim, figure: str) -> str:
    """ "4 of 5": the worlds whose lift of the figure has the claimed sign."""
    lifts = claim["figures"][figure]["by_world"]
    sign = 1 if claim["more"] else -1
    return f"{sum(value is not None and sign * value > 0 for value in lifts)} of {len(lifts)}"


def _mean(over: Over) -> Cell:
    text = digits(over["mean"])
    if not _is_known(over):
        return Cell(text)
    low, high = over["interval"]
    return Cell(text, (f"±{digits((high - low) / 2, over['mean'])}",))
