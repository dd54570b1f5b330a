"""T17: steps of a GRPO trainer. Every worker sends all its groups at once and waits at a barrier; none may be served last each time.

One process sends for all of them, one after the other, in another order each step: who comes first by chance is served first.
"""

from __future__ import annotations

import asyncio
import random
import time

from tests.load.arrivals import quantile
from tests.load.asking import Asker
from tests.load.plants import LAST_WORKER
from tests.load.processes import oracle
from tests.load.scenario import Report, Run, Scenario, settled
from tests.load.tally import Tally

_NUM_WORKERS, _NUM_PROMPTS, _GROUP_SIZE = 8, 32, 8
_MIN_JAIN = 0.95
_FIRST = LAST_WORKER.rstrip("-")  # the worker that the plant holds back


def jain(shares: list[float]) -> float:
    """Jain's index: 1 when all have the same, 1/n when one has all."""
    return sum(shares) ** 2 / (len(shares) * sum(share * share for share in shares))


async def run(run: Run) -> Report:
    tally, report, seconds, num_complete = Tally(), Report(), list[float](), 0
    num_steps = 1 if run.plant else int(run.pick(4, 200))
    waited, source = [0.0] * _NUM_WORKERS, random.Random(17)
    flags = ("--a-ms", "5", "--b-ms", "0.1", *run.server_plant("served-last"))
    async with oracle(*flags, core=run.core, max_queue_tokens=str(1 << 22)) as server:
        pool, asker, before = server.pool(), Asker(seed=17, num_pictures=64), await settled(server)

        async def group(worker: int) -> bool:
            name = f"{_FIRST[0]}{worker}"
            answer = await tally.ask(pool, asker.of(asker.unique_captions(_GROUP_SIZE), name=name))
            return answer is not None and answer.status == 200

        async def step(worker: int, began: float) -> int:
            done = await asyncio.gather(*(group(worker) for _ in range(_NUM_PROMPTS)))
            waited[worker] += time.monotonic() - began
            return sum(done)

        for _ in range(num_steps):
            began = time.monotonic()
            num_complete += sum(await asyncio.gather(*(step(worker, began) for worker in source.sample(range(_NUM_WORKERS), _NUM_WORKERS))))
            seconds.append(time.monotonic() - began)
        after = await settled(server)
        pool.close()
    num_groups = num_steps * _NUM_WORKERS * _NUM_PROMPTS
    report.add_zero("groups without scores", num_groups - num_complete, num_groups)
    report.add_tally(tally)
    report.add_conservation(before, after, tally)
    report.add("step, p50 / p95", f"{quantile(seconds, 0.5):.2f} / {quantile(seconds, 0.95):.2f} s of {num_steps}", is_timed=True)
    fairness = jain([1 / each for each in waited])
    report.add("Jain's index over the workers", f"{fairness:.3f}", fairness >= _MIN_JAIN, is_timed=True)
    return report


BURST = Scenario(
    "T17", "GRPO burst: 8 workers, 32 prompts, 8 captions, a barrier each step", {"served-last": "Jain's index over the workers"}, run
)
