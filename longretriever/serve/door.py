"""What every request passes on its way in and out: its size, its name, its line in the log, its counts."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import logging
import os
import re
import time
from collections import deque
from collections.abc import Callable, Collection
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, TypeVar
from uuid import uuid4

import msgspec
from fastapi import HTTPException

from longretriever.serve import metrics

T = TypeVar("T")
log = logging.getLogger("longretriever.serve")

_NAME = re.compile(rb"[\w.-]{1,100}")
_QUIET = frozenset({"/healthz", "/readyz", "/metrics"})  # asked every few seconds by machines


class Door:
    """ASGI middleware: refuses bodies that are too large, names, counts and logs requests.

    The log has no user ids: of the path only its pattern is written.
    """

    def __init__(self, app: Any, body: int) -> None:
        self.app, self.body = app, body

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started, status = time.perf_counter(), 500
        headers = dict(scope["headers"])
        given = headers.get(b"x-request-id", b"")
        name = given if _NAME.fullmatch(given) else uuid4().hex.encode()

        async def answer(message: Any) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", ()), (b"x-request-id", name), *_SAFE]
            await send(message)

        try:
            declared = headers.get(b"content-length", b"0")
            if declared.isdigit() and int(declared) > self.body:
                await _refuse(
                    answer, 413, f"the body has {int(declared):,} bytes, expected at most {self.body:,}."
                )
            else:
                await self.app(scope, _Measured(receive, self.body), answer)
        finally:
            self._count(scope, status, time.perf_counter() - started, name.decode())

    def _count(self, scope: Any, status: int, seconds: float, name: str) -> None:
        route = getattr(scope.get("route"), "path", "none")
        metrics.requests.labels(route, status).inc()
        metrics.latency.labels(route).observe(seconds)
        level = logging.DEBUG if route in _QUIET else logging.INFO
        if log.isEnabledFor(level):
            facts = {"request": name, "method": scope["method"], "route": route, "status": status}
            log.log(level, "request", extra={"facts": {**facts, "ms": round(1e3 * seconds, 2)}})


_SAFE = [(b"x-content-type-options", b"nosniff"), (b"referrer-policy", b"no-referrer")]


async def _refuse(send: Any, status: int, detail: str) -> None:
    headers = [(b"content-type", b"application/json"), (b"connection", b"close")]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": msgspec.json.encode({"detail": detail})})


class _Measured:
    """`receive` that counts, for bodies whose length nobody declares."""

    def __init__(self, receive: Any, most: int) -> None:
        self.receive, self.most, self.left = receive, most, most

    async def __call__(self) -> Any:
        message = await self.receive()
        self.left -= len(message.get("body", b""))
        if self.left < 0:
            raise HTTPException(413, f"the body is longer than {self.most:,} bytes.", {"Connection": "close"})
        return message


class Busy(Exception):
    """The queue is full."""


class OutOfTime(Exception):
    """The request took longer than it may."""


class Workroom:
    """Where requests are worked on, and wait for it in a queue of limited length.

    Short work is done one at a time on the event loop itself, between looks at the network: on a thread
    beside it, the two would fight for Python's lock, and each answer wait for it. Long work goes to threads,
    so that the loop stays free.
    """

    def __init__(self, threads: int, queue: int, seconds: float) -> None:
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="request")
        self._queue, self._seconds, self._room = queue, seconds, threads + queue
        self._waiting: deque[tuple[float, Callable[[], Any], asyncio.Future[Any]]] = deque()
        self._long = 0
        self._woken = asyncio.Event()
        self._worker = asyncio.create_task(self._work())

    async def short(self, work: Callable[..., T], *given: Any) -> T:
        """The result of `work(*given)`. Raises `Busy`, `OutOfTime`, and what the work raises."""
        if len(self._waiting) > self._queue:
            raise _busy()
        done: asyncio.Future[T] = asyncio.get_running_loop().create_future()
        self._waiting.append((time.monotonic() + self._seconds, partial(work, *given), done))
        self._woken.set()
        with metrics.waiting.track_inprogress():
            return await done

    async def _work(self) -> None:
        while True:
            await self._woken.wait()
            while self._waiting:
                _do(*self._waiting.popleft())
                await asyncio.sleep(0)  # to the network
            self._woken.clear()

    async def long(self, work: Callable[..., T], *given: Any) -> T:
        """The same on a thread."""
        if self._long >= self._room:
            raise _busy()
        loop = asyncio.get_running_loop()
        future = self._pool.submit(work, *given)
        self._long += 1
        future.add_done_callback(lambda _: loop.call_soon_threadsafe(self._leave))
        try:
            with metrics.waiting.track_inprogress():
                return await asyncio.wait_for(asyncio.wrap_future(future), self._seconds)
        except TimeoutError:
            metrics.refused.labels("time").inc()
            raise OutOfTime from None

    def _leave(self) -> None:
        """Work that ran out of time still holds its thread until it ends, so it counts until then."""
        self._long -= 1

    def close(self) -> None:
        self._worker.cancel()
        self._pool.shutdown(wait=True)


def _do(deadline: float, work: Callable[[], Any], done: asyncio.Future[Any]) -> None:
    if done.cancelled():
        return
    if time.monotonic() > deadline:
        metrics.refused.labels("time").inc()
        done.set_exception(OutOfTime())
        return
    try:
        done.set_result(work())
    except Exception as error:
        done.set_exception(error)


def _busy() -> Busy:
    metrics.refused.labels("queue").inc()
    return Busy()


class Keys:
    """API keys, kept as hashes and compared in constant time."""

    def __init__(self, keys: Collection[str]) -> None:
        self._hashes = [_hash(key) for key in keys]

    def have(self, key: str) -> bool:
        given = _hash(key)
        return sum(hmac.compare_digest(given, one) for one in self._hashes) > 0  # all of them, always


def _hash(key: str) -> bytes:
    return hashlib.sha256(key.encode(errors="surrogateescape")).digest()


class Lines(logging.Formatter):
    """One JSON object a line; `extra={"facts": {...}}` of a record goes into it."""

    def format(self, record: logging.LogRecord) -> str:
        said: dict[str, Any] = {
            "time": self.formatTime(record, "%Y-%m-%dT%H:%M:%S%z"),
            "level": record.levelname.lower(),
            "worker": os.getpid(),
            "what": record.getMessage(),
            **getattr(record, "facts", {}),
        }
        if record.exc_info:
            said["error"] = self.formatException(record.exc_info)
        return msgspec.json.encode(said).decode()


class Text(logging.Formatter):
    """The same for people."""

    def format(self, record: logging.LogRecord) -> str:
        facts = " ".join(f"{name}={value}" for name, value in getattr(record, "facts", {}).items())
        when = self.formatTime(record, "%H:%M:%S")
        line = f"{when} {record.levelname.lower():7} {record.getMessage()} {facts}"
        return f"{line}\n{self.formatException(record.exc_info)}" if record.exc_info else line
