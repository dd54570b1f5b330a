"""T3: open-loop load at half to ten times the capacity. Who is admitted is answered, the rest is refused at once."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field

from tests.load.arrivals import arrive, moments, quantile
from tests.load.asking import Asker
from tests.load.processes import Oracle, oracle
from tests.load.scenario import Report, Run, Scenario, settled
from tests.load.tally import Tally
from tests.load.wire import Pool, get

_GROUP_SIZE = 8
_A_MS, _B_MS = 5.0, 4.0
_CAPACITY = 1000 / (_A_MS / 8 + _GROUP_SIZE * _B_MS)  # requests a second, in batches of about eight requests
_LEVELS = (0.5, 1.0, 2.0, 5.0, 10.0)
_DEADLINE_S = 10.0
_MAX_REFUSAL_S, _MIN_GOODPUT, _MAX_GROWTH_BYTES = 0.05, 0.9, 64 << 20


@dataclass(slots=True)
class Level:
    """What one rate gave."""

    times: float  # capacity
    seconds: float = 0.0
    num_right: int = 0
    admitted_s: list[float] = field(default_factory=list)  # latency of the answered, from the intended moment
    refused_s: list[float] = field(default_factory=list)

    @property
    def goodput(self) -> float:
        return self.num_right / self.seconds


@dataclass(slots=True)
class Probe:
    """What a scraper and an orchestrator see meanwhile."""

    slowest_s: dict[str, float] = field(default_factory=lambda: {"/metrics": 0.0, "/livez": 0.0})
    peak_bytes: int = 0
    num_failed: int = 0

    async def watch(self, server: Oracle) -> None:
        """Until cancelled."""
        pool = server.pool()
        try:
            while True:
                for path in self.slowest_s:
                    began = time.monotonic()
                    self.num_failed += (await pool.ask(get(path))).status != 200
                    self.slowest_s[path] = max(self.slowest_s[path], time.monotonic() - began)
                self.peak_bytes = max(self.peak_bytes, server.resident_bytes)
                await asyncio.sleep(0.1)
        finally:
            pool.close()


async def measure(pool: Pool, asker: Asker, tally: Tally, times: float, seconds: float) -> Level:
    """One rate for some seconds, and until its last answer."""
    level = Level(times)

    async def begin(intended: float) -> None:
        asked = asker.of(asker.unique_captions(_GROUP_SIZE), name=f"x{times:g}")
        answer = await tally.ask(pool, asked)
        if answer is None:
            return
        took = time.monotonic() - intended
        (level.admitted_s if answer.status == 200 else level.refused_s).append(took)
        level.num_right += asked.num_items if answer.status == 200 else 0

    began = time.monotonic()
    await arrive(moments(_CAPACITY * times, seconds, seed=int(times * 10)), begin)
    level.seconds = time.monotonic() - began
    return level


async def run(run: Run) -> Report:
    tally, report, probe = Tally(), Report(), Probe()
    flags = ("--a-ms", str(_A_MS), "--b-ms", str(_B_MS), *run.server_plant("slow-refusals", "busy-refusals"))
    queue = "1000000" if run.plant == "endless-queue" else "128"
    settings = {
        "max_queue_items": queue,
        "max_captions": "128",
        "max_queue_tokens": str(1 << 22),
        "default_timeout_ms": str(int(_DEADLINE_S * 1000)),
    }
    async with oracle(*flags, core=run.core, **settings) as server:
        pool, asker = server.pool(), Asker(seed=3)
        await measure(pool, asker, Tally(), 0.5, 0.5)  # imports and caches of the first requests
        before, bytes_before = await settled(server), server.resident_bytes
        watching = asyncio.create_task(probe.watch(server))
        levels = [
            await measure(pool, asker, tally, times, 0.6 if run.plant else run.pick(0.9, 60.0))
            for times in ((1.0, _LEVELS[-1]) if run.plant else _LEVELS)
        ]
        watching.cancel()
        await asyncio.gather(watching, return_exceptions=True)
        after = await settled(server)
        pool.close()
        report.add_tally(tally)
        report.add_conservation(before, after, tally)
        _judge(report, levels, tally)
        report.add("failed probes of /metrics and /livez", probe.num_failed, probe.num_failed == 0)
        for path, slowest in probe.slowest_s.items():
            report.add(f"slowest {path}", f"{slowest * 1000:.0f} ms", slowest < 1, is_timed=True)
        grown = probe.peak_bytes - bytes_before
        report.add("peak memory above the start", f"{grown / 2**20:.1f} MiB", grown < _MAX_GROWTH_BYTES, is_timed=True)
    return report


def _judge(report: Report, levels: list[Level], tally: Tally) -> None:
    peak = max(level.goodput for level in levels)
    for level in levels:
        share = level.goodput / peak
        late, refused = level.admitted_s, level.refused_s
        text = f"goodput {level.goodput:.0f}/s ({share:.2f} of peak), p50/p99/p99.9 {_ms(late)} ms"
        report.add(f"{level.times:g} x capacity", f"{text}, {len(refused)} refused, p99 {_ms(refused, 0.99)} ms")
    last = levels[-1]
    report.add("goodput at 10 x capacity over peak", f"{last.goodput / peak:.3f}", last.goodput >= _MIN_GOODPUT * peak, is_timed=True)
    refused = [each for level in levels for each in level.refused_s]
    worst = quantile(refused, 0.99)
    report.add("99th percentile of refusals", f"{worst * 1000:.1f} ms of {len(refused):,}", worst < _MAX_REFUSAL_S, is_timed=True)
    report.add(
        "refused at 10 x capacity",
        f"{len(last.refused_s):,} of {len(last.refused_s) + len(last.admitted_s):,}",
        len(last.refused_s) > len(last.admitted_s),
    )
    longest = max((each for level in levels for each in level.admitted_s), default=0.0)
    report.add("slowest admitted answer", f"{longest:.2f} s", longest <= _DEADLINE_S, is_timed=True)
    others = set(tally.codes) - {"overloaded"}
    report.add("refusals that are no overload", sorted(others) or 0, not others)


def _ms(values: list[float], *shares: float) -> str:
    return "/".join(f"{quantile(values, share) * 1000:.0f}" for share in shares or (0.5, 0.99, 0.999))


_PLANTS = {
    "slow-refusals": "99th percentile of refusals",
    "endless-queue": "refused at 10 x capacity",
    "busy-refusals": "goodput at 10 x capacity over peak",
}
OVERLOAD = Scenario("T3", "overload: open loop at 0.5 to 10 times the capacity", _PLANTS, run)
