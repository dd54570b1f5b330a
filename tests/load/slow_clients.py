"""Slow clients in a process of their own, so that what they cost is the server's and not the measuring client's.

`python -m tests.load.slow_clients PORT NUM_EACH RAMP BUDGET_S` says `ready`, begins with the first line it reads, and prints what became
of them as one line of JSON once the last is out, or its budget is over.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import socket
import sys
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass, field

from tests.load.wire import get

_DRIBBLE_S = 1.0  # between two bytes
_BROKEN = (OSError, asyncio.IncompleteReadError)


def count(num_each: int) -> int:
    """How many there are of `num_each` heads, as many bodies, and a fifth of it of readers."""
    return 2 * num_each + num_each // 5


@dataclass(slots=True)
class Attack:
    """The slow, by kind, and how long each of them was let in. `ramp`: of them a second; `budget_s`: for each."""

    port: int
    num_each: int
    ramp: float
    budget_s: float
    is_over: bool = False
    came_s: float = 0.0  # until the last had begun
    stays_s: dict[str, list[float]] = field(default_factory=lambda: {"head": [], "body": [], "reading": []})

    async def run(self) -> None:
        """Until the last is out or the budget of the last is over."""
        slow = [self._dribble_head, self._dribble_body] * self.num_each + [self._never_read] * (self.num_each // 5)
        random.Random(8).shuffle(slow)
        names = {self._dribble_head: "head", self._dribble_body: "body", self._never_read: "reading"}
        began = time.monotonic()
        stays = [asyncio.ensure_future(self._stay(names[each], each, began, index / self.ramp)) for index, each in enumerate(slow)]
        await asyncio.wait(stays, timeout=len(slow) / self.ramp + self.budget_s)
        self.is_over = True
        await asyncio.gather(*stays)

    async def _stay(self, name: str, slow: Callable[[], Awaitable[None]], start: float, wait_s: float) -> None:
        await asyncio.sleep(wait_s)
        began = time.monotonic()
        self.came_s = max(self.came_s, began - start)
        with suppress(*_BROKEN):
            await slow()
        if not self.is_over:
            self.stays_s[name].append(time.monotonic() - began)

    async def _dribble_head(self) -> None:
        await self._dribble(b"POST /score HTTP/1.1\r\nHost: x\r\nX-Slow: ")

    async def _dribble_body(self) -> None:
        await self._dribble(b"POST /score HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 100000\r\n\r\n{")

    async def _dribble(self, beginning: bytes) -> None:
        """A byte now and then until the server has enough of it."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        try:
            writer.write(beginning)
            ended = asyncio.ensure_future(reader.read())  # until its end: there may be an answer before
            while not ended.done() and not self.is_over:
                writer.write(b"x")
                await asyncio.wait({ended}, timeout=_DRIBBLE_S)
            ended.cancel()
        finally:
            writer.transport.abort()

    async def _never_read(self) -> None:
        """Ask for large answers and take none: a socket whose buffers stay full."""
        own = socket.socket()
        own.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        own.setblocking(False)
        loop = asyncio.get_running_loop()
        try:
            await loop.sock_connect(own, ("127.0.0.1", self.port))
            await loop.sock_sendall(own, get("/openapi.json") * 60)
            while not self.is_over:
                await asyncio.sleep(_DRIBBLE_S)
                own.getpeername()  # raises once the server gave it up
                await loop.sock_sendall(own, b"\r\n")
        finally:
            own.close()


def main(port: str, num_each: str, ramp: str, budget_s: str) -> None:
    os.nice(10)  # the core is the measuring client's too
    attack = Attack(int(port), int(num_each), float(ramp), float(budget_s))
    print("ready", flush=True)
    if sys.stdin.readline():
        asyncio.run(attack.run())
        print(json.dumps({"came_s": attack.came_s, "stays_s": attack.stays_s}), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
