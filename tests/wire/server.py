"""The whole HTTP stack over the fakes, on a real port, in a thread of this process."""

from __future__ import annotations

import asyncio
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import uvicorn
from starlette.types import ASGIApp

from app.connections import guarded_config
from app.metrics import Metrics
from app.settings import Settings
from tests.fakes import FINGERPRINT, OracleScorer, Served, serving

HOST = "127.0.0.1"
Configure = Callable[[ASGIApp, Settings, Metrics, str], uvicorn.Config]
Address = tuple[str, int]


@dataclass(frozen=True)
class Wire:
    """A server that listens, and its insides."""

    served: Served
    address: Address
    server: uvicorn.Server

    def refused(self, reason: str) -> float:
        return self.served.metric("http_server_refused_connections_total", reason=reason)


def plain_config(app: ASGIApp, settings: Settings, metrics: Metrics, fingerprint: str) -> uvicorn.Config:
    """uvicorn as it comes: what the tests of this folder must find wanting."""
    return uvicorn.Config(app, log_config=None, access_log=False, timeout_keep_alive=settings.keep_alive_s)


@contextmanager
def wire(configure: Configure = guarded_config, *, scorer: OracleScorer | None = None, **flags: Any) -> Iterator[Wire]:
    """Serve until left."""
    found: Future[Wire] = Future()
    thread = threading.Thread(target=lambda: asyncio.run(_serve(configure, scorer, flags, found)))
    thread.start()
    try:
        yield found.result(30)
    finally:
        if found.done() and found.exception() is None:
            found.result().server.should_exit = True
        thread.join()


async def _serve(configure: Configure, scorer: OracleScorer | None, flags: dict[str, Any], found: Future[Wire]) -> None:
    try:
        async with serving(scorer=scorer, **flags) as served:
            config = configure(served.app, served.settings, served.metrics, FINGERPRINT)
            config.timeout_graceful_shutdown = 1
            server = _Server(config)
            with socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP) as listener:
                listener.bind((HOST, 0))
                server.tell = lambda: found.set_result(Wire(served, listener.getsockname(), server))
                await server.serve(sockets=[listener])
    except BaseException as error:
        if found.done():
            raise
        found.set_exception(error)


class _Server(uvicorn.Server):
    """Says when it answers."""

    tell: Callable[[], None]

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.tell()


def num_descriptors() -> int:
    return len(os.listdir("/dev/fd"))


def eventually(condition: Callable[[], bool], what: str) -> None:
    """Other threads bring it about, or the test fails; how fast is not asked."""
    for _ in range(3000):
        if condition():
            return
        time.sleep(0.01)
    raise AssertionError(f"never: {what}")
