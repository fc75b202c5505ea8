"""The OpenAPI document: requests as FastAPI describes them, answers from the structs that are sent."""

from __future__ import annotations

from typing import Any

import msgspec
from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi

from longretriever.serve import wire

_AT = "#/components/schemas/{name}"
_WHY = {
    400: "The body is no text in UTF-8, or the host name is not that of this server.",
    401: "No API key, or one that is not known.",
    403: "The key may read only.",
    404: "No such user, item or category.",
    409: "What lies on the disk cannot be served.",
    413: "The body is too large.",
    422: "The request is not as expected, or names what is not there.",
    503: "Too many requests wait, or live events cannot be written now; see Retry-After.",
    504: "The request took longer than it may.",
}


def described(answer: type, *more: int) -> dict[str, Any]:
    """Arguments of a route that answers with a struct, and may fail as all do, and in `more` ways."""
    failures = {
        status: _responding(wire.Wrong, _WHY[status]) for status in (400, 401, 403, 413, 422, 503, 504, *more)
    }
    return {"response_model": None, "responses": {200: _responding(answer, "Done."), **failures}}


def _responding(answer: type, about: str) -> dict[str, Any]:
    schema = {"$ref": _AT.format(name=answer.__name__)}
    return {"description": about, "content": {"application/json": {"schema": schema}}}


def documented(app: FastAPI) -> dict[str, Any]:
    """The document, made once; ids and limits in it are those of this server."""
    if app.openapi_schema is None:
        document = get_openapi(
            title=app.title, version=app.version, description=app.description, routes=app.routes
        )
        schemas = document["components"]["schemas"]
        _, structs = msgspec.json.schema_components(wire.ANSWERS, ref_template=_AT)
        schemas.update(structs)
        for name in ("HTTPValidationError", "ValidationError"):
            schemas.pop(name, None)
        _limit(schemas, app.state.settings)
        app.openapi_schema = document
    return app.openapi_schema


def _limit(schemas: dict[str, Any], settings: Any) -> None:
    for name in ("RetrieveAsked", "BatchAsked"):
        schemas[name]["properties"]["k"]["maximum"] = settings.k
    schemas["BatchAsked"]["properties"]["user_ids"]["maxItems"] = settings.batch
    schemas["EventsSent"]["properties"]["events"]["maxItems"] = settings.events
