"""Open-loop load: requests begin by the clock, whatever became of those before, and latency counts from the intended moment."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence


def moments(rate: float, seconds: float, seed: int = 0) -> Iterator[float]:
    """Poisson arrivals: seconds after the start, until `seconds` are over."""
    source, now = random.Random(seed), 0.0
    while (now := now + source.expovariate(rate)) < seconds:
        yield now


async def arrive(when: Iterator[float], begin: Callable[[float], Awaitable[None]], clock: Callable[[], float] = time.monotonic) -> None:
    """Start `begin(intended moment)` at each moment, wait for all of them at the end."""
    start, running = clock(), set[asyncio.Task[None]]()
    for moment in when:
        if (wait := start + moment - clock()) > 0:
            await asyncio.sleep(wait)
        task = asyncio.ensure_future(begin(start + moment))
        running.add(task)
        task.add_done_callback(running.discard)
        if task.done():
            task.result()
    await asyncio.gather(*running)


def quantile(values: Sequence[float], share: float) -> float:
    """The smallest value that this share of all does not exceed; 0 of none."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else 0.0
