"""Admission, the two threads of the batch loop, and draining. Knows neither HTTP nor torch; `dispatch` decides.

No linger timer: as soon as the device is free it takes what waits, and the next batch gathers meanwhile. The device never waits
for the event loop. Every job that is submitted ends in scores or an error, whatever dies.
"""

from __future__ import annotations

import asyncio
import logging
import math
import random
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

from app.contracts import EncodedGroup, Job, Scorer, Scores
from app.dispatch import Answer, Batch, Dispatch, Outcome
from app.errors import ApiError, DeadlineExceeded, Draining, NonfiniteScore, OutOfMemory, Overloaded, ScoringFailed, TooManyTokens
from app.metrics import Metrics

log = logging.getLogger("punchline.batching")
_MAX_RETRY_AFTER_S = 30


class Admission:
    """The budget of accepted and unanswered work, in captions and tokens. Safe across threads."""

    def __init__(self, *, max_items: int, max_tokens: int, metrics: Metrics) -> None:
        self._max_items = max_items
        self.max_tokens = max_tokens
        self._metrics = metrics
        self._lock = threading.Lock()
        self._items = 0
        self._tokens = 0
        self.tokens_per_s = 0.0  # measured by the batcher; 0 until the first batch

    def reserve(self, num_items: int) -> Reservation:
        """Room for captions; tokens are added once the image header is known. Raises Overloaded."""
        self._take(num_items, 0)
        return Reservation(self, num_items)

    def _take(self, num_items: int, num_tokens: int) -> None:
        with self._lock:
            if self._items + num_items > self._max_items or self._tokens + num_tokens > self.max_tokens:
                raise Overloaded("the queue is full", retry_after_s=self._retry_after_s())
            self._items += num_items
            self._tokens += num_tokens
            self._publish()

    def _give(self, num_items: int, num_tokens: int) -> None:
        with self._lock:
            self._items -= num_items
            self._tokens -= num_tokens
            self._publish()

    def _publish(self) -> None:
        self._metrics.queue_items.set(self._items)
        self._metrics.queue_tokens.set(self._tokens)

    def _retry_after_s(self) -> int:
        """Seconds until half the queue is done, jittered so that callers do not come back as one."""
        wait = self._tokens / self.tokens_per_s / 2 if self.tokens_per_s else 1.0
        return min(_MAX_RETRY_AFTER_S, max(1, math.ceil(wait * random.uniform(0.75, 1.5))))  # noqa: S311 (jitter, not a secret)


class Reservation:
    """A share of the admission budget; released once, by leaving the `with` block. Several threads may add to it."""

    def __init__(self, admission: Admission, num_items: int) -> None:
        self._admission = admission
        self._lock = threading.Lock()
        self._open = True
        self._num_items = num_items
        self._num_tokens = 0

    def add_tokens(self, num_tokens: int) -> None:
        """Raises Overloaded when the tokens do not fit beside those of others, TooManyTokens when they never could.

        Once released it raises DeadlineExceeded: a thread that comes late takes nothing that nobody would give back.
        """
        with self._lock:
            if not self._open:
                raise DeadlineExceeded("nobody waits for this request any more")
            if self._num_tokens + num_tokens > self._admission.max_tokens:
                raise TooManyTokens(f"the request has more than {self._admission.max_tokens} tokens; send fewer captions at a time")
            self._admission._take(0, num_tokens)
            self._num_tokens += num_tokens

    def settle(self, bound: int, num_tokens: int) -> None:
        """Give back what an upper bound took too much, now that the true number is known.

        A group that is cut repeats its prefix and may cost more than the bound: what is missing is taken as by `add_tokens`.
        """
        if num_tokens > bound:
            self.add_tokens(num_tokens - bound)
            return
        with self._lock:
            if self._open:
                self._admission._give(0, bound - num_tokens)
                self._num_tokens -= bound - num_tokens

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        with self._lock:
            if self._open:
                self._admission._give(self._num_items, self._num_tokens)
            self._open = False


@dataclass(frozen=True, slots=True)
class _Ran:
    """A batch that came through the device: what became of it and what it took."""

    batch: Batch
    seconds: float
    results: Sequence[Scores] = ()  # none when it failed as a whole
    outcomes: Sequence[Outcome] = ()

    @property
    def num_nonfinite(self) -> int:
        refused = [scores for scores, outcome in zip(self.results, self.outcomes, strict=True) if isinstance(outcome, NonfiniteScore)]
        return sum(not math.isfinite(value) for scores in refused for value in scores.values)


class Batcher:
    """Runs waiting jobs through the scorer, batch after batch: one thread makes ready, another owns the device.

    Both wait on conditions of one lock, which guards `_dispatch` and what is told; futures are set on the event loop only.
    """

    def __init__(
        self,
        scorer: Scorer,
        *,
        max_batch_tokens: int,
        admission: Admission,
        metrics: Metrics,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._scorer = scorer
        self._admission = admission
        self._metrics = metrics
        self._clock = clock
        self._dispatch = Dispatch(max_batch_tokens)
        self._lock = threading.Lock()
        self._to_prepare = threading.Condition(self._lock)
        self._to_run = threading.Condition(self._lock)
        self._loop: asyncio.AbstractEventLoop | None = None  # while the threads live
        self._num_told = 0  # answers on their way to the event loop
        self._idle = asyncio.Event()
        self._idle.set()
        self._will_wake = False
        self._closed = False
        metrics.queue_oldest_age.set_function(self._oldest_age_s)

    async def __aenter__(self) -> Self:
        self._loop = asyncio.get_running_loop()
        for name, step in (("prepare", self._prepare_next), ("device", self._run_next)):
            threading.Thread(target=self._live, args=(step,), name=name).start()
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Drain: take nothing new, finish what was taken, stop the threads. Cancelled meanwhile, it fails what is left.

        A forward that still runs does not block the event loop: its thread ends behind it, and nobody hears of its scores.
        """
        self._closed = True
        try:
            if self.alive:
                await self._idle.wait()
        finally:
            with self._lock:
                left = self._end()
            self._refuse(left, lambda: Draining("the server stopped", retry_after_s=5))

    @property
    def alive(self) -> bool:
        return self._loop is not None

    def submit(self, group: EncodedGroup, deadline: float) -> Job:
        """Queue a group; its `future` gets scores or an ApiError. Raises Draining, ScoringFailed when a thread is dead."""
        if self._closed:
            raise Draining("the server is stopping", retry_after_s=5)
        loop = asyncio.get_running_loop()
        job = Job(group, loop.create_future(), deadline, self._clock())
        with self._lock:
            if not self.alive:
                raise ScoringFailed("the batch loop is not running")
            self._dispatch.add(job)
        self._idle.clear()
        if not self._will_wake:  # at the end of this turn of the event loop: what is submitted together goes together
            self._will_wake = True
            loop.call_soon(self._wake)
        return job

    def _wake(self) -> None:
        self._will_wake = False
        with self._lock:
            self._notify()

    def _live(self, step: Callable[[], bool]) -> None:
        """A thread's whole life. Whatever ends it ends the loop, and nothing else: SystemExit included."""
        try:
            while step():
                pass
        except BaseException as error:
            log.critical("the %s thread of the batch loop died", threading.current_thread().name, exc_info=error)
            with self._lock:
                if self._loop is not None:
                    self._loop.call_soon_threadsafe(self._refuse, self._end(), lambda: ScoringFailed("the batch loop died"))

    def _prepare_next(self) -> bool:
        batch = self._next_to_prepare()
        if batch is None:
            return False
        try:
            prepared = self._scorer.prepare(batch.groups)
        except Exception as error:
            self._fail(batch, error)
            return True
        with self._lock:
            self._dispatch.ready(prepared)
            self._notify()
        return True

    def _next_to_prepare(self) -> Batch | None:
        with self._lock:
            while self._loop is not None:
                if self._dispatch.wants_plan:
                    planned = self._dispatch.plan(self._clock())
                    if planned.answers or planned.batch is None:
                        self._tell(planned.answers)
                    if planned.batch is not None:
                        return planned.batch
                else:
                    self._to_prepare.wait()
        return None

    def _run_next(self) -> bool:
        work = self._next_to_run()
        if work is None:
            return False
        batch, prepared = work
        began = self._clock()
        try:
            results = self._scorer.score(prepared)
            outcomes = batch.check(results)
        except Exception as error:
            self._fail(batch, error, began)
            return True
        seconds = self._busy_since(began)
        with self._lock:
            self._tell(self._dispatch.succeed(batch, outcomes, began + seconds), _Ran(batch, seconds, results, outcomes))
        return True

    def _next_to_run(self) -> tuple[Batch, Any] | None:
        with self._lock:
            while self._loop is not None:
                work = self._dispatch.start(self._clock())
                if work is not None:
                    self._notify()
                    return work
                self._to_run.wait()
        return None

    def _fail(self, batch: Batch, error: Exception, began: float | None = None) -> None:
        """A batch failed while it was made ready, or on the device since `began`."""
        self._count(batch, error)
        seconds = 0.0 if began is None else self._busy_since(began)
        now = self._clock()
        with self._lock:
            self._tell(self._dispatch.fail(batch, error, now), _Ran(batch, seconds) if began is not None else None)

    def _count(self, batch: Batch, error: Exception) -> None:
        if isinstance(error, OutOfMemory):
            self._metrics.out_of_memory.inc()
        if batch.can_halve(error):
            log.warning("a batch of %d groups failed (%s); splitting it", len(batch.pieces), type(error).__name__)
            self._metrics.batches.labels("split").inc()
        else:
            log.error("scoring failed for a group of %d captions", len(batch.pieces[0].group.rows), exc_info=error)
            self._metrics.batches.labels("failed").inc()

    def _busy_since(self, began: float) -> float:
        seconds = self._clock() - began
        self._metrics.device_busy.inc(seconds)
        return seconds

    def _tell(self, answers: Sequence[Answer], ran: _Ran | None = None) -> None:
        """Under the lock, after each step: wake who can go on, send the event loop what it has to know."""
        self._notify()
        if self._loop is not None:
            self._num_told += 1
            self._loop.call_soon_threadsafe(self._deliver, answers, ran)

    def _notify(self) -> None:
        """Under the lock, after anything changed."""
        if self._dispatch.wants_plan:
            self._to_prepare.notify()
        if self._dispatch.wants_start:
            self._to_run.notify()

    def _end(self) -> list[Job]:
        """Under the lock: both threads end as soon as they are free. Returns the jobs that have no answer yet."""
        self._loop = None
        self._to_prepare.notify()
        self._to_run.notify()
        return self._dispatch.close()

    def _deliver(self, answers: Sequence[Answer], ran: _Ran | None) -> None:
        """On the event loop."""
        for answer in answers:
            _resolve(answer.job, answer.outcome)
        with self._lock:
            self._num_told -= 1
            is_idle = self._dispatch.is_idle and not self._num_told
        if is_idle:
            self._idle.set()
        for answer in answers:
            if answer.job.started:
                self._metrics.stage_duration.labels("queue").observe(answer.job.started - answer.job.arrived)
        if ran is not None:
            self._metrics.stage_duration.labels("forward").observe(ran.seconds)
            if ran.outcomes:
                self._measure(ran)

    def _measure(self, ran: _Ran) -> None:
        scored = [outcome for outcome in ran.outcomes if isinstance(outcome, Scores)]
        computed = sum(outcome.num_computed_tokens for outcome in scored)
        self._metrics.batches.labels("ok").inc()
        self._metrics.batch_items.observe(sum(len(piece.group.rows) for piece in ran.batch.pieces))
        self._metrics.batch_tokens.observe(computed)
        self._metrics.tokens.labels("computed").inc(computed)
        self._metrics.tokens.labels("cached").inc(sum(outcome.num_cached_tokens for outcome in scored))
        self._metrics.tokens.labels("requested").inc(sum(outcome.num_tokens for outcome in scored))
        self._metrics.nonfinite.inc(ran.num_nonfinite)
        if ran.seconds > 0 and computed:
            old = self._admission.tokens_per_s
            self._admission.tokens_per_s = 0.8 * old + 0.2 * computed / ran.seconds if old else computed / ran.seconds

    def _refuse(self, jobs: Sequence[Job], make_error: Callable[[], ApiError]) -> None:
        """On the event loop, when the threads have ended: nobody may wait for ever."""
        for job in jobs:
            _resolve(job, make_error())
        self._idle.set()

    def _oldest_age_s(self) -> float:
        now = self._clock()
        with self._lock:
            return now - min((job.arrived for job in self._dispatch.not_started), default=now)


def _resolve(job: Job, outcome: Outcome) -> None:
    if job.future.done():  # its caller has gone
        return
    if isinstance(outcome, ApiError):
        job.future.set_exception(outcome)
    else:
        job.future.set_result(outcome)
