"""Places go round the callers, and none is lost when somebody leaves."""

from __future__ import annotations

import asyncio
import random

import pytest

from app.turns import Turns

pytestmark = pytest.mark.anyio


async def test_a_free_place_goes_to_whom_has_least() -> None:
    turns, served, may_go = Turns(2), list[str](), asyncio.Event()

    async def one(caller: str) -> None:
        async with turns.of(caller):
            served.append(caller)
            await may_go.wait()

    tasks = [asyncio.create_task(one(caller)) for caller in "aaaaabbbc"]
    await asyncio.sleep(0)
    assert served == ["a", "a"]
    may_go.set()
    await asyncio.gather(*tasks)
    assert served == ["a", "a", "b", "a", "c", "b", "a", "b", "a"]


@pytest.mark.parametrize("seed", range(20))
async def test_whoever_leaves_at_whatever_moment_the_places_stay(seed: int) -> None:
    source, turns, inside, most = random.Random(seed), Turns(3), 0, 0

    async def one(caller: str) -> None:
        nonlocal inside, most
        async with turns.of(caller):
            inside += 1
            most = max(most, inside)
            try:
                for _ in range(source.randrange(4)):
                    await asyncio.sleep(0)
            finally:
                inside -= 1

    tasks: set[asyncio.Task[None]] = set()
    for _ in range(2000):
        tasks.add(asyncio.create_task(one(source.choice("abcde"))))
        if source.random() < 0.5:
            source.choice(sorted(tasks, key=id)).cancel()
        if source.random() < 0.3:
            await asyncio.sleep(0)
    await asyncio.gather(*tasks, return_exceptions=True)
    assert (inside, most) == (0, 3)
    async with asyncio.timeout(1):
        async with turns.of("x"), turns.of("y"), turns.of("z"):
            waiting = asyncio.create_task(one("w"))
            await asyncio.sleep(0)
            assert not waiting.done()
        await waiting
