"""Captions a second of a loopback server under N clients at once, and how long its device stood idle meanwhile."""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import httpx
from prometheus_client import CollectorRegistry

from app.bench.loopback import Client, Loopback, json_body, read_answer
from app.bench.workload import Request, Source

GROUP_SIZE = 8
BUSY = "reward_device_busy_seconds_total"
_NUM_KNOWN = 4  # images, or conversations, that the server knows; clients take them in turn
_MIN_GROUPS, _GROUPS_EACH = 8, 2


@dataclass(frozen=True, slots=True)
class Level:
    """Groups of 8 of known images or conversations from so many clients, each sending its next when it has its answer."""

    num_clients: int
    num_groups: int
    captions_per_s: float
    p50_s: float  # of one request
    slowest_s: float  # no 99th percentile: there are fewer requests than it would need
    idle_share: float | None  # of the device, from the first answer to the last; None where too few batches tell


@dataclass(slots=True)
class Watch:
    """What was seen at each answer."""

    registry: CollectorRegistry
    seconds: list[float] = field(default_factory=list)
    moments: list[tuple[float, float]] = field(default_factory=list)  # (now, device seconds so far)

    def answered(self, began: float) -> None:
        now = time.perf_counter()
        self.seconds.append(now - began)
        busy = busy_seconds(self.registry)
        if busy is not None:
            self.moments.append((now, busy))

    @property
    def idle_share(self) -> float | None:
        """Batches are counted when they end, so the time between two answers of different batches is made of whole batches."""
        if not self.moments or self.moments[0][1] == self.moments[-1][1]:
            return None
        first = self.moments[0]
        last = next(moment for moment in self.moments if moment[1] == self.moments[-1][1])
        return max(0.0, 1 - (last[1] - first[1]) / (last[0] - first[0]))


def measure_load(loopback: Loopback, source: Source, levels: Sequence[int], report: Callable[[str], None]) -> list[Level]:
    """One level after the other, images or conversations made known first."""
    known = []
    with Client(loopback) as client:
        for _ in range(_NUM_KNOWN if levels else 0):
            request = source.request(1)
            known.append((client.send_bytes(request)[1], request))
    measured = []
    for num_clients in levels:
        report(f"{num_clients} clients")
        num_groups = max(_MIN_GROUPS, _GROUPS_EACH * num_clients)
        work = [(image_id, source.request(GROUP_SIZE, first)) for image_id, first in (known[n % len(known)] for n in range(num_groups))]
        measured.append(asyncio.run(_measure(loopback, work, num_clients)))
    return measured


async def _measure(loopback: Loopback, work: Sequence[tuple[str | None, Request]], num_clients: int) -> Level:
    watch, waiting = Watch(loopback.runtime.metrics.registry), list(work)
    limits = httpx.Limits(max_connections=num_clients, max_keepalive_connections=num_clients)
    timeout_ms = loopback.runtime.settings.max_timeout_ms
    timeout = httpx.Timeout(timeout_ms / 1000 + 5)
    async with httpx.AsyncClient(base_url=loopback.url, headers=loopback.headers, limits=limits, timeout=timeout) as http:

        async def client() -> None:
            while waiting:
                image_id, request = waiting.pop()
                began = time.perf_counter()
                read_answer(await http.post("/score", json=json_body(image_id, request, timeout_ms)))
                watch.answered(began)

        began = time.perf_counter()
        await asyncio.gather(*(client() for _ in range(num_clients)))
        seconds = time.perf_counter() - began
    num_captions = sum(len(request.captions) for _, request in work)
    return Level(num_clients, len(work), num_captions / seconds, statistics.median(watch.seconds), max(watch.seconds), watch.idle_share)


def busy_seconds(registry: CollectorRegistry) -> float | None:
    """The server's own count of its device's work; None where it keeps none."""
    families = registry.restricted_registry([BUSY]).collect()
    return next((sample.value for family in families for sample in family.samples if sample.name == BUSY), None)
