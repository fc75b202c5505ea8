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

import pytest

from longretriever.errors import Damaged, InputError, Mismatch, NotSaved
from longretriever.store import live
from longretriever.store.live import Event, Journal, Reader, check_journal
from tests.store.test_journals import event, everything, folded, met, written
from tests.worlds import START


def opened(path: Path) -> closing[Journal]:
    return closing(Journal(path))


@pytest.fixture
def journal(tmp_path: Path) -> Iterator[Journal]:
    with opened(tmp_path / "live.sqlite") as found:
        yield found


@contextmanager
def busy(journal: Journal) -> Iterator[None]:
    """As if another process were writing: what is asked for in here goes into one transaction afterwards."""
    with live._locked(journal.path):
        journal.delete_folded(0)  # a call that the writer waits with
        while journal.waiting:
            pass
        yield


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


def test_what_is_forgotten_is_overwritten(tmp_path):
    with opened(tmp_path / "live.sqlite") as journal:
        written(journal, *(event(n, "someone", behavior=f"secret {n}") for n in range(100)))
        assert len(everything(journal)) == 100
        journal.forget("someone").result(10)
    assert b"secret" not in (tmp_path / "live.sqlite").read_bytes()


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
