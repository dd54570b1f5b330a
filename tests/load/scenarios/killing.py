"""T6: kill -9 under load, a successor on the same port. Clients that try again get every answer, and no wrong one."""

from __future__ import annotations

import asyncio
import random
import signal
import statistics
import time
from dataclasses import dataclass, field

from tests.load.asking import Asked, Asker
from tests.load.processes import free_port, oracle
from tests.load.scenario import Report, Run, Scenario
from tests.load.scenarios.draining import is_ready
from tests.load.tally import Tally
from tests.load.wire import Answer, Lost, Pool, Unreached

_NUM_WORKERS = 16
_GIVE_UP_S = 60.0


@dataclass(slots=True)
class Kills:
    tally: Tally = field(default_factory=Tally)
    num_asked: int = 0
    num_answered: int = 0
    num_retries: int = 0
    num_zeros: int = 0  # captions that a careless client would have trained on
    seconds: list[float] = field(default_factory=list)  # from the start of a successor until it is ready
    is_over: bool = False


async def ask_until_answered(pool: Pool, asked: Asked, kills: Kills) -> Answer | None:
    """As our client does: again after a lost connection or a 503, nothing else is taken for an answer."""
    until = time.monotonic() + _GIVE_UP_S
    while time.monotonic() < until:
        try:
            answer = await pool.ask(asked.as_bytes())
            if answer.status != 503:
                return answer
        except (Lost, Unreached):
            pass
        kills.num_retries += 1
        await asyncio.sleep(random.uniform(0.02, 0.1))
    return None


async def ask_carelessly(pool: Pool, asked: Asked, kills: Kills) -> Answer | None:
    """As trainers do that take a failed request for a reward of zero."""
    try:
        return await pool.ask(asked.as_bytes())
    except (Lost, Unreached):
        kills.num_zeros += asked.num_items
        await asyncio.sleep(0.05)
        return None


async def run(run: Run) -> Report:
    kills, report, asker, port = Kills(), Report(), Asker(seed=13, max_captions=16, forms=("base64", "multipart", "groups")), free_port()
    ask, source, pool = ask_carelessly if run.plant == "zeros" else ask_until_answered, random.Random(13), Pool(port)

    async def work(worker: int) -> None:
        while not kills.is_over:
            asked = asker.next(f"w{worker}")
            kills.num_asked += 1
            answer = await ask(pool, asked, kills)
            if answer is not None:
                kills.num_answered += 1
                kills.tally.note(asked, answer)

    working: list[asyncio.Task[None]] = []
    num_kills = int(run.pick(2, 20))
    for number in range(num_kills + 1):
        began = time.monotonic()
        async with oracle("--a-ms", "20", core=run.core, port=port) as server:
            while not await is_ready(pool):  # noqa: ASYNC110 (another process)
                await asyncio.sleep(0.01)
            kills.seconds.append(time.monotonic() - began)
            working = working or [asyncio.create_task(work(worker)) for worker in range(_NUM_WORKERS)]
            await asyncio.sleep(source.uniform(0.3, 0.8))
            kills.is_over = number == num_kills
            if kills.is_over:
                await asyncio.gather(*working)
            server.signal(signal.SIGKILL)
    pool.close()
    _judge(report, kills, num_kills)
    return report


def _judge(report: Report, kills: Kills, num_kills: int) -> None:
    wrong = kills.tally.num_wrong + kills.num_zeros
    report.add_zero("wrong items", wrong, kills.tally.num_right + wrong)
    report.add_zero("requests never answered", kills.num_asked - kills.num_answered, kills.num_asked)
    report.add("requests by outcome", dict(kills.tally.requests), set(kills.tally.requests) == {"ok"})
    report.add("tried again", f"{kills.num_retries} times over {num_kills} kills")
    report.add(
        "start to ready, median / longest", f"{statistics.median(kills.seconds):.1f} / {max(kills.seconds):.1f} s (oracle: no weights)"
    )
    report.shown += kills.tally.shown


KILLING = Scenario("T6", "kill -9 under load, a successor on the same port", {"zeros": "wrong items"}, run)
