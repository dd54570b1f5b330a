"""T1: many callers at once, every form and size; no score may be another's. T2 in it: nothing is counted twice or not at all."""

from __future__ import annotations

import asyncio
import time

from tests.load.asking import Asker
from tests.load.processes import oracle
from tests.load.scenario import Report, Run, Scenario, settled, upload
from tests.load.tally import Tally

_NUM_WORKERS = 64


async def run(run: Run) -> Report:
    tally, report, num_items = Tally(), Report(), 8_000 if run.plant else int(run.pick(20_000, 1_000_000))
    flags = run.server_plant("swap-rows", "neighbour", "skip-counter")
    async with oracle(*flags, core=run.core, max_queue_tokens=str(1 << 22), max_queue_items="100000", cache_audit_every="50") as server:
        asker, pool = Asker(seed=1), server.pool()
        await upload(pool, asker.uploads())
        before, began = await settled(server), time.monotonic()
        left = [num_items]

        async def work(worker: int) -> None:
            while left[0] > 0:
                asked = asker.next(f"w{worker}")
                left[0] -= asked.num_items
                await tally.ask(pool, asked)

        await asyncio.gather(*(work(worker) for worker in range(_NUM_WORKERS)))
        seconds = time.monotonic() - began
        after = await settled(server)
        pool.close()
        report.add_tally(tally)
        report.add_conservation(before, after, tally)
        mismatches = sum(value for name, value in after.items() if name.startswith("reward_cache_audit_mismatches_total"))
        audits = sum(value for name, value in after.items() if name.startswith("reward_cache_audits_total"))
        report.add_zero("audited cache hits that differed", int(mismatches), int(audits))
        report.add("captions a second", f"{num_items / seconds:,.0f}", is_timed=True)
    return report


_PLANTS = {"swap-rows": "wrong items", "neighbour": "wrong items", "skip-counter": "sent minus counted"}
MIXUPS = Scenario("T1", "no mix-ups: 64 callers, every form, 1-64 captions, twins", _PLANTS, run)
