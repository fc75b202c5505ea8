"""The service of a shard: searches over its categories, for routers. Everything else a router does itself."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path

from fastapi import Depends, FastAPI, Request, Response

from longretriever.saved import package_version
from longretriever.serve import metrics
from longretriever.serve.current import Current
from longretriever.serve.door import Workroom
from longretriever.serve.front import as_json, guarded, may_read, may_write, reloaded
from longretriever.serve.settings import ShardSettings
from longretriever.shards import wire as internal
from longretriever.shards.held import Shard, signature

log = logging.getLogger("longretriever.serve")


def create(settings: ShardSettings) -> FastAPI:
    """The application of one worker."""
    app = FastAPI(
        title="LongRetriever shard", version=package_version(), openapi_url=None, lifespan=_lifespan
    )
    reads, writes = [Depends(may_read)], [Depends(may_write)]
    app.post(internal.SEARCH, dependencies=reads)(search)
    app.get(internal.FACTS, dependencies=reads)(facts)
    app.post("/v1/admin/reload", dependencies=writes)(reload)
    app.get("/metrics", dependencies=reads, response_class=Response)(show_metrics)
    for path, check in (("/healthz", healthz), ("/readyz", readyz)):
        app.api_route(path, methods=["GET", "HEAD"])(check)
    return guarded(app, settings)


@asynccontextmanager
async def _lifespan(app: FastAPI) -> AsyncIterator[None]:
    settings: ShardSettings = app.state.settings
    model = Path(settings.model)

    def opened(before: Shard | None) -> Shard:
        return Shard(model, settings.share, before)

    app.state.current = await asyncio.to_thread(Current, opened, lambda now: signature(model))
    app.state.work = Workroom(settings.threads, settings.queue, settings.seconds)
    watching = asyncio.create_task(app.state.current.watch(settings.watch)) if settings.watch else None
    shard = app.state.current.serving
    log.info("serving", extra={"facts": {"model": shard.name, "items": shard.items}})
    yield
    if watching:
        watching.cancel()
        with suppress(asyncio.CancelledError):
            await watching
    app.state.work.close()
    log.info("stopped")


def _shard(request: Request) -> Shard:
    return request.app.state.current.serving


async def search(request: Request) -> Response:
    """The nearest items of each context, and the sum over all of it; 409 for what is not held here."""
    body = await request.body()
    answer = await request.app.state.work.short(_answered, _shard(request), body)
    return Response(answer, media_type=internal.MEDIA_TYPE)


def _answered(shard: Shard, body: bytes) -> bytes:
    return internal.encoded(shard.search(internal.decoded(body, internal.Search)))


async def facts(request: Request) -> Response:
    """Which models and categories are held here."""
    return Response(internal.encoded(_shard(request).facts), media_type=internal.MEDIA_TYPE)


async def reload(request: Request) -> Response:
    """Take over a newer index now; the one before is still answered for."""
    return await reloaded(request.app.state.current)


async def show_metrics(request: Request) -> Response:
    """Counts for Prometheus."""
    text = await asyncio.to_thread(metrics.exposition_of_shard, _shard(request))
    return Response(text, media_type="text/plain; version=0.0.4")


async def healthz() -> dict[str, str]:
    """The process is there."""
    return {"status": "alive"}


async def readyz(request: Request) -> Response:
    """It answers searches."""
    return as_json({"status": "ready", "model": _shard(request).name})
