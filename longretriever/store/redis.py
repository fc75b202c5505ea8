"""The same journal for many servers on many machines: in Redis, sharded by user, in one server or a cluster.

Every user belongs to one of 256 buckets, and all keys of a bucket share a hash tag, so that they lie in one
slot and one script can change them at once. Redis runs scripts one at a time: that is the lock, and with
`appendfsync always` an answer means that the change is on the disk.

    longretriever:{17}:facts     hash: the journal's id; `last`, the newest number; `deleted`
    longretriever:{17}:log       sorted set: number -> "number:user", of every row
    longretriever:{17}:marks     the same of marks alone
    longretriever:{17}:e:i7      sorted set: number -> event of user 7; an empty member is his mark
    longretriever:{17}:s:i7      hash: what of him counts as known (digests), and its number
    longretriever:about, :kinds  hash, set: format and id; hashes of the kinds of behavior

Compaction wants one number, `upto`, that parts what it takes from what comes later. A counter for all would
be one hot key, and a cluster has no order across slots. So numbers are microseconds of the clock of whichever
server writes, raised to be ascending in each bucket, and `last` is a fence: it takes the highest number T of
all buckets and raises the `last` of each to T, after which no bucket gives a number up to T any more. Rows up
to T are then a fixed set, whatever the clocks of the servers say; and where a server has lost its newest rows
(a copy put back, a replica promoted too early), later numbers are still later ones, as long as its clock is.

All or none: on one server the events of a call are written by one script, at once. On a cluster, by one
script for each bucket: a call that fails part-way has written the events of some users and of others none,
and says that it failed. Sent again it is whole: what was written is known, and counts as duplicate.

An `event_id` is known within its user here, since other users are elsewhere. A kind of behavior is counted
before the events that name it: of a call that fails, it may stay counted.

Requests do not wait for a server that is gone: whoever finds it so marks it, all others are told at once, and
a thread looks every half a second whether it is back, and whole. The same thread remembers who is forgotten,
so that these stay hidden meanwhile.
"""

from __future__ import annotations

import logging
import queue
import re
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import lru_cache
from hashlib import blake2b, sha1
from typing import Any
from urllib.parse import urlsplit
from uuid import uuid4
from zlib import crc32

import msgspec

from longretriever.errors import Damaged, InputError, Mismatch, MissingExtra, NotSaved, Unavailable
from longretriever.events import MOST_KINDS
from longretriever.store.behaviors import Store
from longretriever.store.live import Event, Since, Written, check_event, in_batches, too_many_kinds

try:
    import redis
    from redis.backoff import NoBackoff
    from redis.crc import key_slot
    from redis.retry import Retry
except ImportError as error:
    raise MissingExtra(
        "live events in Redis need the client: pip install 'longretriever[redis]', or pass --live FILE."
    ) from error

FORMAT = 1
BUCKETS = 256
SECONDS = 0.25  # that an answer may take: to a read, and to a connection
WRITE_SECONDS = 2.0  # and to a write, which waits for a disk
_LOOK = 0.5  # seconds between looks at a server that is gone
_MARKS = 10.0  # and between looks for who is forgotten
_TOGETHER = 1_000  # calls that go out together at most
_PAGE = 1_000  # rows of an answer
_COMPACTS = "longretriever-compacts"  # the name of a connection
_ABOUT, _KINDS = "longretriever:about", "longretriever:kinds"
_LOST = "LOST"

log = logging.getLogger("longretriever.store")

_NEXT = """
local function next_of(facts)
  local t = redis.call('TIME')
  local last = tonumber(redis.call('HGET', facts, 'last') or 0)
  return math.max(last + 1, tonumber(t[1]) * 1000000 + tonumber(t[2]))
end
local function check(facts)
  if redis.call('HGET', facts, 'journal') ~= ARGV[1] then
    return redis.error_reply('LOST ' .. facts)
  end
end
"""
"""Numbers stay under 2^53, which is all that Lua and sorted sets count exactly, until the year 2255."""

_APPEND = (
    _NEXT
    + """
-- KEYS: facts and log of each bucket, then events and seen of each user
-- ARGV: journal, buckets; then of each event its bucket, user, user's name, event, identity, event_id or ''
local buckets, accepted = tonumber(ARGV[2]), 0
for b = 1, buckets do
  local wrong = check(KEYS[2 * b - 1])
  if wrong then return wrong end
end
local at = {}
for i = 3, #ARGV, 6 do
  local b, u = tonumber(ARGV[i]), tonumber(ARGV[i + 1])
  local events, seen = KEYS[2 * (buckets + u) - 1], KEYS[2 * (buckets + u)]
  local known, name = ARGV[i + 4], ARGV[i + 5]
  local there = redis.call('HMGET', seen, known, name)
  if not there[1] and not there[2] then
    at[b] = at[b] and at[b] + 1 or next_of(KEYS[2 * b - 1])
    local n = string.format('%.0f', at[b])
    redis.call('ZADD', events, n, ARGV[i + 3])
    if name == '' then redis.call('HSET', seen, known, n)
    else redis.call('HSET', seen, known, n, name, n) end
    redis.call('ZADD', KEYS[2 * b], n, n .. ':' .. ARGV[i + 2])
    accepted = accepted + 1
  end
end
for b, n in pairs(at) do
  redis.call('HSET', KEYS[2 * b - 1], 'last', string.format('%.0f', n))
end
return accepted
"""
)
_FORGET = (
    _NEXT
    + """
-- KEYS: facts, log, marks, events, seen; ARGV: journal, user's name
local wrong = check(KEYS[1])
if wrong then return wrong end
local deleted, rows = 0, redis.call('ZRANGE', KEYS[4], 0, -1, 'WITHSCORES')
for i = 1, #rows, 2 do
  if rows[i] ~= '' then
    redis.call('ZREM', KEYS[2], string.format('%.0f', tonumber(rows[i + 1])) .. ':' .. ARGV[2])
    deleted = deleted + 1
  end
end
redis.call('DEL', KEYS[4], KEYS[5])
local n = string.format('%.0f', next_of(KEYS[1]))
redis.call('ZADD', KEYS[4], n, '')
redis.call('ZADD', KEYS[2], n, n .. ':' .. ARGV[2])
redis.call('ZADD', KEYS[3], n, n .. ':' .. ARGV[2])
redis.call('HSET', KEYS[1], 'last', n)
return {deleted, tonumber(n)}
"""
)
_DELETE = (
    _NEXT
    + """
-- KEYS: facts, log, marks, events, seen; ARGV: journal, user's name, upto, numbers of rows that are his
local wrong = check(KEYS[1])
if wrong then return wrong end
local deleted, upto = 0, tonumber(ARGV[3])
local function gone(n)
  deleted = deleted + redis.call('ZREM', KEYS[2], n .. ':' .. ARGV[2])
  redis.call('ZREM', KEYS[3], n .. ':' .. ARGV[2])
end
for i = 4, #ARGV do gone(ARGV[i]) end
local rows = redis.call('ZRANGEBYSCORE', KEYS[4], '-inf', ARGV[3], 'WITHSCORES')
for i = 2, #rows, 2 do gone(string.format('%.0f', tonumber(rows[i]))) end
redis.call('ZREMRANGEBYSCORE', KEYS[4], '-inf', ARGV[3])
local seen = redis.call('HGETALL', KEYS[5])
for i = 1, #seen, 2 do
  if tonumber(seen[i + 1]) <= upto then redis.call('HDEL', KEYS[5], seen[i]) end
end
return deleted
"""
)
_RAISE = (
    _NEXT
    + """
-- KEYS: facts; ARGV: journal, field, at least
local wrong = check(KEYS[1])
if wrong then return wrong end
if tonumber(redis.call('HGET', KEYS[1], ARGV[2]) or 0) < tonumber(ARGV[3]) then
  redis.call('HSET', KEYS[1], ARGV[2], ARGV[3])
end
return 0
"""
)
_COUNT_KINDS = """
-- KEYS: kinds; ARGV: at most, how many are new, the new ones, those beside
local there = {}
local function add(k) if not there[k] then there[k] = true; return 1 end return 0 end
local n = 0
for _, k in ipairs(redis.call('SMEMBERS', KEYS[1])) do n = n + add(k) end
for i = 3, #ARGV do n = n + add(ARGV[i]) end
if n > tonumber(ARGV[1]) then return 0 end
for i = 3, 2 + tonumber(ARGV[2]) do redis.call('SADD', KEYS[1], ARGV[i]) end
return 1
"""

_EVENT = msgspec.msgpack.Encoder()
_DECODED = msgspec.msgpack.Decoder(list[Any])


class RedisJournal:
    """Live events in Redis: see `longretriever.store.live.LiveJournal` for what each method promises.

    One object a process; its methods may be called from any thread. What a future says is on the disk of the
    Redis that it went to. Reads take one round trip, for many users one to each node.
    """

    def __init__(self, url: str, *, at_once: bool = True) -> None:
        """Open the journal of `redis://host:port/0` or `redis+cluster://host:port,host:port`.

        One database holds one journal; an empty one is made into one. rediss:// is the same over TLS. With
        `at_once` false, a Redis that cannot be reached is waited for instead: until then all else raises
        `Unavailable`. Raises `InputError`, `Unavailable`, `NotSaved`, `Mismatch`, `Damaged`.
        """
        self._servers = _Servers(url)
        self.name = self._servers.name
        self._id: str | None = None
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._closing = threading.Lock()
        self._closed = threading.Event()
        self._kinds: set[str] = set()
        self._marked: dict[int | str, int] = {}  # users with a mark, and its number, as last seen
        self._floor = 0  # numbers that some store has, so that none up to here may come again
        self._why: str | None = None  # the journal is not open
        try:
            self._open(not at_once)
        except Unavailable as error:
            if at_once:
                self._servers.close()
                raise
            self._why = str(error)
        except Exception:
            self._servers.close()
            raise
        self._threads = [threading.Thread(target=one, daemon=True) for one in (self._write, self._watch)]
        for thread in self._threads:
            thread.start()

    @property
    def id(self) -> str:
        if self._id is None:
            raise Unavailable(self.trouble() or f"{self.name} is being opened.")
        return self._id

    @property
    def round_trips(self) -> int:
        """To all nodes so far, of whatever was asked."""
        return sum(node.round_trips for node in self._servers.all())

    def close(self) -> None:
        """Finish what was asked for, then close the connections."""
        with self._closing:
            if self._closed.is_set():
                return
            self._closed.set()
            self._jobs.put(None)
            self._servers.woken.set()
        for thread in self._threads:
            thread.join()
        self._servers.close()

    def trouble(self) -> str | None:
        """Why some or all live events cannot be had now; None if they can. Asks nobody."""
        down = next((node.down for node in self._servers.holding if node.down), None)
        return down or self._why

    # -- opening

    def _open(self, partly: bool = False) -> None:
        """Find the servers, check that they keep what they are told, make or check the journal.

        `partly`: nodes of a cluster that are gone are left for later.
        """
        self._servers.find()
        for node in self._servers.holding:
            try:
                _check_node(node)
            except Unavailable:
                if not partly:
                    raise
        made = self._id or self._made()
        self._check_buckets(made, range(BUCKETS), partly)
        self._id, self._why = made, None
        self._remember_marks()

    def _made(self) -> str:
        (about,) = self._ask([_Ask(_ABOUT, ("HGETALL", _ABOUT))])
        found = {k.decode(): v.decode(errors="replace") for k, v in _pairs(about)}
        if not found:
            self._check_empty()
            found = self._create()
        if found.get("format") != str(FORMAT):
            raise Mismatch(
                f"{self.name} holds live events in format {found.get('format')}, this version reads format "
                f"{FORMAT}. Choose another database."
            )
        if found.get("state") != "ready":
            found = self._create()
        return found["journal"]

    def _check_empty(self) -> None:
        for node in self._servers.holding:
            if node.told(node.reads.dbsize):
                some = node.told(lambda: node.reads.scan(count=10))[1]  # noqa: B023
                shown = ", ".join(sorted(key.decode(errors="replace") for key in some)[:3])
                raise NotSaved(
                    f"{self.name} holds other data (such as {shown}), no live events. Choose another "
                    "database."
                )

    def _create(self) -> dict[str, str]:
        """Others may be doing the same: whoever sets a field first has the say."""
        asked = {"format": str(FORMAT), "journal": uuid4().hex, "buckets": str(BUCKETS)}
        self._ask([_Ask(_ABOUT, ("HSETNX", _ABOUT, k, v)) for k, v in asked.items()], writes=True)
        (about,) = self._ask([_Ask(_ABOUT, ("HGETALL", _ABOUT))])
        found = {k.decode(): v.decode() for k, v in _pairs(about)}
        facts = [_key(b, "facts") for b in range(BUCKETS)]
        self._ask([_Ask(key, ("HSETNX", key, "journal", found["journal"])) for key in facts], writes=True)
        self._ask([_Ask(_ABOUT, ("HSET", _ABOUT, "state", "ready"))], writes=True)
        return {**found, "state": "ready"}

    def _check_buckets(self, journal: str, buckets: Iterable[int], partly: bool = False) -> None:
        """A server that came back without its data must not be taken for one where nothing has happened."""
        facts = [_key(b, "facts") for b in buckets]
        found = self._send([_Ask(key, ("HGET", key, "journal")) for key in facts])
        for key, told in zip(facts, found, strict=True):
            if isinstance(told, Unavailable) and partly:
                continue
            if isinstance(told, Exception):
                raise told
            if told != journal.encode():
                raise Damaged(_lost(self.name, key))

    # -- writing

    def append(self, events: Sequence[Event], beside: Iterable[str] = ()) -> Future[Written]:
        """See `LiveJournal.append`: on a cluster all or none of each bucket, and again without harm."""
        for event in events:
            check_event(event)
        asked = self._appending(events)
        new = {event.behavior for event in events} - self._kinds
        total = len(events)
        return self._put(_Job(asked, lambda found: Written(sum(found), total - sum(found)), new, {*beside}))

    def _appending(self, events: Sequence[Event]) -> list[_Ask]:
        """One script for all on one server, one for each bucket on a cluster."""
        parts: dict[int, list[tuple[int, Event]]] = {}
        for event in events:
            bucket = _bucket(event.user_id)
            parts.setdefault(bucket if self._servers.is_cluster else 0, []).append((bucket, event))
        return [self._script_of(part) for part in parts.values()]

    def _script_of(self, part: Sequence[tuple[int, Event]]) -> _Ask:
        buckets: dict[int, int] = {}
        users: dict[int | str, int] = {}
        for bucket, event in part:
            buckets.setdefault(bucket, len(buckets) + 1)
            users.setdefault(event.user_id, len(users) + 1)
        keys = [_key(b, what) for b in buckets for what in ("facts", "log")]
        keys += [_key(_bucket(user), what, user) for user in users for what in ("e", "s")]
        arguments: list[Any] = [len(buckets)]
        for bucket, event in part:
            known, name = _digests(event)
            packed = _EVENT.encode(event[1:])
            user = _name(event.user_id)
            arguments += [buckets[bucket], users[event.user_id], user, packed, known, name]
        return _Ask(keys[0], script=_APPEND, keys=tuple(keys), arguments=tuple(arguments))

    def forget(self, user_id: int | str) -> Future[int]:
        """See `LiveJournal.forget`. What was written to an append-only file goes with its next rewrite."""
        keys = _keys(user_id)
        ask = _Ask(keys[0], script=_FORGET, keys=keys, arguments=(_name(user_id),))

        def done(found: list[Any]) -> int:
            deleted, number = found[0]
            self._marked[user_id] = number
            return int(deleted)

        return self._put(_Job([ask], done))

    def delete_folded(self, upto: int, most: int = 10_000) -> Future[int]:
        """See `LiveJournal.delete_folded`; of each user met, all rows up to there at once. Waits for it."""
        done: Future[int] = Future()
        self._raise("deleted", upto)
        each = max(1, most // BUCKETS)
        pages = self._ask([_range(_key(b, "log"), "-inf", upto, each) for b in range(BUCKETS)])
        rows: dict[int | str, list[bytes]] = {}
        for member in (member for page in pages for member in page):
            n, _, user = member.partition(b":")
            rows.setdefault(_user(user), []).append(n)
        asked = []
        for user, numbers in rows.items():
            keys = _keys(user)
            arguments = (_name(user), upto, *numbers)
            asked.append(_Ask(keys[0], script=_DELETE, keys=keys, arguments=arguments))
        done.set_result(sum(int(n) for n in self._ask(asked, writes=True)))
        return done

    @property
    def waiting(self) -> int:
        """Calls that wait to go out."""
        return self._jobs.qsize()

    def _put(self, job: _Job) -> Future[Any]:
        with self._closing:
            if self._closed.is_set():
                raise InputError(f"{self.name} is closed.")
            self._jobs.put(job)
        return job.done

    def _write(self) -> None:
        for jobs in in_batches(self._jobs, _TOGETHER):
            self._commit(jobs)

    def _commit(self, jobs: Sequence[_Job]) -> None:
        """One pipeline for all, to each node; a job that fails takes none of the others with it."""
        jobs = [job for job in jobs if job.done.set_running_or_notify_cancel()]
        going = [job for job in jobs if self._tried(job, self._count_kinds)]
        try:
            found = iter(self._send([ask for job in going for ask in job.asked], writes=True))
            results = [[next(found) for _ in job.asked] for job in going]
        except Exception as error:
            results = [[error] for _ in going]
        for job, result in zip(going, results, strict=True):
            if self._tried(job, lambda job: job.finish(_all(result))):  # noqa: B023
                self._kinds |= job.kinds

    @staticmethod
    def _tried(job: _Job, work: Callable[[_Job], Any]) -> bool:
        try:
            work(job)
        except Exception as error:
            job.done.set_exception(error)
            return False
        return True

    def _count_kinds(self, job: _Job) -> None:
        new, beside = job.kinds - self._kinds, job.beside
        if not new:
            return
        arguments = (MOST_KINDS, len(new), *map(_hash, new), *map(_hash, beside))
        ask = _Ask(_KINDS, script=_COUNT_KINDS, keys=(_KINDS,), arguments=arguments, names_journal=False)
        if not self._ask([ask], writes=True)[0]:
            raise too_many_kinds(new - beside)

    # -- reading

    def of(self, user_id: int | str, after: int = 0) -> tuple[list[Event], bool]:
        """See `LiveJournal.of`. Raises `Unavailable`."""
        (found,) = self.of_each([user_id], after)
        if not found.is_all:
            raise Unavailable(self.trouble() or f"{self.name} cannot be reached now.")
        return found.events, found.forgotten

    def of_each(self, user_ids: Sequence[int | str], after: int = 0) -> list[Since]:
        """See `LiveJournal.of_each`. One round trip, or one to each node."""
        asked = []
        for user in user_ids:
            facts = _key(_bucket(user), "facts")
            events = _key(_bucket(user), "e", user)
            asked += [_Ask(facts, ("HGET", facts, "journal")), _range(events, f"({after}", "+inf")]
        found = iter(self._send(asked) if self._id else [None] * len(asked))
        return [self._since(user, after, next(found), next(found)) for user in user_ids]

    def _since(self, user: int | str, after: int, journal: Any, rows: Any) -> Since:
        if self._id is None or isinstance(journal, Unavailable) or isinstance(rows, Unavailable):
            return Since([], self._marked.get(user, 0) > after, False)
        for one in (journal, rows):
            if isinstance(one, Exception):
                raise one
        if journal != self._id.encode():
            raise Unavailable(_lost(self.name, _key(_bucket(user), "facts")))
        events = [Event(user, *_DECODED.decode(row)) for row in rows if row]
        return Since(sorted(events, key=lambda event: event.time), b"" in rows, True)

    def last(self) -> int:
        """A number that all rows there are at or below, and all later ones above. See above: a fence."""
        facts = [_key(b, "facts") for b in range(BUCKETS)]
        told = self._ask([_Ask(key, ("HGET", key, "last")) for key in facts])
        highest = max(int(n or 0) for n in told)
        self._raise("last", highest)
        return highest

    def _raise(self, fact: str, least: int) -> None:
        """Of each bucket, to at least this."""
        facts = [_key(b, "facts") for b in range(BUCKETS)]
        arguments = (fact, least)
        self._ask([_Ask(key, script=_RAISE, keys=(key,), arguments=arguments) for key in facts], writes=True)

    def count(self, after: int = 0) -> int:
        """Rows after number `after`. O(buckets)."""
        logs = [_key(b, "log") for b in range(BUCKETS)]
        return sum(self._ask([_Ask(key, ("ZCOUNT", key, f"({after}", "+inf")) for key in logs]))

    def forgotten(self, after: int, upto: int) -> list[int | str]:
        """See `LiveJournal.forgotten`."""
        found = self._ask([_range(_key(b, "marks"), f"({after}", upto) for b in range(BUCKETS)])
        return list(dict.fromkeys(_user(m.partition(b":")[2]) for page in found for m in page))

    def between(self, after: int, upto: int) -> Iterator[Event]:
        """See `LiveJournal.between`; bucket by bucket. Holds 1,000 rows."""
        for bucket in range(BUCKETS):
            low = f"({after}"
            while True:
                (page,) = self._ask([_range(_key(bucket, "log"), low, upto, _PAGE)])
                if not page:
                    break
                rows = [(n, _user(user)) for n, _, user in (member.partition(b":") for member in page)]
                asked = [_range(_key(bucket, "e", user), n, n) for n, user in rows]
                for (_, user), found in zip(rows, self._ask(asked), strict=True):
                    yield from (Event(user, *_DECODED.decode(row)) for row in found if row)
                low = f"({int(rows[-1][0])}"

    def folded_into(self, store: Store) -> int:
        """See `LiveJournal.folded_into`."""
        live = store.manifest.facts.get("live") or {}
        upto = int(live["upto"]) if live.get("journal") == self.id else 0
        if upto > self._floor:
            with suppress(Unavailable):  # then when it is back
                self._raise("last", upto)
            self._floor = upto
        return upto

    def deleted(self) -> int:
        """Up to which number `delete_folded` was asked to delete."""
        facts = [_key(b, "facts") for b in range(BUCKETS)]
        return max(int(n or 0) for n in self._ask([_Ask(k, ("HGET", k, "deleted")) for k in facts]))

    def check(self) -> None:
        """Ask every node whether it is whole, and every bucket for its journal. Raises `Damaged`."""
        self._open()

    @contextmanager
    def compacting(self) -> Iterator[None]:
        """The only one that compacts: a connection of that name, which ends with its process."""
        node = self._servers.of(_ABOUT)
        client = node.client(WRITE_SECONDS, single_connection_client=True)
        try:
            node.told(lambda: client.client_setname(_COMPACTS))
            if sum(one["name"] == _COMPACTS for one in node.told(client.client_list)) > 1:
                raise InputError(f"{self.name} is being compacted already. Wait for that to end.")
            yield
        finally:
            client.close()

    # -- asking

    def _ask(self, asked: Sequence[_Ask], writes: bool = False) -> list[Any]:
        """Answers in order. Raises the first that is an error."""
        return _all(self._send(asked, writes))

    def _send(self, asked: Sequence[_Ask], writes: bool = False) -> list[Any]:
        """Answers or errors in order: one pipeline to each node, all nodes at once."""
        found = self._servers.send([(ask.key, ask.words(self._id or "")) for ask in asked], writes)
        return [self._in_words(ask, one) for ask, one in zip(asked, found, strict=True)]

    def _in_words(self, ask: _Ask, found: Any) -> Any:
        if not isinstance(found, redis.ResponseError):
            return found
        said = str(found)
        if _LOST in said:
            return Unavailable(_lost(self.name, said.split()[-1]))
        if "WRONGTYPE" in said:
            return Damaged(f"{self.name}: {ask.key} is not as this package writes it ({said}).")
        return Unavailable(_hint(self.name, found))

    # -- watching

    def _watch(self) -> None:
        """Look after servers that are gone, and now and then for who is forgotten."""
        marks = time.monotonic()
        while not self._closed.is_set():
            self._servers.woken.wait(_LOOK if self.trouble() else _MARKS)
            self._servers.woken.clear()
            if not self._closed.is_set() and self.trouble():
                self._look()
                self._closed.wait(_LOOK if self.trouble() else 0)
            elif time.monotonic() - marks > _MARKS:
                marks = time.monotonic()
                with suppress(Unavailable):
                    self._remember_marks()

    def _look(self) -> None:
        """Take back what answers again and is whole."""
        with suppress(Unavailable):
            self._servers.find()
        for node in self._servers.holding:
            if node.down:
                self._take_back(node)
        if self._id is None:
            try:
                self._open(partly=True)
            except Exception as error:
                if str(error) != self._why:
                    log.warning("live events cannot be had", extra={"facts": {"why": str(error)}})
                self._why = str(error)

    def _take_back(self, node: _Node) -> None:
        """Ask from it again, or know better why not."""
        before = node.down
        try:
            _check_node(node)
            facts = [_key(b, "facts") for b in range(BUCKETS)]
            mine = [key for key in facts if self._servers.of(key) is node]
            found = node.ask([("HGET", key, "journal") for key in mine], False, anyway=True)
            for key, told in zip(mine, _all(found), strict=True):
                if self._id and told != self._id.encode():
                    raise Damaged(_lost(self.name, key))
        except Exception as error:
            node.down = str(error)
            if node.down != before:
                log.warning("live events cannot be had", extra={"facts": {"why": node.down}})
            return
        node.down = None
        log.info("live events again", extra={"facts": {"live": node.name}})
        if self._floor:
            with suppress(Unavailable):
                self._raise("last", self._floor)

    def _remember_marks(self) -> None:
        pages = self._send([_range(_key(b, "marks"), "-inf", "+inf") for b in range(BUCKETS)])
        members = [member for page in pages if not isinstance(page, Exception) for member in page]
        rows = (member.partition(b":") for member in members)
        self._marked |= {_user(user): int(n) for n, _, user in rows}


@dataclass
class _Job:
    """A call that waits to go out: what it asks, and what its answer is made of."""

    asked: list[_Ask]
    made: Callable[[list[Any]], Any]
    kinds: set[str] = field(default_factory=set)
    beside: set[str] = field(default_factory=set)
    done: Future[Any] = field(default_factory=Future)

    def finish(self, found: list[Any]) -> None:
        self.done.set_result(self.made(found))


@dataclass(frozen=True)
class _Ask:
    """A command or a script, and the key that says to which node it goes."""

    key: str
    command: tuple[Any, ...] = ()
    script: str = ""
    keys: tuple[str, ...] = ()
    arguments: tuple[Any, ...] = ()
    names_journal: bool = True

    def words(self, journal: str) -> tuple[Any, ...]:
        if not self.script:
            return self.command
        first = (journal,) if self.names_journal else ()
        return "EVAL", self.script, len(self.keys), *self.keys, *first, *self.arguments


# -- servers


class _Node:
    """One Redis, with two kinds of patience; `down` says why it is not asked now."""

    def __init__(self, url: str, name: str, woken: threading.Event) -> None:
        self.name = name
        self.down: str | None = None
        self.round_trips = 0
        self._url, self._woken = url, woken
        self.reads, self._writes = self.client(SECONDS), self.client(WRITE_SECONDS)

    def client(self, seconds: float, **options: Any) -> Any:
        again = Retry(
            NoBackoff(), 1, supported_errors=(redis.ConnectionError,)
        )  # an idle one that was closed
        return redis.Redis.from_url(
            self._url,
            socket_timeout=seconds,
            socket_connect_timeout=SECONDS,
            socket_keepalive=True,
            retry=again,
            **options,
        )

    def ask(self, commands: Sequence[tuple[Any, ...]], writes: bool, anyway: bool = False) -> list[Any]:
        """Answers or errors in order, in one round trip; an error for each where it is gone.

        `anyway`: also if it was gone just now.
        """
        if self.down and not anyway:
            return [Unavailable(self.down)] * len(commands)
        try:
            found = self._pipeline([_by_digest(words) for words in commands], writes)
            new = [i for i, one in enumerate(found) if isinstance(one, redis.exceptions.NoScriptError)]
            if new:  # scripts that this server has not seen since it started
                for i, one in zip(new, self._pipeline([commands[i] for i in new], writes), strict=True):
                    found[i] = one
        except (Unavailable, NotSaved) as error:
            return [Unavailable(str(error))] * len(commands)
        return found

    def _pipeline(self, commands: Sequence[tuple[Any, ...]], writes: bool) -> list[Any]:
        self.round_trips += 1
        with (self._writes if writes else self.reads).pipeline(transaction=False) as pipe:
            for words in commands:
                pipe.execute_command(*words)
            return list(self.told(lambda: pipe.execute(raise_on_error=False)))

    def told(self, work: Callable[[], Any]) -> Any:
        """What a server answers, and its silence in words. Raises `Unavailable`, `NotSaved`."""
        try:
            return work()
        except (redis.AuthenticationError, redis.exceptions.NoPermissionError) as error:
            self._gone(str(error))
            raise NotSaved(f"{self.name} refuses this user or password ({error}).") from error
        except (redis.ConnectionError, redis.TimeoutError) as error:
            raise Unavailable(self._gone(f"{self.name} cannot be reached ({error}).")) from error
        except redis.ResponseError as error:
            if "NOAUTH" in str(error) or "DB index" in str(error):
                raise NotSaved(f"{self.name} refuses what the address says ({error}).") from error
            raise Unavailable(_hint(self.name, error)) from error

    def _gone(self, why: str) -> str:
        if self.down is None:
            log.warning("live events cannot be had", extra={"facts": {"why": why}})
            self._woken.set()
        self.down = why
        return why

    def close(self) -> None:
        self.reads.close()
        self._writes.close()


class _Servers:
    """Which node has a key: the only one, or what a cluster says, asked again whenever it says otherwise."""

    def __init__(self, url: str) -> None:
        self._scheme, cluster, self._user, hosts, self._database = _parsed(url)
        self.is_cluster = bool(cluster)
        self.name = f"{self._scheme}{cluster}://{','.join(hosts)}{self._database}"
        self.woken = threading.Event()
        self._nodes: dict[str, _Node] = {}
        self.holding = [self._node(host) for host in hosts]  # those that have keys
        self._of_slot = [self.holding[0]] * 16_384
        self._pool = ThreadPoolExecutor(16, thread_name_prefix="redis")

    def _node(self, host: str) -> _Node:
        if host not in self._nodes:
            there = f"{host}{self._database}"
            url, name = f"{self._scheme}://{self._user}{there}", f"{self._scheme}://{there}"
            self._nodes[host] = _Node(url, name, self.woken)
        return self._nodes[host]

    def all(self) -> list[_Node]:
        return list(self._nodes.values())

    def of(self, key: str) -> _Node:
        return self._of_slot[key_slot(key.encode()) if self.is_cluster else 0]

    def find(self) -> None:
        """Ask any node of a cluster who has what. Raises the first error where none can say."""
        errors: list[Unavailable] = []
        for host, node in sorted(self._nodes.items(), key=lambda one: one[1].down is not None):
            if not self.is_cluster:
                return
            try:
                slots = node.told(lambda: node.reads.execute_command("CLUSTER SLOTS"))  # noqa: B023
            except Unavailable as error:
                errors.append(error)
            else:
                self._take(host.rpartition(":")[0], slots)
                return
        raise errors[0]

    def _take(self, asked: str, slots: Sequence[Sequence[Any]]) -> None:
        found: list[_Node | None] = [None] * 16_384
        for start, end, (host, port, *_), *_ in slots:
            there = f"{host.decode() if host else asked}:{port}"
            found[start : end + 1] = [self._node(there)] * (end + 1 - start)
        whole = [node for node in found if node is not None]
        if len(whole) < len(found):
            raise Unavailable(f"{self.name}: slot {found.index(None)} is on no node of this cluster.")
        self._of_slot, self.holding = whole, list(dict.fromkeys(whole))

    def send(self, commands: Sequence[tuple[str, tuple[Any, ...]]], writes: bool) -> list[Any]:
        """Answers or errors in order, to commands and the keys that say where they go."""
        results: list[Any] = [None] * len(commands)
        parts: dict[_Node, list[int]] = {}
        for i, (key, _) in enumerate(commands):
            parts.setdefault(self.of(key), []).append(i)

        def to(node: _Node, which: list[int]) -> None:
            for i, one in zip(which, node.ask([commands[i][1] for i in which], writes), strict=True):
                results[i] = one

        if len(parts) > 1:
            for waiting in [self._pool.submit(to, *part) for part in parts.items()]:
                waiting.result()
        elif parts:
            to(*next(iter(parts.items())))
        moved = [i for i, one in enumerate(results) if isinstance(one, redis.exceptions.AskError)]
        for i in moved:
            results[i] = self._followed(results[i], commands[i][1], writes)
        if moved:
            with suppress(Unavailable):
                self.find()
        return results

    def _followed(self, said: Any, command: tuple[Any, ...], writes: bool) -> Any:
        """Ask where a key has moved, or is moving, to."""
        asking = [] if isinstance(said, redis.exceptions.MovedError) else [("ASKING",)]
        return self._node(f"{said.host}:{said.port}").ask([*asking, command], writes)[-1]

    def close(self) -> None:
        self._pool.shutdown()
        for node in self.all():
            node.close()


def _parsed(url: str) -> tuple[str, str, str, list[str], str]:
    """Scheme, `+cluster` or nothing, credentials, hosts with ports, database."""
    wanted = "expected redis://[user:password@]host:port/0, rediss:// or redis+cluster://host:port,host:port"
    shown = re.sub(r"//[^@/]*@", "//", url)
    found = re.fullmatch(r"(rediss?)(\+cluster)?://([^@/?]*@)?([^@/?]+)(/\d*)?", url)
    if not found:
        raise InputError(f"{shown}: {wanted}.")
    scheme, cluster, user, hosts, database = (part or "" for part in found.groups())
    if cluster and database not in ("", "/", "/0"):
        raise InputError(f"{shown}: a cluster has database 0 only.")
    if "," in hosts and not cluster:
        raise InputError(f"{shown}: several hosts are those of a cluster: write {scheme}+cluster://.")
    return scheme, cluster, user, [_with_port(host, shown, wanted) for host in hosts.split(",")], database


def _with_port(host: str, shown: str, wanted: str) -> str:
    try:
        parts = urlsplit(f"//{host}")
        port = parts.port or 6379
    except ValueError as error:
        raise InputError(f"{shown}: {error}; {wanted}.") from None
    if not parts.hostname:
        raise InputError(f"{shown}: {host!r} is no host; {wanted}.")
    return f"[{parts.hostname}]:{port}" if ":" in parts.hostname else f"{parts.hostname}:{port}"


def _check_node(node: _Node) -> None:
    """Does this server keep what it is told? Promised is that what is acknowledged is on a disk."""
    found = node.told(node.reads.info)
    if found.get("loading"):
        raise Unavailable(f"{node.name} is still reading its data.")
    if found["role"] != "master":
        raise NotSaved(
            f"{node.name} is a replica of {found.get('master_host')}:{found.get('master_port')} and takes no "
            "events. Pass the address of its master."
        )
    if not found.get("aof_enabled"):
        raise Mismatch(
            f"{node.name} answers before anything is on the disk (appendonly no): a crash would lose events "
            "that were acknowledged. Set appendonly yes and appendfsync always."
        )
    synced = node.told(lambda: _said(node, "appendfsync"))
    if synced != "always":
        raise Mismatch(
            f"{node.name} answers before the disk has what it was told (appendfsync {synced}): a crash would "
            "lose events that were acknowledged. Set appendfsync always."
        )
    if str(found.get("maxmemory_policy")).startswith("allkeys"):
        raise Mismatch(
            f"{node.name} drops keys where memory runs short (maxmemory-policy {found['maxmemory_policy']}), "
            "and with them events. Set maxmemory-policy noeviction."
        )


def _said(node: _Node, name: str) -> str:
    try:
        return str(node.reads.config_get(name).get(name))
    except redis.ResponseError as error:
        raise Mismatch(
            f"{node.name} does not say its {name} ({error}), and so not when events are on the disk. Let "
            "this user run CONFIG GET."
        ) from error


_HINTS: dict[type[Exception], str] = {
    redis.exceptions.OutOfMemoryError: "no memory is left for events. Compact them, or raise maxmemory",
    redis.exceptions.ReadOnlyError: "it has become a replica, which takes no events",
    redis.exceptions.ClusterDownError: "a part of the cluster is gone",
    redis.exceptions.TryAgainError: "a part of the cluster is being moved. Try again",
}


def _hint(name: str, error: Exception) -> str:
    known = next((hint for kind, hint in _HINTS.items() if isinstance(error, kind)), None)
    return f"{name}: {known} ({error})" if known else f"{name}: {error}"


def _lost(name: str, key: str) -> str:
    return (
        f"{name} no longer holds these live events: {key} is gone, or of another journal. Did a server come "
        "back without its data? Restore its append-only file from a copy."
    )


# -- keys and rows


def _bucket(user_id: int | str) -> int:
    return crc32(_name(user_id)) % BUCKETS


def _name(user_id: int | str) -> bytes:
    """7 and "7" are two users."""
    return f"i{user_id}".encode() if isinstance(user_id, int) else f"s{user_id}".encode()


def _user(name: bytes) -> int | str:
    return int(name[1:]) if name[:1] == b"i" else name[1:].decode()


def _key(bucket: int, what: str, user_id: int | str | None = None) -> str:
    key = f"longretriever:{{{bucket}}}:{what}"
    return key if user_id is None else f"{key}:{_name(user_id).decode()}"


def _keys(user_id: int | str) -> tuple[str, ...]:
    bucket = _bucket(user_id)
    shared = tuple(_key(bucket, what) for what in ("facts", "log", "marks"))
    return *shared, _key(bucket, "e", user_id), _key(bucket, "s", user_id)


def _range(key: str, low: Any, high: Any, most: int | None = None) -> _Ask:
    limit = () if most is None else ("LIMIT", 0, most)
    return _Ask(key, ("ZRANGEBYSCORE", key, low, high, *limit))


def _digests(event: Event) -> tuple[bytes, bytes]:
    """What makes an event the same as another: item, time and kind; and its event_id, where it has one."""
    known = blake2b(_EVENT.encode((event.item_id, event.time, event.behavior)), digest_size=12).digest()
    if event.event_id is None:
        return known, b""
    return known, blake2b(event.event_id.encode(), digest_size=12, person=b"event_id").digest()


def _hash(kind: str) -> bytes:
    return blake2b(kind.encode(), digest_size=8).digest()


def _all(found: list[Any]) -> list[Any]:
    for one in found:
        if isinstance(one, Exception):
            raise one.with_traceback(None)  # raised for each job, it would grow a page each time
    return found


def _pairs(found: Any) -> list[tuple[bytes, bytes]]:
    """A hash, as a pipeline answers it."""
    return (
        list(found.items()) if isinstance(found, Mapping) else list(zip(found[::2], found[1::2], strict=True))
    )


def _by_digest(words: tuple[Any, ...]) -> tuple[Any, ...]:
    """A script by its SHA-1, by which servers remember it."""
    return ("EVALSHA", _sha(words[1]), *words[2:]) if words[0] == "EVAL" else words


@lru_cache
def _sha(script: str) -> str:
    return sha1(script.encode()).hexdigest()
