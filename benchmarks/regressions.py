"""Runs all benchmarks small, keeps their ratios, and shows them beside those of the last time.

    python benchmarks/regressions.py [--dry] [--json]

Each figure is a ratio within one run (against a peer, a bare part or a limit), so that machines of different
speed can be compared; `history.jsonl` beside this file has a line for each run. Noise of a tenth is usual on
a shared machine: what is 1.25 times worse than the median of the last five runs is marked. Under 5 minutes on
2 cores. `--dry` keeps nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table

HERE = Path(__file__).parent
HISTORY = HERE / "history.jsonl"
LAST, WORSE = 5, 1.25


class Figure(NamedTuple):
    """A ratio out of what a benchmark prints."""

    name: str
    of: Callable[[Any], float]
    less_is_better: bool


RUNS: list[tuple[list[str], list[Figure]]] = [
    (
        ["ingest.py", "--events", "2000000", "--repeats", "3"],
        [Figure("ingest, of DuckDB's bare sort", lambda r: r[0]["ratio"], True)],
    ),
    (
        ["training.py", "--seconds", "8", "--turns", "1", "--threads", "1"],
        [
            Figure("training, part of the limit", lambda r: r["packed"]["of_limit"], False),
            Figure("plain training, part of the limit", lambda r: r["plain"]["of_limit"], False),
            Figure("training, padding", lambda r: r["packed"]["padded"], True),
        ],
    ),
    (
        ["index.py", "--items", "300000", "--categories", "600", "--queries", "100"],
        [Figure("search of contexts, times NumPy's speed", lambda r: r["brute_force_over_index"], False)],
    ),
    (
        [
            *("serving.py", "--events", "1000000", "--users", "200", "--items", "200000"),
            *("--categories", "1000", "--parts", "request,events", "--seconds", "4"),
        ],
        [
            Figure("a request, of its bare parts", lambda r: r["request"]["times_bare"], True),
            Figure(
                "longest life, of the fastest request",
                lambda r: r["lives"][-1]["ms"] / min(x["ms"] for x in r["lives"]),
                True,
            ),
            Figure(
                "event acknowledged, of a bare sync", lambda r: r["events"]["acknowledged_times_bare"], True
            ),
        ],
    ),
]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dry", action="store_true", help="keep nothing")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    began = time.perf_counter()
    past = [json.loads(line) for line in HISTORY.read_text().splitlines()] if HISTORY.exists() else []
    ratios: dict[str, float] = {}
    for command, figures in RUNS:
        print(f"{command[0]} …", file=sys.stderr, flush=True)
        report = _reported(command)
        ratios |= {figure.name: round(figure.of(report), 3) for figure in figures}
    run = {**_machine(), "seconds": round(time.perf_counter() - began), "ratios": ratios}
    if not args.dry:
        with HISTORY.open("a") as out:
            out.write(json.dumps(run) + "\n")
    print(json.dumps(run)) if args.json else Console().print(_table(ratios, past))


def _reported(command: list[str]) -> Any:
    done = subprocess.run(
        [sys.executable, str(HERE / command[0]), *command[1:], "--json"],
        stdout=subprocess.PIPE,
        check=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
    )
    return json.loads(done.stdout)


def _machine() -> dict[str, Any]:
    return {
        "day": time.strftime("%Y-%m-%d"),
        "version": version("longretriever"),
        "python": platform.python_version(),
        "cores": os.cpu_count(),
    }


def _table(ratios: dict[str, float], past: list[dict[str, Any]]) -> Table:
    table = Table("ratio", box=None)
    for name in ("now", f"last {LAST}", ""):
        table.add_column(name, justify="right")
    for figure in (figure for _, figures in RUNS for figure in figures):
        now = ratios[figure.name]
        before = [run["ratios"][figure.name] for run in past if figure.name in run["ratios"]][-LAST:]
        usual = statistics.median(before) if before else None
        table.add_row(
            figure.name, f"{now:.2f}", "" if usual is None else f"{usual:.2f}", _verdict(figure, now, usual)
        )
    return table


def _verdict(figure: Figure, now: float, usual: float | None) -> str:
    if not usual or not now:
        return ""
    change = now / usual if figure.less_is_better else usual / now
    return "[red]worse[/]" if change > WORSE else "[green]better[/]" if change < 1 / WORSE else ""


if __name__ == "__main__":
    main()
