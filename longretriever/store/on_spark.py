"""How does Spark do what ingest asks? Executors read, sort and write; the driver holds ids and features.

What passes through the driver: the ids, categories and features of items and users, counts, and rejected
rows. Events do not: each executor sorts whole users and writes their arrays beside the output, on a file
system that all machines must see, which is checked. Numbers are given by a range sort and offsets, not by a
window without partitions, which Spark would run in one task. What strings mean is asked of DuckDB in the
executors' Python (`cast_query`, `read_text`), because Spark reads "1f" as a number and "2023/11/14" as none:
so both engines give the same bytes.
"""

from __future__ import annotations

import itertools
import logging
import os
import re
import shutil
import socket
import sys
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import duckdb
import ibis
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from ibis.expr.operations import ScalarUDF

from longretriever.errors import EngineFailed, EventsError, InputError, LongRetrieverError, MissingExtra
from longretriever.store.engine import AT, FILE, PIECE, Engine
from longretriever.store.on_duckdb import BAD_LINE, BAD_REASON, BAD_ROW, cast_query, read_text

try:
    import pandas as pd
    from py4j.protocol import Py4JError
    from pyspark import SparkConf, SparkContext
    from pyspark.errors import PySparkException
    from pyspark.java_gateway import launch_gateway
    from pyspark.sql import DataFrame, SparkSession
    from pyspark.sql import functions as F
    from pyspark.sql import types as T
except ImportError as error:
    raise MissingExtra(
        f"the engine spark needs PySpark ({error}). Install it with `pip install 'longretriever[spark]'`."
    ) from error

_ROWS_A_PIECE = 4_000_000
_ROWS_A_BATCH = 1 << 16
_PLAIN_TYPES = {
    pa.bool_(): T.BooleanType(),
    pa.int8(): T.ByteType(),
    pa.int16(): T.ShortType(),
    pa.int32(): T.IntegerType(),
    pa.int64(): T.LongType(),
    pa.uint8(): T.ShortType(),
    pa.uint16(): T.IntegerType(),
    pa.uint32(): T.LongType(),
    pa.uint64(): T.DecimalType(20, 0),
    pa.float32(): T.FloatType(),
    pa.float64(): T.DoubleType(),
    pa.string(): T.StringType(),
    pa.large_string(): T.StringType(),
    pa.string_view(): T.StringType(),
    pa.binary(): T.BinaryType(),
    pa.large_binary(): T.BinaryType(),
    pa.date32(): T.DateType(),
    pa.null(): T.IntegerType(),
}
_names = (f"longretriever_{n}" for n in itertools.count())


@dataclass(frozen=True)
class Spark:
    """The engine of a cluster.

    `master`: such as "local[4]" or "spark://host:7077"; None is what the session that runs already,
    spark-submit or Spark's own configuration says, and else all cores of this machine. `patience`: seconds to
    wait for a first worker, and for another one when all were lost.
    """

    master: str | None = None
    patience: float = 60.0

    @contextmanager
    def opened(self, work: Path, memory_limit: str | None, threads: int | None) -> Iterator[Engine]:
        """Raises `MissingExtra` without Java, `InputError` where there is no cluster or it sees other files.

        `memory_limit` is that of the driver where it does the work (local), else of each executor; `threads`
        the cores to use, in all. Raises `EngineFailed` when workers die, or a disk is full.
        """
        work.mkdir(parents=True, exist_ok=True)
        try:
            with _said_in_one_line(), self._session(memory_limit, threads) as session:
                context = session.sparkContext
                local = context.master.startswith("local")
                with _watched(context, 0 if local else self.patience):
                    running = _Running(session, work)
                    if not local:
                        _send_package(context, work)
                        running.check_shared()
                    yield running
        finally:
            shutil.rmtree(work, ignore_errors=True)

    @contextmanager
    def _session(self, memory_limit: str | None, threads: int | None) -> Iterator[SparkSession]:
        """A session of our own settings; one that runs already lends its context and is left running."""
        active = SparkSession.getActiveSession()
        if active is not None and self.master in (None, active.sparkContext.master):
            if memory_limit is not None:
                raise InputError(
                    f"memory_limit={memory_limit!r}: this Spark session runs already. "
                    "Set spark.executor.memory where it is started."
                )
            yield active.newSession()
            return
        if active is not None:
            raise InputError(
                f"a Spark session of {active.sparkContext.master} runs already, {self.master} was asked for. "
                "Stop that one, or leave the master out."
            )
        _reach(self.master)
        context = _start(self._settings(memory_limit, threads))
        try:
            yield SparkSession(context).newSession()
        finally:
            with suppress(Exception):  # where it died, that has been said
                context.stop()

    def _settings(self, memory_limit: str | None, threads: int | None) -> dict[str, str]:
        settings = {"spark.app.name": "longretriever ingest", "spark.driver.maxResultSize": "0"}
        settings |= {"spark.ui.enabled": "false", "spark.ui.showConsoleProgress": "false"}
        master = self.master
        if master is None and threads is not None and "PYSPARK_GATEWAY_PORT" not in os.environ:
            master = f"local[{threads}]"
        elif threads is not None and not (master or "").startswith("local"):
            settings["spark.cores.max"] = str(threads)
        if master is not None:
            settings["spark.master"] = master
        if memory_limit is not None:  # where the master is Spark's secret, both
            for who, works in (("driver", master is None or master.startswith("local")), ("executor", True)):
                settings |= {f"spark.{who}.memory": _size(memory_limit)} if works else {}
        return settings


def _size(limit: str) -> str:
    """ "2GB", as DuckDB writes it, for Spark."""
    units = {
        "KB": 1e3,
        "MB": 1e6,
        "GB": 1e9,
        "TB": 1e12,
        "KIB": 2**10,
        "MIB": 2**20,
        "GIB": 2**30,
        "TIB": 2**40,
    }
    found = re.fullmatch(r"(\d+(?:\.\d+)?) *([a-zA-Z]+)", limit.strip())
    if not found or found[2].upper() not in units:
        raise InputError(f"memory_limit={limit!r} is no size. Pass a memory limit such as 2GB.")
    return f"{max(1, int(float(found[1]) * units[found[2].upper()] / 2**20))}m"


# -- starting


def _reach(master: str | None) -> None:
    """Spark itself would try for a minute, and then say it in a page."""
    if master is None or not master.startswith("spark://"):
        return
    for host, _, port in (place.rpartition(":") for place in master.removeprefix("spark://").split(",")):
        with suppress(OSError, ValueError), socket.create_connection((host, int(port)), timeout=5):
            return
    raise InputError(f"{master}: no Spark master answers there. Start one, or pass another --spark-master.")


def _start(settings: Mapping[str, str]) -> SparkContext:
    """A context whose Java says nothing of its own: what matters comes back as an exception."""
    for logger in ("SQLQueryContextLogger", "DataFrameQueryContextLogger", "py4j"):
        logging.getLogger(logger).setLevel(logging.CRITICAL)  # they print the Java page beside the exception
    conf = SparkConf(loadDefaults=False).setAll(list(settings.items()))
    os.environ.setdefault("PYSPARK_PYTHON", sys.executable)
    if SparkContext._gateway is not None:  # Java of an earlier ingest in this process
        return SparkContext(conf=conf)
    if "PYSPARK_GATEWAY_PORT" not in os.environ:
        _need_java()
    with tempfile.TemporaryFile() as log:
        try:
            gateway = launch_gateway(conf, popen_kwargs={"stdout": log, "stderr": log})
            context = SparkContext(gateway=gateway, conf=conf)
        except PySparkException as error:
            log.seek(0)
            lines = [line for line in log.read().decode(errors="replace").splitlines() if "Exception" in line]
            raise EngineFailed(
                f"Spark does not start ({_shortened(lines[0] if lines else str(error))}). It wants Java 17."
            ) from error
    context.setLogLevel("OFF")
    return context


def _need_java() -> None:
    home = os.environ.get("JAVA_HOME")
    if not (shutil.which("java", path=f"{home}/bin") if home else shutil.which("java")):
        raise MissingExtra(
            f"the engine spark needs Java 17, and none is in {f'{home}/bin (JAVA_HOME)' if home else 'PATH'}."
            " Install it (on Debian `apt install openjdk-17-jre-headless`), or set JAVA_HOME."
        )


def _send_package(context: SparkContext, work: Path) -> None:
    """The workers run this very code; what it imports they must have."""
    root = Path(__file__).parents[1]
    package = shutil.make_archive(str(work / "longretriever"), "zip", root.parent, root.name)
    context.addPyFile(package)


@contextmanager
def _watched(context: SparkContext, patience: float) -> Iterator[None]:
    """Spark waits for ever for workers; here a cluster without any is an error after `patience` seconds."""
    if not patience:
        yield
        return
    over, lost = threading.Event(), threading.Event()

    def watch() -> None:
        alone = 0.0
        while not over.wait(0.5):
            with suppress(Exception):  # it may have stopped
                executors = context._jsc.sc().getExecutorMemoryStatus().size() - 1  # the driver is one
                alone = 0.0 if executors else alone + 0.5
                if alone >= patience:
                    lost.set()
                    context.cancelAllJobs()

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield
    except (PySparkException, Py4JError) as error:
        if lost.is_set():
            raise EngineFailed(
                f"{context.master} has had no worker for {patience:.0f} s. See that workers run, have cores "
                "and memory left, and can reach this machine; then ingest again: nothing was written."
            ) from error
        raise
    finally:
        over.set()
        watcher.join()


# -- errors

_CAUSES: tuple[tuple[str, type[LongRetrieverError], str], ...] = (
    (
        r"No space left on device",
        EngineFailed,
        "Make room beside the output, and in the workers' spark.local.dir",
    ),
    (
        r"OutOfMemoryError|Java heap space|GC overhead limit|System memory \d+ must be",
        InputError,
        "Pass --memory-limit with more",
    ),
    (
        r"ExecutorLostFailure|Python worker exited unexpectedly|SparkContext was (?:shut down|stopped)|"
        r"stopped SparkContext|Answer from Java side is empty|Error while sending or receiving|"
        r"Connection refused|Master removed our application|All masters are unresponsive",
        EngineFailed,
        "See why the worker or the driver died (often memory), and ingest again: nothing was written",
    ),
    (
        r"PATH_NOT_FOUND|FAILED_READ_FILE|Permission denied|FileNotFound|does not exist",
        EventsError,
        "All workers must be able to read the input; restore a damaged file, or leave it out",
    ),
)


@contextmanager
def _said_in_one_line() -> Iterator[None]:
    try:
        yield
    except (PySparkException, Py4JError) as error:
        raise _of_ours(str(error)) from error


def _of_ours(page: str) -> LongRetrieverError:
    """The error that a page of Java and Python means."""
    if found := re.search(r"longretriever\.errors\.(?:\w+): (.+)", page):  # an executor's own
        return EventsError(found[1].strip())
    if found := re.search(r"\[USER_RAISED_EXCEPTION\] (.+?)(?: SQLSTATE.*)?\n", page + "\n"):
        return EventsError(found[1])
    for pattern, kind, advice in _CAUSES:
        if found := re.search(pattern, page):
            return kind(f"Spark stopped ({_shortened(_line_at(page, found.start()))}). {advice}.")
    lines = [line.strip() for line in page.splitlines() if line.strip()]
    python = [line for line in lines if re.match(r"[\w.]+(?:Error|Exception): ", line)]
    return EngineFailed(f"Spark stopped ({_shortened((python or lines)[-1] if python else lines[0])}).")


def _line_at(page: str, at: int) -> str:
    """The line that this place is in, without what stands before its last cause."""
    line = page[page.rfind("\n", 0, at) + 1 :].split("\n", 1)[0]
    return line.split("most recent failure: ")[-1].removeprefix("Caused by: ")


def _shortened(line: str) -> str:
    return re.sub(r"\s+", " ", line).strip().rstrip(".")[:300]


# -- the engine


@ibis.udf.scalar.builtin(name="longretriever_integer")
def _integer(text: str) -> int:
    raise NotImplementedError  # Spark has it under this name


@ibis.udf.scalar.builtin(name="longretriever_number")
def _number(text: str) -> float:
    raise NotImplementedError  # Spark has it under this name


@ibis.udf.scalar.builtin(name="longretriever_seconds")
def _seconds(text: str) -> int:
    raise NotImplementedError  # Spark has it under this name


@ibis.udf.scalar.builtin(name="longretriever_digits")
def _digits(number: float) -> str:
    raise NotImplementedError  # Spark has it under this name


class _Running:
    def __init__(self, session: SparkSession, work: Path) -> None:
        self._session, self._work = session, work.absolute()
        settings = {"ansi.enabled": "true", "legacy.parquet.nanosAsLong": "true", "caseSensitive": "false"}
        settings["execution.arrow.maxRecordsPerBatch"] = str(_ROWS_A_BATCH)
        settings["files.ignoreCorruptFiles"] = settings["files.ignoreMissingFiles"] = "false"
        for name, value in settings.items():
            session.conf.set(f"spark.sql.{name}", value)
        self._con = ibis.pyspark.connect(session)
        for name, dtype in {"integer": "bigint", "number": "double", "seconds": "bigint"}.items():
            session.udf.register(f"longretriever_{name}", F.pandas_udf(_cast_by(name), dtype))
        session.udf.register("longretriever_digits", F.pandas_udf(_written_out, "string"))

    def check_shared(self) -> None:
        """Every worker must see what this machine writes, and this machine what they write."""
        folder = self._work / "seen"
        folder.mkdir()
        (folder / "driver").touch()

        def look(number: int) -> str:
            with suppress(OSError):
                (folder / str(number)).touch()
            return "" if (folder / "driver").exists() else socket.gethostname()

        n = 2 * self._session.sparkContext.defaultParallelism
        blind = sorted({host for host in self._told(look, n) if host})
        if blind or any(not (folder / str(number)).exists() for number in range(n)):
            raise InputError(
                f"{', '.join(blind) or 'a worker'} does not share the folder {self._work.parent} with this "
                "machine. Put the output on a file system that all workers see at the same path."
            )

    # -- reading

    def parquet(self, files: Sequence[Path]) -> Any:
        given = {str(file.absolute()): str(file) for file in files}
        root = None
        if all("=" in path for path in given):  # dt=2023-11-14/part.parquet: the folder says a column
            root = os.path.commonpath([os.path.dirname(path[: path.index("=")]) for path in given])
        frame = self._parquet(list(given), pq.read_schema(files[0]), root)
        names = F.create_map(*(F.lit(text) for pair in given.items() for text in pair))
        uri = F.regexp_replace(F.regexp_replace(F.col("_metadata.file_path"), "^file:/+", "/"), r"\+", "%2B")
        place = F.col("_metadata.row_index").cast("bigint") + 1
        return self._view(frame.withColumns({FILE: F.element_at(names, F.url_decode(uri)), AT: place}))

    def _parquet(self, paths: list[str], schema: pa.Schema, root: str | None = None) -> DataFrame:
        """What Spark has no type for is an error where it is used, and only there."""
        types = {field.name: _type_of(field.type) for field in schema}
        readable = T.StructType([T.StructField(name, dtype) for name, dtype in types.items() if dtype])
        reader = self._session.read.schema(readable)
        if root is not None:
            reader = reader.option("basePath", _literally(root))
        frame = reader.parquet(*map(_literally, paths))
        made = {}
        for field in schema:
            if types[field.name] is None:
                said = f"column {field.name} holds {field.type}, which Spark cannot read. Make it text."
                made[field.name] = F.raise_error(F.lit(said)).cast("string")
            elif pa.types.is_timestamp(field.type) and field.type.unit == "ns":
                made[field.name] = F.timestamp_micros(F.expr(f"`{field.name}` div 1000"))
        return frame.withColumns(made) if made else frame

    def text(
        self, files: Sequence[Path], delimiter: str, names: Sequence[str], taken: Mapping[str, str]
    ) -> tuple[Any, Any]:
        """A file is a task: where a line ends can only be told by reading from the beginning."""
        texts = {**dict.fromkeys(taken, T.StringType()), FILE: T.StringType(), AT: T.LongType()}
        texts |= {BAD_ROW: T.LongType(), BAD_REASON: T.StringType(), BAD_LINE: T.StringType()}
        paths, columns = [(file.absolute(), str(file)) for file in files], list(texts)

        def parse(batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
            for number in (n for batch in batches for n in batch["id"].to_pylist()):
                file, shown = paths[number]
                for rows in read_text(file, shown, delimiter, names, taken):
                    yield rows.select(columns)

        schema = T.StructType([T.StructField(name, dtype) for name, dtype in texts.items()])
        rows = self._stored(self._numbers(len(files)).mapInArrow(parse, schema))
        good, bad = rows.filter(rows[BAD_ROW].isnull()), rows.filter(rows[BAD_ROW].notnull())
        broken = bad.select(FILE, row=BAD_ROW, reason=BAD_REASON, line=BAD_LINE)
        return good.drop(BAD_ROW, BAD_REASON, BAD_LINE), broken

    def memory(self, rows: pa.Table) -> Any:
        file = self._work / f"{next(_names)}.parquet"
        pq.write_table(rows, file)
        return self._view(self._parquet([str(file)], rows.schema))

    # -- computing

    def keep(self, expression: Any) -> Any:
        """As Parquet beside the output, not in the executors' memory: it outlives a worker that dies."""
        return self._stored(self._frame(expression))

    def named(self, expression: Any) -> Any:
        """What Python computes, row by row, is kept, or each use would pay for it anew."""
        if expression.op().find(ScalarUDF):
            return self.keep(expression)
        return self._con.create_view(next(_names), expression)

    def numbered(self, table: Any, by: Sequence[str], name: str) -> Any:
        """Sorted by ranges, counted within each, and shifted by those before."""
        rows = self._frame(table).sort(*by)
        place = {
            "part#": F.spark_partition_id(),
            "at#": F.monotonically_increasing_id().bitwiseAND((1 << 33) - 1),
        }
        kept = self._stored(rows.withColumns(place))
        sizes = self.fetch(kept.group_by("part#").agg(size=kept.count()).order_by("part#"))
        part, size = sizes["part#"].to_pylist(), sizes["size"].to_numpy()
        shift = np.cumsum(size) - size
        which = [(kept["part#"] == p, int(by_)) for p, by_ in zip(part, shift, strict=True)]
        start = ibis.cases(*which, else_=0) if which else ibis.literal(0)
        return self.named(kept.mutate(**{name: (start + kept["at#"]).cast("int32")}).drop("part#", "at#"))

    def fetch(self, expression: Any) -> pa.Table:
        """Times without their zone, which is always UTC here."""
        table = self._frame(expression.as_table()).toArrow()
        for at, field in enumerate(table.schema):
            if pa.types.is_timestamp(field.type):
                table = table.set_column(at, field.name, table[at].cast(pa.timestamp("us")))
        return table

    def batches(self, expression: Any) -> Iterable[pa.RecordBatch]:
        return self.fetch(expression).to_batches()

    def integer(self, text: Any) -> Any:
        return _integer(text)

    def number(self, text: Any) -> Any:
        return _number(text)

    def seconds(self, text: Any) -> Any:
        return _seconds(text)

    def as_text(self, value: Any) -> Any:
        if not value.type().is_floating():
            return value.cast("string")
        return ibis.ifelse((value == value).isnull(), ibis.null("string"), _digits(value.cast("float64")))

    # -- writing

    def pieces(self, rows: int) -> int:
        return max(self._session.sparkContext.defaultParallelism, -(-rows // _ROWS_A_PIECE))

    def write_pieces(
        self,
        rows: Any,
        order: Sequence[str],
        write: Callable[[int, Iterable[pa.RecordBatch]], None],
        pieces: int,
    ) -> None:
        frame = self._frame(rows)
        if pieces == 1:
            frame = frame.withColumn(PIECE, F.lit(0))
        keys = F.array(*(F.lit(key) for key in self._keys_of_tasks(pieces)))
        frame = frame.withColumn("task#", F.element_at(keys, F.col(PIECE) + 1)).repartition(pieces, "task#")
        frame = frame.sortWithinPartitions(*order).select(PIECE, "user", "item", "time", "behavior")

        def write_one(batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
            filled = (batch for batch in batches if batch.num_rows)
            first = next(filled, None)
            if first is None:
                return
            number = first[PIECE][0].as_py()

            def own() -> Iterator[pa.RecordBatch]:
                for batch in itertools.chain([first], filled):
                    if (batch[PIECE].to_numpy() != number).any():
                        raise RuntimeError(f"rows of another piece than {number} in its task")
                    yield batch

            write(number, own())
            yield pa.RecordBatch.from_pydict({PIECE: pa.array([number], pa.int32())})

        written = frame.mapInArrow(write_one, f"{PIECE} int").toArrow()[PIECE].to_pylist()
        for piece in set(range(pieces)) - set(written):
            write(piece, [])

    def _keys_of_tasks(self, n: int) -> list[int]:
        """[n] integers that Spark's hash sends to task 0, 1 .. of n: it has no other way to name a task."""
        rows = self._session.range(0, 50 * n + 50).select(F.col("id").cast("int").alias("key"))
        task = F.pmod(F.hash("key"), F.lit(n)).alias("task")
        found = rows.groupBy(task).agg(F.min("key").alias("key")).orderBy("task").toArrow()
        if found["task"].to_pylist() != list(range(n)):
            raise RuntimeError(f"no key for some task of {n}")
        return list(found["key"].to_pylist())

    def each(self, work: Callable[[int], None], n: int) -> None:
        def do(number: int) -> str:
            work(number)
            return ""

        self._told(do, n)

    def _told(self, ask: Callable[[int], str], n: int) -> list[str]:
        """What `ask` says of 0.. n - 1, each in a task of its own."""

        def answer(batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
            for batch in batches:
                yield pa.RecordBatch.from_pydict({"told": [ask(n) for n in batch["id"].to_pylist()]})

        return list(self._numbers(n).mapInArrow(answer, "told string").toArrow()["told"].to_pylist())

    # -- between Ibis and Spark

    def _numbers(self, n: int) -> DataFrame:
        return self._session.range(0, n, 1, n)

    def _frame(self, expression: Any) -> DataFrame:
        return self._session.sql(self._con.compile(expression))

    def _stored(self, frame: DataFrame) -> Any:
        path = (self._work / next(_names)).as_uri()
        frame.write.parquet(path)
        return self._view(self._session.read.schema(frame.schema).parquet(path))

    def _view(self, frame: DataFrame) -> Any:
        name = next(_names)
        frame.createOrReplaceTempView(name)
        return self._con.table(name)


def _literally(path: str) -> str:
    """A path on this machine, for Spark, which would take [1] for a pattern."""
    return "file://" + re.sub(r"([\[\]{}*?\\])", r"\\\1", path)


def _type_of(dtype: pa.DataType) -> T.DataType | None:
    """How Spark reads a column of a Parquet file; None where it cannot."""
    if pa.types.is_dictionary(dtype):
        return _type_of(dtype.value_type)
    if pa.types.is_timestamp(dtype):
        if dtype.unit == "ns":
            return T.LongType()
        return T.TimestampType() if dtype.tz else T.TimestampNTZType()
    if pa.types.is_duration(dtype):
        return T.LongType()
    if pa.types.is_decimal128(dtype):
        return T.DecimalType(dtype.precision, dtype.scale)
    return _PLAIN_TYPES.get(dtype)


def _cast_by(name: str) -> Callable[[pd.Series], pd.Series]:
    query = cast_query(name)

    def cast(texts: pd.Series) -> pd.Series:
        with duckdb.connect(config={"threads": 1, "autoinstall_known_extensions": False}) as con:
            con.execute("SET TimeZone = 'UTC'")
            con.register("given", pa.table({"said": pa.array(texts, pa.string(), from_pandas=True)}))
            found = con.sql(query).to_arrow_table()["meant"]
        return found.to_pandas(integer_object_nulls=True)

    return cast


def _written_out(numbers: pd.Series) -> pd.Series:
    """As DuckDB and Python write a float64."""
    return numbers.map(float.__repr__).astype(object)
