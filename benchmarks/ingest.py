"""Measures ingest of a log with string ids beside DuckDB's bare sort of the same file; and memory by life.

    python benchmarks/ingest.py [--events 20000000] [--memory-limit 2GB] [--repeats 3] [--json]
    python benchmarks/ingest.py --lives

The log is that of a simulated market, put in order of time, as logs come. "Ingest" numbers, sorts,
deduplicates and indexes it into a store; "bare sort" is `COPY (SELECT … ORDER BY user_id, category_id,
timestamp) TO` a Parquet file: what any such store must do at least. Both take turns, each in a process of its
own with the same threads and memory limit; times exclude imports, peak memory is that of the process, mapped
files included (Linux only). The median counts. `--lives` ingests 100,000 events at 50, 500 and 5,000 events a
user: peak memory must not grow.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import duckdb

from longretriever.market import Market, MarketConfig
from longretriever.store.ingest import ingest

WAYS = ("ingest", "bare sort")


def main() -> None:
    args = _arguments()
    if args.way:
        print(json.dumps(_measured(args.way, args.log, args.out, args.memory_limit, args.threads)))
        return
    results = _lives(args) if args.lives else _beside_a_bare_sort(args)
    print(json.dumps(results) if args.json else _table(results))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--events", type=int, default=20_000_000)
    parser.add_argument("--memory-limit", default="2GB")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--lives", action="store_true")
    parser.add_argument("--json", action="store_true")
    for hidden in ("--way", "--log", "--out"):
        parser.add_argument(hidden, help=argparse.SUPPRESS)
    return parser.parse_args()


def _beside_a_bare_sort(args: argparse.Namespace) -> list[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as folder:
        log = _log_in_order_of_time(MarketConfig.of_size(args.events, seed=1, string_ids=True), Path(folder))
        runs: dict[str, list[dict[str, Any]]] = {way: [] for way in WAYS}
        for _ in range(args.repeats):
            for way, found in runs.items():
                found.append(_in_a_process(way, log, Path(folder) / "out", args))
    rows = [{"way": way, "events": args.events, **_medians(found)} for way, found in runs.items()]
    for row in rows:
        row["ratio"] = row["seconds"] / rows[1]["seconds"]
    return rows


def _lives(args: argparse.Namespace) -> list[dict[str, Any]]:
    rows = []
    for life in (50, 500, 5_000):
        with tempfile.TemporaryDirectory() as folder:
            sizes = {"users": 100_000 // life, "least": life // 5, "most": life * 5}
            config = MarketConfig.of_size(100_000, seed=1, string_ids=True, **sizes)
            log = _log_in_order_of_time(config, Path(folder))
            runs = [_in_a_process("ingest", log, Path(folder) / "out", args) for _ in range(args.repeats)]
            rows.append({"way": "ingest", "events": 100_000, "events a user": life, **_medians(runs)})
    return rows


def _log_in_order_of_time(config: MarketConfig, folder: Path) -> Path:
    Market(config).write(folder / "market")
    limits = {"memory_limit": "4GB", "temp_directory": str(folder / "spill")}
    with duckdb.connect(config=limits) as con:
        con.execute(
            f"COPY (SELECT * FROM '{folder}/market/events.parquet' ORDER BY timestamp) "
            f"TO '{folder}/log.parquet'"
        )
    return folder / "log.parquet"


def _in_a_process(way: str, log: Path, out: Path, args: argparse.Namespace) -> dict[str, Any]:
    options = {"way": way, "log": log, "out": out, "memory-limit": args.memory_limit, "threads": args.threads}
    command = [sys.executable, __file__, *(f"--{name}={value}" for name, value in options.items())]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True)
    return dict(json.loads(done.stdout))


def _measured(way: str, log: str, out: str, memory_limit: str, threads: int) -> dict[str, float]:
    start = time.perf_counter()
    if way == "ingest":
        ingest(log, out, memory_limit=memory_limit, threads=threads)
    else:
        limits = {"memory_limit": memory_limit, "threads": threads, "temp_directory": f"{out}.spill"}
        with duckdb.connect(config=limits) as con:
            con.execute(
                f"COPY (SELECT user_id, item_id, category_id, timestamp FROM '{log}' "
                f"ORDER BY user_id, category_id, timestamp) TO '{out}.parquet'"
            )
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return {
        "seconds": time.perf_counter() - start,
        "cpu_seconds": usage.ru_utime + usage.ru_stime,
        "peak_mib": _peak_kib() / 1024,
    }


def _peak_kib() -> int:
    """Not `ru_maxrss`, which starts at what the parent process held."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0])


def _medians(runs: list[dict[str, Any]]) -> dict[str, float]:
    return {name: statistics.median(run[name] for run in runs) for name in runs[0]}


def _table(rows: list[dict[str, Any]]) -> str:
    lines = [list(rows[0])]
    lines += [
        [f"{v:,.2f}" if isinstance(v, float) else f"{v:,}" if isinstance(v, int) else v for v in row.values()]
        for row in rows
    ]
    widths = [max(len(line[n]) for line in lines) for n in range(len(lines[0]))]
    return "\n".join(
        "  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in lines
    )


if __name__ == "__main__":
    main()
