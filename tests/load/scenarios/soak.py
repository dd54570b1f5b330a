"""T12: hours of mixed traffic, one request in twenty hostile. Memory, open files, threads and temporary files stay what they were."""

from __future__ import annotations

import asyncio
import random
import time
from dataclasses import dataclass, field

from tests.load.asking import Asker
from tests.load.hostile import hostile_images, hostile_requests
from tests.load.processes import Oracle, oracle
from tests.load.scenario import Report, Run, Scenario, settled
from tests.load.slope import theil_sen
from tests.load.tally import Tally
from tests.load.wire import Lost, Pool

_NUM_WORKERS, _HOSTILE_SHARE = 8, 0.05
_MAX_SHORT_SLOPE = 4000.0  # MiB/h: in seconds only what is gross shows; the long version asks for an interval with 0 in it
_MAX_UNSEEN = 16.0  # bytes a request: the least that an object of Python's takes; an interval that reaches beyond says nothing
_THINK_S = 0.01
_PEAK = 4  # times the workers, in the warm-up


@dataclass(slots=True)
class Course:
    """What was seen of the process, over time."""

    points: list[tuple[float, float]] = field(default_factory=list)  # seconds, resident MiB
    files: list[int] = field(default_factory=list)
    threads: list[int] = field(default_factory=list)

    async def watch(self, server: Oracle, every_s: float) -> None:
        """Until cancelled."""
        while True:
            self.points.append((time.monotonic(), server.resident_bytes / 2**20))
            self.files.append(server.num_files)
            self.threads.append(server.num_threads)
            await asyncio.sleep(every_s)


@dataclass(slots=True)
class Traffic:
    """Honest and hostile callers."""

    pool: Pool
    asker: Asker
    tally: Tally = field(default_factory=Tally)
    odd: list[str] = field(default_factory=list)  # hostile requests with another answer than a 4xx
    num_hostile: int = 0

    async def work(self, worker: int, until: float) -> None:
        source = random.Random(worker)
        hostile = [*hostile_requests().items(), *hostile_images().items()]
        while time.monotonic() < until:
            if source.random() < _HOSTILE_SHARE:
                await self.offend(*source.choice(hostile))
            else:
                await self.tally.ask(self.pool, self.asker.next(f"w{worker}"))
            await asyncio.sleep(_THINK_S)

    async def offend(self, name: str, request: bytes) -> None:
        self.num_hostile += 1
        try:
            answer = await self.pool.ask(request)
        except Lost as error:
            self.odd.append(f"{name}: {error}")
            return
        if not 400 <= answer.status < 500 or not answer.error_code:
            self.odd.append(f"{name}: {answer.status}")


async def run(run: Run) -> Report:
    report, course, seconds = Report(), Course(), run.pick(3.0, 1800.0)
    async with oracle("--a-ms", "2", *run.server_plant("leak"), core=run.core, score_cache_bytes="0") as server:
        traffic, asker = (
            Traffic(server.pool(), Asker(seed=19, max_captions=8, forms=("base64", "multipart", "groups"))),
            Asker(seed=19, max_captions=8),
        )
        traffic.asker = asker
        for request in asker.uploads():
            await traffic.pool.ask(request)
        slack = await _warm_up(Traffic(traffic.pool, asker), run, server)
        await settled(server)
        idle_files = server.num_files
        watching = asyncio.create_task(course.watch(server, run.pick(0.05, 5.0)))
        await _drive(traffic, seconds)
        watching.cancel()
        await asyncio.gather(watching, return_exceptions=True)
        await settled(server)
        _judge(run, report, course, traffic, server, idle_files, slack)
        traffic.pool.close()
    return report


async def _warm_up(traffic: Traffic, run: Run, server: Oracle) -> int:
    """Caches fill, threads start, and allocators take what they will keep: what a peak of several times the load needs, so that the
    small peaks of the load itself, which come ever more seldom and without end, find it there. Returns the bytes that the peak added.
    """
    await _drive(traffic, run.pick(0.5, 60.0))
    before = server.resident_bytes
    await _drive(traffic, run.pick(0.5, 120.0), _PEAK * _NUM_WORKERS)
    await _drive(traffic, run.pick(0.5, 120.0))
    return max(0, server.resident_bytes - before)


async def _drive(traffic: Traffic, seconds: float, num_workers: int = _NUM_WORKERS) -> None:
    until = time.monotonic() + seconds
    await asyncio.gather(*(traffic.work(worker, until) for worker in range(num_workers)))


def _judge(run: Run, report: Report, course: Course, traffic: Traffic, server: Oracle, idle_files: int, slack: int) -> None:
    report.add_tally(traffic.tally)
    report.add_zero("hostile requests without a clear 4xx", len(traffic.odd), traffic.num_hostile)
    report.shown += traffic.odd[:5]
    began = course.points[0][0]
    slope = theil_sen([((when - began) / 3600, size) for when, size in course.points[:: max(1, len(course.points) // 400)]])
    text = f"{slope.median:+.2f} MiB/h, 95 % interval {slope.low:+.2f} to {slope.high:+.2f}, of {course.points[-1][1]:.0f} MiB"
    num_requests = traffic.num_hostile + traffic.tally.num_sent
    unseen = (slack + max(0.0, slope.high) * 2**20 * (course.points[-1][0] - began) / 3600) / num_requests
    holds = slope.low <= 0 and unseen < _MAX_UNSEEN if run.is_long else slope.low < _MAX_SHORT_SLOPE
    report.add("memory slope (Theil-Sen)", text, holds, is_timed=True)
    report.add(
        "bytes a request that could be lost unseen",
        f"{unseen:.1f}, of {num_requests:,} requests: the peak of the warm-up left {slack / 2**20:.1f} MiB",
    )
    report.add("open files, before / after", f"{idle_files} / {server.num_files}", server.num_files <= idle_files + _NUM_WORKERS)
    report.add("threads, most / after", f"{max(course.threads)} / {server.num_threads}", server.num_threads <= max(course.threads))
    report.add("temporary files left", server.num_left_files, server.num_left_files == 0)


SOAK = Scenario("T12", "soak: mixed traffic with 5 % hostile requests", {"leak": "memory slope"}, run)
