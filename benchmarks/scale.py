"""Takes logs of several sizes the whole way, each stage in a process of its own: time, memory, disk, growth.

    python benchmarks/scale.py --sizes 1M,3M,10M [--work FOLDER] [--minutes 2] [--json]
    python benchmarks/scale.py --sizes 10M,30M,100M --evaluate

A log of n events has n / 100 users, n / 25 items and categories to suit: 100M are 1M users and 4M items. The
stages are the commands of the package, as an operator would run them:

generate    the log
bare sort   DuckDB orders the same file by user, category and time and writes it: what ingest is measured by
ingest      the store
train       for `--minutes`; "epoch" is the time that all samples would take at that speed
index
retrieve    all candidates of one user, the start of the program included
evaluate    (with --evaluate) split, store, training for `--minutes`, all protocols and rivals

"own" is the peak of memory that is no file's (anonymous), "peak" of all that is resident: pages of mapped
files are given back where memory is short. `--work` keeps what was made and its figures, so a run that was
stopped goes on. Growth is the time per event against that of the smallest log.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import psutil
from rich.console import Console
from rich.table import Table
from serving import memory_of

SAMPLED = 0.05  # seconds between looks at the memory
SORT = """
import sys, duckdb
log, out, threads = sys.argv[1:]
limits = {"memory_limit": "2GB", "threads": threads, "temp_directory": out + ".spill"}
with duckdb.connect(config=limits) as con:
    con.execute(f"COPY (SELECT user_id, item_id, category_id, timestamp FROM '{log}' "
                f"ORDER BY user_id, category_id, timestamp) TO '{out}'")
"""


def main() -> None:
    args = _arguments()
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(args.work or temporary)
        rows = [row for size in args.sizes for row in _whole_way(size, work / f"{size:_}", args)]
    _grown(rows)
    print(json.dumps(rows, indent=1)) if args.json else Console().print(_table(rows))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sizes", type=_sizes, default=_sizes("1M,3M,10M"), help="events, such as 10M,30M")
    parser.add_argument("--work", type=Path, help="keep logs, stores, models and figures here")
    parser.add_argument("--minutes", type=float, default=2.0, help="of each training")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--evaluate", action="store_true")
    parser.add_argument("--keep", action="store_true", help="also the logs and sorted files")
    parser.add_argument("--json", action="store_true")
    return parser.parse_args()


def _sizes(text: str) -> list[int]:
    factor = {"k": 1_000, "M": 1_000_000}
    return [int(float(one.rstrip("kM")) * factor.get(one[-1], 1)) for one in text.split(",")]


def _whole_way(events: int, folder: Path, args: argparse.Namespace) -> list[dict[str, Any]]:
    folder.mkdir(parents=True, exist_ok=True)
    log, store, model = folder / "log", folder / "store", folder / "model"
    files = [f"--{name}={log}/{name}.parquet" for name in ("events", "items", "users")]
    speed = ["--threads", str(args.threads)]
    taught = ["--minutes", str(args.minutes), *speed]
    plan: list[tuple[str, list[str], Path]] = [
        ("generate", _command("generate", str(log), "--events", str(events)), log),
        ("bare sort", _sort(log, folder / "sorted.parquet", args.threads), folder / "sorted.parquet"),
        ("ingest", _command("ingest", *files, "--out", str(store), *speed), store),
        ("train", _command("train", str(store), "--out", str(model), *taught), model),
        ("index", _command("index", str(model)), model / "index"),
        ("retrieve", _command("retrieve", str(model), "--user", "7"), model),
    ]
    if args.evaluate:
        work = folder / "evaluation"
        plan.append(("evaluate", _command("evaluate", *files, "--work", str(work), *taught), work))
    figures = folder / "figures.json"
    done: dict[str, Any] = json.loads(figures.read_text()) if figures.exists() else {}
    for stage, command, made in plan:
        if stage not in done:
            print(f"{events:,} events: {stage}", file=sys.stderr, flush=True)
            done[stage] = {"events": events, "stage": stage, **_measured(command, made)}
            if stage == "train":
                done[stage] |= _learned(model)
            figures.write_text(json.dumps(done))
    if not args.keep:
        shutil.rmtree(log, ignore_errors=True)
        (folder / "sorted.parquet").unlink(missing_ok=True)
    return [done[stage] for stage, *_ in plan]


def _command(*words: str) -> list[str]:
    return [sys.executable, "-m", "longretriever", *words, "--json"]


def _sort(log: Path, out: Path, threads: int) -> list[str]:
    return [sys.executable, "-c", SORT, str(log / "events.parquet"), str(out), str(threads)]


def _measured(command: list[str], made: Path) -> dict[str, float]:
    """Seconds, and MB: the peaks of memory, its own and all, and what it left on the disk."""
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    told: list[str] = []
    reader = threading.Thread(target=lambda: told.extend(process.stderr or ()))
    reader.start()
    own = peak = 0
    while process.poll() is None:
        found = _memory(process.pid)
        own, peak = max(own, found["Anonymous"]), max(peak, found["Rss"])
        time.sleep(SAMPLED)
    seconds = time.perf_counter() - start
    reader.join()
    if process.returncode:
        raise RuntimeError(f"{' '.join(command)}: {''.join(told[-5:])}")
    return {"seconds": seconds, "own_mb": own / 1e3, "peak_mb": peak / 1e3, "disk_mb": _on_disk(made) / 1e6}


def _memory(pid: int) -> Counter[str]:
    """kB by kind, of a process and its children."""
    try:
        process = psutil.Process(pid)
        kinds = [memory_of(one.pid) for one in (process, *process.children(recursive=True))]
    except (psutil.Error, OSError):  # it has just ended
        return Counter()
    return sum(map(Counter, kinds), start=Counter())


def _on_disk(path: Path) -> int:
    files = path.rglob("*") if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files if file.is_file())


def _learned(model: Path) -> dict[str, float]:
    """How fast contexts were learned, and how long one epoch of all samples would take."""
    facts = json.loads((model / "manifest.json").read_text())["facts"]
    at = facts["training"]
    speed = at["samples"] / at["seconds"]
    return {"samples_a_second": speed, "epoch_minutes": facts["samples_of_epoch"] / speed / 60}


def _grown(rows: list[dict[str, Any]]) -> None:
    """Beside each row: the time of an event against the smallest log's, and against the bare sort."""
    seconds = {(row["stage"], row["events"]): row["seconds"] for row in rows}
    least = min(row["events"] for row in rows)
    for row in rows:
        row["growth"] = row["seconds"] / row["events"] / (seconds[row["stage"], least] / least)
        if row["stage"] == "ingest":
            row["times_sort"] = row["seconds"] / seconds["bare sort", row["events"]]


def _table(rows: list[dict[str, Any]]) -> Table:
    table = Table("events", "stage", box=None)
    for name in ("seconds", "own MB", "peak MB", "disk MB", "growth"):
        table.add_column(name, justify="right")
    table.add_column("")
    for row in rows:
        more = ""
        if "times_sort" in row:
            more = f"{row['times_sort']:.2f} times the sort"
        if "epoch_minutes" in row:
            more = f"{row['samples_a_second']:,.0f} samples/s, an epoch {row['epoch_minutes']:,.0f} min"
        growth = f"{row['growth']:.2f}" if row["stage"] not in ("train", "retrieve", "evaluate") else ""
        sizes = [f"{row[name]:,.0f}" for name in ("own_mb", "peak_mb", "disk_mb")]
        table.add_row(f"{row['events']:,}", row["stage"], f"{row['seconds']:,.1f}", *sizes, growth, more)
    return table


if __name__ == "__main__":
    main()
