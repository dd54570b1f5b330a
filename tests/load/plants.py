"""Defects that are put into a server on purpose, to show that the scenario which looks for them would find them."""

from __future__ import annotations

import asyncio
import itertools
import time
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

ON_DEVICE = ("swap-rows", "neighbour", "unrecognised", "lone-faults")
IN_HTTP = ("slow-refusals", "busy-refusals", "served-last", "leak", "deaf", "odd-status")
IN_COUNTING = ("skip-counter",)
IN_STOPPING = ("cut-at-signal",)
SERVER_PLANTS = (*ON_DEVICE, *IN_HTTP, *IN_COUNTING, *IN_STOPPING)
LAST_WORKER = "w0-"  # of the request ids that `served-last` holds back
_LEAKED_BYTES = 65536  # a request
_HELD_S = 8.0  # by `served-last`: long beside a step, on a busy machine too


class PlantedHttp:
    """An ASGI layer with one defect."""

    def __init__(self, app: ASGIApp, plant: str) -> None:
        self._app = app
        self._plant = plant
        self._kept: list[bytearray] = []

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self._plant == "leak" and scope["type"] == "http":
            self._kept.append(bytearray(b"x" * _LEAKED_BYTES))
        if self._plant == "served-last" and dict(scope.get("headers", ())).get(b"x-request-id", b"").startswith(LAST_WORKER.encode()):
            await asyncio.sleep(_HELD_S)
        await self._app(scope, self._deafened(receive), self._held(send))

    def _deafened(self, receive: Receive) -> Receive:
        """Nobody hears that a client left."""

        async def deaf() -> Message:
            message = await receive()
            if self._plant == "deaf" and message["type"] == "http.disconnect":
                await asyncio.sleep(60)
            return message

        return deaf

    def _held(self, send: Send) -> Send:
        async def held(message: Message) -> None:
            if self._plant == "slow-refusals" and message.get("status") == 503:
                await asyncio.sleep(0.06)
            if self._plant == "busy-refusals" and message.get("status") == 503:
                time.sleep(0.02)  # noqa: ASYNC251 - nobody else is served meanwhile: the defect
            if self._plant == "odd-status" and message.get("status") == 422:
                message["status"] = 418
            await send(message)

        return held


class ForgetfulCounter:
    """A counter that forgets every so many."""

    def __init__(self, counter: Any, every: int) -> None:
        self._counter = counter
        self._turns = itertools.count(1)
        self._every = every

    def labels(self, *values: str) -> Any:
        labelled = self._counter.labels(*values)
        return _Nowhere() if next(self._turns) % self._every == 0 else labelled


class _Nowhere:
    def inc(self, amount: float = 1) -> None:
        """Count nothing."""
