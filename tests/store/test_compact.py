"""A compacted store is the store of the whole log, whatever happens on the way."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from longretriever import saved
from longretriever.errors import Damaged, InputError, Mismatch, NotSaved
from longretriever.saved import MANIFEST
from longretriever.store import compact as module
from longretriever.store.behaviors import Store
from longretriever.store.compact import compact
from longretriever.store.ingest import ingest
from longretriever.store.live import Event, Journal, LiveJournal, Reader, open_journal
from tests.store.conftest import EVERYWHERE
from tests.store.test_joined import few, told
from tests.store.test_journals import as_events
from tests.test_cli import run
from tests.worlds import START, random_log, table

USERS, ITEMS, CATEGORIES = 8, 20, 4
FIELDS: dict[str, Any] = {"profile": ["age", "vip", "town"], "item_features": ["brand", "size", "nothing"]}


def people(users: list[int]) -> pa.Table:
    """Fields of integers, booleans and strings, some of them missing."""
    columns = {
        "age": [None if u == 3 else 20 + u % 3 for u in users],
        "vip": [u % 2 == 0 for u in users],
        "town": [["Ur", "Uruk", None][u % 3] for u in users],
    }
    return pa.table({"user_id": pa.array(users, pa.int64()), **columns})


def catalog() -> pa.Table:
    """More items than anybody meets, in other categories than the log has them in."""
    items = np.arange(ITEMS + 5)
    columns = {
        "category_id": items % 3,
        "title": pa.array([None if i == 4 else f"item {i}" for i in items]),
        "brand": pa.array([None if i % 5 == 0 else f"brand {i % 4}" for i in items]),
        "size": items % 2,
        "nothing": pa.nulls(len(items), pa.string()),
    }
    return pa.table({"item_id": items, **columns})


def as_strings(rows: pa.Table) -> pa.Table:
    """The same with ids such as "7\0é", which do not sort as numbers do."""
    for name in ("user_id", "item_id", "category_id"):
        if name in rows.column_names:
            ids = pa.array([None if n is None else f"{n}\0é" for n in rows[name].to_pylist()])
            rows = rows.set_column(rows.column_names.index(name), name, ids)
    return rows


def without(rows: pa.Table, users: list[Any]) -> pa.Table:
    return rows.filter(pc.invert(pc.is_in(rows["user_id"], pa.array(users, rows["user_id"].type))))


def fingerprint(path: Path) -> str:
    return Store.open(path, verify=True).fingerprint


def arrived(where: Path | str, rows: pa.Table) -> None:
    with closing(open_journal(where)) as journal:
        journal.append(as_events(rows)).result(10)


def forget(path: Path, *users: Any) -> None:
    with closing(Journal(path)) as journal:
        for user in users:
            journal.forget(user).result(10)


@settings(few, max_examples=5)
@given(
    seed=st.integers(0, 1000),
    parts=st.tuples(st.integers(1, 90), st.integers(1, 60), st.integers(0, 30)),
    strings=st.booleans(),
    leaves=st.sampled_from([None, "now", "stays away"]),
    pieces=st.sampled_from([1, 7, 1 << 18]),
)
def test_a_compacted_store_is_that_of_the_whole_log(tmp_path_factory, seed, parts, strings, leaves, pieces):
    """Twice in a row; of who is forgotten in between, only what comes later is there."""
    path, rng = tmp_path_factory.mktemp("compact"), np.random.default_rng(seed)
    log, items, form = random_log(seed, events=sum(parts)), catalog(), as_strings if strings else pa.table
    log = log.take(rng.permutation(len(log)))
    old, new, late = (form(log.slice(sum(parts[:i]), n)) for i, n in enumerate(parts))
    new = pa.concat_tables([new, old.slice(0, 5)])  # the store has them already
    users = form(people(sorted(set(log["user_id"][: parts[0]].to_pylist()))))
    one = old["user_id"][0].as_py()
    gone = [one] if leaves else []
    late = without(late, gone) if leaves == "stays away" else late
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_AT_ONCE", pieces)
        patch.setattr(module, "_LIVE_AT_ONCE", pieces)
        ingest(old, path / "store", items=form(items), users=users, **FIELDS)
        arrived(path / "live", new)
        report = compact(path / "store", path / "live")
        assert (report.after, report.upto, report.deleted) == (0, report.live, 0)
        whole = pa.concat_tables([old, new])
        ingest(whole, path / "whole", items=form(items), users=users, **FIELDS)
        assert fingerprint(path / "store") == fingerprint(path / "whole")
        forget(path / "live", *gone)
        arrived(path / "live", late)
        again = compact(path / "store", path / "live")
        assert (again.after, again.forgotten) == (report.upto, len(gone))
        left = pa.concat_tables([without(whole, gone), late])
        ingest(left, path / "whole", items=form(items), users=without(users, gone), **FIELDS)
        assert fingerprint(path / "store") == fingerprint(path / "whole")
    assert not list(path.glob(".*")), "nothing is left behind"


# -- a small world


OLD = [(1, 10, 0), (1, 11, 1), (2, 10, 2), (3, 20, 3)]
NEW = [(1, 20, 10), (2, 11, 11), (4, 10, 12)]


def rows(events: list[tuple[int, int, int]]) -> pa.Table:
    """Users, items and seconds; the category is the tens of an item."""
    user, item, second = zip(*events, strict=True)
    return table(user, item, [i // 10 for i in item], [START + s for s in second])


@pytest.fixture
def world(tmp_path: Path, where: str) -> Path:
    """A `store` of OLD, and a journal, `live` unless a test says elsewhere, with NEW."""
    ingest(rows(OLD), tmp_path / "store", threads=1)
    arrived(where, rows(NEW))
    return tmp_path


def of_whole(world: Path, events: list[tuple[int, int, int]]) -> str:
    """The fingerprint of the store of all events."""
    ingest(rows(events), world / "whole", threads=1)
    return fingerprint(world / "whole")


@pytest.fixture
def journal(world: Path, where: str) -> Iterator[LiveJournal]:
    with closing(open_journal(where)) as found:
        yield found


def send(journal: LiveJournal, *events: tuple[int, int, int]) -> None:
    journal.append(as_events(rows(list(events)))).result(10)


def lives(store: Store, journal: LiveJournal, users: tuple[int, ...] = (1, 2, 3, 4, 5)) -> list[Any]:
    """Everything about everybody."""
    found = Reader(store, journal).lives(users, START + 1000)
    return [told(life.store, life.user, life.now) for life in found]


def lives_in(path: Path, journal: LiveJournal) -> list[Any]:
    return lives(Store.open(path, verify=True), journal)


def test_what_the_manifest_says(world, journal):
    before = fingerprint(world / "store")
    compact(world / "store", world / "live", world / "new")
    manifest = Store.open(world / "new").manifest
    assert manifest.facts["live"] == {"journal": journal.id, "upto": 3}
    assert manifest.facts["report"]["kept"] == 7
    assert manifest.made_from == {"store": before}
    assert fingerprint(world / "store") == before, "with `out` the old one stays"
    assert fingerprint(world / "new") == of_whole(world, OLD + NEW)


def test_old_and_new_store_tell_the_same_with_the_journal(world, journal):
    before = lives_in(world / "store", journal)
    assert [len(life["all"]) for life in before] == [3, 2, 1, 1, 0]
    compact(world / "store", world / "live", world / "new")
    assert lives_in(world / "store", journal) == lives_in(world / "new", journal) == before
    send(journal, (1, 11, 20), (5, 10, 21))
    after = lives_in(world / "new", journal)
    assert [len(life["all"]) for life in after] == [4, 2, 1, 1, 1]
    assert lives_in(world / "store", journal) == after


@EVERYWHERE
def test_rows_are_deleted_one_generation_after_they_were_folded(world, where, journal):
    compact(world / "store", where)
    assert journal.count() == 3
    serving = Store.open(world / "store")
    send(journal, (1, 11, 20))
    report = compact(world / "store", where)
    assert (report.deleted, journal.count(), journal.last()) == (3, 1, report.upto)
    assert lives(serving, journal) == lives_in(world / "store", journal), (
        "who has not looked for a newer store"
    )
    assert [len(life["all"]) for life in lives(serving, journal)] == [4, 2, 1, 1, 0]


def test_nothing_to_fold_is_nothing_to_do(world):
    compact(world / "store", world / "live")
    inode = (world / "store" / MANIFEST).stat().st_ino
    report = compact(world / "store", world / "live", world / "store")
    assert (report.ingest, report.live, report.after, report.upto) == (None, 0, 3, 3)
    assert (world / "store" / MANIFEST).stat().st_ino == inode
    assert compact(world / "store", world / "live", world / "copy").ingest is not None
    assert fingerprint(world / "copy") == fingerprint(world / "store")
    assert Store.open(world / "copy").manifest.facts["live"]["upto"] == 3


def test_what_only_live_events_know_becomes_known(world, journal):
    """An item of a known category, an item of a new one, a kind of behavior; the most frequent category."""
    sent = [
        (1, 12, 1, "buy"),
        (1, 99, 9, "click"),
        (2, 99, 9, ""),
        (2, 12, None, ""),
        (3, 99, 8, ""),
        (3, 10, 2, ""),
    ]
    journal.append([Event(u, i, c, START + 50 + n, b) for n, (u, i, c, b) in enumerate(sent)]).result(10)
    report = compact(world / "store", world / "live")
    store = Store.open(world / "store")
    assert store.behaviors == ("", "buy", "click")
    assert dict(
        zip(store.item_ids.take(range(5)), store.category_ids.take(store.item_category), strict=True)
    ) == {
        **{10: 1, 11: 1, 12: 1, 20: 2},
        99: 9,
    }
    assert report.ingest is not None
    assert (report.ingest.kept, report.ingest.recategorised) == (13, 2)


def test_a_store_that_knows_nothing_but_events(world):
    store = Store.open(world / "store")
    assert (store.profile_fields, store.item_fields, store.items.column_names) == ((), (), ["item_id"])
    compact(world / "store", world / "live")
    store = Store.open(world / "store")
    assert (store.profile_fields, store.item_fields, store.items.column_names) == ((), (), ["item_id"])


def test_the_same_fields_stay_even_if_only_one_value_is_left(tmp_path):
    """What would not become a field today was one when the model was trained."""
    users = pa.table({"user_id": [1, 2, 3], "town": ["Ur", "Uruk", "Uruk"]})
    ingest(rows(OLD), tmp_path / "store", users=users)
    with closing(Journal(tmp_path / "live")) as journal:
        journal.forget(1).result(10)
        compact(tmp_path / "store", tmp_path / "live")
        assert [field.values for field in Store.open(tmp_path / "store").profile_fields] == [("Uruk",)]
        for user in (2, 3):
            journal.forget(user).result(10)
        send(journal, (2, 10, 50))
    compact(tmp_path / "store", tmp_path / "live")
    store = Store.open(tmp_path / "store")
    assert [(field.name, field.values) for field in store.profile_fields] == [("town", ())]
    assert store.profile.tolist() == [[0]]


def test_bad_live_events_are_rejected_and_the_others_stay_none_the_less(world, journal):
    bad = [
        Event(1, 77, None, START + 60),  # nobody knows its category
        Event("1", 10, 1, START + 61),
        Event(1, "10", 1, START + 62),
        Event(1, 10, 1, 1000 * START),
        Event(1, 10, 1, -1),
        Event(1, 76, "1", START + 63),
    ]
    good = [Event(1, 10, "1", START + 70), Event(1, 10, None, START + 71)]
    journal.append([*bad, *good]).result(10)
    report = compact(world / "store", world / "live")
    assert report.ingest is not None
    assert report.ingest.rejected == {
        "item has no category": 2,
        "no user_id": 1,
        "no item_id": 1,
        "timestamp is not in seconds": 1,
        "timestamp is before 1970 or after 2100": 1,
    }
    assert report.ingest.kept == len(OLD) + len(NEW) + len(good)
    where = pq.read_table(world / "store" / "rejected.parquet").to_pylist()
    assert {(Path(row["file"]).name, row["row"]) for row in where} == {
        ("live.parquet", n) for n in range(4, 10)
    }


# -- while others write


@EVERYWHERE
def test_who_writes_meanwhile_goes_on_and_each_event_counts_once(world, where, journal):
    done, sent = threading.Event(), []

    def keep_writing() -> None:
        while not done.is_set() or len(sent) < 20:
            sent.append((1 + len(sent) % 5, 10 + len(sent) % 3, 100 + len(sent)))
            send(journal, sent[-1])

    writer = threading.Thread(target=keep_writing)
    writer.start()
    reports = [compact(world / "store", where) for _ in range(3)]
    done.set()
    writer.join()
    all_of_it = of_whole(world, OLD + NEW + sent)
    whole, users, now = Store.open(world / "whole"), (1, 2, 3, 4, 5), START + 10**6
    expected = [told(whole, whole.user_number(user), now) for user in users]
    found = Reader(Store.open(world / "store"), journal).lives(users, now)
    assert [told(life.store, life.user, life.now) for life in found] == expected
    assert sum(report.live for report in reports) > len(NEW), "some arrived between two of them"
    compact(world / "store", where)
    assert fingerprint(world / "store") == all_of_it


@EVERYWHERE
def test_who_is_forgotten_meanwhile_stays_forgotten(world, where, journal, monkeypatch):
    def meanwhile(*arguments: Any, **options: Any) -> Any:
        journal.forget(1).result(10)
        send(journal, (1, 10, 500))
        return ingest(*arguments, **options)

    monkeypatch.setattr(module, "ingest", meanwhile)
    report = compact(world / "store", where)
    assert (report.forgotten, report.live) == (0, 3), "that is for the next time"
    found = lives_in(world / "store", journal)
    assert [len(life["all"]) for life in found] == [1, 2, 1, 1, 0]
    monkeypatch.undo()
    assert compact(world / "store", where).forgotten == 1
    assert lives_in(world / "store", journal) == found
    left = [e for e in OLD + NEW if e[0] != 1]
    assert fingerprint(world / "store") == of_whole(world, [*left, (1, 10, 500)])


def test_only_one_compacts_at_a_time(world, monkeypatch):
    said = []

    def meanwhile(*arguments: Any, **options: Any) -> Any:
        with pytest.raises(InputError, match=r"live is being compacted already\. Wait for that") as error:
            compact(world / "store", world / "live", world / "other")
        said.append(error)
        return ingest(*arguments, **options)

    monkeypatch.setattr(module, "ingest", meanwhile)
    compact(world / "store", world / "live")
    assert said
    assert not (world / "other").exists()
    compact(world / "store", world / "live", world / "other")


# -- crashes


KILLED = """
import os, signal, sys
from longretriever import saved
from longretriever.store import compact, ingest

def die(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)

where, name = sys.argv[2].split(".")
if where == "redis":
    from longretriever.store.redis import RedisJournal

    RedisJournal.delete_folded = lambda self, upto, most=0: (self._raise("deleted", upto), die())
else:
    setattr({"compact": compact, "ingest": ingest, "saved": saved}[where], name, die)
compact.compact(sys.argv[1] + "/store", sys.argv[3], threads=1)
"""


@pytest.mark.parametrize(
    ("where", "moment", "is_new"),
    [
        ("file", "compact._items", False),
        ("file", "compact.ingest", False),
        ("file", "ingest._write_users", False),
        ("file", "saved._move_into_place", False),
        ("file", "compact._delete", True),
        ("redis", "compact.ingest", False),
        ("redis", "compact._delete", True),
        ("cluster", "redis.delete_folded", True),  # between the number deleted, and deleting
    ],
    indirect=["where"],
)
def test_killed_at_any_moment_nothing_is_lost_and_nothing_counts_twice(world, where, journal, moment, is_new):
    """The second generation, so that there are rows to be deleted."""
    first = compact(world / "store", where).upto
    journal.forget(3).result(10)
    send(journal, (1, 11, 20), (5, 10, 21))
    before, upto = lives_in(world / "store", journal), journal.last()
    killed = subprocess.run([sys.executable, "-c", KILLED, str(world), moment, where], check=False)
    assert killed.returncode == -signal.SIGKILL
    assert Store.open(world / "store").manifest.facts["live"]["upto"] == (upto if is_new else first)
    assert lives_in(world / "store", journal) == before
    report = compact(world / "store", where)
    assert (report.ingest is None, report.upto) == (is_new, upto)
    assert lives_in(world / "store", journal) == before
    left = [e for e in [*OLD, *NEW, (1, 11, 20), (5, 10, 21)] if e[0] != 3]
    assert fingerprint(world / "store") == of_whole(world, left)
    if is_new:
        send(journal, (1, 11, 30))
        compact(world / "store", where)
    assert journal.count() == (1 if is_new else 3), "what a killed one did not delete, the next one does"


def test_what_a_killed_one_has_written_out_is_swept_away(world):
    left = world / f".store.export-{os.getpid()}-0"
    left.mkdir()
    command = [sys.executable, "-c", KILLED, str(world), "compact.ingest", str(world / "live")]
    killed = subprocess.run(command, check=False)
    assert killed.returncode == -signal.SIGKILL
    (export,) = set(world.glob(".store.export-*")) - {left}
    os.utime(export, (0, 0))
    compact(world / "store", world / "live")
    assert list(world.glob(".*")) == [left], "that of a living process stays"


def test_an_error_leaves_everything_as_it_was(world, journal, monkeypatch):
    before = fingerprint(world / "store")

    def fails(*_: Any, **__: Any) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(module, "_users", fails)
    monkeypatch.setattr(module, "ingest", fails)
    with pytest.raises(OSError, match="No space left"):
        compact(world / "store", world / "live")
    assert (fingerprint(world / "store"), journal.count()) == (before, 3)
    assert not list(world.glob(".*"))


# -- what cannot be compacted


def test_what_is_not_there_or_not_ours(world):
    with pytest.raises(NotSaved, match=r"nowhere: no live events there\. Pass the file that `longretriever"):
        compact(world / "store", world / "nowhere")
    assert not (world / "nowhere").exists()
    with pytest.raises(NotSaved, match="nowhere: no such folder, where a saved store was wanted"):
        compact(world / "nowhere", world / "live", world / "out")
    (world / "letter").write_text("dear " * 1000)
    with pytest.raises(Damaged, match="letter: not readable as live events"):
        compact(world / "store", world / "letter")
    (world / "letters").mkdir()
    shutil.move(world / "letter", world / "letters")
    with pytest.raises(NotSaved, match="letters exists and holds no saved store"):
        compact(world / "store", world / "live", world / "letters")


def test_damage_is_not_passed_on(world, monkeypatch):
    """Ingested anew, a large file with a flipped bit would have the right checksum."""
    monkeypatch.setattr(saved, "_HASHED_AT_OPEN", 0)
    file = world / "store" / "event_time.npy"
    content = bytearray(file.read_bytes())
    content[-8] ^= 1
    file.write_bytes(content)
    with pytest.raises(Damaged, match=r"event_time\.npy: its SHA-256"):
        compact(world / "store", world / "live")


def test_a_store_that_has_missed_what_is_deleted(world, journal):
    compact(world / "store", world / "live", world / "second")
    shutil.copytree(world / "second", world / "old")
    for second in (20, 30):
        send(journal, (1, 11, second))
        compact(world / "second", world / "live")
    message = r"old holds the events of .*live up to number 3, but those up to 4 went into a newer store"
    with pytest.raises(Mismatch, match=message):
        compact(world / "old", world / "live")


def test_if_nobody_is_left_the_old_store_stays(world, journal):
    for user in (1, 2, 3, 4):
        journal.forget(user).result(10)
    with pytest.raises(InputError, match="store: all of its users are forgotten, so no event would be left"):
        compact(world / "store", world / "live")
    assert [life["all"] for life in lives_in(world / "store", journal)] == [[]] * 5
    send(journal, (5, 10, 50))
    compact(world / "store", world / "live")
    assert Store.open(world / "store").user_ids.take([0]) == [5]


def test_more_kinds_than_a_store_can_hold(world, journal, monkeypatch):
    """A journal takes no more than its store can, but it may be folded into another."""
    monkeypatch.setattr("longretriever.store.compact.MOST_KINDS", 100)
    journal.append([Event(1, 10, 1, START + n, f"kind {n}") for n in range(100)]).result(10)
    before = fingerprint(world / "store")
    with pytest.raises(InputError, match=r"more than 100 kinds of behavior, such as \['', 'kind 0'.*sqlite3"):
        compact(world / "store", world / "live")
    assert fingerprint(world / "store") == before


# -- the command


def test_the_command(world, monkeypatch):
    monkeypatch.chdir(world)
    said = run("compact", "store", "--live", "live", "--threads", 1)
    assert said.code == 0
    assert "3, numbers 1 to 3 of live" in said.out
    assert "7 read, 7 kept, 0 duplicates" in said.out
    assert fingerprint(world / "store") == of_whole(world, OLD + NEW)
    assert (
        "nothing to fold: it has all of live, up to number 3" in run("compact", "store", "--live", "live").out
    )
    told_ = run("compact", "store", "--live", "live", "--out", "other", "--json").json
    assert (told_["store"], told_["upto"], told_["ingest"]["kept"]) == ("other", 3, 7)
    assert run("compact", "store", "--live", "live", "--json").json["ingest"] is None
    assert "nowhere: no live events there" in run("compact", "store", "--live", "nowhere").error
    assert json.loads((world / "other" / MANIFEST).read_text())["facts"]["live"]["upto"] == 3
