"""What our services have in common: who may ask, and how it is said that something is wrong."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Annotated, Any, Literal

import msgspec
from fastapi import Depends, FastAPI, HTTPException, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from starlette.exceptions import HTTPException as StarletteException
from starlette.middleware.trustedhost import TrustedHostMiddleware

from longretriever.errors import (
    InputError,
    LongRetrieverError,
    NotLoaded,
    RequestFailed,
    Unavailable,
    UnknownCategory,
    UnknownItem,
    UnknownUser,
)
from longretriever.serve import wire
from longretriever.serve.current import Current
from longretriever.serve.door import Busy, Door, Keys, OutOfTime
from longretriever.serve.settings import Listening

log = logging.getLogger("longretriever.serve")


def guarded(app: FastAPI, settings: Listening) -> FastAPI:
    """With keys, errors that are said, and a door."""
    app.state.settings = settings
    app.state.readers = Keys(settings.read_keys + settings.write_keys)
    app.state.writers = Keys(settings.write_keys)
    for kind, handler in _ERRORS.items():
        app.add_exception_handler(kind, handler)
    if not settings.needs_keys:  # else a page elsewhere could reach this through a name that points here
        app.add_middleware(
            TrustedHostMiddleware, allowed_hosts=["localhost", "127.0.0.1", "[::1]", "testserver"]
        )
    app.add_middleware(Door, body=settings.body)
    return app


# -- who may

_bearer = HTTPBearer(auto_error=False, description="Needed where the server has keys.")
_ASK = {"WWW-Authenticate": "Bearer"}
_Given = Annotated[HTTPAuthorizationCredentials | None, Depends(_bearer)]


async def may_read(request: Request, given: _Given) -> None:
    _check_key(request, given, request.app.state.readers, "read")


async def may_write(request: Request, given: _Given) -> None:
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


def as_json(value: Any, status: int = 200) -> Response:
    return Response(msgspec.json.encode(value), status, media_type="application/json")


def wrong(status: int, detail: str, errors: Any = None, headers: Any = None) -> Response:
    body = msgspec.json.encode(wire.Wrong(detail, errors))
    return Response(body, status, headers, "application/json")


async def reloaded(current: Current[Any]) -> Response:
    """Whether something newer was taken over; 409 where it cannot be served, and what there was goes on."""
    try:
        changed = await current.reload()
    except (LongRetrieverError, OSError) as error:
        return wrong(409, f"{current.serving.name} goes on: {error}")
    return as_json(wire.Reloaded(current.serving.name, changed))


def _invalid(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    errors = [{"where": list(one["loc"]), "what": one["msg"]} for one in error.errors()]
    first = errors[0]
    where = ".".join(map(str, first["where"]))
    more = f" (and {len(errors) - 1} more)" if len(errors) > 1 else ""
    return wrong(422, f"{where}: {first['what']}{more}", errors)


def _unknown(request: Request, error: Exception) -> Response:
    return wrong(404 if request.path_params else 422, str(error))


def _refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, StarletteException)
    return wrong(error.status_code, str(error.detail), headers=error.headers)


def _said(error: Exception) -> str:
    """To who asks; where the server of live events is, and why it fails, stands in the log."""
    log.warning("not written", extra={"facts": {"why": str(error)}})
    return "live events cannot be read or written now; nothing was acknowledged. Send it again."


_ERRORS: dict[Any, Callable[[Request, Exception], Response]] = {
    RequestValidationError: _invalid,
    UnknownUser: _unknown,
    UnknownItem: _unknown,
    UnknownCategory: _unknown,
    InputError: lambda request, error: wrong(422, str(error)),
    StarletteException: _refused,
    Unavailable: lambda request, error: wrong(503, _said(error), headers={"Retry-After": "1"}),
    Busy: lambda request, error: wrong(503, "too many requests wait.", headers={"Retry-After": "1"}),
    NotLoaded: lambda request, error: wrong(409, str(error)),
    RequestFailed: lambda request, error: wrong(503, str(error), headers={"Retry-After": "1"}),
    Exception: lambda request, error: wrong(500, "this server failed; its log says how."),
    OutOfTime: lambda request, error: wrong(504, "the request took longer than it may."),
}
