"""Measures ingest of a log with string ids beside DuckDB's bare sort of the same file; and memory by life.

    python benchmarks/ingest.py [--events 20000000] [--memory-limit 2GB] [--repeats 3] [--json]
    python benchmarks/ingest.py --spark [--events 20000000] [--event-log FOLDER]
    python benchmarks/ingest.py --lives

The log is that of a simulated market, put in order of time, as logs come. "Ingest" numbers, sorts,
deduplicates and indexes it into a store; "bare sort" is `COPY (SELECT … ORDER BY user_id, category_id,
timestamp) TO` a Parquet file: what any such store must do at least. Both take turns, each in a process of its
own with the same threads and memory limit; times exclude imports, peak memory is that of the process, mapped
files included (Linux only). The median counts. `--spark` measures Spark beside DuckDB's ingest, on as many
cores (`local[threads]`), its Java with as much heap; its time is without the start of Java, its memory that
of Java and of Python's processes together (PSS, sampled). `--event-log` keeps what Spark writes down of
stages and shuffles, and prints those that took longest. `--lives` ingests 100,000 events at 50, 500 and 5,000
events a user: peak memory must not grow.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import duckdb
import psutil

from longretriever.market import Market, MarketConfig
from longretriever.store.ingest import ingest

WAYS = ("ingest", "bare sort")
SPARK_WAYS = ("ingest on Spark", "ingest")


def main() -> None:
    args = _arguments()
    if args.way:
        print(json.dumps(_measured(args)))
        return
    ways = SPARK_WAYS if args.spark else WAYS
    results = _lives(args) if args.lives else _in_turns(ways, args)
    print(json.dumps(results) if args.json else _table(results))
    if args.event_log:
        print(
            "\n" + _table(_stages(max(Path(args.event_log).iterdir(), key=lambda file: file.stat().st_mtime)))
        )


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--events", type=int, default=20_000_000)
    parser.add_argument("--memory-limit", default="2GB")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--lives", action="store_true")
    parser.add_argument("--spark", action="store_true")
    parser.add_argument("--event-log", default="")
    parser.add_argument("--json", action="store_true")
    for hidden in ("--way", "--log", "--out"):
        parser.add_argument(hidden, help=argparse.SUPPRESS)
    return parser.parse_args()


def _in_turns(ways: Sequence[str], args: argparse.Namespace) -> list[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as folder:
        log = _log_in_order_of_time(MarketConfig.of_size(args.events, seed=1, string_ids=True), Path(folder))
        runs: dict[str, list[dict[str, Any]]] = {way: [] for way in ways}
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
    options["event-log"] = args.event_log
    command = [sys.executable, __file__, *(f"--{name}={value}" for name, value in options.items())]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True)
    return dict(json.loads(done.stdout))


def _measured(args: argparse.Namespace) -> dict[str, float]:
    if args.way == "ingest on Spark":
        return _on_spark(args)
    start = time.perf_counter()
    if args.way == "ingest":
        ingest(args.log, args.out, memory_limit=args.memory_limit, threads=args.threads)
    else:
        limits = {"memory_limit": args.memory_limit, "threads": args.threads}
        limits["temp_directory"] = f"{args.out}.spill"
        with duckdb.connect(config=limits) as con:
            con.execute(
                f"COPY (SELECT user_id, item_id, category_id, timestamp FROM '{args.log}' "
                f"ORDER BY user_id, category_id, timestamp) TO '{args.out}.parquet'"
            )
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return {
        "seconds": time.perf_counter() - start,
        "cpu_seconds": usage.ru_utime + usage.ru_stime,
        "peak_mib": _peak_kib() / 1024,
    }


def _on_spark(args: argparse.Namespace) -> dict[str, float]:
    """With a session that has started; processor time and memory are of all processes below this one."""
    from pyspark.sql import SparkSession

    from longretriever import Spark

    os.environ["PYSPARK_PYTHON"] = sys.executable
    memory = f"{int(args.memory_limit.removesuffix('GB'))}g"
    builder = SparkSession.builder.master(f"local[{args.threads}]").config("spark.driver.memory", memory)
    builder = builder.config("spark.ui.enabled", "false").config("spark.ui.showConsoleProgress", "false")
    if args.event_log:
        Path(args.event_log).mkdir(parents=True, exist_ok=True)
        builder = builder.config("spark.eventLog.enabled", "true").config("spark.eventLog.compress", "false")
        builder = builder.config("spark.eventLog.dir", Path(args.event_log).absolute().as_uri())
    session = builder.getOrCreate()
    session.sparkContext.setLogLevel("OFF")
    used = _Used()
    before = used.cpu_seconds()
    start = time.perf_counter()
    with used:
        ingest(args.log, args.out, engine=Spark())
    seconds = time.perf_counter() - start
    found = {"seconds": seconds, "cpu_seconds": used.cpu_seconds() - before, "peak_mib": used.peak / 2**20}
    session.stop()
    return found


class _Used:
    """Memory and processor time of this process and all below it, also of those that end meanwhile."""

    def __init__(self) -> None:
        self.peak = 0
        self._over = threading.Event()
        self._time: dict[int, float] = {}

    def _look(self) -> None:
        while not self._over.wait(0.5):
            self.peak = max(self.peak, sum(self._memory(process) for process in self._processes()))
            self.cpu_seconds()

    def _processes(self) -> list[psutil.Process]:
        return [psutil.Process(), *psutil.Process().children(recursive=True)]

    def _memory(self, process: psutil.Process) -> int:
        with suppress(psutil.Error, OSError):
            return int(process.memory_full_info().pss)
        return 0

    def cpu_seconds(self) -> float:
        for process in self._processes():
            with suppress(psutil.Error):
                times = process.cpu_times()
                self._time[process.pid] = times.user + times.system
        return sum(self._time.values())

    def __enter__(self) -> None:
        self._thread = threading.Thread(target=self._look)
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()


def _stages(log: Path) -> list[dict[str, Any]]:
    """The stages of an event log that took longest, with what they shuffled and spilled, in MiB."""
    files = sorted(log.glob("events_*")) if log.is_dir() else [log]
    events = [json.loads(line) for file in files for line in file.read_text().splitlines()]
    done = [event["Stage Info"] for event in events if event["Event"] == "SparkListenerStageCompleted"]
    rows = []
    for stage in done:
        found = {a["Name"].removeprefix("internal.metrics."): a["Value"] for a in stage["Accumulables"]}
        mib = {
            name: float(found.get(key, 0)) / 2**20
            for name, key in (
                ("read", "input.bytesRead"),
                ("written", "output.bytesWritten"),
                ("shuffle read", "shuffle.read.localBytesRead"),
                ("shuffle write", "shuffle.write.bytesWritten"),
                ("spilled", "diskBytesSpilled"),
            )
        }
        seconds = (stage["Completion Time"] - stage["Submission Time"]) / 1000
        scopes = [json.loads(rdd["Scope"])["name"] for rdd in stage["RDD Info"] if "Scope" in rdd]
        steps = " < ".join(dict.fromkeys(scope.strip().split(" (")[0] for scope in scopes))
        rows.append({"seconds": seconds, "tasks": stage["Number of Tasks"], **mib, "steps": steps})
    rows.sort(key=lambda row: -row["seconds"])
    return rows[:10]


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
