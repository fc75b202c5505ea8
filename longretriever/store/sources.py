"""Which rows do the input files hold, and which of them can be used?

The engine reads the files, Ibis expressions judge the rows. Text files are read as text, so that a broken row
is a row with a reason and never a guess; what a column of text means (integers, "17850.0" for 17850,
dates) is decided over the whole column, because a sample of its first rows would miss the odd one.

    Source    one input as a table, its columns under our names, and where each row came from
    Log       the events of a source, each with a reason if it cannot be used
"""

from __future__ import annotations

import csv
import glob
import gzip
import itertools
import os
import re
import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ibis
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from longretriever.errors import EventsError, InputError
from longretriever.events import (
    BEHAVIOR,
    CATEGORY,
    EARLIEST,
    ITEM,
    LATEST,
    MILLISECONDS,
    MOST_KINDS,
    REQUIRED_EVENT_COLUMNS,
    SECONDS,
    TIME,
    USER,
    unit_of,
)
from longretriever.store.engine import AT, BROKEN, FILE, Engine

EVENT_COLUMNS = (USER, ITEM, CATEGORY, TIME, BEHAVIOR)
REQUIRED = {"events": REQUIRED_EVENT_COLUMNS, "items": (ITEM,), "users": (USER,)}
OPTION = {"events": "--column", "items": "--item-column", "users": "--user-column"}
UNIT_NAMES = {SECONDS: "seconds", MILLISECONDS: "milliseconds"}
SHOWN = 5  # examples in an error

_EXTENSIONS = (".parquet", ".pq", ".csv", ".tsv", ".txt")
_RECBOLE_TYPE = re.compile(r":(token|float)(_seq)?$")  # `user_id:token` of an atomic file is user_id
_WHOLE = r"^(0|-?[1-9][0-9]{0,17})(\.0*)?\z"
_NUMBER = r"^-?(0|[1-9][0-9]*)(\.[0-9]+)?([eE][-+]?[0-9]+)?\z"
_LONGEST_HEADER = 1 << 20  # bytes: a file that is no text may have no end of line
_names = (f"longretriever_{n}" for n in itertools.count())


@dataclass(frozen=True)
class Source:
    """One input. `kinds` says what each column holds, in the words of `_kind_of` and `_kinds_of_text`."""

    con: Engine
    role: str  # "events", "items" or "users"
    table: Any  # our columns, FILE, AT
    kinds: dict[str, str]
    text: frozenset[str]  # columns whose kind was read off their text, so that they may stay strings
    broken: Any | None  # rows of text files that do not parse: FILE, row, reason, line
    unused: tuple[str, ...]  # columns of the input that an event has no place for

    def has(self, column: str) -> bool:
        return column in self.kinds


@dataclass(frozen=True)
class Log:
    """Judged events: `rows` has the EVENT_COLUMNS cleaned, `given_*` as they came, and a reason or null."""

    rows: Any
    read: int  # rows, broken ones included
    rejected: dict[str, int]  # reason -> rows
    unit: str  # what the times were: "seconds", "milliseconds" or "dates"
    behaviors: tuple[str, ...]

    @property
    def kept(self) -> Any:
        """Rows that can be used: the EVENT_COLUMNS, times in seconds, `behavior` null where not given."""
        rows = self.rows
        if self.rejected.keys() - {BROKEN}:  # else nothing need be judged again, row by row
            rows = rows.filter(rows.reason.isnull())
        return rows.select(*EVENT_COLUMNS)


# -- reading


def read(con: Engine, given: Any, role: str, mapping: Mapping[str, str] | None, work: Path) -> Source:
    """Open an input: a path, a folder, a glob, several of them, or a table that Arrow can read.

    `mapping` goes from our column names to those of the input. Raises `EventsError` when there is no such
    file, when it is no Parquet or delimited text, or when a required column is missing.
    """
    if role == "events" and (strange := set(mapping or {}) - set(EVENT_COLUMNS)):
        raise EventsError(f"columns names {sorted(strange)}, but an event has only {list(EVENT_COLUMNS)}.")
    if _are_paths(given):
        parts = _parts_of_files(con, _files(given, role, work), role, mapping or {})
    else:
        parts = [_part_in_memory(con, given, role, mapping or {})]
    table, kinds, text = _one_table(con, parts)
    keys = {USER, ITEM, CATEGORY} if role == "events" else set(kinds)
    kinds |= _kinds_of_text(con, table, sorted(text & keys))
    broken = [part.broken for part in parts if part.broken is not None]
    unused = sorted({name for part in parts for name in part.unused})
    return Source(con, role, table, kinds, frozenset(text), _union(broken) if broken else None, tuple(unused))


@dataclass(frozen=True)
class _Part:
    """Files of one format and schema, or one table in memory."""

    table: Any
    text: bool
    unused: tuple[str, ...]
    broken: Any | None = None


def _are_paths(given: Any) -> bool:
    several = isinstance(given, list | tuple)
    return all(isinstance(one, str | os.PathLike) for one in (given if several else [given]))


def _files(given: Any, role: str, work: Path) -> list[Path]:
    paths = given if isinstance(given, list | tuple) else [given]
    files = sorted({file for path in paths for file in _expand(str(path), role)})
    if not files:
        raise EventsError(f"no {role} files were given. Pass a file, a folder or a glob.")
    return [_unpacked(file, work) for file in files]


def _expand(path: str, role: str) -> list[Path]:
    if Path(path).is_file():
        return [Path(path)]
    if Path(path).is_dir():
        found = [f for f in Path(path).rglob("*") if f.is_file() and not f.name.startswith((".", "_"))]
        files = [f for f in found if Path(f.name.removesuffix(".gz")).suffix.lower() in _EXTENSIONS]
        wanted = f"a folder with files that end in {', '.join(_EXTENSIONS)} (or these with .gz)"
    else:
        files = [Path(f) for f in glob.glob(path, recursive=True) if Path(f).is_file()]
        wanted = "a file, a folder or a glob"
    if not files:
        raise EventsError(f"{path}: no {role} file there. Expected {wanted}: check the path.")
    return files


def _unpacked(file: Path, work: Path) -> Path:
    """DuckDB reads gzipped text by itself; a gzipped Parquet file is unpacked first."""
    if _start(file) != b"PAR1" or not _is_gzip(file):
        return file
    folder = work / next(_names)
    folder.mkdir()
    with gzip.open(file) as packed, (folder / file.name.removesuffix(".gz")).open("wb") as unpacked:
        shutil.copyfileobj(packed, unpacked)
    return folder / file.name.removesuffix(".gz")


def _is_gzip(file: Path) -> bool:
    with file.open("rb") as stream:
        return stream.read(2) == b"\x1f\x8b"


def _start(file: Path) -> bytes:
    try:
        with gzip.open(file) if _is_gzip(file) else file.open("rb") as stream:
            return bytes(stream.read(4))
    except (EOFError, gzip.BadGzipFile) as error:
        raise EventsError(f"{file}: not a whole gzip file ({error}). Restore it, or leave it out.") from error


def _parts_of_files(con: Engine, files: Sequence[Path], role: str, mapping: Mapping[str, str]) -> list[_Part]:
    """One part for all files that have the same columns in the same order."""
    parquet: dict[str, list[Path]] = {}
    text: dict[tuple[str, ...], list[Path]] = {}
    for file in files:
        if _start(file) == b"PAR1" or file.suffix.lower() in (".parquet", ".pq"):
            parquet.setdefault(_parquet_schema(file), []).append(file)
        else:
            text.setdefault(_header(file), []).append(file)
    parts = [_part_of_parquet(con, group, role, mapping) for group in parquet.values()]
    return parts + [
        _part_of_text(con, group, delimiter, names, role, mapping)
        for (delimiter, *names), group in text.items()
    ]


def _parquet_schema(file: Path) -> str:
    try:
        return str(pq.read_schema(file).remove_metadata())
    except (pa.ArrowException, OSError) as error:
        raise EventsError(
            f"{file}: not a whole Parquet file ({_first_line(error)}). Restore it, or leave it out."
        ) from error


def _part_of_parquet(con: Engine, files: list[Path], role: str, mapping: Mapping[str, str]) -> _Part:
    table = con.parquet(files)
    names = [name for name in table.columns if name not in (FILE, AT)]
    chosen = _chosen(names, mapping, role, files[0].name)
    taken = {ours: table[theirs] for ours, theirs in chosen.items()}
    return _Part(table.select(FILE, AT, **taken), False, _left(names, chosen))


def _header(file: Path) -> tuple[str, ...]:
    """The delimiter and the column names: the delimiter is what the first line has most of."""
    try:
        with gzip.open(file) if _is_gzip(file) else file.open("rb") as stream:
            line = stream.readline(_LONGEST_HEADER).decode("utf-8-sig").rstrip("\r\n")
    except (UnicodeDecodeError, EOFError, gzip.BadGzipFile) as error:
        raise EventsError(f"{file}: neither Parquet nor UTF-8 text ({error}).") from error
    if not line:
        raise EventsError(f"{file}: empty. Expected a first line that names the columns.")
    delimiter = max("\t,;|", key=line.count)
    return delimiter, *next(csv.reader([line], delimiter=delimiter))


def _part_of_text(
    con: Engine, files: list[Path], delimiter: str, names: list[str], role: str, mapping: Mapping[str, str]
) -> _Part:
    if len(set(names)) < len(names):
        raise EventsError(f"{files[0].name}: two columns of one name among {names}. Rename one of them.")
    chosen = _chosen(names, mapping, role, files[0].name)
    table, broken = con.text(files, delimiter, names, chosen)
    return _Part(table, True, _left(names, chosen), broken)


def _part_in_memory(con: Engine, given: Any, role: str, mapping: Mapping[str, str]) -> _Part:
    try:
        rows = pa.table(given)
    except (TypeError, ValueError, pa.ArrowException) as error:
        raise EventsError(
            f"{role} is a {type(given).__name__}: expected a path, paths, or a table that Arrow can read."
        ) from error
    chosen = _chosen(rows.column_names, mapping, role, role)
    columns = {ours: _decoded(rows[theirs]) for ours, theirs in chosen.items()}
    at = pa.array(np.arange(1, rows.num_rows + 1))
    table = con.memory(pa.table({**columns, AT: at}))
    return _Part(table.mutate(**{FILE: ibis.literal(role)}), False, _left(rows.column_names, chosen))


def _decoded(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Categoricals as their values: DuckDB would sort an enum by position, not by value."""
    if pa.types.is_dictionary(column.type):
        return column.cast(column.type.value_type)
    return column.cast(pa.string()) if pa.types.is_null(column.type) else column


def _chosen(names: Sequence[str], mapping: Mapping[str, str], role: str, where: str) -> dict[str, str]:
    """Our name -> the name in the input. A mapped column wins over one that has our name already."""
    plain = {_RECBOLE_TYPE.sub("", name): name for name in reversed(names)}
    chosen = {}
    for ours, theirs in mapping.items():
        if theirs not in names and theirs not in plain:
            raise EventsError(f"{where}: no column {theirs}, which should be {ours}; it has {list(names)}.")
        chosen[ours] = theirs if theirs in names else plain[theirs]
    taken = {ours.lower() for ours in chosen} | {theirs.lower() for theirs in chosen.values()}
    rest = {ours: theirs for ours, theirs in plain.items() if not {ours.lower(), theirs.lower()} & taken}
    if role == "events":
        rest = {ours: theirs for ours, theirs in rest.items() if ours in EVENT_COLUMNS}
    chosen |= dict(sorted(rest.items()))
    for column in REQUIRED[role]:
        if column not in chosen:
            raise EventsError(
                f"{where}: no column {column}; it has {list(names)}. "
                f"Name the right one with {OPTION[role]} {column}=NAME."
            )
    return chosen


def _left(names: Sequence[str], chosen: Mapping[str, str]) -> tuple[str, ...]:
    return tuple(name for name in names if name not in chosen.values())


# -- what a column holds


def _one_table(con: Engine, parts: Sequence[_Part]) -> tuple[Any, dict[str, str], set[str]]:
    """The parts below each other; a column that differs in kind between them is read as text."""
    columns = sorted({name for part in parts for name in part.table.columns} - {FILE, AT})
    kinds, text = {}, set()
    for name in columns:
        found = {_kind_of(part.table[name].type()) for part in parts if name in part.table.columns}
        kinds[name] = found.pop() if len(found) == 1 else "other"
        if kinds[name] == "other" or any(part.text for part in parts if name in part.table.columns):
            kinds[name] = "string"
            text.add(name)
    tables = [
        part.table.select(
            FILE, AT, **{name: _as_kind(con, part.table, name, kinds[name]) for name in columns}
        )
        for part in parts
    ]
    return _union(tables), kinds, text


def _union(tables: Sequence[Any]) -> Any:
    return tables[0] if len(tables) == 1 else ibis.union(*tables)


def _kind_of(dtype: Any) -> str:
    """`other` goes through its text: decimals, unsigned 64-bit hashes, uuids."""
    if dtype.is_integer() and not dtype.is_uint64():
        return "integer"
    if dtype.is_timestamp() or dtype.is_date():
        return "time"
    tests = {"float": dtype.is_floating(), "boolean": dtype.is_boolean(), "string": dtype.is_string()}
    return next((kind for kind, holds in tests.items() if holds), "other")


def _as_kind(con: Engine, table: Any, name: str, kind: str) -> Any:
    types = {"integer": "int64", "float": "float64", "time": "timestamp", "boolean": "boolean"}
    dtype = types.get(kind, "string")
    if name not in table.columns:
        return ibis.null(dtype)
    return con.as_text(table[name]) if dtype == "string" else table[name].cast(dtype)


def _kinds_of_text(con: Engine, table: Any, columns: Sequence[str]) -> dict[str, str]:
    """Of each column of text: "integer", "whole" (17850.0), "number", "string"; "empty" without values.

    An integer must be written as one: "007" and "+7" are strings, for they would not come back the same.
    """
    if not columns:
        return {}
    tests = {}
    for n, name in enumerate(columns):
        value = table[name].nullif("")
        whole = value.re_search(_WHOLE)
        tests[f"{n} integer"] = (
            (value.try_cast("int64").cast("string") == value).fill_null(value.isnull()).all()
        )
        tests[f"{n} whole"] = whole.all()
        tests[f"{n} number"] = value.re_search(_NUMBER).all()
        tests[f"{n} filled"] = value.notnull().any()
    (found,) = con.fetch(table.aggregate(**tests)).to_pylist()
    kinds = {}
    for n, name in enumerate(columns):
        named = [kind for kind in ("integer", "whole", "number") if found[f"{n} {kind}"]]
        kinds[name] = [*named, "string"][0] if found[f"{n} filled"] else "empty"
    return kinds


def key_type(column: str, sources: Sequence[Source]) -> str:
    """The one type of an id in all inputs: "int64" where all agree, else "string".

    Typed integers of the events are not turned into strings for the sake of another file: then that file's
    ids must be castable, else `EventsError`. Ids that came as text may be either.
    """
    sources = [source for source in sources if source.has(column)]
    strings = [
        source for source in sources if source.kinds[column] in ("string", "number", "boolean", "time")
    ]
    if not strings:
        return "int64" if any(source.kinds[column] != "empty" for source in sources) else "string"
    first = sources[0]
    if column == CATEGORY or first in strings or column in first.text:
        return "string"
    for source in strings:
        ids = source.table[column].cast("string").nullif("")
        odd = source.table.filter(ids.notnull() & source.con.integer(ids).isnull())
        for row in source.con.fetch(odd.select(column).limit(1)).to_pylist():
            raise EventsError(
                f"{source.role}: {column} {row[column]!r} is not an integer, the ids of {first.role} are. "
                f"Give both the same type, or name another column with {OPTION[source.role]} {column}=NAME."
            )
    return "int64"


def as_key(source: Source, column: str, dtype: str) -> Any:
    """An id in its final type; null where it is missing, or has no place in that type."""
    if not source.has(column):
        return ibis.null(dtype)
    value, kind = source.table[column], source.kinds[column]
    if kind == "float":
        fits = (value > -9.0e15) & (value < 9.0e15) & (value % 1 == 0)
        whole = ibis.ifelse(fits, value, ibis.null("float64")).try_cast("int64")
        return whole if dtype == "int64" else ibis.coalesce(whole.cast("string"), source.con.as_text(value))
    if dtype == "int64":
        if kind == "integer":
            return value.try_cast("int64") if column in source.text else value
        return source.con.integer(value.cast("string"))
    return (source.con.integer(value) if kind == "whole" else value).cast("string").nullif("")


def as_feature(source: Source, column: str) -> Any:
    """A profile field or item feature: numbers written as text become numbers, empty text null."""
    value, kind = source.table[column], source.kinds[column]
    if column in source.text:
        value = value.nullif("")
        if kind in ("integer", "whole"):
            return source.con.integer(value)
        return source.con.number(value) if kind == "number" else value
    return value.nullif("") if kind == "string" else value


# -- which events can be used


def judge(source: Source, types: Mapping[str, str], time_unit: str | None) -> Log:
    """Find the reason, if any, for which each event cannot be used, and what the rest holds.

    Two passes over the log: what is in it, then (lazily, where `rows` is used) the rows themselves.
    Raises `EventsError` for times in mixed units without a `time_unit`, for more than 255 kinds of
    behavior, and for a log without any row.
    """
    if time_unit not in (None, *UNIT_NAMES):
        raise InputError(f'time_unit={time_unit!r}: expected "s" for seconds or "ms" for milliseconds.')
    con, rows = source.con, source.con.named(_parsed(source, types))
    found = con.fetch(
        rows.mutate(behavior=ibis.ifelse(rows.trouble.isnull(), rows.behavior, ibis.null("string")))
        .group_by("trouble", "unit", "behavior")
        .agg(rows=lambda t: t.count(), low=lambda t: t.number.min(), high=lambda t: t.number.max())
    ).to_pylist()
    unit = _unit(source, rows, found, time_unit)
    other = rows.trouble.isnull() & ~rows.unit.isin(["date", unit])
    reason = ibis.ifelse(other, ibis.literal(f"timestamp is not in {UNIT_NAMES[unit]}"), rows.trouble)
    seconds = rows.number if unit == SECONDS else rows.number // 1_000
    judged = rows.mutate(reason=reason, timestamp=ibis.coalesce(rows.date, seconds)).drop("trouble", "unit")
    return Log(con.named(judged), *_counts(source, found, unit))


def _parsed(source: Source, types: Mapping[str, str]) -> Any:
    """Each event with its keys cleaned, its time as a number or a date, and what is wrong with it so far."""
    raw = source.table
    keys = {column: as_key(source, column, types[column]) for column in (USER, ITEM, CATEGORY)}
    number, date = _numbers_and_dates(source, raw[TIME])
    unit = ibis.ifelse(number < LATEST, ibis.literal(SECONDS), ibis.literal(MILLISECONDS))
    return raw.select(
        FILE,
        AT,
        **keys,
        **{
            f"given_{column}": source.con.as_text(raw[column])
            for column in EVENT_COLUMNS[:4]
            if source.has(column)
        },
        behavior=source.con.as_text(raw[BEHAVIOR]).nullif("")
        if source.has(BEHAVIOR)
        else ibis.null("string"),
        number=number,
        date=date,
        unit=ibis.ifelse(date.notnull(), ibis.literal("date"), unit),
        trouble=_trouble(source, keys, number, date),
    )


def _numbers_and_dates(source: Source, value: Any) -> tuple[Any, Any]:
    """Times as whole numbers of a unit yet to be found, or as seconds read off a date; null where neither."""
    kind = source.kinds[TIME]
    if kind == "integer":
        return value, ibis.null("int64")
    if kind == "time":
        return ibis.null("int64"), value.truncate("s").epoch_seconds().cast("int64")
    number = value if kind == "float" else source.con.number(value.cast("string"))
    sane = (number > -9.0e15) & (number < 9.0e15)  # false for NaN and infinities
    number = ibis.ifelse(sane, number, ibis.null("float64")).floor().cast("int64")
    if kind == "float":
        return number, ibis.null("int64")
    date = source.con.seconds(value.cast("string"))
    return number, ibis.ifelse(number.isnull(), date, ibis.null("int64"))


def _trouble(source: Source, keys: Mapping[str, Any], number: Any, date: Any) -> Any:
    absurd = ~number.between(EARLIEST, LATEST * 1_000 - 1) | ~date.between(EARLIEST, LATEST - 1)
    return ibis.cases(
        (_is_missing(source, USER), f"no {USER}"),
        (_is_missing(source, ITEM), f"no {ITEM}"),
        (_is_missing(source, TIME), f"no {TIME}"),
        (keys[USER].isnull(), f"{USER} is not a whole number"),
        (keys[ITEM].isnull(), f"{ITEM} is not a whole number"),
        (number.isnull() & date.isnull(), f"{TIME} is unreadable"),
        (absurd.fill_null(False), f"{TIME} is before 1970 or after 2100"),
        else_=ibis.null("string"),
    )


def _is_missing(source: Source, column: str) -> Any:
    value = source.table[column]
    if value.type().is_string():
        return value.isnull() | (value == "")
    return (value == value).isnull()  # NaN is there, whatever Ibis makes of it for an engine


def _unit(source: Source, rows: Any, found: list[dict[str, Any]], time_unit: str | None) -> str:
    good = [group for group in found if group["trouble"] is None and group["unit"] != "date"]
    if time_unit or not good:
        return time_unit or SECONDS
    unit = unit_of(min(group["low"] for group in good), max(group["high"] for group in good))
    if unit is None:
        raise EventsError(_where_units_mix(source, rows))
    return unit


def _where_units_mix(source: Source, rows: Any) -> str:
    good = rows.filter(rows.trouble.isnull() & rows.unit.isin(list(UNIT_NAMES)))
    firsts = [good.filter(good.unit == unit).order_by([FILE, AT]).limit(1) for unit in UNIT_NAMES]
    marked = [first.mutate(reason=first.unit) for first in firsts]
    table = located(source, ibis.union(*marked))
    later = table.filter(table.reason.isin(list(UNIT_NAMES))).order_by(["file", "row"])
    example = source.con.fetch(later).to_pylist()[-1]
    (earlier,) = set(UNIT_NAMES) - {example["reason"]}
    return (
        f"{Path(example['file']).name} row {example['row']}: timestamp {example['timestamp']} is in "
        f"{UNIT_NAMES[example['reason']]}, earlier rows in {UNIT_NAMES[earlier]}. Pass --time-unit."
    )


def _counts(
    source: Source, found: list[dict[str, Any]], unit: str
) -> tuple[int, dict[str, int], str, tuple[str, ...]]:
    reasons: Counter[str] = Counter()
    kinds, units = set(), set()
    for group in found:
        if group["trouble"] is None and group["unit"] in ("date", unit):
            kinds.add(group["behavior"] or "")
            units.add(group["unit"])
        else:
            reasons[group["trouble"] or f"timestamp is not in {UNIT_NAMES[unit]}"] += group["rows"]
    if source.broken is not None and (broken := count(source.con, source.broken)):
        reasons[BROKEN] += broken
    if len(kinds) > MOST_KINDS:
        raise EventsError(
            f"{len(kinds):,} kinds of behavior, such as {sorted(kinds)[:SHOWN]}; at most {MOST_KINDS} can be "
            "told apart. Map another column with --column behavior=NAME, or leave it out."
        )
    read = sum(group["rows"] for group in found) + reasons[BROKEN]
    if not read:
        raise EventsError("the log holds no events: its files have a header, or a schema, and no row.")
    name = UNIT_NAMES[unit] if unit in units or not units else "dates"
    return read, {reason: n for reason, n in reasons.items() if n}, name, tuple(sorted(kinds))


def count(con: Engine, table: Any) -> int:
    """How many rows a table has."""
    return int(con.fetch(table.aggregate(rows=table.count()))["rows"][0].as_py())


# -- rejected rows


def located(source: Source, few: Any) -> Any:
    """Some rows of a source, and its broken ones, with file and row number: 1 is the first data row.

    `few` has FILE, AT, a reason, and `given_*` columns. Rows of a text file are counted with the broken
    ones among them: a running sum adds those that stand before a row.
    """
    given = [f"given_{column}" for column in EVENT_COLUMNS[:4]]
    keys = {name: few[name] if name in few.columns else ibis.null("string") for name in given}
    few = few.select(FILE, AT, "reason", **keys, line=ibis.null("string"))
    if source.broken is None:
        return _with_keys(few.mutate(row=few[AT]))
    first = source.table.group_by(FILE).agg(first=source.table[AT].min())
    few = few.join(first, FILE)
    few = few.mutate(place=(few[AT] - few["first"] + 1) * 2, broken_row=ibis.null("int64"))
    bad = source.broken
    before = ibis.row_number().over(group_by=bad[FILE], order_by=bad.row)
    bad = bad.mutate(place=(bad.row - before - 1) * 2 + 1, broken_row=bad.row)
    bad = bad.mutate(**{name: ibis.null("string") for name in given})
    columns = [FILE, "reason", *given, "line", "place", "broken_row"]
    both = ibis.union(few.select(columns), bad.select(columns))
    order = [both.place, both.broken_row]
    running = both.broken_row.count().over(group_by=both[FILE], order_by=order, rows=(None, 0))
    return _with_keys(both.mutate(row=both.place // 2 + running))


def _with_keys(rows: Any) -> Any:
    given = {column: rows[f"given_{column}"] for column in EVENT_COLUMNS[:4]}
    return rows.select(file=rows[FILE], row=rows.row, reason=rows.reason, **given, line=rows.line)


def _first_line(error: BaseException) -> str:
    return str(error).strip().split("\n")[0].rstrip(".")
