"""What a server does to its process while it serves, and undoes: how seldom the collector of cycles looks."""

from __future__ import annotations

import asyncio
import gc
import socket
import weakref
from contextlib import closing, suppress

import pytest

from app.connections import guarded_config
from app.draining import DrainingServer, bind, tidy_seldom
from app.machine import quiet_collector
from tests.fakes import FINGERPRINT, serving

pytestmark = pytest.mark.anyio


class Node:
    itself: Node


def old_cycle() -> weakref.ref[Node]:
    """A cycle that nobody holds, of the generation at which the collector does not look by itself."""
    cycle = Node()
    cycle.itself = cycle
    for _ in range(3):
        gc.collect(1)
    return weakref.ref(cycle)


async def test_old_cycles_are_collected_now_and_then() -> None:
    undo = quiet_collector()
    try:
        gone = old_cycle()
        gc.collect(1)
        assert gone() is not None
        collecting = asyncio.create_task(tidy_seldom(0.01))
        for _ in range(2000):
            if gone() is None:
                break
            await asyncio.sleep(0.01)
        collecting.cancel()
        assert gone() is None
    finally:
        undo()


async def test_the_longer_a_collection_takes_the_later_is_the_next() -> None:
    """Never more than a thousandth of the time: 0.2 s of it once in 200 s, 5 ms as often as was asked for."""
    now, took, pauses = [0.0], iter((0.005, 0.2, 0.02)), list[float]()

    def collect() -> None:
        now[0] += next(took)

    async def sleep(seconds: float) -> None:
        pauses.append(seconds)

    with suppress(StopIteration, RuntimeError):
        await tidy_seldom(30.0, collect, lambda: now[0], sleep)
    assert pauses == pytest.approx([30.0, 30.0, 200.0, 30.0])


async def test_a_server_quiets_the_collector_when_it_is_ready_and_undoes_it_at_its_end() -> None:
    """What is there when it is announced, models and schema, is left out of the collector's looks."""
    before, seen = gc.get_threshold(), list[tuple[int, bool]]()
    async with serving(port=0) as served:

        def announce(_: socket.socket) -> None:
            seen.append((gc.get_freeze_count(), served.app.openapi_schema is not None))
            server.should_exit = True

        config = guarded_config(served.app, served.settings, served.metrics, FINGERPRINT)
        server = DrainingServer(config, served.batcher, notice_s=0.0, drain_s=1.0, begin=lambda: None, announce=announce)
        with closing(bind(served.settings)) as listener:
            await server.serve(sockets=[listener])
    ((num_frozen, has_schema),) = seen
    assert num_frozen > 10_000
    assert has_schema
    assert (gc.get_freeze_count(), gc.get_threshold()) == (0, before)
