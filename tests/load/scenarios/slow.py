"""T8: hundreds of clients that dribble heads or bodies, or never take their answers. Others are served as before."""

from __future__ import annotations

import asyncio
import random
import socket
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass, field

from tests.load.arrivals import arrive, moments, quantile
from tests.load.asking import Asker
from tests.load.processes import Oracle, oracle
from tests.load.scenario import Report, Run, Scenario, settled
from tests.load.tally import Tally
from tests.load.wire import Pool, get

_RATE, _GROUP_SIZE = 40.0, 8
_MAX_RATIO = 1.5
_DRIBBLE_S = 1.0  # between two bytes of the slow
_RAMP = 200.0  # of the slow a second, as slowhttptest is often run; all at once they would be a flood of connections, another attack
_BROKEN = (OSError, asyncio.IncompleteReadError)


@dataclass(frozen=True, slots=True)
class Patience:
    """How long the server bears them."""

    head_s: float
    body_s: float
    write_s: float

    @property
    def longest_s(self) -> float:
        return max(self.head_s, self.body_s, self.write_s)

    @property
    def budget_s(self) -> float:
        """One of the slow is shown out by one of these, or by two after each other."""
        return 2 * self.longest_s + 4

    def as_settings(self) -> dict[str, str]:
        return {"header_timeout_s": str(self.head_s), "body_timeout_s": str(self.body_s), "write_timeout_s": str(self.write_s)}


_SHORT, _LONG = Patience(2, 3, 3), Patience(8, 9, 9)  # in the long one all of the slow are there at once
_ENDLESS = {"header_timeout_s": "75", "body_timeout_s": "600", "write_timeout_s": "600", "min_body_rate": "0"}


@dataclass(slots=True)
class Attack:
    """The slow, by kind, and how long each of them was let in."""

    port: int
    num_each: int
    is_over: bool = False
    stays_s: dict[str, list[float]] = field(default_factory=lambda: {"head": [], "body": [], "reading": []})

    @property
    def num_slow(self) -> int:
        return 2 * self.num_each + self.num_each // 5

    async def run(self) -> None:
        """Until the last is out or `is_over`."""
        slow = [self._dribble_head, self._dribble_body] * self.num_each + [self._never_read] * (self.num_each // 5)
        random.Random(8).shuffle(slow)
        names = {self._dribble_head: "head", self._dribble_body: "body", self._never_read: "reading"}
        await asyncio.gather(*(self._stay(names[each], each, index / _RAMP) for index, each in enumerate(slow)))

    async def _stay(self, name: str, slow: Callable[[], Awaitable[None]], wait_s: float) -> None:
        await asyncio.sleep(wait_s)
        began = time.monotonic()
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


async def run(run: Run) -> Report:
    report, tally = Report(), Tally()
    patience: Patience = run.pick(_SHORT, _LONG)
    settings = _ENDLESS if run.plant == "patient" else patience.as_settings()
    async with oracle("--a-ms", "5", "--b-ms", "0.5", core=run.core, **settings) as server:
        pool, asker = server.pool(), Asker(seed=31, num_pictures=8, forms=("base64",))
        seconds, num_waves = (1.0, 1) if run.plant else run.pick((3.0, 1), (20.0, 3))
        await _healthy(pool, asker, Tally(), 0.5)
        before = await settled(server)
        baseline = await _healthy(pool, asker, tally, seconds)
        attack, attacked = Attack(server.port, 20 if run.plant else run.pick(50, 500)), list[float]()
        waves: list[asyncio.Task[None]] = []
        for _ in range(num_waves):
            waves.append(asyncio.create_task(attack.run()))
            attacked += await _healthy(pool, asker, tally, attack.num_slow / _RAMP + patience.longest_s)
            await asyncio.wait(waves, timeout=patience.budget_s)
        attack.is_over = True
        await asyncio.gather(*waves)
        num_files = await _files_at_rest(server)
        after = await settled(server)
        pool.close()
    report.add_tally(tally)
    report.add_zero("healthy requests refused or failed", tally.num_sent - tally.requests["ok"], tally.num_sent)
    p99 = quantile(attacked, 0.99), quantile(baseline, 0.99)
    text = f"{p99[0] * 1000:.1f} / {p99[1] * 1000:.1f} ms = {p99[0] / p99[1]:.2f}, of {len(attacked)} and {len(baseline)}"
    report.add("healthy p99, under attack / baseline", text, p99[0] <= _MAX_RATIO * p99[1], is_timed=True)
    num_out = sum(stay <= patience.budget_s for stays in attack.stays_s.values() for stay in stays)
    longest = {name: f"{max(stays, default=0.0):.1f} s" for name, stays in attack.stays_s.items()}
    num_slow = attack.num_slow * num_waves
    report.add("slow clients shown out", f"{num_out:,} of {num_slow:,}, at the latest after {longest}", num_out == num_slow)
    report.add("open files afterwards", num_files)
    refused = {name: after[name] - before.get(name, 0.0) for name in after if name.startswith("http_server_refused_connections_total")}
    report.add("connections ended, by reason", {name.split('"')[1]: int(count) for name, count in refused.items() if count})
    return report


async def _healthy(pool: Pool, asker: Asker, tally: Tally, seconds: float) -> list[float]:
    """Latencies of an open-loop load, from the intended moments."""
    took: list[float] = []

    async def begin(intended: float) -> None:
        await tally.ask(pool, asker.of(asker.unique_captions(_GROUP_SIZE), name="h"))
        took.append(time.monotonic() - intended)

    await arrive(moments(_RATE, seconds, seed=31), begin)
    return took


async def _files_at_rest(server: Oracle) -> int:
    """Open files of the server once the last of the slow is gone on both sides."""
    found = server.num_files
    for _ in range(40):
        await asyncio.sleep(0.05)
        if server.num_files == found:
            break
        found = server.num_files
    return found


SLOW = Scenario("T8", "slow clients: heads, bodies and readers that never end, beside normal load", ("patient",), run)
