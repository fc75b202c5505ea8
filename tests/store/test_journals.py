"""What every journal promises, in a file, in Redis, in a cluster; and with its store, one store of all."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from longretriever.errors import InputError
from longretriever.store.behaviors import Store
from longretriever.store.ingest import ingest
from longretriever.store.live import Event, LiveJournal, Reader, Written, is_address, open_journal
from tests.store.conftest import EVERYWHERE
from tests.store.test_joined import CATEGORIES, STRANGER, USERS, few, log_of, moments, told
from tests.worlds import START, stored, table

pytestmark = EVERYWHERE


def event(n: int, user: int | str = 1, **fields: Any) -> Event:
    return Event(user, n, 0, START + n)._replace(**fields)


def written(journal: LiveJournal, *events: Event) -> Written:
    return journal.append(events).result(10)


def everything(journal: LiveJournal) -> list[Event]:
    return list(journal.between(0, journal.last()))


def opened(where: str) -> closing[LiveJournal]:
    """The same journal, as another process has it open."""
    return closing(open_journal(where))


def anew(where: str, path: Path) -> closing[LiveJournal]:
    """An empty one of the same kind."""
    if not is_address(where):
        return opened(str(path / "live.sqlite"))
    import redis

    for host in where.split("://")[1].split("/")[0].split(","):
        redis.Redis.from_url(f"redis://{host}").flushall()
    return opened(where)


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
    assert first in everything(journal)
    assert len(everything(journal)) == journal.count() == 6


def test_ids_and_times_come_back_as_they_were(journal):
    """Also long ones, negative ones, none, and what separators are made of."""
    ids = [7, "7", -7, 2**63 - 1, -(2**63), "", "i7", "{9}:a", "7\0é:", "\n" * 100]
    times = [-(2**63), -1, *range(8)]
    sent = [
        Event(
            ids[n],
            ids[n - 1],
            None if n == 4 else ids[n - 2],
            times[n],
            "kind é",
            f"{n}:é" if n % 3 else None,
        )
        for n in range(10)
    ]
    assert written(journal, *sent) == (10, 0)
    assert written(journal, *sent) == (0, 10)
    for one in sent:
        assert journal.of(one.user_id) == ([one], False)
    assert sorted(everything(journal), key=repr) == sorted(sent, key=repr)
    for one in sent:
        assert journal.forget(one.user_id).result(10) == 1
    assert set(journal.forgotten(0, journal.last())) == set(ids)


def test_an_event_that_lacks_something_is_refused(journal):
    """Without its item it would be a mark that forgets the user."""
    for field in ("user_id", "item_id", "time", "behavior"):
        with pytest.raises(InputError, match=f"{field} is missing"):
            journal.append([event(1), event(2)._replace(**{field: None})])
    for field, wrong in (
        ("item_id", 1.5),
        ("time", 0.5),
        ("user_id", b"x"),
        ("behavior", 3),
        ("event_id", 7),
    ):
        with pytest.raises(InputError, match=rf"{field} is {wrong!r}, expected"):
            journal.append([event(1), event(2)._replace(**{field: wrong})])
    with pytest.raises(InputError, match="expected an integer of 64 bits"):
        journal.append([event(1), event(2**70)])
    assert journal.count() == 0
    assert journal.of(1) == ([], False)


def test_a_call_that_fails_takes_no_other_with_it(journal):
    too_many = [event(n, behavior=f"kind {n}") for n in range(256)]
    calls = [[event(1)], [event(2), *too_many], [event(3)], [event(4), *too_many], [event(5)]]
    with ThreadPoolExecutor(5) as threads:
        asked = list(threads.map(journal.append, calls))
    assert [asked[i].result(10) for i in (0, 2, 4)] == [(1, 0)] * 3
    for i in (1, 3):
        assert "one kind more than the 255" in str(asked[i].exception(10))
    assert sorted(e.item_id for e in everything(journal)) == [1, 3, 5], "all of a call or nothing"


def test_who_no_longer_waits_stops_nobody(journal):
    """A web server cancels what its client does not wait for."""
    asked = [journal.append([event(n, n)]) for n in range(200)]
    left = [one.cancel() for one in asked]
    assert any(left)
    assert written(journal, event(999)) == (1, 0)
    done = {n for n, one in enumerate(left) if not one} | {999}
    assert {e.item_id for e in everything(journal)} == done


def test_many_write_at_once_and_all_see_all(journal, where):
    with opened(where) as second, ThreadPoolExecutor(16) as threads:
        both = [journal, second]
        assert journal.id == second.id
        sent = [[event(n, user=n % 7, event_id=f"{n}"), event(n, user="x")] for n in range(300)]
        asked = list(threads.map(lambda n: both[n % 2].append(sent[n]), range(300)))
        again = list(threads.map(lambda n: both[n % 3 % 2].append(sent[n]), range(300)))
        assert sum(one.result(10).accepted for one in [*asked, *again]) == 600
        assert [len(one.of("x")[0]) for one in both] == [300, 300]
        assert sorted(everything(second), key=repr) == sorted(everything(journal), key=repr)
        assert journal.count() == second.count() == 600


def test_several_users_are_as_each_of_them(journal):
    written(journal, *(event(4 - n, user) for user in (1, "1", 3) for n in range(4)))
    journal.forget(3).result(10)
    assert journal.count() == 9, "with the mark"
    users = [3, 1, "1", 1, 99]
    assert [(one.events, one.forgotten) for one in journal.of_each(users)] == [journal.of(u) for u in users]
    assert [e.item_id for e in journal.of(1)[0]] == [1, 2, 3, 4], "by time"
    assert all(one.is_all for one in journal.of_each(users))
    assert (journal.of_each([]), journal.trouble()) == ([], None)


def test_closing_finishes_what_was_asked_for(where):
    journal = open_journal(where)
    asked = [journal.append([event(n)]) for n in range(300)]
    journal.close()
    journal.close()
    assert all(one.done() for one in asked)
    with pytest.raises(InputError, match="is closed"):
        journal.append([event(1)])
    with opened(where) as again:
        assert again.count() == 300
        assert again.id == journal.id


def test_one_compacts_at_a_time_and_whoever_ends_makes_room(journal, where):
    with opened(where) as second:
        with (
            journal.compacting(),
            pytest.raises(InputError, match=r"is being compacted already\. Wait"),
            second.compacting(),
        ):
            pass
        with second.compacting():
            pass


# -- the store and the journal


@settings(few, max_examples=4)
@given(
    seed=st.integers(0, 1000), events=st.integers(1, 120), share=st.floats(0, 1), out_of_order=st.booleans()
)
def test_lives_are_those_of_one_store_of_everything(
    tmp_path_factory, where, seed, events, share, out_of_order
):
    """Also where some of the live events are in the store already, or were sent twice, in any order."""
    log, path, rng = log_of(seed, events), tmp_path_factory.mktemp("live"), np.random.default_rng(seed)
    time = log["timestamp"].to_numpy()
    late = rng.random(len(time)) < share if out_of_order else time > np.quantile(time, 1 - share)
    late[:CATEGORIES] = False
    base, whole = stored(log.filter(~late), path / "base"), stored(log, path / "whole")
    sent = np.flatnonzero(late | (rng.random(len(time)) < 0.2))
    users = [int(user) for user in rng.permutation([*range(USERS), STRANGER])]
    with anew(where, path) as journal:
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
                assert life.is_all


def as_events(rows: pa.Table) -> list[Event]:
    names = ("user_id", "item_id", "category_id", "timestamp", "behavior")
    given = rows.to_pydict()
    none = [""] * rows.num_rows
    return [Event(*row) for row in zip(*(given.get(name, none) for name in names), strict=True)]


def nothing() -> dict[str, Any]:
    empty: list[Any] = [[]] * CATEGORIES
    none: dict[str, Any] = {"recent": [], "all": [], "sampled": [], "engagement": {}, "items": []}
    return none | {"contexts": empty, "lately": empty}


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
    assert sorted(journal.forgotten(0, journal.last())) == [1, 3]


def test_a_sender_who_mistakes_kinds_for_ids_cannot_use_them_up(where):
    beside = ["click", "buy"]
    with opened(where) as journal, opened(where) as other:
        journal.append([event(n, behavior=f"click {n}") for n in range(252)], beside).result(10)
        other.append([event(0, behavior="buy")], beside).result(10)
        journal.append([event(1, behavior="share")], beside).result(10)
        for one in (journal, other):
            with pytest.raises(InputError, match="'save' would be one kind more than the 255"):
                one.append([event(2, behavior="click"), event(2, behavior="save")], beside).result(10)
        other.append([event(2, behavior="click 9")], beside).result(10)
        assert journal.count() == 255
    with opened(where) as journal, pytest.raises(InputError, match="'save'"):
        journal.append([event(2, behavior="save")], beside).result(10)


# -- folding


def folded(base: Store, journal: LiveJournal, upto: int) -> Store:
    """The same events in a store that says it has the journal's events up to a number."""
    log = table([1, 1, 1, 2], [10, 11, 20, 10], [0, 0, 1, 0], [START, START + 1, START + 2, START + 9])
    path = base.path.with_name(f"folded {upto}")
    ingest(log, path, facts={"live": {"journal": journal.id, "upto": upto}})
    return Store.open(path)


def test_a_store_says_what_it_has_of_a_journal(base, journal, tmp_path):
    written(journal, *(Event(1, 10, 0, START + 100 + n) for n in range(3)))
    upto = journal.last()
    written(journal, *(Event(1, 10, 0, START + 103 + n) for n in range(2)))
    assert journal.folded_into(base) == 0
    assert met(Reader(base, journal), 1)[3:] == [(10, 0, 100 + n) for n in range(5)]
    newer = folded(base, journal, upto)
    assert journal.folded_into(newer) == upto
    assert met(Reader(newer, journal), 1)[3:] == [(10, 0, 103), (10, 0, 104)]
    assert (journal.count(), journal.count(upto)) == (5, 2)
    with opened(str(tmp_path / "other.sqlite")) as other:
        assert other.folded_into(newer) == 0
    journal.forget(2).result(10)
    assert met(Reader(folded(base, journal, journal.last()), journal), 2) == [(10, 0, 9)], (
        "the mark was folded in, too"
    )


def test_what_is_folded_is_deleted_and_numbers_never_come_back(journal):
    written(journal, *(event(n, n % 3) for n in range(10)))
    journal.forget(2).result(10)
    written(journal, event(20, 2))
    journal.forget(2).result(10)
    upto = journal.last()
    kept = [event(30, 2), event(31, 0), event(0, 5)]
    written(journal, *kept)
    assert journal.deleted() == 0
    rows = journal.count() - journal.count(upto)
    steps = [journal.delete_folded(upto, most=3).result(10) for _ in range(12)]
    assert sum(steps) == rows
    assert steps[-1] == 0
    assert sorted(everything(journal)) == sorted(kept)
    assert (journal.count(), journal.deleted(), journal.forgotten(0, journal.last())) == (3, upto, [])
    assert (journal.of(2), journal.of(0)) == (([kept[0]], False), ([kept[1]], False))
    assert journal.delete_folded(upto // 2).result(10) == 0
    assert journal.deleted() == upto
    assert written(journal, event(0, 0), event(30, 2)) == (1, 1), "what is gone is not remembered"
    before = journal.last()
    written(journal, event(99))
    assert journal.count(before) == 1


def test_what_comes_while_it_is_folded_is_behind_the_number(journal, where):
    """Rows up to `last` are a fixed set, whoever writes meanwhile."""
    with opened(where) as writer, ThreadPoolExecutor(4) as threads:
        asked = [threads.submit(writer.append, [event(n, n % 50)]) for n in range(400)]
        moments = [(upto, len(list(journal.between(0, upto)))) for upto in (journal.last() for _ in range(5))]
        for one in asked:
            one.result().result(10)
    assert [(upto, len(list(journal.between(0, upto)))) for upto, _ in moments] == moments
    assert [journal.count(upto) for upto, _ in moments] == [400 - before for _, before in moments]


def test_numbers_go_on_behind_what_a_store_has(base, journal):
    """As of an older copy that was put back: what comes now must not be taken for folded."""
    written(journal, Event(1, 10, 0, START + 100))
    upto = journal.last() + 10**12  # more than a week, in numbers of a Redis
    reader = Reader(folded(base, journal, upto), journal)
    written(journal, Event(1, 10, 0, START + 200))
    assert met(reader, 1)[3:] == [(10, 0, 200)]
    assert journal.last() > upto
    assert journal.count() == 2
