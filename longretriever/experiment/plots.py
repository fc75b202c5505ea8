"""How do the figures of an experiment look? As small SVGs whose colors are the page's, light or dark.

matplotlib draws with stand-in colors, which are then replaced by CSS variables. Every panel is narrow enough
for a phone.
"""

from __future__ import annotations

import hashlib
import io
import re
from collections.abc import Callable, Mapping, Sequence
from html import escape
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MARKERS = "os^DvPX*"
GLYPHS = "●■▲◆▼✚✖★"
"""What stands for the markers in a legend."""

_INK, _LINE, _MORE, _LESS = "#010101", "#020202", "#030303", "#040404"
_SERIES = [f"#0505{n:02x}" for n in range(len(MARKERS))]
_VARIABLES = {
    _INK: "var(--ink)",
    _LINE: "var(--line)",
    _MORE: "var(--more)",
    _LESS: "var(--less)",
    **{color: f"var(--c{n})" for n, color in enumerate(_SERIES)},
}
_WIDTH = 4.9  # inches, of 72 units


def differences(rows: Sequence[Mapping[str, Any]], title: str) -> str:
    """One line for each comparison: the difference and its interval, against zero.

    Where a row has it, `each` are the differences that this one is the mean of: small dots below it.
    """
    others = {row["against"] for row in rows}
    second = "\nagainst {}" if len(others) > 1 else ""  # the same for all, the text beside says it
    names = [_short(row["arm"]) + second.format(_short(row["against"])) for row in rows]

    def draw(axes: Axes) -> None:
        axes.axvline(0, color=_INK, linewidth=1)
        axes.locator_params(axis="x", nbins=5)
        for y, row in enumerate(rows):
            color = {"more": _MORE, "less": _LESS}.get(row["found"], _INK)
            axes.plot(row["interval"], [y, y], color=color, linewidth=2)
            filled = color if row["found"] != "undecided" else "none"
            axes.plot(row["difference"], y, "o", color=color, markerfacecolor=filled, markersize=7)
            each = row.get("each", ())
            axes.plot(each, [y + 0.25] * len(each), "o", color=color, markersize=3)
        axes.set_yticks(range(len(names)), names)
        axes.set_ylim(len(names) - 0.5, -0.5)
        axes.grid(axis="x")

    return _svg(draw, title, 0.8 + (0.45 if second else 0.3) * len(rows))


def dots(rows: Sequence[tuple[str, float, Sequence[float] | None]], title: str) -> str:
    """One line for each name: a figure from 0 on, and its interval where it has one."""

    def draw(axes: Axes) -> None:
        axes.locator_params(axis="x", nbins=5)
        for y, (_, value, interval) in enumerate(rows):
            if interval is not None:
                axes.plot(interval, [y, y], color=_SERIES[0], linewidth=2)
            axes.plot(value, y, "o", color=_SERIES[0], markersize=7)
        axes.set_yticks(range(len(rows)), [_short(name) for name, _, _ in rows])
        axes.set_ylim(len(rows) - 0.5, -0.5)
        axes.set_xlim(left=0)
        axes.grid(axis="x")

    return _svg(draw, title, 0.8 + 0.3 * len(rows))


def by_history(lines: Sequence[Mapping[str, float | None]], spans: Sequence[str], title: str) -> str:
    """One line for each arm: a figure by length of history, which `spans` has in order."""

    def draw(axes: Axes) -> None:
        for n, line in enumerate(lines):
            _line(axes, n, range(len(spans)), [line.get(span) for span in spans])
        axes.set_xticks(range(len(spans)), spans)
        axes.set_xlim(-0.3, len(spans) - 0.7)
        axes.set_ylim(bottom=0)
        axes.grid(axis="y")
        axes.set_xlabel("events of history")

    return _svg(draw, title, 3.0)


def by_value(
    lines: Sequence[Sequence[float | None]], values: Sequence[str], x: str, y: str, title: str
) -> str:
    """One line for each claim: a lift at each value of a property, against zero."""

    def draw(axes: Axes) -> None:
        axes.axhline(0, color=_INK, linewidth=1)
        for n, line in enumerate(lines):
            _line(axes, n, range(len(values)), line)
        axes.set_xticks(range(len(values)), values)
        axes.set_xlim(-0.3, len(values) - 0.7)
        axes.grid(axis="y")
        axes.set_xlabel(x)
        axes.set_ylabel(y)

    return _svg(draw, title, 3.0)


def by_day(lines: Sequence[Sequence[float | None]], title: str) -> str:
    """One line for each arm: a figure on each day, from day 1; the axis begins where the values do."""
    days = range(1, 1 + max(len(line) for line in lines))

    def draw(axes: Axes) -> None:
        for n, line in enumerate(lines):
            _line(axes, n, days, line)
        axes.locator_params(axis="x", integer=True)
        axes.set_xlim(0.7, len(days) + 0.3)
        axes.grid(axis="y")
        axes.set_xlabel("day of the test")

    return _svg(draw, title, 2.6)


def curves(by_seed: Sequence[Sequence[Sequence[float]]], title: str) -> str:
    """The held-out gain during each training of one configuration: rows of [seconds, samples, nats]."""

    def draw(axes: Axes) -> None:
        for n, curve in enumerate(by_seed):
            seconds, nats = [row[0] for row in curve], [row[2] for row in curve]
            minutes = [s / 60 for s in seconds]
            axes.plot(minutes, nats, MARKERS[n % 8], color=_SERIES[0], linestyle=_dash(n), markersize=4)
        axes.set_xlim(left=0)
        axes.grid(axis="y")
        axes.set_xlabel("minutes of training")
        axes.set_ylabel("nats below chance")

    return _svg(draw, title, 2.6)


def _line(axes: Axes, n: int, at: Sequence[int], values: Sequence[float | None]) -> None:
    """The n-th line of a picture, over what has no value straight to the next."""
    found = [(x, v) for x, v in zip(at, values, strict=False) if v is not None]
    x, y = [x for x, _ in found], [v for _, v in found]
    axes.plot(x, y, MARKERS[n % 8], color=_SERIES[n % 8], linestyle=_dash(n), markersize=6)


def overlaid(
    lines: Sequence[Sequence[Sequence[float]]],
    x: str,
    y: str,
    title: str,
    marks: Mapping[str, float] | None = None,
) -> str:
    """Curves of points [x, y] on logarithmic axes; the last is thicker: the others are there for it.

    `marks` are places on the axis of x with a name, instead of powers of ten.
    """
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    def draw(axes: Axes) -> None:
        axes.set_xscale("log")
        axes.set_yscale("log")
        for axis in (axes.xaxis, axes.yaxis):  # its own labels are powers written in math
            axis.set_major_locator(LogLocator(numticks=6))
            axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))
            axis.set_minor_locator(NullLocator())
        for n, line in enumerate(lines):
            last = n == len(lines) - 1
            (drawn,) = axes.plot([point[0] for point in line], [point[1] for point in line], MARKERS[n % 8])
            drawn.set(color=_SERIES[n % 8], linestyle=_dash(n), markevery=0.2)
            drawn.set(linewidth=2.5 if last else 1.2, markersize=6 if last else 4)
        if marks:
            axes.set_xticks(list(marks.values()), list(marks))
        axes.grid()
        axes.set_xlabel(x)
        axes.set_ylabel(y)

    return _svg(draw, title, 3.2)


def _dash(n: int) -> Any:
    """Solid for the first eight, so that nine arms are still nine different lines."""
    return ["-", "--", ":", "-."][(n // 8) % 4]


def _short(name: str, most: int = 22) -> str:
    return name if len(name) <= most else name[: most - 1] + "…"


def _svg(draw: Callable[[Axes], None], title: str, height: float) -> str:
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    style = {
        "font.size": 11,
        "text.color": _INK,
        "text.parse_math": False,
        "axes.edgecolor": _LINE,
        "axes.labelcolor": _INK,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.axisbelow": True,
        "xtick.color": _INK,
        "ytick.color": _INK,
        "grid.color": _LINE,
        "svg.fonttype": "none",  # text stays text
        "svg.hashsalt": title,  # the same ids each time
    }
    with rc_context(style):  # type: ignore[arg-type]
        figure = Figure(figsize=(_WIDTH, height), layout="constrained")
        axes = figure.add_subplot()
        draw(axes)
        buffer = io.StringIO()
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(buffer, format="svg", transparent=True, metadata=nothing)
    return _for_the_page(buffer.getvalue(), title)


def _for_the_page(svg: str, title: str) -> str:
    """Without what a page has or decides itself: declarations, names of groups, styles, size, colors."""
    size = re.findall(r'viewBox="[^"]*"', svg)[0]
    start = f'<svg {size} role="img" aria-label="{escape(title, quote=True)}">'
    svg = re.sub(r"^.*?<svg[^>]*>", lambda _: start, svg, count=1, flags=re.DOTALL)
    svg = re.sub(r"<!--.*?-->\n?|<style.*?</style>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'<g id="[^"]*">', "<g>", svg).replace("xlink:href", "href")
    own = hashlib.sha256(svg.encode()).hexdigest()[:8]  # ids must differ between the panels of a page
    svg = re.sub(r'(id="|#)([mp][0-9a-f]{10})\b', rf"\g<1>{own}-\2", svg)
    for color, variable in _VARIABLES.items():
        svg = svg.replace(color, variable)
    return svg
