"""Our own client against the oracle: no score may be another's, and every picture is sent once."""

from __future__ import annotations

import asyncio
import random
import time

from app.client import AsyncRewardClient
from tests.load.processes import oracle
from tests.load.scenario import Report, Run, Scenario, settled
from tests.load.truth import draw, expected

_NUM_WORKERS, _NUM_PICTURES, _MAX_CAPTIONS = 64, 500, 64


async def run(run: Run) -> Report:
    report, num_items = Report(), 8_000 if run.plant else int(run.pick(20_000, 1_000_000))
    pictures = [draw(seed) for seed in range(50 if run.plant else run.pick(50, _NUM_PICTURES))]
    flags = run.server_plant("swap-rows", "neighbour")
    async with oracle(*flags, core=run.core, max_queue_tokens=str(1 << 22), max_queue_items="100000") as server:
        left, num_right, num_wrong, num_requests = num_items, 0, 0, 0

        async def work(client: AsyncRewardClient, worker: int) -> None:
            nonlocal left, num_right, num_wrong, num_requests
            source = random.Random(worker)
            while left > 0:
                picture, size = source.choice(pictures), min(left, source.randint(1, _MAX_CAPTIONS))
                left -= size
                captions = [f"caption {source.randrange(10**6)} of worker {worker}" for _ in range(size)]
                found = await client.score(picture.data, captions)
                agree = sum(one == other for one, other in zip(found, expected(picture, None, tuple(captions)), strict=True))
                num_right, num_wrong, num_requests = num_right + agree, num_wrong + size - agree, num_requests + 1

        began = time.monotonic()
        async with AsyncRewardClient(f"http://127.0.0.1:{server.port}", num_requests=_NUM_WORKERS) as client:
            await asyncio.gather(*(work(client, worker) for worker in range(_NUM_WORKERS)))
        seconds = time.monotonic() - began
        sent = int((await settled(server))['reward_requests_total{endpoint="/images",outcome="ok"}'])
    report.add_zero("wrong items", num_wrong, num_right + num_wrong)
    report.add("pictures sent, of", f"{sent:,} of {len(pictures):,}", sent == len(pictures))
    report.add("captions a second", f"{num_items / seconds:,.0f} in {num_requests:,} requests", is_timed=True)
    return report


CLIENTS = Scenario(
    "client",
    "our client: 64 tasks, groups of 1-64 captions, every picture sent once",
    dict.fromkeys(("swap-rows", "neighbour"), "wrong items"),
    run,
)
