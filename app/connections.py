"""One client connection: what its bytes may cost before there is a request, and how long it may take, hold or idle.

uvicorn's protocol with limits on the head, timers for heads and answers, a cap on connections, and refusals in the one error shape.
Knows bytes and time; not what is served.
"""

from __future__ import annotations

import asyncio
import logging
import os
import resource
import secrets
import socket
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any, cast

import httptools
import uvicorn
from starlette.types import ASGIApp
from uvicorn.config import Config
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle
from uvicorn.server import ServerState

from app.admission import jittered_s
from app.api.answers import error_answer
from app.errors import ApiError, BadHttp, HeadTimeout, HeadTooLarge, Overloaded, SettingsInvalid
from app.metrics import Metrics
from app.settings import Settings

log = logging.getLogger("punchline.http")
_MAX_HEADERS = 100
_MAX_PIPELINED = 100  # requests of one connection that wait for an earlier one
_FRAMING = frozenset({b"content-length", b"transfer-encoding"})  # the headers that say whether a body follows, and how long it is
_VERSIONS = frozenset({"1.0", "1.1"})
_LINGER_S, _LINGER_BYTES = 1.0, 256 << 10  # after a last answer: closed at once, what still arrives would reset it away
_RETRY_S = 2.0  # for one connection too many
_BACKLOG = 1024  # connections taken at a time, before any of them can be counted
_SPARE_DESCRIPTORS = 64
_SEND_BUFFER_BYTES = 64 << 10  # the kernel doubles it; left to itself it takes megabytes of answers that nobody reads
_PROBES = {"TCP_KEEPIDLE": 30, "TCP_KEEPINTVL": 10, "TCP_KEEPCNT": 3}  # a peer that vanished is noticed within a minute


@dataclass(frozen=True, slots=True)
class ConnectionLimits:
    """What a connection may cost."""

    header_timeout_s: float
    max_header_bytes: int
    write_timeout_s: float
    max_connections: int


@dataclass(slots=True)
class Guard:
    """What the connections of one server share. `idle`: those without a request, the longest without one first."""

    limits: ConnectionLimits
    metrics: Metrics
    fingerprint: str
    open: set[GuardedProtocol] = field(default_factory=set)
    idle: dict[GuardedProtocol, None] = field(default_factory=dict)

    def count(self, reason: str) -> None:
        self.metrics.refused_connections.labels(reason).inc()

    def forget(self, connection: GuardedProtocol) -> None:
        self.open.discard(connection)
        self.idle.pop(connection, None)

    def admit(self, connection: GuardedProtocol) -> bool:
        """Room for one more, if need be by closing the one that has been idle longest."""
        if len(self.open) >= self.limits.max_connections:
            if not self.idle:
                return False
            next(iter(self.idle)).make_room()
        self.open.add(connection)
        return True


def guarded_config(app: ASGIApp, settings: Settings, metrics: Metrics, fingerprint: str) -> Config:
    """How every server of Punchline runs uvicorn. May raise this process's limit of open files; raises SettingsInvalid."""
    max_connections, backlog = take_descriptors(settings.max_connections)
    limits = ConnectionLimits(settings.header_timeout_s, settings.max_header_bytes, settings.write_timeout_s, max_connections)
    return uvicorn.Config(
        app,
        http=cast(type[asyncio.Protocol], partial(GuardedProtocol, guard=Guard(limits, metrics, fingerprint))),
        ws="none",
        proxy_headers=False,  # whom a proxy names is nobody's business here
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_keep_alive=settings.keep_alive_s,
        backlog=backlog,
    )


def take_descriptors(max_connections: int) -> tuple[int, int]:
    """Room for so many connections among the open files this process is allowed; fewer if it is not.

    Returns how many connections there may be, and how many may be taken at a time. Raises SettingsInvalid.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    used = len(os.listdir("/dev/fd")) + _SPARE_DESCRIPTORS
    wanted = used + max_connections + _BACKLOG
    if hard == resource.RLIM_INFINITY or hard >= wanted:
        if soft != resource.RLIM_INFINITY and soft < wanted:
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
        return max_connections, _BACKLOG
    left = hard - used
    if left < 2:
        raise SettingsInvalid(f"this process may open {hard} files, too few for any connection; raise its limit (`ulimit -Hn`)")
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    backlog = min(_BACKLOG, max(1, left // 4))
    allowed = min(max_connections, left - backlog)
    if allowed < max_connections:
        log.warning("max_connections is %d, not %d: this process may open %d files", allowed, max_connections, hard)
    return allowed, backlog


class _Door:
    """The transport as one request sees it: closing it on a body that still arrives lets the answer be read first."""

    def __init__(self, transport: asyncio.Transport, close: Callable[[], None]) -> None:
        self.write = transport.write
        self.is_closing = transport.is_closing
        self.close = close


class GuardedProtocol(HttpToolsProtocol):
    """uvicorn's HTTP/1 protocol, bounded.

    A head has a size, a number of headers and a time. What cannot be parsed is refused in the error shape, in its turn: after the
    answers to the requests before it on the same connection, never in the middle of one.
    """

    def __init__(
        self,
        config: Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
        *,
        guard: Guard,
    ) -> None:
        super().__init__(config, server_state, app_state, _loop)
        self._guard = guard
        self._running: RequestResponseCycle | None = None
        self._in_head = self._in_body = False
        self._num_headers = self._head_bytes = self._silent_bytes = 0
        self._has_moved = False  # the parser made something of the bytes in hand
        self._skips_body = self._is_retelling = False  # what a parser does that met an offer of another protocol
        self._cause: ApiError | None = None
        self._last_words: bytes | None = None
        self._is_over = False  # nothing is read any more
        self._num_ignored = 0
        self._timer: asyncio.TimerHandle | None = None  # for the head, at the end for lingering
        self._write_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        transport.set_write_buffer_limits(high=0)  # so that `pause_writing` means something is left, `resume_writing` that nothing is
        _prepare(transport, self._guard.limits.write_timeout_s)
        if self._guard.admit(self):
            self._rest()
            self._wait_for_head()
        else:  # closed at once: those that are refused must not hold descriptors
            self._refuse(Overloaded("too many connections", retry_after_s=jittered_s(_RETRY_S)), "too_many")
            transport.close()

    def connection_lost(self, exc: Exception | None) -> None:
        self._guard.forget(self)
        self._stop_timer()
        self._stop_write_timer()
        if self._running is not None and not self._running.response_complete:
            _abandon(self._running)  # uvicorn tells only the last request of a pipeline
        super().connection_lost(exc)
        self._unset_keepalive_if_required()
        self.cycle = self._running = None  # type: ignore[assignment]
        self.pipeline.clear()  # requests and connection hold each other: apart, they are freed without the collector of cycles

    def data_received(self, data: bytes) -> None:
        self._unset_keepalive_if_required()
        if self._is_over:
            self._ignore(len(data))
            return
        self._has_moved = False
        try:
            self._parse(data)
        except httptools.HttpParserError:
            error = self._cause or BadHttp("this is no HTTP/1.1 request")
            self._refuse(error, error.code)
        else:
            self._count_silence(len(data))
        if self._is_answered() and self._timer is None and not self._is_over:
            self._wait_for_head()

    def _count_silence(self, num_bytes: int) -> None:
        """Bytes that end nothing - a line, a chunk's extension - are kept by the parser, or by nobody; either way they are too many."""
        self._silent_bytes = 0 if self._has_moved else self._silent_bytes + num_bytes
        if self._silent_bytes > self._guard.limits.max_header_bytes:
            self._refuse(self._too_large(), HeadTooLarge.code)

    def _parse(self, data: bytes) -> None:
        """An upgrade is an offer, and is left aside. A request that offers one and has a body is as any other; else it is the last."""
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade as upgrade:
            if self._skips_body:
                self._read_body_after_all()
                self._parse(data[upgrade.args[0] :])
            else:
                self._is_over = True
                self.cycle.keep_alive = False

    def _read_body_after_all(self) -> None:
        """The parser gives the body up for one of another protocol. Another parser is told how long it is, and goes on from there."""
        self._skips_body, self._is_retelling = False, True
        self.parser = httptools.HttpRequestParser(self)
        self.parser.set_dangerous_leniencies(lenient_data_after_close=True)  # as uvicorn's
        lines = b"".join(b"%b: %b\r\n" % header for header in self.headers if header[0] in _FRAMING)
        self.parser.feed_data(b"POST / HTTP/1.1\r\n" + lines + b"\r\n")
        self._is_retelling = False

    # The parser's callbacks

    def on_message_begin(self) -> None:
        if self._is_retelling:
            return
        self._has_moved = self._in_head = True
        self._num_headers = self._head_bytes = 0
        super().on_message_begin()

    def on_url(self, url: bytes) -> None:
        if self._is_retelling:
            return
        self._take(len(url))
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        """Trailers count as headers and are dropped: a request must not change once it has begun."""
        if self._is_retelling:
            return
        self._num_headers += 1
        self._take(len(name) + len(value) + len(": \r\n"))
        if self._in_head:
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        if self._is_retelling:
            return
        self._has_moved = True
        if self.parser.get_http_version() not in _VERSIONS:
            self._fail(BadHttp("only HTTP/1.1 and HTTP/1.0 are spoken here"))
        if self.parser.get_http_version() == "1.1" and sum(name == b"host" for name, _ in self.headers) != 1:
            self._fail(BadHttp("a request of HTTP/1.1 names one host"))
        if len(self.pipeline) >= _MAX_PIPELINED:
            self._fail(BadHttp(f"more than {_MAX_PIPELINED} requests wait on one connection"))
        super().on_headers_complete()
        self.cycle.transport = cast(asyncio.Transport, _Door(self.transport, self._close_after_answer))
        self._in_head, self._in_body = False, True
        self._skips_body = self.parser.should_upgrade() and any(value != b"0" for name, value in self.headers if name in _FRAMING)
        self._guard.idle.pop(self, None)
        self._stop_timer()

    def on_body(self, body: bytes) -> None:
        self._has_moved = True
        super().on_body(body)

    def on_message_complete(self) -> None:
        if self._skips_body:
            return
        self._has_moved, self._in_body = True, False
        super().on_message_complete()

    def _take(self, num_bytes: int) -> None:
        self._has_moved = True
        self._head_bytes += num_bytes
        if self._head_bytes > self._guard.limits.max_header_bytes:
            self._fail(self._too_large())
        if self._num_headers > _MAX_HEADERS:
            self._fail(HeadTooLarge(f"the request has more than {_MAX_HEADERS} headers"))

    def _too_large(self) -> HeadTooLarge:
        return HeadTooLarge(f"target and headers are larger than {self._guard.limits.max_header_bytes} bytes")

    def _fail(self, error: ApiError) -> None:
        self._cause = error
        raise error

    # Requests in turn

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        self._running = cycle
        super()._start_asgi_task(cycle, app)

    def _is_answered(self) -> bool:
        """No request is open or waits."""
        return not self.pipeline and (self._running is None or self._running.response_complete)

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._watch_buffer()
        if self.transport.is_closing() or not self._is_answered():
            return
        if self._is_over:
            self._unset_keepalive_if_required()
            self._end()
            return
        self._rest()
        if self._in_head:
            self._unset_keepalive_if_required()
            self._wait_for_head()

    def _rest(self) -> None:
        self._guard.idle[self] = None

    # Heads that do not come

    def _wait_for_head(self) -> None:
        self._timer = self.loop.call_later(self._guard.limits.header_timeout_s, self._head_is_late)

    def _head_is_late(self) -> None:
        self._timer = None
        if self._in_head:
            seconds = self._guard.limits.header_timeout_s
            self._refuse(HeadTimeout(f"the head of the request did not arrive within {seconds:g} s"), HeadTimeout.code)
        else:
            self._guard.count(HeadTimeout.code)
            self.transport.close()

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    # Answers that are not taken

    def pause_writing(self) -> None:
        super().pause_writing()
        self._watch_buffer()

    def resume_writing(self) -> None:
        super().resume_writing()
        self._stop_write_timer()

    def _watch_buffer(self) -> None:
        if self.transport.get_write_buffer_size() == 0:
            self._stop_write_timer()
        elif self._write_timer is None:
            self._write_timer = self.loop.call_later(self._guard.limits.write_timeout_s, self._write_is_late)

    def _write_is_late(self) -> None:
        self._write_timer = None
        if self.transport.get_write_buffer_size() > 0:
            self._guard.count("write_timeout")
            self.transport.abort()

    def _stop_write_timer(self) -> None:
        if self._write_timer is not None:
            self._write_timer.cancel()
            self._write_timer = None

    # The end

    def make_room(self) -> None:
        """Closed, idle as it is, for a newer connection."""
        self._guard.forget(self)
        self._guard.count("idle")
        self.transport.close()

    def _refuse(self, error: ApiError, reason: str) -> None:
        """Read nothing more, and say why once the requests before have their answers."""
        self._guard.count(reason)
        self._guard.idle.pop(self, None)
        self._stop_timer()
        self._is_over = True
        self._last_words = refusal(error, self._guard.fingerprint)
        if self._in_body:
            self._drop_unfinished()
        if self._is_answered():
            self._end()

    def _drop_unfinished(self) -> None:
        """Of the request whose body broke nothing will come: the refusal is its answer, unless it has one already."""
        if self.pipeline:
            self.pipeline.popleft()  # the newest; those before it are whole
            return
        if self._running is None:
            return
        if self._running.response_started:
            self._last_words = None
        self._running.response_complete = True
        _abandon(self._running)

    def _end(self) -> None:
        if self._last_words is not None:
            self.transport.write(self._last_words)
        self._linger()

    def _close_after_answer(self) -> None:
        if self._in_body and not self.pipeline:
            self._is_over = True
            self._linger()
        else:
            self.transport.close()

    def _linger(self) -> None:
        """Say that nothing more comes, and take a little of what still arrives."""
        if self._timer is None and not self.transport.is_closing():
            self._timer = self.loop.call_later(_LINGER_S, self.transport.close)
            with suppress(OSError):  # the client has gone
                self.transport.write_eof()
            self._watch_buffer()

    def _ignore(self, num_bytes: int) -> None:
        self._num_ignored += num_bytes
        if self._num_ignored > _LINGER_BYTES and self._is_answered():
            self.transport.close()


def refusal(error: ApiError, fingerprint: str) -> bytes:
    """The bytes of an answer to what never became a request."""
    request_id = secrets.token_hex(12)
    answer = error_answer(error, request_id)
    signed = [(b"x-request-id", request_id.encode()), (b"x-model-fingerprint", fingerprint.encode()), (b"connection", b"close")]
    headers = b"".join(b"%b: %b\r\n" % pair for pair in (*answer.raw_headers, *signed))
    return STATUS_LINE[error.status] + headers + b"\r\n" + bytes(answer.body)


def _abandon(cycle: RequestResponseCycle) -> None:
    cycle.disconnected = True
    cycle.message_event.set()


def _prepare(transport: asyncio.Transport, write_timeout_s: float) -> None:
    """The kernel asks silent peers whether they are still there, gives up those that take nothing, if we have not before, and keeps
    little for those that read slowly: what they ask for next is not worked on until they have read.
    """
    connection: socket.socket | None = transport.get_extra_info("socket")
    if connection is None:
        return
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SEND_BUFFER_BYTES)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in {**_PROBES, "TCP_USER_TIMEOUT": round(write_timeout_s * 2000)}.items():
        if hasattr(socket, name):
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
