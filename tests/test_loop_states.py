"""Every state the loop can be in: dispatch, planner, caches and the scorer that reuses, driven step by step with a virtual clock.

No threads: what the two threads and the event loop would do is a rule each, so that hypothesis may put them in any order.
"""

from __future__ import annotations

import hashlib
import math
import os
import secrets
from collections.abc import Sequence
from concurrent.futures import Future
from typing import Any, ClassVar

import numpy as np
from hypothesis import HealthCheck, seed, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule, run_state_machine_as_test

from app.caches import ByteBoundedCache
from app.contracts import EncodedGroup, EncodedImage, Ids, Job, Scores
from app.dispatch import Answer, Batch, Dispatch
from app.errors import ApiError, DeadlineExceeded, DoesNotFit, NonfiniteScore, OutOfMemory, ScoringFailed
from app.metrics import Metrics
from app.planning import plan_batch
from app.reuse import Caches, Computed, KeptPrefix, ReusingScorer, Share
from tests.loop_fakes import sample

METRICS = Metrics()  # of all examples together: nothing in them may ever be a mismatch
UNBOUNDED = 1000
Features = tuple[str, str]  # (fingerprint, image id)
KeysValues = tuple[str, str, tuple[int, ...]]  # (fingerprint, image id, ids)
LEAD = np.arange(900, 908)  # what every chat begins with


def truth(fingerprint: str, image_id: str, ids: Sequence[int]) -> float:
    """A score that nobody could guess and no other row, image or model has."""
    return int.from_bytes(hashlib.sha256(repr((fingerprint, image_id, tuple(ids))).encode()).digest()[:6], "big") / 2**48


def row_of(prompt: int, caption: str) -> tuple[Ids, int]:
    """The ids of a chat, and how many any caption of the prompt shares with it: on `b` it merges with the last one, on `c` with nine."""
    prefix = [*LEAD.tolist(), *(1000 + prompt * 50 + place for place in range(10 + prompt))]
    merged = {"b": 1, "c": 9}.get(caption[0], 0)
    own = len(prefix) - merged
    return np.array([*prefix[:own], *(each + 25 for each in prefix[own:]), *caption.encode()], dtype=np.int64), own


def group_of(image: str, prompt: int, captions: Sequence[str], *, fresh: bool = False) -> EncodedGroup:
    rows, own = zip(*(row_of(prompt, caption) for caption in captions), strict=True)
    encoded = EncodedImage(image, np.zeros((1, 1), np.float32), (1, 1, 1), 1)
    return EncodedGroup((image, bytes([prompt])), encoded, rows, min(own), row_prefixes=own, fresh=fresh)


class Device:
    """A backend whose scores come from what it was given: a wrong picture or a wrong prefix gives a wrong score."""

    num_with_lead: ClassVar[int] = 0  # shares of all devices: behind what every chat begins with
    num_lengthened: ClassVar[int] = 0  # and behind a kept prefix, picture included

    def __init__(self, fingerprint: str) -> None:
        self.fingerprint = fingerprint
        self.max_rows = UNBOUNDED
        self.max_tokens = 0  # that a forward may compute
        self.fault: str | None = None
        self.is_crowded = False
        self.refused: set[tuple[str, bytes]] = set()  # rows given NaN in this forward: (image id, ids)

    def stage(self, image: EncodedImage) -> str:
        if self.is_crowded:
            raise OutOfMemory("no room for a copy")
        return image.image_id

    def image_features(self, image: EncodedImage, staged: str | None) -> Features:
        assert staged in (None, image.image_id)
        return self.fingerprint, image.image_id

    def forward(self, shares: Sequence[Share[Features, KeysValues]]) -> list[Computed[KeysValues]]:
        if sum(len(share.rows) for share in shares) > self.max_rows:
            raise OutOfMemory("the device is full")
        if self.fault == "raise":
            raise ValueError("a broken forward")
        assert sum(map(num_computed, shares)) <= self.max_tokens
        return [self._computed(share) for share in shares]

    def _computed(self, share: Share[Features, KeysValues]) -> Computed[KeysValues]:
        kept = share.kept
        if kept is None:
            kept = KeptPrefix(share.prefix_ids, self._keys_values(share), num_bytes=share.num_prefix)
        return Computed(tuple(self._score(kept, share, row) for row in share.rows), kept)

    def _keys_values(self, share: Share[Features, KeysValues]) -> KeysValues:
        """Of a whole prefix: what its known beginning holds, then what is new. A beginning of another model or picture shows."""
        fingerprint, image_id, known = (self.fingerprint, "", ()) if share.lead is None else share.lead.keys_values
        if share.image is not None and not image_id:
            assert share.features is not None
            image_id = share.features[1]
        else:
            assert share.features is None
        Device.num_with_lead += share.lead is not None and not share.lead.keys_values[1]
        Device.num_lengthened += share.lead is not None and bool(share.lead.keys_values[1])
        made_by = (share.features or (self.fingerprint, ""))[0]
        ids = (*known, *share.prefix_ids[len(known) :].tolist())
        return fingerprint if fingerprint == made_by else f"{fingerprint} and {made_by}", image_id, ids

    def _score(self, kept: KeptPrefix[KeysValues], share: Share[Features, KeysValues], row: Ids) -> float:
        if self.fault == "nan" and not self.refused:
            assert share.image is not None
            self.refused.add((share.image.image_id, row.tobytes()))
            return math.nan
        fingerprint, image_id, ids = kept.keys_values
        length = min(len(ids), share.num_prefix)
        return truth(fingerprint, image_id, [*ids[:length], *row[length:].tolist()])

    def agree(self, first: Any, second: Any, *, exact: bool) -> bool:
        """Features, or keys and values of a prefix as far as both go."""
        ids = [(kept[2], fresh[2]) for kept, fresh in [(first, second)] if len(kept) == 3]
        return first[:2] == second[:2] and all(kept[: len(fresh)] == fresh[: len(kept)] for kept, fresh in ids)


def num_computed(share: Share[Features, KeysValues]) -> int:
    """Tokens: of a prefix that is not kept what its beginning leaves, and every row from where it leaves what is known."""
    num_known = share.num_prefix if share.kept is None else min(share.num_prefix, len(share.kept.ids))
    num_new_prefix = 0 if share.kept is not None else share.num_prefix - (len(share.lead.ids) if share.lead else 0)
    return num_new_prefix + sum(len(row) - num_known for row in share.rows)


class WatchedCache(ByteBoundedCache[Any]):
    """Counts what is kept."""

    num_puts = 0

    def put(self, key: str, value: Any) -> None:
        self.num_puts += 1
        assert not isinstance(value, float) or math.isfinite(value)
        super().put(key, value)


GROUPS = st.builds(
    group_of,
    st.sampled_from(["x", "y"]),
    st.integers(0, 1),
    st.lists(st.sampled_from(["a", "aaaa", "bb", "c"]), min_size=1, max_size=4)
    | st.sampled_from([["c"], ["cc"], ["ccc"], ["bb"]])
    | st.just(list("adefghijklmnopqrstuvwxyz")),  # more than a prefix has tokens
    fresh=st.sampled_from([False, False, False, True]),
)


class StatesMachine(RuleBasedStateMachine):
    """Two models over the same tiny caches, one after the other in any order; each job must get its own model's scores or an error."""

    num_steps: ClassVar[int] = 0  # of all machines

    @initialize(
        budget=st.integers(20, 80),
        num_kept=st.sampled_from([0, 3, 6, 12, 12]),
        audit_every=st.sampled_from([0, 2, 3]),
        deterministic=st.booleans(),
        dies=st.booleans(),
    )
    def start(self, budget: int, num_kept: int, audit_every: int, deterministic: bool, dies: bool) -> None:
        self.budget, self.dies, self.audits = budget, dies, audit_every > 0
        self.core = Dispatch(budget)
        self.now = 100.0
        self.caches = Caches(
            WatchedCache("features", num_kept // 3, lambda _: 1, METRICS),
            WatchedCache("prefixes", num_kept * 8, lambda kept: kept.num_bytes, METRICS),
            WatchedCache("scores", num_kept, lambda _: 1, METRICS),
        )
        self.devices = {name: Device(name) for name in ("old", "new")}
        self.scorers = {
            name: ReusingScorer(
                device,
                self.caches,
                fingerprint=name,
                metrics=METRICS,
                score_tolerance=0.0,
                deterministic=deterministic,
                audit_every=audit_every,
                lead_ids=LEAD,
            )
            for name, device in self.devices.items()
        }
        self.model = "old"
        self.jobs: list[Job] = []
        self.planned: set[Job] = set()
        self.answers: dict[Job, list[Answer]] = {}
        self.expected: dict[Job, dict[int, float]] = {}  # by row, from the model that ran it
        self.faults: dict[Job, type[ApiError]] = {}
        self.preparing: Batch | None = None
        self.running: Batch | None = None
        self.prepared: Any = None

    # What clients do

    @rule(group=GROUPS, patience=st.sampled_from([1, 3, 1000]))
    def submit(self, group: EncodedGroup, patience: float) -> None:
        StatesMachine.num_steps += 1
        future: Future[Scores] = Future()
        job = Job(group, future, self.now + patience, self.now)  # type: ignore[arg-type]
        self.jobs.append(job)
        self.answers[job], self.expected[job] = [], {}
        self.core.add(job)

    @precondition(lambda self: self.jobs)
    @rule(back=st.integers(0, 5))
    def cancel(self, back: int) -> None:
        StatesMachine.num_steps += 1
        self.jobs[-1 - back % len(self.jobs)].future.cancel()

    @rule(seconds=st.sampled_from([0.5, 1, 5]))
    def tick(self, seconds: float) -> None:
        StatesMachine.num_steps += 1
        self.now += seconds

    # What the prepare thread does

    @precondition(lambda self: self.core.wants_plan)
    @rule()
    def plan(self) -> None:
        StatesMachine.num_steps += 1
        live = [job for job in self.jobs if job not in self.planned and not job.future.done() and job.deadline > self.now]
        next_ = self.core.plan(self.now)
        for answer in next_.answers:
            assert isinstance(answer.outcome, DeadlineExceeded)
            assert answer.job.deadline <= self.now
            assert not answer.job.started
        self.deliver(next_.answers)
        self.preparing = next_.batch
        if next_.batch is None:
            assert not self.core.wants_plan  # until something happens: the thread would spin
            assert not live or (self.running and not plan_batch(live, self.budget, self.now).is_full)
        elif next_.batch.pieces[0].job not in self.planned:
            self.check_fresh(next_.batch, live)

    def check_fresh(self, batch: Batch, live: Sequence[Job]) -> None:
        """Exactly the planner's batch, in whole groups, within the budget; ahead of time only when it is full."""
        jobs = [piece.job for piece in batch.pieces]
        plan = plan_batch(live, self.budget, self.now)
        assert jobs == list(plan.batch)
        assert jobs[0] is live[0]
        assert [piece.group for piece in batch.pieces] == [job.group for job in jobs]
        assert len(jobs) == 1 or num_tokens([job.group for job in jobs]) <= self.budget
        assert plan.is_full or self.running is None
        self.planned.update(jobs)

    @precondition(lambda self: self.preparing)
    @rule(fault=st.sampled_from([None, None, None, None, "raise", "memory"]), crowded=st.booleans())
    def prepare(self, fault: str | None, crowded: bool) -> None:
        """On a crowded device there is no room to send pictures ahead, which is nobody's fault."""
        StatesMachine.num_steps += 1
        batch, self.preparing = self.preparing, None
        assert batch is not None
        if fault is None:
            self.made_ready = batch
            self.devices[self.model].is_crowded = crowded
            self.core.ready((self.model, self.scorers[self.model].prepare(batch.groups)))
        else:
            self.fail(batch, ValueError("cannot be made ready") if fault == "raise" else OutOfMemory("no room for a copy"))

    # What the device thread does

    @precondition(lambda self: self.core.wants_start)
    @rule()
    def begin(self) -> None:
        StatesMachine.num_steps += 1
        started = self.core.start(self.now)
        if started is None:
            assert self.made_ready.share_given_up >= 1 / 16  # else it would be computed for nobody in vain, or made ready for ever
            assert self.core.wants_plan
            return
        self.running, self.prepared = started
        assert self.running is self.made_ready
        assert all(piece.job.arrived <= piece.job.started <= self.now for piece in self.running.pieces)

    @precondition(lambda self: self.running)
    @rule(fault=st.sampled_from([None, None, None, None, "raise", "nan"]), max_rows=st.sampled_from([UNBOUNDED, UNBOUNDED, 3, 2, 1, 0]))
    def finish(self, fault: str | None, max_rows: int) -> None:
        StatesMachine.num_steps += 1
        batch, self.running = self.running, None
        assert batch is not None
        model, prepared = self.prepared
        device = self.devices[model]
        device.fault = None if fault == "nan" and self.audits else fault  # an audit that meets a NaN is a mismatch, and rightly counted
        device.max_rows, device.refused = max_rows, set()
        device.max_tokens = num_tokens(batch.groups)
        kept = self.num_kept()
        try:
            outcomes = batch.check(self.scorers[model].score(prepared))
        except (ValueError, OutOfMemory, NonfiniteScore) as error:
            assert self.num_kept() == kept
            self.fail(batch, error)
            return
        self.expect(batch, model, device.refused)
        self.deliver(self.core.succeed(batch, outcomes, self.now))

    def num_kept(self) -> int:
        """Of what a forward makes."""
        return sum(cache.num_puts for cache in (self.caches.prefixes, self.caches.scores) if isinstance(cache, WatchedCache))

    def expect(self, batch: Batch, model: str, refused: set[tuple[str, bytes]]) -> None:
        for piece in batch.pieces:
            image_id = piece.group.key[0]
            for place, row in enumerate(piece.group.rows, piece.first_row):
                self.expected[piece.job][place] = truth(model, image_id, row.tolist())
                if (image_id, row.tobytes()) in refused:
                    self.faults.setdefault(piece.job, NonfiniteScore)

    def fail(self, batch: Batch, error: Exception) -> None:
        if not batch.can_halve(error):
            self.faults.setdefault(batch.pieces[0].job, DoesNotFit if isinstance(error, OutOfMemory) else ScoringFailed)
        self.deliver(self.core.fail(batch, error, self.now))

    # What the event loop does

    def deliver(self, answers: Sequence[Answer]) -> None:
        for answer in answers:
            self.answers[answer.job].append(answer)
            self.check(answer)
            if answer.job.future.cancelled():
                continue
            if isinstance(answer.outcome, ApiError):
                answer.job.future.set_exception(answer.outcome)
            else:
                answer.job.future.set_result(answer.outcome)

    def check(self, answer: Answer) -> None:
        """Its own scores, each caption's from the model that ran it; or the error that it met."""
        job, outcome = answer.job, answer.outcome
        assert len(self.answers[job]) == 1
        if isinstance(outcome, Scores):
            assert job not in self.faults
            assert list(outcome.values) == [self.expected[job][row] for row in range(job.num_items)]
            assert outcome.num_tokens == sum(map(len, job.group.rows))
        elif not isinstance(outcome, DeadlineExceeded):
            assert type(outcome) is self.faults[job]

    @rule(max_rows=st.sampled_from([UNBOUNDED, UNBOUNDED, 2, 1]))
    def catch_up(self, max_rows: int) -> None:
        """Everybody does what is to be done, without faults but perhaps with little memory, until nothing is left."""
        for _ in range(300 * len(self.jobs) + 10):
            if self.running:
                self.finish(None, max_rows)
            elif self.core.wants_start:
                self.begin()
            elif self.preparing:
                self.prepare(None, crowded=False)
            elif self.core.wants_plan:
                self.plan()
            else:
                break
        assert self.core.is_idle

    # What happens to the server

    @rule()
    def change_model(self) -> None:
        StatesMachine.num_steps += 1
        self.model = "new" if self.model == "old" else "old"

    @rule(count=st.integers(1, 6))
    def evict(self, count: int) -> None:
        StatesMachine.num_steps += 1
        for number in range(count):
            self.caches.scores.put(f"something else {number}", 0.5)
            self.caches.prefixes.put(f"something else {number}", KeptPrefix(np.array([1]), ("", "", ()), 4))

    @invariant()
    def no_audit_failed(self) -> None:
        (family,) = METRICS.cache_audit_mismatches.collect()
        assert not any(found.value for found in family.samples if found.name.endswith("_total"))

    @invariant()
    def somebody_acts_while_there_is_work(self) -> None:
        if hasattr(self, "jobs"):
            acting = self.core.wants_plan or self.core.wants_start or self.preparing or self.running
            assert acting or self.core.is_idle
            assert not self.core.is_idle or all(self.answers[job] or job.future.cancelled() for job in self.jobs)

    def teardown(self) -> None:
        if hasattr(self, "jobs"):
            if self.dies:
                self.die()
            else:
                self.drain()
            assert self.core.is_idle

    def die(self) -> None:
        """Whoever has no answer is named, once."""
        left = self.core.close()
        assert len(left) == len(set(left))
        unanswered = {job for job in self.jobs if not self.answers[job]}
        assert {job for job in unanswered if not job.future.cancelled()} <= set(left) <= unanswered
        for batch in (self.preparing, self.running):  # the threads come back from what they were at
            if batch is not None:
                assert self.core.fail(batch, OutOfMemory("too late"), self.now) == []
        self.core.close()

    def drain(self) -> None:
        self.catch_up(UNBOUNDED)
        assert all(self.answers[job] or job.future.cancelled() for job in self.jobs)


def num_tokens(groups: Sequence[EncodedGroup]) -> int:
    """Each prefix once, as short as the shortest of its groups, again for those that use nothing kept; then what is left of every row."""
    total = 0
    for name in {(group.key, group.fresh) for group in groups}:
        same = [group for group in groups if (group.key, group.fresh) == name]
        shared = min(group.num_prefix for group in same)
        total += shared + sum(len(row) - shared for group in same for row in group.rows)
    return total


# What the machine seldom meets


def added(core: Dispatch, image: str, *captions: str) -> Job:
    future: Future[Scores] = Future()
    job = Job(group_of(image, 0, captions), future, 10.0, 1.0)  # type: ignore[arg-type]
    core.add(job)
    return job


def begun(core: Dispatch) -> Batch:
    assert core.plan(1.0).batch is not None
    core.ready(None)
    started = core.start(1.0)
    assert started is not None
    return started[0]


def test_a_batch_that_was_full_until_somebody_left_goes_on_gathering() -> None:
    """Behind a running batch 40 of 40 tokens wait; one job leaves, so another may still join the rest."""
    core = Dispatch(40)
    added(core, "first", "aa")
    begun(core)
    stays, leaves = added(core, "x", "aa"), added(core, "y", "aa")
    assert core.wants_plan
    leaves.future.cancel()
    assert core.plan(1.0).batch is None
    assert not core.wants_plan
    joins = added(core, "z", "aa")
    assert core.wants_plan
    batch = core.plan(1.0).batch
    assert batch is not None
    assert [piece.job for piece in batch.pieces] == [stays, joins]


def test_the_other_half_of_a_group_that_failed_is_not_computed() -> None:
    core = Dispatch(100)
    job = added(core, "x", "a", "aa")
    assert core.fail(begun(core), OutOfMemory("full"), 2.0) == []
    (answer,) = core.fail(begun(core), OutOfMemory("full"), 3.0)
    assert answer.job is job
    assert isinstance(answer.outcome, DoesNotFit)
    assert core.plan(4.0).batch is None
    assert core.is_idle


StatesMachine.TestCase.settings = settings(max_examples=100, stateful_step_count=50, deadline=None)
TestStates = StatesMachine.TestCase


def test_100_000_steps() -> None:
    """From other seeds each time, in CI from the same."""
    StatesMachine.num_steps = 0
    number = 0 if "CI" in os.environ else secrets.randbelow(1 << 32)
    thorough = settings(
        max_examples=200, stateful_step_count=100, deadline=None, database=None, suppress_health_check=list(HealthCheck), derandomize=False
    )
    while StatesMachine.num_steps < 100_000:
        number += 1
        run_state_machine_as_test(seed(number)(type(f"StatesMachine{number}", (StatesMachine,), {})), settings=thorough)
    hits = {cache: sample(METRICS, "reward_cache_lookups_total", cache=cache, result="hit") for cache in ("features", "prefixes", "scores")}
    beginnings = {"of all": Device.num_with_lead, "kept too short": Device.num_lengthened}
    print(f"{StatesMachine.num_steps:,} steps, hits: {hits}, beginnings: {beginnings}")
    assert all(count > 300 for count in hits.values())
    assert all(count > 20 for count in beginnings.values())
