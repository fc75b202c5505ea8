"""What does ingest ask of the engine that computes its expressions? To read, to keep, to sort into pieces.

The expressions are Ibis and the same for all; what differs between engines is behind this interface, and each
engine has one file: `on_duckdb.py`, `on_spark.py`. `DuckDB` and `Spark` there open one for the time of an
ingest.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol

import pyarrow as pa

FILE, AT = "file#", "row#"
"""Where a row came from; `AT` ascends within a file, and `located` turns it into the number of the row."""

PIECE = "piece"
"""The column by which `write_pieces` cuts rows."""

BROKEN = "broken row"


class Engine(Protocol):
    """An engine that is running. Tables and values are Ibis expressions."""

    # -- reading

    def parquet(self, files: Sequence[Path]) -> Any:
        """Parquet files of one schema below each other: their columns, FILE and AT."""

    def text(
        self, files: Sequence[Path], delimiter: str, names: Sequence[str], taken: Mapping[str, str]
    ) -> tuple[Any, Any]:
        """Of text files with columns `names` those `taken` (new name -> name), as strings, FILE and AT.

        And their broken rows: FILE, `row` (from 1, the header left out), `reason` and `line`.
        """

    def memory(self, rows: pa.Table) -> Any:
        """A table in memory."""

    # -- computing

    def keep(self, expression: Any) -> Any:
        """The result of an expression as a table of the engine, so that it is computed once."""

    def named(self, expression: Any) -> Any:
        """The same expression as a view, so that it is compiled once; it is computed where used."""

    def numbered(self, table: Any, by: Sequence[str], name: str) -> Any:
        """The table, kept, with a column `name`: 0.. (int32) in the order of `by`, which is unique."""

    def fetch(self, expression: Any) -> pa.Table:
        """A result, in its order, in memory."""

    def batches(self, expression: Any) -> Iterable[pa.RecordBatch]:
        """A result, in its order, a little at a time where the engine can."""

    # -- what strings and numbers mean: as DuckDB has it

    def integer(self, text: Any) -> Any:
        """Text as int64: "17850.0" is 17850; null where it is none."""

    def number(self, text: Any) -> Any:
        """Text as float64, or null."""

    def seconds(self, text: Any) -> Any:
        """The time that ISO text says, in seconds since the epoch (UTC where it has no offset), or null."""

    def as_text(self, value: Any) -> Any:
        """Any value as a string: 1e16 is "1e+16", 5.0 is "5.0"."""

    # -- writing

    def pieces(self, rows: int) -> int:
        """Into how many pieces so many rows had best be cut to be sorted."""

    def write_pieces(
        self,
        rows: Any,
        order: Sequence[str],
        write: Callable[[int, Iterable[pa.RecordBatch]], None],
        pieces: int,
    ) -> None:
        """Call `write` once for each piece 0.. with its rows, sorted by `order`, wherever they are sorted.

        `rows` have a column PIECE, unless there is only one. `write` may run in other processes, on other
        machines that see the same files, and there more than once at a time: what it leaves must not depend
        on that.
        """

    def each(self, work: Callable[[int], None], n: int) -> None:
        """Call `work` for 0.. n - 1, wherever; as for `write_pieces`."""


class Opens(Protocol):
    """Something that opens an engine: `DuckDB()`, `Spark("local[2]")`."""

    def opened(
        self, work: Path, memory_limit: str | None, threads: int | None
    ) -> AbstractContextManager[Engine]:
        """An engine that puts what it needs on the disk into `work`, which is removed afterwards."""
