"""T16: the device fails. Who is not at fault gets right scores; after a fault that stays no number leaves and the process goes."""

from __future__ import annotations

import asyncio
import random
import time

from app.errors import DeviceBroken
from tests.load.asking import Asked, Asker
from tests.load.oracle_device import DIE, HANG, HUGE, NAN, RAISE, SHORT, STICKY
from tests.load.processes import oracle
from tests.load.scenario import Report, Run, Scenario, settled
from tests.load.scenarios.draining import is_ready
from tests.load.tally import Tally, grown
from tests.load.wire import Pool

_NUM_WORKERS = 32
_GUILTY_SHARE = 0.04
_CODES = {RAISE: "scoring_failed", NAN: "nonfinite_score", SHORT: "internal_shape", HUGE: "out_of_memory"}
_TERMINAL = {STICKY: "device_fault", DIE: "device_fault", HANG: "device_hung"}


async def run(run: Run) -> Report:
    report = Report()
    if run.plant != "unrecognised":
        await _passing(run, report)
    if run.plant != "lone-faults":
        await _staying(run, report)
    return report


async def _staying(run: Run, report: Report) -> None:
    """Each fault that stays, in a server of its own; of equal fates one is shown."""
    num_scored = num_answers = 0
    for fault in (STICKY,) if run.plant else _TERMINAL:
        for number in range(run.pick(1, 10)):
            fate = Report()
            late = await _terminal(run, fate, fault)
            num_scored += late.requests["ok"]
            num_answers += late.requests["ok"] + late.codes.total()
            report.figures += fate.figures if number == 0 or fate.failures() else []
    report.add_zero("numbers after a fault that stays", num_scored, num_answers)


async def _passing(run: Run, report: Report) -> None:
    """Captions that are at fault among others, and batches that fail without anyone's fault."""
    accused: list[str] = []
    innocent, guilty, source = Tally(), Tally(), random.Random(7)
    flags = ("--a-ms", "4", "--faults", "0.5" if run.plant else "0.1", "--seed", "7", *run.server_plant("lone-faults"))
    async with oracle(*flags, core=run.core, max_queue_tokens=str(1 << 22), score_cache_bytes="0") as server:
        pool, asker = server.pool(), Asker(seed=5, max_captions=12, forms=("base64", "multipart", "groups"))
        before, ends = await settled(server), time.monotonic() + run.pick(1.5, 600.0)

        async def work(worker: int) -> None:
            while time.monotonic() < ends:
                if source.random() >= _GUILTY_SHARE:
                    await innocent.ask(pool, asker.next(f"w{worker}"))
                    continue
                poison = source.choice(list(_CODES))
                answer = await guilty.ask(pool, _with(asker, poison))
                if answer is not None and answer.error_code != _CODES[poison]:
                    accused.append(f"{poison} was answered with {answer.error_code}")

        await asyncio.gather(*(work(worker) for worker in range(_NUM_WORKERS)))
        after = await settled(server)
        pool.close()
    report.add("guilty requests with another code", accused or 0, not accused)
    harmed = innocent.num_sent - innocent.requests["ok"]
    report.add_zero("innocent requests harmed", harmed + innocent.requests["lost"], innocent.num_sent)
    report.add_tally(innocent)
    report.add("guilty requests by code", dict(sorted(guilty.codes.items())))
    report.add_zero("guilty requests that got a number", guilty.requests["ok"], guilty.num_sent)
    num_split, num_full = (grown(before, after, *name) for name in (("reward_batches_total", "split"), ("reward_out_of_memory_total",)))
    report.add("batches that failed and were split", f"{num_split:.0f}, {num_full:.0f} times out of memory")
    innocent.requests.update(guilty.requests)
    innocent.items.update(guilty.items)
    report.add_conservation(before, after, innocent)


def _with(asker: Asker, poison: str) -> Asked:
    captions = [*asker.unique_captions(3), poison]
    asker.random.shuffle(captions)
    return asker.of(captions, name="guilty")


async def _terminal(run: Run, report: Report, fault: str) -> Tally:
    """A fault that stays, under load: until the process is gone. Returns what came of requests sent after the answer that told of it."""
    tally, late, seen, asker = Tally(), Tally(), list[float](), Asker(seed=9, max_captions=8, forms=("base64",))
    patience_s = 1.0 if run.plant else 5.0
    async with oracle("--a-ms", "30", *run.server_plant("unrecognised"), core=run.core, max_batch_s="1") as server:
        pool, ends = server.pool(), time.monotonic() + 20

        async def work(worker: int) -> None:
            while (
                time.monotonic() < ends
                and not late.num_wrong
                and not any(each.requests["unreached"] or each.num_lost for each in (tally, late))
            ):
                await (late if guilty.codes else tally).ask(pool, asker.next(f"w{worker}"))

        guilty = Tally()
        working = [asyncio.create_task(work(worker)) for worker in range(16)]
        await asyncio.sleep(0.2)
        await guilty.ask(pool, asker.of([fault], name="guilty"))
        began = time.monotonic()
        await _until_not_ready(pool, seen, began + patience_s)
        await asyncio.gather(*working)
        code = await server.wait(patience_s)
        pool.close()
    name = fault.strip("<>")
    allowed = {"device_fault", "device_hung"}
    report.add_zero(f"{name}: wrong numbers", tally.num_wrong + late.num_wrong, tally.num_right + tally.num_wrong + late.num_wrong)
    codes = {*tally.codes, *late.codes}
    report.add(
        f"{name}: answered with",
        {**guilty.codes, **tally.codes, **late.codes},
        set(guilty.codes) == {_TERMINAL[fault]} and codes <= allowed,
    )
    report.add(f"{name}: exit code", code, code == DeviceBroken.exit_code)
    report.add(f"{name}: cut off as the port closed", tally.num_lost + late.num_lost)
    took = seen[0] if seen else None
    report.add(f"{name}: answer to not ready", "never" if took is None else f"{took:.2f} s", took is not None)
    report.add(f"{name}: not ready within a second", took is not None and took < 1, took is not None and took < 1, is_timed=True)
    return late


async def _until_not_ready(pool: Pool, seen: list[float], latest: float) -> None:
    began = time.monotonic()
    while time.monotonic() < latest:
        if not await is_ready(pool):
            seen.append(time.monotonic() - began)
            return
        await asyncio.sleep(0.02)


FAULTS = Scenario(
    "T16",
    "device faults: passing, of one caption, and such that stay",
    {"lone-faults": "innocent requests harmed", "unrecognised": "numbers after a fault that stays"},
    run,
)
