"""Which waiting jobs form the next batch: a pure decision, first come first served under a token budget."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from app.contracts import EncodedGroup, Job

PrefixKey = tuple[str, str, bytes, bool]  # model, image id, prompt digest, whether nothing kept is used: such prefixes are computed apart


@dataclass(frozen=True, slots=True)
class Plan:
    """The next batch, the jobs that waited past their deadline, and those that go on waiting. Jobs nobody awaits are dropped."""

    batch: tuple[Job, ...]
    expired: tuple[Job, ...]
    waiting: tuple[Job, ...]
    is_full: bool = False  # the budget is used up, or a job did not fit


def plan_batch(waiting: Sequence[Job], max_tokens: int, now: float) -> Plan:
    """Take jobs from the front; stop at the first that does not fit, so that nobody starves.

    Jobs behind it that share image and prompt with one already taken may still join while they fit: their prefix is free.
    A job larger than the budget runs alone; admission keeps those out.

    Fair: what becomes of a job depends on nothing behind it. Planned again and again while jobs arrive and none leaves, a job
    runs in exactly the batch it would run in had nobody come after it: at the latest in the one after the batches that were
    due to those before it.
    """
    wanted = [job for job in waiting if not job.future.done()]
    expired = tuple(job for job in wanted if job.deadline <= now)
    filling = Filling(max_tokens)
    batch: list[Job] = []
    left: list[Job] = []
    for job in (job for job in wanted if job.deadline > now):
        (batch if filling.take(job.group) else left).append(job)
    return Plan(tuple(batch), expired, tuple(left), filling.is_full)


def split_group(group: EncodedGroup, max_tokens: int) -> list[EncodedGroup]:
    """Cut a group that exceeds the budget into groups that fit, captions in order.

    Raises ValueError when one caption with its prefix does not fit.
    """
    pieces: list[EncodedGroup] = []
    start, used = 0, group.num_prefix
    for index, row in enumerate(group.rows):
        if len(row) > max_tokens:
            raise ValueError(f"a caption and its prefix have {len(row)} tokens, a batch holds {max_tokens}")
        own = len(row) - group.num_prefix
        if used + own > max_tokens:
            pieces.append(some_rows(group, start, index))
            start, used = index, group.num_prefix
        used += own
    return [*pieces, some_rows(group, start, len(group.rows))]


def some_rows(group: EncodedGroup, start: int, stop: int) -> EncodedGroup:
    """The group of these captions only."""
    return replace(group, rows=group.rows[start:stop], row_prefixes=group.row_prefixes[start:stop])


@dataclass(slots=True)
class _Shared:
    """What the jobs of one prefix cost together."""

    num_prefix: int
    num_rows: int = 0
    num_row_tokens: int = 0

    @property
    def num_tokens(self) -> int:
        return self.num_prefix + self.num_row_tokens - self.num_rows * self.num_prefix

    def with_group(self, group: EncodedGroup) -> _Shared:
        num_prefix = min(self.num_prefix, group.num_prefix)
        return _Shared(num_prefix, self.num_rows + len(group.rows), self.num_row_tokens + sum(map(len, group.rows)))


@dataclass(slots=True)
class Filling:
    """A batch in the making, job after job: its tokens, equal prefixes counted once, and whether anything was refused."""

    max_tokens: int
    num_tokens: int = 0
    _refused: bool = False
    _by_prefix: dict[PrefixKey, _Shared] = field(default_factory=dict)

    @property
    def is_full(self) -> bool:
        return self._refused or self.num_tokens >= self.max_tokens

    def take(self, group: EncodedGroup) -> bool:
        """Whether the group joins. The first always does; after a refusal only those whose prefix is already in."""
        key = (group.model, *group.key, group.fresh)
        before = self._by_prefix.get(key)
        if self._refused and before is None:
            return False
        after = (before or _Shared(group.num_prefix)).with_group(group)
        num_tokens = self.num_tokens + after.num_tokens - (before.num_tokens if before else 0)
        if self._by_prefix and num_tokens > self.max_tokens:
            self._refused = True
            return False
        self.num_tokens = num_tokens
        self._by_prefix[key] = after
        return True
