"""Start the service: one process, or several workers on one port, which share the mapped files."""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import uvicorn

from longretriever.serve import fair
from longretriever.serve.settings import Listening, Settings, ShardSettings

_GRACE = 30  # seconds for requests on their way, once it is told to stop
_SHARD_KEEPS = 75  # seconds for which an unused connection of a router stays open: longer than it uses it


def run(settings: Settings) -> None:
    """Serve until SIGTERM or SIGINT; then take no new requests, finish those there are, commit."""
    _serve(settings, "longretriever.serve.run:worker", lambda: _check(settings))


def run_shard(settings: ShardSettings) -> None:
    """The same for a shard."""
    from longretriever.shards.held import Shard

    _serve(
        settings,
        "longretriever.serve.run:shard_worker",
        lambda: Shard(Path(settings.model), settings.share),
        keep_alive=_SHARD_KEEPS,
    )


def _check(settings: Settings) -> None:
    from longretriever.serve.serving import Serving
    from longretriever.store.live import open_journal

    journal, fleet = open_journal(settings.journal, at_once=False), settings.fleet()
    try:
        Serving(settings.source(fleet), journal)
    finally:
        journal.close()
        if fleet is not None:
            fleet.close()


def _serve(settings: Listening, worker: str, check: Callable[[], object], keep_alive: int = 5) -> None:
    settings.to_environment()
    shared = Path(tempfile.mkdtemp(prefix="longretriever-workers-")) if settings.workers > 1 else None
    if shared:
        os.environ["PROMETHEUS_MULTIPROC_DIR"] = str(shared)
        fair.prepare(shared / "connections", settings.workers)
    check()  # what cannot be served is said here, in one line, not by a worker
    try:
        uvicorn.run(
            worker,
            factory=True,
            host=settings.host,
            port=settings.port,
            workers=settings.workers,
            loop="longretriever.serve.fair:loop" if shared else "auto",
            timeout_graceful_shutdown=_GRACE,
            timeout_keep_alive=keep_alive,
            access_log=False,
            log_config=None,
            server_header=False,
        )
    finally:
        if shared:
            shutil.rmtree(shared, ignore_errors=True)


def worker() -> object:
    """The application of one process, which writes its log to stderr."""
    from longretriever.serve.app import create

    settings = Settings.from_environment()
    _log(settings)
    return create(settings)


def shard_worker() -> object:
    """The same of a shard."""
    import faiss

    from longretriever.serve.shard import create

    settings = ShardSettings.from_environment()
    _log(settings)
    faiss.omp_set_num_threads(1)  # workers and requests would compete
    return create(settings)


def _log(settings: Listening) -> None:
    from longretriever.serve.door import Lines, Text

    handler = logging.StreamHandler()
    handler.setFormatter(Lines() if settings.log == "json" else Text())
    logging.basicConfig(level=logging.INFO, handlers=[handler], force=True)
