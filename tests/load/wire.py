"""HTTP/1.1 over asyncio's streams: one connection, and a pool that keeps them as clients do. Quick enough for millions of captions."""

from __future__ import annotations

import asyncio
import json
import re
import time
from dataclasses import dataclass, field
from typing import Any

_LENGTH = re.compile(rb"(?i)\r\ncontent-length: *(\d+)")
_MAX_HEAD_BYTES = 1 << 16
_BROKEN = (asyncio.IncompleteReadError, ConnectionError, TimeoutError, OSError)


class Unreached(Exception):
    """No connection came about, so nobody took the request."""


class Lost(Exception):
    """A request was sent and no whole answer came."""


@dataclass(frozen=True, slots=True)
class Answer:
    status: int
    head: bytes
    body: bytes

    def header(self, name: str) -> str | None:
        found = re.search(rb"(?i)\r\n" + re.escape(name.encode()) + rb": *([^\r\n]*)", self.head)
        return found[1].decode("latin-1") if found else None

    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def error_code(self) -> str | None:
        return None if self.status == 200 else str(self.json()["error"]["code"])


class Connection:
    """One connection; one request at a time."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer
        self.is_open = True

    @classmethod
    async def open(cls, port: int, *, timeout_s: float = 20.0) -> Connection:
        """Raises Unreached."""
        try:
            async with asyncio.timeout(timeout_s):
                return cls(*await asyncio.open_connection("127.0.0.1", port, limit=_MAX_HEAD_BYTES))
        except (OSError, TimeoutError) as error:
            raise Unreached(str(error)) from None

    @property
    def was_closed(self) -> bool:
        """Whether the other side closed it while it lay idle."""
        return self.reader.at_eof() or self.writer.is_closing()

    async def ask(self, request: bytes, *, timeout_s: float = 60.0) -> Answer:
        """Raises Lost."""
        try:
            async with asyncio.timeout(timeout_s):
                self.writer.write(request)
                head = await self.reader.readuntil(b"\r\n\r\n")
                length = _LENGTH.search(head)
                body = await self.reader.readexactly(int(length[1]) if length else 0)
        except _BROKEN as error:
            self.close()
            raise Lost(type(error).__name__) from None
        except BaseException:  # cancelled: the rest of the answer must not be taken for the next one's
            self.close()
            raise
        answer = Answer(int(head[9:12]), head, body)
        if (answer.header("connection") or "").lower() == "close":
            self.close()
        return answer

    def close(self) -> None:
        self.is_open = False
        self.writer.transport.abort()


@dataclass(slots=True)
class Pool:
    """Kept connections to one port, the last used first; as every client's pool does, it looks whether one is still open."""

    port: int
    idle: list[Connection] = field(default_factory=list)
    expires_s: float = 60.0
    since: dict[int, float] = field(default_factory=dict)

    async def ask(self, request: bytes, *, timeout_s: float = 60.0) -> Answer:
        """Raises Unreached, Lost."""
        connection = self._kept() or await Connection.open(self.port)
        answer = await connection.ask(request, timeout_s=timeout_s)
        if connection.is_open:
            self.since[id(connection)] = time.monotonic()
            self.idle.append(connection)
        return answer

    def _kept(self) -> Connection | None:
        while self.idle:
            connection = self.idle.pop()
            began = self.since.pop(id(connection))
            if not connection.was_closed and time.monotonic() - began < self.expires_s:
                return connection
            connection.close()
        return None

    def close(self) -> None:
        for connection in self.idle:
            connection.close()
        self.idle.clear()
        self.since.clear()


def get(path: str) -> bytes:
    return f"GET {path} HTTP/1.1\r\nHost: punchline\r\n\r\n".encode()


def post(path: str, kind: str, body: bytes, request_id: str, *, method: str = "POST") -> bytes:
    length = f"Content-Type: {kind}\r\nContent-Length: {len(body)}"
    return f"{method} {path} HTTP/1.1\r\nHost: punchline\r\n{length}\r\nX-Request-Id: {request_id}\r\n\r\n".encode() + body
