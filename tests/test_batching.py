"""The batch loop over fakes: every job ends in its own scores or an error, whatever the device does."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from app.admission import Admission
from app.batching import Batcher
from app.contracts import EncodedGroup, Job, Scores
from app.dispatch import Dispatch
from app.errors import (
    ApiError,
    DeadlineExceeded,
    DeviceFault,
    Draining,
    NonfiniteScore,
    ScoringFailed,
    Unavailable,
)
from app.metrics import Metrics
from tests.loop_fakes import (
    BUSY,
    HUGE,
    INFINITE,
    NAN,
    PATIENCE_S,
    RAISE,
    SHORT,
    UNREADY,
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
FAR = 1e12  # a deadline nobody reaches


def submit(bench: Bench, *groups: EncodedGroup, deadline: float = FAR) -> list[Job]:
    return [bench.batcher.submit(group, deadline) for group in groups]


async def outcomes(jobs: Sequence[Job]) -> list[Scores | BaseException]:
    return await asyncio.wait_for(asyncio.gather(*(job.future for job in jobs), return_exceptions=True), PATIENCE_S)


def assert_scored(outcome: Scores | BaseException, group: EncodedGroup) -> None:
    assert isinstance(outcome, Scores), outcome
    assert outcome.values == expected(group)


async def busy(bench: Bench, scorer: GatedScorer) -> Job:
    """Occupy the device."""
    (job,) = submit(bench, group_of("first", "x"))
    await scorer.entered()
    return job


# Forming batches


async def test_a_group_gets_its_own_scores_and_its_times() -> None:
    async with batching(FaultyScorer()) as bench:
        group = group_of("a", "one", "two", "three")
        (job,) = submit(bench, group)
        assert_scored(await job.future, group)
        assert job.arrived <= job.started <= job.finished


async def test_what_gathers_while_the_device_is_busy_is_one_batch() -> None:
    scorer = GatedScorer()
    async with batching(scorer) as bench:
        first = await busy(bench, scorer)
        groups = [group_of(str(number), f"caption {number}") for number in range(20)]
        jobs = submit(bench, *groups)
        scorer.let_go(2)
        for outcome, group in zip(await outcomes(jobs), groups, strict=True):
            assert_scored(outcome, group)
        await first.future
    assert [len(call) for call in scorer.calls] == [1, 20]
    assert bench.sample("reward_batches_total", outcome="ok") == 2
    assert bench.sample("reward_batch_items_sum") == 21


async def test_jobs_of_one_image_and_prompt_are_one_call() -> None:
    """64 captions of 2 tokens share a prefix of 800: 928 tokens together, 51,328 apart; the budget is 1,000."""
    scorer = GatedScorer()
    async with batching(scorer, max_batch_tokens=1000) as bench:
        await busy(bench, scorer)
        groups = [group_of("a", chr(40 + number), num_prefix=800) for number in range(64)]
        jobs = submit(bench, *groups)
        scorer.let_go(2)
        for outcome, group in zip(await outcomes(jobs), groups, strict=True):
            assert_scored(outcome, group)
    assert [len(call) for call in scorer.calls] == [1, 64]


async def test_jobs_over_the_budget_go_in_order_in_several_batches() -> None:
    scorer = GatedScorer()
    async with batching(scorer, max_batch_tokens=25) as bench:
        await busy(bench, scorer)
        groups = [group_of(str(number), "1234") for number in range(5)]  # 10 tokens each
        jobs = submit(bench, *groups)
        scorer.let_go(4)
        await outcomes(jobs)
    assert [[group.key[0] for group in call] for call in scorer.calls[1:]] == [["0", "1"], ["2", "3"], ["4"]]


async def test_a_group_larger_than_a_batch_still_runs() -> None:
    async with batching(FaultyScorer(), max_batch_tokens=10) as bench:
        large, small = group_of("a", "x" * 50), group_of("b", "x")
        for outcome, group in zip(await outcomes(submit(bench, large, small)), (large, small), strict=True):
            assert_scored(outcome, group)


async def test_each_step_has_one_thread_and_neither_is_the_event_loop() -> None:
    class Watched(FaultyScorer):
        def __init__(self) -> None:
            super().__init__()
            self.preparing: set[int] = set()
            self.scoring: set[int] = set()

        def prepare(self, groups: Sequence[EncodedGroup]) -> tuple[EncodedGroup, ...]:
            self.preparing.add(threading.get_ident())
            return super().prepare(groups)

        def score(self, prepared: tuple[EncodedGroup, ...]) -> list[Scores]:
            self.scoring.add(threading.get_ident())
            return super().score(prepared)

    scorer = Watched()
    async with batching(scorer) as bench:
        for number in range(5):
            await outcomes(submit(bench, *(group_of(str(number), caption) for caption in ("x", RAISE))))
    assert len(scorer.preparing) == len(scorer.scoring) == 1
    assert len(scorer.preparing | scorer.scoring | {threading.get_ident()}) == 3


async def test_what_is_submitted_in_one_turn_of_the_event_loop_goes_together() -> None:
    scorer = FaultyScorer()
    async with batching(scorer) as bench:
        await outcomes(submit(bench, *(group_of("a", chr(40 + number)) for number in range(64))))
    assert [len(call) for call in scorer.calls] == [64]


# Two stages


def tens(*names: str) -> list[EncodedGroup]:
    """Groups of 10 tokens, each of its own image."""
    return [group_of(name, "1234") for name in names]


async def test_a_full_batch_is_made_ready_while_the_device_works() -> None:
    scorer = GatedScorer()
    async with batching(scorer, max_batch_tokens=20) as bench:
        await busy(bench, scorer)
        submit(bench, *tens("a", "b", "c", "d", "e"))
        await until(lambda: len(scorer.prepared) == 2)
        await turns()
        assert [len(call) for call in scorer.prepared] == [1, 2]  # one ahead, no more
        assert len(scorer.calls) == 1
        scorer.let_go(4)
    assert scorer.calls == scorer.prepared


async def test_a_batch_with_room_is_not_made_ready_ahead() -> None:
    """19 tokens wait and 20 fit, so the next caption of the same image still joins."""
    scorer = GatedScorer()
    async with batching(scorer, max_batch_tokens=20) as bench:
        await busy(bench, scorer)
        early = submit(bench, *tens("a"), group_of("b", "123"))
        await turns()
        assert len(scorer.prepared) == 1
        late = submit(bench, group_of("a", ""))
        await until(lambda: len(scorer.prepared) == 2)
        scorer.let_go(2)
        await outcomes([*early, *late])
    assert [len(call) for call in scorer.calls] == [1, 3]


async def test_the_device_does_not_wait_for_the_event_loop() -> None:
    """Four batches and two halves run while the event loop stands still, and every answer is there when it moves again."""
    scorer = GatedScorer()
    async with batching(scorer, max_batch_tokens=23) as bench:
        first = await busy(bench, scorer)
        jobs = submit(bench, *tens("a", "b", "c", "d"), group_of("e", RAISE), *tens("f"))  # 13 tokens and 10 in the last batch
        await turns()
        scorer.let_go(10)
        stand_still_until(lambda: len(scorer.calls) == 6)
        assert not first.future.done()
        found = await outcomes(jobs)
        assert [type(outcome) for outcome in found] == [Scores] * 4 + [ScoringFailed, Scores]


def stand_still_until(reached: Callable[[], bool]) -> None:
    """Block the event loop."""
    for _ in range(int(PATIENCE_S * 1000)):
        if reached():
            return
        time.sleep(0.001)
    raise AssertionError("the device waited")


async def test_a_job_given_up_after_it_was_made_ready_is_left_out() -> None:
    scorer, clock = GatedScorer(), FakeClock()
    async with batching(scorer, max_batch_tokens=20, clock=clock) as bench:
        await busy(bench, scorer)
        gone, late = submit(bench, *tens("gone", "late"), deadline=clock.now + 5)
        await until(lambda: len(scorer.prepared) == 2)
        gone.future.cancel()
        clock.now += 10
        scorer.let_go(2)
        assert_scored(await late.future, late.group)
    assert gone.future.cancelled()
    assert scorer.calls[1] == (late.group,)  # made ready again without the other


async def test_a_small_part_given_up_is_computed_and_counted_as_wasted() -> None:
    """One caption of seventeen: making the batch ready again would cost more."""
    scorer = GatedScorer()
    async with batching(scorer, max_batch_tokens=1000) as bench:
        await busy(bench, scorer)
        gone, stays = submit(bench, group_of("gone", "g"), group_of("stays", *"abcdefghijklmnop"))
        scorer.let_go()
        await until(lambda: len(scorer.calls) == 2)
        gone.future.cancel()
        scorer.let_go()
        assert_scored(await stays.future, stays.group)
        await until(lambda: bench.sample("reward_wasted_items_total") == 1)


async def test_the_seconds_of_the_device_are_counted() -> None:
    """3 s for the batch that fails, nothing for its halves by this clock, 4 s for the next; 10 s of idleness between count nowhere."""
    scorer, clock = GatedScorer(), FakeClock()
    async with batching(scorer, clock=clock) as bench:
        for captions, seconds in (("x", RAISE), 3), (("x", "y"), 4):
            jobs = submit(bench, *(group_of(caption, caption) for caption in captions))
            await scorer.entered()
            clock.now += seconds
            scorer.let_go()
            await outcomes(jobs)
            clock.now += 10
        assert bench.sample("reward_device_busy_seconds_total") == 7
        assert bench.sample("reward_stage_duration_seconds_sum", stage="forward") == 7


async def test_jobs_given_up_do_not_pile_up_where_nothing_is_planned() -> None:
    """They hold pictures, and no budget counts them any more."""
    dispatch, loop = Dispatch(20), asyncio.get_running_loop()
    jobs = [Job(group_of(str(number), "x"), loop.create_future(), FAR, 0.0) for number in range(2000)]
    for job in jobs[:-1]:
        dispatch.add(job)
        job.future.cancel()
    dispatch.add(jobs[-1])
    assert len(dispatch._waiting) <= 64
    assert dispatch.not_started == [jobs[-1]]


async def test_what_stood_beside_a_score_that_is_not_finite_is_scored_again_without_it() -> None:
    scorer = GatedScorer()
    async with batching(scorer, max_batch_tokens=1000) as bench:
        await busy(bench, scorer)
        guilty, innocent = submit(bench, group_of("a", NAN), group_of("b", "fine"))
        scorer.let_go(4)
        with pytest.raises(NonfiniteScore):
            await guilty.future
        assert_scored(await innocent.future, innocent.group)
        assert [captions_of(call) for call in scorer.calls[1:]] == [[NAN, "fine"], [NAN], ["fine"]]
        await until(lambda: bench.sample("reward_nonfinite_total") == 1)


# Faults of the device


@pytest.mark.parametrize("fault", [RAISE, NAN, INFINITE, SHORT, BUSY, UNREADY, HUGE])
@pytest.mark.parametrize("place", [0, 5, 15])
async def test_a_fault_harms_only_the_guilty(fault: str, place: int) -> None:
    scorer = GatedScorer()
    async with batching(scorer) as bench:
        await busy(bench, scorer)
        groups = [group_of(str(number), "fine", fault if number == place else "also fine") for number in range(16)]
        jobs = submit(bench, *groups)
        scorer.let_go(20)  # halves of what was not made ready come to the device for the first time
        found = await outcomes(jobs)
        assert isinstance(found[place], ApiError)
        for number, (outcome, group) in enumerate(zip(found, groups, strict=True)):
            if number != place:
                assert_scored(outcome, group)
        assert bench.batcher.alive
    assert len(scorer.calls) <= 1 + 1 + 2 * 4 + 2 * (fault == HUGE)  # the guilty of 16 is found by 4 halvings, then its captions


@pytest.mark.parametrize(
    ("fault", "kind", "code"),
    [
        (RAISE, ScoringFailed, "scoring_failed"),
        (NAN, NonfiniteScore, "nonfinite_score"),
        (INFINITE, NonfiniteScore, "nonfinite_score"),
        (SHORT, ScoringFailed, "internal_shape"),
        (BUSY, Unavailable, "unavailable"),
        (UNREADY, ScoringFailed, "scoring_failed"),
        (HUGE, ScoringFailed, "out_of_memory"),
    ],
)
async def test_every_fault_has_its_error(fault: str, kind: type[ApiError], code: str) -> None:
    async with batching(FaultyScorer()) as bench:
        (found,) = await outcomes(submit(bench, group_of("a", "fine", fault)))
        assert isinstance(found, kind)
        assert found.code == code
        assert "poisoned" not in found.message
        assert_scored((await outcomes(submit(bench, group_of("a", "fine"))))[0], group_of("a", "fine"))


async def test_nonfinite_scores_are_counted_one_by_one() -> None:
    async with batching(FaultyScorer()) as bench:
        await outcomes(submit(bench, group_of("a", NAN, "fine", INFINITE)))
        assert bench.sample("reward_nonfinite_total") == 2
        assert bench.sample("reward_batches_total", outcome="ok") == 1


async def test_splits_and_failures_are_counted() -> None:
    """[ok ok RAISE ok] fails, [ok ok] runs, [RAISE ok] fails, [RAISE] fails alone, [ok] runs."""
    scorer = GatedScorer()
    async with batching(scorer) as bench:
        await busy(bench, scorer)
        jobs = submit(bench, *(group_of(str(number), RAISE if number == 2 else "ok") for number in range(4)))
        scorer.let_go(2)
        await outcomes(jobs)
        counts = {outcome: bench.sample("reward_batches_total", outcome=outcome) for outcome in ("ok", "split", "failed")}
    assert counts == {"ok": 3, "split": 2, "failed": 1}
    assert [len(call) for call in scorer.calls] == [1, 4, 2, 2, 1, 1]


# Memory


async def test_a_batch_that_does_not_fit_is_halved_and_keeps_its_order() -> None:
    """16 groups of 2 captions, 8 captions fit: 32 and both 16 run out, then four times 8."""
    scorer = FaultyScorer(max_rows=8)
    async with batching(scorer) as bench:
        groups = [group_of(str(number), "one", f"two {number}") for number in range(16)]
        for outcome, group in zip(await outcomes(submit(bench, *groups)), groups, strict=True):
            assert_scored(outcome, group)
        assert bench.sample("reward_out_of_memory_total") == 3
        assert {kind: bench.sample("reward_batches_total", outcome=kind) for kind in ("ok", "split")} == {"ok": 4, "split": 3}
    assert sorted(len(call) for call in scorer.calls) == [4, 4, 4, 4, 8, 8, 16]


async def test_a_group_that_does_not_fit_is_cut_and_put_together_again() -> None:
    scorer = FaultyScorer(max_rows=2)
    async with batching(scorer) as bench:
        whole = group_of("a", *"abcdefg")
        whole = replace(whole, row_prefixes=tuple(range(7)))
        (scores,) = await outcomes(submit(bench, whole))
        assert_scored(scores, whole)
        assert isinstance(scores, Scores)
        assert scores.num_tokens == sum(map(len, whole.rows))
        assert scores.num_computed_tokens == bench.sample("reward_tokens_total", kind="computed")
        assert bench.sample("reward_batch_items_sum") == 7
        assert bench.sample("reward_out_of_memory_total") == 3  # 7, 3 and 4 captions; not 1, 2, 2, 2
    assert {call[0].row_prefixes for call in scorer.calls if len(call[0].rows) <= 2} == {(0,), (1, 2), (3, 4), (5, 6)}


async def test_one_caption_that_does_not_fit_fails_its_own_group() -> None:
    scorer = FaultyScorer(max_rows=4)
    async with batching(scorer) as bench:
        groups = [group_of("a", "x", "y"), group_of("b", "x", HUGE, "z"), group_of("c", "x", "y", "z", "w")]
        found = await outcomes(submit(bench, *groups))
        assert_scored(found[0], groups[0])
        assert_scored(found[2], groups[2])
        assert isinstance(found[1], ScoringFailed)
        assert (found[1].code, found[1].status, found[1].retryable) == ("out_of_memory", 500, False)
        assert bench.batcher.alive


# Wrong answers


class Miscounting(GatedScorer):
    """Returns a group too many or too few, for batches larger than `honest`."""

    def __init__(self, change: Callable[[list[Scores]], list[Scores]], honest: int) -> None:
        super().__init__()
        self._change, self._honest = change, honest

    def score(self, prepared: tuple[EncodedGroup, ...]) -> list[Scores]:
        found = super().score(prepared)
        return found if len(prepared) <= self._honest else self._change(found)


CHANGES = [pytest.param(lambda found: found[:-1], id="too few"), pytest.param(lambda found: [*found, found[0]], id="too many")]


@pytest.mark.parametrize("change", CHANGES)
async def test_a_wrong_number_of_groups_is_never_matched_up(change: Callable[[list[Scores]], list[Scores]]) -> None:
    scorer = Miscounting(change, honest=1)
    async with batching(scorer) as bench:
        await busy(bench, scorer)
        groups = [group_of(str(number), "x") for number in range(5)]
        jobs = submit(bench, *groups)
        scorer.let_go(2)
        for outcome, group in zip(await outcomes(jobs), groups, strict=True):
            assert_scored(outcome, group)


@pytest.mark.parametrize("change", CHANGES)
async def test_a_wrong_number_for_one_group_is_an_error(change: Callable[[list[Scores]], list[Scores]]) -> None:
    scorer = Miscounting(change, honest=0)
    async with batching(scorer) as bench:
        jobs = submit(bench, group_of("a", "x"))
        scorer.let_go()
        (found,) = await outcomes(jobs)
        assert isinstance(found, ScoringFailed)
        assert found.code == "internal_shape"
        assert bench.batcher.alive


async def test_a_scorer_that_returns_nonsense_fails_the_job_and_not_the_loop() -> None:
    class Nonsense(FaultyScorer):
        def score(self, prepared: tuple[EncodedGroup, ...]) -> list[Scores]:
            return [None for _ in prepared]  # type: ignore[misc]

    async with batching(Nonsense()) as bench:
        (found,) = await outcomes(submit(bench, group_of("a", "x")))
        assert isinstance(found, ScoringFailed)
        assert bench.batcher.alive


# Callers that go, and deadlines


async def test_a_caller_that_goes_during_the_forward_disturbs_nobody() -> None:
    scorer = GatedScorer()
    async with batching(scorer) as bench:
        await busy(bench, scorer)
        gone, failed, stays = submit(bench, group_of("a", "x"), group_of("b", RAISE), group_of("c", "x"))
        scorer.let_go()
        assert len(await scorer.entered()) == 3
        gone.future.cancel()
        failed.future.cancel()
        scorer.let_go()
        assert_scored(await stays.future, stays.group)
        assert bench.batcher.alive
    assert gone.future.cancelled()
    assert failed.future.cancelled()


async def test_work_whose_callers_have_gone_is_not_done() -> None:
    scorer = GatedScorer()
    async with batching(scorer) as bench:
        await busy(bench, scorer)
        for job in submit(bench, *(group_of(str(number), "x") for number in range(10))):
            job.future.cancel()
        assert bench.sample("reward_queue_oldest_age_seconds") == 0
        scorer.let_go()
    assert len(scorer.calls) == 1


async def test_a_job_past_its_deadline_is_refused_and_not_computed() -> None:
    scorer, clock = GatedScorer(), FakeClock()
    async with batching(scorer, clock=clock) as bench:
        await busy(bench, scorer)
        late, timely = group_of("late", "x"), group_of("timely", "x")
        jobs = [*submit(bench, late, deadline=clock.now + 5), *submit(bench, timely, deadline=clock.now + 5.1)]
        clock.now += 5
        assert bench.sample("reward_queue_oldest_age_seconds") == 5
        scorer.let_go(2)
        found = await outcomes(jobs)
        assert isinstance(found[0], DeadlineExceeded)
        assert_scored(found[1], timely)
    assert scorer.calls[1] == (timely,)


async def test_a_deadline_that_passes_on_the_device_loses_nothing() -> None:
    scorer, clock = GatedScorer(), FakeClock()
    async with batching(scorer, clock=clock) as bench:
        (job,) = submit(bench, group_of("a", "x"), deadline=clock.now + 1)
        await scorer.entered()
        clock.now += 100
        scorer.let_go()
        assert_scored(await job.future, job.group)
        assert job.finished - job.started == 100


# The end


async def test_draining_answers_everything_and_takes_nothing() -> None:
    scorer = GatedScorer()
    bench_of = batching(scorer, max_batch_tokens=25)
    bench = await bench_of.__aenter__()
    first = await busy(bench, scorer)
    groups = [group_of(str(number), "1234") for number in range(5)]
    jobs = [first, *submit(bench, *groups)]
    leaving = asyncio.create_task(bench_of.__aexit__(None, None, None))
    await turns()
    with pytest.raises(Draining) as refused:
        submit(bench, group_of("z", "x"))
    assert int(refused.value.headers["Retry-After"]) >= 1
    assert not leaving.done()
    scorer.let_go(4)
    await leaving
    assert all(isinstance(outcome, Scores) for outcome in await outcomes(jobs))
    with pytest.raises(Draining):
        submit(bench, group_of("z", "x"))


async def test_draining_finishes_what_is_ready_and_ends_both_threads() -> None:
    scorer = GatedScorer()
    bench_of = batching(scorer, max_batch_tokens=20)
    bench = await bench_of.__aenter__()
    jobs = [await busy(bench, scorer), *submit(bench, *tens("a", "b", "c"))]
    await until(lambda: len(scorer.prepared) == 2)
    scorer.let_go(3)
    await bench_of.__aexit__(None, None, None)
    assert all(isinstance(outcome, Scores) for outcome in await outcomes(jobs))
    await until(lambda: not {"device", "prepare"} & {thread.name for thread in threading.enumerate()})


def test_a_forward_that_outlives_the_event_loop_harms_nothing() -> None:
    """The drain was cut short and the loop is closed; then the device answers."""

    async def leave_at_once() -> tuple[GatedScorer, Job]:
        scorer = GatedScorer()
        bench_of = batching(scorer)
        bench = await bench_of.__aenter__()
        job = await busy(bench, scorer)
        leaving = asyncio.create_task(bench_of.__aexit__(None, None, None))
        await turns()
        leaving.cancel()
        await asyncio.gather(leaving, return_exceptions=True)
        return scorer, job

    scorer, job = asyncio.run(leave_at_once())
    (device,) = [thread for thread in threading.enumerate() if thread.name == "device"]
    scorer.let_go()
    device.join(PATIENCE_S)
    assert not device.is_alive()
    assert isinstance(job.future.exception(), Draining)


async def test_draining_an_idle_batcher_ends_at_once() -> None:
    async with batching(FaultyScorer()) as bench:
        pass
    assert not bench.batcher.alive


async def test_a_batcher_that_was_never_started_takes_nothing() -> None:
    metrics = Metrics()
    admission = Admission(max_items=1, max_tokens=1, metrics=metrics)
    batcher = Batcher(FaultyScorer(), max_batch_tokens=10, admission=admission, metrics=metrics)
    assert not batcher.alive
    with pytest.raises(DeviceFault):
        batcher.submit(group_of("a", "x"), FAR)


async def test_a_drain_that_is_cut_short_still_answers_everyone() -> None:
    """The process was told to leave at once: the jobs left get a retryable error, and the event loop is not blocked."""
    scorer = GatedScorer()
    bench_of = batching(scorer)
    bench = await bench_of.__aenter__()
    jobs = [await busy(bench, scorer), *submit(bench, group_of("a", "x"))]
    leaving = asyncio.create_task(bench_of.__aexit__(None, None, None))
    await turns()
    leaving.cancel()
    with pytest.raises(asyncio.CancelledError):
        await leaving
    found = await outcomes(jobs)
    assert [type(outcome) for outcome in found] == [Draining, Draining]
    assert not bench.batcher.alive
    scorer.let_go()


class Fatal(BaseException):
    """Nothing in the loop is meant to catch this."""


@pytest.mark.parametrize("death", [Fatal, SystemExit, KeyboardInterrupt, asyncio.CancelledError, GeneratorExit])
async def test_when_the_loop_dies_nobody_waits_for_ever(death: type[BaseException]) -> None:
    class Deadly(GatedScorer):
        def score(self, prepared: tuple[EncodedGroup, ...]) -> list[Scores]:
            super().score(prepared)
            raise death

    scorer = Deadly()
    async with batching(scorer) as bench:
        jobs = [await busy(bench, scorer), *submit(bench, group_of("a", "x"), group_of("b", "x"))]
        scorer.let_go()
        found = await outcomes(jobs)
        assert [type(outcome) for outcome in found] == [DeviceFault] * 3
        assert not bench.batcher.alive
        with pytest.raises(DeviceFault, match="not running"):
            submit(bench, group_of("c", "x"))
    assert len(scorer.calls) == 1


@pytest.mark.parametrize("death", [Fatal, SystemExit, KeyboardInterrupt, asyncio.CancelledError, GeneratorExit])
async def test_when_the_preparation_dies_nobody_waits_for_ever(death: type[BaseException]) -> None:
    """Not even the batch on the device, whose scores nobody hears of."""

    class Deadly(GatedScorer):
        def prepare(self, groups: Sequence[EncodedGroup]) -> tuple[EncodedGroup, ...]:
            if self.prepared:
                raise death
            return super().prepare(groups)

    scorer = Deadly()
    async with batching(scorer, max_batch_tokens=20) as bench:
        jobs = [await busy(bench, scorer), *submit(bench, *tens("a", "b", "c"))]
        assert [type(outcome) for outcome in await outcomes(jobs)] == [DeviceFault] * 4
        assert not bench.batcher.alive
        with pytest.raises(DeviceFault, match="not running"):
            submit(bench, group_of("c", "x"))
    scorer.let_go()


async def test_a_drain_ends_when_the_loop_dies_under_it() -> None:
    class Deadly(GatedScorer):
        def score(self, prepared: tuple[EncodedGroup, ...]) -> list[Scores]:
            super().score(prepared)
            raise Fatal

    scorer = Deadly()
    bench_of = batching(scorer)
    bench = await bench_of.__aenter__()
    job = await busy(bench, scorer)
    leaving = asyncio.create_task(bench_of.__aexit__(None, None, None))
    await turns()
    scorer.let_go()
    await asyncio.wait_for(leaving, PATIENCE_S)
    assert isinstance(job.future.exception(), DeviceFault)


async def test_a_fault_while_planning_fails_what_waits() -> None:
    class BrokenClock(FakeClock):
        broken = False

        def __call__(self) -> float:
            if self.broken:
                raise OSError("no clock")
            return super().__call__()

    clock, scorer = BrokenClock(), GatedScorer()
    async with batching(scorer, clock=clock) as bench:
        jobs = [await busy(bench, scorer), *submit(bench, group_of("a", "x"))]
        clock.broken = True
        scorer.let_go()
        assert [type(outcome) for outcome in await outcomes(jobs)] == [DeviceFault] * 2
        assert not bench.batcher.alive


async def test_the_batcher_measures_the_speed() -> None:
    """A group of 5 + 10 tokens in 3 seconds of the clock: 5 tokens a second."""
    scorer, clock = GatedScorer(), FakeClock()
    async with batching(scorer, clock=clock) as bench:
        jobs = submit(bench, group_of("a", "123456789"))
        await scorer.entered()
        clock.now += 3
        scorer.let_go()
        await outcomes(jobs)
        await turns()
        assert bench.admission.tokens_per_s == 5
        assert bench.sample("reward_tokens_total", kind="computed") == 15


# Any order of events


FAULTS = {RAISE, NAN, SHORT, UNREADY, HUGE}
CAPTIONS = st.sampled_from(["a", "bb", "dddd", *sorted(FAULTS)])
GROUPS = st.builds(lambda key, captions: group_of(key, *captions), st.sampled_from("xyz"), st.lists(CAPTIONS, min_size=1, max_size=3))


class LoopMachine(RuleBasedStateMachine):
    """Submissions, cancellations, time and a device that answers when it likes, with the real threads; a virtual clock.

    After every step the loop has settled: a batch stands on the device, or nobody waits. (`test_loop_states` knows each state.)
    """

    @initialize(max_batch_tokens=st.integers(20, 60))
    def start(self, max_batch_tokens: int) -> None:
        self.runner = asyncio.Runner()
        self.budget = max_batch_tokens
        self.clock = FakeClock()
        self.jobs: list[Job] = []
        self.num_resolved: dict[int, int] = {}
        self.on_device: list[Job] = []
        self.came: set[Job] = set()
        self.runner.run(self._start())

    async def _start(self) -> None:
        self.scorer = GatedScorer(max_rows=3)
        self.running = batching(self.scorer, max_batch_tokens=self.budget, clock=self.clock)
        self.bench = await self.running.__aenter__()

    @rule(groups=st.lists(GROUPS, min_size=1, max_size=4), patience=st.sampled_from([1, 5, 1000]))
    def submit(self, groups: list[EncodedGroup], patience: float) -> None:
        self.runner.run(self._submit(groups, patience))

    async def _submit(self, groups: list[EncodedGroup], patience: float) -> None:
        for job in submit(self.bench, *groups, deadline=self.clock.now + patience):
            job.future.add_done_callback(lambda _, job=job: self._resolved(job))  # type: ignore[misc]
            self.jobs.append(job)
        await self._settle()

    def _resolved(self, job: Job) -> None:
        self.num_resolved[id(job)] = self.num_resolved.get(id(job), 0) + 1
        self.check(job)

    @precondition(lambda self: self.jobs)
    @rule(number=st.integers(0, 99))
    def cancel(self, number: int) -> None:
        self.runner.run(self._cancel(self.jobs[number % len(self.jobs)]))

    async def _cancel(self, job: Job) -> None:
        job.future.cancel()
        await turns(3)

    @rule(seconds=st.sampled_from([0.5, 1, 5]))
    def tick(self, seconds: float) -> None:
        self.clock.now += seconds

    @rule()
    def device_answers(self) -> None:
        if self.on_device:  # no precondition: the threads' timing must not change what is drawn
            self.runner.run(self._answer())

    async def _answer(self) -> None:
        self.on_device = []
        self.scorer.let_go()
        await self._settle()

    def check(self, job: Job) -> None:
        """A job ends in its own scores, its own fault, past its deadline without having run, or was given up by its caller."""
        if job.future.cancelled():
            return
        fault = job.future.exception()
        if isinstance(fault, DeadlineExceeded):
            assert job.deadline <= self.clock.now
            assert job not in self.came
            return
        assert (fault is not None) == bool(set(captions_of([job.group])) & FAULTS)
        if fault is None:
            assert job.future.result().values == expected(job.group)

    async def _settle(self) -> None:
        """What failed before may run while this looks on; it ends with the next batch on the device, or with everybody answered."""
        if not self.on_device:
            await until(lambda: self.scorer.num_entered > 0 or all(job.future.done() for job in self.jobs))
            if self.scorer.num_entered:
                self._came(await self.scorer.entered())
        await turns(3)

    def _came(self, groups: tuple[EncodedGroup, ...]) -> None:
        by_group = {id(job.group): job for job in self.jobs}
        batch = [by_group[id(group)] for group in groups]
        assert not self.came & set(batch)
        assert len(batch) == 1 or sum_tokens(batch) <= self.budget
        self.came |= set(batch)
        self.on_device = batch

    @invariant()
    def nobody_is_answered_twice_or_forgotten(self) -> None:
        if hasattr(self, "jobs"):
            self.runner.run(self._count_answers())

    async def _count_answers(self) -> None:
        done = {id(job) for job in self.jobs if job.future.done()}  # an expired one may be told of at any moment
        await turns(2)
        assert set(self.num_resolved.values()) <= {1}
        assert done <= set(self.num_resolved)

    @invariant()
    def the_device_is_never_idle_while_somebody_waits(self) -> None:
        if hasattr(self, "jobs") and not self.on_device:
            assert all(job.future.done() for job in self.jobs)

    def teardown(self) -> None:
        if hasattr(self, "runner"):
            self.runner.run(self._drain())
            self.runner.close()

    async def _drain(self) -> None:
        self.scorer.let_go(len(self.jobs) + 1)
        await asyncio.wait_for(self.running.__aexit__(None, None, None), PATIENCE_S)
        await turns(3)
        assert all(job.future.done() for job in self.jobs)
        await self._count_answers()


def sum_tokens(batch: Sequence[Job]) -> int:
    """All groups here have prefixes of 5: once a key, then the rows' own."""
    own = sum(len(row) - 5 for job in batch for row in job.group.rows)
    return 5 * len({job.group.key for job in batch}) + own


LoopMachine.TestCase.settings = settings(max_examples=50, stateful_step_count=25, deadline=None)
TestLoopMachine = LoopMachine.TestCase
