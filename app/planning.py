"""Which waiting jobs form the next batch: a pure decision, first come first served under a token budget."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from app.contracts import EncodedGroup, Job

PrefixKey = tuple[str, bytes]


@dataclass(frozen=True, slots=True)
class Plan:
    """The next batch, the jobs that waited past their deadline, and those that go on waiting. Jobs nobody awaits are dropped."""

    batch: tuple[Job, ...]
    expired: tuple[Job, ...]
    waiting: tuple[Job, ...]


def plan_batch(waiting: Sequence[Job], max_tokens: int, now: float) -> Plan:
    """Take jobs from the front; stop at the first that does not fit, so that nobody starves.

    Jobs behind it that share image and prompt with one already taken may still join while they fit: their prefix is free.
    A job larger than the budget runs alone; admission keeps those out.
    """
    wanted = [job for job in waiting if not job.future.done()]
    expired = tuple(job for job in wanted if job.deadline <= now)
    budget = _Budget(max_tokens)
    batch: list[Job] = []
    left: list[Job] = []
    for job in (job for job in wanted if job.deadline > now):
        may_join = not left or budget.knows(job.group.key)
        if may_join and (not batch or budget.fits(job.group)):
            budget.take(job.group)
            batch.append(job)
        else:
            left.append(job)
    return Plan(tuple(batch), expired, tuple(left))


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
            pieces.append(replace(group, rows=group.rows[start:index]))
            start, used = index, group.num_prefix
        used += own
    return [*pieces, replace(group, rows=group.rows[start:])]


@dataclass(slots=True)
class _Shared:
    """What the jobs of one prefix cost together."""

    num_prefix: int
    num_rows: int = 0
    num_row_tokens: int = 0

    @property
    def num_tokens(self) -> int:
        return self.num_prefix + self.num_row_tokens - self.num_rows * self.num_prefix


@dataclass(slots=True)
class _Budget:
    """Tokens of a batch in the making; equal prefixes are counted once."""

    max_tokens: int
    used: int = 0
    by_prefix: dict[PrefixKey, _Shared] = field(default_factory=dict)

    def knows(self, key: PrefixKey) -> bool:
        return key in self.by_prefix

    def fits(self, group: EncodedGroup) -> bool:
        return self.used + self._extra(group) <= self.max_tokens

    def take(self, group: EncodedGroup) -> None:
        self.used += self._extra(group)
        self.by_prefix[group.key] = self._with(group)

    def _extra(self, group: EncodedGroup) -> int:
        before = self.by_prefix.get(group.key)
        return self._with(group).num_tokens - (before.num_tokens if before else 0)

    def _with(self, group: EncodedGroup) -> _Shared:
        before = self.by_prefix.get(group.key, _Shared(group.num_prefix))
        row_tokens = sum(len(row) for row in group.rows)
        prefix = min(before.num_prefix, group.num_prefix)
        return _Shared(prefix, before.num_rows + len(group.rows), before.num_row_tokens + row_tokens)
