"""Redis servers of a test's own: on the loopback address, in a folder of the test, gone afterwards."""

from __future__ import annotations

import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.serve.running import free_port, wait_until

PROGRAM = shutil.which("redis-server")
KEEPS = {"appendonly": "yes", "appendfsync": "always"}


@dataclass
class RedisServer:
    """A running redis-server, or one that was stopped and can be started again on what it has written."""

    port: int
    folder: Path
    options: dict[str, str]
    process: subprocess.Popen[bytes] | None = None

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    @property
    def url(self) -> str:
        return f"redis://{self.address}/0"

    @property
    def client(self) -> Any:
        import redis

        return redis.Redis(port=self.port, password=self.options.get("requirepass"))

    def start(self) -> None:
        assert PROGRAM is not None
        given = {
            "port": str(self.port),
            "bind": "127.0.0.1",
            "dir": str(self.folder),
            "save": "",
            **self.options,
        }
        command = [PROGRAM, *(word for name, value in given.items() for word in (f"--{name}", value))]
        self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        wait_until(self._answers, 10)

    def _answers(self) -> bool:
        import redis

        try:
            return bool(self.client.ping())
        except redis.RedisError:
            return False

    def stop(self, how: int = signal.SIGKILL) -> None:
        if self.process is not None:
            self.process.send_signal(how)
            self.process.wait(10)
            self.process = None


@contextmanager
def redis_server(folder: Path, **options: str) -> Iterator[RedisServer]:
    """A server with these options, `_` for `-`, until the block ends. Skips the test where there is none."""
    pytest.importorskip("redis", reason="pip install 'longretriever[redis]'")
    if PROGRAM is None:
        pytest.skip("redis-server is not installed: apt-get install redis-server")
    folder.mkdir(parents=True, exist_ok=True)
    named = {name.replace("_", "-"): value for name, value in options.items()}
    server = RedisServer(free_port(), folder, {**KEEPS, **named})
    try:
        server.start()
        yield server
    finally:
        server.stop()


@contextmanager
def redis_cluster(folder: Path, masters: int = 3) -> Iterator[list[RedisServer]]:
    """As many masters that share the slots evenly, without replicas."""
    options = {
        "cluster_enabled": "yes",
        "cluster_require_full_coverage": "no",
        "cluster_node_timeout": "2000",
    }
    with ExitStack() as stack:
        nodes = [
            stack.enter_context(redis_server(folder / str(n), **options, cluster_port=str(free_port())))
            for n in range(masters)
        ]
        bounds = [16_384 * n // masters for n in range(masters + 1)]
        first = nodes[0]
        for n, node in enumerate(nodes):
            node.client.execute_command("CLUSTER ADDSLOTSRANGE", bounds[n], bounds[n + 1] - 1)
            node.client.execute_command("CLUSTER SET-CONFIG-EPOCH", n + 1)
            bus = int(node.options["cluster-port"])
            first.client.execute_command("CLUSTER MEET", "127.0.0.1", node.port, bus)
        wait_until(lambda: all(_knows_all(node, masters) for node in nodes), 20)
        yield nodes


def _knows_all(node: RedisServer, masters: int) -> bool:
    said = node.client.execute_command("CLUSTER INFO")
    return said["cluster_state"] == "ok" and int(said["cluster_known_nodes"]) == masters


def cluster_url(nodes: list[RedisServer]) -> str:
    return f"redis+cluster://{','.join(node.address for node in nodes)}"


def emptied(nodes: list[RedisServer]) -> None:
    for node in nodes:
        node.client.flushall()


def paused(node: RedisServer) -> None:
    """As a machine that no longer answers: connections stay, nothing comes."""
    assert node.process is not None
    node.process.send_signal(signal.SIGSTOP)
    time.sleep(0.05)
