"""The report says what the result says: every figure of the JSON is in it, under its name."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path

import pytest

from longretriever.errors import MissingExtra
from longretriever.experiment import dossier, page
from longretriever.experiment.runs import PARTS
from tests.experiment.test_page import Page, check_it_loads_nothing

FIGURES = {
    "live": ["recall@10", "recall@50", "recall@200", "recall@500", "mrr"],
    "batch": [
        "recall@50",
        "recall@200",
        "recall@500",
        "ndcg@50",
        "hit@50",
        "categories@50",
        "coverage@50",
    ],
}


def figures(protocol: str, at: float, seeds: int, selection: bool = True) -> dict:
    """Figures like those of `experiment.run`, all different."""
    names = [*FIGURES[protocol], *(["selection"] if selection else [])]
    values = {name: round(at + 0.0137 * n, 6) for n, name in enumerate(names)}
    if "categories@50" in values:
        values["categories@50"] = round(12.5 + at, 6)
    spans = {"1-9": 0.1, "10-49": 0.2, "1000+": 0.3}
    return {
        **({} if selection else {"selection": None}),
        **values,
        "requests": 300,
        "users": 100,
        "intervals": {name: [value - 0.021, value + 0.021] for name, value in values.items()},
        "by_history": {s: {"recall@200": round(at + v, 6), "requests": 70} for s, v in spans.items()},
        "by_seed": {name: [value] * seeds for name, value in values.items()},
        "sd": dict.fromkeys(values, 0.0077) if seeds > 1 else {},
    }


def arm(at: float, seeds: list[int], against: str | None, rival: bool = False) -> dict:
    curve = [[30.0, 1000, 0.5], [60.0, 2000, 0.9]]
    training = {"samples": 2000, "curve": curve, "ended": "1 minutes are over"}
    learned = {
        "train_seconds": 61.2,
        "samples_per_second": 33.3,
        "training": training,
        "peak_memory_bytes": 512_000_000,
        "model_bytes": 7_000_000,
        "parameters": {"dense": 1234, "item_rows": 4321},
    }
    return {
        "about": f"About {at}.",
        "against": against,
        "learns": None if rival else {"is": "Config", "width": round(1000 * at)},
        "rival": "rivals.Recent" if rival else None,
        "asked": {} if rival else {"interests": {"is": "Top", "n": 20}},
        "seeds": seeds,
        "answer_ms": [1.5] * len(seeds),
        "learning": [{"train_seconds": 0.4} if rival else learned] * len(seeds),
        "live": {
            p: figures("live", at + n / 10, len(seeds), not rival) for n, p in enumerate(("all", "new"))
        },
        "batch": {
            p: figures("batch", at + n / 9, len(seeds), not rival) for n, p in enumerate(("all", "new"))
        },
    }


def comparison(
    arm: str, against: str, part: tuple[str, str], metric: str, difference: float, p: float
) -> dict:
    return {
        "arm": arm,
        "against": against,
        "protocol": part[0],
        "part": part[1],
        "metric": metric,
        "difference": difference,
        "interval": [difference - 0.01, difference + 0.012],
        "by_seed": [difference, -difference / 2, difference],
        "p": p,
        "p_holm": min(1, 2 * p),
        "found": "undecided" if 2 * p >= 0.05 else "more" if difference > 0 else "less",
    }


ODD = 'the <long> & "odd" | one*'


@pytest.fixture(scope="module")
def result() -> dict:
    counts = {"requests": 300, "new_requests": 120}
    differences = {
        ("live", "all"): (-0.031, 0.001),
        ("live", "new"): (0.042, 0.0002),
        ("batch", "all"): (0.001, 0.4),
    }
    return {
        "format": 1,
        "data": {
            "events": 12_345,
            "train_events": 11_000,
            "users": 500,
            "train_items": 900,
            "categories": 30,
            "T": 1_700_000_000,
            "live": counts,
            "batch": counts,
        },
        "plan": {
            "seeds": [1, 2, 3],
            "minutes": 5,
            "samples": None,
            "k": [50, 200, 500],
            "request_seed": 1,
            "threads": None,
        },
        "arms": {
            "first": arm(0.31, [1, 2, 3], None),
            ODD: arm(0.33, [1, 2, 3], "first"),
            "recent": arm(0.21, [1], "first", rival=True),
        },
        "comparisons": [
            *(comparison(ODD, "first", part, "recall@200", d, p) for part, (d, p) in differences.items()),
            comparison("recent", "first", ("live", "all"), "mrr", -0.2, 0.0001),
        ],
        "failed": [
            {"arm": "broken", "seed": 2, "why": "ValueError: no luck", "told": "ValueError\n  at line 1"}
        ],
        "made": {
            "command": "longretriever experiment ablations --events log.parquet",
            "date": "2026-01-02 03:04 UTC",
            "stores": {"full": "f" * 64, "train": "e" * 64},
            "environments": [
                {"longretriever": "1.2.3", "torch": "2.13.0", "platform": "Linux", "processors": 8}
            ],
        },
    }


@pytest.fixture(scope="module")
def found(result) -> Page:
    return Page(page.html(dossier.title_of(result), dossier.sections(result)))


def digits(value: float) -> str:
    return f"{value:.1f}" if value >= 10 else f"{value:.3f}".removeprefix("0")


@pytest.mark.parametrize("protocol", ["live", "batch"])
def test_every_figure_of_every_arm_is_in_its_row(result, found, protocol):
    section = {"live": "live-asked-as-it-happened", "batch": "batch-one-list-for-all-that-follows"}[protocol]
    for name, arm in result["arms"].items():
        expected = [digits(arm[protocol][p][metric]) for p in ("all", "new") for metric in FIGURES[protocol]]
        assert found.row(section, name) == expected
    for text in ("±.021", "sd .008"):
        assert text in found.text[section]


def test_the_summary_is_about_the_main_figure_of_every_arm(result, found):
    for name, arm in result["arms"].items():
        row = found.row("in-short", name)
        assert row == [*(digits(arm[a][b]["recall@200"]) for a, b in PARTS), arm["about"]]
    assert "11,000 events of 500 users with 900 items in 30 categories" in found.text["in-short"]
    assert "1 run failed" in found.text["in-short"]


def test_sentences_say_what_is_distinguishable(found):
    assert (
        f"{ODD} against first, by R@200: finds more in live NEW (+.042); finds less in live ALL (−.031); "
        "cannot be told apart in batch ALL (+.001)."
    ) in found.text["in-short"]


def test_comparisons_show_both_figures_and_how_sure_it_is(result, found):
    row = found.row("differences", "live NEW R@200")
    ours, theirs = (digits(result["arms"][name]["live"]["new"]["recall@200"]) for name in (ODD, "first"))
    assert row == [ours, theirs, "+.042", "+.032 to +.054", "< .001", "< .001", "2 of 3", "finds more"]
    assert found.row("differences", "batch ALL R@200")[4:] == [".400", ".800", "2 of 3", "not told apart"]


def test_histories_selection_costs_and_failures_are_there(result, found):
    for name, arm in result["arms"].items():
        expected = [digits(s["recall@200"]) for a, b in PARTS for s in arm[a][b]["by_history"].values()]
        assert found.row("by-length-of-history", name) == expected
    chose = {row[0] for row in found.rows["the-reach-of-selection"]}
    assert chose == {"system", "first", ODD}, "a rival that chooses no contexts is not listed"
    cost = dict(zip(found.rows["what-it-cost"][0], found.row("what-it-cost", "first"), strict=False))
    assert found.rows["what-it-cost"][0][1:] == [
        "training, s",
        "samples",
        "samples/s",
        "peak memory, MB",
        "dense parameters",
        "item rows",
        "model and index, MB",
        "ms a request",
        "training ended because",
    ], cost
    assert found.row("what-it-cost", "first") == [
        "61.2",
        "2,000",
        "33",
        "512",
        "1,234",
        "4,321",
        "7.0",
        "1.50",
        "1 minutes are over",
    ]
    assert found.row("what-it-cost", "recent") == ["0.4", "–", "–", "–", "–", "–", "–", "1.50", "–"]
    assert "broken, seed 2: ValueError: no luck" in found.text["what-failed"]
    assert "  at line 1" in found.text["what-failed"]


def test_all_that_produced_it_is_named(result, found):
    text = found.text["what-produced-it"]
    made = result["made"]
    for said in (
        made["command"],
        made["date"],
        "f" * 64,
        "e" * 64,
        "2.13.0",
        "1.2.3",
        "1, 2, 3",
        "2023-11-14",
    ):
        assert said in text
    for arm in result["arms"].values():
        for what in ("learns", "asked", "rival"):
            if arm[what]:
                assert json.dumps(arm[what], indent=1)[1:-1].strip() in re.sub(r"\n ", "\n", text)


def test_three_files_that_say_the_same(result, tmp_path):
    files = dossier.write(result, tmp_path / "report")
    assert [file.name for file in files] == ["results.json", "report.md", "report.html"]
    assert json.loads(files[0].read_text()) == result
    check_it_loads_nothing(files[2].read_text())
    markdown = files[1].read_text()
    for arm in result["arms"].values():
        for a, b in PARTS:
            for metric in FIGURES[a]:
                assert digits(arm[a][b][metric]) in markdown
    dossier.write(result, tmp_path / "report")
    assert len(list((tmp_path / "report").iterdir())) == 3


def test_without_the_packages_for_the_page_the_other_files_are_written(result, tmp_path, monkeypatch):
    monkeypatch.setattr(page, "find_spec", lambda name: None)
    with pytest.raises(MissingExtra, match="jinja2 and matplotlib"):
        dossier.write(result, tmp_path)
    assert {file.name for file in tmp_path.iterdir()} == {"results.json", "report.md"}


def test_the_best_of_a_column_is_bold_and_so_is_what_looks_the_same(result):
    result = copy.deepcopy(result)
    result["arms"]["recent"]["live"]["all"]["recall@10"] = (
        result["arms"][ODD]["live"]["all"]["recall@10"] - 1e-6
    )
    (table,) = [b for b in dossier.sections(result)[1].blocks if b.kind == "table"]
    assert [row[1][0].bold for row in table.rows] == [False, True, True]
    (made_of,) = [b for b in dossier.sections(result)[2].blocks if b.kind == "table"]
    categories = [label for _, label in made_of.head].index("categories")
    assert not any(row[1][categories].bold for row in made_of.rows), "more is not better"


def test_one_arm_one_seed_and_nothing_else_still_make_a_report(result):
    small = copy.deepcopy(result)
    small["arms"] = {"first": arm(0.3, [1], None, rival=True)}
    small.update(comparisons=[], failed=[], plan={**small["plan"], "seeds": [1], "minutes": None})
    for part in ("all", "new"):
        small["arms"]["first"]["live"][part]["by_history"].popitem()
    small["made"]["command"] = ""
    found = Page(page.html(dossier.title_of(small), dossier.sections(small)))
    sections = [value for tag, name, value in found.attributes if (tag, name) == ("section", "id")]
    absent = {"differences", "the-reach-of-selection", "learning-curves", "what-failed"}
    assert not absent & set(sections)
    assert "trained with 1 seed, as long as its own configuration says" in found.text["in-short"]
    assert "With one seed, nothing is known" in found.text["how-to-read-this"]
    assert "sd" not in found.text["live-asked-as-it-happened"]
    assert "command" not in found.text["what-produced-it"]


def test_a_part_without_requests_is_dashes(result):
    small = copy.deepcopy(result)
    for one in small["arms"].values():
        new = one["live"]["new"]
        new |= dict.fromkeys([*FIGURES["live"], "selection"]) | {
            "by_history": {},
            "by_seed": {},
            "sd": {},
            "requests": 0,
        }
        new["intervals"] = {name: [None, None] for name in new["intervals"]}
    found = Page(page.html(dossier.title_of(small), dossier.sections(small)))
    assert found.row("live-asked-as-it-happened", "first")[5:] == ["–"] * 5


def test_many_systems_are_shown_a_handful_at_a_time_beside_the_first(result):
    many = copy.deepcopy(result)
    many["arms"] = {f"s{n}": arm(0.3 + n / 100, [1], None) for n in range(20)}
    legends = [block.legend for block in dossier._by_history(many) if block.kind == "plots"]
    assert [legend[0] for legend in legends] == ["s0"] * 3
    assert [name for legend in legends for name in legend[1:]] == [f"s{n}" for n in range(1, 20)]
    assert max(map(len, legends)) <= 8


def test_the_page_about_it_names_every_section(result):
    docs = (Path(__file__).parents[2] / "docs/experiment.md").read_text()
    for section in dossier.sections(result):
        assert f"**{section.title}**" in docs
