"""Admission, the batch loop, the one device thread, and draining. Knows neither HTTP nor torch.

No linger timer: as soon as the device is free it takes what waits, and the next batch gathers meanwhile. Every job that is
submitted ends in scores or an error, whatever dies.
"""

from __future__ import annotations

import asyncio
import logging
import math
import random
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import Self

from app.contracts import EncodedGroup, Job, Scorer, Scores
from app.errors import ApiError, DeadlineExceeded, Draining, NonfiniteScore, Overloaded, ScoringFailed, TooManyTokens
from app.metrics import Metrics
from app.planning import plan_batch

log = logging.getLogger("punchline.batching")
_MAX_RETRY_AFTER_S = 30
Outcome = Scores | ApiError


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
        """Give back what an upper bound took too much, now that the true number is known."""
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


class Batcher:
    """Runs waiting jobs through the scorer, batch after batch, on one thread of its own."""

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
        self._max_batch_tokens = max_batch_tokens
        self._admission = admission
        self._metrics = metrics
        self._clock = clock
        self._waiting: list[Job] = []
        self._running: tuple[Job, ...] = ()
        self._arrival = asyncio.Event()
        self._idle = asyncio.Event()
        self._idle.set()
        self._device = ThreadPoolExecutor(1, thread_name_prefix="device")
        self._loop: asyncio.Task[None] | None = None
        self._closed = False
        metrics.queue_oldest_age.set_function(self._oldest_age_s)

    async def __aenter__(self) -> Self:
        self._loop = asyncio.create_task(self._run(), name="batch loop")
        self._loop.add_done_callback(self._fail_pending)
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Drain: take nothing new, finish what was taken, stop the thread. Cancelled meanwhile, it fails what is left."""
        self._closed = True
        try:
            if self.alive:
                await self._idle.wait()
        finally:
            await self._stop()

    async def _stop(self) -> None:
        if self._loop is not None:
            self._loop.cancel()
            await asyncio.gather(self._loop, return_exceptions=True)
        self._device.shutdown(wait=False, cancel_futures=True)  # a forward still running must not block the event loop

    @property
    def alive(self) -> bool:
        return self._loop is not None and not self._loop.done()

    def submit(self, group: EncodedGroup, deadline: float) -> Job:
        """Queue a group; its `future` gets scores or an ApiError. Raises Draining, ScoringFailed when the loop is dead."""
        if self._closed:
            raise Draining("the server is stopping", retry_after_s=5)
        if not self.alive:
            raise ScoringFailed("the batch loop is not running")
        job = Job(group, asyncio.get_running_loop().create_future(), deadline, self._clock())
        self._waiting.append(job)
        self._idle.clear()
        self._arrival.set()
        return job

    async def _run(self) -> None:
        while True:
            await self._arrival.wait()
            self._arrival.clear()
            while batch := self._next_batch():
                await self._execute(batch)
            self._idle.set()

    def _next_batch(self) -> tuple[Job, ...]:
        plan = plan_batch(self._waiting, self._max_batch_tokens, self._clock())
        self._waiting = list(plan.waiting)
        for job in plan.expired:
            job.future.set_exception(DeadlineExceeded("the deadline passed while waiting for the device"))
        self._running = plan.batch
        return plan.batch

    async def _execute(self, batch: tuple[Job, ...]) -> None:
        began = self._clock()
        for job in batch:
            job.started = began
        groups = [job.group for job in batch]
        outcomes = await asyncio.get_running_loop().run_in_executor(self._device, self._on_device, groups)
        ended = self._clock()
        for job, outcome in zip(batch, outcomes, strict=True):
            job.finished = ended
            self._resolve(job, outcome)
        self._running = ()
        self._measure(batch, outcomes, ended - began)

    def _on_device(self, groups: list[EncodedGroup]) -> list[Outcome]:
        """On the device thread. What ends the loop leaves as RuntimeError: SystemExit or a cancellation would stop more than it."""
        try:
            return self._score(groups)
        except BaseException as error:
            raise RuntimeError(f"the device thread met {type(error).__name__}") from error

    def _score(self, groups: list[EncodedGroup]) -> list[Outcome]:
        """A batch that fails is halved until the group at fault is alone."""
        try:
            outcomes = self._checked(groups, self._scorer.score(groups))
            self._metrics.batches.labels("ok").inc()
            return outcomes
        except Exception as error:
            if len(groups) == 1:
                log.exception("scoring failed for a group of %d captions", len(groups[0].rows))
                self._metrics.batches.labels("failed").inc()
                return [error if isinstance(error, ApiError) else ScoringFailed("the forward pass failed")]
            log.warning("a batch of %d groups failed (%s); splitting it", len(groups), type(error).__name__)
        self._metrics.batches.labels("split").inc()
        half = len(groups) // 2
        return self._score(groups[:half]) + self._score(groups[half:])

    def _checked(self, groups: Sequence[EncodedGroup], results: Sequence[Scores]) -> list[Outcome]:
        """Scores of the right number, all finite, or the error in their place."""
        if len(results) != len(groups):
            raise ScoringFailed(f"{len(groups)} groups went in, {len(results)} came out", code="internal_shape")
        return [self._outcome(len(group.rows), scores) for group, scores in zip(groups, results, strict=True)]

    def _outcome(self, num_rows: int, scores: Scores) -> Outcome:
        if len(scores.values) != num_rows:
            return ScoringFailed("the model returned a wrong number of scores", code="internal_shape")
        num_nonfinite = sum(not math.isfinite(value) for value in scores.values)
        if num_nonfinite:
            self._metrics.nonfinite.inc(num_nonfinite)
            return NonfiniteScore("the model returned a score that is not finite")
        return scores

    def _resolve(self, job: Job, outcome: Outcome) -> None:
        if job.future.done():  # its caller has gone
            return
        if isinstance(outcome, ApiError):
            job.future.set_exception(outcome)
        else:
            job.future.set_result(outcome)

    def _measure(self, batch: Sequence[Job], outcomes: Sequence[Outcome], seconds: float) -> None:
        scored = [outcome for outcome in outcomes if isinstance(outcome, Scores)]
        computed = sum(outcome.num_computed_tokens for outcome in scored)
        self._metrics.batch_items.observe(sum(job.num_items for job in batch))
        self._metrics.batch_tokens.observe(computed)
        self._metrics.tokens.labels("computed").inc(computed)
        self._metrics.tokens.labels("requested").inc(sum(outcome.num_tokens for outcome in scored))
        self._metrics.stage_duration.labels("forward").observe(seconds)
        for job in batch:
            self._metrics.stage_duration.labels("queue").observe(job.started - job.arrived)
        if seconds > 0 and computed:
            old = self._admission.tokens_per_s
            self._admission.tokens_per_s = 0.8 * old + 0.2 * computed / seconds if old else computed / seconds

    def _fail_pending(self, loop: asyncio.Task[None]) -> None:
        """The loop has ended: nobody may wait for ever."""
        died = not loop.cancelled()
        if died:
            log.critical("the batch loop died", exc_info=loop.exception())
        for job in (*self._running, *self._waiting):
            self._resolve(job, ScoringFailed("the batch loop died") if died else Draining("the server stopped", retry_after_s=5))
        self._waiting, self._running = [], ()
        self._idle.set()

    def _oldest_age_s(self) -> float:
        now = self._clock()
        return now - min((job.arrived for job in self._waiting if not job.future.done()), default=now)
