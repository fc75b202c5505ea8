"""How does a report look? Sections of text, tables and pictures, as one HTML page or as Markdown.

Nothing here knows an experiment. The page is a single file that loads nothing: style and pictures are in it,
it needs no script, and it is light or dark as the reader has it. Only when a page is made, jinja2 and
matplotlib are imported (`longretriever[report]`); Markdown needs neither, and has no pictures.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import groupby
from pathlib import Path
from typing import Any, ClassVar

from longretriever.errors import MissingExtra
from longretriever.experiment.plots import GLYPHS
from longretriever.experiment.runs import write_whole

NONE = "–"
"""Stands where there is no figure."""

LINES = 8
"""As many as can be told apart in one picture."""


@dataclass(frozen=True)
class Text:
    """A paragraph."""

    kind: ClassVar[str] = "text"
    text: str


@dataclass(frozen=True)
class Points:
    """A list of short paragraphs."""

    kind: ClassVar[str] = "points"
    texts: Sequence[str]


@dataclass(frozen=True)
class Cell:
    """A figure, what is said of its certainty, and whether it stands out; or prose, which may be long."""

    text: str
    small: tuple[str, ...] = ()
    bold: bool = False
    prose: bool = False


@dataclass(frozen=True)
class Table:
    """Rows begin with their name. A head is (group, label); equal groups side by side are written once."""

    kind: ClassVar[str] = "table"
    first: str
    head: Sequence[tuple[str, str]]
    rows: Sequence[tuple[str, Sequence[Cell]]]
    title: str = ""
    folded: bool = False

    @property
    def groups(self) -> list[tuple[str, int]]:
        return [(name, len(list(heads))) for name, heads in groupby(self.head, lambda head: head[0])]


@dataclass(frozen=True)
class Plots:
    """Panels: (title, what draws an SVG with this title); the names in a legend are in the order of lines."""

    kind: ClassVar[str] = "plots"
    panels: Sequence[tuple[str, Callable[[str], str]]]
    legend: Sequence[str] = ()


@dataclass(frozen=True)
class Code:
    """What is shown letter by letter, folded away under a title."""

    kind: ClassVar[str] = "code"
    title: str
    text: str


Block = Text | Points | Table | Plots | Code


@dataclass(frozen=True)
class Section:
    title: str
    blocks: Sequence[Block]

    @property
    def anchor(self) -> str:
        return "-".join("".join(c if c.isalnum() else " " for c in self.title.lower()).split())


def write(
    folder: str | os.PathLike[str], result: Mapping[str, Any], title: str, sections: Sequence[Section]
) -> list[Path]:
    """Write `results.json`, `report.md` and `report.html` into a folder, and return their paths.

    Raises `MissingExtra` without the packages for the page, after the other two are written;
    `need_extra` says so before an experiment begins.
    """
    into = Path(folder)
    into.mkdir(parents=True, exist_ok=True)
    files = [into / name for name in ("results.json", "report.md", "report.html")]
    data = json.dumps(result, indent=1, ensure_ascii=False, allow_nan=False)
    write_whole(files[0], data.encode())
    write_whole(files[1], markdown(title, sections).encode())
    write_whole(files[2], html(title, sections).encode())
    return files


def need_extra() -> None:
    """Raises `MissingExtra` where a page could not be made."""
    missing = [name for name in ("jinja2", "matplotlib") if find_spec(name) is None]
    if missing:
        raise MissingExtra(
            f"the HTML page needs {' and '.join(missing)}. "
            "Install them with `pip install 'longretriever[report]'`."
        )


def html(title: str, sections: Sequence[Section]) -> str:
    """One HTML page that loads nothing. Raises `MissingExtra`."""
    need_extra()
    from jinja2 import Environment, FileSystemLoader

    pages = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return pages.get_template("page.html").render(title=title, sections=sections, glyphs=GLYPHS)


def markdown(title: str, sections: Sequence[Section]) -> str:
    """The same as Markdown, without the pictures."""
    lines = [f"# {_plain(title)}", ""]
    for section in sections:
        lines += [f"## {_plain(section.title)}", ""]
        for block in section.blocks:
            lines += _lines(block)
    return "\n".join(lines).rstrip() + "\n"


def _lines(block: Block) -> list[str]:
    match block:
        case Text(text):
            return [_plain(text), ""]
        case Points(texts):
            return [*(f"- {_plain(text)}" for text in texts), ""]
        case Code(title, text):
            return [f"{_plain(title)}:", "", *(f"    {line}" for line in text.splitlines()), ""]
        case Table():
            return [*_table(block), ""]
    return []


def _table(table: Table) -> list[str]:
    title = [f"**{_plain(table.title)}**", ""] if table.title else []
    heads = [" ".join(part for part in head if part) for head in table.head]
    lines = [_row([table.first, *heads]), _row(["---"] * (1 + len(heads)))]
    return [*title, *lines, *(_row([_plain(name), *map(_cell, cells)]) for name, cells in table.rows)]


def _cell(cell: Cell) -> str:
    text = f"**{_plain(cell.text)}**" if cell.bold else _plain(cell.text)
    return " ".join([text, *map(_plain, cell.small)])


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _plain(text: str) -> str:
    """Text that reads the same, whatever characters of Markdown are in it."""
    text = " ".join(text.split())
    for character in "\\|*_`<[#":
        text = text.replace(character, f"\\{character}")
    return text


# -- what all reports say alike


def code(title: str, value: Any) -> Code:
    """A value as JSON, folded."""
    return Code(title, json.dumps(value, indent=1, ensure_ascii=False))


def facts(of: Mapping[str, Any]) -> Table:
    """Names and what stands for them, which may be long."""
    rows = [(name, [Cell(str(value), prose=True)]) for name, value in of.items() if value != ""]
    return Table("", [("", "")], rows)


def handfuls(names: Sequence[str], most: int = LINES) -> Iterator[list[str]]:
    """The first name beside all others, `most` at a time."""
    for at in range(1, max(len(names), 2), most - 1):
        yield [names[0], *names[at : at + most - 1]]


def digits(value: float | None) -> str:
    if value is None:
        return NONE
    return f"{value:.1f}" if value >= 10 else f"{value:.3f}".removeprefix("0")


def probability(value: float | None) -> str:
    return "< .001" if value is not None and value < 0.001 else digits(value)


def many(n: int, what: str) -> str:
    return f"{n:,} {what}" if n == 1 else f"{n:,} {what}s"
