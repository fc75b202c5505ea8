"""Did people like another version of the platform better, or is it chance? A test, to be read.

The dict of `ab.run.run` becomes `results.json`, `report.md` and `report.html` (`terminal.py` prints it). A
figure that had nothing to divide by is NaN there, None here and in JSON, and "–" to the reader.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from longretriever.experiment import page, plots
from longretriever.experiment.page import NONE, Block, Cell, Plots, Points, Section, Table, Text, many
from longretriever.experiment.runs import SURE

Result = Mapping[str, Any]

SAID = ("uv_ctr", "uv_cvr", "orders")
"""What the first sentences are about, as in the papers."""
FOREST = ("pv", "uv_ctr", "uv_cvr", "orders", "exposed_categories", "clicked_categories")
BY_DAY = ("clicks", "orders", "ctr")
STAR = "*"
BESIDE = 4  # arms beside each other, the control among them: 100 columns of a terminal hold them


def write(result: Result, folder: str | os.PathLike[str]) -> list[Path]:
    """Write the three files into a folder, and return their paths. Raises `MissingExtra` as `page.write`."""
    result = strict(result)
    return page.write(folder, result, title_of(result), sections(result))


def strict(value: Any) -> Any:
    """The same with None for every float that is no number, as JSON wants it."""
    if isinstance(value, Mapping):
        return {key: strict(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [strict(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def title_of(result: Result) -> str:
    plan = result["plan"]
    return (
        f"A/B test of {many(len(result['arms']), 'arm')}, {many(plan['days'], 'day')} in a simulated market"
    )


def sections(result: Result) -> list[Section]:
    """The whole report of a `strict` result, in the order in which it is read; empty ones are left out."""
    made = [
        Section("In short", list(_in_short(result))),
        Section("Figures of arms", list(_figures(result))),
        Section("Lifts", list(_lifts(result))),
        Section("Routes", list(_routes(result))),
        Section("Day by day", list(_by_day(result))),
        Section("How to read this", [Text(text) for text in _how_to_read(result)]),
        Section("What produced it", list(_made(result))),
    ]
    return [section for section in made if section.blocks]


# -- the sections


def _in_short(result: Result) -> Iterator[Block]:
    plan, control = result["plan"], _control(result)
    yield Text(
        f"{many(plan['users'], 'user')} lived {many(plan['days'], 'day')} in each arm, after "
        f"{many(plan['platform']['warm_up'], 'day')} of warm-up. Arms differ in their routes, which bring "
        f"the candidates; the ranker behind them is the same. The control is {control}."
    )
    rows = [
        (name, [Cell(", ".join(arm["routes"]), prose=True), Cell(_about(result, name), prose=True)])
        for name, arm in result["arms"].items()
    ]
    yield Table("arm", [("routes", ""), ("", "")], rows)
    sentences = [_sentence(result, name) for name in result["arms"] if name != control]
    if sentences:
        yield Points(sentences)


def _about(result: Result, name: str) -> str:
    arm, control = result["arms"][name], result["arms"][_control(result)]
    said = [arm["about"]] if arm["about"] else []
    if arm["luck"] != control["luck"]:
        same = list(arm["routes"]) == list(control["routes"])
        said.append(
            "An A/A test: the control with another luck." if same else "Another luck than the control's."
        )
    return " ".join(said)


def _sentence(result: Result, name: str) -> str:
    """What an arm lifted, by how much, and what of it is more than chance."""
    rows = [row for figure in SAID if (row := _comparison(result, name, figure))]
    told = ", ".join(
        f"{label(row['figure'])} {percent(row['lift'])} ({_span(row)})".removesuffix(f" ({NONE})")
        for row in rows
    )
    sure = ", ".join(label(row["figure"]) for row in rows if _sure(row))
    verdict = f"More than chance: {sure}" if sure else "None of it is more than chance"
    against = next((row["against"] for row in rows), _control(result))
    return f"{name} against {against}: {told}. {verdict}."


def _figures(result: Result) -> Iterator[Block]:
    yield Text(
        f"Lifts are in percent of the control's figure. {STAR} marks what is more than chance. Small below: "
        "how far a figure might be off (±), and the 95% interval of a lift."
    )
    for names in page.handfuls(list(result["arms"]), BESIDE):
        head = [(name, what) for n, name in enumerate(names) for what in ("value", "lift")[: 1 + (n > 0)]]
        rows = []
        for figure, meaning in result["figures"].items():
            cells = [value_cell(result["arms"][names[0]]["figures"][figure])]
            for name in names[1:]:
                cells += [
                    value_cell(result["arms"][name]["figures"][figure]),
                    lift_cell(result, name, figure),
                ]
            rows.append((label(figure), [*cells, Cell(meaning, prose=True)]))
        yield Table("figure", [*head, ("", "")], rows)


def value_cell(of: Mapping[str, Any]) -> Cell:
    """A figure, and half of its interval."""
    low, high = of["interval"]
    if None in (of["value"], low, high):
        return Cell(digits(of["value"]))
    return Cell(digits(of["value"]), (f"±{digits((high - low) / 2, of['value'])}",))


def lift_cell(result: Result, name: str, figure: str) -> Cell:
    """How much more of a figure an arm has than the one it is compared with, and the interval."""
    row = _comparison(result, name, figure)
    if row is None:
        return Cell(NONE)
    small = _span(row)
    return Cell(percent(row["lift"]) + star(row), () if small == NONE else (small,), _sure(row))


def _lifts(result: Result) -> Iterator[Block]:
    panels: list[tuple[str, Callable[[str], str]]] = []
    for figure in FOREST:
        rows = [row for name in result["arms"] if (row := _comparison(result, name, figure))]
        drawn = [_in_percent(row) for row in rows if None not in (row["lift"], *row["interval"])]
        if drawn:
            panels.append((f"{label(figure)}, lift in %", partial(plots.differences, drawn)))
    if not result["comparisons"]:
        return
    yield Text("Lifts with 95% intervals. A filled circle is one that chance does not explain.")
    yield Plots(panels)
    heads = ("this", "control", "lift", "95%", "p", "p corrected", "")
    for name in result["arms"]:
        rows = [row for row in result["comparisons"] if row["arm"] == name]
        own = [_compared(row) for row in rows]
        if own:
            title = f"{name} against {rows[0]['against']}: all figures"
            yield Table("figure", [("", head) for head in heads], own, title, folded=True)


def _in_percent(row: Mapping[str, Any]) -> dict[str, Any]:
    found = "undecided" if not _sure(row) else "more" if row["lift"] > 0 else "less"
    drawn = {"difference": 100 * row["lift"], "interval": [100 * end for end in row["interval"]]}
    return {"arm": row["arm"], "against": row["against"], "found": found, **drawn}


def _compared(row: Mapping[str, Any]) -> tuple[str, list[Cell]]:
    texts = (
        digits(row["treatment"]),
        digits(row["control"]),
        percent(row["lift"]) + star(row),
        _span(row),
        page.probability(row["p"]),
        page.probability(row["p_holm"]),
    )
    verdict = "more than chance" if _sure(row) else "not told apart"
    return label(row["figure"]), [*map(Cell, texts), Cell(verdict, bold=_sure(row))]


def _routes(result: Result) -> Iterator[Block]:
    yield Text("What each route contributes to its arm. What several routes bring counts for each of them.")
    yield Points([f"{label(figure)}: {meaning}." for figure, meaning in result["of_route"].items()])
    for name, arm in result["arms"].items():
        rows = [
            (route, [value_cell(of[figure]) for figure in result["of_route"]])
            for route, of in arm["routes"].items()
        ]
        yield Table("route", [("", label(figure)) for figure in result["of_route"]], rows, name)


def _by_day(result: Result) -> Iterator[Block]:
    if result["plan"]["days"] < 2:
        return
    yield Text(
        "The same people come to every arm, so lines move together where the day does it. The axes do not "
        "begin at 0, and one day is little to tell arms apart by."
    )
    for names in page.handfuls(list(result["arms"])):
        panels: list[tuple[str, Callable[[str], str]]] = []
        for figure in BY_DAY:
            lines = [result["arms"][name]["by_day"][figure] for name in names]
            panels.append((f"{result['figures'][figure]}, by day", partial(plots.by_day, lines)))
        yield Plots(panels, legend=names)


def _how_to_read(result: Result) -> Iterator[str]:
    yield (
        "This is a simulated market. People's tastes, what they click and order, when they tire and leave: "
        "all follows from assumptions, which docs/market.md lists with their formulas. What is found holds "
        "in a world with these assumptions; whether it holds elsewhere only a test there can tell."
    )
    yield (
        "± is half of a 95% interval, by a bootstrap over users: how far a figure might be off had other "
        "users of this market come. A user-day is a user on a day on which he was shown something. The "
        "ranker learns from what all arms show, so an arm that finds something good also teaches the others."
    )
    tests = len(result["comparisons"])
    if not tests:
        return
    yield (
        "A lift is relative: +5% of a rate of .20 is .21. Every user lives in every arm, and his two lives "
        "are compared with each other; the interval is a bootstrap of users, each with both of his lives. p "
        "is the share of random exchanges of the two lives, user by user, that come out at least as far "
        f"apart. It is corrected, by Holm, for all {tests:,} comparisons, of all figures of all arms. "
        f"{STAR} stands where the corrected p is under {SURE:g}. “Not told apart” does not mean alike: the "
        "interval tells how large a lift there may still be. Intervals are not corrected, so one may leave "
        "out 0 where there is no star."
    )
    yield (
        "Luck decides how the dice of clicks, orders and reading on fall. With the same luck people react "
        "alike to the same page, so arms differ only by what they show. The control with another luck is an "
        "A/A test: the same people at the same times, with other dice. It should find nothing, and its lifts "
        "are what chance alone brings."
    )


def _made(result: Result) -> Iterator[Block]:
    made = result["made"]
    told, parts = planned(result["plan"])
    yield page.facts({"command": made["command"], "date": made["date"], **told, "store": made["store"]})
    yield page.facts({name: value or NONE for name, value in made["environment"].items()})
    for what, config in parts.items():
        yield page.code(f"Configuration of the {what}", config)
    for name, config in result["routes"].items():
        known = {key: value for key, value in config.items() if value}
        yield page.code(f"Configuration of route {name}", known)


def planned(plan: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """A plan in words, and the configurations of market, feed and platform, which are for folding."""
    parts = {what: plan[what] for what in ("market", "feed", "platform")}
    own = "as configured"
    bounds = {"retrain": "never", "minutes": own, "samples": own, "threads": "all processors"}
    told = {name: value or bounds.get(name, value) for name, value in plan.items() if name not in parts}
    return told, parts


# -- words and digits


def label(figure: str) -> str:
    """ "uv_ctr" is UV CTR, "exposed_share" is exposed share."""
    short = {"pv", "uv", "ctr", "cvr", "aer", "uer"}
    text = " ".join(word.upper() if word in short else word for word in figure.split("_"))
    return "CTR×CVR" if text == "CTR CVR" else text


def percent(value: float | None) -> str:
    """0.031 is "+3.1%"; what rounds to nothing has no sign."""
    if value is None:
        return NONE
    text = f"{abs(value):.1%}"
    return text if text == "0.0%" else f"{'+' if value > 0 else '−'}{text}"


def digits(value: float | None, like: float | None = None) -> str:
    """Three places, one from 10 on, four below .1, where rates of orders lie; or as many as `like` has."""
    if value is None:
        return NONE
    size = abs(value if like is None else like)
    places = 1 if size >= 10 else 4 if 0 < size < 0.1 else 3
    return f"{value:,.{places}f}".removeprefix("0")


def _span(row: Mapping[str, Any]) -> str:
    return NONE if row["lift"] is None else " to ".join(percent(end) for end in row["interval"])


def _sure(row: Mapping[str, Any]) -> bool:
    return row["p_holm"] is not None and row["p_holm"] < SURE


def star(row: Mapping[str, Any]) -> str:
    """Marks a comparison that is more than chance."""
    return STAR if _sure(row) else ""


def _control(result: Result) -> str:
    return next(iter(result["arms"]))


def _comparison(result: Result, name: str, figure: str) -> Mapping[str, Any] | None:
    rows = (row for row in result["comparisons"] if (row["arm"], row["figure"]) == (name, figure))
    return next(rows, None)
