"""The journal: what is acknowledged is there, once; read with its store, one store of all."""

from __future__ import annotations

import os
import signal
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import CancelledError, ThreadPoolExecutor
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from longretriever.errors import Damaged, InputError, Mismatch, NotSaved
from longretriever.store import live
from longretriever.store.behaviors import Store
from longretriever.store.ingest import ingest
from longretriever.store.live import Event, Journal, Reader, Written, check_journal
from tests.store.test_joined import CATEGORIES, STRANGER, USERS, few, log_of, moments, told
from tests.worlds import START, stored, table


def opened(path: Path) -> closing[Journal]:
    return closing(Journal(path))


@pytest.fixture
def journal(tmp_path: Path) -> Iterator[Journal]:
    with opened(tmp_path / "live.sqlite") as found:
        yield found


def event(n: int, user: int | str = 1, **fields: Any) -> Event:
    return Event(user, n, 0, START + n)._replace(**fields)


def written(journal: Journal, *events: Event) -> Written:
    return journal.append(events).result(10)


@contextmanager
def busy(journal: Journal) -> Iterator[None]:
    """As if another process were writing: what is asked for in here goes into one transaction afterwards."""
    with live._locked(journal.path):
        journal.delete_folded(0)  # a call that the writer waits with
        while journal.waiting:
            pass
        yield


def everything(journal: Journal) -> list[Event]:
    return list(journal.between(0, journal.last()))


# -- durable and shared


STORM = """
import sys, threading
from longretriever.store.live import Event, Journal

def append(thread):
    for n in range(100_000):
        event = Event(f"u{thread}", n, 0, n, "click", f"{thread}-{n}")
        assert journal.append([event]).result().accepted == 1
        with printing:
            print(event.event_id, flush=True)

journal, printing = Journal(sys.argv[1]), threading.Lock()
for thread in range(8):
    threading.Thread(target=append, args=(thread,)).start()
"""


def test_what_is_acknowledged_outlives_a_kill(tmp_path):
    command = [sys.executable, "-c", STORM, str(tmp_path / "live.sqlite")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        said = [child.stdout.readline() for _ in range(300)]
        child.send_signal(signal.SIGKILL)
        said += child.stdout.readlines()
    assert child.returncode == -signal.SIGKILL
    acknowledged = [line.strip() for line in said if line.endswith("\n")]
    check_journal(tmp_path / "live.sqlite")
    with opened(tmp_path / "live.sqlite") as journal:
        there = [e.event_id for e in everything(journal)]
        assert len(set(there)) == len(there)
        assert set(acknowledged) <= set(there)
        assert len(acknowledged) >= 300
        assert written(journal, event(1)) == (1, 0), "and it goes on"


def test_a_commit_waits_for_the_disk(tmp_path):
    with opened(tmp_path / "live.sqlite"), closing(live._connect(tmp_path / "live.sqlite")) as connection:
        pragmas = {
            p: connection.execute(f"PRAGMA {p}").fetchone()[0] for p in ("synchronous", "journal_mode")
        }
    assert pragmas == {"synchronous": 2, "journal_mode": "wal"}


NEIGHBOUR = """
import sys
from longretriever.store.live import Event, Journal

journal = Journal(sys.argv[1])
for n in range(200):
    journal.append([Event("neighbour", n, 0, n)]).result()
print("done", flush=True)
sys.stdin.readline()
print(journal.count(), len(journal.of("me")[0]), len(journal.of("neighbour")[0]), flush=True)
"""


def test_two_processes_write_at_once_and_both_see_all(journal):
    command = [sys.executable, "-c", NEIGHBOUR, str(journal.path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdin is not None
        assert child.stdout is not None
        n = 0
        while child.poll() is None and len(journal.of("neighbour")[0]) < 200:
            written(journal, event(n, "me"))
            n += 1
        assert child.stdout.readline() == "done\n"
        child.stdin.write("\n")
        child.stdin.flush()
        assert child.stdout.readline() == f"{200 + n} {n} 200\n"
    assert n > 1
    assert (journal.count(), len(journal.of("me")[0])) == (200 + n, n)
    numbers = journal._read("SELECT n FROM event ORDER BY n")
    assert numbers == [(i + 1,) for i in range(200 + n)]


def test_who_waits_for_the_disk_waits_together(tmp_path, monkeypatch):
    began: list[str] = []

    def traced(path: Path) -> sqlite3.Connection:
        connection = connect(path)
        connection.set_trace_callback(lambda s: began.append(s) if s.startswith("BEGIN IMMEDIATE") else None)
        return connection

    connect = live._connect
    monkeypatch.setattr(live, "_connect", traced)
    with opened(tmp_path / "live.sqlite") as journal, ThreadPoolExecutor(20) as threads:
        with busy(journal):
            asked = list(threads.map(lambda n: journal.append([event(n)]), range(500)))
        assert all(one.result(10) == (1, 0) for one in asked)
        assert len(began) == 2, "that of `busy`, and one for all"
        assert journal.waiting == 0
        assert journal.count() == 500


# -- once


def test_an_event_counts_once(journal):
    first = event(1, behavior="click", event_id="a")
    assert written(journal, first) == (1, 0)
    assert written(journal, first, first) == (0, 2)
    assert written(journal, first._replace(event_id="b")) == (0, 1), "equal in all but its id"
    assert written(journal, event(9, event_id="a")) == (0, 1), "its id is known"
    assert written(journal, first._replace(event_id=None, category_id=5)) == (0, 1), "items have one category"
    others = [first._replace(behavior="buy"), first._replace(time=START), first._replace(user_id="1")]
    assert written(journal, *(one._replace(event_id=None) for one in others)) == (3, 0)
    assert written(journal, event(1, 7), event(2, 7), event(2, 7)) == (2, 1)
    assert everything(journal)[0] == first


def test_an_event_that_lacks_something_is_refused(journal):
    """Without its item it would be a mark that forgets the user."""
    for field in ("user_id", "item_id", "time", "behavior"):
        with pytest.raises(InputError, match=f"{field} is missing"):
            journal.append([event(1), event(2)._replace(**{field: None})])
    assert journal.count() == 0
    assert journal.of(1) == ([], False)


def test_a_call_that_fails_takes_no_other_with_it(journal):
    with busy(journal):
        calls = [[event(1)], [event(2), event(2**70)], [event(3)], [event(4, user=1.5, time=0.5)], [event(5)]]
        asked = [journal.append(call) for call in calls]
    assert [asked[i].result(10) for i in (0, 2, 4)] == [(1, 0)] * 3
    assert isinstance(asked[1].exception(10), OverflowError)
    assert isinstance(asked[3].exception(10), sqlite3.IntegrityError)
    assert [e.item_id for e in everything(journal)] == [1, 3, 5], "all of a call or nothing"


def test_who_no_longer_waits_stops_nobody(journal):
    """A web server cancels what its client does not wait for."""
    with busy(journal):
        asked = [journal.append([event(n)]) for n in range(10)]
        left = [one.cancel() for one in asked[5:]]
    assert all(left)
    assert written(journal, event(99)) == (1, 0)
    assert {e.item_id for e in everything(journal)} == {0, 1, 2, 3, 4, 99}
    with pytest.raises(CancelledError):
        asked[5].result()


def test_a_full_disk_is_told_to_all_who_waited_and_to_nobody_else(journal, monkeypatch):
    def full(connection, rows):
        connection.rollback()  # as SQLite does by itself
        raise sqlite3.OperationalError("database or disk is full")

    with monkeypatch.context() as patch:
        with busy(journal):
            asked = [journal.forget(1), journal.append([event(1)]), journal.append([event(2)])]
            patch.setattr(live, "_insert", full)
        said = {str(one.exception(10)) for one in asked}
    assert said == {"database or disk is full"}
    assert (written(journal, event(1)), journal.of(1)[1]) == ((1, 0), False)


# -- closing


def test_closing_finishes_what_was_asked_for(tmp_path):
    journal = Journal(tmp_path / "live.sqlite")
    asked = [journal.append([event(n)]) for n in range(300)]
    journal.close()
    journal.close()
    assert all(one.done() for one in asked)
    with pytest.raises(InputError, match=r"live\.sqlite is closed"):
        journal.append([event(1)])
    with pytest.raises(InputError, match=r"live\.sqlite is closed"):
        journal.count()
    with opened(tmp_path / "live.sqlite") as again:
        assert again.count() == 300
        assert again.id == journal.id
    assert not (tmp_path / "live.sqlite-wal").exists(), "all of it is in the file"


def test_nobody_waits_for_ever_behind_the_end(tmp_path):
    journal, answers = Journal(tmp_path / "live.sqlite"), []

    def append(thread: int) -> None:
        for n in range(100_000):
            try:
                answers.append(journal.append([event(n, thread)]))
            except InputError:
                return

    threads = [threading.Thread(target=append, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    while len(answers) < 100:
        pass
    journal.close()
    for thread in threads:
        thread.join(10)
    assert all(one.result(1) == (1, 0) for one in answers)


# -- what is in the way


def test_a_folder_that_is_not_there_and_files_of_others(tmp_path):
    with pytest.raises(NotSaved, match=r"live\.sqlite: cannot be opened for live events"):
        Journal(tmp_path / "nowhere" / "live.sqlite")
    (tmp_path / "folder").mkdir()
    with pytest.raises(NotSaved, match="folder: cannot be opened for live events"):
        Journal(tmp_path / "folder")
    (tmp_path / "letter").write_text("dear " * 1000)
    with pytest.raises(Damaged, match=r"letter: not readable as live events .* choose another path"):
        Journal(tmp_path / "letter")
    with closing(sqlite3.connect(tmp_path / "photos")) as other:
        other.execute("CREATE TABLE photo (name)")
    with pytest.raises(NotSaved, match=r"photos: an SQLite file, but not of live events\. Choose"):
        Journal(tmp_path / "photos")
    assert (tmp_path / "letter").read_text() == "dear " * 1000


def test_a_format_of_the_future(tmp_path):
    Journal(tmp_path / "live.sqlite").close()
    with closing(sqlite3.connect(tmp_path / "live.sqlite")) as connection:
        connection.execute("PRAGMA user_version = 99")
    with pytest.raises(Mismatch, match=r"live\.sqlite has format 99, this version reads format 1"):
        Journal(tmp_path / "live.sqlite")


def test_a_damaged_file_is_noticed_when_it_is_read(tmp_path):
    path = tmp_path / "live.sqlite"
    with opened(path) as journal:
        written(journal, *(event(n, n % 50, behavior="x" * 50) for n in range(5000)))
    check_journal(path)
    content = bytearray(path.read_bytes())
    for page in range(3 * 4096, len(content), 4096):
        content[page : page + 100] = b"\xff" * 100
    path.write_bytes(content)
    for looks in (everything, lambda j: [j.of(user) for user in range(50)]):
        with (
            pytest.raises(Damaged, match=r"live\.sqlite: not readable .*Restore it"),
            opened(path) as journal,
        ):
            looks(journal)
    with pytest.raises(Damaged, match=r"live\.sqlite: .*Restore it"):
        check_journal(path)
    os.truncate(path, 5000)
    for opens in (Journal, check_journal):
        with pytest.raises(Damaged, match=r"live\.sqlite: not readable .*Restore it"):
            opens(path)


def test_who_holds_the_file_is_not_called_damage(tmp_path, monkeypatch):
    path = tmp_path / "live.sqlite"
    connect = sqlite3.connect
    monkeypatch.setattr(live.sqlite3, "connect", lambda *a, timeout, **k: connect(*a, timeout=0.01, **k))
    with closing(connect(path, isolation_level=None)) as other:
        other.execute("BEGIN EXCLUSIVE")
        with pytest.raises(NotSaved, match=r"cannot be used for live events \(database is locked\)"):
            Journal(path)
    Journal(path).close()


# -- the store and the journal


@settings(few, max_examples=8)
@given(
    seed=st.integers(0, 1000), events=st.integers(1, 120), share=st.floats(0, 1), out_of_order=st.booleans()
)
def test_lives_are_those_of_one_store_of_everything(tmp_path_factory, seed, events, share, out_of_order):
    """Also where some of the live events are in the store already, or were sent twice, in any order."""
    log, path, rng = log_of(seed, events), tmp_path_factory.mktemp("live"), np.random.default_rng(seed)
    time = log["timestamp"].to_numpy()
    late = rng.random(len(time)) < share if out_of_order else time > np.quantile(time, 1 - share)
    late[:CATEGORIES] = False
    base, whole = stored(log.filter(~late), path / "base"), stored(log, path / "whole")
    sent = np.flatnonzero(late | (rng.random(len(time)) < 0.2))
    users = [int(user) for user in rng.permutation([*range(USERS), STRANGER])]
    with opened(path / "live.sqlite") as journal:
        for some in np.array_split(rng.permutation(np.concatenate([sent, sent[::3]])), 3):
            journal.append(as_events(log.take(some)))
        assert journal.append([Event(users[0], 5000, 4711, START)]).result(10).accepted, "category unknown"
        reader = Reader(base, journal)
        for now in moments(log):
            for user, life in zip(users, reader.lives(users, now), strict=True):
                number = whole.user_ids.number_of(user)
                found = told(life.store, life.user, now)
                assert found == (nothing() if number is None else told(whole, number, now))
                assert life.store.user_ids.take([life.user]) == [user]


def as_events(rows: pa.Table) -> list[Event]:
    names = ("user_id", "item_id", "category_id", "timestamp", "behavior")
    given = rows.to_pydict()
    none = [""] * rows.num_rows
    return [Event(*row) for row in zip(*(given.get(name, none) for name in names), strict=True)]


def nothing() -> dict[str, Any]:
    empty: list[Any] = [[]] * CATEGORIES
    none: dict[str, Any] = {"recent": [], "all": [], "sampled": [], "engagement": {}, "items": []}
    return none | {"contexts": empty, "lately": empty}


@pytest.fixture
def base(tmp_path: Path) -> Store:
    """Users 1 and 2 have met items 10 and 11 of category 0, user 1 also item 20 of category 1."""
    return stored(
        table([1, 1, 1, 2], [10, 11, 20, 10], [0, 0, 1, 0], [START, START + 1, START + 2, START + 9]),
        tmp_path / "base",
    )


def met(reader: Reader, user: int, now: float = START + 1000) -> list[tuple[Any, Any, int]]:
    (life,) = reader.lives([user], now)
    found = life.recent(100)
    ids = zip(life.store.item_ids.take(found.item), life.store.category_ids.take(found.category), strict=True)
    return [(item, category, t - START) for (item, category), t in zip(ids, found.time.tolist(), strict=True)]


OF_USER_1 = [(10, 0, 0), (11, 0, 1), (20, 1, 2)]


def test_items_categories_and_users_that_the_store_does_not_know(base, journal):
    sent = [(1, 99, 1, 5), (1, 99, None, 6), (1, 10, 1, 7), (1, 98, 4711, 8), (3, 97, 0, 9), (3, 99, 1, 9)]
    written(journal, *(Event(u, i, c, START + t) for u, i, c, t in sent))
    reader = Reader(base, journal)
    assert met(reader, 1) == [*OF_USER_1, (99, 1, 5), (10, 0, 7)], "the store has the say on a category"
    assert met(reader, 3) == [(97, 0, 9), (99, 1, 9)]
    assert met(reader, 2) == [(10, 0, 9)]
    assert met(reader, 4) == []
    assert reader.lives([], START) == []
    assert reader.lives([3, 4, 1], START + 10)[2].profile().tolist() == []


def test_only_what_was_strictly_before_counts(base, journal):
    written(journal, Event(1, 11, 0, START + 7), Event(1, 10, 0, START + 5), Event(1, 10, 0, START - 5))
    reader = Reader(base, journal)
    assert met(reader, 1, START + 7) == [(10, 0, -5), *OF_USER_1, (10, 0, 5)]
    assert met(reader, 1, START + 7.5)[-1] == (11, 0, 7)
    assert met(reader, 1, START - 5) == []
    newest = []
    lives = reader.lives([1, 2], lambda last: newest.append(last) or last + 1)
    assert (newest, lives[0].now) == ([START + 9], START + 10), "the store's last event is later"
    written(journal, Event(1, 11, 0, START + 70))
    assert reader.lives([1, 2], lambda last: last + 1)[1].now == START + 71
    assert reader.lives([2], lambda last: last + 1)[0].now == START + 10, "of those asked about"


def test_forgetting_hides_the_store_and_deletes_what_is_live(base, journal):
    written(journal, Event(1, 10, 0, START + 5, "", "a"), Event(2, 10, 0, START + 5))
    reader = Reader(base, journal)
    assert journal.forget(1).result(10) == 1
    assert met(reader, 1) == []
    assert met(reader, 2) == [(10, 0, 5), (10, 0, 9)]
    assert journal.of(1) == ([], True)
    assert written(journal, Event(1, 10, 0, START, "", "a"), Event(1, 20, 1, START + 8)) == (2, 0)
    assert met(reader, 1) == [(10, 0, 0), (20, 1, 8)], "what comes later counts, also what was forgotten"
    assert journal.forget(1).result(10) == 2
    assert journal.forget(3).result(10) == 0, "of whom nothing is known"
    assert (met(reader, 1), met(reader, 3)) == ([], [])
    assert journal.forgotten(0, journal.last()) == [1, 3]


def test_what_is_forgotten_is_overwritten(tmp_path):
    with opened(tmp_path / "live.sqlite") as journal:
        written(journal, *(event(n, "someone", behavior=f"secret {n}") for n in range(100)))
        assert len(everything(journal)) == 100
        journal.forget("someone").result(10)
    assert b"secret" not in (tmp_path / "live.sqlite").read_bytes()


def test_a_sender_who_mistakes_kinds_for_ids_cannot_use_them_up(tmp_path):
    beside = ["click", "buy"]
    with opened(tmp_path / "live.sqlite") as journal, opened(tmp_path / "live.sqlite") as other:
        journal.append([event(n, behavior=f"click {n}") for n in range(252)], beside).result(10)
        other.append([event(0, behavior="buy")], beside).result(10)
        journal.append([event(1, behavior="share")], beside).result(10)
        for one in (journal, other):
            with pytest.raises(InputError, match="'save' would be one kind more than the 255"):
                one.append([event(2, behavior="click"), event(2, behavior="save")], beside).result(10)
        other.append([event(2, behavior="click 9")], beside).result(10)
        assert journal.count() == 255
    with opened(tmp_path / "live.sqlite") as journal, pytest.raises(InputError, match="'save'"):
        journal.append([event(2, behavior="save")], beside).result(10)


def test_a_journal_from_before_kinds_were_counted(tmp_path):
    with opened(tmp_path / "live.sqlite") as journal:
        written(journal, *(event(n, behavior=f"click {n}") for n in range(254)))
    with closing(sqlite3.connect(tmp_path / "live.sqlite")) as connection:
        connection.execute("DROP TABLE kind")
    with opened(tmp_path / "live.sqlite") as journal:
        assert (
            written(journal, event(1, 2, behavior="click 9"), event(2, 2, behavior="one more")).accepted == 2
        )
        with pytest.raises(InputError, match="'too many'"):
            written(journal, event(3, 2, behavior="too many"))
        assert journal.count() == 256


# -- folding


def folded(base: Store, journal: Journal, upto: int) -> Store:
    """The same events in a store that says it has the journal's events up to a number."""
    log = table([1, 1, 1, 2], [10, 11, 20, 10], [0, 0, 1, 0], [START, START + 1, START + 2, START + 9])
    path = base.path.with_name(f"folded {upto}")
    ingest(log, path, facts={"live": {"journal": journal.id, "upto": upto}})
    return Store.open(path)


def test_a_store_says_what_it_has_of_a_journal(base, journal, tmp_path):
    written(journal, *(Event(1, 10, 0, START + 100 + n) for n in range(5)))
    assert journal.folded_into(base) == 0
    assert met(Reader(base, journal), 1)[3:] == [(10, 0, 100 + n) for n in range(5)]
    newer = folded(base, journal, 3)
    assert journal.folded_into(newer) == 3
    assert met(Reader(newer, journal), 1)[3:] == [(10, 0, 103), (10, 0, 104)]
    assert journal.count(3) == 2
    with opened(tmp_path / "other.sqlite") as other:
        assert other.folded_into(newer) == 0
    journal.forget(2).result(10)
    assert met(Reader(folded(base, journal, 6), journal), 2) == [(10, 0, 9)], "the mark was folded in, too"


def test_what_is_folded_is_deleted_oldest_first_and_numbers_never_come_back(journal):
    written(journal, *(event(n) for n in range(10)))
    assert journal.deleted() == 0
    assert journal.delete_folded(5, most=3).result(10) == 3
    assert [e.item_id for e in everything(journal)] == [3, 4, 5, 6, 7, 8, 9]
    assert [journal.delete_folded(5, most=3).result(10) for _ in range(2)] == [2, 0]
    assert journal.delete_folded(10).result(10) == 5
    assert (journal.count(), journal.last(), journal.deleted()) == (0, 10, 10)
    assert journal.delete_folded(2).result(10) == 0
    written(journal, event(1))
    assert (journal.last(), journal.deleted()) == (11, 10)


@pytest.mark.parametrize("events", [0, 3])
def test_an_older_copy_put_back_takes_nothing_new_for_folded(base, journal, tmp_path, events):
    """Its numbers are behind the store's; what comes now must not get a number that the store has."""
    written(journal, *(Event(1, 10, 0, START + 100 + n) for n in range(events)))
    with closing(sqlite3.connect(journal.path)) as connection:
        connection.execute("VACUUM INTO ?", (str(tmp_path / "copy.sqlite"),))
    newer = folded(base, journal, 50)
    with opened(tmp_path / "copy.sqlite") as copy:
        reader = Reader(newer, copy)
        written(copy, Event(1, 10, 0, START + 200))
        assert met(reader, 1)[3:] == [(10, 0, 200)]
        assert copy.last() == 51
        assert copy.count() == events + 1
