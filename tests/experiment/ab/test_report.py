"""The report of an A/B test says what its result says, with a star where chance does not explain it."""

from __future__ import annotations

import copy
import json
import re
from xml.etree import ElementTree

import pytest
from rich.console import Console

from longretriever.errors import MissingExtra
from longretriever.experiment import page, plots
from longretriever.experiment.ab import online, report, terminal
from tests.experiment.test_page import Page, check_it_loads_nothing

NAN = float("nan")
ODD = "[b]<i> & *x*"
FIGURES, OF_ROUTE = list(online.FIGURES), list(online.OF_ROUTE)


def of(names: list[str], at: float) -> dict:
    """Figures like those of `online.summary`, all different."""
    found = {}
    for n, name in enumerate(names):
        value = at + 0.0137 * n
        found[name] = {"value": value, "interval": [value - 0.004, value + 0.006]}
    return found


def arm(at: float, routes: list[str], about: str = "", luck: int = 0) -> dict:
    return {
        "about": about,
        "luck": luck,
        "figures": of(FIGURES, at),
        "routes": {name: of(OF_ROUTE, at / 10 + n / 5) for n, name in enumerate(routes)},
        "by_day": {name: [at, at + n / 100, at + 0.2] for n, name in enumerate(FIGURES)},
    }


def comparison(name: str, figure: str, lift: float, p_holm: float) -> dict:
    return {
        "arm": name,
        "against": "control",
        "figure": figure,
        "treatment": 0.2 * (1 + lift),
        "control": 0.2,
        "lift": lift,
        "interval": [lift - 0.011, lift + 0.023],
        "p": p_holm / 9,
        "p_holm": p_holm,
        "found": "undecided" if p_holm >= 0.05 else "more" if lift > 0 else "less",
    }


LIFTS = {
    "pv": (0.002, 0.9),
    "uv_ctr": (0.0312, 0.0004),
    "uv_cvr": (-0.051, 0.049),
    "orders": (0.1234, 0.05),
    "clicks": (0.0, 1.0),
    "ctr": (-0.00004, 1.0),
    "cvr": (NAN, NAN),
    "exposed_categories": (1.5, 0.001),
    "clicked_categories": (-0.2, 0.0001),
}
SHOWN = ["+0.2%", "+3.1%*", "−5.1%*", "+12.3%", "0.0%", "0.0%", "–", "+150.0%*", "−20.0%*"]


@pytest.fixture(scope="module")
def result() -> dict:
    arms = {
        "control": arm(0.31, ["popular", "MIND"], "As it is."),
        ODD: arm(0.33, ["popular", ODD]),
        "again": arm(0.3, ["popular", "MIND"], luck=1),
    }
    arms["control"]["figures"]["pv"] = {"value": 71.234, "interval": [70.0, 73.0]}
    arms["control"]["figures"]["ctr"] = {"value": 0.06413, "interval": [0.0621, 0.0665]}
    arms[ODD]["figures"]["cvr"] = {"value": NAN, "interval": [NAN, NAN]}
    arms[ODD]["routes"]["popular"]["cvr"] = {"value": NAN, "interval": [NAN, NAN]}
    arms[ODD]["by_day"]["ctr"][1] = NAN
    return {
        "format": 1,
        "plan": {
            "feed": {"slots": 11},
            "platform": {"warm_up": 2, "explore": 0.05},
            "users": 1234,
            "days": 3,
            "retrain": 0,
            "minutes": None,
            "samples": 4321,
            "seed": 7,
            "threads": None,
            "market": {"events": 55_555, "sharpness": 1.8},
        },
        "figures": online.FIGURES,
        "of_route": online.OF_ROUTE,
        "arms": arms,
        "comparisons": [
            *(comparison(ODD, name, *sure) for name, sure in LIFTS.items()),
            *(comparison("again", name, 0.01, 1.0) for name in FIGURES),
        ],
        "routes": {
            "popular": {"counted": "routes.Popular", "asked": {}, "k": 77},
            "MIND": {
                "learns": {"is": "MindConfig", "dim": 24, "within": {"is": "Other", "width": 3}},
                "k": 50,
            },
            ODD: {"learns": {"is": "Config", "power": "inf"}, "asked": {"interests": {"is": "Top", "n": 20}}},
        },
        "made": {
            "command": "longretriever experiment ab --days 3",
            "date": "2026-01-02 03:04 UTC",
            "store": "f" * 64,
            "environment": {"longretriever": "1.2.3", "torch": None, "processors": 8},
        },
    }


@pytest.fixture(scope="module")
def html(result) -> str:
    result = report.strict(result)
    return page.html(report.title_of(result), report.sections(result))


@pytest.fixture(scope="module")
def found(html) -> Page:
    return Page(html)


def test_every_figure_of_every_arm_is_in_its_row_with_its_lift(result, found):
    control = ["71.2", ".324", ".337", ".351", ".365", ".0641", ".392", ".406", ".420"]
    ours = [".330", ".344", ".357", ".371", ".385", ".399", "–", ".426", ".440"]
    again = [".300", ".314", ".327", ".341", ".355", ".368", ".382", ".396", ".410"]
    for n, (name, meaning) in enumerate(online.FIGURES.items()):
        row = found.row("figures-of-arms", report.label(name))
        assert row == [control[n], ours[n], SHOWN[n], again[n], "+1.0%", meaning]
    assert found.rows["figures-of-arms"][:2] == [
        ["", "control", ODD, "again", ""],
        ["figure", "value", "value", "lift", "value", "lift", ""],
    ]
    for small in ("±1.5", "±.005", "±.0022", "+2.0% to +5.4%", "−6.2% to −2.8%"):
        assert small in found.text["figures-of-arms"]


def test_stars_are_where_the_corrected_p_is_small_and_nowhere_else(result):
    starred = {
        (row["arm"], row["figure"])
        for row in result["comparisons"]
        if report.lift_cell(report.strict(result), row["arm"], row["figure"]).text.endswith("*")
    }
    assert starred == {
        (ODD, name) for name in ("uv_ctr", "uv_cvr", "exposed_categories", "clicked_categories")
    }


def test_a_sentence_for_each_arm_says_what_is_more_than_chance(found):
    text = found.text["in-short"]
    assert (
        f"{ODD} against control: UV CTR +3.1% (+2.0% to +5.4%), UV CVR −5.1% (−6.2% to −2.8%), "
        "orders +12.3% (+11.2% to +14.6%). More than chance: UV CTR, UV CVR."
    ) in text
    assert "orders +1.0% (−0.1% to +3.3%). None of it is more than chance." in text
    assert "1,234 users lived 3 days in each arm, after 2 days of warm-up." in text
    assert found.row("in-short", "control") == ["popular, MIND", "As it is."]
    assert found.row("in-short", "again")[1] == "An A/A test: the control with another luck."
    assert found.row("in-short", ODD)[1] == ""


def test_every_figure_of_every_route_is_in_the_table_of_its_arm(result, found):
    rows = found.rows["routes"]
    heads = [n for n, row in enumerate(rows) if row[0] == "route"]
    assert rows[heads[0]] == ["route", "AER", "UER", "CTR", "CVR", "CTR×CVR", "unique share", "exposed share"]
    for head, (name, arm) in zip(heads, result["arms"].items(), strict=True):
        assert name in found.text["routes"]
        for n, (route, figures) in enumerate(arm["routes"].items(), 1):
            values = [figures[figure]["value"] for figure in OF_ROUTE]
            expected = [f"{v:.{4 if v < 0.1 else 3}f}"[1:] if v == v else "–" for v in values]
            assert rows[head + n] == [route, *expected]
    for name, meaning in online.OF_ROUTE.items():
        assert f"{report.label(name)}: {meaning}." in found.text["routes"]


def test_all_comparisons_are_listed_with_how_sure_they_are(found):
    row = found.row("lifts", "UV CTR")
    assert row == [".206", ".200", "+3.1%*", "+2.0% to +5.4%", "< .001", "< .001", "more than chance"]
    assert found.row("lifts", "orders")[4:] == [".006", ".050", "not told apart"]
    assert found.row("lifts", "CVR") == ["–", ".200", "–", "–", "–", "–", "not told apart"]


def pictures(html: str, section: str) -> dict[str, list[str]]:
    within = re.search(rf'<section id="{section}">.*?</section>', html, re.DOTALL)
    found = {}
    for svg in re.findall(r"<svg.*?</svg>", within[0] if within else "", re.DOTALL):
        root = ElementTree.fromstring(svg)
        found[root.get("aria-label")] = [e.text for e in root.iter("text")]
    return found


def test_lifts_are_drawn_for_the_figures_of_the_papers(result, html):
    drawn = pictures(html, "lifts")
    named = ["PV", "UV CTR", "UV CVR", "orders", "exposed categories", "clicked categories"]
    assert list(drawn) == [f"{name}, lift in %" for name in named]
    assert all({ODD, "again"} <= set(text) for text in drawn.values())
    row = report._in_percent(comparison(ODD, "orders", -0.1, 0.01))
    assert row["difference"] == pytest.approx(-10)
    assert row["interval"] == pytest.approx([-11.1, -7.7])
    assert row["found"] == "less"


def test_what_cannot_be_divided_is_not_drawn(result):
    none = report.strict({**result, "comparisons": [comparison(ODD, "orders", NAN, 0.01)]})
    (lifts,) = [section for section in report.sections(none) if section.title == "Lifts"]
    assert [block.panels for block in lifts.blocks if block.kind == "plots"] == [[]]


def test_days_are_drawn_and_a_day_without_a_value_is_left_out(html):
    drawn = pictures(html, "day-by-day")
    assert list(drawn) == [
        "clicks per user, by day",
        "orders per user, by day",
        "clicks per impression, by day",
    ]
    assert {"1", "2", "3", "day of the test"} <= set(drawn["clicks per user, by day"])
    whole, svg = (plots.by_day([[0.1, middle, 0.3], [0.2, 0.2, 0.2]], "t") for middle in (0.2, None))
    assert whole.count("<use") == svg.count("<use") + 1, "a marker less"
    assert "var(--c1)" in svg
    assert "nan" not in svg


def test_all_that_produced_it_is_named(result, found):
    text = found.text["what-produced-it"]
    for said in ("longretriever experiment ab --days 3", "2026-01-02 03:04 UTC", "f" * 64, "1.2.3"):
        assert said in text
    assert found.row("what-produced-it", "samples") == ["4321"]
    assert found.row("what-produced-it", "minutes") == ["as configured"]
    assert found.row("what-produced-it", "retrain") == ["never"]
    assert found.row("what-produced-it", "torch") == ["–"]
    for config in (
        *(result["plan"][what] for what in ("market", "feed", "platform")),
        result["routes"][ODD]["asked"],
    ):
        assert json.dumps(config, indent=1)[1:-1].strip().splitlines()[0] in text
    assert '"width": 3' in text
    assert "routes.Popular" in text
    assert '"k": 77' in text


def test_how_to_read_it_names_the_assumptions_and_the_number_of_tests(found):
    text = found.text["how-to-read-this"]
    for said in ("docs/market.md", "all 18 comparisons", "Holm", "A/A test", "simulated market"):
        assert said in text


def test_three_files_that_say_the_same(result, tmp_path, html):
    files = report.write(result, tmp_path / "report")
    assert [file.name for file in files] == ["results.json", "report.md", "report.html"]

    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is not JSON")

    told = json.loads(files[0].read_text(), parse_constant=refuse)
    assert told == report.strict(result)
    assert told["arms"][ODD]["figures"]["cvr"] == {"value": None, "interval": [None, None]}
    assert told["routes"][ODD]["learns"]["power"] == "inf"
    text = files[2].read_text()
    assert text == html
    check_it_loads_nothing(text)
    assert not re.search(r"https?://", text)
    markdown = files[1].read_text()
    assert "NaN" not in text + markdown
    for shown in SHOWN:
        assert shown.replace("*", r"\*") in markdown
    again = report.write(told, tmp_path / "again")
    assert [file.read_bytes() for file in again] == [file.read_bytes() for file in files]


def test_without_the_packages_for_the_page_the_other_files_are_written(result, tmp_path, monkeypatch):
    monkeypatch.setattr(page, "find_spec", lambda name: None)
    with pytest.raises(MissingExtra, match="jinja2 and matplotlib"):
        report.write(result, tmp_path)
    assert {file.name for file in tmp_path.iterdir()} == {"results.json", "report.md"}


def test_one_arm_and_one_day_still_make_a_report(result):
    small = copy.deepcopy(result)
    small["arms"] = {"control": small["arms"]["control"]}
    small["comparisons"], small["plan"]["days"], small["made"]["command"] = [], 1, ""
    small = report.strict(small)
    found = Page(page.html(report.title_of(small), report.sections(small)))
    ids = {value for tag, name, value in found.attributes if (tag, name) == ("section", "id")}
    assert not {"lifts", "day-by-day"} & ids
    assert "against" not in found.text["in-short"]
    assert found.row("figures-of-arms", "orders") == [".351", "orders per user"]
    assert "Holm" not in found.text["how-to-read-this"]
    assert "Holm" not in printed(small)


def printed(result: dict, width: int = 100) -> str:
    console = Console(width=width, no_color=True)
    with console.capture() as shown:
        for table in terminal.tables(result):
            console.print(table)
    return shown.get()


def test_the_terminal_shows_the_same_figures_in_columns(result):
    lines = printed(result).splitlines()
    assert sum(line.startswith("A/B test of 3 arms") for line in lines) == 1
    rows = [re.split(r"\s{2,}", line.strip()) for line in lines]
    for figure, lift in zip(FIGURES, SHOWN, strict=True):
        row = next(row for row in rows if row[0] == report.label(figure))
        assert row[2:] == [lift, "+1.0%"]
    assert next(row for row in rows if row[0] == "CTR")[1] == ".0641"
    assert ["±.0022", "−1.1 to +2.3", "−0.1 to +3.3"] in rows
    assert sum(line.startswith("Routes of ") for line in lines) == 3
    assert f"Routes of {ODD}" in "\n".join(lines), "no markup is seen in a name"
    assert ["popular", ".0330", ".0467", ".0604", "–", ".0878", ".102", ".115"] in rows
    ends = {line.index("%") for line in lines if re.match(r"(UV CTR|UV CVR|orders|PV) ", line)}
    assert len(ends) == 1, "digits are below digits, with a star or without"


def test_many_arms_are_shown_a_few_at_a_time_beside_the_control(result):
    many = copy.deepcopy(result)
    names = ["a name that is far too long for a column of a terminal", *(f"arm{n}" for n in range(5))]
    many["arms"] = dict.fromkeys(("control", *names), many["arms"][ODD])
    many["comparisons"] = [comparison(name, f, -0.999, 0.01) for name in names for f in FIGURES]
    told = printed(many)
    assert told.count("A/B test of 7 arms") == 2
    assert max(map(len, told.splitlines())) <= 100
    assert "…" not in told, "nothing is cut off"
    section = next(s for s in report.sections(report.strict(many)) if s.title == "Figures of arms")
    groups = [[name for name, _ in block.groups] for block in section.blocks if block.kind == "table"]
    assert groups == [["control", *names[:3], ""], ["control", *names[3:], ""]]
