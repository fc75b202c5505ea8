"""The service: HTTP in, candidates out. What routes answer is made in `serving` and `inspection`."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from importlib.resources import files
from typing import Annotated, Any, Literal

import msgspec
from fastapi import Depends, FastAPI, HTTPException, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from starlette.exceptions import HTTPException as StarletteException
from starlette.middleware.cors import CORSMiddleware
from starlette.middleware.trustedhost import TrustedHostMiddleware

from longretriever.errors import (
    InputError,
    LongRetrieverError,
    Unavailable,
    UnknownCategory,
    UnknownItem,
    UnknownUser,
)
from longretriever.events import ITEM
from longretriever.saved import package_version
from longretriever.serve import inspection, metrics, wire
from longretriever.serve.current import Current
from longretriever.serve.door import Busy, Door, Keys, OutOfTime, Workroom
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
    app.state.settings = settings
    app.state.readers = Keys(settings.read_keys + settings.write_keys)
    app.state.writers = Keys(settings.write_keys)
    app.openapi = lambda: documented(app)  # type: ignore[method-assign]
    _route(app)
    _page(app)
    for kind, handler in _ERRORS.items():
        app.add_exception_handler(kind, handler)
    if settings.cors:
        app.add_middleware(
            CORSMiddleware, allow_origins=settings.cors, allow_methods=["*"], allow_headers=["*"]
        )
    if not settings.needs_keys:  # else a page elsewhere could reach this through a name that points here
        app.add_middleware(
            TrustedHostMiddleware, allowed_hosts=["localhost", "127.0.0.1", "[::1]", "testserver"]
        )
    app.add_middleware(Door, body=settings.body)
    return app


@asynccontextmanager
async def _lifespan(app: FastAPI) -> AsyncIterator[None]:
    """Open what is served; at the end finish requests, then commit, then close."""
    settings: Settings = app.state.settings
    app.state.journal = await asyncio.to_thread(open_journal, settings.journal, at_once=False)
    app.state.current = await asyncio.to_thread(Current, settings.source, app.state.journal)
    app.state.work = Workroom(settings.threads, settings.queue, settings.seconds)
    watching = asyncio.create_task(app.state.current.watch(settings.watch)) if settings.watch else None
    serving = app.state.current.serving
    log.info("serving", extra={"facts": {"model": serving.name, "live": app.state.journal.name}})
    yield
    if watching:
        watching.cancel()
        with suppress(asyncio.CancelledError):
            await watching
    app.state.work.close()
    await asyncio.to_thread(app.state.journal.close)
    log.info("stopped")


# -- who may

_bearer = HTTPBearer(auto_error=False, description="Needed where the server has keys.")
_ASK = {"WWW-Authenticate": "Bearer"}
_Given = Annotated[HTTPAuthorizationCredentials | None, Depends(_bearer)]


async def _may_read(request: Request, given: _Given) -> None:
    _check_key(request, given, request.app.state.readers, "read")


async def _may_write(request: Request, given: _Given) -> None:
    _check_key(request, given, request.app.state.writers, "write")


def _check_key(
    request: Request, given: HTTPAuthorizationCredentials | None, keys: Keys, to: Literal["read", "write"]
) -> None:
    if not request.app.state.settings.needs_keys:
        return
    if given is None:
        raise HTTPException(
            401, "send an API key: Authorization: Bearer KEY.", {"WWW-Authenticate": "Bearer"}
        )
    if not keys.have(given.credentials):
        known = request.app.state.readers.have(given.credentials)
        detail = "this API key may read only." if known else "this API key is not known."
        raise HTTPException(403 if known else 401, detail, None if known else _ASK)


# -- answers


def _json(value: Any, status: int = 200) -> Response:
    return Response(msgspec.json.encode(value), status, media_type="application/json")


def _wrong(status: int, detail: str, errors: Any = None, headers: Any = None) -> Response:
    body = msgspec.json.encode(wire.Wrong(detail, errors))
    return Response(body, status, headers, "application/json")


def _invalid(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    errors = [{"where": list(one["loc"]), "what": one["msg"]} for one in error.errors()]
    first = errors[0]
    where = ".".join(map(str, first["where"]))
    more = f" (and {len(errors) - 1} more)" if len(errors) > 1 else ""
    return _wrong(422, f"{where}: {first['what']}{more}", errors)


def _unknown(request: Request, error: Exception) -> Response:
    return _wrong(404 if request.path_params else 422, str(error))


def _refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, StarletteException)
    return _wrong(error.status_code, str(error.detail), headers=error.headers)


def _said(error: Exception) -> str:
    """To who asks; where the server of live events is, and why it fails, stands in the log."""
    log.warning("not written", extra={"facts": {"why": str(error)}})
    return "live events cannot be read or written now; nothing was acknowledged. Send it again."


_ERRORS: dict[Any, Callable[[Request, Exception], Response]] = {
    RequestValidationError: _invalid,
    UnknownUser: _unknown,
    UnknownItem: _unknown,
    UnknownCategory: _unknown,
    InputError: lambda request, error: _wrong(422, str(error)),
    StarletteException: _refused,
    Unavailable: lambda request, error: _wrong(503, _said(error), headers={"Retry-After": "1"}),
    Busy: lambda request, error: _wrong(503, "too many requests wait.", headers={"Retry-After": "1"}),
    Exception: lambda request, error: _wrong(500, "this server failed; its log says how."),
    OutOfTime: lambda request, error: _wrong(504, "the request took longer than it may."),
}


# -- routes


def _route(app: FastAPI) -> None:
    reads, writes = [Depends(_may_read)], [Depends(_may_write)]
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
    answer = await request.app.state.work.short(_serving(request).retrieve, asked)
    for name, milliseconds in answer.timings.items():
        metrics.stage.labels(name).observe(milliseconds / 1e3)
    if answer.fallback:
        metrics.fallbacks.inc()
    metrics.without_live.inc(not answer.live)
    return _json(answer)


async def retrieve_batch(request: Request, asked: wire.BatchAsked) -> Response:
    """The same for several users at once."""
    settings = request.app.state.settings
    _limited("k", asked.k, settings.k)
    _limited("user_ids", len(asked.user_ids), settings.batch)
    found = await request.app.state.work.long(_serving(request).retrieve_many, asked)
    metrics.without_live.inc(sum(not answer.live for answer in found.answers))
    return _json(found)


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
    return _json(wire.EventsWritten(*written))


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
    return _json(await request.app.state.work.long(inspection.users, _serving(request), like, limit, seed))


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
    return _json(await request.app.state.work.long(inspection.life, serving, *of))


async def forget(request: Request, user_id: str) -> Response:
    """Forget a person: live events are deleted, the store's hidden, and dropped by the next compaction."""
    of = as_id(user_id, _serving(request).store.user_ids.values)
    deleted = await asyncio.wrap_future(request.app.state.journal.forget(of))
    return _json(wire.Forgotten(of, deleted))


async def similar(request: Request, item_id: str, k: Annotated[int, Query(ge=1, le=1_000)] = 20) -> Response:
    """Items of the same category whose vectors are nearest."""
    serving = _serving(request)
    of = as_id(item_id, serving.model.items[ITEM])
    return _json(await request.app.state.work.long(inspection.similar, serving, of, k))


async def items(
    request: Request, like: _Like = None, category_id: str | None = None, limit: _Limit = 20
) -> Response:
    """Items by the beginning of their id or a part of their title."""
    of = like, category_id, limit
    return _json(await request.app.state.work.long(inspection.items, _serving(request), *of))


async def categories(request: Request, like: _Like = None, limit: _Limit = 100) -> Response:
    """Categories, those of most items first."""
    return _json(await request.app.state.work.long(inspection.categories, _serving(request), like, limit))


async def model(request: Request) -> Response:
    """What is served, how ids are written, and the limits of requests."""
    limits = request.app.state.settings.limits
    return _json(await request.app.state.work.long(inspection.facts, _serving(request), limits))


async def reload(request: Request) -> Response:
    """Take over a newer model, index or store now. One that cannot be served is refused, the old one stays.

    The other workers of this machine follow within their `watch`.
    """
    current: Current = request.app.state.current
    try:
        changed = await current.reload()
    except (LongRetrieverError, OSError) as error:
        return _wrong(409, f"{current.serving.name} goes on: {error}")
    return _json(wire.Reloaded(current.serving.name, changed))


async def show_metrics(request: Request) -> Response:
    """Counts for Prometheus."""
    text = await asyncio.to_thread(metrics.exposition, _serving(request))
    return Response(text, media_type="text/plain; version=0.0.4")


async def healthz() -> dict[str, str]:
    """The process is there."""
    return {"status": "alive"}


async def readyz(request: Request) -> Response:
    """It answers requests: the model is open and the journal, if it is a file, can be read.

    Without its Redis it answers from the store alone, and `live` says so.
    """
    serving, journal = _serving(request), request.app.state.journal
    await asyncio.to_thread(journal.of_each, [0])
    return _json(wire.Ready("ready", serving.name, "unavailable" if journal.trouble() else "ok"))


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
