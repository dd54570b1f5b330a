"""T4: SIGTERM at a random moment under load. Callers go by readiness, as a load balancer does; whatever they send is answered."""

from __future__ import annotations

import asyncio
import random
import signal
import statistics
import time
from dataclasses import dataclass, field

from tests.load.arrivals import arrive, moments
from tests.load.asking import Asker
from tests.load.processes import Oracle, oracle
from tests.load.scenario import Report, Run, Scenario
from tests.load.tally import Tally
from tests.load.wire import Lost, Pool, Unreached, get

_RATE, _GROUP_SIZE, _NOTICE_S, _DRAIN_S = 40.0, 8, 1.5, 10
_POLL_S = 0.4  # between two looks of a balancer


@dataclass(slots=True)
class Drains:
    """What was seen of all of them."""

    tally: Tally = field(default_factory=Tally)
    seconds: list[float] = field(default_factory=list)  # from the signal to the exit
    codes: list[int | None] = field(default_factory=list)
    num_after: int = 0  # requests sent after the signal


async def is_ready(pool: Pool) -> bool:
    try:
        return (await pool.ask(get("/readyz"))).status == 200
    except (Unreached, Lost):
        return False


async def drain_once(server: Oracle, drains: Drains, seed: int) -> None:
    """Load until readiness fails; the signal comes somewhere in the first second."""
    pool, asker, when = server.pool(), Asker(seed=seed, num_pictures=4), random.Random(seed).uniform(0.1, 0.8)
    told: list[float] = []

    async def begin(_: float) -> None:
        drains.num_after += bool(told)
        await drains.tally.ask(pool, asker.of(asker.unique_captions(_GROUP_SIZE), name=f"d{seed}"))

    async def tell() -> None:
        await asyncio.sleep(when)
        server.signal(signal.SIGTERM)
        told.append(time.monotonic())
        drains.codes.append(await server.wait())
        drains.seconds.append(time.monotonic() - told[0])

    async def balance() -> None:
        while await is_ready(pool):  # noqa: ASYNC110 (another process)
            await asyncio.sleep(_POLL_S)
        loading.cancel()

    started: set[asyncio.Task[None]] = set()

    async def detached(intended: float) -> None:
        started.add(asyncio.create_task(begin(intended)))

    telling = asyncio.create_task(tell())
    loading = asyncio.create_task(arrive(moments(_RATE, 60.0, seed), detached))
    await balance()
    await asyncio.gather(*started)
    await telling
    pool.close()


async def run(run: Run) -> Report:
    drains, report = Drains(), Report()
    notice_s = 0.0 if run.plant == "no-notice" else _NOTICE_S
    flags = ("--a-ms", "10", "--b-ms", "2", *run.server_plant("cut-at-signal"))
    for seed in range(1 if run.plant else int(run.pick(2, 50))):
        async with oracle(*flags, core=run.core, drain_notice_s=str(notice_s), drain_s=str(_DRAIN_S)) as server:
            await drain_once(server, drains, seed)
    tally = drains.tally
    report.add_zero("requests lost or not taken in", tally.num_lost + tally.requests["unreached"], tally.requests.total())
    report.add_zero("requests refused", tally.requests["rejected"], tally.num_sent)
    report.add_tally(tally)
    report.add("sent after the signal", drains.num_after)
    report.add("exit codes other than 0", [code for code in drains.codes if code] or 0, all(code == 0 for code in drains.codes))
    longest = max(drains.seconds)
    text = f"{statistics.median(drains.seconds):.2f} / {longest:.2f} s of {len(drains.seconds)}, notice {notice_s:g} s"
    report.add("signal to exit, median / longest", text, longest < _NOTICE_S + _DRAIN_S + 2, is_timed=True)
    return report


DRAINING = Scenario(
    "T4", "SIGTERM at a random moment under load", dict.fromkeys(("no-notice", "cut-at-signal"), "requests lost or not taken in"), run
)
