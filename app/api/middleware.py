"""One ASGI layer around every route: request id, authentication, headers of every answer, metrics, the last catch."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import logging
import re
import secrets
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.routing import compile_path
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app.api.answers import error_answer
from app.api.body_room import BodyRoom, HeldBody
from app.errors import ApiError, Draining, NotFound, Unauthorized
from app.metrics import CLIENT_GONE, Metrics, outcome_of
from app.service import Timing

log = logging.getLogger("punchline.http")
PUBLIC_PATHS = frozenset({"/livez", "/readyz"})
COUNTED_ROUTES = frozenset({"/score", "/compare", "/rank", "/images", "/selftest"})
UNMATCHED = "_unmatched"
_NUM_DIGITS = 8  # of a key's hash: enough to tell keys apart, too few to try keys against
_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "OPTIONS"})
_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")


@dataclass(slots=True)
class Exchange:
    """What one request carries from this layer to its route and back. `unread`: more of its body is to come."""

    request_id: str
    timing: Timing
    began: float
    held: HeldBody
    unread: bool
    route: str = UNMATCHED
    fingerprint: str = ""  # of the model it asks, which signs the answer
    caller: str = ""  # the name of the key it showed
    status: int = 500
    started: bool = False
    error_code: str | None = None


class Envelope:
    """Wraps the application. A route is closed unless its path is on the public list.

    `paths` are the application's routes, as the router has them (`/runs/{run_id}`): metrics name these and nothing else that a
    client may ask for, and a public path opens what the router gives to that route and nothing else. The `counted` ones score.
    `fingerprint`: of the model that signs what names none.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        fingerprint: str,
        api_keys: Iterable[str],
        metrics: Metrics,
        paths: frozenset[str],
        is_draining: Callable[[], bool],
        room: BodyRoom,
        public_paths: frozenset[str] = PUBLIC_PATHS,
        counted: frozenset[str] = COUNTED_ROUTES,
        same: Callable[[bytes, bytes], bool] = hmac.compare_digest,
    ) -> None:
        self._app = app
        self._fingerprint = fingerprint
        self._keys = [_digest(key) for key in api_keys]
        self._metrics = metrics
        self._paths = frozenset(path for path in paths if "{" not in path)
        self._templates = [(compile_path(path)[0], path) for path in sorted(paths - self._paths)]
        self._is_draining = is_draining
        self._room = room
        self._public_paths = public_paths
        self._counted = counted
        self._same = same

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        route = self._route(scope["path"])
        headers = Headers(scope=scope)
        held, unread = self._room.open(), _announces_body(headers)
        exchange = Exchange(_request_id(headers), Timing(), time.monotonic(), held, unread, route, self._fingerprint)
        scope.setdefault("state", {})["exchange"] = exchange
        with self._metrics.http_active.labels(route).track_inprogress(), exchange.held:
            if route in self._counted:
                self._metrics.requests_received.labels(route).inc()
            try:
                await self._answer(scope, _following(receive, exchange), self._signing(send, exchange), exchange)
            finally:
                self._count(scope["method"], exchange)

    async def _answer(self, scope: Scope, receive: Receive, send: Send, exchange: Exchange) -> None:
        answer: Response
        try:
            exchange.caller = self._authorize(scope, exchange.route)
            if exchange.route == UNMATCHED:  # the router's patterns let a line end follow: a route that nothing here would count
                raise NotFound("no such route")
            await self._app(scope, receive, send)
            return
        except ApiError as error:
            answer = refuse(error, exchange)
        except ClientDisconnect:
            exchange.status = CLIENT_GONE
            return
        except asyncio.CancelledError:  # by the server alone, at the end of its time; raised again it would be logged as a fault of ours
            exchange.status = CLIENT_GONE
            if exchange.started:
                raise
            answer = refuse(Draining("the server stopped before this request was done", retry_after_s=5), exchange)
        except Exception:
            if exchange.started:
                raise
            log.exception("request %s failed", exchange.request_id)
            answer = refuse(ApiError("internal error"), exchange)
        await answer(scope, receive, send)

    def _route(self, path: str) -> str:
        """The route that has this path, by the router's own pattern."""
        if path in self._paths:
            return path
        return next((template for pattern, template in self._templates if pattern.match(path) and not path.endswith("\n")), UNMATCHED)

    def _authorize(self, scope: Scope, route: str) -> str:
        """By the path the router sees, never by a URL rebuilt from the Host header. Returns the name of the key.

        Digests are compared, and every one of them: the time tells neither how long a key is nor how much of it was right.
        """
        if not self._keys or route in self._public_paths:
            return ""
        given = Headers(scope=scope).getlist("authorization")
        scheme, _, token = given[0].partition(" ") if len(given) == 1 else ("", "", "")
        shown = _digest(token.strip())
        found = [key.hex()[:_NUM_DIGITS] for key in self._keys if self._same(shown, key)]
        if scheme.lower() != "bearer" or not found:
            raise Unauthorized("a valid key is needed: Authorization: Bearer", headers={"WWW-Authenticate": "Bearer"})
        self._metrics.requests_by_key.labels(found[0]).inc()
        return found[0]

    def _signing(self, send: Send, exchange: Exchange) -> Send:
        async def sign(message: Message) -> None:
            if message["type"] == "http.response.start":
                exchange.status, exchange.started = message["status"], True
                headers = MutableHeaders(scope=message)
                headers["X-Request-Id"] = exchange.request_id
                headers["X-Model-Fingerprint"] = exchange.fingerprint
                headers["Server-Timing"] = _server_timing(exchange)
                if self._is_draining() or exchange.unread:  # it is about to go, or what it still holds would be read for nothing
                    headers["Connection"] = "close"
            await send(message)

        return sign

    def _count(self, method: str, exchange: Exchange) -> None:
        route, seconds = exchange.route, time.monotonic() - exchange.began
        method = method if method in _METHODS else "_other"
        self._metrics.http_duration.labels(method, route, str(exchange.status)).observe(seconds)
        if exchange.error_code is not None:
            self._metrics.errors.labels(route, exchange.error_code).inc()
        if route in self._counted:
            self._metrics.requests.labels(route, outcome_of(exchange.status)).inc()
            log.info(
                "%s %s %d %s %.1f ms",
                exchange.request_id,
                route,
                exchange.status,
                exchange.error_code or outcome_of(exchange.status),
                seconds * 1000,
            )


def exchange_of(scope: Any) -> Exchange:
    """The exchange of a request in flight."""
    exchange: Exchange = scope["state"]["exchange"]
    return exchange


def refuse(error: ApiError, exchange: Exchange) -> Response:
    """The answer to a request that failed; its code goes into the metrics."""
    exchange.error_code = error.code
    answer = error_answer(error, exchange.request_id)
    error.__traceback__ = error.__context__ = None  # frames that hold a request's images, in cycles that are seldom looked at
    return answer


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()


def _request_id(headers: Headers) -> str:
    given = headers.getlist("x-request-id")
    return given[0] if len(given) == 1 and _REQUEST_ID.fullmatch(given[0]) else secrets.token_hex(12)


def _announces_body(headers: Headers) -> bool:
    return "transfer-encoding" in headers or any(length.strip("0 ") for length in headers.getlist("content-length"))


def _following(receive: Receive, exchange: Exchange) -> Receive:
    """`receive` that notes when the whole body was handed over."""

    async def follow() -> Message:
        message = await receive()
        if not message.get("more_body", False):
            exchange.unread = False
        return message

    return follow


def _server_timing(exchange: Exchange) -> str:
    stages = {**exchange.timing.seconds, "total": time.monotonic() - exchange.began}
    return ", ".join(f"{stage};dur={seconds * 1000:.2f}" for stage, seconds in stages.items())
