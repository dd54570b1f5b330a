"""The canary: right scores leave no trace but a time, wrong ones take readiness and then the process, trouble of others does neither."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace

import pytest

from app.canary import MAX_CASES, Canary
from app.contracts import EncodedGroup, Scores
from app.golden import GoldenCase
from tests.loop_fakes import (
    NAN,
    PATIENCE_S,
    RAISE,
    Bench,
    FakeClock,
    FaultyScorer,
    GatedScorer,
    batching,
    captions_of,
    expected,
    group_of,
    turns,
    until,
)

pytestmark = pytest.mark.anyio


class DriftingScorer(FaultyScorer):
    """The oracle plus an error that the test sets; every score takes `took_s` of a fake clock."""

    def __init__(self, clock: FakeClock | None = None, took_s: float = 0.0) -> None:
        super().__init__()
        self.error = 0.0
        self.fails = False
        self._clock = clock or FakeClock()
        self._took_s = took_s

    def score(self, prepared: tuple[EncodedGroup, ...]) -> list[Scores]:
        self._clock.now += self._took_s
        if self.fails:
            raise ValueError("a passing fault")
        return [replace(scores, values=tuple(value + self.error for value in scores.values)) for scores in super().score(prepared)]

    @property
    def asked(self) -> list[list[str]]:
        return [captions_of(call) for call in self.calls]


class Naps:
    """Sleeps that end when the test says so."""

    def __init__(self) -> None:
        self.asked: list[float] = []
        self._end = asyncio.Queue[None]()

    async def __call__(self, seconds: float) -> None:
        self.asked.append(seconds)
        await self._end.get()

    def end(self) -> None:
        self._end.put_nowait(None)


def cases_of(*groups: EncodedGroup) -> list[GoldenCase]:
    return [GoldenCase(number, group, expected(group)) for number, group in enumerate(groups)]


CASES = cases_of(group_of("a", "one", "two"), group_of("b", "three"))


@asynccontextmanager
async def watching(scorer: FaultyScorer, cases: Sequence[GoldenCase] = CASES) -> AsyncIterator[tuple[Bench, Canary]]:
    async with batching(scorer) as bench:
        yield bench, Canary(bench.batcher, cases, tolerance=1e-4, every_s=30, metrics=bench.metrics)


async def fault_kind(bench: Bench) -> str:
    return (await asyncio.wait_for(bench.batcher.broken(), PATIENCE_S)).kind


async def test_right_scores_are_a_time_and_no_captions_of_anybody() -> None:
    scorer = DriftingScorer()
    async with watching(scorer) as (bench, canary):
        scorer.error = 5e-5
        for _ in range(5):
            await canary.look()
        assert canary.is_well
        assert scorer.asked == [["one"], ["three"], ["two"], ["three"], ["one"]]  # another picture with every look
        assert all(group.fresh for call in scorer.calls for group in call)
        assert bench.sample("reward_golden_drift", case="0") == pytest.approx(5e-5, rel=1e-6)
        assert bench.sample("reward_golden_last_error") == pytest.approx(5e-5, rel=1e-6)
        assert bench.sample("reward_golden_last_success_timestamp_seconds") > 0
        assert bench.sample("reward_items_total", outcome="scored") == 0
        assert bench.queued == (0, 0)


@pytest.mark.parametrize("error", [2e-4, -1.0, float("nan")])
async def test_wrong_twice_is_not_ready_and_three_times_is_the_end(error: float) -> None:
    """A score that is not finite never reaches the canary as a number; it is as wrong as any."""
    scorer = DriftingScorer()
    async with watching(scorer) as (bench, canary):
        scorer.error = error
        seen = []
        for _ in range(3):
            await canary.look()
            seen.append((canary.is_well, bench.batcher.alive))
        assert seen == [(True, True), (False, True), (False, False)]
        assert scorer.asked == [["one"]] * 3  # the same caption again
        assert await fault_kind(bench) == "drift"
        assert bench.sample("reward_device_faults_total", kind="drift") == 1


async def test_one_that_is_right_starts_the_count_anew() -> None:
    scorer = DriftingScorer()
    async with watching(scorer) as (bench, canary):
        for error in (1.0, 1.0, 0.0, 1.0, 1.0, 0.0):
            scorer.error = error
            await canary.look()
        assert canary.is_well
        assert bench.batcher.alive


async def test_drift_is_signed() -> None:
    scorer = DriftingScorer()
    async with watching(scorer) as (bench, canary):
        scorer.error = -0.5
        await canary.look()
        assert bench.sample("reward_golden_drift", case="0") == pytest.approx(-0.5)
        assert bench.sample("reward_golden_last_error") == pytest.approx(0.5)


async def test_a_caption_that_fails_takes_readiness_and_never_the_process() -> None:
    """Whether a device that fails is broken is for the batch loop to say; only a wrong number speaks against numbers."""
    async with watching(DriftingScorer(), cases_of(group_of("a", RAISE))) as (bench, canary):
        for _ in range(6):
            await canary.look()
        assert not canary.is_well
        assert bench.batcher.alive
        assert canary.wait_s == 30  # not once a second for ever


async def test_one_wrong_score_after_failures_is_one_wrong_score() -> None:
    """Failures take readiness; only scores that are wrong, three of them and none right between, end the process."""
    scorer = DriftingScorer()
    async with watching(scorer) as (bench, canary):
        for _ in range(3):
            scorer.fails = True
            await canary.look()
        scorer.fails, scorer.error = False, 1.0
        seen = []
        for _ in range(3):
            await canary.look()
            seen.append(bench.batcher.alive)
        assert seen == [True, True, False]
        assert not canary.is_well


async def test_nan_on_the_device_is_a_miss() -> None:
    async with watching(DriftingScorer(), cases_of(group_of("a", NAN))) as (bench, canary):
        for _ in range(3):
            await canary.look()
        assert await fault_kind(bench) == "drift"


async def test_a_busy_or_stopping_server_is_no_miss() -> None:
    late = FakeClock(now=-1e12)  # its deadline has passed when it is asked
    async with batching(DriftingScorer()) as bench:
        canary = Canary(bench.batcher, CASES, tolerance=1e-4, every_s=30, metrics=bench.metrics, clock=late)
        for _ in range(4):
            await canary.look()
        assert canary.is_well
        assert bench.sample("reward_golden_last_success_timestamp_seconds") == 0
        bench.batcher.refuse_all()
        await canary.look()
        assert canary.is_well


async def test_it_looks_every_so_often_and_sooner_after_a_miss() -> None:
    scorer, naps = DriftingScorer(), Naps()
    async with (
        batching(scorer) as bench,
        Canary(bench.batcher, CASES, tolerance=1e-4, every_s=30, metrics=bench.metrics, sleep=naps) as canary,
    ):
        assert bench.sample("reward_golden_last_success_timestamp_seconds") > 0  # nobody is alarmed before the first look
        for number, error in enumerate((0.0, 1.0, 0.0), start=1):
            await until(lambda number=number: len(naps.asked) == number)  # type: ignore[misc]
            scorer.error = error
            naps.end()
        await until(lambda: len(naps.asked) == 4)
        assert naps.asked == [30, 30, 1, 30]
        assert canary.is_well


@pytest.mark.parametrize(("took_s", "wait_s"), [(0.01, 30), (1.0, 50), (2.0, 100), (50.0, 120)])
async def test_a_slow_device_is_asked_less_often(took_s: float, wait_s: float) -> None:
    """At most a fiftieth of its time, and yet a success within 180 s."""
    clock = FakeClock()
    async with batching(DriftingScorer(clock, took_s), clock=clock) as bench:
        canary = Canary(bench.batcher, CASES, tolerance=1e-4, every_s=30, metrics=bench.metrics, clock=clock)
        await canary.look()
        assert canary.wait_s == pytest.approx(wait_s)


async def test_who_asks_for_scores_goes_first() -> None:
    scorer, naps = GatedScorer(), Naps()
    async with (
        batching(scorer) as bench,
        Canary(bench.batcher, CASES, tolerance=1e-4, every_s=30, metrics=bench.metrics, sleep=naps),
    ):
        job = bench.batcher.submit(group_of("busy", "x"), 1e12)
        await scorer.entered()
        await until(lambda: len(naps.asked) == 1)
        naps.end()
        await turns()
        assert len(scorer.prepared) == 1  # nothing but the job was even made ready
        scorer.let_go(2)
        await job.future
        await until(lambda: len(scorer.prepared) == 2)


async def test_switched_off_it_never_looks() -> None:
    scorer, naps = DriftingScorer(), Naps()
    async with (
        batching(scorer) as bench,
        Canary(bench.batcher, CASES, tolerance=1e-4, every_s=0, metrics=bench.metrics, sleep=naps) as canary,
    ):
        await turns()
        assert canary.is_well
        assert (naps.asked, scorer.calls) == ([], [])
        assert bench.sample("reward_golden_last_success_timestamp_seconds") == 0


async def test_a_stopped_one_holds_nothing_up() -> None:
    scorer, naps = DriftingScorer(), Naps()
    async with (
        batching(scorer) as bench,
        Canary(bench.batcher, CASES, tolerance=1e-4, every_s=30, metrics=bench.metrics, sleep=naps) as canary,
    ):
        await until(lambda: len(naps.asked) == 1)
        canary.stop()
        naps.end()
        await turns()
        assert scorer.calls == []


async def test_a_canary_that_died_is_not_well() -> None:
    async def broken(seconds: float) -> None:
        raise RuntimeError("no clock")

    async with (
        batching(DriftingScorer()) as bench,
        Canary(bench.batcher, CASES, tolerance=1e-4, every_s=30, metrics=bench.metrics, sleep=broken) as canary,
    ):
        await until(lambda: not canary.is_well)
        assert bench.batcher.alive


async def test_no_more_labels_than_a_metric_should_have() -> None:
    cases = cases_of(*(group_of(str(number), "x") for number in range(MAX_CASES + 5)))
    scorer = DriftingScorer()
    async with watching(scorer, cases) as (_, canary):
        for _ in range(MAX_CASES + 1):
            await canary.look()
    assert scorer.calls[MAX_CASES][0].key == ("0", b"")
