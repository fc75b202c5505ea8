"""Start the service: one process, or several workers on one port, which share the mapped files."""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
from pathlib import Path

import uvicorn

from longretriever.serve import fair
from longretriever.serve.settings import Settings

_GRACE = 30  # seconds for requests on their way, once it is told to stop


def run(settings: Settings) -> None:
    """Serve until SIGTERM or SIGINT; then take no new requests, finish those there are, commit."""
    from longretriever.serve.serving import Serving
    from longretriever.store.live import open_journal

    settings.to_environment()
    shared = Path(tempfile.mkdtemp(prefix="longretriever-workers-")) if settings.workers > 1 else None
    if shared:
        os.environ["PROMETHEUS_MULTIPROC_DIR"] = str(shared)
        fair.prepare(shared / "connections", settings.workers)
    journal = open_journal(settings.journal, at_once=False)
    try:
        Serving(settings.source, journal)  # what cannot be served is said here, in one line, not by a worker
    finally:
        journal.close()
    try:
        uvicorn.run(
            "longretriever.serve.run:worker",
            factory=True,
            host=settings.host,
            port=settings.port,
            workers=settings.workers,
            loop="longretriever.serve.fair:loop" if shared else "auto",
            timeout_graceful_shutdown=_GRACE,
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
    from longretriever.serve.door import Lines, Text

    settings = Settings.from_environment()
    handler = logging.StreamHandler()
    handler.setFormatter(Lines() if settings.log == "json" else Text())
    logging.basicConfig(level=logging.INFO, handlers=[handler], force=True)
    return create(settings)
