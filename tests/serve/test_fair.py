"""Workers share connections out evenly, and one that has died or hangs holds up nobody."""

from __future__ import annotations

import asyncio
import errno
import json
import os
import signal
import socket
import subprocess
import sys
from collections import Counter
from contextlib import ExitStack

import httpx
import numpy as np
import psutil
import pytest

from longretriever.serve import fair
from longretriever.serve.fair import Seat, Turns
from tests.serve.running import Server, serving, wait_until


@pytest.fixture
def table(tmp_path, monkeypatch):
    monkeypatch.setenv(fair.TABLE, "")
    fair.prepare(tmp_path / "connections", 2)
    return tmp_path / "connections"


def ended() -> int:
    """The number of a process that is no more."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def others_have(table, *rows: tuple[int, int]) -> None:
    np.memmap(table, np.int64, "r+").reshape(-1, 2)[1 : 1 + len(rows)] = rows


def test_who_has_more_than_another_waits(table):
    seat = Seat(table)
    assert not seat.has_more(0)
    assert not seat.has_more(7), "nobody else is there"
    others_have(table, (1, 2))
    assert [seat.has_more(n) for n in (1, 2, 3)] == [False, False, True]
    others_have(table, (1, 2), (1, 1))
    assert [seat.has_more(n) for n in (1, 2)] == [False, True]
    seat.leave()
    assert np.memmap(table, np.int64)[:2].tolist() == [0, 0]


def test_the_row_of_a_process_that_has_ended_is_taken(table):
    others_have(table, (ended(), 5), (os.getpid(), 3))
    first, second = Seat(table), Seat(table)
    first.has_more(1)
    second.has_more(4)
    rows = np.memmap(table, np.int64).reshape(-1, 2)[:3].tolist()
    assert rows == [[os.getpid(), 1], [os.getpid(), 4], [os.getpid(), 3]]


def test_without_a_row_nobody_waits(table):
    others_have(table, (1, 0), (1, 0), (1, 0))
    Seat(table)
    assert not Seat(table).has_more(9)


def test_one_that_does_not_take_its_turn_is_waited_for_only_a_moment(table):
    """The other worker has no connection and never looks."""
    others_have(table, (1, 0))

    async def answers() -> list[bytes]:
        with socket.socket() as shared:
            shared.bind(("127.0.0.1", 0))
            shared.listen()
            turns = Turns(asyncio.get_running_loop(), shared, Hello)
            found = []
            for _ in range(5):
                reader, writer = await asyncio.open_connection(*shared.getsockname())
                found.append(await asyncio.wait_for(reader.read(), 5))
                writer.close()
            turns.close()
            await turns.wait_closed()
        return found

    assert asyncio.run(answers()) == [b"hello"] * 5


def test_without_room_for_more_files_it_waits_and_goes_on(table, monkeypatch, caplog):
    monkeypatch.setattr(fair, "_BREATH", 0.05)

    class Full(socket.socket):
        refused = 0

        def accept(self):
            if self.refused < 2:
                self.refused += 1
                raise OSError(errno.EMFILE, "Too many open files")
            return super().accept()

    async def answer() -> bytes:
        with Full() as shared:
            shared.bind(("127.0.0.1", 0))
            shared.listen()
            turns = Turns(asyncio.get_running_loop(), shared, Hello)
            reader, writer = await asyncio.open_connection(*shared.getsockname())
            found = await asyncio.wait_for(reader.read(), 5)
            writer.close()
            turns.close()
            return found

    assert asyncio.run(answer()) == b"hello"
    assert caplog.text.count("Too many open files") == 2, "not asked again and again"


class Hello(asyncio.Protocol):
    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        transport.write(b"hello")
        transport.close()


def test_connections_that_last_are_shared_out(model, tmp_path):
    with serving(model, tmp_path, "--workers", "3") as server, ExitStack() as stack:
        clients = [stack.enter_context(httpx.Client(base_url=server.url, timeout=30)) for _ in range(24)]
        for _ in range(2):
            for client in clients:
                assert client.post("/v1/retrieve", json={"user_id": 7}).status_code == 200
        wait_until(lambda: by_worker(server).total() == 48)
        asked = by_worker(server)
        assert min(asked.values()) >= 8, f"{asked}, 16 each were fair"


def test_a_killed_worker_is_replaced_and_nobody_waits_for_it(model, tmp_path):
    with serving(model, tmp_path, "--workers", "2") as server:
        before = workers_of(server)
        assert len(before) == 2
        os.kill(max(before), signal.SIGKILL)
        for _ in range(10):
            assert httpx.get(f"{server.url}/healthz", timeout=10).status_code == 200
        wait_until(lambda: len(workers_of(server) | before) == 3 and len(workers_of(server)) == 2)


def by_worker(server: Server) -> Counter[int]:
    """Requests of each, as the log has them."""
    lines = map(json.loads, server.log.read_text().splitlines())
    return Counter(line["worker"] for line in lines if line.get("route") == "/v1/retrieve")


def workers_of(server: Server) -> set[int]:
    return {one.pid for one in psutil.Process(server.process.pid).children() if _is_worker(one)}


def _is_worker(process: psutil.Process) -> bool:
    try:
        return any("spawn_main" in word for word in process.cmdline())
    except psutil.Error:  # it has just ended
        return False
