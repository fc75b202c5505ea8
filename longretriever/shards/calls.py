"""How several servers are asked at once from one thread, each within its time, and who is not asked any more.

Requests are all sent before the first answer is read, over connections that stay open: no thread is started
and no event loop entered. A call has the servers that can answer it, in the order in which they are tried:
the next when one fails, or has not answered for some time (hedging: the first answer counts). Who fails
repeatedly is left alone (a circuit breaker), longer each time, until a look at it from elsewhere succeeds.
"""

from __future__ import annotations

import logging
import selectors
import socket
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from http.client import HTTPConnection, HTTPException, HTTPSConnection
from threading import Lock
from typing import NamedTuple
from urllib.parse import urlsplit

from longretriever.errors import InputError

log = logging.getLogger("longretriever.shards")

FAILURES = 3  # in a row, after which a server is not asked; a refused connection counts as all of them
WAITS = 1.0, 30.0  # seconds before it is asked again: at first, at most; doubled from one time to the next
CONNECT = 0.1  # seconds for a connection at most
IDLE = 30.0  # seconds after which an unused connection is not trusted

Told = Callable[[str, str, float], None]
"""Is told of every try: the server's URL, how it went, and how many seconds it took."""


class Server:
    """One address: its idle connections, and whether it is asked. Safe to share between threads."""

    def __init__(self, url: str, key: str | None = None) -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.path.strip("/"):
            raise InputError(f"{url!r} is no address of a shard, expected one such as http://10.0.0.1:8100.")
        self.url = url.rstrip("/")
        self._make = HTTPSConnection if parts.scheme == "https" else HTTPConnection
        self._address = parts.hostname, parts.port
        self._headers = {"Authorization": f"Bearer {key}"} if key else {}
        self._idle: deque[tuple[float, HTTPConnection]] = deque()
        self._lock = Lock()
        self.up, self._failures, self._wait, self._until = True, 0, 0.0, 0.0

    def send(self, method: str, path: str, body: bytes, seconds: float, fresh: bool = False) -> Sent:
        """Raises `OSError` or `HTTPException`."""
        connection = None if fresh else self._taken()
        used = connection is not None
        if connection is None:
            connection = self._make(*self._address, timeout=min(CONNECT, seconds))
            connection.connect()
        connection.sock.settimeout(seconds)
        try:
            headers = {"Content-Type": "application/msgpack", **self._headers}
            connection.request(method, path, body, headers)
        except (OSError, HTTPException):
            connection.close()
            if used:
                return self.send(method, path, body, seconds, fresh=True)
            raise
        return Sent(self, connection, used)

    def _taken(self) -> HTTPConnection | None:
        """An idle connection that the server has not closed meanwhile."""
        while self._idle:
            try:
                since, connection = self._idle.pop()
            except IndexError:  # another thread was faster
                return None
            if time.monotonic() - since < IDLE and not _says_something(connection.sock):
                return connection
            connection.close()
        return None

    def keep(self, connection: HTTPConnection) -> None:
        self._idle.append((time.monotonic(), connection))

    def close(self) -> None:
        while self._idle:
            self._idle.pop()[1].close()

    # -- whether it is asked

    def is_due(self) -> bool:
        """Whether it may be looked at: it is asked, or has been left alone for long enough."""
        return self.up or time.monotonic() >= self._until

    def succeeded(self) -> None:
        """It has answered a search."""
        self._failures, self._wait = 0, 0.0

    def seen(self) -> None:
        """It has answered a look: it is asked again, and one failure more will end that, for longer."""
        with self._lock:
            if self.up:
                return
            self.up, self._failures = True, FAILURES - 1
        log.info("shard back", extra={"facts": {"shard": self.url}})

    def failed(self, why: str, refused: bool = False) -> None:
        with self._lock:
            self._failures += FAILURES if refused else 1
            if self._failures < FAILURES:
                return
            was_up, self.up = self.up, False
            if was_up:
                self._wait = min(WAITS[1], max(WAITS[0], 2 * self._wait))
            self._until = time.monotonic() + self._wait
        if was_up:
            self.close()
            log.warning("shard down", extra={"facts": {"shard": self.url, "why": why}})


class Sent(NamedTuple):
    """A request on its way."""

    server: Server
    connection: HTTPConnection
    used: bool  # whether the connection has carried others before: then it may have been closed meanwhile


@dataclass
class Call:
    """What is asked, and of whom: the first that answers does."""

    servers: Sequence[Server]
    body: bytes = b""


@dataclass
class Outcome:
    """The body of the answer, or why there is none."""

    body: bytes | None = None
    failures: list[str] = field(default_factory=list)


def ask(
    calls: Sequence[Call],
    path: str,
    *,
    seconds: float,
    hedge: float | None = None,
    method: str = "POST",
    told: Told = lambda url, how, seconds: None,
) -> list[Outcome]:
    """The outcomes in the order of the calls, after `seconds` at most (and `CONNECT` for new connections).

    `hedge` is after how many seconds without an answer the next server is asked as well.
    """
    asking = _Asking(calls, path, method, seconds, hedge, told)
    try:
        return asking.run()
    finally:
        asking.close()


class _Flight(NamedTuple):
    call: int
    sent: Sent
    since: float


class _Asking:
    def __init__(
        self,
        calls: Sequence[Call],
        path: str,
        method: str,
        seconds: float,
        hedge: float | None,
        told: Told,
    ) -> None:
        self._calls, self._path, self._method, self._told = calls, path, method, told
        self._seconds, self._hedge = seconds, hedge
        self._untried = [deque(call.servers) for call in calls]
        self._outcomes = [Outcome() for _ in calls]
        self._latest = [0.0] * len(calls)  # when each was last sent to somebody
        self._selector = selectors.DefaultSelector()

    def run(self) -> list[Outcome]:
        for call in range(len(self._calls)):
            self._launch(call)
        end = time.monotonic() + self._seconds
        while flights := self._flights():
            now = time.monotonic()
            if now >= end:
                self._give_up(flights, now)
                break
            for key, _ in self._selector.select(self._until(flights, end) - now):
                if key.fileobj in self._selector.get_map():  # else its call was answered a moment ago
                    self._read(key.data)
            self._hedged(time.monotonic())
        return self._outcomes

    def close(self) -> None:
        for flight in self._flights():
            flight.sent.connection.close()
        self._selector.close()

    def _flights(self) -> list[_Flight]:
        return [key.data for key in self._selector.get_map().values()]

    def _until(self, flights: list[_Flight], end: float) -> float:
        """When something is to be done even if nobody answers."""
        if self._hedge is None:
            return end
        hedges = [self._latest[f.call] + self._hedge for f in flights if self._untried[f.call]]
        return max(time.monotonic(), min([end, *hedges]))

    def _hedged(self, now: float) -> None:
        if self._hedge is None:
            return
        for call in {f.call for f in self._flights()}:
            if self._untried[call] and now - self._latest[call] >= self._hedge:
                self._launch(call)

    def _launch(self, call: int, fresh: bool = False) -> None:
        """Send it to the next server that takes it."""
        while self._untried[call]:
            server, since = self._untried[call].popleft(), time.monotonic()
            try:
                sent = server.send(self._method, self._path, self._calls[call].body, self._seconds, fresh)
            except (OSError, HTTPException) as error:
                self._failed(call, server, since, error, refused=True)
                continue
            self._latest[call] = since
            self._selector.register(sent.connection.sock, selectors.EVENT_READ, _Flight(call, sent, since))
            return

    def _read(self, flight: _Flight) -> None:
        server, connection, used = flight.sent
        self._selector.unregister(connection.sock)
        try:
            connection.sock.settimeout(max(0.001, flight.since + self._seconds - time.monotonic()))
            response = connection.getresponse()
            body = response.read()
        except (OSError, HTTPException) as error:
            connection.close()
            if used and isinstance(error, ConnectionError):  # closed while idle: says nothing of the server
                self._untried[flight.call].appendleft(server)
                self._launch(flight.call, fresh=True)
                return
            self._failed(flight.call, server, flight.since, error, isinstance(error, ConnectionError))
            self._launch(flight.call)
            return
        if response.will_close:
            connection.close()
        else:
            server.keep(connection)
        if response.status == 200:
            self._answered(flight, body)
            return
        self._refused(flight, response.status, body)
        self._launch(flight.call)

    def _answered(self, flight: _Flight, body: bytes) -> None:
        self._outcomes[flight.call].body = body
        self._untried[flight.call].clear()
        if self._method == "POST":
            flight.sent.server.succeeded()
        self._told(flight.sent.server.url, "answered", time.monotonic() - flight.since)
        for other in self._flights():
            if other.call == flight.call:  # a hedge; nobody waits for it
                self._selector.unregister(other.sent.connection.sock)
                other.sent.connection.close()
                self._told(other.sent.server.url, "late", time.monotonic() - other.since)

    def _refused(self, flight: _Flight, status: int, body: bytes) -> None:
        """It is there, but does not answer this. Not to have it, or no time, is no failure."""
        server, how = flight.sent.server, {409: "mismatch", 503: "busy"}.get(status, "failed")
        why = f"{server.url}: {status}, {body[:200].decode(errors='replace')}"
        self._outcomes[flight.call].failures.append(why)
        if how == "failed":
            server.failed(why)
        self._told(server.url, how, time.monotonic() - flight.since)

    def _failed(self, call: int, server: Server, since: float, error: Exception, refused: bool) -> None:
        why = f"{server.url}: {error or type(error).__name__}"
        self._outcomes[call].failures.append(why)
        server.failed(why, refused)
        self._told(server.url, "failed", time.monotonic() - since)

    def _give_up(self, flights: list[_Flight], now: float) -> None:
        for flight in flights:
            server = flight.sent.server
            why = f"{server.url}: no answer within {self._seconds:g} seconds"
            self._outcomes[flight.call].failures.append(why)
            server.failed(why)
            self._told(server.url, "timeout", now - flight.since)


def _says_something(sock: socket.socket) -> bool:
    """An idle connection on which something can be read has been closed by the other side."""
    with selectors.DefaultSelector() as selector:
        selector.register(sock, selectors.EVENT_READ)
        return bool(selector.select(0))
