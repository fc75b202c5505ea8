"""What does an experiment say, and on what grounds? Its result as `results.json`, `report.md`, `report.html`.

The sections are made once, from the dict of `experiment.run`, and written as Markdown and as a page.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

from longretriever.evaluate.report import SHORT
from longretriever.experiment import page, plots
from longretriever.experiment.page import (
    NONE,
    Block,
    Cell,
    Code,
    Plots,
    Points,
    Section,
    Table,
    Text,
    digits,
    facts,
    handfuls,
    many,
    probability,
)
from longretriever.experiment.runs import PARTS, SURE, exchanges, is_accuracy, main_metric

Result = Mapping[str, Any]
Part = tuple[str, str]


def write(result: Result, out: str | os.PathLike[str]) -> list[Path]:
    """Write the three files into the folder `out`, and return their paths.

    Raises `MissingExtra` as `page.write` does.
    """
    return page.write(out, result, title_of(result), sections(result))


def title_of(result: Result) -> str:
    return f"{many(len(result['arms']), 'system')} on a log of {result['data']['events']:,} events"


def sections(result: Result) -> list[Section]:
    """The whole report, in the order in which it is read; sections without content are left out."""
    all_of_it = [
        Section("In short", list(_in_short(result))),
        Section("Live: asked as it happened", list(_live(result))),
        Section("Batch: one list for all that follows", list(_batch(result))),
        Section("Differences", list(_differences(result))),
        Section("By length of history", list(_by_history(result))),
        Section("The reach of selection", list(_selection(result))),
        Section("Learning curves", list(curves(result))),
        Section("What it cost", list(cost(result))),
        Section("What failed", list(failed(result))),
        Section("How to read this", [Text(text) for text in _how_to_read(result)]),
        Section("What produced it", list(made(result))),
    ]
    return [section for section in all_of_it if section.blocks]


# -- the sections


def _in_short(result: Result) -> Iterator[Block]:
    data, plan, metric = result["data"], result["plan"], main_metric(result["plan"]["k"])
    yield Text(
        f"Learned from {data['train_events']:,} events of {data['users']:,} users with "
        f"{data['train_items']:,} items in {data['categories']:,} categories; asked about what came after. "
        f"Each learned system was trained with {many(len(plan['seeds']), 'seed')}, {bounds(plan)}."
    )
    if result["failed"]:
        yield Text(f"{many(len(result['failed']), 'run')} failed; the figures are without them. See below.")
    rows = [
        (name, [*(_figure(result, name, part, metric) for part in PARTS), Cell(arm["about"], prose=True)])
        for name, arm in result["arms"].items()
    ]
    yield Table("system", [*((_part(part), _label(metric)) for part in PARTS), ("", "")], rows)
    verdicts = [verdict for name in result["arms"] if (verdict := _verdict(result, name, metric))]
    if verdicts:
        yield Points(verdicts)


def _verdict(result: Result, name: str, metric: str) -> str:
    """One sentence: where one system finds more or less than the one it is compared with."""
    rows = [row for row in result["comparisons"] if (row["arm"], row["metric"]) == (name, metric)]
    if not rows:
        return ""
    words = {"more": "finds more in", "less": "finds less in", "undecided": "cannot be told apart in"}
    said = []
    for found, word in words.items():
        where = [r for r in rows if r["found"] == found]
        if where:
            named = (f"{_part((r['protocol'], r['part']))} ({signed(r['difference'])})" for r in where)
            said.append(f"{word} {', '.join(named)}")
    return f"{name} against {rows[0]['against']}, by {_label(metric)}: {'; '.join(said)}."


def _live(result: Result) -> Iterator[Block]:
    counts = result["data"]["live"]
    yield Text(
        f"{counts['requests']:,} requests, each just before an event; {counts['new_requests']:,} of them "
        "NEW: the item is one that the user had not met. Recall is how often it was among the first K."
    )
    yield _figures(result, "live", [name for name in _metrics(result, "live") if is_accuracy(name)])


def _batch(result: Result) -> Iterator[Block]:
    counts = result["data"]["batch"]
    yield Text(
        f"{counts['requests']:,} users, each asked once for all that follows, {counts['new_requests']:,} of "
        f"them with NEW items to find. Categories and coverage are of the first {SHORT} places: different "
        "categories in a list, and the share of all items that are in anyone's."
    )
    yield _figures(result, "batch", [name for name in _metrics(result, "batch") if name != "selection"])


def _differences(result: Result) -> Iterator[Block]:
    rows, metric = result["comparisons"], main_metric(result["plan"]["k"])
    if not rows:
        return
    yield Text(
        f"{_label(metric)} less that of the system compared with, on the same requests, with 95% intervals. "
        "A filled circle is a difference that chance does not explain."
    )
    panels: list[tuple[str, Callable[[str], str]]] = []
    for part in PARTS:
        chosen = [r for r in rows if (r["protocol"], r["part"], r["metric"]) == (*part, metric)]
        if chosen:
            panels.append((f"{_part(part)}, {_label(metric)}", partial(plots.differences, chosen)))
    yield Plots(panels)
    heads = ("this", "the other", "difference", "95%", "p", "p corrected", "seeds that agree", "")
    for name, arm in result["arms"].items():
        own = [_compared(result, row) for row in rows if row["arm"] == name]
        if own:
            title = f"{name} against {arm['against']}: all figures"
            yield Table("figure", [("", head) for head in heads], own, title, folded=True)


def _compared(result: Result, row: Mapping[str, Any]) -> tuple[str, list[Cell]]:
    protocol, part, metric, seeds = row["protocol"], row["part"], row["metric"], row["by_seed"]
    ours, theirs = (result["arms"][row[who]][protocol][part][metric] for who in ("arm", "against"))
    agree = sum(difference * row["difference"] > 0 for difference in seeds)
    texts = (
        digits(ours),
        digits(theirs),
        signed(row["difference"]),
        " to ".join(signed(end) for end in row["interval"]),
        probability(row["p"]),
        probability(row["p_holm"]),
        f"{agree} of {len(seeds)}" if len(seeds) > 1 else NONE,
    )
    said = {"more": "finds more", "less": "finds less", "undecided": "not told apart"}[row["found"]]
    verdict = Cell(said, bold=row["found"] != "undecided")
    return f"{_part((protocol, part))} {_label(metric)}", [*map(Cell, texts), verdict]


def _by_history(result: Result) -> Iterator[Block]:
    metric, arms = main_metric(result["plan"]["k"]), result["arms"]
    first = next(iter(arms.values()))
    spans = {part: {s: f["requests"] for s, f in _of(first, part)["by_history"].items()} for part in PARTS}
    found = {
        (name, part): {s: f[metric] for s, f in _of(arm, part)["by_history"].items()}
        for name, arm in arms.items()
        for part in PARTS
    }
    if all(len(of_part) < 2 for of_part in spans.values()):
        return
    yield Text(f"{_label(metric)} of requests by how many events the user had before them.")
    names = list(arms)
    for shown in handfuls(names):
        panels = []
        for part, of_part in spans.items():
            lines = [found[name, part] for name in shown]
            title = f"{_part(part)}, {_label(metric)} by history"
            panels.append((title, partial(plots.by_history, lines, list(of_part))))
        yield Plots(panels, legend=shown)
    columns = [(part, span) for part, of_part in spans.items() for span in of_part]
    head = [(_part(part), f"{span} ({spans[part][span]:,})") for part, span in columns]
    rows = [(name, [Cell(digits(found[name, part][span])) for part, span in columns]) for name in arms]
    yield Table("system", head, rows, "The same in figures, and the number of requests", folded=True)


def _selection(result: Result) -> Iterator[Block]:
    rows = [(name, [_figure(result, name, part, "selection") for part in PARTS]) for name in result["arms"]]
    rows = [(name, cells) for name, cells in rows if any(cell.text != NONE for cell in cells)]
    if rows:
        yield Text(
            "How often the category of what the user then met was among the contexts that were asked. What "
            "lies elsewhere only a search of all items can find. Systems that choose no contexts are not "
            "listed."
        )
        yield Table("system", [("", _part(part)) for part in PARTS], rows)


def curves(result: Result) -> Iterator[Block]:
    sharing: dict[str, list[str]] = {}  # arms of one configuration share their trainings
    of_key: dict[str, list[Any]] = {}
    for name, arm in result["arms"].items():
        of_seeds = [curve for one in arm["learning"] if (curve := one.get("training", {}).get("curve"))]
        if of_seeds:
            key = json.dumps(arm["learns"])
            sharing.setdefault(key, []).append(name)
            of_key[key] = of_seeds
    if not of_key:
        return
    yield Text(
        "How far below chance the loss was on the newest part of what is learned from, which was held out; a "
        "line for each seed. Compare shapes, not heights: what chance is differs from method to method."
    )
    yield Plots([(", ".join(sharing[key]), partial(plots.curves, of_key[key])) for key in of_key])


_COSTS: tuple[tuple[str, Callable[[Mapping[str, Any]], float | None], str], ...] = (
    ("training, s", lambda one: one.get("train_seconds"), ",.1f"),
    ("samples", lambda one: one.get("training", {}).get("samples"), ",.0f"),
    ("samples/s", lambda one: one.get("samples_per_second"), ",.0f"),
    ("peak memory, MB", lambda one: _mega(one.get("peak_memory_bytes")), ",.0f"),
    ("dense parameters", lambda one: one.get("parameters", {}).get("dense"), ",.0f"),
    ("item rows", lambda one: one.get("parameters", {}).get("item_rows"), ",.0f"),
    ("model and index, MB", lambda one: _mega(one.get("model_bytes")), ",.1f"),
)


def cost(result: Result) -> Iterator[Block]:
    yield Text(
        "Means over seeds. Each training ran alone, in a process of its own, whose peak memory is given, "
        "pages of the store among it. Milliseconds a request are of one thread that answers many at once."
    )
    arms, head = result["arms"], []
    cells: dict[str, list[Cell]] = {name: [] for name in arms}
    for label, read, form in _COSTS:
        found = {n: [v for one in arm["learning"] if (v := read(one)) is not None] for n, arm in arms.items()}
        if any(found.values()):
            head.append(("", label))
            for name, values in found.items():
                cells[name].append(Cell(format(sum(values) / len(values), form) if values else NONE))
    for name, arm in arms.items():
        ended = {why for one in arm["learning"] if (why := one.get("training", {}).get("ended"))}
        cells[name].append(Cell(f"{sum(arm['answer_ms']) / len(arm['answer_ms']):.2f}"))
        cells[name].append(Cell("; ".join(sorted(ended)) or NONE, prose=True))
    head += [("", "ms a request"), ("", "training ended because")]
    yield Table("system", head, list(cells.items()))


def failed(result: Result) -> Iterator[Block]:
    for one in result["failed"]:
        yield Text(f"{one['arm']}, seed {one['seed']}: {one['why']}")
        if one["told"] != one["why"]:
            yield Code("All that it said", one["told"])


def _how_to_read(result: Result) -> Iterator[str]:
    several, tests = len(result["plan"]["seeds"]) > 1, len(result["comparisons"])
    main = main_metric(result["plan"]["k"])
    of_main = sum(row["metric"] == main for row in result["comparisons"])
    yield (
        "ALL counts every item; NEW only items that the user had not met, and the lists leave out what he "
        "had. Where people repeat, repeats are easy: NEW tells what was learned. Bold is best in its column."
    )
    over_seeds = ", of values averaged over the seeds" if several else ""
    yield (
        f"± is half of a 95% interval, by a bootstrap over users{over_seeds}: how far a figure might be off "
        "had other users of the same kind been asked. "
    ) + (
        "“sd” is the standard deviation between trainings with different seeds."
        if several
        else "With one seed, nothing is known of how much another training of the same system would differ."
    )
    if tests:
        yield (
            "Two systems answered the same requests, so their difference is surer than their two intervals "
            f"suggest. p is the share of {exchanges(tests):,} random exchanges of the two, user by user, "
            "that come out as far apart. It is corrected, by Holm, for the number of comparisons: for the "
            f"{of_main:,} by {_label(main)}, which is the figure to draw conclusions from, and apart from "
            f"these for the {tests - of_main:,} by others. A system is said to find more or less where the "
            f"corrected p is under {SURE:g}. “Not told apart” does not mean alike: the interval tells how "
            "large a difference there may still be."
        )
    if tests and several:
        yield (
            "p is about users, given the trainings that were made. A difference on which the seeds do not "
            "agree may be the luck of a training: “seeds that agree” counts those whose own difference "
            "points the same way."
        )


def made(result: Result) -> Iterator[Block]:
    made, plan, data = result["made"], result["plan"], result["data"]
    known = {
        "command": made["command"],
        "date": made["date"],
        "seeds of trainings": ", ".join(map(str, plan["seeds"])),
        "bounds of a training": bounds(plan),
        "threads of a training": plan["threads"] or "all processors",
        "seed of requests": plan["request_seed"],
        "cut at T": f"{data['T']} ({datetime.fromtimestamp(data['T'], UTC):%Y-%m-%d %H:%M} UTC)",
        "store of the whole log": made["stores"]["full"],
        "store learned from": made["stores"]["train"],
    }
    yield facts(known)
    machines = made["environments"]
    if len(machines) > 1:
        yield Text(f"The runs were made in {len(machines)} environments: compare times with care.")
    names = dict.fromkeys(name for machine in machines for name in machine)
    rows = [(name, [said(machine.get(name) or NONE) for machine in machines]) for name in names]
    yield Table("", [("", "")] * len(machines), rows)
    for name, arm in result["arms"].items():
        what = {key: arm[key] for key in ("learns", "rival", "asked") if arm[key]}
        yield page.code(f"Configuration of {name}", what)


def said(value: Any) -> Cell:
    return Cell(str(value), prose=True)


# -- figures


def _figures(result: Result, protocol: str, metrics: Sequence[str]) -> Table:
    columns = [(part, metric) for part in PARTS if part[0] == protocol for metric in metrics]
    rows = [(name, [_figure(result, name, *column) for column in columns]) for name in result["arms"]]
    return Table("system", [(part[1].upper(), _label(metric)) for part, metric in columns], rows)


def _figure(result: Result, name: str, part: Part, metric: str) -> Cell:
    figures = _of(result["arms"][name], part)
    if figures.get(metric) is None:
        return Cell(NONE)
    low, high = figures["intervals"][metric]
    small = [f"±{digits((high - low) / 2)}"]
    if metric in figures["sd"]:
        small.append(f"sd {digits(figures['sd'][metric])}")
    text = digits(figures[metric])
    best = max(_of(arm, part).get(metric) or 0 for arm in result["arms"].values())
    is_best = is_accuracy(metric) and best > 0 and text == digits(best) and len(result["arms"]) > 1
    return Cell(text, tuple(small), is_best)


def _metrics(result: Result, protocol: str) -> list[str]:
    figures = next(iter(result["arms"].values()))[protocol]["all"]
    return [name for name in figures if name in figures["intervals"]]


def _of(arm: Mapping[str, Any], part: Part) -> Mapping[str, Any]:
    return arm[part[0]][part[1]]


# -- words and digits


def _part(part: Part) -> str:
    return f"{part[0]} {part[1].upper()}"


def _label(metric: str) -> str:
    if metric in (f"categories@{SHORT}", f"coverage@{SHORT}"):
        return metric.partition("@")[0]
    return metric.replace("recall@", "R@").replace("ndcg", "NDCG").replace("mrr", "MRR")


def signed(value: float) -> str:
    text = digits(abs(value))
    return text if text == digits(0) else f"{'+' if value > 0 else '−'}{text}"


def _mega(size: float | None) -> float | None:
    return None if size is None else size / 1e6


def bounds(plan: Mapping[str, Any]) -> str:
    given = []
    if plan["minutes"]:
        given.append(f"for at most {plan['minutes']:g} minutes")
    if plan["samples"]:
        given.append(f"from at most {plan['samples']:,} samples")
    return " and ".join(given) or "as long as its own configuration says"
