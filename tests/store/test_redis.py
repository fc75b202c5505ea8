"""What is acknowledged outlives its Redis; one that is gone delays nobody; one that forgets is refused."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator
from contextlib import closing, suppress
from pathlib import Path
from statistics import median

import pytest

from longretriever.errors import Damaged, InputError, Mismatch, MissingExtra, NotSaved, Unavailable
from longretriever.store.live import Event, Reader, open_journal
from tests.serve.running import free_port, wait_until
from tests.store.redises import (
    PROGRAM,
    RedisServer,
    cluster_url,
    emptied,
    paused,
    redis_server,
)
from tests.store.test_journals import event, everything, folded, met, written

pytest.importorskip("redis", reason="pip install 'longretriever[redis]'")
if PROGRAM is None:
    pytest.skip("redis-server is not installed: apt-get install redis-server", allow_module_level=True)

from longretriever.store import redis as module
from longretriever.store.redis import RedisJournal


@pytest.fixture(scope="module")
def mortal(tmp_path_factory) -> Iterator[RedisServer]:
    """One that tests kill and start again."""
    with redis_server(tmp_path_factory.mktemp("mortal")) as server:
        yield server


def running(server: RedisServer) -> str:
    if server.process is None:
        server.start()
    emptied([server])
    return server.url


# -- durable


def test_what_is_acknowledged_outlives_a_kill(mortal):
    with closing(RedisJournal(running(mortal))) as journal:
        acknowledged: list[str] = []

        def append(thread: int) -> None:
            for n in range(100_000):
                sent = [
                    event(n, user, event_id=f"{thread}-{n}") for user in (f"u{thread}", f"v{thread}{n % 9}")
                ]
                try:
                    journal.append(sent).result(10)
                except Unavailable:
                    return
                acknowledged.append(f"{thread}-{n}")

        threads = [threading.Thread(target=append, args=(n,)) for n in range(8)]
        for thread in threads:
            thread.start()
        wait_until(lambda: len(acknowledged) > 300)
        mortal.stop()
        for thread in threads:
            thread.join(10)
        mortal.start()
        wait_until(lambda: journal.trouble() is None, 10)
        there = [e.event_id for e in everything(journal)]
        assert len(there) == len(set(there)) * 2, "of each call all or nothing"
        assert set(acknowledged) <= set(there)
        assert written(journal, event(1)) == (1, 0), "and it goes on"


# -- a server that is gone


def test_who_asks_a_server_that_is_gone_is_told_at_once(mortal, base, monkeypatch):
    monkeypatch.setattr(module, "_MARKS", 0.1)
    url = running(mortal)
    with closing(RedisJournal(url)) as journal, closing(RedisJournal(url)) as second:
        written(journal, Event(1, 11, 0, 10**9 + 1), event(0, 2))
        journal.forget(2).result(10)
        reader = Reader(base, journal)
        with closing(RedisJournal(url)) as third:
            assert 2 in third._marked
        wait_until(lambda: 2 in second._marked, 10)
        paused(mortal)
        assert not second.of_each([2])[0].is_all
        assert second.of_each([2])[0].forgotten, "whoever it was forgotten by"
        first = seconds_of(lambda: reader.lives([1, 2, 3], 2 * 10**9))
        assert first < 2 * module.SECONDS + 2, "one pays"
        end, waited = time.monotonic() + 2 * module._LOOK, []
        while time.monotonic() < end:
            waited.append(seconds_of(lambda: reader.lives([1, 2, 3], 2 * 10**9)))
        assert median(waited) < 0.8 * module.SECONDS, "and nobody else"
        lives = reader.lives([1, 2, 3], 2 * 10**9)
        assert [life.is_all for life in lives] == [False] * 3
        assert met(reader, 1) == [(10, 0, 0), (11, 0, 1), (20, 1, 2)], "what the store knows"
        assert met(reader, 2) == [], "and he stays forgotten"
        said = journal.append([event(5)]).exception(10)
        assert isinstance(said, Unavailable)
        assert "cannot be reached" in str(said)
        with pytest.raises(Unavailable, match="cannot be reached"):
            journal.of(1)
        with pytest.raises(Unavailable, match="cannot be reached"):
            journal.last()
        mortal.stop()
        mortal.start()
        wait_until(lambda: journal.trouble() is None, 10)
        assert reader.lives([1], 2 * 10**9)[0].is_all
        assert [e.item_id for e in journal.of(1)[0]] == [11]
        assert written(journal, event(5)) == (1, 0)


def seconds_of(work) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def test_one_that_is_not_there_yet_is_waited_for(mortal, base):
    mortal.stop()
    with pytest.raises(Unavailable, match=r"redis://127\.0\.0\.1:\d+/0 cannot be reached"):
        RedisJournal(mortal.url)
    with closing(RedisJournal(mortal.url, at_once=False)) as journal:
        reader = Reader(base, journal)
        assert not reader.lives([1], 10**10)[0].is_all
        with pytest.raises(Unavailable):
            journal.count()
        assert isinstance(journal.append([event(1)]).exception(10), Unavailable)
        mortal.start()
        wait_until(lambda: journal.trouble() is None, 10)
        assert written(journal, event(1, 1)).accepted + written(journal, event(1, 1)).accepted <= 1
        assert reader.lives([1], 10**10)[0].is_all


def test_a_cluster_without_one_of_its_nodes(three_redises):
    """Users of the others go on; a call that was written in part is whole once it is sent again."""
    with closing(RedisJournal(cluster_url(three_redises))) as journal:
        users = range(60)
        sent = [event(n, user) for user in users for n in range(2)]
        assert written(journal, *sent[::2]) == (60, 0)
        upto = journal.last()
        three_redises[1].stop()
        found = journal.of_each(list(users))
        assert {len(one.events) for one in found if one.is_all} == {1}
        gone = [user for user, one in zip(users, found, strict=True) if not one.is_all]
        assert 5 < len(gone) < 40, "a third, more or less"
        assert median(seconds_of(lambda: journal.of_each(list(users))) for _ in range(10)) < 0.1
        assert isinstance(journal.append(sent[1::2]).exception(10), Unavailable)
        others = [user for user in users if user not in gone]
        assert all(len(journal.of(user)[0]) == 2 for user in others), "these are written"
        assert written(journal, *(event(9, user) for user in others)) == (len(others), 0)
        with pytest.raises(Unavailable):
            journal.of(gone[0])
        with pytest.raises(Unavailable):
            journal.last()
        with closing(RedisJournal(cluster_url(three_redises), at_once=False)) as second:
            assert len(second.of(others[0])[0]) == 3, "a server that is started meanwhile knows the others"
            assert [e.is_all for e in second.of_each([others[0], gone[0]])] == [True, False]
            three_redises[1].start()
            wait_until(lambda: journal.trouble() is None and second.trouble() is None, 15)
        wait_until(lambda: settled(journal, gone[0]), 15)
        assert written(journal, *sent[1::2]) == (len(gone), len(others))
        assert all(len(journal.of(user)[0]) == 2 for user in gone)
        assert journal.count(upto) == 60 + len(others)


def settled(journal: RedisJournal, user: int) -> bool:
    with suppress(Unavailable):
        return journal.of(user) is not None
    return False


def test_keys_that_move_are_followed(three_redises):
    with closing(RedisJournal(cluster_url(three_redises))) as journal:
        written(journal, *(event(n, user) for user in range(40) for n in range(2)))
        slot = module.key_slot(facts_of(7).encode())
        old = next(n for n in range(3) if slot < 16_384 * (n + 1) // 3)
        here, there = three_redises[old], three_redises[(old + 1) % 3]
        ids = [node.client.execute_command("CLUSTER MYID").decode() for node in (here, there)]
        there.client.execute_command("CLUSTER SETSLOT", slot, "IMPORTING", ids[0])
        here.client.execute_command("CLUSTER SETSLOT", slot, "MIGRATING", ids[1])
        keys = here.client.execute_command("CLUSTER GETKEYSINSLOT", slot, 1000)
        here.client.execute_command("MIGRATE", "127.0.0.1", there.port, "", 0, 5000, "KEYS", *keys)
        try:
            assert len(journal.of(7)[0]) == 2, "while they move"
            assert written(journal, event(2, 7), event(1, 7)) == (1, 1)
        finally:
            for node in (there, here, three_redises[(old + 2) % 3]):
                node.client.execute_command("CLUSTER SETSLOT", slot, "NODE", ids[1])
        assert len(journal.of(7)[0]) == 3, "and when they are there"
        assert journal.count() == 81
        before = journal.round_trips
        journal.of(7)
        assert journal.round_trips == before + 1


# -- numbers


def test_clocks_that_differ_neither_lose_nor_repeat_events(three_redises, base):
    """A bucket that is an hour ahead makes the number that parts old from new one of the future."""
    with closing(RedisJournal(cluster_url(three_redises))) as journal:
        ahead = str((time.time_ns() // 1_000) + 3_600_000_000)
        journal._ask([module._Ask(k, ("HSET", k, "last", ahead)) for k in [facts_of(1)]])
        written(journal, *(Event(user, 10, 0, 10**9) for user in range(40)))
        upto = journal.last()
        assert upto > int(ahead)
        written(journal, *(Event(user, 10, 0, 10**9 + 5) for user in range(40)))
        assert [len(list(journal.between(*part))) for part in ((0, upto), (upto, 2 * upto))] == [40, 40]
        reader = Reader(folded(base, journal, upto), journal)
        assert all(len(met(reader, user, 2 * 10**9)) == 1 for user in range(3, 40))


def facts_of(user: int) -> str:
    return module._key(module._bucket(user), "facts")


def test_a_bucket_is_read_in_pages(one_redis, monkeypatch):
    monkeypatch.setattr(module, "_PAGE", 7)
    with closing(RedisJournal(one_redis.url)) as journal:
        sent = [event(n, user) for n in range(50) for user in (1, 2)]
        written(journal, *sent)
        journal.forget(2).result(10)
        assert everything(journal) == sent[::2]


# -- what a request costs


def test_round_trips(one_redis, three_redises):
    for url, nodes in ((one_redis.url, 1), (cluster_url(three_redises), 3)):
        with closing(RedisJournal(url)) as journal:
            written(journal, *(event(n, user) for user in range(100) for n in range(3)))
            for asked, most in (
                (lambda: journal.of(7), 1),
                (lambda: journal.of_each(list(range(100))), nodes),
            ):
                before = journal.round_trips
                asked()
                assert journal.round_trips == before + most


def test_who_waits_waits_together(one_redis):
    with closing(RedisJournal(one_redis.url)) as journal:
        written(journal, event(0))
        before = journal.round_trips
        asked = [journal.append([event(n)]) for n in range(1, 1001)]
        assert all(one.result(10) == (1, 0) for one in asked)
        assert journal.round_trips - before < 100


# -- what is in the way


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("redis://", r"redis://: expected redis://\[user:password@\]host:port/0"),
        ("redis://host:port/0", "Port could not be cast"),
        ("redis://host:70000/0", "Port out of range"),
        ("redis://one,two/0", r"several hosts are those of a cluster: write redis\+cluster://"),
        ("redis+cluster://one:7000/1", "a cluster has database 0 only"),
        ("redis://user:secret@host/zero", r"redis://host/zero: expected"),
        ("http://host", "http://host: expected redis://"),
    ],
)
def test_an_address_that_is_none(url, says):
    with pytest.raises(InputError, match=says) as error:
        open_journal(url)
    assert "secret" not in str(error.value)


def test_without_the_client(monkeypatch):
    monkeypatch.setitem(sys.modules, "redis", None)
    monkeypatch.delitem(sys.modules, "longretriever.store.redis")
    with pytest.raises(MissingExtra, match=r"pip install 'longretriever\[redis\]'"):
        open_journal("redis://127.0.0.1/0")


def test_a_database_that_is_not_there(one_redis):
    with pytest.raises(NotSaved, match="DB index is out of range"):
        RedisJournal(f"redis://{one_redis.address}/99")


def test_other_data_is_left_alone(one_redis):
    one_redis.client.set("photo", b"...")
    with pytest.raises(NotSaved, match=r"holds other data \(such as photo\), no live events\. Choose"):
        RedisJournal(one_redis.url)
    assert one_redis.client.keys() == [b"photo"]


def test_a_format_of_the_future_and_one_half_made(one_redis):
    RedisJournal(one_redis.url).close()
    one_redis.client.hset("longretriever:about", "format", "99")
    with pytest.raises(Mismatch, match="in format 99, this version reads format 1"):
        RedisJournal(one_redis.url)
    one_redis.client.flushall()
    one_redis.client.hset("longretriever:about", mapping={"format": "1"})
    with closing(RedisJournal(one_redis.url)) as journal:
        assert written(journal, event(1)) == (1, 0), "whoever made it was killed"


def test_one_that_came_back_without_its_data(one_redis):
    with closing(RedisJournal(one_redis.url)) as journal:
        written(journal, event(1))
        one_redis.client.flushall()
        for failing in (lambda: journal.of(1), lambda: journal.append([event(2)]).result(10)):
            with pytest.raises(Unavailable, match=r"no longer holds .*Restore its append-only"):
                failing()
        assert one_redis.client.keys() == []
    with closing(RedisJournal(one_redis.url)) as journal:
        one_redis.client.delete("longretriever:{9}:facts")
        with pytest.raises(Damaged, match=r"longretriever:\{9\}:facts is gone"):
            journal.check()
    with pytest.raises(Damaged, match="no longer holds these live events"):
        RedisJournal(one_redis.url)


def test_keys_of_another_type(one_redis):
    with closing(RedisJournal(one_redis.url)) as journal:
        key = module._key(module._bucket(1), "e", 1)
        one_redis.client.set(key, "letter")
        with pytest.raises(Damaged, match="not as this package writes it"):
            journal.of(1)


def test_settings_that_lose_events(one_redis):
    """Asked for again whenever a server comes back."""
    client = one_redis.client
    for name, bad, good, says in (
        ("appendonly", "no", "yes", r"appendonly no\): a crash would lose.*appendfsync always"),
        ("appendfsync", "everysec", "always", r"appendfsync everysec\): a crash would lose"),
        ("maxmemory-policy", "allkeys-lru", "noeviction", r"drops keys .*allkeys-lru.*Set .*noeviction"),
    ):
        client.config_set(name, bad)
        try:
            with pytest.raises(Mismatch, match=says):
                RedisJournal(one_redis.url)
        finally:
            client.config_set(name, good)
    client.config_set("maxmemory-policy", "volatile-lru")  # no key of a journal expires
    RedisJournal(one_redis.url).close()
    client.config_set("maxmemory-policy", "noeviction")


def test_passwords_and_users_who_may_not(one_redis):
    client = one_redis.client
    client.execute_command("ACL", "SETUSER", "app", "on", ">right", "~*", "+@all", "-config")
    with pytest.raises(NotSaved, match="refuses this user or password") as error:
        RedisJournal(f"redis://app:wrong@{one_redis.address}/0")
    assert "wrong@" not in str(error.value)
    with pytest.raises(Mismatch, match=r"does not say its appendfsync .*CONFIG GET"):
        RedisJournal(f"redis://app:right@{one_redis.address}/0")
    client.execute_command("ACL", "SETUSER", "app", "+config|get")
    with closing(RedisJournal(f"redis://app:right@{one_redis.address}/0")) as journal:
        assert "right" not in journal.name
        assert written(journal, event(1)) == (1, 0)
    client.execute_command("ACL", "DELUSER", "app")


def test_a_replica_takes_no_events(one_redis, mortal):
    running(mortal)
    mortal.client.replicaof("127.0.0.1", one_redis.port)
    try:
        with pytest.raises(NotSaved, match=rf"is a replica of 127\.0\.0\.1:{one_redis.port}.*its master"):
            RedisJournal(mortal.url)
    finally:
        mortal.client.replicaof("NO", "ONE")


def test_without_memory_events_are_refused_whole_and_reads_go_on(one_redis):
    with closing(RedisJournal(one_redis.url)) as journal:
        written(journal, event(1))
        one_redis.client.config_set("maxmemory", "1mb")
        try:
            said = journal.append([event(n, n) for n in range(50)]).exception(10)
            assert isinstance(said, Unavailable)
            assert "no memory is left for events. Compact them, or raise maxmemory" in str(said)
            assert journal.of(1)[0] == [event(1)]
            assert journal.trouble() is None
            assert journal.count() == 1
        finally:
            one_redis.client.config_set("maxmemory", "0")
        assert written(journal, event(2)) == (1, 0)


def test_a_node_without_its_slots(tmp_path: Path):
    with (
        redis_server(tmp_path, cluster_enabled="yes", cluster_port=str(free_port())) as alone,
        pytest.raises(Unavailable, match="slot 0 is on no node"),
    ):
        RedisJournal(cluster_url([alone]))


def test_a_cluster_that_is_none(one_redis):
    with pytest.raises(Unavailable, match="cluster support disabled"):
        RedisJournal(f"redis+cluster://{one_redis.address}")
