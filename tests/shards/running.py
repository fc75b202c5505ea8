"""Shards in threads of the test, on free ports of the loopback address: they start in milliseconds."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import httpx
import uvicorn

from longretriever.serve.settings import ShardSettings
from longretriever.serve.shard import create
from longretriever.shards.held import Share
from tests.serve.running import free_port, wait_until


class Running:
    """A shard that can be stopped and started again at the same address."""

    def __init__(self, model: Path, share: Share, **settings) -> None:
        self.settings = ShardSettings(str(model), share, port=free_port(), watch=0, **settings)
        self.url = f"http://127.0.0.1:{self.settings.port}"
        self.stop_it: Callable[[], None] = lambda: None

    def start(self) -> Running:
        self.app = create(self.settings)
        config = uvicorn.Config(self.app, port=self.settings.port, log_config=None, timeout_keep_alive=75)
        server = uvicorn.Server(config)
        server.install_signal_handlers = lambda: None  # type: ignore[attr-defined,method-assign]
        thread = threading.Thread(target=server.run, daemon=True)
        thread.start()
        wait_until(lambda: server.started)

        def stop() -> None:
            server.should_exit = server.force_exit = True  # as a kill: connections break
            thread.join(10)
            assert not thread.is_alive()

        self.stop_it = stop
        return self

    def reload(self) -> None:
        assert httpx.post(f"{self.url}/v1/admin/reload").json()["changed"]

    def stop(self) -> None:
        self.stop_it()
        self.stop_it = lambda: None


@contextmanager
def shards(model: Path, *shares: Share, **settings) -> Iterator[list[Running]]:
    with ExitStack() as stack:
        running = [Running(model, share, **settings) for share in shares]
        for one in running:
            stack.callback(one.stop)
            one.start()
        yield running


def nth(i: int, n: int) -> Share:
    return Share(shard=(i, n))


def wait_for(true: Callable[[], object], seconds: float = 10) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it did not come true"
        time.sleep(0.01)
