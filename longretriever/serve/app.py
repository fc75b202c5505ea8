"""The service: HTTP in, candidates out. What routes answer is made in `serving` and `inspection`."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from importlib.resources import files
from typing import Annotated

from fastapi import Depends, FastAPI, HTTPException, Query, Request, Response
from starlette.middleware.cors import CORSMiddleware

from longretriever.errors import InputError
from longretriever.events import ITEM
from longretriever.saved import package_version
from longretriever.serve import inspection, metrics, wire
from longretriever.serve.current import Current
from longretriever.serve.door import Busy, Workroom
from longretriever.serve.front import as_json, guarded, may_read, may_write, reloaded, wrong
from longretriever.serve.openapi import described, documented
from longretriever.serve.serving import Serving, as_id
from longretriever.serve.settings import Settings
from longretriever.store.live import LiveJournal, open_journal

log = logging.getLogger("longretriever.serve")

PAGE_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_TYPES = {"html": "text/html", "css": "text/css", "js": "text/javascript", "svg": "image/svg+xml"}


def create(settings: Settings | None = None) -> FastAPI:
    """The application of one worker; without settings, those that `longretriever serve` has left for it."""
    settings = settings or Settings.from_environment()
    app = FastAPI(
        title="LongRetriever",
        version=package_version(),
        description="Candidates for each request out of a user's whole life of behaviors, with reasons.",
        docs_url=None,  # they would load scripts from other hosts
        redoc_url=None,
        lifespan=_lifespan,
    )
    app.openapi = lambda: documented(app)  # type: ignore[method-assign]
    _route(app)
    _page(app)
    if settings.cors:
        app.add_middleware(
            CORSMiddleware, allow_origins=settings.cors, allow_methods=["*"], allow_headers=["*"]
        )
    return guarded(app, settings)


@asynccontextmanager
async def _lifespan(app: FastAPI) -> AsyncIterator[None]:
    """Open what is served; at the end finish requests, then commit, then close."""
    settings: Settings = app.state.settings
    app.state.journal = await asyncio.to_thread(open_journal, settings.journal, at_once=False)
    app.state.fleet = await asyncio.to_thread(settings.fleet)
    source, journal = settings.source(app.state.fleet), app.state.journal

    def opened(before: Serving | None) -> Serving:
        return Serving(source, journal, before)

    app.state.current = await asyncio.to_thread(Current, opened, lambda now: source.signature(now.store.path))
    app.state.work = Workroom(settings.at_once, settings.queue, settings.seconds)
    # Where others search, a thread for each request waits for them; else see `Workroom`.
    app.state.retrieving = app.state.work.long if settings.is_remote else app.state.work.short
    watching = asyncio.create_task(app.state.current.watch(settings.watch)) if settings.watch else None
    serving = app.state.current.serving
    log.info("serving", extra={"facts": {"model": serving.name, "live": app.state.journal.name}})
    yield
    if watching:
        watching.cancel()
        with suppress(asyncio.CancelledError):
            await watching
    app.state.work.close()
    if app.state.fleet is not None:
        await asyncio.to_thread(app.state.fleet.close)
    await asyncio.to_thread(app.state.journal.close)
    log.info("stopped")


# -- routes


def _route(app: FastAPI) -> None:
    reads, writes = [Depends(may_read)], [Depends(may_write)]
    post, get = app.post, app.get
    post("/v1/retrieve", dependencies=reads, **described(wire.Answer))(retrieve)
    post("/v1/retrieve/batch", dependencies=reads, **described(wire.BatchAnswer))(retrieve_batch)
    post("/v1/events", dependencies=writes, **described(wire.EventsWritten))(events)
    get("/v1/users", dependencies=reads, **described(wire.UsersFound))(users)
    get("/v1/users/{user_id}", dependencies=reads, **described(wire.Life, 404))(user)
    app.delete("/v1/users/{user_id}", dependencies=writes, **described(wire.Forgotten))(forget)
    get("/v1/items/{item_id}/similar", dependencies=reads, **described(wire.Similar, 404))(similar)
    get("/v1/catalogue/items", dependencies=reads, **described(wire.ItemsFound))(items)
    get("/v1/catalogue/categories", dependencies=reads, **described(wire.CategoriesFound))(categories)
    get("/v1/model", dependencies=reads, **described(wire.ModelFacts))(model)
    post("/v1/admin/reload", dependencies=writes, **described(wire.Reloaded, 409))(reload)
    get("/metrics", dependencies=reads, response_class=Response)(show_metrics)
    get("/healthz")(healthz)
    get("/readyz", **described(wire.Ready))(readyz)
    for path, check in (("/healthz", healthz), ("/readyz", readyz)):  # some ask without wanting to read
        app.api_route(path, methods=["HEAD"], include_in_schema=False)(check)


def _serving(request: Request) -> Serving:
    return request.app.state.current.serving


def _limited(field: str, given: int, most: int) -> None:
    if given > most:
        raise InputError(f"{field}: {given:,}, expected at most {most:,} on this server.")


async def retrieve(request: Request, asked: wire.RetrieveAsked) -> Response:
    """Candidates for one user: his whole life up to now, the events of a moment ago included."""
    _limited("k", asked.k, request.app.state.settings.k)
    answer = await request.app.state.retrieving(_serving(request).retrieve, asked)
    for name, milliseconds in answer.timings.items():
        metrics.stage.labels(name).observe(milliseconds / 1e3)
    if answer.fallback:
        metrics.fallbacks.inc()
    _count_lacking([answer])
    return as_json(answer)


async def retrieve_batch(request: Request, asked: wire.BatchAsked) -> Response:
    """The same for several users at once."""
    settings = request.app.state.settings
    _limited("k", asked.k, settings.k)
    _limited("user_ids", len(asked.user_ids), settings.batch)
    found = await request.app.state.work.long(_serving(request).retrieve_many, asked)
    _count_lacking(found.answers)
    return as_json(found)


def _count_lacking(answers: Sequence[wire.Answer]) -> None:
    """Answers that lack live events, or contexts that could not be searched."""
    metrics.without_live.inc(sum(not answer.live for answer in answers))
    partial = [answer for answer in answers if answer.partial]
    metrics.partial.inc(len(partial))
    missing = {str(c.category_id) for answer in partial for c in answer.contexts if c.unsearched}
    if missing:  # None: of all items some
        log.warning("partial", extra={"facts": {"answers": len(partial), "categories": sorted(missing)}})


async def events(request: Request, sent: wire.EventsSent | wire.EventSent) -> Response:
    """Take note of behaviors: all of them or none; answered once they are on the disk."""
    journal: LiveJournal = request.app.state.journal
    settings = request.app.state.settings
    one_or_more = sent.events if isinstance(sent, wire.EventsSent) else [sent]
    _limited("events", len(one_or_more), settings.events)
    if journal.waiting > settings.queue:
        metrics.refused.labels("journal").inc()
        raise Busy
    serving = _serving(request)
    checked = await request.app.state.work.short(serving.events, one_or_more, time.time())
    written = await asyncio.wrap_future(journal.append(checked, serving.store.behaviors))
    metrics.events.labels("accepted").inc(written.accepted)
    metrics.events.labels("duplicate").inc(written.duplicates)
    return as_json(wire.EventsWritten(*written))


_Like = Annotated[
    str | None, Query(max_length=wire.TEXT, description="Beginning of an id, or part of a title.")
]
_Limit = Annotated[int, Query(ge=1, le=1_000)]


async def users(
    request: Request,
    like: _Like = None,
    limit: _Limit = 20,
    seed: Annotated[int, Query(ge=0, lt=1 << 53)] = 0,
) -> Response:
    """Users whose ids begin so; some drawn by `seed` where nothing is said."""
    return as_json(await request.app.state.work.long(inspection.users, _serving(request), like, limit, seed))


async def user(
    request: Request,
    user_id: str,
    now: Annotated[wire.Time | None, Query()] = None,
    spans: Annotated[int, Query(ge=1, le=500)] = 48,
    recent: Annotated[int, Query(ge=0, le=1_000)] = 20,
    categories: Annotated[int, Query(ge=1, le=1_000)] = 50,
) -> Response:
    """A user's life: by category over time, with the interest in each, and the newest behaviors."""
    serving = _serving(request)
    of = as_id(user_id, serving.store.user_ids.values), now, spans, recent, categories
    return as_json(await request.app.state.work.long(inspection.life, serving, *of))


async def forget(request: Request, user_id: str) -> Response:
    """Forget a person: live events are deleted, the store's hidden, and dropped by the next compaction."""
    of = as_id(user_id, _serving(request).store.user_ids.values)
    deleted = await asyncio.wrap_future(request.app.state.journal.forget(of))
    return as_json(wire.Forgotten(of, deleted))


async def similar(request: Request, item_id: str, k: Annotated[int, Query(ge=1, le=1_000)] = 20) -> Response:
    """Items of the same category whose vectors are nearest."""
    serving = _serving(request)
    of = as_id(item_id, serving.model.items[ITEM])
    return as_json(await request.app.state.work.long(inspection.similar, serving, of, k))


async def items(
    request: Request, like: _Like = None, category_id: str | None = None, limit: _Limit = 20
) -> Response:
    """Items by the beginning of their id or a part of their title."""
    of = like, category_id, limit
    return as_json(await request.app.state.work.long(inspection.items, _serving(request), *of))


async def categories(request: Request, like: _Like = None, limit: _Limit = 100) -> Response:
    """Categories, those of most items first."""
    return as_json(await request.app.state.work.long(inspection.categories, _serving(request), like, limit))


async def model(request: Request) -> Response:
    """What is served, how ids are written, and the limits of requests."""
    limits = request.app.state.settings.limits
    return as_json(await request.app.state.work.long(inspection.facts, _serving(request), limits))


async def reload(request: Request) -> Response:
    """Take over a newer model, index or store now. One that cannot be served is refused, the old one stays.

    The other workers of this machine follow within their `watch`.
    """
    return await reloaded(request.app.state.current)


async def show_metrics(request: Request) -> Response:
    """Counts for Prometheus."""
    text = await asyncio.to_thread(metrics.exposition, _serving(request), request.app.state.fleet)
    return Response(text, media_type="text/plain; version=0.0.4")


async def healthz() -> dict[str, str]:
    """The process is there."""
    return {"status": "alive"}


async def readyz(request: Request) -> Response:
    """It answers requests: the model is open, a journal that is a file can be read, some shard is up if any.

    Without its Redis it answers from the store alone, and `live` says so.
    """
    serving, journal, fleet = _serving(request), request.app.state.journal, request.app.state.fleet
    await asyncio.to_thread(journal.of_each, [0])
    if fleet is not None and not any(fleet.searchable(one).any() for one in serving.fingerprints):
        return wrong(503, f"no shard answers for {serving.name}.", headers={"Retry-After": "1"})
    return as_json(wire.Ready("ready", serving.name, "unavailable" if journal.trouble() else "ok"))


def _page(app: FastAPI) -> None:
    """The page and its parts, read once."""
    folder = files("longretriever.serve") / "page"
    parts = {file.name: file.read_bytes() for file in folder.iterdir() if file.name.split(".")[-1] in _TYPES}
    headers = {"Content-Security-Policy": PAGE_POLICY, "Cache-Control": "no-cache"}

    @app.api_route("/", methods=["GET", "HEAD"], include_in_schema=False)
    @app.get("/page/{name}", include_in_schema=False)
    async def page(name: str = "index.html") -> Response:
        if name not in parts:
            raise HTTPException(404, f"the page has no part {name!r}.")
        return Response(parts[name], 200, headers, _TYPES[name.split(".")[-1]])
