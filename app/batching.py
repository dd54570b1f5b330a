"""The two threads of the batch loop, and draining. Knows neither HTTP nor torch; `dispatch` decides.

No linger timer: as soon as the device is free it takes what waits, and the next batch gathers meanwhile. The device never waits
for the event loop. Every job that is submitted ends in scores or an error, whatever dies.
"""

from __future__ import annotations

import asyncio
import logging
import math
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

from app.admission import Admission
from app.contracts import EncodedGroup, Job, Scorer, Scores
from app.dispatch import Answer, Batch, Dispatch, Outcome
from app.errors import (
    ApiError,
    DeviceBroken,
    DeviceFault,
    DeviceHung,
    Draining,
    NonfiniteScore,
    OutOfMemory,
)
from app.metrics import Metrics

log = logging.getLogger("punchline.batching")
_WATCH_S = 0.25  # between two looks at the threads


@dataclass(frozen=True, slots=True)
class _Ran:
    """A batch that came through the device: what became of it and what it took."""

    batch: Batch
    seconds: float
    results: Sequence[Scores] = ()  # none when it failed as a whole
    outcomes: Sequence[Outcome] = ()

    @property
    def num_nonfinite(self) -> Counter[str]:
        """By model."""
        found = zip(self.batch.pieces, self.results, self.outcomes, strict=True)
        refused = [(piece.group.model, scores) for piece, scores, outcome in found if isinstance(outcome, NonfiniteScore)]
        return Counter(model for model, scores in refused for value in scores.values if not math.isfinite(value))


class Batcher:
    """Runs waiting jobs through the scorer, batch after batch: one thread makes ready, another owns the device.

    Both wait on conditions of one lock, which guards `_dispatch` and what is told; futures are set on the event loop only. A task on
    the event loop watches them. After a fault that cannot be trusted away (`DeviceBroken`) no score leaves any more, whoever waits
    is told, and `broken` tells the server to go.
    """

    def __init__(
        self,
        scorer: Scorer,
        *,
        max_batch_tokens: int,
        admission: Admission,
        metrics: Metrics,
        clock: Callable[[], float] = time.monotonic,
        max_batch_s: float = math.inf,
        max_lone_failures: int = 3,
    ) -> None:
        """`max_batch_s`: a batch that takes longer will never come back.

        `max_lone_failures`: captions in a row that find no memory even alone; then something leaks, or another process took it.
        """
        self._max_lone_failures = max_lone_failures
        self._scorer = scorer
        self.max_batch_s = max_batch_s
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
        self.threads: list[threading.Thread] = []
        self._began: dict[str, float] = {}  # the work each thread is at
        self._num_lone_failures = 0
        self._fault: asyncio.Future[DeviceBroken] | None = None
        self._watcher: asyncio.Task[None] | None = None
        metrics.queue_oldest_age.set_function(self._oldest_age_s)

    async def __aenter__(self) -> Self:
        self._loop = asyncio.get_running_loop()
        self._fault = self._loop.create_future()
        for name, step in (("prepare", self._prepare_next), ("device", self._run_next)):
            # a thread that hangs must not keep the process: nobody can end it
            self.threads.append(threading.Thread(target=self._live, args=(step,), name=name, daemon=True))
            self.threads[-1].start()
        self._watcher = self._loop.create_task(self._watch())
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
            if self._watcher is not None:
                self._watcher.cancel()
            with self._lock:
                left = self._end()
            self._refuse(left, _stopping)
            self._idle.set()

    @property
    def alive(self) -> bool:
        return self._loop is not None

    async def broken(self) -> DeviceBroken:
        """Wait until nothing can be computed any more; returns why."""
        if self._fault is None:
            raise RuntimeError("the batch loop was never started")
        return await asyncio.shield(self._fault)

    async def idle(self) -> None:
        """Wait until nothing is queued or computed."""
        await self._idle.wait()

    def give_up(self, fault: DeviceBroken) -> None:
        """Somebody else saw that no further number can be believed."""
        self._break(fault)

    def refuse_waiting(self) -> None:
        """Send away what has not come to the device; what runs is finished."""
        with self._lock:
            waiting = self._dispatch.not_started
        self._refuse(waiting, _stopping)
        with self._lock:
            self._notify()

    def refuse_all(self) -> None:
        """The time is over: send away what is left, on the device or not. Nobody hears of scores that come later."""
        self._closed = True
        with self._lock:
            left = self._end()
        self._refuse(left, _stopping)
        self._idle.set()

    def submit(self, group: EncodedGroup, deadline: float) -> Job:
        """Queue a group; its `future` gets scores or an ApiError. Raises Draining, DeviceFault when nothing is computed any more."""
        if self._closed:
            raise Draining("the server is stopping", retry_after_s=5)
        loop = asyncio.get_running_loop()
        job = Job(group, loop.create_future(), deadline, self._clock())
        with self._lock:
            if not self.alive:
                raise _fault_of(None)
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

    async def _watch(self) -> None:
        """What the threads cannot say themselves: that one hangs, or is gone."""
        try:
            while self.alive:
                self._look()
                await asyncio.sleep(_WATCH_S)
        except Exception as error:
            self._break(DeviceBroken(f"the watch over the batch loop died ({type(error).__name__})", kind="died"))

    def _look(self) -> None:
        with self._lock:
            earliest = min(self._began.values(), default=math.inf)
        if self._clock() - earliest > self.max_batch_s:
            self._break(DeviceBroken(f"a batch did not come back within {self.max_batch_s:g} s", kind="hang"))
        elif not all(thread.is_alive() for thread in self.threads):
            self._break(DeviceBroken("a thread of the batch loop is gone", kind="died"))
        else:
            self._metrics.heartbeat.set_to_current_time()

    def _live(self, step: Callable[[], bool]) -> None:
        """A thread's whole life. Whatever ends it ends the loop, and nothing else: SystemExit included."""
        name = threading.current_thread().name
        try:
            while step():
                pass
        except DeviceBroken as fault:
            self._break(fault)
        except BaseException as error:
            log.critical("the %s thread of the batch loop died", name, exc_info=error)
            self._break(DeviceBroken(f"the {name} thread of the batch loop died ({type(error).__name__})", kind="died"))

    def _break(self, fault: DeviceBroken) -> None:
        """From any thread: nothing is computed or told any more; whoever waits hears why."""
        with self._lock:
            loop = self._loop
            if loop is None:  # it ended already
                return
            loop.call_soon_threadsafe(self._give_up, self._end(), fault)
        self._metrics.device_faults.labels(fault.kind).inc()
        log.critical("%s; no further score is given", fault)  # last: a log that takes nothing must hold up nobody

    def _give_up(self, jobs: Sequence[Job], fault: DeviceBroken) -> None:
        """On the event loop."""
        if self._fault is not None and not self._fault.done():
            self._fault.set_result(fault)
        self._refuse(jobs, lambda job: DeviceHung(str(fault)) if fault.kind == "hang" and job.started else _fault_of(fault))
        self._idle.set()

    def _prepare_next(self) -> bool:
        batch = self._next_to_prepare()
        if batch is None:
            return False
        try:
            with self._at_work("prepare"):
                prepared = self._scorer.prepare(batch.groups)
        except DeviceBroken:
            raise
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
            with self._at_work("device"):
                results = self._scorer.score(prepared)
            outcomes = batch.check(results)
        except DeviceBroken:
            raise
        except Exception as error:
            self._fail(batch, error, began)
            return True
        self._num_lone_failures = 0
        seconds = self._busy_since(began)
        with self._lock:
            self._tell(self._dispatch.succeed(batch, outcomes, began + seconds), _Ran(batch, seconds, results, outcomes))
        return True

    def _next_to_run(self) -> tuple[Batch, Any] | None:
        with self._lock:
            while self._loop is not None:
                was_ready = self._dispatch.wants_start
                work = self._dispatch.start(self._clock())
                if work is not None:
                    self._notify()
                    return work
                if was_ready:  # nobody waits for it any more
                    self._tell(())
                self._to_run.wait()
        return None

    @contextmanager
    def _at_work(self, thread: str) -> Iterator[None]:
        with self._lock:
            self._began[thread] = self._clock()
        try:
            yield
        finally:
            with self._lock:
                del self._began[thread]

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
            self._mind_memory(error)

    def _mind_memory(self, error: Exception) -> None:
        """Raises DeviceBroken when caption after caption finds no memory even alone."""
        self._num_lone_failures = self._num_lone_failures + 1 if isinstance(error, OutOfMemory) else 0
        if self._num_lone_failures >= self._max_lone_failures:
            raise DeviceBroken(f"{self._num_lone_failures} captions in a row found no memory on the device, each alone", kind="memory")

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
            if answer.job.future.cancelled() and isinstance(answer.outcome, Scores):
                self._metrics.wasted_items.inc(answer.job.num_items)
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
        scored = [
            (piece.group.model, outcome)
            for piece, outcome in zip(ran.batch.pieces, ran.outcomes, strict=True)
            if isinstance(outcome, Scores)
        ]
        computed = sum(outcome.num_computed_tokens for _, outcome in scored)
        self._metrics.batches.labels("ok").inc()
        self._metrics.batch_items.observe(sum(len(piece.group.rows) for piece in ran.batch.pieces))
        self._metrics.batch_tokens.observe(computed)
        for model, outcome in scored:
            self._metrics.tokens.labels(model, "computed").inc(outcome.num_computed_tokens)
            self._metrics.tokens.labels(model, "cached").inc(outcome.num_cached_tokens)
            self._metrics.tokens.labels(model, "requested").inc(outcome.num_tokens)
        for model, number in ran.num_nonfinite.items():
            self._metrics.nonfinite.labels(model).inc(number)
        if ran.seconds > 0 and computed:
            old = self._admission.tokens_per_s
            self._admission.tokens_per_s = 0.8 * old + 0.2 * computed / ran.seconds if old else computed / ran.seconds

    def _refuse(self, jobs: Sequence[Job], make_error: Callable[[Job], ApiError]) -> None:
        """On the event loop: nobody may wait for ever."""
        for job in jobs:
            _resolve(job, make_error(job))

    def _oldest_age_s(self) -> float:
        now = self._clock()
        with self._lock:
            return now - min((job.arrived for job in self._dispatch.not_started), default=now)


def _fault_of(fault: DeviceBroken | None) -> ApiError:
    why = {"hang": "the device hangs", "memory": "the device has no memory left", "died": "the batch loop died", "drift": "scores drifted"}
    return DeviceFault(why.get(fault.kind, "the device broke") if fault else "the batch loop is not running", retry_after_s=5)


def _stopping(_: Job) -> ApiError:
    return Draining("the server is stopping", retry_after_s=5)


def _resolve(job: Job, outcome: Outcome) -> None:
    if job.future.done():  # its caller has gone
        return
    if isinstance(outcome, ApiError):
        job.future.set_exception(outcome)
    else:
        job.future.set_result(outcome)
