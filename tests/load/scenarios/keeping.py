"""T9: clients that keep connections until their own pool drops them. The server must not close one just as it is used again."""

from __future__ import annotations

import asyncio
import random
from dataclasses import dataclass

from tests.load.asking import Asker
from tests.load.processes import oracle
from tests.load.scenario import Report, Run, Scenario, settled
from tests.load.tally import Tally
from tests.load.wire import Connection, Lost

_POOL_S, _SPREAD_S = 5.0, 0.05  # httpx drops a connection after 5 s; others 15 s and more
_NUM_TOGETHER = 250


@dataclass(slots=True)
class Seen:
    num_tries: int = 0
    num_reset: int = 0  # sent on a kept connection, no answer
    num_closed: int = 0  # the server had closed it before the client's own time was over


async def run(run: Run) -> Report:
    tally, report, seen = Tally(), Report(), Seen()
    keep_alive_s = "5" if run.plant == "short-keep-alive" else "75"  # the shipped default
    async with oracle("--a-ms", "1", core=run.core, keep_alive_s=keep_alive_s, header_timeout_s="5") as server:
        asker, before = Asker(seed=11, num_pictures=4, max_captions=2, forms=("base64",)), await settled(server)
        for _ in range(int(run.pick(1, 40))):
            await asyncio.gather(*(_twice(server.port, asker, tally, seen) for _ in range(_NUM_TOGETHER)))
        report.add_zero(f"resets of requests {_POOL_S:g} s +- {_SPREAD_S * 1000:g} ms after the last", seen.num_reset, seen.num_tries)
        report.add_zero("closed by the server before the client's pool would", seen.num_closed, seen.num_tries)
        report.add_tally(tally)
        if not seen.num_reset:
            report.add_conservation(before, await settled(server), tally)
    return report


async def _twice(port: int, asker: Asker, tally: Tally, seen: Seen) -> None:
    """One request, the pause, another on the same connection."""
    await asyncio.sleep(random.uniform(0, 0.5))
    connection = await Connection.open(port)
    asked = asker.next("first")
    tally.note(asked, await connection.ask(asked.as_bytes()))
    await asyncio.sleep(_POOL_S + random.uniform(-_SPREAD_S, _SPREAD_S))
    seen.num_tries += 1
    if connection.was_closed:
        seen.num_closed += 1
        connection.close()
        return
    asked = asker.next("second")
    try:
        tally.note(asked, await connection.ask(asked.as_bytes()))
    except Lost:
        seen.num_reset += 1
    connection.close()


KEEPING = Scenario(
    "T9",
    "keep-alive race: clients' pools against the server's patience",
    {"short-keep-alive": "closed by the server before the client's pool would"},
    run,
)
