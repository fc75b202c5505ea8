"""A server in a process of its own, over a small model, asked as anybody would ask it."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx

from longretriever.market import Market, MarketConfig
from longretriever.model.config import EbrConfig, PginConfig, TrainConfig
from longretriever.retrieve.indexing import index_model
from longretriever.store.behaviors import Store
from longretriever.store.ingest import ingest

SMALL = TrainConfig(
    dim=16,
    layers=1,
    epochs=1,
    step_samples=2_000,
    whole=EbrConfig(dim=16, layers=1, epochs=1, step_samples=2_000, factors=2.0),
    interests=PginConfig(dim=16, epochs=1),
)


def made(path: Path, events: int = 8_000, seed: int = 0, config: TrainConfig = SMALL) -> Path:
    """log, store and model of a small market in this folder; returns the model's."""
    from longretriever.model.train import train

    Market(MarketConfig.of_size(events, seed=seed)).write(path / "log")
    log = {name: path / "log" / f"{name}.parquet" for name in ("events", "items", "users")}
    ingest(log["events"], path / "store", items=log["items"], users=log["users"])
    train(Store.open(path / "store"), path / "model", config, threads=1)
    index_model(path / "model")
    return path / "model"


def copied(made: Path, path: Path) -> Path:
    """A copy of what `made` returned, with the store beside it as `--store` wants."""
    shutil.copytree(made.parent / "store", path / "store")
    shutil.copytree(made, path / "model")
    return path / "model"


@dataclass
class Server:
    """A running server, and what a test wants to know of it."""

    url: str
    process: subprocess.Popen[str]
    log: Path
    live: Path
    user_id: int = 7

    def post(self, path: str, body: object, **options) -> httpx.Response:
        return httpx.post(f"{self.url}{path}", json=body, timeout=30, **options)

    def get(self, path: str, **options) -> httpx.Response:
        return httpx.get(f"{self.url}{path}", timeout=30, **options)

    def stop(self, how: int = signal.SIGTERM) -> int:
        if self.process.poll() is None:
            os.kill(self.process.pid, how)
        return self.process.wait(30)


def free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return int(taken.getsockname()[1])


@contextmanager
def serving(
    model: Path, folder: Path, *options: str, environment: dict[str, str] | None = None
) -> Iterator[Server]:
    """A server of this model until the block ends; its journal and log are in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    server = start(model, folder, *options, environment=environment)
    try:
        yield server
    finally:
        server.stop(signal.SIGTERM)


def start(model: Path, folder: Path, *options: str, environment: dict[str, str] | None = None) -> Server:
    port, log = free_port(), folder / "server.log"
    command = [sys.executable, "-m", "longretriever", "serve", str(model), "--port", str(port)]
    if "--clock" not in options:
        command += ["--clock", "log"]
    command += ["--live", str(folder / "live.sqlite"), *options]
    with log.open("a") as out:
        process = subprocess.Popen(
            command, stdout=out, stderr=out, text=True, env={**os.environ, **(environment or {})}
        )
    server = Server(f"http://127.0.0.1:{port}", process, log, folder / "live.sqlite")
    wait_until(lambda: _ready(server), what=lambda: log.read_text())
    if "--workers" in options:  # the first that is ready answers
        workers = int(options[options.index("--workers") + 1])
        wait_until(lambda: log.read_text().count('"serving"') >= workers)
    return server


def _ready(server: Server) -> bool:
    if server.process.poll() is not None:
        raise AssertionError(f"the server ended: {server.log.read_text()}")
    try:
        return server.get("/readyz").status_code == 200
    except httpx.TransportError:
        return False


def wait_until(true, seconds: float = 60, what=lambda: "it did not come true") -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, what()
        time.sleep(0.02)


def refused_to_start(model: Path, options: Sequence[str]) -> str:
    """What a server says that does not start."""
    command = [sys.executable, "-m", "longretriever", "serve", str(model), *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode != 0
    return " ".join(done.stderr.split())
