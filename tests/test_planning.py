"""Which jobs form the next batch: properties of the pure decision, on any queue."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.contracts import EncodedGroup, Job
from app.planning import Plan, plan_batch, split_group

NOW = 1000.0
BUDGETS = st.integers(1, 200)


def group(key: int, num_prefix: int, lengths: Sequence[int]) -> EncodedGroup:
    """Rows that share `num_prefix` ids and have ids of their own behind them."""
    rows = tuple(np.array([*[key] * num_prefix, *range(100 * index, 100 * index + own)]) for index, own in enumerate(lengths, 1))
    return EncodedGroup((str(key), b""), None, rows, num_prefix)


def job(encoded: EncodedGroup, *, deadline: float = NOW + 1, gone: bool = False) -> Job:
    future: Future[object] = Future()
    if gone:
        future.cancel()
    return Job(encoded, future, deadline, arrived=0.0)  # type: ignore[arg-type]


def jobs_of(num_prefix: st.SearchStrategy[int]) -> st.SearchStrategy[list[Job]]:
    """Up to a dozen jobs of three prefixes; some abandoned, some past their deadline."""
    groups = st.builds(group, st.integers(1, 3), num_prefix, st.lists(st.integers(1, 20), min_size=1, max_size=4))
    deadlines = st.sampled_from([NOW - 1, NOW, NOW + 1, NOW + 1, NOW + 1, NOW + 9])
    each = st.builds(
        lambda encoded, deadline, gone: job(encoded, deadline=deadline, gone=gone),
        groups,
        deadlines,
        st.integers(0, 5).map(lambda n: n == 0),
    )
    return st.lists(each, max_size=12)


QUEUES = jobs_of(st.integers(1, 30))
EVEN_PREFIX = 30
EVEN_QUEUES = jobs_of(st.just(EVEN_PREFIX))


def true_cost(jobs: Sequence[Job]) -> int:
    """Tokens a packed forward computes, counted the slow way: the longest common prefix of every key once, then the rest."""
    total = 0
    for key in {each.group.key for each in jobs}:
        rows = [row.tolist() for each in jobs if each.group.key == key for row in each.group.rows]
        shared = 0
        while shared < min(map(len, rows)) - 1 and len({row[shared] for row in rows}) == 1:
            shared += 1
        total += shared + sum(len(row) - shared for row in rows)
    return total


def even_cost(jobs: Sequence[Job]) -> int:
    """What planning may know of jobs whose prefixes are equally long: each prefix once, then the rest of every row."""
    own = sum(len(row) - EVEN_PREFIX for each in jobs for row in each.group.rows)
    return EVEN_PREFIX * len({each.group.key for each in jobs}) + own


def live(waiting: Sequence[Job]) -> list[Job]:
    return [each for each in waiting if not each.future.done() and each.deadline > NOW]


@given(QUEUES, BUDGETS)
def test_every_job_goes_exactly_one_way(waiting: list[Job], budget: int) -> None:
    plan = plan_batch(waiting, budget, NOW)
    wanted = [each for each in waiting if not each.future.done()]
    assert list(plan.expired) == [each for each in wanted if each.deadline <= NOW]
    assert sorted(map(id, (*plan.batch, *plan.waiting))) == sorted(map(id, live(waiting)))


@given(QUEUES, BUDGETS)
def test_the_budget_holds_for_the_true_cost(waiting: list[Job], budget: int) -> None:
    batch = plan_batch(waiting, budget, NOW).batch
    assert len(batch) <= 1 or true_cost(batch) <= budget


@given(QUEUES, BUDGETS)
def test_the_front_is_always_taken(waiting: list[Job], budget: int) -> None:
    """So nobody starves: a job at the front has nobody before it, and every plan moves the front."""
    plan = plan_batch(waiting, budget, NOW)
    assert plan.batch[:1] == tuple(live(waiting)[:1])


@given(QUEUES, BUDGETS)
def test_order_is_kept(waiting: list[Job], budget: int) -> None:
    plan = plan_batch(waiting, budget, NOW)
    place = {id(each): index for index, each in enumerate(waiting)}
    for part in (plan.batch, plan.expired, plan.waiting):
        assert [place[id(each)] for each in part] == sorted(place[id(each)] for each in part)


@given(QUEUES, BUDGETS)
def test_nobody_with_another_prefix_overtakes(waiting: list[Job], budget: int) -> None:
    """First come first served; who overtakes shares a prefix with somebody who did not."""
    plan = plan_batch(waiting, budget, NOW)
    place = {id(each): index for index, each in enumerate(waiting)}
    first_left = min((place[id(each)] for each in plan.waiting), default=len(waiting))
    on_time = {each.group.key for each in plan.batch if place[id(each)] < first_left}
    assert all(each.group.key in on_time for each in plan.batch)


@given(EVEN_QUEUES, BUDGETS)
def test_whoever_shares_a_prefix_and_fits_joins(waiting: list[Job], budget: int) -> None:
    plan = plan_batch(waiting, budget, NOW)
    keys = {each.group.key for each in plan.batch}
    for left in plan.waiting:
        if left.group.key in keys:
            assert even_cost([*plan.batch, left]) > budget


@given(EVEN_QUEUES, BUDGETS)
def test_planning_to_the_end_runs_every_job_once(waiting: list[Job], budget: int) -> None:
    ran: list[Job] = []
    plan = plan_batch(waiting, budget, NOW)
    while plan.batch:
        ran += plan.batch
        plan = plan_batch(plan.waiting, budget, NOW)
    assert plan.waiting == ()
    assert sorted(map(id, ran)) == sorted(map(id, live(waiting)))


@given(QUEUES, BUDGETS)
def test_planning_changes_nothing(waiting: list[Job], budget: int) -> None:
    before = [
        (each, each.future.done(), each.deadline, each.started, each.group, [row.tolist() for row in each.group.rows]) for each in waiting
    ]
    first, second = plan_batch(waiting, budget, NOW), plan_batch(tuple(waiting), budget, NOW)
    after = [
        (each, each.future.done(), each.deadline, each.started, each.group, [row.tolist() for row in each.group.rows]) for each in waiting
    ]
    assert first == second
    assert len(before) == len(after)
    assert all(
        old[0] is new[0] and old[4] is new[4] and old[1:4] == new[1:4] and old[5] == new[5] for old, new in zip(before, after, strict=True)
    )


def test_equal_prefixes_are_counted_once() -> None:
    """Ten jobs of 50 + 5 tokens: 50 + 10 * 5 = 100 together, 550 apart."""
    waiting = [job(group(1, 50, [5])) for _ in range(10)]
    assert len(plan_batch(waiting, 100, NOW).batch) == 10
    assert len(plan_batch(waiting, 99, NOW).batch) == 9


def test_a_job_larger_than_the_budget_runs_alone() -> None:
    waiting = [job(group(1, 50, [60])), job(group(1, 50, [1])), job(group(2, 1, [1]))]
    assert plan_batch(waiting, 100, NOW).batch == (waiting[0],)


def test_a_small_job_does_not_pass_one_that_did_not_fit() -> None:
    waiting = [job(group(1, 10, [50])), job(group(2, 10, [50])), job(group(3, 1, [1]))]
    assert plan_batch(waiting, 100, NOW).batch == (waiting[0],)


def test_nothing_waits() -> None:
    assert plan_batch([], 100, NOW) == Plan((), (), ())


@given(st.integers(1, 30), st.lists(st.integers(1, 30), min_size=1, max_size=30), st.integers(60, 120))
def test_pieces_fit_and_keep_the_order(num_prefix: int, lengths: list[int], budget: int) -> None:
    whole = group(1, num_prefix, lengths)
    pieces = split_group(whole, budget)
    assert [id(row) for piece in pieces for row in piece.rows] == [id(row) for row in whole.rows]
    assert all(piece.rows and piece.num_tokens <= budget for piece in pieces)
    assert all(replace(piece, rows=whole.rows) == whole for piece in pieces)


@given(st.integers(1, 30), st.lists(st.integers(1, 30), min_size=1, max_size=30), st.integers(60, 120))
def test_no_piece_is_smaller_than_it_must_be(num_prefix: int, lengths: list[int], budget: int) -> None:
    pieces = split_group(group(1, num_prefix, lengths), budget)
    for piece, following in itertools.pairwise(pieces):
        assert piece.num_tokens + len(following.rows[0]) - num_prefix > budget


def test_a_caption_that_fits_no_batch_is_refused() -> None:
    assert len(split_group(group(1, 90, [10, 10]), 100)) == 2
    with pytest.raises(ValueError, match="101 tokens, a batch holds 100"):
        split_group(group(1, 90, [10, 11]), 100)
