"""Spark gives the store that DuckDB gives, to the byte; on a cluster too; and what goes wrong is one line."""

from __future__ import annotations

import gzip
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from longretriever.errors import EngineFailed, EventsError, InputError, LongRetrieverError, MissingExtra
from longretriever.saved import opening
from longretriever.store.behaviors import Store
from longretriever.store.ingest import ingest
from longretriever.store.parts import Parts, check_parts

pytest.importorskip("pyspark", reason="PySpark is not installed: pip install 'longretriever[spark]'")
if not shutil.which("java"):
    pytest.skip("Spark needs Java 17, and there is none", allow_module_level=True)

from pyspark.errors import PySparkException
from pyspark.find_spark_home import _find_spark_home
from pyspark.sql import SparkSession

from longretriever.store import on_spark
from longretriever.store.on_duckdb import DuckDB
from longretriever.store.on_spark import Spark

QUICK = {"sql.codegen.wholeStage": "false", "sql.shuffle.partitions": "2", "sql.adaptive.enabled": "false"}
QUICK |= {"shuffle.io.retryWait": "200ms"}  # when a worker's files are gone with it
LIGHT = "-XX:TieredStopAtLevel=1"  # for programs of Java that live for seconds
QUICK |= {f"{who}.extraJavaOptions": LIGHT for who in ("driver", "executor")}
"""For logs of a few rows: compiling the queries would take longer than running them."""

ALONE = {**os.environ, "SPARK_LOCAL_IP": "127.0.0.1"}  # nothing here listens to the network


@pytest.fixture(scope="module")
def session() -> Iterator[SparkSession]:
    """Java once for all tests here: `Spark()` uses a session that runs."""
    settings = {"spark.master": "local[2]", "spark.app.name": "tests", "spark.ui.enabled": "false"}
    settings |= {f"spark.{name}": value for name, value in QUICK.items()} | {"spark.driver.memory": "512m"}
    session = SparkSession(on_spark._start(settings))
    SparkSession.builder.getOrCreate()  # makes it the active one
    yield session
    session.stop()


# -- logs of every kind


def as_parquet(folder: Path) -> dict[str, Any]:
    """Integer ids, milliseconds, nulls, duplicates, recategorised items; two files, an odd folder."""
    rng = np.random.default_rng(0)
    n = 600
    log = {name: rng.integers(0, top, n) for name, top in {"uid": 30, "item_id": 50, "price": 9}.items()}
    log["timestamp"] = 1_700_000_000_000 + rng.integers(0, 50, n) * 1500
    log["category_id"] = np.where(rng.random(n) < 0.2, rng.integers(0, 5, n), log["item_id"] % 5)
    table = pa.table(log | {"behavior": rng.choice(["buy", "click", ""], n)})
    holes = {
        name: pa.array([None if rng.random() < 0.02 else v for v in table[name].to_pylist()]) for name in log
    }
    table = pa.table({**holes, "behavior": table["behavior"], "tags": pa.array([["a"], None] * (n // 2))})
    table = pa.concat_tables([table, table.slice(0, 40), table.slice(7, 1).take(pa.array([0] * 9))])
    inputs = folder / "a b%20é[1]+(x)"
    inputs.mkdir()
    pq.write_table(table.slice(0, 300), inputs / "one.parquet")
    pq.write_table(table.slice(300), inputs / "two.pq")
    seen = pa.array(np.arange(60) * 1_000_000_007_000_001, pa.timestamp("ns"))
    items = {"item_id": np.arange(60), "category_id": pa.array([None if i % 7 else i % 4 for i in range(60)])}
    items |= {"title": [f"thing {i}" for i in range(60)], "category": [f"c{i % 3}" for i in range(60)]}
    items |= {"size": pa.array(np.arange(60) % 4, pa.uint8()), "seen": seen}
    pq.write_table(pa.table(items), folder / "items.parquet")
    users = {"user_id": [*range(30), 3, 3, None], "age": pa.array([*range(20, 50), 7, 7, 1], pa.int16())}
    pq.write_table(pa.table(users | {"events": [True, None, False] * 11}), folder / "users.parquet")
    sides = {name: str(folder / f"{name}.parquet") for name in ("items", "users")}
    return {"events": str(inputs), **sides, "columns": {"user_id": "uid"}, "max_rejected": 0.2}


DATES = [
    "2023-11-14 22:13:20",
    "2023-11-14T22:13:21.7Z",
    "2023/11/15 00:13:22+02:00",
    "2023-11-14",
    "soon",
    "",
]
DATES += ["2023-02-30", "2023", "2023-1-4 2:03:04", "epoch", "1_000", "1f", "1969-12-31"]


def as_text(folder: Path) -> dict[str, Any]:
    """String ids, dates, broken rows, other columns in other files; gzipped, quoted, with a mark."""
    rng = np.random.default_rng(1)
    header, rows = "user_id,item_id,category_id,timestamp\n", []
    for n in range(200):
        date = DATES[n % len(DATES)] if n % 3 == 0 else f"2023-11-{1 + n % 28:02} 10:{n % 60:02}:00"
        rows.append(f'u{rng.integers(0, 12)},"i,{rng.integers(0, 20)}",é{rng.integers(0, 3)},{date}\n')
    rows += rows[20:60]
    rows[5:5] = ['u1,"i\n7",é1,2023-11-14\n', "u1,i\n", 'u1,"i"7,é1,2023-11-14\n', "u1,i7,é1,2023-11-14,9\n"]
    (folder / "log").mkdir()
    (folder / "log/a.csv").write_text("\ufeff" + header + "".join(rows[:120]), "utf-8")
    (folder / "log/b.csv.gz").write_bytes(
        gzip.compress((header + "".join(rows[120:])).encode() + b"u1,\xe9,c,1\n")
    )
    tsv = "timestamp\tuser_id\titem_id\tcategory_id\tbehavior\n2023-11-14\tu1\ti7\té1\tbuy\n"
    (folder / "log/c.tsv").write_text(tsv)
    items = "item_id;category_id;reason;code\n" + "".join(
        f"i,{n};é{n % 3};b{n % 2};{n % 5}.0\n" for n in range(18)
    )
    (folder / "items.csv").write_text(items + "i,1;\n;é1;b;1.0\n")
    (folder / "users.tsv").write_text("user_id\tzip\n" + "".join(f"u{n}\t0{n % 4}\n" for n in range(12)))
    sides = {"items": folder / "items.csv", "users": folder / "users.tsv"}
    return {"events": folder / "log", **sides, "max_rejected": 0.9}


def as_tables(folder: Path) -> dict[str, Any]:
    """From memory: ids of floats beside strings, seconds with fractions, categoricals, more than one day."""
    rng = np.random.default_rng(2)
    n = 300
    user = pa.array(
        np.where(rng.random(n) < 0.03, rng.choice([0.5, 1e16, np.nan], n), rng.integers(0, 9, n) * 1.0)
    )
    log = {"user_id": user, "item_id": pa.array(rng.integers(0, 30, n).astype(str))}
    log["category_id"] = pa.array(rng.choice(["tea", "cake"], n)).dictionary_encode()
    log["timestamp"] = pa.array(1_700_000_000 + rng.integers(0, 9, n) + 0.5)
    log["behavior"] = pa.array(rng.integers(0, 3, n), pa.int8())
    items = pa.table({"item_id": [str(n) for n in range(30)], "shelf": [n % 4 / 2 for n in range(30)]})
    users = pa.table({"user_id": [str(n) for n in range(9)], "vip": [True, False, None] * 3})
    return {"events": pa.table(log), "items": items, "users": users, "max_rejected": 0.2}


def files_of(out: Path) -> dict[str, str]:
    return {name: file["sha256"] for name, file in opening(out, "store", verify=True).files.items()}


def both(out: Path, log: dict[str, Any], engine: Spark) -> Store:
    """The log by DuckDB and by Spark; every file, and the report, must be the same."""
    said: list[list[str]] = [[], []]
    ingest(**log, out=out / "duckdb", threads=1, progress=said[0].append)
    ingest(**log, out=out / "spark", engine=engine, progress=said[1].append)
    assert files_of(out / "spark") == files_of(out / "duckdb")
    stores = [Store.open(out / name) for name in ("duckdb", "spark")]
    assert stores[1].manifest.facts == stores[0].manifest.facts
    assert said[1] == said[0]
    return stores[1]


@pytest.mark.parametrize("form", [as_parquet, as_text, as_tables])
def test_the_same_log_is_the_same_store(
    form: Callable[[Path], dict[str, Any]], session: SparkSession, tmp_path: Path
) -> None:
    (tmp_path / "in").mkdir()
    store = both(tmp_path, form(tmp_path / "in"), Spark())
    report = store.manifest.facts["report"]
    assert report["rejected"]
    assert report["duplicates"]
    if form is as_parquet:
        assert report["recategorised"]
        assert {field.name for field in store.item_fields} == {"category", "size"}


def test_the_same_parts(session: SparkSession, tmp_path: Path) -> None:
    """Of several pieces each, so that pieces must be put together."""
    (tmp_path / "in").mkdir()
    log = as_parquet(tmp_path / "in")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(on_spark, "_ROWS_A_PIECE", 100)
        for name, engine in (("duckdb", None), ("spark", Spark())):
            ingest(**log, out=tmp_path / name, engine=engine, parts=Parts("category", 3))
            check_parts(opening(tmp_path / name, "partition", verify=True))
    fingerprints = [opening(tmp_path / name, "partition").fingerprint for name in ("duckdb", "spark")]
    assert fingerprints[0] == fingerprints[1]


def test_strings_mean_what_duckdb_says(session: SparkSession, tmp_path: Path) -> None:
    """The casts that Spark would do otherwise, or in another way from one version to the next."""
    texts = [
        "7",
        " 7 ",
        "+7",
        "17850.0",
        "2.5",
        "1e3",
        "1_000",
        "1d",
        "1f",
        "0x1F",
        "nan",
        "",
        None,
        "x",
        "2.0e400",
    ]
    texts += [*DATES, "2023-11-14 22:13:20 Europe/Berlin", "2023-11-14 24:00:00", "9223372036854775808", "９"]
    given = pa.array(texts, pa.string())
    with DuckDB().opened(tmp_path / "work", None, 1) as engine:
        said = engine.memory(pa.table({"said": given}))
        casts = {
            name: engine.fetch(said.select(meant=getattr(engine, name)(said.said)))["meant"].to_pylist()
            for name in ("integer", "number", "seconds")
        }
    frame = session.createDataFrame([(text,) for text in texts], "text string")
    functions = {
        name: on_spark.F.pandas_udf(on_spark._cast_by(name), kind)
        for name, kind in (("integer", "bigint"), ("number", "double"), ("seconds", "bigint"))
    }
    found = frame.select(*(functions[name]("text").alias(name) for name in functions)).toArrow()
    for name, expected in casts.items():
        assert found[name].to_pylist() == [None if n != n else n for n in expected]  # NaN is as good as none
    assert casts["integer"][3] == 17850
    assert casts["seconds"][texts.index("2023/11/15 00:13:22+02:00")] == 1_700_000_002


# -- what goes wrong


def test_an_error_of_the_log_is_the_same(session: SparkSession, tmp_path: Path) -> None:
    log = pa.table(
        {"user_id": [1, None, 2], "item_id": [1, 2, 2], "category_id": [1] * 3, "timestamp": [7, 8, 9]}
    )
    said = []
    for engine in (None, Spark()):
        with pytest.raises(EventsError, match=r"1 of 3 rows of the events cannot be used") as error:
            ingest(log, tmp_path / "out", engine=engine)
        said.append(str(error.value))
    assert said[0] == said[1]
    assert not list(tmp_path.iterdir())


def test_a_damaged_file_is_one_line(session: SparkSession, tmp_path: Path) -> None:
    log = pa.table(
        {name: np.arange(50_000) % 997 for name in ("user_id", "item_id", "category_id", "timestamp")}
    )
    pq.write_table(log, tmp_path / "log.parquet")
    whole = (tmp_path / "log.parquet").read_bytes()
    (tmp_path / "log.parquet").write_bytes(whole[:400] + b"\xff" * 20_000 + whole[20_400:])
    with pytest.raises(EventsError, match=r"log\.parquet.*restore a damaged file") as error:
        ingest(tmp_path / "log.parquet", tmp_path / "out", engine=Spark())
    assert "\n" not in str(error.value)
    (tmp_path / "log.csv.gz").write_bytes(
        gzip.compress(b"user_id,item_id,category_id,timestamp\n" + os.urandom(9000).hex().encode())[:-900]
    )
    with pytest.raises(EventsError, match=r"cannot be read or sorted .*log\.csv\.gz.*Restore") as error:
        ingest(tmp_path / "log.csv.gz", tmp_path / "out", engine=Spark())
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


def test_a_column_that_spark_cannot_read_is_an_error_where_it_is_used(
    session: SparkSession, tmp_path: Path
) -> None:
    """`as_parquet` has one in its events, which need it not."""
    items = pa.table({"item_id": [1, 2], "category_id": [1, 1], "tags": [["a"], ["b"]]})
    log = pa.table({"user_id": [1, 1], "item_id": [1, 2], "timestamp": [7, 8]})
    with pytest.raises(
        EventsError, match=r"column tags holds list<.*>, which Spark cannot read. Make it text"
    ):
        ingest(log, tmp_path / "out", items=items, engine=Spark())


def test_a_session_that_runs_keeps_its_limits(session: SparkSession, tmp_path: Path) -> None:
    log = pa.table({name: [1, 2] for name in ("user_id", "item_id", "category_id", "timestamp")})
    with pytest.raises(InputError, match=r"this Spark session runs already\. Set spark\.executor\.memory"):
        ingest(log, tmp_path / "out", engine=Spark(), memory_limit="1GB")
    with pytest.raises(
        InputError, match=r"a Spark session of local\[2\] runs already, local\[7\] was asked for"
    ):
        ingest(log, tmp_path / "out", engine=Spark("local[7]"))


@pytest.mark.parametrize(
    ("page", "kind", "said"),
    [
        (
            "Job aborted due to stage failure: Task 0 in stage 1.0 failed 4 times, most recent failure: Lost "
            "task 0.3 in stage 1.0 (TID 6) (10.0.0.7 executor 1): ExecutorLostFailure (executor 1 exited) "
            "Reason: worker lost\nDriver stacktrace:\n\tat org.apache.spark",
            EngineFailed,
            r"executor 1\): ExecutorLostFailure .* Reason: worker lost\)\. See why the worker",
        ),
        (
            "x\nCaused by: java.io.IOException: No space left on device\n\tat",
            EngineFailed,
            "Spark stopped .java.io.*Make room",
        ),
        ("x\njava.lang.OutOfMemoryError: Java heap space\n\tat", InputError, "Pass --memory-limit with more"),
        (
            "[PATH_NOT_FOUND] Path does not exist: file:/nowhere. SQLSTATE: 42K03",
            EventsError,
            "file:/nowhere",
        ),
        (
            "An exception was thrown from the Python worker.\nTraceback\n  File x\n"
            "longretriever.errors.EventsError: the input cannot be read (a).\n",
            EventsError,
            r"^the input cannot be read \(a\)\.$",
        ),
        (
            "Python worker\nTraceback\n  File\nValueError: odd\n\n",
            EngineFailed,
            r"^Spark stopped \(ValueError: odd\)\.$",
        ),
        ("something\n\tat org.apache", EngineFailed, r"^Spark stopped \(something\)\.$"),
    ],
)
def test_a_page_of_java_becomes_a_line(page: str, kind: type[LongRetrieverError], said: str) -> None:
    error = on_spark._of_ours(page)
    assert type(error) is kind
    assert "\n" not in str(error)
    assert re.search(said, str(error))


@pytest.mark.parametrize(("limit", "size"), [("2GB", "1907m"), ("1.5 GiB", "1536m"), ("512MB", "488m")])
def test_sizes_are_those_of_duckdb(limit: str, size: str) -> None:
    assert on_spark._size(limit) == size
    with pytest.raises(
        InputError, match=r"memory_limit='plenty' is no size. Pass a memory limit such as 2GB"
    ):
        on_spark._size("plenty")


def test_without_java_or_pyspark_it_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("JAVA_HOME", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(
        MissingExtra, match=r"needs Java 17, and none is in PATH. Install it .*openjdk-17-jre-headless"
    ):
        on_spark._need_java()
    monkeypatch.setenv("JAVA_HOME", str(tmp_path))
    with pytest.raises(MissingExtra, match=r"none is in .*/bin \(JAVA_HOME\)"):
        on_spark._need_java()
    monkeypatch.setitem(sys.modules, "pyspark", None)
    monkeypatch.delitem(sys.modules, "longretriever.store.on_spark")
    with pytest.raises(MissingExtra, match=r"needs PySpark .*pip install 'longretriever\[spark\]'"):
        from longretriever import Spark  # noqa: F401


# -- a cluster


@contextmanager
def cluster(folder: Path, workers: int) -> Iterator[tuple[str, list[subprocess.Popen[bytes]]]]:
    """A master and workers of one core each on loopback; the workers' processes, and theirs, end with it."""
    home = Path(_find_spark_home())
    env = ALONE | {"SPARK_WORKER_DIR": str(folder / "dirs"), "PYSPARK_PYTHON": sys.executable}
    env |= {"SPARK_DAEMON_JAVA_OPTS": LIGHT, "SPARK_DAEMON_MEMORY": "256m"}
    started: list[subprocess.Popen[bytes]] = []

    def start(name: str, *arguments: str) -> Path:
        log = folder / f"{name}-{len(started)}.log"
        command = [str(home / "bin/spark-class"), f"org.apache.spark.deploy.{name.lower()}.{name}", "--host"]
        with log.open("wb") as file:
            started.append(
                subprocess.Popen(
                    [*command, "127.0.0.1", "--port", "0", "--webui-port", "0", *arguments],
                    env=env,
                    stdout=file,
                    stderr=file,
                    start_new_session=True,
                )
            )
        return log

    try:
        master = wait_for(start("Master"), r"Starting Spark master at (spark://\S+)")
        logs = [start("Worker", "-c", "1", "-m", "1g", master) for _ in range(workers)]
        for log in logs:
            wait_for(log, r"(Successfully registered) with master")
        yield master, started[1:]
    finally:
        for process in started:
            stop(process)


def stop(process: subprocess.Popen[bytes]) -> None:
    """A worker takes its executors with it."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def wait_for(log: Path, pattern: str) -> str:
    for _ in range(600):
        if found := re.search(pattern, log.read_text(errors="replace")):
            return found[1]
        time.sleep(0.1)
    raise TimeoutError(f"{pattern} not in {log.read_text(errors='replace')[-2000:]}")


def command(master: str, log: Path, out: Path, *more: str) -> subprocess.Popen[str]:
    settings = " ".join(f"--conf spark.{name}={value}" for name, value in QUICK.items())
    given = ["--events", str(log), "--out", str(out), "--engine", "spark", "--spark-master", master, "--json"]
    return subprocess.Popen(
        [sys.executable, "-m", "longretriever", "ingest", *given, "--memory-limit", "512MB", *more],
        env=ALONE | {"PYSPARK_SUBMIT_ARGS": f"{settings} pyspark-shell"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_a_cluster_gives_the_same_and_outlives_a_worker(tmp_path: Path) -> None:
    """Text, so that workers run this package's code; in parts, so that they write whole stores."""
    text = "user_id,item_id,category_id,timestamp\n" + "".join(
        f"u{n % 17},{n % 23},{n % 23 % 3},2023-11-{1 + n % 28:02}{',' * (n == 77)}\n" for n in range(500)
    )
    (tmp_path / "log.csv").write_text(text)
    ingest(tmp_path / "log.csv", tmp_path / "duckdb", parts=Parts("user", 3))
    with cluster(tmp_path, 2) as (master, workers):
        running = command(
            master, tmp_path / "log.csv", tmp_path / "spark", "--parts-by", "user", "--parts", "3"
        )
        begun = ".spark.partial*/work/longretriever_*/_SUCCESS"
        while running.poll() is None and not list(tmp_path.glob(begun)):
            time.sleep(0.1)
        stop(workers[0])
        said, errors = running.communicate(timeout=240)
        assert running.returncode == 0, errors
        assert not re.search("Exception|WARN|\tat ", errors)
        assert said.count("\n") == 1
        found = [opening(tmp_path / name, "partition", verify=True) for name in ("duckdb", "spark")]
        check_parts(found[1])
        assert found[0].fingerprint == found[1].fingerprint
        assert found[0].facts == found[1].facts


def test_a_cluster_without_workers_is_an_error() -> None:
    """Spark would wait for ever; that jobs are cancelled then is Spark's own business."""
    cancelled = threading.Event()

    class Lonely:
        """What is asked of a context whose only member is its driver."""

        master = "spark://here:7077"
        _jsc = property(lambda self: self)
        sc = getExecutorMemoryStatus = lambda self: self  # noqa: N815
        size = staticmethod(lambda: 1)
        cancelAllJobs = staticmethod(cancelled.set)  # noqa: N815

    def work() -> None:
        with on_spark._watched(Lonely(), 1.0):
            assert cancelled.wait(10)
            raise PySparkException("Job 7 cancelled as part of cancellation of all jobs")

    with pytest.raises(
        EngineFailed, match=r"spark://here:7077 has had no worker for 1 s\. See that workers run"
    ):
        work()


def test_a_master_that_is_not_there_is_said_at_once() -> None:
    with pytest.raises(InputError, match=r"spark://127\.0\.0\.1:1: no Spark master answers there. Start one"):
        on_spark._reach("spark://127.0.0.1:1")
