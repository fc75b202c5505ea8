"""What happened since the store was made: in SQLite, on the disk before it is acknowledged.

For one machine; for servers on several ones `longretriever.store.redis` keeps the same in Redis. What both
promise is `LiveJournal`, and whoever reads or writes live events knows no more than that.

A journal: events in the order of their arrival, and among them marks that say "all of this user before here
is forgotten". A store that was made by folding events in says up to where (`facts["live"]`), so whoever reads
a store and its journal together counts nothing twice: see `lives`.

Writers wait for the disk together: what arrives while one transaction is being synced goes into the next one.
Measured costs are in docs/live.md.
"""

from __future__ import annotations

import fcntl
import os
import queue
import re
import sqlite3
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager, closing, contextmanager, suppress
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from hashlib import blake2b
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeVar
from uuid import uuid4

import numpy as np

from longretriever.errors import Damaged, InputError, Mismatch, NotSaved, SavedError, Unavailable
from longretriever.events import MOST_KINDS
from longretriever.saved import sync
from longretriever.store.behaviors import Life, Store
from longretriever.store.joined import Joined, LiveEvents, New

FORMAT = 1
_APPLICATION = 0x4C52_4556  # "LREV", in the header of the file
_TOGETHER = 10_000  # jobs of one transaction at most
_REMEMBERED = 1 << 18  # ids of items and users whose numbers are kept

_SCHEMA = """
CREATE TABLE event (
  n INTEGER PRIMARY KEY AUTOINCREMENT,  -- never given twice, even after deletion
  user_id ANY NOT NULL,
  item_id ANY,                          -- NULL: a mark, all of this user before n is forgotten
  category_id ANY,
  time INTEGER,                         -- seconds since the epoch
  behavior TEXT,
  event_id TEXT
) STRICT;
CREATE UNIQUE INDEX life ON event (user_id, time, item_id, behavior);
CREATE UNIQUE INDEX by_event_id ON event (event_id) WHERE event_id IS NOT NULL;
CREATE TABLE about (name TEXT PRIMARY KEY, value ANY) STRICT;
"""
_KINDS = "CREATE TABLE kind (hash INTEGER PRIMARY KEY) STRICT"
"""Hashes of kinds of behavior: the words themselves may be somebody's to forget."""


class Event(NamedTuple):
    """A behavior as it arrives; ids are the log's own."""

    user_id: int | str
    item_id: int | str
    category_id: int | str | None
    time: int  # seconds since the epoch
    behavior: str = ""
    event_id: str | None = None


class Written(NamedTuple):
    """What became of events: `duplicates` were there, by event_id, or by user, item, time and kind."""

    accepted: int
    duplicates: int


class Since(NamedTuple):
    """What a journal has of a user behind some number."""

    events: list[Event]  # by time, of equal times in order of arrival
    forgotten: bool  # what the store has of him is not to count
    is_all: bool = True  # False: it cannot be asked now, and `forgotten` is as of the last look


class LiveJournal(Protocol):
    """Events in order of arrival, with marks that say "all of this user before here is forgotten".

    Every row has a number, ascending for each user. Ids are integers or strings, and 7 is not "7". Methods
    may be called from any thread, and raise `Unavailable` where the journal cannot be asked now.
    """

    name: str  # where it is, without passwords

    @property
    def id(self) -> str:
        """Its own, which stores that were folded from it name."""

    @property
    def waiting(self) -> int:
        """Calls that wait to be written."""

    def trouble(self) -> str | None:
        """Why some or all live events cannot be had now, as far as is known; None if they can."""

    def close(self) -> None:
        """Finish what was asked for, then close."""

    def append(self, events: Sequence[Event], beside: Iterable[str] = ()) -> Future[Written]:
        """Write events; the future is done once they are on the disk, and fails if any may be not.

        What is written of a call that fails is said by each kind of journal; sent again, it is written once.
        An event whose event_id is known of its user, or that is equal in user, item, time and behavior, is
        not written again. A future that is cancelled before its turn writes nothing. Raises `InputError` for
        an event without user, item, time or kind, or with ids that are neither integers of 64 bits nor
        strings; the future does where the journal's kinds and those `beside` it, of the store, would be more
        than a store can hold.
        """

    def forget(self, user_id: int | str) -> Future[int]:
        """Delete a user's live events and hide what the store has of him; the number of those deleted."""

    def delete_folded(self, upto: int, most: int = ...) -> Future[int]:
        """Delete about `most` of the rows that a store has taken in; how many: 0 when none is left."""

    def of(self, user_id: int | str, after: int = 0) -> tuple[list[Event], bool]:
        """A user's events behind number `after`, by time; and whether older ones are forgotten."""

    def of_each(self, user_ids: Sequence[int | str], after: int = 0) -> list[Since]:
        """The same of several users; of those that cannot be asked about now, that. Raises nothing for it."""

    def last(self) -> int:
        """A number that all rows are at or below, and all later ones will be above."""

    def count(self, after: int = 0) -> int:
        """Rows behind number `after`, marks included."""

    def forgotten(self, after: int, upto: int) -> list[int | str]:
        """Users with a mark among these numbers: what a store before has of them is not to be kept."""

    def between(self, after: int, upto: int) -> Iterator[Event]:
        """Events among these numbers, those of a user in order of arrival."""

    def folded_into(self, store: Store) -> int:
        """Up to which number this store holds the journal's events; 0 if it knows nothing of it.

        What comes later gets higher numbers, also in a journal that is an older copy, put back.
        """

    def deleted(self) -> int:
        """Up to which number `delete_folded` was asked to delete."""

    def check(self) -> None:
        """Look whether all of it can be read. Raises `Damaged`."""

    def compacting(self) -> AbstractContextManager[None]:
        """Alone among all processes that compact this journal, until left or killed. Raises `InputError`."""


def open_journal(where: str | os.PathLike[str], *, at_once: bool = True) -> LiveJournal:
    """The journal of a file, or of redis://host:port/0 or redis+cluster://host:port,host:port.

    Makes it where there is none. `at_once` false: a Redis that cannot be reached is waited for, and all but
    `of_each` raises `Unavailable` until then. Raises a `SavedError`; `MissingExtra` without Redis's client.
    """
    if not is_address(where):
        return Journal(where)
    from longretriever.store.redis import RedisJournal

    return RedisJournal(str(where), at_once=at_once)


def is_address(where: object) -> bool:
    """Is this the address of a server, not a path?"""
    return isinstance(where, str) and re.match(r"[a-z+]+://", where) is not None


class Journal:
    """A file of live events. One object a process; its methods may be called from any thread.

    Several processes may have the same file open, and see the same. What a future says is on the disk.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """Open a journal, making it where there is none. Raises `Damaged`, `NotSaved`, `Mismatch`."""
        self.path = Path(path)
        self.name = str(path)
        self._local = threading.local()
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._closing = threading.Lock()  # nothing is asked for behind the end of the queue
        self._closed = False
        self._readers: list[sqlite3.Connection] = []
        self._kinds: set[str] = set()  # known to be in the file
        with _locked(self.path):
            writer = _connect(self.path)
            self.id = _prepared(self.path, writer)
        self._thread = threading.Thread(target=self._write, args=(writer,), name="journal", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Finish what was asked for, then close the file."""
        with self._closing:
            if self._closed:
                return
            self._closed = True
            self._jobs.put(None)
        self._thread.join()
        for reader in self._readers:
            reader.close()

    # -- writing

    def append(self, events: Sequence[Event], beside: Iterable[str] = ()) -> Future[Written]:
        """See `LiveJournal.append`: all or none. An event_id is known whoever the user is."""
        for event in events:
            check_event(event)
        rows = [tuple(event) for event in events]
        new = {event.behavior for event in events} - self._kinds
        return self._ask(lambda connection: self._insert(connection, rows, new, {*beside}))

    def _insert(
        self, connection: sqlite3.Connection, rows: Sequence[tuple[Any, ...]], new: set[str], beside: set[str]
    ) -> Written:
        if new:
            connection.executemany("INSERT OR IGNORE INTO kind VALUES (?)", [(_hash(kind),) for kind in new])
            there = {kind for (kind,) in connection.execute("SELECT hash FROM kind")}
            if len(there.union(map(_hash, beside))) > MOST_KINDS:
                raise too_many_kinds(new - beside)
            self._kinds |= new
        return _insert(connection, rows)

    def forget(self, user_id: int | str) -> Future[int]:
        """Delete a user's live events and hide what the store has of him; the number of those deleted."""
        return self._ask(lambda connection: _forget(connection, user_id))

    def delete_folded(self, upto: int, most: int = _TOGETHER) -> Future[int]:
        """Delete the oldest rows of those that a store has taken in; how many they were."""
        return self._ask(lambda connection: _delete(connection, upto, most))

    @property
    def waiting(self) -> int:
        """Calls that wait for the disk."""
        return self._jobs.qsize()

    def _ask(self, work: Callable[[sqlite3.Connection], Any]) -> Future[Any]:
        job = _Job(work)
        with self._closing:
            if self._closed:
                raise InputError(f"{self.path} is closed.")
            self._jobs.put(job)
        return job.done

    def _write(self, connection: sqlite3.Connection) -> None:
        for jobs in in_batches(self._jobs, _TOGETHER):
            self._commit(connection, jobs)
        connection.close()

    def _commit(self, connection: sqlite3.Connection, jobs: Sequence[_Job]) -> None:
        """One transaction for all; a job that fails takes none of the others with it."""
        jobs = [job for job in jobs if job.done.set_running_or_notify_cancel()]
        if not jobs:
            return
        try:  # a lock that queues: SQLite's own makes writers sleep and guess
            with _locked(self.path), connection:
                connection.execute("BEGIN IMMEDIATE")
                results = [(job, _tried(connection, job.work)) for job in jobs]
        except Exception as error:  # a full disk, a file that is gone
            results = [(job, error) for job in jobs]
        for job, result in results:
            if isinstance(result, Exception):
                job.done.set_exception(result)
            else:
                job.done.set_result(result)

    # -- reading

    def of(self, user_id: int | str, after: int = 0) -> tuple[list[Event], bool]:
        """A user's events that came after number `after`, by time; and whether older ones are forgotten."""
        rows = self._read(
            "SELECT n, user_id, item_id, category_id, time, behavior, event_id FROM event "
            "WHERE user_id = ? AND n > ? ORDER BY time, n",
            (user_id, after),
        )
        mark = max((n for n, _, item, *_ in rows if item is None), default=0)
        return [Event(*row) for n, *row in rows if row[1] is not None and n > mark], mark > 0

    def of_each(self, user_ids: Sequence[int | str], after: int = 0) -> list[Since]:
        """The same of several users. A file that cannot be read is an error."""
        return [Since(*self.of(user_id, after)) for user_id in user_ids]

    def trouble(self) -> None:
        """None: a file is there, or reading it is an error."""

    def last(self) -> int:
        """The number of the newest row, 0 where there never was one."""
        found = self._read("SELECT seq FROM sqlite_sequence WHERE name = 'event'")
        return int(found[0][0]) if found else 0

    def count(self, after: int = 0) -> int:
        """Rows after number `after`. O(rows)."""
        return int(self._read("SELECT count(*) FROM event WHERE n > ?", (after,))[0][0])

    def forgotten(self, after: int, upto: int) -> list[int | str]:
        """Users with a mark among these numbers: what a store before has of them is not to be kept."""
        found = self._read(
            "SELECT DISTINCT user_id FROM event WHERE item_id IS NULL AND n > ? AND n <= ?", (after, upto)
        )
        return [user_id for (user_id,) in found]

    def between(self, after: int, upto: int) -> Iterator[Event]:
        """Events among these numbers in order of arrival."""
        columns = "user_id, item_id, category_id, time, behavior, event_id"
        query = f"SELECT {columns} FROM event WHERE item_id IS NOT NULL AND n > ? AND n <= ? ORDER BY n"
        with _readable(self.path):
            for row in self._reader().execute(query, (after, upto)):
                yield Event(*row)

    def folded_into(self, store: Store) -> int:
        """Up to which number this store holds the journal's events; 0 if it knows nothing of it.

        A journal that is an older copy, put back, is numbered on from there: what comes now must not be
        taken for folded.
        """
        live = store.manifest.facts.get("live") or {}
        upto = int(live["upto"]) if live.get("journal") == self.id else 0
        if upto > self.last():
            self._ask(lambda connection: _number_on(connection, upto)).result()
        return upto

    def deleted(self) -> int:
        """Up to which number `delete_folded` was asked to delete."""
        found = self._read("SELECT value FROM about WHERE name = 'deleted'")
        return int(found[0][0]) if found else 0

    def check(self) -> None:
        """Read every page. Raises `Damaged`."""
        check_journal(self.path)

    @contextmanager
    def compacting(self) -> Iterator[None]:
        """See `LiveJournal.compacting`: a lock of a file beside, which ends with its process."""
        with self.path.with_name(self.path.name + ".compact").open("a") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise InputError(f"{self.name} is being compacted already. Wait for that to end.") from None
            yield

    def _read(self, query: str, values: Sequence[Any] = ()) -> list[tuple[Any, ...]]:
        with _readable(self.path):
            return self._reader().execute(query, values).fetchall()

    def _reader(self) -> sqlite3.Connection:
        if self._closed:
            raise InputError(f"{self.path} is closed.")
        if not hasattr(self._local, "connection"):
            self._local.connection = _connect(self.path)
            self._local.connection.execute("PRAGMA query_only = ON")
            self._readers.append(self._local.connection)
        return self._local.connection


J = TypeVar("J")


def in_batches(jobs: queue.SimpleQueue[J | None], most: int) -> Iterator[list[J]]:
    """What waits, `most` at a time and nothing held back for more, until a None; waits for the next."""
    last = False
    while not last:
        batch = [jobs.get()]
        with suppress(queue.Empty):
            while len(batch) < most:
                batch.append(jobs.get_nowait())
        last = None in batch
        yield [job for job in batch if job is not None]


class _Job:
    """Something to be done in the next transaction."""

    def __init__(self, work: Callable[[sqlite3.Connection], Any]) -> None:
        self.work = work
        self.done: Future[Any] = Future()


def _tried(connection: sqlite3.Connection, work: Callable[[sqlite3.Connection], Any]) -> Any:
    connection.execute("SAVEPOINT job")
    try:
        result = work(connection)
    except Exception as error:
        if not connection.in_transaction:  # SQLite has rolled everything back: the disk is full, or fails
            raise
        connection.execute("ROLLBACK TO job")
        result = error
    connection.execute("RELEASE job")
    return result


def check_event(event: Event) -> None:
    """A row without an item would be a mark. Raises `InputError`."""
    for value, (name, kinds) in zip(event, _TYPES.items(), strict=True):
        if not isinstance(value, kinds):
            if value is None:
                raise InputError(f"{event}: {name} is missing; only category_id and event_id may be.")
            wanted = " or ".join(kind.__name__ for kind in kinds if kind is not type(None))
            raise InputError(f"{event}: {name} is {value!r}, expected {wanted}.")
        if isinstance(value, int) and not -(1 << 63) <= value < 1 << 63:
            raise InputError(f"{event}: {name} is {value!r}, expected an integer of 64 bits.")


_TYPES: dict[str, tuple[type, ...]] = {
    "user_id": (int, str),
    "item_id": (int, str),
    "category_id": (int, str, type(None)),
    "time": (int,),
    "behavior": (str,),
    "event_id": (str, type(None)),
}


def too_many_kinds(new: set[str]) -> InputError:
    return InputError(
        f"behavior: {min(new)!r} would be one kind more than the {MOST_KINDS} that a store holds. What tells "
        "single events apart belongs in event_id."
    )


def _hash(kind: str) -> int:
    return int.from_bytes(blake2b(kind.encode(), digest_size=8).digest(), signed=True)


def _insert(connection: sqlite3.Connection, rows: Sequence[tuple[Any, ...]]) -> Written:
    before = connection.total_changes
    connection.executemany(
        "INSERT OR IGNORE INTO event (user_id, item_id, category_id, time, behavior, event_id) "
        "VALUES (?, ?, ?, ?, ?, ?)",
        rows,
    )
    accepted = connection.total_changes - before
    return Written(accepted, len(rows) - accepted)


def _forget(connection: sqlite3.Connection, user_id: int | str) -> int:
    deleted = connection.execute(
        "DELETE FROM event WHERE user_id = ? AND item_id IS NOT NULL", (user_id,)
    ).rowcount
    connection.execute("INSERT INTO event (user_id) VALUES (?)", (user_id,))
    return deleted


def _delete(connection: sqlite3.Connection, upto: int, most: int) -> int:
    connection.execute(
        "INSERT INTO about VALUES ('deleted', ?) "
        "ON CONFLICT (name) DO UPDATE SET value = max(value, excluded.value)",
        (upto,),
    )
    oldest = "SELECT n FROM event WHERE n <= ? ORDER BY n LIMIT ?"
    return connection.execute(f"DELETE FROM event WHERE n IN ({oldest})", (upto, most)).rowcount


def _number_on(connection: sqlite3.Connection, upto: int) -> None:
    """The next row comes behind this number."""
    (there,) = connection.execute("SELECT max(seq) FROM sqlite_sequence WHERE name = 'event'").fetchone()
    connection.execute("DELETE FROM sqlite_sequence WHERE name = 'event'")
    connection.execute("INSERT INTO sqlite_sequence VALUES ('event', ?)", (max(upto, there or 0),))


def _connect(path: Path) -> sqlite3.Connection:
    try:
        connection = sqlite3.connect(path, timeout=10, isolation_level=None, check_same_thread=False)
    except sqlite3.OperationalError as error:
        raise NotSaved(
            f"{path}: cannot be opened for live events ({error}). Does its folder exist?"
        ) from error
    with _readable(path):
        connection.execute("PRAGMA synchronous = FULL")
        connection.execute("PRAGMA secure_delete = ON")  # what is forgotten is overwritten
    return connection


def _prepared(path: Path, connection: sqlite3.Connection) -> str:
    """Make what an empty file lacks, check what another holds; the journal's own id."""
    try:
        with _readable(path):
            tables = connection.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]
            marks = [
                connection.execute(f"PRAGMA {p}").fetchone()[0] for p in ("application_id", "user_version")
            ]
            if tables == 0 and marks == [0, 0]:
                _create(path, connection)
            elif marks[0] != _APPLICATION:
                raise NotSaved(f"{path}: an SQLite file, but not of live events. Choose another path.")
            elif marks[1] != FORMAT:
                raise Mismatch(f"{path} has format {marks[1]}, this version reads format {FORMAT}.")
            _count_kinds(connection)
            return str(connection.execute("SELECT value FROM about WHERE name = 'journal'").fetchone()[0])
    except SavedError:
        connection.close()
        raise


def _create(path: Path, connection: sqlite3.Connection) -> None:
    connection.execute("PRAGMA journal_mode = WAL")
    connection.executescript(
        f"BEGIN; {_SCHEMA} {_KINDS}; INSERT INTO about VALUES ('journal', '{uuid4().hex}'); "
        f"PRAGMA application_id = {_APPLICATION}; PRAGMA user_version = {FORMAT}; COMMIT;"
    )
    sync(path.parent)


def _count_kinds(connection: sqlite3.Connection) -> None:
    """Give a journal from before kinds were counted its list of them."""
    if connection.execute("SELECT 1 FROM sqlite_master WHERE name = 'kind'").fetchone():
        return
    kinds = connection.execute("SELECT DISTINCT behavior FROM event WHERE behavior IS NOT NULL").fetchall()
    with connection:
        connection.execute("BEGIN IMMEDIATE")
        connection.execute(_KINDS)
        connection.executemany("INSERT INTO kind VALUES (?)", [(_hash(kind),) for (kind,) in kinds])


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    """SQLite's errors in the words of the package: what a file holds, or that it cannot be had now."""
    try:
        yield
    except sqlite3.ProgrammingError:
        raise
    except sqlite3.OperationalError as error:  # locked, full, read-only
        raise NotSaved(f"{path}: cannot be used for live events ({error}).") from error
    except sqlite3.DatabaseError as error:
        raise Damaged(
            f"{path}: not readable as live events ({error}). Restore it from a copy, or choose another path."
        ) from error


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Alone among all processes that write to this journal; whoever came first is next."""
    try:
        file = os.open(path.with_name(path.name + ".lock"), os.O_CREAT | os.O_RDWR, 0o644)
    except OSError as error:
        raise NotSaved(f"{path}: cannot be opened for live events ({error}).") from error
    try:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
    finally:
        os.close(file)


# -- a store and its journal as one


class Reader:
    """Lives out of a store and a journal, each event once. Safe to share between threads."""

    def __init__(self, store: Store, journal: LiveJournal) -> None:
        self.store, self.journal = store, journal
        with suppress(Unavailable):  # then when it answers
            _ = self.after
        self._item = lru_cache(_REMEMBERED)(store.item_ids.number_of)
        self._category = lru_cache(_REMEMBERED)(store.category_ids.number_of)
        self._kind = {kind: code for code, kind in enumerate(store.behaviors)}

    @cached_property
    def after(self) -> int:
        """The number up to which the store has the journal's events."""
        return self.journal.folded_into(self.store)

    def lives(self, user_ids: Sequence[int | str], now: float | Callable[[int], float]) -> list[Life]:
        """The life of each user strictly before `now`; an empty one for a user that nobody knows.

        `now` may be a function of the time of the newest event that is known of these users or of the store.
        A life whose live events cannot be had now is the store's, and says so (`is_all`). Costs a look into
        the journal, in a file 10 to 20 microseconds for each user, and for each live event some more.
        """
        since = self._since(user_ids)
        pairs = zip(user_ids, since, strict=True)
        found = [(self._number(user_id, one), one.events) for user_id, one in pairs]
        numbers = [number for number, _ in found]
        alone = [number is not None and not events for number, events in found]
        mixed = [i for i, one in enumerate(alone) if not one]
        joined = self._joined([user_ids[i] for i in mixed], [found[i] for i in mixed]) if mixed else None
        when = now(int((joined or self.store).last_time)) if callable(now) else now
        places = iter(range(len(mixed)))
        lives = [
            self.store.life(number, when) if one and number is not None else _life(joined, next(places), when)
            for number, one in zip(numbers, alone, strict=True)
        ]
        return [
            life if one.is_all else replace(life, is_all=False)
            for life, one in zip(lives, since, strict=True)
        ]

    def _since(self, user_ids: Sequence[int | str]) -> list[Since]:
        try:
            return self.journal.of_each(user_ids, self.after)
        except Unavailable:
            return [Since([], False, False)] * len(user_ids)

    def _number(self, user_id: int | str, since: Since) -> int | None:
        """The user's number in the store, unless that is forgotten."""
        return None if since.forgotten else self.store.user_ids.number_of(user_id)

    def _joined(
        self, user_ids: Sequence[int | str], found: Sequence[tuple[int | None, list[Event]]]
    ) -> Joined:
        new = _Unknown(self.store.n_items, len(self.store.behaviors))
        live = [self._numbered(events, new) for _, events in found]
        return Joined(self.store, [number for number, _ in found], user_ids, live, new.all())

    def _numbered(self, events: Iterable[Event], new: _Unknown) -> LiveEvents:
        """Events in the store's numbers; those of a category that it does not know are left out."""
        rows = []
        for event in events:
            item = self._item(event.item_id)
            if item is not None:
                category: int | None = int(self.store.item_category[item])
            else:
                category = None if event.category_id is None else self._category(event.category_id)
                if category is not None:
                    item, category = new.item(event.item_id, category)
            if category is not None:
                kind = self._kind.get(event.behavior)
                rows.append((item, category, event.time, new.kind(event.behavior) if kind is None else kind))
        columns = np.array(rows, np.int64).reshape(-1, 4).T
        return LiveEvents(*columns)


def _life(joined: Joined | None, user: int, now: float) -> Life:
    assert joined is not None
    return joined.life(user, now)


@dataclass
class _Unknown:
    """Numbers for what live events name and the store does not know, in order of their first mention."""

    n_items: int
    n_kinds: int

    def __post_init__(self) -> None:
        self._items: dict[int | str, tuple[int, int]] = {}
        self._kinds: dict[str, int] = {}

    def item(self, item_id: int | str, category: int) -> tuple[int, int]:
        """Number and category; an item's first category stays."""
        return self._items.setdefault(item_id, (self.n_items + len(self._items), category))

    def kind(self, behavior: str) -> int:
        return self._kinds.setdefault(behavior, self.n_kinds + len(self._kinds))

    def all(self) -> New:
        category = tuple(category for _, category in self._items.values())
        return New(tuple(self._items), category, tuple(self._kinds))


def check_journal(path: str | os.PathLike[str]) -> None:
    """Read every page of a journal. Raises `Damaged`."""
    with closing(_connect(Path(path))) as connection, _readable(Path(path)):
        said = connection.execute("PRAGMA integrity_check").fetchall()
        if said != [("ok",)]:
            found = " ".join(str(said[0][0]).split("\n")[:2])
            raise Damaged(f"{path}: {found}. Restore it from a copy.")
