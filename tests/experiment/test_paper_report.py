"""The report of the paper's claims says what its result says: every lift, every verdict, every world."""

from __future__ import annotations

import copy
import json
import re
from xml.etree import ElementTree

import pytest
from rich.console import Console

from longretriever.experiment import page, paper, paper_report, plots
from longretriever.experiment.ab import online, report
from tests.experiment.test_page import Page, check_it_loads_nothing

NAN = float("nan")
MIND, OURS = "LongRetriever, paper against MIND", "LongRetriever against LongRetriever, paper"
LIFTS = {  # of the main figure, by claim: mean, half of the interval, by world, sure worlds
    0: (0.0312, 0.011, [0.04, 0.03, -0.001], 2),
    1: (0.021, 0.005, [0.02, 0.02, 0.023], 1),
    2: (-0.002, 0.03, [-0.01, 0.0, 0.004], 0),
    3: (-0.05, 0.01, [-0.05, -0.06, -0.04], 3),
    4: (NAN, NAN, [NAN, -0.01, -0.02], 0),
    5: (0.104, 0.02, [0.1, 0.11, 0.102], 3),
}
VERDICTS = ["holds", "fails", "undecided", "holds", "undecided", "holds"]
SHOWN = ["+3.1%", "+2.1%", "−0.2%", "−5.0%", "–", "+10.4%"]
SPANS = ["+2.0% to +4.2%", "+1.6% to +2.6%", "−3.2% to +2.8%", "−6.0% to −4.0%", "–", "+8.4% to +12.4%"]
AGREE = ["2 of 3", "0 of 3", "1 of 3", "3 of 3", "2 of 3", "3 of 3"]


def over(mean: float, half: float, by_world: list[float], sure: int | None = None) -> dict:
    found = {"mean": mean, "interval": [mean - half, mean + half], "by_world": by_world}
    return found if sure is None else {**found, "sure_worlds": sure}


def claimed(lifts: dict[int, tuple]) -> list[dict]:
    out = []
    for n, claim in enumerate((*paper.CLAIMS, paper.OURS_TOO[0])):
        at = n / 100
        figures = {
            name: over(at + m / 1000, 0.0015, [at, at - 0.1, at + m / 500], m)
            for m, name in enumerate(paper.SHOWN)
        }
        figures[paper.MAIN] = over(*lifts[n])
        verdict = paper.verdict(figures[paper.MAIN], claim.more)
        out.append({**paper.asdict(claim), "figures": figures, "verdict": verdict})
    return out


def figures(names: tuple[str, ...], at: float) -> dict:
    return {name: over(at + n / 50, 0.013, [at, at + 0.01, at + 0.02]) for n, name in enumerate(names)}


@pytest.fixture(scope="module")
def result() -> dict:
    return made_by_hand()


def made_by_hand() -> dict:
    names = [arm.name for arm in paper.arms()]
    short = {n: (*lift[:2], lift[2][:2], lift[3]) for n, lift in LIFTS.items()}
    return {
        "format": 1,
        "worlds": [7, 8, 9],
        "claims": claimed(LIFTS),
        "routes": {name: figures(paper.ROUTE_FIGURES, 0.11 + n / 10) for n, name in enumerate(names)},
        "arms": {name: figures(paper.SHOWN, 0.2 + n / 7) for n, name in enumerate(names)},
        "of_paper": {},
        "sweep": {"worlds": 2, "days": 3},
        "sweeps": [
            {
                "name": "drift period, days",
                "points": [
                    {"value": "7", "changes": {"drift_days": 7.0}, "claims": claimed(short)},
                    {
                        "value": "365",
                        "changes": {"drift_days": 365.0},
                        "claims": claimed(short | {0: (-0.07, 0.01, [-0.07, -0.07], 2)})[:5],
                    },
                ],
            }
        ],
        "plan": {
            "feed": {"slots": 11},
            "platform": {"warm_up": 2},
            "users": 1234,
            "days": 3,
            "retrain": 0,
            "minutes": None,
            "samples": 4321,
            "seed": 5,
            "threads": None,
            "market": {"events": 55_555, "sharpness": 1.8},
        },
        "definitions": {"figures": online.FIGURES, "of_route": online.OF_ROUTE},
        "made": {
            "command": "longretriever experiment paper --worlds 3",
            "date": "2026-01-02 03:04 UTC",
            "environment": {"longretriever": "1.2.3", "torch": None},
            "configurations": {"MIND": {"learns": {"is": "MindConfig", "width": 24}, "k": 77}},
        },
    }


def html_of(result: dict) -> str:
    result = report.strict(result)
    return page.html(paper_report.title_of(result), paper_report.sections(result))


@pytest.fixture(scope="module")
def html(result) -> str:
    return html_of(result)


@pytest.fixture(scope="module")
def found(html) -> Page:
    return Page(html)


def words(text: str) -> str:
    return " ".join(text.split())


def test_the_result_here_has_the_verdicts_that_the_rest_of_these_tests_expect(result):
    assert [claim["verdict"] for claim in result["claims"]] == VERDICTS


def test_a_sentence_for_each_claim_says_whether_it_holds_and_in_how_many_worlds(found):
    text = words(found.text["in-short"])
    assert "Of 5 claims of the paper, here 2 hold, 1 fail and 2 are undecided" in text
    assert "in 3 worlds of 1,234 users and 3 days." in text
    assert (
        "Table 1: LongRetriever in MIND's place brings more. Here it holds: +3.1% clicks (+2.0% to +4.2%), "
        f"{MIND}. 2 of 3 worlds have the claimed sign; in 2 the difference is more than chance by itself."
    ) in text
    assert "Table 3: always the five best contexts bring less than Random 5 in Top 20. Here it fails" in text
    assert "Table 4: only the last 200 behaviors bring less. Here it is undecided: −0.2% clicks" in text
    assert "Here it is undecided: – clicks (–), without in-context against" in text
    assert "This package's own: LongRetriever as it comes here brings more than the paper's. Here it" in text
    assert "--paper-figures FILE" in text


ANCHORS = [
    "table-1-longretriever-in-mind-s-place",
    "table-3-which-contexts-are-asked",
    "table-4-the-long-sequence",
    *["table-5-in-context-training"] * 2,
    "this-package-s-own",
]


@pytest.mark.parametrize("n", range(6))
def test_every_figure_of_a_claim_is_in_the_table_of_its_section(result, found, n):
    claim, rows = result["claims"][n], found.rows[ANCHORS[n]]
    tables = [at for at, row in enumerate(rows) if row[:2] == ["figure", "lift"]]
    at = tables[n == 4]
    assert rows[at] == ["figure", "lift", "95%", "worlds as claimed", "sure by itself"]
    names = [report.label(name) for name in paper.SHOWN]
    for m, name in enumerate(paper.SHOWN):
        row = rows[at + 1 + m]
        if name == paper.MAIN:
            assert row == ["clicks, which decides", SHOWN[n], SPANS[n], AGREE[n], str(LIFTS[n][3])]
            continue
        mean, worlds = n / 100 + m / 1000, claim["figures"][name]["by_world"]
        agree = sum((lift > 0) if claim["more"] else (lift < 0) for lift in worlds)
        span = f"{report.percent(mean - 0.0015)} to {report.percent(mean + 0.0015)}"
        assert row == [names[m], report.percent(mean), span, f"{agree} of 3", str(m)]
    folded = [at for at, row in enumerate(rows) if row == ["figure", "7", "8", "9"]][n == 4]
    for m, of in enumerate(claim["figures"].values()):
        lifts = [report.percent(lift) for lift in report.strict(of["by_world"])]
        assert rows[folded + 1 + m] == [names[m], *lifts]


def test_a_lift_is_bold_where_0_is_outside_of_its_interval(html):
    bold = re.findall(r"<b>([^<]*)</b>", html)
    assert {"+3.1%", "+2.1%", "−5.0%", "+10.4%"} <= set(bold)
    assert "−0.2%" not in bold
    assert "–" not in bold


def test_table_2_has_the_figures_of_each_route(result, found):
    anchor = "table-2-routes"
    assert found.rows[anchor][0] == ["route", "AER", "UER", "CTR×CVR"]
    assert found.row(anchor, "MIND") == [".110", ".130", ".150"]
    assert found.row(anchor, "LongRetriever") == [".710", ".730", ".750"]
    assert len(found.rows[anchor]) == 9
    assert "±.013" in found.text[anchor]
    assert "UER: exposed, of what this route alone retrieved." in found.text[anchor]


def test_the_papers_own_figures_stand_beside_ours_where_they_are_given(result):
    given = {
        "Table 1": {"LongRetriever, paper": {"clicks": 0.0123, "orders": -0.02}},
        "Table 2": {"LongRetriever, paper": {"uer": 0.5}},
    }
    found = Page(html_of({**result, "of_paper": given}))
    rows = found.rows[ANCHORS[0]]
    assert rows[0][-1] == "the paper"
    assert {row[0]: row[-1] for row in rows[1:8]} == {
        **dict.fromkeys(("PV", "UV CTR", "UV CVR", "exposed categories", "clicked categories"), "–"),
        "orders": "−2.0%",
        "clicks, which decides": "+1.2%",
    }
    assert found.row("table-2-routes", "LongRetriever, paper")[3:] == ["–", "+50.0%", "–"]
    assert found.row("table-2-routes", "MIND")[3:] == ["–"] * 3
    assert "--paper-figures" not in found.text["in-short"]
    assert "the paper" not in found.rows[ANCHORS[1]][0], "nothing is given for Table 3"


def test_a_sweep_says_where_each_claim_holds(found):
    anchor = "where-it-holds"
    assert found.rows[anchor][0] == ["claim", "7", "365"]
    assert found.row(anchor, MIND) == ["+3.1% holds", "−7.0% fails"]
    assert found.row(anchor, "Top 5 against LongRetriever, paper") == ["+2.1% fails"] * 2
    assert found.row(anchor, "without in-context against LongRetriever, paper") == ["– undecided"] * 2
    assert found.row(anchor, OURS) == ["+10.4% holds", "–"], "not tried at 365"
    text = words(found.text[anchor])
    assert "Table 1, LongRetriever in MIND's place brings more: holds at 7; fails at 365." in text
    assert "Table 4, only the last 200 behaviors bring less: undecided at 7 and 365." in text
    assert "brings more than the paper's: holds at 7." in text


def pictures(html: str, section: str) -> list[ElementTree.Element]:
    within = re.search(rf'<section id="{section}">.*?</section>', html, re.DOTALL)
    return [ElementTree.fromstring(svg) for svg in re.findall(r"<svg.*?</svg>", within[0], re.DOTALL)]


def test_claims_are_drawn_with_each_world_and_in_the_color_of_their_verdict(result, html):
    (drawn,) = pictures(html, "in-short")
    text = [e.text for e in drawn.iter("text")]
    assert {"against MIND", "without long sequence", "LongRetriever"} <= set(text)
    assert "without in-context" not in text, "its lift is not known"
    rows = [paper_report._drawn(claim) for claim in result["claims"][:3]]
    assert [row["found"] for row in rows] == ["more", "less", "undecided"]
    assert rows[0]["difference"] == pytest.approx(3.12)
    assert rows[0]["interval"] == pytest.approx([2.02, 4.22])
    assert rows[0]["each"] == pytest.approx([4, 3, -0.1])
    bare = [{name: value for name, value in row.items() if name != "each"} for row in rows]
    with_worlds, without = (plots.differences(some, "t").count("<use") for some in (rows, bare))
    assert with_worlds == without + 9


def test_a_sweep_is_drawn_as_a_line_for_each_claim_that_is_known(html):
    (drawn,) = pictures(html, "where-it-holds")
    assert drawn.get("aria-label") == "clicks, lift by drift period, days"
    assert {"7", "365", "drift period, days", "lift in %"} <= {e.text for e in drawn.iter("text")}
    whole, less = (plots.by_value([[-1, 2], [0, second]], ["a", "b"], "x", "y", "t") for second in (1, None))
    assert whole.count("<use") == less.count("<use") + 1
    assert "nan" not in less


def test_without_sweeps_the_section_is_left_out(result):
    bare = Page(html_of({**result, "sweeps": []}))
    assert "where-it-holds" not in bare.ids()
    assert "There are 6 verdicts here" in bare.text["how-to-read-this"]


def test_all_arms_have_their_figures(result, found):
    assert found.row("all-arms", "MIND") == [".200", ".220", ".240", ".260", ".280", ".300", ".320"]
    heads = ["arm", *(report.label(name) for name in paper.SHOWN)]
    assert found.rows["all-arms"][0] == heads
    assert len(found.rows["all-arms"]) == 1 + len(result["arms"])


def test_how_to_read_it_and_what_produced_it(found):
    text = words(found.text["how-to-read-this"])
    for said in ("clicks (clicks per user), fixed beforehand", "Student's t", "docs/market.md"):
        assert said in text
    assert "There are 17 verdicts here, not corrected" in text
    assert found.row("what-produced-it", "seeds of worlds") == ["7, 8, 9"]
    assert found.row("what-produced-it", "command") == ["longretriever experiment paper --worlds 3"]
    assert found.row("what-produced-it", "minutes") == ["as configured"]
    assert found.row("what-produced-it", "torch") == ["–"]
    for said in ('"events": 55555', '"slots": 11', '"warm_up": 2', '"width": 24', '"drift_days": 7.0'):
        assert said in found.text["what-produced-it"]


def test_three_files_that_say_the_same(result, tmp_path, html):
    files = paper_report.write(result, tmp_path / "report")
    assert [file.name for file in files] == ["results.json", "report.md", "report.html"]

    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is not JSON")

    told = json.loads(files[0].read_text(), parse_constant=refuse)
    assert told == report.strict(result)
    assert told["claims"][4]["figures"]["clicks"]["mean"] is None
    markdown, text = files[1].read_text(), files[2].read_text()
    assert text == html
    check_it_loads_nothing(text)
    assert not re.search(r"https?://", text)
    assert not re.search(r"\bNaN\b|\bnan%|\bNone\b", text + markdown)
    for shown in (*SHOWN, *SPANS):
        assert shown in markdown
    again = paper_report.write(told, tmp_path / "again")
    assert [file.read_bytes() for file in again] == [file.read_bytes() for file in files]


def test_claims_whose_arms_were_not_tried_leave_no_section(result):
    few = copy.deepcopy(result)
    few["claims"], few["routes"], few["sweeps"] = few["claims"][:1], {}, []
    ids = Page(html_of(few)).ids()
    assert ANCHORS[0] in ids
    assert not {*ANCHORS[1:], "table-2-routes"} & set(ids)
    assert "Of 1 claim of the paper" in words(Page(html_of(few)).text["in-short"])


def test_the_terminal_shows_the_same_in_columns(result):
    console = Console(width=100, no_color=True)
    with console.capture() as shown:
        console.print(paper_report.table(result))
    lines = shown.get().splitlines()
    assert max(map(len, lines)) <= 100
    assert "…" not in shown.get()
    rows = [re.split(r"\s{2,}", line.strip()) for line in lines]
    tables = ["1", "3", "4", "5", "5", "own"]
    for n, claim in enumerate(result["claims"]):
        row = [tables[n], claim["arm"], SHOWN[n], SPANS[n], AGREE[n], str(LIFTS[n][3]), VERDICTS[n]]
        assert row in rows
        assert [f"{'more' if claim['more'] else 'less'} than {claim['against']}"] in rows
    assert ["MIND", ".110 ±.013", ".130 ±.013", ".150 ±.013"] in rows
