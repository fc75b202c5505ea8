"""What is inside a range, what moves a figure, what the report says; which names and folders cannot be."""

from __future__ import annotations

import dataclasses
import io
import json
from functools import cache
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from rich.console import Console

from longretriever.errors import EventsError, InputError, NotSaved
from longretriever.evaluate import describe as described
from longretriever.evaluate.taste import taste
from longretriever.experiment.figures import JUDGED, MOVES, SIZES
from longretriever.experiment.likeness import compare, in_short, left_out, likeness, table, write
from longretriever.market import Market, MarketConfig
from tests.test_cli import run
from tests.worlds import parity_log, random_log, stored

ROOT = Path(__file__).parents[2]
NAMES = [figure.name for group in JUDGED.values() for figure in group]


# -- comparing


def one(low: float | None, high: float | None, ours: float | None, name="stay") -> dict:
    logs = [dict.fromkeys(NAMES, 1.0) | {name: value} for value in (low, high)]
    rows = compare({"a": logs[0], "b": logs[1]}, dict.fromkeys(NAMES, 1.0) | {name: ours})
    return next(row for row in rows if row["figure"] == name)


@pytest.mark.parametrize(
    ("low", "high", "ours", "found", "factor"),
    [
        (0.2, 0.4, 0.2, "inside", 1),
        (0.4, 0.2, 0.3, "inside", 1),
        (0.2, 0.4, 0.45, "near", 1.125),
        (0.2, 0.4, 0.17, "near", 0.85),
        (0.2, 0.4, 0.8, "outside", 2),
        (0.2, 0.4, 0.1, "outside", 0.5),
        (-0.3, 0.0, 0.1, "outside", None),
        (-0.3, -0.2, -0.4, "outside", None),
        (0.0, 0.4, 0.0, "inside", 1),
        (None, 0.4, 0.45, "near", 1.125),
        (None, None, 0.5, None, None),
        (0.2, 0.4, None, None, None),
    ],
)
def test_where_a_figure_lies(low, high, ours, found, factor):
    row = one(low, high, ours)
    assert row["found"] == found
    assert row["factor"] == (None if factor is None else pytest.approx(factor))


def test_what_to_turn():
    assert one(0.2, 0.4, 0.8)["turn"] == {"stay": "lower", "session_events": "lower"}
    assert one(0.2, 0.4, 0.1)["turn"] == {"stay": "raise", "session_events": "raise"}
    assert one(0.2, 0.4, 0.3)["turn"] == {}
    assert one(100, 200, 10, "burstiness")["turn"] == {"gap_tail": "lower", "session_events": "raise"}
    assert one(0.2, 0.4, 0.1, "same_second")["turn"] == {}


def test_each_log_is_held_against_the_others():
    real = {name: dict.fromkeys(NAMES, value) for name, value in {"a": 1.0, "b": 1.1, "c": 9.0}.items()}
    found = left_out(real, dict.fromkeys(NAMES, 2.0))
    n = len(NAMES)
    assert found["a"] == {
        "itself": {"inside": 0, "near": n, "outside": 0},
        "generated": {"inside": n, "near": 0, "outside": 0},
    }
    assert found["c"] == {
        "itself": {"inside": 0, "near": 0, "outside": n},
        "generated": {"inside": 0, "near": 0, "outside": n},
    }
    assert left_out({name: real[name] for name in "ab"}, real["c"]) == {}


# -- what moves what

TURNS = {
    "users": (50, 200),
    "items": (200, 1600),
    "categories": (8, 60),
    "days": (90, 700),
    "least": (5, 30),
    "most": (400, 3000),
    "category_tail": (0.1, 1.5),
    "category_spread": (0.2, 1.8),
    "style_spread": (0.1, 2),
    "popularity_tail": (0.1, 0.85),
    "sharpness": (0.2, 3),
    "common": (0, 0.95),
    "persona_interest": (0.3, 3.5),
    "fewest_interests": (1, 15),
    "curiosity": (0.0, 0.5),
    "session_events": (2, 20),
    "stay": (0.2, 0.98),
    "gap_seconds": (10, 200),
    "gap_tail": (0.7, 3),
    "repeat": (0.0, 0.7),
}
"""A low and a high value of a parameter; the other ones are those of 10,000 events."""


@cache
def figures_of(parameter: str, value: float, folder: Path) -> described.Figures:
    market = Market(MarketConfig.of_size(10_000, seed=4, **{"moving": 0.05, parameter: value}))
    log = market.log(0, market.config.users)
    events = pa.table(
        {"user_id": log.user, "item_id": log.item, "category_id": log.category, "timestamp": log.time}
    )
    store = stored(events, folder / "store", threads=1)
    lives, rng = described.lives_of(store), np.random.default_rng(1)
    found = {**described.activity(store), **described.categories(store), **described.repeats(lives)}
    found |= {**described.next_category(store, lives, rng), **described.rhythm(lives)}
    if parameter in ("sharpness", "common"):  # the slowest
        found |= taste(lives.user, lives.item, store.item_category, rng)
    return found


@pytest.mark.parametrize("parameter", TURNS)
def test_a_parameter_moves_its_figures_as_is_said(parameter, tmp_path):
    low, high = (figures_of(parameter, value, tmp_path) for value in TURNS[parameter])
    moved = {name: turns[parameter] for name, turns in MOVES.items() if parameter in turns}
    assert moved
    for name, way in moved.items():
        assert (high[name] - low[name]) * way > 0, f"{name}: {low[name]} to {high[name]}"


def test_what_is_said_to_move_is_a_parameter_and_a_figure():
    fields = {field.name for field in dataclasses.fields(MarketConfig)}
    assert set(MOVES) == set(NAMES) - {"same_second"}
    assert {parameter for turns in MOVES.values() for parameter in turns} == set(TURNS)
    assert set(TURNS) <= fields


# -- from logs to a report


@pytest.fixture
def few_draws(monkeypatch) -> None:
    """Taste is the slowest to find, and elsewhere found."""
    monkeypatch.setattr("longretriever.evaluate.taste._DRAWS", 500)


@pytest.fixture(scope="module")
def result() -> dict:
    logs = {"a": parity_log(), "b <i>|": random_log(1), "c": random_log(2, users=4)}
    items = {"c": pa.table({"item_id": range(20), "category_id": [n % 3 for n in range(20)]})}
    logs["c"] = logs["c"].drop_columns(["category_id"])
    said: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("longretriever.evaluate.taste._DRAWS", 500)
        found = likeness(logs, items=items, said=said.append, reading={"threads": 1})
    assert said == ["a: reading", "b <i>|: reading", "c: reading", "generated: drawing 1,000 events"]
    return found


def test_all_logs_have_all_figures(result):
    for log in [*result["logs"].values(), result["generated"]]:
        assert list(log["figures"]) == [figure.name for figure in SIZES] + NAMES
    assert result["generated"]["config"]["events"] == 1000
    assert result["logs"]["c"]["figures"]["categories"] == 3
    assert sum(result["summary"].values()) == len(NAMES)
    assert list(result["left_out"]) == ["a", "b <i>|", "c"]


def test_the_report_is_written(result, tmp_path):
    data, text, page = (file.read_text() for file in write(result, tmp_path / "out"))
    assert json.loads(data) == json.loads(json.dumps(result))
    for row in result["compared"]:
        assert not row["turn"] or f"{next(iter(row['turn'].values()))} " in text
    assert "b \\<i>\\|" in text
    assert in_short(result) in text
    assert page.count("<svg") == 3
    assert "http" not in page.replace("http://www.w3.org", "")
    assert "<i>" not in page


def test_it_can_be_printed(result):
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(table(result))
    shown = console.export_text()
    assert "b <i>|" in shown
    for figure in (figure for group in JUDGED.values() for figure in group):
        assert f"  {figure.label} " in shown


@pytest.mark.usefixtures("few_draws")
def test_the_same_log_is_inside_its_own_range(tmp_path):
    market = tmp_path / "market"
    Market(MarketConfig.of_size(2000, seed=2)).write(market)
    found = likeness({"it": market / "events.parquet"}, market=market, work=tmp_path / "work")
    assert found["summary"] == {"inside": len(NAMES), "near": 0, "outside": 0}
    assert found["generated"]["config"]["seed"] == 2
    assert {"it", "generated"} <= {path.name for path in (tmp_path / "work").iterdir()}
    assert found["left_out"] == {}


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"logs": {}}, InputError, "no real log is given, expected at least one"),
        (
            {"logs": {"generated": "x"}},
            InputError,
            "named 'generated', which is taken or no name of a folder",
        ),
        ({"logs": {"../a": "x"}}, InputError, "named '../a', which is taken .* Choose another name"),
        ({"items": {"b": "x"}}, InputError, "items for 'b', but the logs are a. Name one of these"),
        ({"events": 5, "market": "m"}, InputError, "m is a log of its own size: leave 5 events out"),
        ({"market": "nowhere"}, NotSaved, "nowhere is not a market. Make one with `longretriever generate`"),
        ({"logs": {"a": "nowhere.csv"}}, EventsError, "nowhere.csv"),
    ],
)
def test_what_cannot_be_compared(arguments, error, message):
    with pytest.raises(error, match=message):
        likeness(**{"logs": {"a": "nowhere.csv"}, **arguments})


# -- the command


@pytest.mark.usefixtures("few_draws")
def test_the_command(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pq.write_table(parity_log(), "shop.parquet")
    words = ("experiment", "likeness", "--log", "shop=shop.parquet", "--out", "report", "--events", 2000)
    Market(MarketConfig.of_size(1000, seed=5)).write("market")
    said = run(*words, "--threads", 1)
    assert said.code == 0, said.err
    assert "report/report.html" in said.out
    assert "to an item met earlier" in said.out
    assert "Of 39 figures of the generated log, " in said.out
    assert "generated: drawing 2,000 events" in said.err
    words = (*words[:-2], "--market", "market", "--seed", 3, "--json")
    found = run(*words).json
    assert found["summary"] == json.loads(Path("report/results.json").read_text())["summary"]
    assert found["generated"]["config"]["seed"] == 5
    assert "--seed 3" in found["made"]["command"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--log", "shop"], "--log shop: expected a name and a file, such as --log shop=events.parquet"),
        (["--log", "=x"], "--log =x: expected a name and a file"),
        (["--log", "a=x", "--log", "a=y"], "--log a=y: a is x already. Choose another name"),
        (["--log", "a=x", "--items", "b=y"], "items for 'b', but the logs are a"),
        (["--log", "a=nowhere.csv"], "nowhere.csv"),
    ],
    ids=" ".join,
)
def test_errors_of_the_command(words, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert message in run("experiment", "likeness", *words, "--out", "report").error
    assert not Path("report").exists()


def test_every_figure_is_defined_on_its_page():
    page = " ".join((ROOT / "docs" / "experiment.md").read_text().split())
    for figure in SIZES:
        assert figure.label in page
    for title, figures in JUDGED.items():
        assert title in page
        for figure in figures:
            assert f"| {figure.label} |" in page, figure.label
