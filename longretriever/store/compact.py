"""How do live events become part of the store? All of it is ingested anew, as one log.

Nothing is merged: the store's events, items and users are written out as Parquet, the journal's events are
put beside them, and `ingest` makes a store of both. So there is one piece of code that knows how a store is
made, and a compacted one is, byte for byte, that of the whole log. What that costs beside the ingest of the
log itself is in docs/live.md.

The snapshot is a number, `upto`: journal rows up to it are in the new store, which says so in its manifest;
later ones stay live. Rows are deleted a generation later, when a store that was made from this one exists, so
that whoever still reads the store before the newest finds all that it lacks.
"""

from __future__ import annotations

import itertools
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from longretriever.errors import InputError, Mismatch, NotSaved
from longretriever.events import BEHAVIOR, CATEGORY, ITEM, MOST_KINDS, TIME, TITLE, USER
from longretriever.saved import beside, check_replaceable
from longretriever.store.behaviors import Store, Vocabulary
from longretriever.store.ingest import IngestReport, ingest
from longretriever.store.live import Event, LiveJournal, is_address, open_journal
from longretriever.store.sources import SHOWN

_AT_ONCE = 1 << 18  # rows of the store that are written out together
_LIVE_AT_ONCE = 1 << 14


@dataclass(frozen=True)
class CompactReport:
    """What went from the journal into the store."""

    store: str  # the folder that was written, or is as it was
    journal: str
    after: int  # number of the last row of the journal that the store before had
    upto: int  # and that the store has now
    live: int  # events between them, also those that the store had already
    forgotten: int  # users whose older events and profiles are gone
    deleted: int  # rows of the journal, up to `after`
    ingest: IngestReport | None  # of the whole log; None where there was nothing to fold
    seconds: float

    def as_dict(self) -> dict[str, Any]:
        """The same as plain values, for JSON or a table."""
        return asdict(self)


def compact(
    store: str | os.PathLike[str],
    journal: str | os.PathLike[str],
    out: str | os.PathLike[str] | None = None,
    *,
    memory_limit: str | None = None,
    threads: int | None = None,
    progress: Callable[[str], None] | None = None,
) -> CompactReport:
    """Fold a journal's events into the store that it belongs to, or with `out` into another folder.

    Users forgotten since lose what the store has of them. Writing to the journal goes on meanwhile; what
    arrives then stays live. A crash leaves the old store or the new one, and nothing is counted twice or lost
    with either; calling again finishes what was left. Without anything to fold only an `out` is written.

    `memory_limit`, `threads`: as of `ingest`, whose time and memory this takes, and some more for writing the
    store out and for verifying it, since it may be the only copy. On the disk beside the new store it needs
    room for the events as Parquet.

    `journal` is a file or an address, as of `open_journal`. Raises `Unavailable` where a server is gone,
    `NotSaved`, `Damaged` or `Mismatch` for a store or journal that cannot be used, `InputError` when
    another process compacts this journal, or nothing would be left; the old store stays then.
    """
    start, say = time.perf_counter(), progress or (lambda line: None)
    target = Path(os.path.realpath(store if out is None else out))
    if not is_address(journal) and not Path(journal).is_file():
        raise NotSaved(f"{journal}: no live events there. Pass the file that `longretriever serve` writes.")
    with closing(open_journal(journal)) as live, live.compacting():
        say("checking store and journal")
        check_replaceable(target, "store")
        live.check()
        source = Store.open(store, verify=True)
        after, upto = _numbers(source, live)
        counts, report = {"live": 0, "forgotten": 0, "deleted": 0}, None
        if live.count(after) or target != Path(os.path.realpath(store)):
            with _folder_beside(target) as work:
                export = _Export(source, live, after, upto, work)
                counts |= export.write(say)
                inputs = export.as_inputs()
                del source, export  # or the mapped files would stay in memory
                report = ingest(
                    **inputs, out=target, memory_limit=memory_limit, threads=threads, progress=say
                )
            say("deleting what the store before had")
            counts["deleted"] = _delete(live, after)
        shown = str(store if out is None else out)
        seconds = time.perf_counter() - start
        return CompactReport(shown, live.name, after, upto, **counts, ingest=report, seconds=seconds)


def _numbers(source: Store, live: LiveJournal) -> tuple[int, int]:
    """Up to where the store has the journal's events already, and up to where it will."""
    after = live.folded_into(source)
    if 0 < after < (deleted := live.deleted()):
        raise Mismatch(
            f"{source.path} holds the events of {live.name} up to number {after:,}, but those up to "
            f"{deleted:,} went into a newer store and were deleted. Compact that one."
        )
    return after, live.last()


def _delete(live: LiveJournal, upto: int) -> int:
    """In steps, so that who appends meanwhile need not wait for all of it."""
    deleted = 0
    while upto and (some := live.delete_folded(upto).result()):
        deleted += some
    return deleted


@contextmanager
def _folder_beside(target: Path) -> Iterator[Path]:
    """A hidden folder on the disk of `target`, gone afterwards; after a kill, with the next store there."""
    folder = beside(target, "export")
    folder.mkdir(parents=True)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@dataclass(frozen=True)
class _Export:
    """A store and the journal's events behind it as the inputs of `ingest`: Parquet files in `work`."""

    source: Store
    live: LiveJournal
    after: int
    upto: int
    work: Path

    def write(self, say: Callable[[str], None]) -> dict[str, int]:
        """Write all files; how many live events and forgotten users there were. Holds some 100,000 rows."""
        source, schema = self.source, _schema(self.source)
        users = self.live.forgotten(self.after, self.upto)
        numbers = [number for user in users if (number := source.user_ids.number_of(user)) is not None]
        gone = np.zeros(source.n_users, dtype=bool)
        gone[numbers] = True
        say(f"writing out {source.n_events:,} events")
        kept = _write(self.work / "events.parquet", schema, _events(source, gone, schema))
        say(f"adding live events up to number {self.upto:,}")
        arrived = self.live.between(self.after, self.upto)
        new = _write(self.work / "live.parquet", schema, _live_events(source, arrived, schema))
        if not kept + new:
            raise InputError(f"{source.path}: all of its users are forgotten, so no event would be left.")
        say(f"writing out {source.n_items:,} items and {source.n_users:,} users")
        _write(self.work / "items.parquet", None, _items(source))
        if source.profile_fields:
            _write(self.work / "users.parquet", None, _users(source, gone))
        return {"live": new, "forgotten": len(numbers)}

    def as_inputs(self) -> dict[str, Any]:
        """The arguments of `ingest`: the same fields as before, whatever else would suit by now."""
        source = self.source
        return {
            "events": [self.work / "events.parquet", self.work / "live.parquet"],
            "items": self.work / "items.parquet",
            "users": self.work / "users.parquet" if source.profile_fields else None,
            "profile": [field.name for field in source.profile_fields] or None,
            "item_features": [field.name for field in source.item_fields],
            "time_unit": "s",
            "max_rejected": 1.0,  # a bad row must not keep the good ones out for ever
            "facts": {"live": {"journal": self.live.id, "upto": self.upto}},
            "made_from": {"store": source.fingerprint},
        }


def _write(file: Path, schema: pa.Schema | None, tables: Iterable[pa.Table]) -> int:
    """Tables below each other in one file; how many rows they have. `None`: the schema of the first."""
    tables, rows = iter(tables), 0
    first = next(tables) if schema is None else schema.empty_table()
    # items repeat too seldom within a piece: to look for repetition in all columns takes four times as long
    with pq.ParquetWriter(file, first.schema, use_dictionary=[USER, BEHAVIOR], write_statistics=False) as out:
        for table in itertools.chain([first], tables):
            out.write_table(table)
            rows += table.num_rows
    return rows


def _schema(source: Store) -> pa.Schema:
    ids = {USER: source.user_ids.values, ITEM: source.items[ITEM], CATEGORY: source.category_ids.values}
    types = {name: column.type for name, column in ids.items()}
    return pa.schema({**types, TIME: pa.int64(), BEHAVIOR: pa.string()})


# -- the store


def _events(source: Store, gone: np.ndarray, schema: pa.Schema) -> Iterator[pa.Table]:
    """All events but those of users that are `gone` [U], in the order of the store; no categories.

    An item's category is the store's, and it is said in the items.
    """
    start = source.group_start[np.asarray(source.user_group)]  # [U+1] first event row of each user
    kinds = pa.array(source.behaviors, pa.string())
    for low, high in _pieces(source.n_events):
        first, last = np.searchsorted(start, [low, high - 1], side="right") - 1
        rows = np.diff(np.clip(start[first : last + 2], low, high))
        user = np.repeat(np.arange(first, last + 1), rows)
        kept = ~gone[user]
        item, time_, kind = (
            np.asarray(column[low:high])[kept]
            for column in (source.event_item, source.event_time, source.event_behavior)
        )
        columns = [
            source.user_ids.values.take(pa.array(user[kept])),
            source.items[ITEM].take(pa.array(item)),
            pa.nulls(len(item), schema.field(CATEGORY).type),
            pa.array(time_),
            kinds.take(pa.array(kind)),
        ]
        yield pa.table(columns, schema=schema)


def _items(source: Store) -> Iterator[pa.Table]:
    """Every item, also one that nobody has met."""
    for low, high in _pieces(source.n_items):
        some = source.items.slice(low, high - low)
        category = source.category_ids.values.take(pa.array(source.item_category[low:high]))
        features = _said(source.item_fields, source.item_feature[low:high])
        title = {TITLE: some[TITLE]} if TITLE in some.column_names else {}
        yield pa.table({ITEM: some[ITEM], CATEGORY: category, **features, **title})


def _users(source: Store, gone: np.ndarray) -> Iterator[pa.Table]:
    """Users that are not `gone` [U], with their profiles."""
    for low, high in _pieces(source.n_users):
        kept = low + np.flatnonzero(~gone[low:high])
        ids = source.user_ids.values.take(pa.array(kept))
        yield pa.table({USER: ids, **_said(source.profile_fields, source.profile[kept])})


def _said(fields: Iterable[Vocabulary], codes: np.ndarray) -> dict[str, pa.Array]:
    """Codes [n, fields] as the values that they stand for."""
    return {
        field.name: pa.array([None, *field.values], None if field.values else pa.string()).take(
            pa.array(codes[:, i])
        )
        for i, field in enumerate(fields)
    }


def _pieces(rows: int) -> Iterator[tuple[int, int]]:
    return ((low, min(low + _AT_ONCE, rows)) for low in range(0, rows, _AT_ONCE))


# -- the journal


def _live_events(source: Store, events: Iterator[Event], schema: pa.Schema) -> Iterator[pa.Table]:
    """Events of a journal. An id of the other type than the store's is left empty, for `ingest` to reject."""
    kinds = set(source.behaviors)
    while some := list(itertools.islice(events, _LIVE_AT_ONCE)):
        user, item, category, time_, behavior, _ = zip(*some, strict=True)
        kinds.update(behavior)
        if len(kinds) > MOST_KINDS:
            raise InputError(
                f"store and live events have more than {MOST_KINDS} kinds of behavior, such as "
                f"{sorted(kinds)[:SHOWN]}. Mend those of the journal with sqlite3: UPDATE OR IGNORE event "
                "SET behavior = 'click' WHERE behavior = 'clcik'."
            )
        ids = zip((user, item, category), (USER, ITEM, CATEGORY), strict=True)
        columns = [_typed(values, schema.field(name).type) for values, name in ids]
        yield pa.table([*columns, pa.array(time_), pa.array(behavior)], schema=schema)


def _typed(values: Iterable[Any], dtype: pa.DataType) -> pa.Array:
    wanted = int if pa.types.is_integer(dtype) else str
    return pa.array([value if isinstance(value, wanted) else None for value in values], dtype)
