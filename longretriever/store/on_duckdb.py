"""How does DuckDB do what ingest asks? In this process, within a memory limit; beyond it, it spills.

It also says what text means for every engine: a Spark worker parses a text file, and casts strings, with the
functions at the end of this file, so a broken row or an odd date is the same whatever runs the rest.
"""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import duckdb
import ibis
import pyarrow as pa

from longretriever.errors import EventsError, InputError
from longretriever.store.engine import AT, BROKEN, FILE, PIECE, Engine

_UTC = "timestamp('UTC')"  # a cast to it heeds "+02:00", one to a plain timestamp would not
BAD_ROW, BAD_REASON, BAD_LINE = "bad row#", "bad reason#", "bad line#"
_names = (f"longretriever_{n}" for n in itertools.count())


@dataclass(frozen=True)
class DuckDB:
    """The engine of one machine, and the default."""

    @contextmanager
    def opened(self, work: Path, memory_limit: str | None, threads: int | None) -> Iterator[Engine]:
        """Raises `InputError` for limits that are none or too small, `EventsError` for damaged files."""
        given = {"memory_limit": memory_limit, "threads": threads}
        options = {name: value for name, value in given.items() if value is not None}
        work.mkdir(parents=True, exist_ok=True)
        try:
            con = ibis.duckdb.connect(temp_directory=str(work), autoinstall_known_extensions=False, **options)
        except duckdb.Error as error:
            raise InputError(f"{options}: {_first_line(error)}. Pass a memory limit such as 2GB.") from error
        try:
            with said_in_one_line(memory_limit):
                yield _Running(con)
        finally:
            con.disconnect()
            shutil.rmtree(work, ignore_errors=True)


@contextmanager
def said_in_one_line(memory_limit: str | None = None) -> Iterator[None]:
    """Errors of DuckDB that its input or the machine is to blame for, as ours."""
    try:
        yield
    except duckdb.OutOfMemoryException as error:
        raise InputError(
            f"{memory_limit or 'the memory of this machine'} is too little for this log "
            f"({_first_line(error)}). Pass --memory-limit with more, or --threads with fewer."
        ) from error
    except (duckdb.BinderException, duckdb.ParserException, duckdb.CatalogException):
        raise  # a fault of ours
    except duckdb.Error as error:
        raise EventsError(
            f"the input cannot be read or sorted ({_first_line(error)}). "
            "Restore a damaged file, or leave it out; if the disk is full, make room beside the output."
        ) from error


class _Running:
    def __init__(self, con: Any) -> None:
        self._con = con

    def parquet(self, files: Sequence[Path]) -> Any:
        table = self._con.read_parquet([str(f) for f in files], filename=FILE, file_row_number=True)
        return table.mutate(**{AT: table.file_row_number.cast("int64") + 1}).drop("file_row_number")

    def text(
        self, files: Sequence[Path], delimiter: str, names: Sequence[str], taken: Mapping[str, str]
    ) -> tuple[Any, Any]:
        """Staged as a table, so that parsing is paid for once; the position in it says which row it was."""
        rows, find_broken = _parsed(self._con, files, delimiter, names, taken)
        staged, broken = self.keep(rows), next(_names)
        self._con.raw_sql(f"CREATE TEMP TABLE {broken} AS {find_broken}")
        return staged.mutate(**{AT: staged.rowid().cast("int64")}), self._con.table(broken)

    def memory(self, rows: pa.Table) -> Any:
        name = next(_names)
        self._con.con.register(name, rows)
        return self._con.table(name)

    def keep(self, expression: Any) -> Any:
        return self._con.create_table(next(_names), expression, temp=True)

    def named(self, expression: Any) -> Any:
        return self._con.create_view(next(_names), expression)

    def numbered(self, table: Any, by: Sequence[str], name: str) -> Any:
        number = ibis.row_number().over(order_by=[table[column] for column in by]).cast("int32")
        return self.keep(table.mutate(**{name: number}))

    def fetch(self, expression: Any) -> pa.Table:
        return self._stream(expression.as_table()).read_all()

    def batches(self, expression: Any) -> Iterable[pa.RecordBatch]:
        return self._stream(expression)

    def integer(self, text: Any) -> Any:
        return text.try_cast("int64")

    def number(self, text: Any) -> Any:
        return text.try_cast("float64")

    def seconds(self, text: Any) -> Any:
        return text.try_cast(_UTC).cast("timestamp").truncate("s").epoch_seconds().cast("int64")

    def as_text(self, value: Any) -> Any:
        return value.cast("string")

    def pieces(self, rows: int) -> int:
        return 1  # it sorts within its memory limit, and spills

    def write_pieces(
        self,
        rows: Any,
        order: Sequence[str],
        write: Callable[[int, Iterable[pa.RecordBatch]], None],
        pieces: int,
    ) -> None:
        if pieces == 1:
            write(0, self._stream(rows.order_by(list(order))))
            return
        cut = _runs(self._stream(rows.order_by([PIECE, *order])))
        written = set()
        for piece, batches in itertools.groupby(cut, key=lambda run: run[0]):
            write(piece, (batch for _, batch in batches))
            written.add(piece)
        for piece in set(range(pieces)) - written:
            write(piece, [])

    def each(self, work: Callable[[int], None], n: int) -> None:
        for i in range(n):
            work(i)

    def _stream(self, expression: Any) -> pa.RecordBatchReader:
        """Ibis's own `to_pyarrow_batches` holds the whole result; its newest release lags behind DuckDB 2."""
        return pa.RecordBatchReader.from_stream(self._con.con.sql(self._con.compile(expression)))


def _runs(batches: Iterable[pa.RecordBatch]) -> Iterator[tuple[int, pa.RecordBatch]]:
    """Batches sorted by PIECE cut where it changes, each with its piece."""
    for batch in batches:
        piece = batch[PIECE].to_numpy()
        at = 0
        while at < len(piece):
            stop = int(piece.searchsorted(piece[at], side="right"))
            yield int(piece[at]), batch.slice(at, stop - at)
            at = stop


def _parsed(
    con: Any, files: Sequence[Path], delimiter: str, names: Sequence[str], taken: Mapping[str, str]
) -> tuple[Any, str]:
    """The rows of text files, as text, with FILE; and what asks for the broken ones once those were read."""
    errors, scans = next(_names), next(_names)
    table = con.read_csv(
        [str(f) for f in files],
        columns=dict.fromkeys(names, "VARCHAR"),
        header=True,
        delim=delimiter,
        quote='"',
        escape='"',
        filename=FILE,
        store_rejects=True,
        rejects_table=errors,
        rejects_scan=scans,
    )
    find_broken = f"""
        SELECT file_path AS "{FILE}", CAST(line - 1 AS BIGINT) AS row,
               '{BROKEN}: ' || min(split_part(error_message, chr(10), 1)) AS reason, min(csv_line) AS line
        FROM {errors} JOIN {scans} USING (scan_id, file_id) GROUP BY ALL
    """
    columns = {ours: table[theirs] for ours, theirs in taken.items()}
    return table.select(FILE, **columns), find_broken


# -- for the workers of other engines


def read_text(
    file: Path, shown: str, delimiter: str, names: Sequence[str], taken: Mapping[str, str]
) -> Iterator[pa.RecordBatch]:
    """One file as `Engine.text` reads it, in one stream: its rows, and at the end its broken ones.

    Columns: those taken, FILE (as `shown`), AT, and of a broken row BAD_ROW, BAD_REASON and BAD_LINE, which
    others lack. Memory: some batches.
    """
    con = ibis.duckdb.connect(threads=1, autoinstall_known_extensions=False)
    try:
        with said_in_one_line():
            rows, find_broken = _parsed(con, [file], delimiter, names, taken)
            at = 0
            for batch in _Running(con)._stream(rows):
                count = batch.num_rows
                found = dict(zip(batch.schema.names, batch.columns, strict=True))
                found |= {
                    AT: pa.array(range(at, at + count), pa.int64()),
                    BAD_ROW: pa.nulls(count, pa.int64()),
                }
                found |= {name: pa.nulls(count, pa.string()) for name in (BAD_REASON, BAD_LINE)}
                yield pa.RecordBatch.from_pydict({**found, FILE: pa.array([shown] * count, pa.string())})
                at += count
            for batch in pa.RecordBatchReader.from_stream(con.con.sql(find_broken)):
                count = batch.num_rows
                found = {name: pa.nulls(count, pa.string()) for name in taken}
                found |= {AT: pa.nulls(count, pa.int64()), BAD_ROW: batch["row"]}
                found |= {BAD_REASON: batch["reason"], BAD_LINE: batch["line"]}
                yield pa.RecordBatch.from_pydict({**found, FILE: pa.array([shown] * count, pa.string())})
    finally:
        con.disconnect()


def cast_query(to: str) -> str:
    """What asks DuckDB for the strings `said` of a table `given` as "integer", "number" or "seconds".

    As `Engine` defines these. A worker that is sent it needs no Ibis, which takes a second to import.
    """
    con = ibis.duckdb.connect(autoinstall_known_extensions=False)
    try:
        engine, given = _Running(con), ibis.table({"said": "string"}, name="given")
        casts = {"integer": engine.integer, "number": engine.number, "seconds": engine.seconds}
        return str(con.compile(given.select(meant=casts[to](given.said))))
    finally:
        con.disconnect()


def _first_line(error: BaseException) -> str:
    return str(error).strip().split("\n")[0].rstrip(".")
