"""The HTTP interface: builds the ASGI application around a service."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI, Request
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.routing import Route

from app import __version__
from app.api.body_room import BodyRoom
from app.api.card import Card
from app.api.dialects.routes import DialectRoutes
from app.api.dialects.table import DIALECTS, PATHS
from app.api.middleware import COUNTED_ROUTES, PUBLIC_PATHS, Envelope, exchange_of, refuse
from app.api.pages import read_pages
from app.api.routes import ERRORS, Routes
from app.api.runs import RunRoutes
from app.api.schemas import CompareRequest, RankRequest, ScoreRequest, json_schema
from app.errors import ApiError, MethodNotAllowed, NotFound, RequestError
from app.metrics import Metrics
from app.settings import Settings


def create_app(settings: Settings, card: Card, metrics: Metrics) -> FastAPI:
    """The application around the models of a card; opening and closing what it uses is the caller's business."""
    app = FastAPI(
        title="Punchline",
        version=__version__,
        description="Preference scores for captions.",
        docs_url=None,  # its viewer comes from a CDN; /docs is a page of our own
        redoc_url=None,
        redirect_slashes=False,
        lifespan=_with_schema,
    )
    pages = [page.route() for page in read_pages()]
    app.router.routes.extend(pages)
    routers = [
        Routes(settings, card).router(),
        DialectRoutes(settings, card.models, ERRORS).router(),
        RunRoutes(card.models.first.service.monitors.runs).router(),
    ]
    paths = frozenset(route.path for part in (app.router, *routers) for route in part.routes if isinstance(route, Route))
    for router in routers:
        app.include_router(router)
    app.add_middleware(
        Envelope,
        fingerprint=card.models.first.fingerprint,
        api_keys=settings.api_keys,
        metrics=metrics,
        paths=paths,
        is_draining=card.is_draining,
        room=BodyRoom(settings.max_pending_body_bytes, metrics),
        counted=COUNTED_ROUTES | PATHS,
        public_paths=PUBLIC_PATHS.union((page.path for page in pages), {"/metrics"} if settings.public_metrics else set()),
    )
    app.add_exception_handler(ApiError, _on_api_error)
    app.add_exception_handler(HTTPException, _on_http_exception)
    app.openapi = lambda: _openapi(app)  # type: ignore[method-assign]
    _write_schema_once(app)
    return app


@asynccontextmanager
async def _with_schema(app: FastAPI) -> AsyncIterator[None]:
    """Make the schema before anybody is served: it takes a tenth of a second, in which everybody else would wait."""
    app.openapi()
    yield


def _write_schema_once(app: FastAPI) -> None:
    """FastAPI writes its schema anew for everyone who asks, which takes the event loop milliseconds each time."""
    written: list[bytes] = []

    async def answer(_: Request) -> Response:
        if not written:
            written.append(json.dumps(app.openapi()).encode())
        return Response(written[0], media_type="application/json")

    kept = [route for route in app.router.routes if getattr(route, "path", None) != app.openapi_url]
    app.router.routes[:] = [*kept, Route(str(app.openapi_url), answer, include_in_schema=False)]


async def _on_api_error(request: Request, error: Exception) -> Response:
    if not isinstance(error, ApiError):
        raise error
    return refuse(error, exchange_of(request.scope))


async def _on_http_exception(request: Request, error: Exception) -> Response:
    """Starlette's own 404 and 405 in our shape."""
    if not isinstance(error, HTTPException):
        raise error
    headers = dict(error.headers or {})
    if error.status_code == MethodNotAllowed.status:
        return refuse(MethodNotAllowed("method not allowed", headers=headers), exchange_of(request.scope))
    if error.status_code == NotFound.status:
        return refuse(NotFound("no such route"), exchange_of(request.scope))
    return refuse(RequestError("bad request", headers=headers), exchange_of(request.scope))


def _openapi(app: FastAPI) -> dict[str, Any]:
    """FastAPI's schema plus the request models, which the routes read themselves."""
    if app.openapi_schema is None:
        schema = FastAPI.openapi(app)
        components = schema.setdefault("components", {}).setdefault("schemas", {})
        components |= json_schema(ScoreRequest, CompareRequest, RankRequest, *(dialect.body for dialect in DIALECTS))
        app.openapi_schema = schema
    return app.openapi_schema
