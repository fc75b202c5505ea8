"""The page is whole HTML that loads nothing, the Markdown says the same, and neither minds odd names."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from importlib.util import find_spec
from xml.etree import ElementTree

import pytest

from longretriever.errors import MissingExtra
from longretriever.experiment import page, plots
from longretriever.experiment.page import Cell, Code, Plots, Points, Section, Table, Text

ODD = '<b>"odd" & |*_ $x$ [name](http://x)</b>'
VOID = {"meta", "link", "img", "br", "hr", "input", "use", "path", "rect", "circle", "line"}


class Page(HTMLParser):
    """What a page holds: its text by section, its tables, its attributes; fails where tags do not match."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.section = ""
        self.text: dict[str, str] = {}
        self.rows: dict[str, list[list[str]]] = {}
        self.attributes: list[tuple[str, str, str]] = []
        self.feed(html)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag == "section":
            self.section = dict(attrs)["id"]
        if tag == "tr":
            self.rows.setdefault(self.section, []).append([])
        if tag in ("td", "th"):
            self.rows[self.section][-1].append("")
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag, f"</{tag}> at {self.getpos()}"

    def handle_data(self, data):
        self.text[self.section] = self.text.get(self.section, "") + data
        if {"td", "th"} & set(self.open) and "small" not in self.open:
            self.rows[self.section][-1][-1] += data

    def row(self, section: str, name: str) -> list[str]:
        """The figures of the first row of this name."""
        return next(row[1:] for row in self.rows[section] if row[0] == name)

    def ids(self) -> list[str]:
        return [value for _, name, value in self.attributes if name == "id"]


def check_it_loads_nothing(html: str) -> None:
    found = Page(html)
    tags = {tag for tag, _, _ in found.attributes}
    assert not tags & {"script", "link", "img", "iframe", "object", "embed", "video", "image", "form"}
    for tag, name, value in found.attributes:
        assert name not in ("src", "srcset", "data", "xlink:href", "background")
        assert not name.startswith("on")
        assert name != "href" or value.startswith("#"), f"<{tag} {name}={value}>"
        assert "url(" not in value.replace("url(#", "")
    for style in re.findall(r"<style.*?</style>", html, re.DOTALL):
        assert "url(" not in style
        assert "@import" not in style
    targets = [value[1:] for _, name, value in found.attributes if name == "href"]
    assert set(targets) <= set(found.ids())


DIFFERENCES = [
    {"arm": ODD, "against": "one", "difference": 0.02, "interval": [0.01, 0.03], "found": "more"},
    {"arm": "b", "against": "two", "difference": -0.1, "interval": [-0.3, 0.1], "found": "undecided"},
]
LINES = [{"1-9": 0.1, "10+": None}, *({"1-9": n / 10, "10+": 0.5} for n in range(9))]
SECTIONS = [
    Section(
        "All, of: it",
        [
            Text(f"A paragraph about {ODD}."),
            Points(["one", "two <i>"]),
            Table(
                "system",
                [("ALL", "R"), ("ALL", "N"), ("NEW", "R")],
                [(ODD, [Cell(".5", ("±.1", "sd .2"), bold=True), Cell(".4"), Cell("–")])],
            ),
            Table("", [("", "")], [("key", [Cell("a long value", prose=True)])], "Folded <up>", folded=True),
            Code("As it is <1>", "if a < b:\n    print('*')"),
        ],
    ),
    Section(
        "Pictures",
        [
            Plots(
                [
                    (ODD, lambda title: plots.differences(DIFFERENCES, title)),
                    ("history", lambda title: plots.by_history(LINES, ["1-9", "10+"], title)),
                    ("history", lambda title: plots.by_history(LINES[:3], ["1-9", "10+"], title)),
                    ("curves", lambda title: plots.curves([[[1, 2, 0.1], [60, 4, 0.2]]] * 9, title)),
                ],
                legend=[ODD, *"abcdefghi"],
            )
        ],
    ),
]


@pytest.fixture(scope="module")
def html() -> str:
    return page.html(ODD, SECTIONS)


def test_the_page_is_whole_and_loads_nothing(html):
    check_it_loads_nothing(html)
    ids = Page(html).ids()
    assert len(ids) == len(set(ids))
    assert ids[:1] == ["all-of-it"]
    assert html.startswith("<!doctype html>")


def test_text_is_shown_as_it_is(html):
    found = Page(html)
    assert "".join(found.text.values()).count(ODD) >= 5
    assert found.row("all-of-it", ODD) == [".5", ".4", "–"]
    assert "±.1" in found.text["all-of-it"]
    assert "    print('*')" in found.text["all-of-it"]
    assert ["", "ALL", "NEW"] in found.rows["all-of-it"]


def test_markdown_says_the_same_without_pictures():
    lines = page.markdown(ODD, SECTIONS).splitlines()
    tables = [line for line in lines if line.startswith("|")]
    assert tables[0] == "| system | ALL R | ALL N | NEW R |"
    assert tables[2].endswith("| **.5** ±.1 sd .2 | .4 | – |")
    assert [len(re.findall(r"(?<!\\)\|", line)) for line in tables] == [5, 5, 5, 3, 3, 3]
    assert r"\<b>" in lines[0]
    assert "    if a < b:" in lines
    assert "- two \\<i>" in lines


@pytest.mark.parametrize(("title", "draw"), SECTIONS[1].blocks[0].panels)
def test_a_picture_is_well_formed_and_has_the_colors_of_the_page(title, draw):
    svg = draw(title)
    root = ElementTree.fromstring(svg)
    assert root.tag == "svg"
    assert root.get("aria-label") == title
    assert root.get("width") is None, "the page decides"
    assert "var(--ink)" in svg
    assert not re.search(r"#0[0-9a-f]0[0-9a-f]{3}\b", svg), "a stand-in color is left"
    assert svg == draw(title), "the same each time"


def test_a_picture_names_what_is_compared():
    svg = plots.differences(DIFFERENCES, "t")
    text = [e.text for e in ElementTree.fromstring(svg).iter("text")]
    assert {"against one", "against two", "b"} <= set(text)
    same = plots.differences([{**row, "against": "one"} for row in DIFFERENCES], "t")
    assert "against one" not in same, "the text beside it says so"
    assert "var(--more)" in svg
    assert "var(--less)" not in svg


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setattr(page, "find_spec", lambda name: None if name == "matplotlib" else find_spec(name))
    message = r"needs matplotlib\. Install them with `pip install 'longretriever\[report\]'`"
    with pytest.raises(MissingExtra, match=message):
        page.html("t", SECTIONS)
    assert page.markdown("t", SECTIONS)
