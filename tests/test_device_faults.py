"""After a fault that cannot be trusted away: no further number, everyone told at once, and the server told to leave."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

import pytest

from app.admission import Admission
from app.batching import Batcher
from app.contracts import EncodedGroup, Job, Scorer, Scores
from app.errors import ApiError, DeviceBroken, DeviceFault, DeviceHung, Draining
from app.metrics import Metrics
from tests.loop_fakes import HUGE, PATIENCE_S, Bench, FakeClock, FaultyScorer, GatedScorer, captions_of, expected, group_of, sample, until

pytestmark = pytest.mark.anyio
FAR = 1e12
STICKY = "<sticky>"


class BreakableScorer(GatedScorer):
    """A device that breaks for good at a caption, on the device or while a batch is made ready."""

    def __init__(self, *, in_prepare: bool = False) -> None:
        super().__init__()
        self._in_prepare = in_prepare
        self.is_broken = False

    def prepare(self, groups: Sequence[EncodedGroup]) -> tuple[EncodedGroup, ...]:
        if self._in_prepare and STICKY in captions_of(groups):
            raise DeviceBroken("an illegal memory access")
        return super().prepare(groups)

    def score(self, prepared: tuple[EncodedGroup, ...]) -> list[Scores]:
        scores = super().score(prepared)
        if self.is_broken or STICKY in captions_of(prepared):
            self.is_broken = True
            raise DeviceBroken("an illegal memory access")
        return scores


@asynccontextmanager
async def watched(scorer: Scorer, *, max_batch_s: float = 1e9, max_batch_tokens: int = 20) -> AsyncIterator[tuple[Bench, FakeClock]]:
    metrics, clock = Metrics(), FakeClock()
    admission = Admission(max_items=1000, max_tokens=100_000, metrics=metrics)
    batcher = Batcher(scorer, max_batch_tokens=max_batch_tokens, admission=admission, metrics=metrics, clock=clock, max_batch_s=max_batch_s)
    async with batcher:
        yield Bench(batcher, admission, metrics), clock


def submit(bench: Bench, *groups: EncodedGroup) -> list[Job]:
    return [bench.batcher.submit(group, FAR) for group in groups]


async def outcomes(jobs: Sequence[Job]) -> list[Scores | BaseException]:
    return await asyncio.wait_for(asyncio.gather(*(job.future for job in jobs), return_exceptions=True), PATIENCE_S)


async def fault_of(bench: Bench) -> DeviceBroken:
    return await asyncio.wait_for(bench.batcher.broken(), PATIENCE_S)


@pytest.mark.parametrize("in_prepare", [False, True])
async def test_after_a_sticky_fault_no_number_leaves(in_prepare: bool) -> None:
    """The batch before it has its scores; the one that met it, the one made ready and those that wait are told to come back."""
    scorer = BreakableScorer(in_prepare=in_prepare)
    async with watched(scorer) as (bench, _):
        (before,) = submit(bench, group_of("a", "first"))
        await scorer.entered()
        scorer.let_go()
        assert (await before.future).values == expected(before.group)
        jobs = submit(bench, *(group_of(key, STICKY if key == "a" else "innocent") for key in "abcd"))
        scorer.let_go(4)
        found = await outcomes(jobs)
        assert [type(outcome) for outcome in found] == [DeviceFault] * 4
        assert all(isinstance(outcome, ApiError) and outcome.retryable and outcome.status == 503 for outcome in found)
        assert (await fault_of(bench)).kind == "sticky"
        assert not bench.batcher.alive
        with pytest.raises(DeviceFault):
            submit(bench, group_of("e", "late"))
        assert bench.sample("reward_device_faults_total", kind="sticky") == 1


async def test_a_fault_is_not_bisected() -> None:
    """Nothing more is computed on a broken device, not even to find who is guilty."""
    scorer = BreakableScorer()
    async with watched(scorer, max_batch_tokens=1000) as (bench, _):
        jobs = submit(bench, group_of("a", "x", STICKY, "y"), group_of("b", "x"))
        scorer.let_go(10)
        assert [type(outcome) for outcome in await outcomes(jobs)] == [DeviceFault] * 2
    assert len(scorer.calls) == 1


async def test_a_batch_that_hangs_ends_the_wait() -> None:
    """Those on the device hear 504, those behind them 503; what comes from the device afterwards reaches nobody."""
    scorer = GatedScorer()
    async with watched(scorer, max_batch_s=60) as (bench, clock):
        (stuck,) = submit(bench, group_of("a", "stuck"))
        await scorer.entered()
        (behind,) = submit(bench, group_of("b", "behind"))
        clock.now += 59
        await asyncio.sleep(0.6)  # two looks of the watch
        assert bench.batcher.alive
        clock.now += 2
        found = await outcomes([stuck, behind])
        assert [type(outcome) for outcome in found] == [DeviceHung, DeviceFault]
        assert (await fault_of(bench)).kind == "hang"
        scorer.let_go()
        await until(lambda: not any(thread.is_alive() for thread in bench.batcher.threads))
        assert isinstance(stuck.future.exception(), DeviceHung)


async def test_preparation_that_hangs_is_seen_as_well() -> None:
    class Stuck(FaultyScorer):
        def prepare(self, groups: Sequence[EncodedGroup]) -> tuple[EncodedGroup, ...]:
            released.wait_for()
            return super().prepare(groups)

    released = Latch()
    async with watched(Stuck(), max_batch_s=60) as (bench, clock):
        (job,) = submit(bench, group_of("a", "x"))
        await until(lambda: released.is_reached)
        clock.now += 61
        assert isinstance((await outcomes([job]))[0], DeviceFault)
        released.let_go()


async def test_captions_that_find_no_memory_alone_end_the_process_at_the_third() -> None:
    """Two in a row are their own fault; a success between starts the count again."""
    scorer = FaultyScorer()
    async with watched(scorer) as (bench, _):
        for _ in range(2):
            assert [outcome.code for outcome in await outcomes(submit(bench, group_of("a", HUGE))) if isinstance(outcome, ApiError)] == [
                "out_of_memory"
            ]
        assert [type(outcome) for outcome in await outcomes(submit(bench, group_of("b", "fits")))] == [Scores]
        for _ in range(2):
            await outcomes(submit(bench, group_of("a", HUGE)))
        assert bench.batcher.alive
        (last,) = await outcomes(submit(bench, group_of("a", HUGE)))
        assert isinstance(last, DeviceFault)
        assert (await fault_of(bench)).kind == "memory"
        assert bench.sample("reward_out_of_memory_total") == 5


async def test_a_thread_that_died_says_so() -> None:
    class Deadly(FaultyScorer):
        def score(self, prepared: tuple[EncodedGroup, ...]) -> list[Scores]:
            raise SystemExit

    async with watched(Deadly()) as (bench, _):
        await outcomes(submit(bench, group_of("a", "x")))
        fault = await fault_of(bench)
    assert (fault.kind, sample(bench.metrics, "reward_device_faults_total", kind="died")) == ("died", 1)


async def test_the_heart_beats_while_both_threads_live() -> None:
    async with watched(FaultyScorer()) as (bench, _):
        await until(lambda: bench.sample("reward_batcher_heartbeat_timestamp_seconds") > 0)
        first = bench.sample("reward_batcher_heartbeat_timestamp_seconds")
        await until(lambda: bench.sample("reward_batcher_heartbeat_timestamp_seconds") > first)


async def test_a_batch_nobody_waits_for_any_more_is_not_run() -> None:
    scorer = GatedScorer()
    async with watched(scorer) as (bench, _):
        (first,) = submit(bench, group_of("first", "x"))
        await scorer.entered()
        jobs = submit(bench, group_of("a", "yyyyyyy"), group_of("b", "yyyyyyy"))  # full: made ready while the first runs
        await until(lambda: len(scorer.prepared) == 2)
        for job in jobs:
            job.future.cancel()
        scorer.let_go(2)
        await first.future
        (last,) = submit(bench, group_of("c", "z"))
        assert (await last.future).values == expected(last.group)
    assert [captions_of(call) for call in scorer.calls] == [["x"], ["z"]]


async def test_what_waits_can_be_sent_away_and_what_runs_is_finished() -> None:
    scorer = GatedScorer()
    async with watched(scorer) as (bench, _):
        (running,) = submit(bench, group_of("first", "x"))
        await scorer.entered()
        waiting = submit(bench, group_of("a", "yyyyyyy"), group_of("b", "yyyyyyy"), group_of("c", "z"))
        await until(lambda: len(scorer.prepared) == 2)
        bench.batcher.refuse_waiting()
        assert [type(outcome) for outcome in await outcomes(waiting)] == [Draining] * 3
        scorer.let_go()
        assert (await running.future).values == expected(running.group)
    assert len(scorer.calls) == 1  # the drain ended: nothing was left behind


class Latch:
    """Holds a thread until the test lets it go."""

    def __init__(self) -> None:
        self._go, self._here = threading.Event(), threading.Event()

    @property
    def is_reached(self) -> bool:
        return self._here.is_set()

    def wait_for(self) -> None:
        self._here.set()
        self._go.wait(PATIENCE_S)

    def let_go(self) -> None:
        self._go.set()
