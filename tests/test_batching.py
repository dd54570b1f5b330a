"""The batch loop over fakes: every job ends in its own scores or an error, whatever the device does."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from app.batching import Admission, Batcher, Reservation
from app.contracts import EncodedGroup, Job, Scores
from app.errors import ApiError, DeadlineExceeded, Draining, NonfiniteScore, Overloaded, ScoringFailed, TooManyTokens, Unavailable
from app.metrics import Metrics
from tests.loop_fakes import (
    BUSY,
    INFINITE,
    NAN,
    PATIENCE_S,
    RAISE,
    SHORT,
    Bench,
    FakeClock,
    FaultyScorer,
    GatedScorer,
    batching,
    expected,
    group_of,
    sample,
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


async def test_the_scorer_is_called_from_one_thread_off_the_event_loop() -> None:
    class Watched(FaultyScorer):
        threads: set[int] = set()  # noqa: RUF012

        def score(self, groups: Sequence[EncodedGroup]) -> list[Scores]:
            self.threads.add(threading.get_ident())
            return super().score(groups)

    scorer = Watched()
    async with batching(scorer) as bench:
        for number in range(5):
            await outcomes(submit(bench, group_of(str(number), "x")))
    assert len(scorer.threads) == 1
    assert threading.get_ident() not in scorer.threads


# Faults of the device


@pytest.mark.parametrize("fault", [RAISE, NAN, INFINITE, SHORT, BUSY])
@pytest.mark.parametrize("place", [0, 5, 15])
async def test_a_fault_harms_only_the_guilty(fault: str, place: int) -> None:
    scorer = GatedScorer()
    async with batching(scorer) as bench:
        await busy(bench, scorer)
        groups = [group_of(str(number), "fine", fault if number == place else "also fine") for number in range(16)]
        jobs = submit(bench, *groups)
        scorer.let_go(2)
        found = await outcomes(jobs)
        assert isinstance(found[place], ApiError)
        for number, (outcome, group) in enumerate(zip(found, groups, strict=True)):
            if number != place:
                assert_scored(outcome, group)
        assert bench.batcher.alive
    assert len(scorer.calls) <= 1 + 1 + 2 * 4  # the guilty of 16 is found by 4 halvings


@pytest.mark.parametrize(
    ("fault", "kind", "code"),
    [
        (RAISE, ScoringFailed, "scoring_failed"),
        (NAN, NonfiniteScore, "nonfinite_score"),
        (INFINITE, NonfiniteScore, "nonfinite_score"),
        (SHORT, ScoringFailed, "internal_shape"),
        (BUSY, Unavailable, "unavailable"),
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


class Miscounting(GatedScorer):
    """Returns a group too many or too few, for batches larger than `honest`."""

    def __init__(self, change: Callable[[list[Scores]], list[Scores]], honest: int) -> None:
        super().__init__()
        self._change, self._honest = change, honest

    def score(self, groups: Sequence[EncodedGroup]) -> list[Scores]:
        found = super().score(groups)
        return found if len(groups) <= self._honest else self._change(found)


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
        def score(self, groups: Sequence[EncodedGroup]) -> list[Scores]:
            return [None for _ in groups]  # type: ignore[misc]

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


async def test_draining_an_idle_batcher_ends_at_once() -> None:
    async with batching(FaultyScorer()) as bench:
        pass
    assert not bench.batcher.alive


async def test_a_batcher_that_was_never_started_takes_nothing() -> None:
    metrics = Metrics()
    admission = Admission(max_items=1, max_tokens=1, metrics=metrics)
    batcher = Batcher(FaultyScorer(), max_batch_tokens=10, admission=admission, metrics=metrics)
    assert not batcher.alive
    with pytest.raises(ScoringFailed):
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
        def score(self, groups: Sequence[EncodedGroup]) -> list[Scores]:
            super().score(groups)
            raise death

    scorer = Deadly()
    async with batching(scorer) as bench:
        jobs = [await busy(bench, scorer), *submit(bench, group_of("a", "x"), group_of("b", "x"))]
        scorer.let_go()
        found = await outcomes(jobs)
        assert [type(outcome) for outcome in found] == [ScoringFailed] * 3
        assert not bench.batcher.alive
        with pytest.raises(ScoringFailed, match="not running"):
            submit(bench, group_of("c", "x"))
    assert len(scorer.calls) == 1


async def test_a_drain_ends_when_the_loop_dies_under_it() -> None:
    class Deadly(GatedScorer):
        def score(self, groups: Sequence[EncodedGroup]) -> list[Scores]:
            super().score(groups)
            raise Fatal

    scorer = Deadly()
    bench_of = batching(scorer)
    bench = await bench_of.__aenter__()
    job = await busy(bench, scorer)
    leaving = asyncio.create_task(bench_of.__aexit__(None, None, None))
    await turns()
    scorer.let_go()
    await asyncio.wait_for(leaving, PATIENCE_S)
    assert isinstance(job.future.exception(), ScoringFailed)


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
        assert [type(outcome) for outcome in await outcomes(jobs)] == [ScoringFailed] * 2
        assert not bench.batcher.alive


# Admission


def admission_of(max_items: int = 10, max_tokens: int = 100) -> tuple[Admission, Metrics]:
    metrics = Metrics()
    return Admission(max_items=max_items, max_tokens=max_tokens, metrics=metrics), metrics


def queued(metrics: Metrics) -> tuple[float, float]:
    return sample(metrics, "reward_queue_items"), sample(metrics, "reward_queue_tokens")


def test_exactly_what_exceeds_the_bound_is_refused() -> None:
    admission, metrics = admission_of(max_items=10)
    taken: list[Reservation] = []
    refused = []
    for _ in range(14):
        try:
            taken.append(admission.reserve(1))
        except Overloaded as error:
            refused.append(error)
    assert (len(taken), len(refused)) == (10, 4)
    assert all(int(error.headers["Retry-After"]) >= 1 for error in refused)
    assert queued(metrics) == (10, 0)
    with taken.pop():
        pass
    admission.reserve(1)
    assert queued(metrics) == (10, 0)


def test_tokens_are_bounded_too() -> None:
    admission, metrics = admission_of(max_tokens=100)
    with admission.reserve(1) as one, admission.reserve(1) as other:
        one.add_tokens(60)
        other.add_tokens(40)
        with pytest.raises(Overloaded):
            other.add_tokens(1)
        assert queued(metrics) == (2, 100)
    assert queued(metrics) == (0, 0)


def test_what_could_never_fit_is_not_told_to_come_back() -> None:
    admission, metrics = admission_of(max_tokens=100)
    with admission.reserve(1) as reservation:
        reservation.add_tokens(60)
        with pytest.raises(TooManyTokens):
            reservation.add_tokens(41)
        assert queued(metrics) == (1, 60)
    assert queued(metrics) == (0, 0)


def test_a_reservation_is_given_back_whatever_happens() -> None:
    admission, metrics = admission_of()

    def fail() -> None:
        with admission.reserve(3) as reservation:
            reservation.add_tokens(50)
            raise ValueError("anything")

    with pytest.raises(ValueError, match="anything"):
        fail()
    assert queued(metrics) == (0, 0)


def test_a_thread_that_comes_late_takes_nothing() -> None:
    admission, metrics = admission_of()
    with admission.reserve(1) as reservation:
        reservation.add_tokens(10)
    with pytest.raises(DeadlineExceeded):
        reservation.add_tokens(10)
    assert queued(metrics) == (0, 0)


def test_a_bound_settles_to_the_true_number() -> None:
    admission, metrics = admission_of(max_tokens=100)
    with admission.reserve(1) as reservation:
        reservation.add_tokens(90)
        reservation.settle(90, 40)
        assert queued(metrics) == (1, 40)
        reservation.add_tokens(60)
        reservation.settle(60, 60)
        assert queued(metrics) == (1, 100)
    assert queued(metrics) == (0, 0)
    reservation.settle(90, 40)  # a thread that comes late gives nothing back twice
    assert queued(metrics) == (0, 0)


def test_threads_that_share_a_reservation_lose_no_tokens() -> None:
    admission, metrics = admission_of(max_items=1, max_tokens=1 << 30)
    with ThreadPoolExecutor(4) as pool, admission.reserve(1) as reservation:
        list(pool.map(lambda _: [reservation.add_tokens(1) for _ in range(2000)], range(4)))
        assert queued(metrics) == (1, 8000)
    assert queued(metrics) == (0, 0)


def test_retry_after_follows_the_measured_speed() -> None:
    """Half of 1000 tokens at 100 a second: 5 s, jittered by 0.75 to 1.5 and rounded up; never above 30 s."""
    admission, _ = admission_of(max_items=1, max_tokens=1000)
    with admission.reserve(1) as reservation:
        reservation.add_tokens(1000)
        seen = set()
        for _ in range(200):
            admission.tokens_per_s = 100.0
            seen.add(retry_after_s(admission))
        assert seen <= set(range(4, 9))
        assert len(seen) > 1
        admission.tokens_per_s = 0.001
        assert retry_after_s(admission) == 30


def retry_after_s(admission: Admission) -> int:
    with pytest.raises(Overloaded) as refused:
        admission.reserve(1)
    return int(refused.value.headers["Retry-After"])


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


CAPTIONS = st.sampled_from(["a", "bb", "dddd", RAISE, NAN, SHORT])
GROUPS = st.builds(lambda key, captions: group_of(key, *captions), st.sampled_from("xyz"), st.lists(CAPTIONS, min_size=1, max_size=3))


class LoopMachine(RuleBasedStateMachine):
    """Submissions, cancellations, time and a device that answers when it likes; a virtual clock.

    The model knows which jobs wait and which are on the device; after every step the loop has settled.
    """

    @initialize(max_batch_tokens=st.integers(20, 60))
    def start(self, max_batch_tokens: int) -> None:
        self.runner = asyncio.Runner()
        self.budget = max_batch_tokens
        self.clock = FakeClock()
        self.jobs: list[Job] = []
        self.num_resolved: dict[int, int] = {}
        self.on_device: list[Job] = []
        self.runner.run(self._start())

    async def _start(self) -> None:
        self.scorer = GatedScorer()
        self.running = batching(self.scorer, max_batch_tokens=self.budget, clock=self.clock)
        self.bench = await self.running.__aenter__()

    def pending(self) -> list[Job]:
        return [job for job in self.jobs if not job.future.done() and job not in self.on_device]

    @rule(group=GROUPS, patience=st.sampled_from([1, 5, 1000]))
    def submit(self, group: EncodedGroup, patience: float) -> None:
        self.runner.run(self._submit(group, patience))

    async def _submit(self, group: EncodedGroup, patience: float) -> None:
        (job,) = submit(self.bench, group, deadline=self.clock.now + patience)
        job.future.add_done_callback(lambda _: self.num_resolved.update({id(job): self.num_resolved.get(id(job), 0) + 1}))
        self.jobs.append(job)
        await self._settle()

    @precondition(lambda self: any(not job.future.done() for job in self.jobs))
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        job = data.draw(st.sampled_from([job for job in self.jobs if not job.future.done()]))
        self.runner.run(self._cancel(job))

    async def _cancel(self, job: Job) -> None:
        job.future.cancel()
        await turns(3)

    @rule(seconds=st.sampled_from([0.5, 1, 5]))
    def tick(self, seconds: float) -> None:
        self.clock.now += seconds

    @precondition(lambda self: self.on_device)
    @rule()
    def device_answers(self) -> None:
        self.runner.run(self._answer())

    async def _answer(self) -> None:
        waiting = self.pending()
        batch, self.on_device = self.on_device, []
        self.scorer.let_go()
        await outcomes(batch)
        for job in batch:
            self.check(job)
        await self._settle()
        for job in waiting:
            if job.future.done() and not job.future.cancelled():
                assert isinstance(job.future.exception(), DeadlineExceeded)
                assert job.deadline <= self.clock.now

    def check(self, job: Job) -> None:
        """A job that ran ends in its own scores, its own fault, or was given up by its caller."""
        if job.future.cancelled():
            return
        captions = {bytes(row[5:-1].tolist()).decode() for row in job.group.rows}
        fault = job.future.exception()
        assert (fault is not None) == bool(captions & {RAISE, NAN, SHORT})
        if fault is None:
            assert job.future.result().values == expected(job.group)

    async def _settle(self) -> None:
        """Once the device is free: the next batch comes to it if somebody can still be served; else nobody waits any more.

        The device thread takes its own time, so this waits for the loop's next step, not for a number of turns.
        """
        if not self.on_device:
            if any(job.deadline > self.clock.now for job in self.pending()):
                self._came(await self.scorer.entered())
            else:
                await until(lambda: not self.pending())
        await turns(3)

    def _came(self, groups: tuple[EncodedGroup, ...]) -> None:
        by_group = {id(job.group): job for job in self.jobs}
        batch = [by_group[id(group)] for group in groups]
        able = [job for job in self.pending() if job.deadline > self.clock.now]
        assert batch[0] is able[0]
        assert all(job in able for job in batch)
        assert len(batch) == 1 or sum_tokens(batch) <= self.budget
        self.on_device = batch

    @invariant()
    def nobody_is_answered_twice_or_forgotten(self) -> None:
        for job in getattr(self, "jobs", []):
            assert self.num_resolved.get(id(job), 0) == int(job.future.done())

    @invariant()
    def the_device_is_never_idle_while_somebody_waits(self) -> None:
        if hasattr(self, "jobs") and not self.on_device:
            assert not [job for job in self.pending() if job.deadline > self.clock.now]

    def teardown(self) -> None:
        if hasattr(self, "runner"):
            self.runner.run(self._drain())
            self.runner.close()

    async def _drain(self) -> None:
        self.scorer.let_go(len(self.jobs) + 1)
        await asyncio.wait_for(self.running.__aexit__(None, None, None), PATIENCE_S)
        assert all(job.future.done() for job in self.jobs)
        for job in self.jobs:
            if not job.future.cancelled() and not isinstance(job.future.exception(), DeadlineExceeded):
                self.check(job)


def sum_tokens(batch: Sequence[Job]) -> int:
    """All groups here have prefixes of 5: once a key, then the rows' own."""
    own = sum(len(row) - 5 for job in batch for row in job.group.rows)
    return 5 * len({job.group.key for job in batch}) + own


LoopMachine.TestCase.settings = settings(max_examples=50, stateful_step_count=25, deadline=None)
TestLoopMachine = LoopMachine.TestCase
