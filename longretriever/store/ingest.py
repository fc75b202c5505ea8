"""How does a log become a store? Ids are numbered first, then one sort of small integers orders all.

Sorting the ids themselves would be the dear part: two joins turn some 40 bytes of strings into integers,
so that a whole store takes 1.1 times what DuckDB's bare sort of the same 20M events takes, and less than
half its memory. What the engine holds is bounded by `memory_limit` (it spills beside the output), and the
sorted events are streamed into the store, whole users at a time. The expressions are Ibis, the same for every
engine; what engines do differently is behind `engine.py`.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import ibis
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from longretriever.errors import EventsError
from longretriever.events import BEHAVIOR, CATEGORY, ITEM, TIME, TITLE, USER
from longretriever.saved import writing
from longretriever.store.arrays import (
    ITEM_CATEGORY,
    Written,
    piece_folder,
    put_together,
    total,
    write_category_groups,
    write_piece,
    written_in,
)
from longretriever.store.engine import BROKEN, PIECE, Engine, Opens
from longretriever.store.on_duckdb import DuckDB
from longretriever.store.parts import PRESENT, Parts, Recipe, cuts, write_arrow, write_list, write_part
from longretriever.store.sources import (
    EVENT_COLUMNS,
    SHOWN,
    Log,
    Source,
    as_feature,
    as_key,
    count,
    judge,
    key_type,
    located,
    read,
)

FEWEST, MOST = 2, 10_000
"""A column becomes a profile field or item feature by itself when it has this many distinct values."""

NO_CATEGORY = "item has no category"

REJECTED = pa.schema(
    [("file", pa.string()), ("row", pa.int64()), ("reason", pa.string())]
    + [(column, pa.string()) for column in (*EVENT_COLUMNS[:4], "line")]
)
"""Of `rejected.parquet`: `row` counts from 1, the header of a text file left out; `line` is a broken one."""

_COPIES = "copies#"
_REJECTED_AT_ONCE = 1 << 17
_USER, _ITEM, _CATEGORY, _EVENTS = "user#", "item#", "category#", "events#"  # numbers; a file may have "item"
_ORDER = ("user", "category", "time", "item", "behavior")


@dataclass(frozen=True)
class IngestReport:
    """What went in, what came out, and what was left behind on the way."""

    read: int  # rows of the events, broken ones included
    kept: int  # rows of the store: read - rejected - duplicates
    duplicates: int  # same user, item, time and behavior as another row
    rejected: dict[str, int]  # reason -> rows of the events
    recategorised: int  # rows whose category was not the one that their item got
    users: int
    items: int
    categories: int
    groups: int  # pairs of a user and a category that met
    first_time: int  # seconds since the epoch
    last_time: int
    time_unit: str  # as found: "seconds", "milliseconds" or "dates"
    behaviors: tuple[str, ...]
    items_input: dict[str, int]  # rows of the items file: read, duplicate, conflicting ...
    users_input: dict[str, int]
    columns_used: tuple[str, ...]  # "events.user_id", "users.gender" ...
    columns_skipped: dict[str, str]  # "items.price" -> why
    notes: tuple[str, ...]
    parts: tuple[dict[str, Any], ...] = ()  # of a partition: folder, first and last id, events, users ...
    seconds: dict[str, float] = field(default_factory=dict)  # stage -> wall time

    def as_dict(self) -> dict[str, Any]:
        """The same as plain values, for JSON or a table."""
        return asdict(self)


def ingest(
    events: Any,
    out: str | os.PathLike[str],
    *,
    items: Any = None,
    users: Any = None,
    columns: Mapping[str, str] | None = None,
    item_columns: Mapping[str, str] | None = None,
    user_columns: Mapping[str, str] | None = None,
    time_unit: str | None = None,
    max_rejected: float = 0.01,
    memory_limit: str | None = None,
    threads: int | None = None,
    engine: Opens | None = None,
    parts: Parts | None = None,
    profile: Sequence[str] | None = None,
    item_features: Sequence[str] | None = None,
    facts: Mapping[str, Any] | None = None,
    made_from: Mapping[str, str] | None = None,
    progress: Callable[[str], None] | None = None,
) -> IngestReport:
    """Write the store of a log to the folder `out`, replacing an older store only once it is complete.

    `events`, `items`, `users`: a path, a folder, a glob, a list of paths (Parquet, or delimited text with a
    header; gzipped or not), or a table that Arrow can read. `columns` maps our names to theirs, as in
    `{"user_id": "visitorid"}`; `item_columns` and `user_columns` likewise.

    `time_unit`: "s" or "ms", where a log cannot tell. `max_rejected`: the share of rows of an input that
    may be unusable; those are listed in `rejected.parquet` of the store. `memory_limit`: what the engine
    may hold, such as "2GB"; beyond it, it spills beside `out`. `engine`: `DuckDB()` unless given; `Spark()`
    for a cluster. `parts`: write a folder of stores instead of one store, `Parts("user", 8)` or
    `Parts("category", 8)`. `profile`, `item_features`: the columns to use, instead of all that suit. `facts`,
    `made_from`: what else the manifest shall say.

    The same log gives the same bytes, whatever the order of its rows and files, the number of threads and the
    engine (but for `rejected.parquet`, which names files and rows).

    Raises `EventsError` when an input is unreadable, lacks a column, mixes time units, or has more than
    `max_rejected` bad rows; nothing is written then.

    Memory: the engine's, plus the ids and features of items and users, plus the longest life. Time: about
    that of a sort of the log; 20M events with string ids take half a minute on two busy cores.
    """
    clock = _Clock(progress)
    work_on = (engine or DuckDB()).opened
    with writing(out, "partition" if parts else "store") as folder:
        work = folder.path / "work"
        with work_on(work, memory_limit, threads) as con:
            with clock("read", "reading the inputs"):
                maps = (columns, item_columns, user_columns)
                inputs = _open(con, (events, items, users), maps, work)
                log = judge(inputs.events, inputs.types, time_unit)
            with clock("number", f"numbering the users and items of {log.read:,} rows"):
                catalog = _one_row_each(inputs.items, ITEM, inputs.types) if inputs.items else None
                people = _one_row_each(inputs.users, USER, inputs.types) if inputs.users else None
                numbers = _number(con, log, catalog)
                losses = _losses(inputs, log, numbers)
                _check(con, losses, max_rejected)
                _write_rejected(con, losses, folder.path / "rejected.parquet")
            usable = log.read - losses[0].rows
            with clock("sort", f"sorting {usable:,} events"):
                item_rows = con.fetch(numbers.items.order_by(_ITEM))
                np.save(work / ITEM_CATEGORY, item_rows[_CATEGORY].to_numpy())
                pieces = _write_pieces(con, log, numbers, usable, parts, work)
                written = total([written_in(piece) for part in pieces for piece in part])
                _check_read(written.read, usable)
                if parts is None:
                    put_together(pieces[0], folder.path)
                    write_category_groups(folder.path, written.category_groups)
            with clock("describe", "writing users, items and categories"):
                whole = work if parts else folder.path
                item_fields = _write_items(whole, item_rows, catalog, item_features)
                people_rows = _people(con, numbers, people, written.users)
                profile_fields = _write_users(whole, people_rows, people, profile)
            report = IngestReport(
                **_rows_lost(con, log, numbers, losses, catalog, people),
                **_counts(written),
                users=len(written.users),
                items=item_rows.num_rows,
                categories=len(written.category_groups),
                time_unit=log.unit,
                behaviors=log.behaviors,
                **_columns(inputs, item_fields, profile_fields),
            )
            folder.made_from.update(made_from or {})
            folder.facts.update(facts or {}, **_facts(report, profile_fields, item_fields))
            if parts:
                with clock("cut", f"writing {parts.count:,} parts by {parts.by}"):
                    np.save(work / PRESENT, written.users)
                    recipe = Recipe(parts, pieces, folder.path, work, folder.facts, folder.made_from)
                    con.each(partial(write_part, recipe), parts.count)
                    report = replace(report, parts=write_list(folder, parts))
        clock.say("hashing and syncing the files")
    report.seconds.update(clock.seconds())
    return report


def read_events(
    events: Any,
    *,
    items: Any = None,
    columns: Mapping[str, str] | None = None,
    item_columns: Mapping[str, str] | None = None,
    time_unit: str | None = None,
    max_rejected: float = 0.01,
    memory_limit: str | None = None,
    threads: int | None = None,
) -> pa.Table:
    """The usable events of a log as they are: neither deduplicated nor numbered. Options as in `ingest`.

    Columns `user_id`, `item_id`, `category_id` (the items file's, else the event's own, else the one that
    `ingest` gives the item), `timestamp` (int64 seconds) and `behavior` (null where none was given), sorted
    by (timestamp, user, item, behavior). The whole table is held in memory.
    """
    with tempfile.TemporaryDirectory() as folder, DuckDB().opened(Path(folder), memory_limit, threads) as con:
        inputs = _open(con, (events, items, None), (columns, item_columns, None), Path(folder))
        log = judge(inputs.events, inputs.types, time_unit)
        catalog = _one_row_each(inputs.items, ITEM, inputs.types) if inputs.items else None
        numbers = _number(con, log, catalog)
        _check(con, _losses(inputs, log, numbers), max_rejected)
        rows = log.kept.join(numbers.items.select(ITEM, usual=CATEGORY), ITEM)
        said = [rows[CATEGORY], rows.usual]
        if catalog is not None and CATEGORY in catalog.table.columns:
            given = catalog.table.select(item_given=ITEM, given=CATEGORY)
            rows = rows.left_join(given, [(ITEM, "item_given")])
            said = [rows.given, rows[CATEGORY], rows.usual]
        rows = rows.mutate(**{CATEGORY: ibis.coalesce(*said)})
        return con.fetch(rows.select(*EVENT_COLUMNS).order_by([TIME, USER, ITEM, BEHAVIOR]))


def read_table(given: Any, role: str, columns: Mapping[str, str] | None = None) -> pa.Table:
    """An `items` or `users` input as `ingest` reads it: columns by our names, one row for each id, sorted."""
    return read_counted(given, role, columns)[0]


def read_counted(
    given: Any, role: str, columns: Mapping[str, str] | None = None, max_rejected: float | None = None
) -> tuple[pa.Table, dict[str, int]]:
    """The same, and what became of its rows: those read, unusable ones by reason, duplicate and conflicting.

    Raises `EventsError` when the share of unusable ones is above `max_rejected`, where one is given.
    """
    key = {"items": ITEM, "users": USER}[role]
    with tempfile.TemporaryDirectory() as folder, DuckDB().opened(Path(folder), None, None) as con:
        source = read(con, given, role, columns, Path(folder))
        types = {column: key_type(column, [source]) for column in (key, CATEGORY)}
        each, loss = _one_row_each(source, key, types), _loss_of_key(source, key, types[key])
        if max_rejected is not None:
            _check(con, [loss], max_rejected)
        return con.fetch(each.table.order_by(key)), {"read": loss.read, **loss.reasons, **each.counts}


class _Clock:
    """Says what is being done, and remembers how long it took."""

    def __init__(self, progress: Callable[[str], None] | None) -> None:
        self.say = progress or (lambda message: None)
        self._start = time.perf_counter()
        self._spent: dict[str, float] = {}

    @contextmanager
    def __call__(self, stage: str, message: str) -> Iterator[None]:
        self.say(message)
        start = time.perf_counter()
        yield
        self._spent[stage] = time.perf_counter() - start

    def seconds(self) -> dict[str, float]:
        """By stage; what no stage covers is hashing, syncing and renaming."""
        total = time.perf_counter() - self._start
        return {**self._spent, "save": total - sum(self._spent.values()), "total": total}


# -- inputs


@dataclass(frozen=True)
class _Inputs:
    events: Source
    items: Source | None
    users: Source | None
    types: dict[str, str]  # of user_id, item_id and category_id: "int64" or "string"


def _open(con: Engine, given: Sequence[Any], maps: Sequence[Mapping[str, str] | None], work: Path) -> _Inputs:
    events, items, users = (
        None if one is None else read(con, one, role, mapping, work)
        for one, role, mapping in zip(given, ("events", "items", "users"), maps, strict=True)
    )
    if events is None:
        raise EventsError("no events were given. Pass a path, paths, or a table that Arrow can read.")
    if not events.has(CATEGORY) and not (items and items.has(CATEGORY)):
        raise EventsError(
            f"no column {CATEGORY}, neither in the events nor in the items. Name the right one with "
            f"--column {CATEGORY}=NAME or --item-column {CATEGORY}=NAME."
        )
    sharing = {USER: (events, users), ITEM: (events, items), CATEGORY: (events, items)}
    types = {column: key_type(column, [s for s in sharing[column] if s is not None]) for column in sharing}
    return _Inputs(events, items, users, types)


@dataclass(frozen=True)
class _Each:
    """An items or users file with one row for each id."""

    table: Any  # the id, the category of an item, and all other columns
    others: tuple[str, ...]  # columns that may become a field
    counts: dict[str, int]


def _one_row_each(source: Source, key: str, types: Mapping[str, str]) -> _Each:
    """Of the rows of an id the most frequent one, then the smallest; rows with a category go first."""
    con, keys = source.con, [key, CATEGORY] if key == ITEM else [key]
    others = [column for column in source.kinds if column not in keys]
    rows = source.table.select(
        **{column: as_key(source, column, types[column]) for column in keys},
        **{column: as_feature(source, column) for column in others},
    )
    rows = con.keep(rows.filter(rows[key].notnull()))
    found = _row(con, rows.aggregate(rows=rows.count(), ids=rows[key].nunique()))
    if found["rows"] == found["ids"]:  # the usual file
        return _Each(rows, tuple(others), {"duplicate": 0, "conflicting": 0})
    distinct = con.keep(rows.group_by(list(rows.columns)).agg(**{_COPIES: rows.count()}))
    order = [distinct[keys[-1]].isnull(), ibis.desc(distinct[_COPIES]), *(distinct[c] for c in rows.columns)]
    ranked = distinct.mutate(rank=ibis.row_number().over(group_by=distinct[key], order_by=order))
    table = con.keep(ranked.filter(ranked["rank"] == 0).drop("rank", _COPIES))
    copies = _row(
        con, distinct.aggregate(rows=distinct[_COPIES].sum().fill_null(0), distinct=distinct.count())
    )
    counts = {
        "duplicate": copies["rows"] - copies["distinct"],
        "conflicting": copies["distinct"] - count(con, table),
    }
    return _Each(table, tuple(others), counts)


def _row(con: Engine, aggregated: Any) -> dict[str, int]:
    """The one row of an aggregation of counts."""
    (row,) = con.fetch(aggregated).to_pylist()
    return {name: int(value) for name, value in row.items()}


# -- numbers for ids


@dataclass(frozen=True)
class _Numbers:
    items: Any  # item_id, category_id, their numbers, and the columns of the items file
    users: Any  # user_id, number, events
    category_events: Any  # number, events; of those with any
    without_category: int  # events whose item has none
    recategorised: int


def _number(con: Engine, log: Log, catalog: _Each | None) -> _Numbers:
    """Categories and users by sorted id, items by (category, id).

    The items file has the say on an item's category; where it is silent the most frequent one among the
    events counts, of equally frequent ones the smallest.
    """
    kept = log.kept
    votes = con.keep(kept.group_by([ITEM, CATEGORY]).agg(votes=kept.count()))
    valid = votes.filter(votes[CATEGORY].notnull())
    rank = ibis.row_number().over(group_by=valid[ITEM], order_by=[ibis.desc(valid.votes), valid[CATEGORY]])
    winner = valid.mutate(rank=rank)
    items = winner.filter(winner["rank"] == 0).select(ITEM, CATEGORY)
    if catalog is not None:
        items = _with_catalog(items, catalog)
    items = items.filter(items[CATEGORY].notnull())
    category = con.numbered(items.select(CATEGORY).distinct(), [CATEGORY], _CATEGORY)
    items = con.numbered(items.join(category, CATEGORY), [CATEGORY, ITEM], _ITEM)
    users = con.numbered(kept.group_by(USER).agg(**{_EVENTS: kept.count()}), [USER], _USER)
    known = items.select(_CATEGORY, final_item=ITEM, final=CATEGORY)
    final = votes.left_join(known, [(ITEM, "final_item")])
    found = final.aggregate(
        none=final.votes.sum(where=final.final.isnull()).fill_null(0),
        other=final.votes.sum(where=final[CATEGORY] != final.final).fill_null(0),
    )
    changes = _row(con, found)
    met = final.filter(final.final.notnull())
    category_events = met.group_by(_CATEGORY).agg(**{_EVENTS: met.votes.sum()})
    return _Numbers(items, users, category_events, changes["none"], changes["other"])


def _with_catalog(items: Any, catalog: _Each) -> Any:
    both = items.outer_join(catalog.table, ITEM, rname="file_{name}")
    return both.select(
        **{
            ITEM: ibis.coalesce(both[ITEM], both[f"file_{ITEM}"]),
            CATEGORY: ibis.coalesce(both[f"file_{CATEGORY}"], both[CATEGORY]),
            **{name: both[name] for name in catalog.others},
        }
    )


# -- rejected rows


@dataclass(frozen=True)
class _Loss:
    """What of one input cannot be used."""

    role: str
    read: int
    reasons: dict[str, int]
    table: Any  # as `located` gives it; computed when asked for

    @property
    def rows(self) -> int:
        return sum(self.reasons.values())


def _losses(inputs: _Inputs, log: Log, numbers: _Numbers) -> list[_Loss]:
    """The events first."""
    reasons = dict(log.rejected)
    if numbers.without_category:
        reasons[NO_CATEGORY] = numbers.without_category
    known = numbers.items.select(known=numbers.items[ITEM])
    rows = log.rows.left_join(known, log.rows[ITEM] == known.known)
    unknown = ibis.ifelse(rows.known.isnull(), ibis.literal(NO_CATEGORY), ibis.null("string"))
    rows = rows.mutate(reason=ibis.coalesce(rows.reason, unknown))
    events = _Loss("events", log.read, reasons, located(inputs.events, rows.filter(rows.reason.notnull())))
    keys = ((inputs.items, ITEM), (inputs.users, USER))
    return [events, *(_loss_of_key(source, key, inputs.types[key]) for source, key in keys if source)]


def _loss_of_key(source: Source, key: str, dtype: str) -> _Loss:
    con, reason, value = source.con, f"no {key}", as_key(source, key, dtype)
    rows = source.table.mutate(
        reason=ibis.literal(reason), **{f"given_{key}": con.as_text(source.table[key])}
    )
    broken = 0 if source.broken is None else count(con, source.broken)
    counts = source.table.aggregate(rows=source.table.count(), none=value.isnull().sum().fill_null(0))
    found = _row(con, counts)
    reasons = {why: n for why, n in {reason: found["none"], BROKEN: broken}.items() if n}
    return _Loss(source.role, found["rows"] + broken, reasons, located(source, rows.filter(value.isnull())))


def _check(con: Engine, losses: Iterable[_Loss], max_rejected: float) -> None:
    for loss in losses:
        if loss.rows <= max_rejected * loss.read and (loss.rows < loss.read or not loss.read):
            continue
        first = con.fetch(loss.table.order_by(["file", "row"]).limit(SHOWN)).to_pylist()
        reasons = ", ".join(f"{n:,} {why}" for why, n in sorted(loss.reasons.items()))
        raise EventsError(
            f"{loss.rows:,} of {loss.read:,} rows of the {loss.role} cannot be used ({reasons}), such as\n"
            + "\n".join(f"  {_told(row)}" for row in first)
            + f"\nAt most {max_rejected:.2%} may be: mend the input, or raise it with --max-rejected."
        )


def _told(row: Mapping[str, Any]) -> str:
    keys = ", ".join(f"{name}={row[name]!r}" for name in EVENT_COLUMNS[:4] if row[name] is not None)
    return f"{Path(row['file']).name} row {row['row']}: {row['reason']} ({row['line'] or keys})"


def _write_rejected(con: Engine, losses: Sequence[_Loss], file: Path) -> None:
    lossy = [loss.table for loss in losses if loss.rows]
    if not lossy:
        pq.write_table(REJECTED.empty_table(), file)
        return
    table = lossy[0] if len(lossy) == 1 else ibis.union(*lossy)
    with pq.ParquetWriter(file, REJECTED) as out:
        for some in _of_one_size(con.batches(table.order_by(["file", "row"]))):
            out.write_table(some.cast(REJECTED))


def _of_one_size(batches: Iterable[pa.RecordBatch]) -> Iterator[pa.Table]:
    """The same rows in groups that do not depend on how an engine cuts them, for the same bytes."""
    held: list[pa.RecordBatch] = []
    for batch in batches:
        held.append(batch)
        while sum(map(len, held)) >= _REJECTED_AT_ONCE:
            table = pa.Table.from_batches(held).combine_chunks()
            yield table.slice(0, _REJECTED_AT_ONCE)
            held = table.slice(_REJECTED_AT_ONCE).to_batches()
    if held:
        yield pa.Table.from_batches(held).combine_chunks()


# -- events


def _write_pieces(
    con: Engine, log: Log, numbers: _Numbers, usable: int, parts: Parts | None, work: Path
) -> tuple[tuple[Path, ...], ...]:
    """Sort the events into pieces: of each part (or of the one store) the folders of its pieces."""
    of_users, of_items, each, n = _cut(con, numbers, usable, parts)
    items = numbers.items.select(ITEM, item=_ITEM, category=_CATEGORY, **of_items)
    users = numbers.users.select(USER, user=_USER, **of_users)
    rows = log.kept.drop(CATEGORY).join(items, ITEM).join(users, USER)
    if len(log.behaviors) > 1:
        kind = con.memory(
            pa.table({"kind": log.behaviors, "code": pa.array(range(len(log.behaviors)), pa.uint8())})
        )
        rows = rows.mutate(kind=rows[BEHAVIOR].fill_null("")).join(kind, "kind")
    else:
        rows = rows.mutate(code=ibis.literal(0, "int8"))
    piece = {PIECE: sum((rows[name] for name in (*of_items, *of_users)), start=ibis.literal(0, "int32"))}
    rows = rows.select(
        "user", "category", "item", time=rows[TIME], behavior=rows.code, **(piece if n * each > 1 else {})
    )
    write = partial(write_piece, str(work), log.read >= 1 << 31)
    con.write_pieces(rows, _ORDER, write, n * each)
    return tuple(tuple(piece_folder(work, part * each + i) for i in range(each)) for part in range(n))


def _cut(
    con: Engine, numbers: _Numbers, usable: int, parts: Parts | None
) -> tuple[dict[str, Any], dict[str, Any], int, int]:
    """What a user and what an item add to the number of a piece, the pieces of each part, and the parts."""
    n = parts.count if parts else 1
    each = -(-con.pieces(usable) // n)
    if n * each == 1:
        return {}, {}, 1, 1
    users = numbers.users
    events = con.fetch(users.order_by(_USER).select(_EVENTS))[_EVENTS].to_numpy()
    if parts is None or parts.by == "user":
        each = max(1, min(each, len(events) // n))
        return {"of_user": _range_of(users[_USER], cuts(events, n * each, "user"), 1)}, {}, each, n
    each = min(each, len(events))
    met = con.fetch(numbers.category_events)
    categories = np.zeros(int(met[_CATEGORY].to_numpy().max()) + 1, dtype=np.int64)
    categories[met[_CATEGORY].to_numpy()] = met[_EVENTS].to_numpy()
    of_user = _range_of(users[_USER], cuts(events, each, "user"), 1)
    of_item = _range_of(numbers.items[_CATEGORY], cuts(categories, n, "category"), each)
    return {"of_user": of_user}, {"of_item": of_item}, each, n


def _range_of(number: Any, bounds: np.ndarray, step: int) -> Any:
    """0, step, 2 * step ... by the range that a number lies in."""
    below = [(number < int(end), ibis.literal(i * step, "int32")) for i, end in enumerate(bounds[1:-1])]
    last = ibis.literal(len(below) * step, "int32")
    return ibis.cases(*below, else_=last) if below else last


def _check_read(read: int, usable: int) -> None:
    if read != usable:
        raise EventsError(
            f"{read:,} events were sorted, {usable:,} had been counted before: the input changed meanwhile. "
            "Ingest it again when nobody writes to it."
        )


# -- users, items, categories


@dataclass(frozen=True)
class _Fields:
    vocabularies: list[dict[str, Any]]  # name and sorted values of each
    codes: np.ndarray  # [rows, fields] 0 = missing, n = the n-th value
    skipped: dict[str, str]  # column -> why


def _fields(
    rows: pa.Table, each: _Each | None, named: Sequence[str] | None, role: str, category: np.ndarray | None
) -> _Fields:
    """Codes of the columns named, or of all that suit: see `FEWEST`; none may be constant per category."""
    available = each.others if each else ()
    if strange := [name for name in named or () if name not in available]:
        raise EventsError(f"{role} has no column {strange[0]}; it has {list(available)}.")
    vocabularies, codes, skipped = [], [], {}
    for name in available if named is None else named:
        column = rows[name]
        if named is None and (reason := _unsuited(name, column)):
            skipped[name] = reason
            continue
        values = sorted(pc.unique(column.drop_null()).to_pylist())
        code = pc.index_in(column, value_set=pa.array(values, column.type)).fill_null(-1).to_numpy() + 1
        if named is None and category is not None and _constant_within(category, code):
            skipped[name] = "constant within every category"
            continue
        vocabularies.append({"name": name, "values": values})
        codes.append(code.astype(np.int32))
    table = np.stack(codes, axis=1) if codes else np.empty((rows.num_rows, 0), dtype=np.int32)
    return _Fields(vocabularies, table, skipped)


def _unsuited(name: str, column: pa.ChunkedArray) -> str | None:
    if name == TITLE:
        return "a title is for reading"
    dtype = column.type
    if not (pa.types.is_string(dtype) or pa.types.is_boolean(dtype) or pa.types.is_integer(dtype)):
        return f"holds {dtype}, not strings, booleans or integers"
    distinct = pc.count_distinct(column).as_py()
    if not FEWEST <= distinct <= MOST:
        return f"{distinct:,} distinct values, not {FEWEST} to {MOST:,}"
    return None


def _constant_within(category: np.ndarray, code: np.ndarray) -> bool:
    start = np.flatnonzero(np.diff(category, prepend=-1))
    return bool(np.array_equal(np.minimum.reduceat(code, start), np.maximum.reduceat(code, start)))


def _write_items(folder: Path, rows: pa.Table, catalog: _Each | None, named: Sequence[str] | None) -> _Fields:
    category = rows[_CATEGORY].to_numpy()
    start = np.searchsorted(category, np.arange(int(category[-1]) + 2))
    np.save(folder / "category_start.npy", start.astype(np.int64))
    write_arrow(folder, "categories", pa.table({CATEGORY: rows[CATEGORY].take(pa.array(start[:-1]))}))
    write_arrow(folder, "items", rows.select([c for c in (ITEM, TITLE) if c in rows.column_names]))
    fields = _fields(rows, catalog, named, "items", category)
    np.save(folder / "item_feature.npy", fields.codes)
    return fields


def _people(con: Engine, numbers: _Numbers, people: _Each | None, present: np.ndarray) -> pa.Table:
    """Users with an event in the store, in order, with the columns of the users file."""
    users = numbers.users if people is None else numbers.users.left_join(people.table, USER)
    columns = [USER, *(people.others if people else ())]
    rows = con.fetch(users.order_by(_USER).select(columns))
    return rows if len(present) == rows.num_rows else rows.take(pa.array(present))


def _write_users(folder: Path, rows: pa.Table, people: _Each | None, named: Sequence[str] | None) -> _Fields:
    write_arrow(folder, "users", rows.select([USER]))
    fields = _fields(rows, people, named, "users", None)
    np.save(folder / "profile.npy", fields.codes)
    return fields


# -- the report


def _counts(written: Written) -> dict[str, Any]:
    """Whatever has no event was an error before."""
    assert written.first_time is not None
    assert written.last_time is not None
    counts = {"kept": written.rows, "duplicates": written.read - written.rows, "groups": written.groups}
    return {**counts, "first_time": written.first_time, "last_time": written.last_time}


def _facts(report: IngestReport, profile_fields: _Fields, item_fields: _Fields) -> dict[str, Any]:
    """What a store must know of the log, and the report, without what differs between two runs."""
    counts = report.as_dict()
    del counts["seconds"], counts["parts"]
    return {
        "behaviors": list(report.behaviors),
        "profile_fields": profile_fields.vocabularies,
        "item_fields": item_fields.vocabularies,
        "first_time": report.first_time,
        "last_time": report.last_time,
        "report": counts,
    }


def _rows_lost(
    con: Engine,
    log: Log,
    numbers: _Numbers,
    losses: Sequence[_Loss],
    catalog: _Each | None,
    people: _Each | None,
) -> dict[str, Any]:
    inputs = {loss.role: loss for loss in losses}
    tables = {"items": catalog, "users": people}
    counts = {
        role: {"read": inputs[role].read, **inputs[role].reasons, **each.counts} if each else {}
        for role, each in tables.items()
    }
    if catalog is not None:
        orphans = catalog.table.anti_join(numbers.items, ITEM)
        counts["items"]["without category"] = count(con, orphans)
    return {
        "read": log.read,
        "rejected": losses[0].reasons,
        "recategorised": numbers.recategorised,
        "items_input": counts["items"],
        "users_input": counts["users"],
    }


def _columns(inputs: _Inputs, item_fields: _Fields, profile_fields: _Fields) -> dict[str, Any]:
    used = [f"events.{column}" for column in EVENT_COLUMNS if inputs.events.has(column)]
    skipped = {f"events.{column}": "an event has no place for it" for column in inputs.events.unused}
    notes = []
    for source, keys, fields in (
        (inputs.items, (ITEM, CATEGORY, TITLE), item_fields),
        (inputs.users, (USER,), profile_fields),
    ):
        if source is not None:
            used += [f"{source.role}.{column}" for column in keys if source.has(column)]
            used += [f"{source.role}.{field['name']}" for field in fields.vocabularies]
            skipped |= {f"{source.role}.{name}": why for name, why in fields.skipped.items() if name != TITLE}
    for source in (inputs.events, inputs.items, inputs.users):
        notes += [
            f"{source.role}.{column}: whole numbers written with a decimal point, read as integers"
            for column, dtype in inputs.types.items()
            if source is not None and dtype == "int64" and source.kinds.get(column) in ("float", "whole")
        ]
    return {"columns_used": tuple(used), "columns_skipped": skipped, "notes": tuple(notes)}
