"""A golden caption through the real queue every so often: a server that begins to score wrongly says so, and leaves.

Knows the batch loop and what the captions must score; neither HTTP nor torch. What it asks counts as no caption of anybody.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from types import TracebackType
from typing import Self

from app.contracts import EncodedGroup
from app.errors import ApiError, DeadlineExceeded, DeviceBroken, DeviceFault, Draining, NonfiniteScore, Overloaded
from app.golden import GoldenCase
from app.lanes import Queue
from app.metrics import Metrics

log = logging.getLogger("punchline.canary")
MAX_CASES = 32  # labels of a metric
MAX_SHARE = 0.02  # of the device's time
_NOT_READY_AT, _LEAVE_AT = 2, 3  # misses in a row
_AGAIN_S = 1.0  # after a miss: one may be chance
_SLOWEST_S = 120.0  # between two looks, however long one takes; an alert expects a success within 180 s
_DEADLINE_S = 60.0
_NOBODYS_FAULT = (DeadlineExceeded, Draining, DeviceFault, Overloaded)  # say nothing about scores; others watch over these


class Canary:
    """Scores one golden caption after the other, whatever else waits, and compares.

    Twice wrong or failed running: not well, which is not ready. Three times wrong: the batch loop is ended with
    DeviceBroken(kind="drift"). A miss is asked again after a second, the same caption; one that is right starts the count anew.
    """

    def __init__(
        self,
        batcher: Queue,
        cases: Sequence[GoldenCase],
        *,
        tolerance: float,
        every_s: float,
        metrics: Metrics,
        model: str = "",
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        """`every_s`: 0 looks never. Under load it waits for a lull, at most two minutes; a look takes a fiftieth of the device's time.

        `batcher`, `model`: the model's own end of the queue, and its name in metrics.
        """
        self._batcher = batcher
        self._cases = cases[:MAX_CASES]
        self._tolerance = tolerance
        self._every_s = every_s
        self._metrics = metrics
        self._model = model
        self._clock = clock
        self._sleep = sleep
        self._turn = 0
        self._num_misses = 0  # in a row
        self._num_wrong = 0  # of these, scores that were not what they must be
        self._took_s = 0.0  # on the device
        self._task: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        self._metrics.golden_success.labels(self._model)  # 0 while it is switched off
        if self._every_s and self._cases:
            self._metrics.golden_success.labels(self._model).set_to_current_time()  # the self-test has just passed
            self._task = asyncio.get_running_loop().create_task(self._live())
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.stop()

    def stop(self) -> None:
        """Nothing new is asked; what is asked is given up."""
        if self._task is not None:
            self._task.cancel()

    @property
    def is_well(self) -> bool:
        return self._num_misses < _NOT_READY_AT

    @property
    def wait_s(self) -> float:
        """Until the next look."""
        if 0 < self._num_misses <= _LEAVE_AT:
            return min(_AGAIN_S, self._every_s)
        return max(self._every_s, min(_SLOWEST_S, self._took_s / MAX_SHARE))

    async def _live(self) -> None:
        try:
            while self._batcher.alive:
                waited_s = self.wait_s
                await self._sleep(waited_s)
                await self._lull(_SLOWEST_S - waited_s)
                await self.look()
        except Exception:
            self._num_misses = _NOT_READY_AT
            log.critical("the canary died", exc_info=True)

    async def _lull(self, at_most_s: float) -> None:
        """Until nobody else is served, as long as there is time for it: on a slow device one look is a delay that callers feel."""
        if self._num_misses or at_most_s <= 0:
            return
        with suppress(TimeoutError):
            async with asyncio.timeout(at_most_s):
                await self._batcher.idle()

    async def look(self) -> None:
        """Score the caption whose turn it is, and judge."""
        case, row = self._next()
        try:
            job = self._batcher.submit(_alone(case.group, row), self._clock() + _DEADLINE_S)
            scores = await job.future
        except _NOBODYS_FAULT as error:
            log.info("the canary has no answer (%s)", error.code)
        except ApiError as error:
            self._missed(f"{self._item(case)} cannot be scored any more ({error.code})", wrong=isinstance(error, NonfiniteScore))
        else:
            self._took_s = job.finished - job.started
            self._judge(case, row, scores.values[0])

    def _next(self) -> tuple[GoldenCase, int]:
        """All first captions, then all second ones: pictures change with every look."""
        case = self._cases[self._turn % len(self._cases)]
        return case, self._turn // len(self._cases) % len(case.scores)

    def _judge(self, case: GoldenCase, row: int, found: float) -> None:
        drift = found - case.scores[row]
        self._metrics.golden_drift.labels(self._model, str(case.number)).set(drift)
        self._metrics.golden_error.labels(self._model).set(abs(drift))
        if not abs(drift) <= self._tolerance:
            self._missed(f"{self._item(case)} now scores {drift:+.2e} beside what it must, tolerance {self._tolerance:.0e}", wrong=True)
            return
        self._metrics.golden_success.labels(self._model).set_to_current_time()
        if self._num_misses:
            log.warning("%s scores right again", self._item(case))
        self._num_misses = self._num_wrong = 0
        self._turn += 1

    def _item(self, case: GoldenCase) -> str:
        return f"golden item {case.number}" + (f" of {self._model}" if self._model else "")

    def _missed(self, what: str, *, wrong: bool) -> None:
        self._num_misses += 1
        self._num_wrong += wrong
        log.critical("%s; %d in a row", what, self._num_misses)
        if self._num_wrong >= _LEAVE_AT:
            self._batcher.give_up(DeviceBroken(f"{what}, {self._num_wrong} times wrong and never right between", kind="drift"))


def _alone(group: EncodedGroup, row: int) -> EncodedGroup:
    """One row of a group, computed whatever is kept."""
    return replace(group, rows=(group.rows[row],), row_prefixes=group.row_prefixes[row : row + 1], fresh=True)
