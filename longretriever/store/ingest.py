"""How does a log become a store? Ids are numbered first, then one sort of small integers orders all.

Sorting the ids themselves would be the dear part: two joins turn some 40 bytes of strings into integers,
so that a whole store takes 1.1 times what DuckDB's bare sort of the same 20M events takes, and less than
half its memory. What the engine holds is bounded by `memory_limit` (it spills beside the output), and the
sorted events are streamed into the store, whole users at a time. The expressions are Ibis; only reading,
settings and streaming speak DuckDB.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import ibis
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from longretriever.errors import EventsError
from longretriever.events import BEHAVIOR, CATEGORY, ITEM, LATEST, TIME, TITLE, USER
from longretriever.saved import Folder, writing
from longretriever.store.sources import (
    BROKEN,
    EVENT_COLUMNS,
    SHOWN,
    Log,
    Source,
    as_feature,
    as_key,
    engine,
    judge,
    keep,
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
_GROUPS_AT_ONCE = 1 << 22


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
    may hold, such as "2GB"; beyond it, it spills beside `out`. `profile`, `item_features`: the columns to
    use, instead of all that suit. `facts`, `made_from`: what else the manifest shall say.

    The same log gives the same bytes, whatever the order of its rows and files and the number of threads
    (but for `rejected.parquet`, which names files and rows).

    Raises `EventsError` when an input is unreadable, lacks a column, mixes time units, or has more than
    `max_rejected` bad rows; nothing is written then.

    Memory: the engine's, plus the ids and features of items and users, plus the longest life. Time: about
    that of a sort of the log; 20M events with string ids take half a minute on two busy cores.
    """
    clock = _Clock(progress)
    with writing(out, "store") as folder, engine(folder.path / "work", memory_limit, threads) as con:
        with clock("read", "reading the inputs"):
            maps = (columns, item_columns, user_columns)
            inputs = _open(con, (events, items, users), maps, folder.path / "work")
            log = judge(con, inputs.events, inputs.types, time_unit)
        with clock("number", f"numbering the users and items of {log.read:,} rows"):
            catalog = _one_row_each(con, inputs.items, ITEM, inputs.types) if inputs.items else None
            people = _one_row_each(con, inputs.users, USER, inputs.types) if inputs.users else None
            numbers = _number(con, log, catalog)
            losses = _losses(inputs, log, numbers)
            _check(losses, max_rejected)
            _write_rejected(con, losses, folder.path / "rejected.parquet")
        with clock("sort", f"sorting {log.read - losses[0].rows:,} events"):
            item_rows = _fetch(con, numbers.items.order_by("item"))
            item_category = item_rows["category"].to_numpy()
            blocks = _whole_users(_sorted_events(con, log, numbers))
            written = _write_events(folder, blocks, item_category, wide=log.read >= 1 << 31)
            _write_category_groups(folder, written.category_groups)
        with clock("describe", "writing users, items and categories"):
            item_fields = _write_items(folder, item_rows, catalog, item_features)
            people_rows = _people(con, numbers, people, written.users)
            profile_fields = _write_users(folder, people_rows, people, profile)
        report = IngestReport(
            **_rows_lost(log, numbers, losses, catalog, people),
            **written.counts,
            users=len(written.users),
            items=item_rows.num_rows,
            categories=len(written.category_groups),
            time_unit=log.unit,
            behaviors=log.behaviors,
            **_columns(inputs, item_fields, profile_fields),
        )
        counts = report.as_dict()
        del counts["seconds"]
        folder.made_from.update(made_from or {})
        folder.facts.update(
            facts or {},
            behaviors=list(log.behaviors),
            profile_fields=profile_fields.vocabularies,
            item_fields=item_fields.vocabularies,
            first_time=report.first_time,
            last_time=report.last_time,
            report=counts,
        )
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
    with tempfile.TemporaryDirectory() as folder, engine(Path(folder) / "work", memory_limit, threads) as con:
        inputs = _open(con, (events, items, None), (columns, item_columns, None), Path(folder) / "work")
        log = judge(con, inputs.events, inputs.types, time_unit)
        catalog = _one_row_each(con, inputs.items, ITEM, inputs.types) if inputs.items else None
        numbers = _number(con, log, catalog)
        _check(_losses(inputs, log, numbers), max_rejected)
        rows = log.kept.join(numbers.items.select(ITEM, usual=CATEGORY), ITEM)
        said = [rows[CATEGORY], rows.usual]
        if catalog is not None and CATEGORY in catalog.table.columns:
            given = catalog.table.select(item_given=ITEM, given=CATEGORY)
            rows = rows.left_join(given, [(ITEM, "item_given")])
            said = [rows.given, rows[CATEGORY], rows.usual]
        rows = rows.mutate(**{CATEGORY: ibis.coalesce(*said)})
        return _fetch(con, rows.select(*EVENT_COLUMNS).order_by([TIME, USER, ITEM, BEHAVIOR]))


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
    with tempfile.TemporaryDirectory() as folder, engine(Path(folder) / "work", None, None) as con:
        source = read(con, given, role, columns, Path(folder) / "work")
        types = {column: key_type(column, [source]) for column in (key, CATEGORY)}
        each, loss = _one_row_each(con, source, key, types), _loss_of_key(source, key, types[key])
        if max_rejected is not None:
            _check([loss], max_rejected)
        return _fetch(con, each.table.order_by(key)), {"read": loss.read, **loss.reasons, **each.counts}


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


def _open(con: Any, given: Sequence[Any], maps: Sequence[Mapping[str, str] | None], work: Path) -> _Inputs:
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


def _one_row_each(con: Any, source: Source, key: str, types: Mapping[str, str]) -> _Each:
    """Of the rows of an id the most frequent one, then the smallest; rows with a category go first."""
    keys = [key, CATEGORY] if key == ITEM else [key]
    others = [column for column in source.kinds if column not in keys]
    rows = source.table.select(
        **{column: as_key(source, column, types[column]) for column in keys},
        **{column: as_feature(source, column) for column in others},
    )
    rows = keep(con, rows.filter(rows[key].notnull()))
    if _number_of(rows.count()) == _number_of(rows[key].nunique()):  # the usual file
        return _Each(rows, tuple(others), {"duplicate": 0, "conflicting": 0})
    distinct = keep(con, rows.group_by(list(rows.columns)).agg(**{_COPIES: rows.count()}))
    order = [distinct[keys[-1]].isnull(), ibis.desc(distinct[_COPIES]), *(distinct[c] for c in rows.columns)]
    ranked = distinct.mutate(rank=ibis.row_number().over(group_by=distinct[key], order_by=order))
    table = keep(con, ranked.filter(ranked["rank"] == 0).drop("rank", _COPIES))
    copies, n_distinct, n = (
        _number_of(distinct[_COPIES].sum().fill_null(0)),
        _number_of(distinct.count()),
        _number_of(table.count()),
    )
    counts = {"duplicate": copies - n_distinct, "conflicting": n_distinct - n}
    return _Each(table, tuple(others), counts)


def _number_of(expression: Any) -> int:
    return int(expression.to_pyarrow().as_py())


# -- numbers for ids


@dataclass(frozen=True)
class _Numbers:
    items: Any  # item_id, category_id, item and category (their numbers), and the columns of the items file
    users: Any  # user_id, user
    without_category: int  # events whose item has none
    recategorised: int


def _number(con: Any, log: Log, catalog: _Each | None) -> _Numbers:
    """Categories and users by sorted id, items by (category, id).

    The items file has the say on an item's category; where it is silent the most frequent one among the
    events counts, of equally frequent ones the smallest.
    """
    kept = log.kept
    votes = keep(con, kept.group_by([ITEM, CATEGORY]).agg(votes=kept.count()))
    valid = votes.filter(votes[CATEGORY].notnull())
    rank = ibis.row_number().over(group_by=valid[ITEM], order_by=[ibis.desc(valid.votes), valid[CATEGORY]])
    winner = valid.mutate(rank=rank)
    items = winner.filter(winner["rank"] == 0).select(ITEM, CATEGORY)
    if catalog is not None:
        items = _with_catalog(items, catalog)
    items = items.filter(items[CATEGORY].notnull())
    number = ibis.row_number().over(order_by=[items[CATEGORY], items[ITEM]]).cast("int32")
    category = ibis.dense_rank().over(order_by=items[CATEGORY]).cast("int32")
    items = keep(con, items.mutate(item=number, category=category))
    ids = kept.select(USER).distinct()
    users = keep(con, ids.mutate(user=ibis.row_number().over(order_by=ids[USER]).cast("int32")))
    return _Numbers(items, users, *_changes(votes, items))


def _with_catalog(items: Any, catalog: _Each) -> Any:
    both = items.outer_join(catalog.table, ITEM, rname="file_{name}")
    return both.select(
        **{
            ITEM: ibis.coalesce(both[ITEM], both[f"file_{ITEM}"]),
            CATEGORY: ibis.coalesce(both[f"file_{CATEGORY}"], both[CATEGORY]),
            **{name: both[name] for name in catalog.others},
        }
    )


def _changes(votes: Any, items: Any) -> tuple[int, int]:
    """Events whose item has no category, and events whose category is not the one of their item."""
    final = votes.left_join(items.select(ITEM, final=items[CATEGORY]), ITEM)
    (row,) = (
        final.aggregate(
            none=final.votes.sum(where=final.final.isnull()).fill_null(0),
            other=final.votes.sum(where=final[CATEGORY] != final.final).fill_null(0),
        )
        .to_pyarrow()
        .to_pylist()
    )
    return int(row["none"]), int(row["other"])


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
    reason, value = f"no {key}", as_key(source, key, dtype)
    rows = source.table.mutate(
        reason=ibis.literal(reason), **{f"given_{key}": source.table[key].cast("string")}
    )
    broken = 0 if source.broken is None else _number_of(source.broken.count())
    found = {reason: _number_of(value.isnull().sum().fill_null(0)), BROKEN: broken}
    reasons = {why: n for why, n in found.items() if n}
    read = _number_of(source.table.count()) + broken
    return _Loss(source.role, read, reasons, located(source, rows.filter(value.isnull())))


def _check(losses: Iterable[_Loss], max_rejected: float) -> None:
    for loss in losses:
        if loss.rows <= max_rejected * loss.read and (loss.rows < loss.read or not loss.read):
            continue
        first = loss.table.order_by(["file", "row"]).limit(SHOWN).to_pyarrow().to_pylist()
        reasons = ", ".join(f"{n:,} {why}" for why, n in sorted(loss.reasons.items()))
        raise EventsError(
            f"{loss.rows:,} of {loss.read:,} rows of the {loss.role} cannot be used ({reasons}), such as\n"
            + "\n".join(f"  {_told(row)}" for row in first)
            + f"\nAt most {max_rejected:.2%} may be: mend the input, or raise it with --max-rejected."
        )


def _told(row: Mapping[str, Any]) -> str:
    keys = ", ".join(f"{name}={row[name]!r}" for name in EVENT_COLUMNS[:4] if row[name] is not None)
    return f"{Path(row['file']).name} row {row['row']}: {row['reason']} ({row['line'] or keys})"


def _write_rejected(con: Any, losses: Sequence[_Loss], file: Path) -> None:
    lossy = [loss.table for loss in losses if loss.rows]
    if not lossy:
        pq.write_table(REJECTED.empty_table(), file)
        return
    table = lossy[0] if len(lossy) == 1 else ibis.union(*lossy)
    con.to_parquet(table.order_by(["file", "row"]), file)


# -- events


def _sorted_events(con: Any, log: Log, numbers: _Numbers) -> pa.RecordBatchReader:
    """user, item, time, behavior as numbers, in the order of the store; duplicates are still in it."""
    items = numbers.items.select(ITEM, "item", "category")
    rows = log.kept.drop(CATEGORY).join(items, ITEM).join(numbers.users, USER)
    if len(log.behaviors) > 1:
        kinds = pa.table({"kind": log.behaviors, "code": pa.array(range(len(log.behaviors)), pa.uint8())})
        con.con.register("behavior_kinds", kinds)
        kind = con.table("behavior_kinds")
        rows = rows.mutate(kind=rows[BEHAVIOR].fill_null("")).join(kind, "kind")
    else:
        rows = rows.mutate(code=ibis.literal(0, "uint8"))
    rows = rows.select("user", "category", "item", time=rows[TIME], behavior=rows.code)
    return _stream(con, rows.order_by(["user", "category", "time", "item", "behavior"]))


def _stream(con: Any, expression: Any) -> pa.RecordBatchReader:
    """Ibis's own `to_pyarrow_batches` holds the whole result, and its newest release lags behind DuckDB 2."""
    return pa.RecordBatchReader.from_stream(con.con.sql(con.compile(expression)))


def _fetch(con: Any, expression: Any) -> pa.Table:
    return _stream(con, expression).read_all()


def _whole_users(batches: Iterable[pa.RecordBatch]) -> Iterator[dict[str, np.ndarray]]:
    """The same rows cut only between users, so that what concerns one user is done in one place.

    Holds a batch and the longest life.
    """
    held: list[dict[str, np.ndarray]] = []
    for batch in batches:
        rows = {name: batch[name].to_numpy() for name in ("user", "item", "time", "behavior")}
        if not batch.num_rows:
            continue
        cut = int(np.searchsorted(rows["user"], rows["user"][-1]))
        if cut == 0 and (not held or held[-1]["user"][-1] == rows["user"][0]):
            held.append(rows)
            continue
        yield _joined([*held, {name: column[:cut] for name, column in rows.items()}])
        held = [{name: column[cut:] for name, column in rows.items()}]
    if held:
        yield _joined(held)


def _joined(parts: Sequence[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


class _Column:
    """A one-dimensional .npy file that grows: its header has room for any length."""

    def __init__(self, folder: Folder, name: str, dtype: type) -> None:
        self._stream = (folder.path / f"{name}.npy").open("wb")
        self._dtype = np.dtype(dtype)
        self._length = 0
        self._write_header()

    def append(self, values: np.ndarray | Sequence[int]) -> None:
        values = np.asarray(values, dtype=self._dtype)
        self._stream.write(values.data)
        self._length += len(values)

    def close(self) -> None:
        self._stream.seek(0)
        self._write_header()
        self._stream.close()

    def _write_header(self) -> None:
        shape = {"shape": (self._length,), "fortran_order": False, "descr": self._dtype.str}
        np.lib.format.write_array_header_1_0(self._stream, shape)


@dataclass(frozen=True)
class _Written:
    counts: dict[str, Any]
    users: np.ndarray  # numbers, among all users of the log, of those with an event in the store
    category_groups: np.ndarray  # [C] groups of each category


def _write_events(
    folder: Folder, blocks: Iterable[dict[str, np.ndarray]], item_category: np.ndarray, wide: bool
) -> _Written:
    """All arrays whose length is that of the events or of the groups; `wide` event rows need 64 bits."""
    row = np.int64 if wide else np.int32
    dtypes = {"event_item": np.int32, "event_time": np.int64, "event_behavior": np.uint8}
    dtypes |= {"group_category": np.int32, "group_start": np.int64, "user_group": np.int64}
    dtypes |= {"time_order": row, "time_position": row}
    with ExitStack() as files:
        columns = {n: files.enter_context(closing(_Column(folder, n, dtype))) for n, dtype in dtypes.items()}
        return _append_all(columns, blocks, item_category)


def _append_all(
    columns: Mapping[str, _Column], blocks: Iterable[dict[str, np.ndarray]], item_category: np.ndarray
) -> _Written:
    category_groups = np.zeros(int(item_category[-1]) + 1, dtype=np.int64)
    read = rows = groups = 0
    first, last, users = np.inf, -np.inf, []
    for block in blocks:
        read += len(block["user"])
        part = _arranged(_without_duplicates(block), item_category)
        users.append(part.pop("user"))
        for name in ("group_start", "time_order", "time_position"):
            part[name] += rows
        part["user_group"] += groups
        for name, values in part.items():
            columns[name].append(values)
        category_groups += np.bincount(part["group_category"], minlength=len(category_groups))
        first, last = min(first, part["event_time"].min()), max(last, part["event_time"].max())
        rows, groups = rows + len(part["event_item"]), groups + len(part["group_category"])
    columns["group_start"].append([rows])
    columns["user_group"].append([groups])
    counts = {"kept": rows, "duplicates": read - rows, "groups": groups}
    counts |= {"first_time": int(first), "last_time": int(last)}
    return _Written(counts, np.concatenate(users), category_groups)


def _without_duplicates(block: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Equal events lie next to each other in the order of the store."""
    fresh = np.ones(len(block["user"]), dtype=bool)
    fresh[1:] = np.logical_or.reduce([column[1:] != column[:-1] for column in block.values()])
    return {name: column[fresh] for name, column in block.items()}


def _arranged(block: dict[str, np.ndarray], item_category: np.ndarray) -> dict[str, np.ndarray]:
    """The arrays of the store for some whole users, rows and groups counted from 0; `user` has each once."""
    user, category = block["user"], item_category[block["item"]]
    new_user = np.ones(len(user), dtype=bool)
    new_user[1:] = user[1:] != user[:-1]
    new_group = new_user.copy()
    new_group[1:] |= category[1:] != category[:-1]
    group_start, user_start = np.flatnonzero(new_group), np.flatnonzero(new_user)
    order = np.argsort(user.astype(np.int64) * LATEST + block["time"], kind="stable")  # below 2^63
    position = np.empty_like(order)
    position[order] = np.arange(len(order))
    return {
        "user": user[user_start],
        "event_item": block["item"],
        "event_time": block["time"],
        "event_behavior": block["behavior"],
        "group_category": category[group_start],
        "group_start": group_start,
        "user_group": np.searchsorted(group_start, user_start),
        "time_order": order,
        "time_position": position,
    }


def _write_category_groups(folder: Folder, category_groups: np.ndarray) -> None:
    """A counting sort of the groups by category, some millions at a time; groups of one stay in order."""
    start = np.concatenate([[0], np.cumsum(category_groups)])
    folder.save_array("category_group_start", start)
    category = np.load(folder.path / "group_category.npy", mmap_mode="r")
    dtype = np.int32 if len(category) < 1 << 31 else np.int64
    out = np.lib.format.open_memmap(
        folder.path / "category_group.npy", mode="w+", dtype=dtype, shape=(len(category),)
    )
    free = start[:-1].copy()
    for base in range(0, len(category), _GROUPS_AT_ONCE):
        some = np.asarray(category[base : base + _GROUPS_AT_ONCE])
        order = np.argsort(some, kind="stable")
        here = np.bincount(some, minlength=len(free))
        among = np.arange(len(some)) - np.repeat(np.cumsum(here) - here, here)
        out[free[some[order]] + among] = base + order
        free += here
    out.flush()


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


def _write_items(
    folder: Folder, rows: pa.Table, catalog: _Each | None, named: Sequence[str] | None
) -> _Fields:
    category = rows["category"].to_numpy()
    start = np.searchsorted(category, np.arange(int(category[-1]) + 2))
    folder.save_array("category_start", start.astype(np.int64))
    _write_arrow(folder, "categories", pa.table({CATEGORY: rows[CATEGORY].take(pa.array(start[:-1]))}))
    _write_arrow(folder, "items", rows.select([c for c in (ITEM, TITLE) if c in rows.column_names]))
    fields = _fields(rows, catalog, named, "items", category)
    folder.save_array("item_feature", fields.codes)
    return fields


def _people(con: Any, numbers: _Numbers, people: _Each | None, present: np.ndarray) -> pa.Table:
    """Users with an event in the store, in order, with the columns of the users file."""
    users = numbers.users if people is None else numbers.users.left_join(people.table, USER)
    columns = [USER, *(people.others if people else ())]
    rows = _fetch(con, users.order_by("user").select(columns))
    return rows if len(present) == rows.num_rows else rows.take(pa.array(present))


def _write_users(
    folder: Folder, rows: pa.Table, people: _Each | None, named: Sequence[str] | None
) -> _Fields:
    _write_arrow(folder, "users", rows.select([USER]))
    fields = _fields(rows, people, named, "users", None)
    folder.save_array("profile", fields.codes)
    return fields


def _write_arrow(folder: Folder, name: str, table: pa.Table) -> None:
    """One batch, so that the whole column is mapped as it lies; large strings may pass 2 GiB."""
    columns = {
        column: table[column].cast(pa.large_string())
        if pa.types.is_string(table[column].type)
        else table[column]
        for column in table.column_names
    }
    table = pa.table(columns).combine_chunks()
    with (
        pa.OSFile(str(folder.path / f"{name}.arrow"), "wb") as file,
        pa.ipc.new_file(file, table.schema) as out,
    ):
        out.write_table(table)


# -- the report


def _rows_lost(
    log: Log, numbers: _Numbers, losses: Sequence[_Loss], catalog: _Each | None, people: _Each | None
) -> dict[str, Any]:
    inputs = {loss.role: loss for loss in losses}
    tables = {"items": catalog, "users": people}
    counts = {
        role: {"read": inputs[role].read, **inputs[role].reasons, **each.counts} if each else {}
        for role, each in tables.items()
    }
    if catalog is not None:
        orphans = catalog.table.anti_join(numbers.items, ITEM)
        counts["items"]["without category"] = _number_of(orphans.count())
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
