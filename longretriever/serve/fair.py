"""Workers on one port take connections in turn, so that none is busy while another has nothing to do.

A kernel gives a connection on a shared socket to whichever worker wakes first, often the same one many times
over; connections that last then leave cores idle. Here a worker that has more connections than another waits
a moment before it takes the next: `PATIENCE`, not for ever, so one that hangs or has died holds up nobody.

uvicorn runs on any event loop that it is given by name; `loop` is such a name. What workers tell each other
is a file of W rows, a process number and its number of connections, mapped by all of them.
"""

from __future__ import annotations

import asyncio
import fcntl
import logging
import os
import socket
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

TABLE = "LONGRETRIEVER_SERVE_CONNECTIONS"  # the file's path, in the environment
PATIENCE = 0.005  # seconds
_BREATH = 1.0  # seconds, where the system has no room for another connection

log = logging.getLogger(__name__)


def prepare(path: Path, workers: int) -> None:
    """Make the file for so many workers at a time, and name it in the environment of processes to come.

    A worker may be replaced while it still finishes its requests, so there is room for two of each.
    """
    np.zeros((2 * workers, 2), np.int64).tofile(path)
    os.environ[TABLE] = str(path)


class Seat:
    """One worker's row of the table."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """Take a row that nobody has, or one of a process that has ended."""
        self._table = np.memmap(path, np.int64, "r+").reshape(-1, 2)
        with open(path, "rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            free = [row for row, (pid, _) in enumerate(self._table) if not pid or not _runs(int(pid))]
            self._row = free[0] if free else None
            if free:
                self._table[free[0]] = os.getpid(), 0

    def has_more(self, connections: int) -> bool:
        """Say how many connections there are; whether some other worker has fewer."""
        if self._row is None:
            return False
        self._table[self._row, 1] = connections
        others = self._table[:, 0] != 0
        others[self._row] = False
        return bool((self._table[others, 1] < connections).any())

    def leave(self) -> None:
        if self._row is not None:
            self._table[self._row] = 0


def _runs(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


class Turns:
    """What accepts connections on a shared socket, one at a time."""

    def __init__(self, loop: asyncio.AbstractEventLoop, sock: socket.socket, protocol: Callable[[], Any]):
        self._loop, self._sock, self._protocol = loop, sock, protocol
        self._seat = Seat(os.environ[TABLE])
        self._open: list[asyncio.BaseTransport] = []
        self._starting: set[asyncio.Task[None]] = set()
        self._later: asyncio.TimerHandle | None = None
        self._sock.setblocking(False)
        self._listen()

    def _listen(self) -> None:
        self._later = None
        self._loop.add_reader(self._sock, self._look)

    def _look(self) -> None:
        """A connection waits."""
        self._open = [transport for transport in self._open if not transport.is_closing()]
        if self._seat.has_more(len(self._open) + len(self._starting)):
            self._pause(PATIENCE, self._waited)
        else:
            self._accept()

    def _waited(self) -> None:
        self._listen()
        self._accept()

    def _accept(self) -> None:
        try:
            connection, _ = self._sock.accept()
        except (BlockingIOError, ConnectionAbortedError):  # another was faster; it has gone again
            return
        except OSError as error:  # no more files may be open: asking at once again would keep a core busy
            log.warning("no connection taken: %s", error)
            self._pause(_BREATH, self._listen)
            return
        task = self._loop.create_task(self._start(connection))
        self._starting.add(task)
        task.add_done_callback(self._starting.discard)
        self._seat.has_more(len(self._open) + len(self._starting))

    def _pause(self, seconds: float, then: Callable[[], None]) -> None:
        self._loop.remove_reader(self._sock)
        self._later = self._loop.call_later(seconds, then)

    async def _start(self, connection: socket.socket) -> None:
        with suppress(OSError):
            transport, _ = await self._loop.connect_accepted_socket(self._protocol, connection)
            self._open.append(transport)

    def close(self) -> None:
        """Take no more connections; those there are stay."""
        if self._later is not None:
            self._later.cancel()
        self._loop.remove_reader(self._sock)
        self._seat.leave()

    async def wait_closed(self) -> None:
        await asyncio.gather(*self._starting)


def loop() -> asyncio.AbstractEventLoop:
    """An event loop whose servers on a given socket take turns with other processes."""
    return _Loop()


try:
    from uvloop import Loop as _Base
except ImportError:  # where there is none
    from asyncio import SelectorEventLoop as _Base  # type: ignore[assignment]


class _Loop(_Base):
    async def create_server(
        self,
        protocol_factory: Callable[[], Any],
        *given: Any,
        sock: socket.socket | None = None,
        **options: Any,
    ) -> Any:
        if sock is None:
            return await super().create_server(protocol_factory, *given, **options)
        sock.listen(options.get("backlog", 2048))
        return Turns(self, sock, protocol_factory)
