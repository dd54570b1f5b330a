"""What waits, what is made ready, what runs: the decisions of the batch loop. Knows no threads, no event loop, no clock, no torch.

Its caller holds a lock, says what happened, and hands out the answers. A batch that fails is halved until what is at fault is
alone; a group that was cut for want of memory is put together again.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from app.contracts import EncodedGroup, Job, Scores
from app.errors import ApiError, DeadlineExceeded, DoesNotFit, NonfiniteScore, OutOfMemory, ScoringFailed
from app.planning import Filling, plan_batch, some_rows

Outcome = Scores | ApiError
_NUM_WAITING = 64
_MAX_GIVEN_UP = 1 / 16  # of a batch: to compute less for nobody is not worth making it ready twice


@dataclass(frozen=True, slots=True, eq=False)
class Piece:
    """What of a job goes to the device together: the whole group, or some of its captions where memory ran out."""

    job: Job
    group: EncodedGroup
    first_row: int = 0

    def halves(self) -> tuple[Piece, ...]:
        """Two pieces of about as many captions."""
        num_rows = len(self.group.rows)
        half = num_rows // 2
        first, second = some_rows(self.group, 0, half), some_rows(self.group, half, num_rows)
        return Piece(self.job, first, self.first_row), Piece(self.job, second, self.first_row + half)


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """Pieces that go to the device together."""

    pieces: tuple[Piece, ...]

    @property
    def groups(self) -> list[EncodedGroup]:
        return [piece.group for piece in self.pieces]

    @property
    def share_given_up(self) -> float:
        """Of its captions, those that nobody waits for any more."""
        num_rows = [len(piece.group.rows) for piece in self.pieces]
        return sum(rows for rows, piece in zip(num_rows, self.pieces, strict=True) if piece.job.future.done()) / sum(num_rows)

    def check(self, results: Sequence[Scores]) -> list[Outcome]:
        """Scores of the right number, all finite, or the error in their place.

        Raises ScoringFailed when groups are missing, NonfiniteScore when one of several has a score that is not finite: what stood
        beside it is scored again without it, to rule out that it spread.
        """
        if len(results) != len(self.pieces):
            raise ScoringFailed(f"{len(self.pieces)} groups went in, {len(results)} came out", code="internal_shape")
        outcomes = [_checked(len(piece.group.rows), scores) for piece, scores in zip(self.pieces, results, strict=True)]
        if len(self.pieces) > 1 and (fault := next((each for each in outcomes if isinstance(each, NonfiniteScore)), None)):
            raise fault
        return outcomes

    def can_halve(self, error: Exception) -> bool:
        """Whether what is at fault is not alone yet; for want of memory a group is halved by its captions too."""
        return len(self.pieces) > 1 or (isinstance(error, OutOfMemory) and len(self.pieces[0].group.rows) > 1)

    def halves(self) -> tuple[Batch, Batch]:
        pieces = self.pieces if len(self.pieces) > 1 else self.pieces[0].halves()
        half = len(pieces) // 2
        return Batch(pieces[:half]), Batch(pieces[half:])


@dataclass(frozen=True, slots=True, eq=False)
class Answer:
    """How a job ends."""

    job: Job
    outcome: Outcome


@dataclass(frozen=True, slots=True)
class Next:
    """A batch to be made ready, if any, and the answers of jobs that waited past their deadline."""

    batch: Batch | None
    answers: tuple[Answer, ...]


class Dispatch:
    """Every job added is answered exactly once: by `succeed` or `fail`, as expired by `plan`, or by its caller after `close`.

    Only jobs whose future is done are dropped instead: nobody waits for them.
    """

    def __init__(self, max_batch_tokens: int) -> None:
        self._max_batch_tokens = max_batch_tokens
        self._waiting: list[Job] = []
        self._num_waiting_max = _NUM_WAITING  # before those that nobody waits for are looked for
        self._filling = Filling(max_batch_tokens)  # at least what the waiting jobs fill, kept as they come; the true plan decides
        self._due: list[Batch] = []  # halves of what failed, the next one first
        self._preparing: Batch | None = None
        self._ready: tuple[Batch, Any] | None = None
        self._running: Batch | None = None
        self._done: dict[Job, dict[int, Scores]] = {}  # of jobs that were planned: scores so far, by first row

    @property
    def is_idle(self) -> bool:
        return not (self._waiting or self._due or self._preparing or self._ready or self._running)

    @property
    def wants_plan(self) -> bool:
        """Whether a batch should be made ready now.

        Behind a batch that runs, only what fails again or is full already: whoever comes meanwhile may still join the rest.
        """
        if self._preparing or self._ready:
            return False
        return bool(self._due) or (self._filling.is_full if self._running else bool(self._waiting))

    @property
    def wants_start(self) -> bool:
        return self._ready is not None and self._running is None

    @property
    def not_started(self) -> list[Job]:
        """Jobs that have not come to the device and that somebody waits for."""
        batches = [self._preparing, self._ready[0] if self._ready else None]
        planned = [piece.job for batch in batches if batch for piece in batch.pieces]
        return [job for job in (*planned, *self._waiting) if not job.future.done()]

    def add(self, job: Job) -> None:
        if len(self._waiting) >= self._num_waiting_max:  # those given up hold pictures, and no budget counts them any more
            self._wait([each for each in self._waiting if not each.future.done()])
            self._num_waiting_max = max(_NUM_WAITING, 2 * len(self._waiting))
        self._waiting.append(job)
        self._filling.take(job.group)

    def plan(self, now: float) -> Next:
        """Take the batch to be made ready next; end it by `ready` or `fail`."""
        while self._due and not self._preparing:
            self._preparing = self._wanted(self._due.pop(0))
        expired = () if self._preparing else self._plan_waiting(now)
        late = tuple(Answer(job, DeadlineExceeded("the deadline passed while waiting for the device")) for job in expired)
        return Next(self._preparing, late)

    def _wanted(self, batch: Batch) -> Batch | None:
        """Without the jobs that were answered or given up since."""
        gone = [piece.job for piece in batch.pieces if piece.job.future.done()]
        for job in gone:
            self._done.pop(job, None)
        pieces = tuple(piece for piece in batch.pieces if piece.job in self._done)
        return Batch(pieces) if pieces else None

    def _plan_waiting(self, now: float) -> tuple[Job, ...]:
        plan = plan_batch(self._waiting, self._max_batch_tokens, now)
        if self._running and not plan.is_full:  # then nobody was left, and all go on waiting
            self._wait(plan.batch)
            return plan.expired
        self._wait(plan.waiting)
        if plan.batch:
            self._done.update((job, {}) for job in plan.batch)
            self._preparing = Batch(tuple(Piece(job, job.group) for job in plan.batch))
        return plan.expired

    def _wait(self, jobs: Sequence[Job]) -> None:
        self._waiting = list(jobs)
        self._filling = Filling(self._max_batch_tokens)
        for job in jobs:
            self._filling.take(job.group)

    def ready(self, prepared: Any) -> None:
        """The batch that was planned is ready for the device."""
        if self._preparing is not None:
            self._ready = (self._preparing, prepared)
            self._preparing = None

    def start(self, now: float) -> tuple[Batch, Any] | None:
        """The batch that goes to the device now, if one is ready; end it by `succeed` or `fail`.

        Where a good part of it is for nobody any more, it is made ready again without that part instead.
        """
        if not self.wants_start or self._ready is None:
            return None
        (batch, prepared), self._ready = self._ready, None
        if batch.share_given_up >= _MAX_GIVEN_UP:
            self._due.insert(0, batch)
            return None
        self._running = batch
        for piece in batch.pieces:
            piece.job.started = piece.job.started or now
        return batch, prepared

    def succeed(self, batch: Batch, outcomes: Sequence[Outcome], now: float) -> list[Answer]:
        """The answers of the jobs that are now complete."""
        self._leave(batch)
        answers = [self._add(piece, outcome, now) for piece, outcome in zip(batch.pieces, outcomes, strict=True)]
        return [answer for answer in answers if answer is not None]

    def fail(self, batch: Batch, error: Exception, now: float) -> list[Answer]:
        """Of a batch that failed while it was made ready or ran: its halves are due next; what is alone is answered."""
        self._leave(batch)
        if batch.can_halve(error):
            self._due[:0] = batch.halves()
            return []
        answer = self._add(batch.pieces[0], _blame(error), now)
        return [answer] if answer is not None else []

    def close(self) -> list[Job]:
        """Forget everything; the jobs that were not answered."""
        left = [*self._done, *self._waiting]
        self._waiting, self._due, self._done = [], [], {}
        self._preparing = self._ready = self._running = None
        self._filling = Filling(self._max_batch_tokens)
        return left

    def _leave(self, batch: Batch) -> None:
        if batch is self._running:
            self._running = None
        elif batch is self._preparing:
            self._preparing = None

    def _add(self, piece: Piece, outcome: Outcome, now: float) -> Answer | None:
        """The job's answer once it is complete or at fault; None for what is answered already."""
        parts = self._done.get(piece.job)
        if parts is None:
            return None
        piece.job.finished = now
        if isinstance(outcome, Scores):
            parts[piece.first_row] = outcome
            if sum(len(scores.values) for scores in parts.values()) < piece.job.num_items:
                return None
            outcome = _joined(parts)
        del self._done[piece.job]
        return Answer(piece.job, outcome)


def _checked(num_rows: int, scores: Scores) -> Outcome:
    if len(scores.values) != num_rows:
        return ScoringFailed("the model returned a wrong number of scores", code="internal_shape")
    if not all(map(math.isfinite, scores.values)):
        return NonfiniteScore("the model returned a score that is not finite")
    return scores


def _blame(error: Exception) -> ApiError:
    """What the client is told; without the trace, whose frames would hold on to tensors."""
    if isinstance(error, OutOfMemory):
        return DoesNotFit("one caption alone does not fit into the memory of the device")
    return error.with_traceback(None) if isinstance(error, ApiError) else ScoringFailed("the forward pass failed")


def _joined(parts: dict[int, Scores]) -> Scores:
    """One group's scores again, in the order of its captions."""
    if len(parts) == 1:
        return next(iter(parts.values()))
    ordered = [parts[first_row] for first_row in sorted(parts)]
    return Scores(
        tuple(value for scores in ordered for value in scores.values),
        sum(scores.num_tokens for scores in ordered),
        sum(scores.num_computed_tokens for scores in ordered),
        sum(scores.num_cached_tokens for scores in ordered),
    )
