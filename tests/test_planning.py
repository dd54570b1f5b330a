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
from app.planning import Filling, Plan, plan_batch, split_group

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


# Fairness


def arrivals_of(queues: st.SearchStrategy[list[Job]]) -> st.SearchStrategy[list[tuple[int, Job]]]:
    """Jobs in the order they come, each with the number of batches that were planned before it came."""
    return st.tuples(queues, st.lists(st.integers(0, 5), min_size=12, max_size=12)).map(
        lambda drawn: list(zip(sorted(drawn[1]), drawn[0], strict=False))
    )


def batch_numbers(arrivals: Sequence[tuple[int, Job]], budget: int) -> dict[int, int]:
    """The batch in which each job runs, by its place in `arrivals`, when nobody leaves and every plan follows the one before."""
    numbers: dict[int, int] = {}
    place = {id(each): index for index, (_, each) in enumerate(arrivals)}
    waiting: list[Job] = []
    number = 0
    while len(numbers) < len(arrivals):
        waiting += [each for came, each in arrivals if came == number]
        plan = plan_batch(waiting, budget, now=-1.0)
        waiting = list(plan.waiting)
        numbers |= {place[id(each)]: number for each in plan.batch}
        number += 1
    return numbers


LIVING = st.lists(
    st.builds(
        lambda *encoded: job(group(*encoded)), st.integers(1, 3), st.integers(1, 30), st.lists(st.integers(1, 20), min_size=1, max_size=4)
    ),
    max_size=12,
)


@given(arrivals_of(LIVING), BUDGETS)
def test_nobody_waits_for_whoever_came_later(arrivals: list[tuple[int, Job]], budget: int) -> None:
    """The batch of a job is the one it would run in if every job that arrived after it did not exist."""
    together = batch_numbers(arrivals, budget)
    for index in range(len(arrivals)):
        assert together[index] == batch_numbers(arrivals[: index + 1], budget)[index]


@given(arrivals_of(LIVING), BUDGETS)
def test_nobody_waits_behind_more_batches_than_were_due(arrivals: list[tuple[int, Job]], budget: int) -> None:
    """Due are the batches of those who came before it, counted without it; it runs in the next at the latest."""
    together = batch_numbers(arrivals, budget)
    for index, (came, _) in enumerate(arrivals):
        due = max(batch_numbers(arrivals[:index], budget).values(), default=-1)
        assert together[index] <= max(due + 1, came)


@given(arrivals_of(LIVING), BUDGETS)
def test_whatever_is_said_of_a_plan_holds_for_a_job_behind_it(arrivals: list[tuple[int, Job]], budget: int) -> None:
    """A plan of the front of a queue is the front of the plan: why the two tests above hold."""
    queue = [each for _, each in arrivals]
    batch = {id(each) for each in plan_batch(queue, budget, -1.0).batch}
    for length in range(len(queue)):
        assert [each for each in queue[:length] if id(each) in batch] == list(plan_batch(queue[:length], budget, -1.0).batch)


@given(QUEUES, BUDGETS)
def test_a_plan_is_full_when_more_would_change_nothing_or_wait(waiting: list[Job], budget: int) -> None:
    plan = plan_batch(waiting, budget, NOW)
    filling = Filling(budget)
    taken = [each for each in live(waiting) if filling.take(each.group)]
    assert taken == list(plan.batch)
    assert filling.is_full == plan.is_full == (bool(plan.waiting) or filling.num_tokens >= budget)


@given(QUEUES, BUDGETS, st.data())
def test_who_leaves_makes_no_batch_fuller(waiting: list[Job], budget: int, data: st.DataObject) -> None:
    """So what fills as jobs come never misses a full batch when some of them have gone since."""
    some = data.draw(st.lists(st.sampled_from(waiting), unique_by=id)) if waiting else []
    all_of_them, without = Filling(budget), Filling(budget)
    for each in waiting:
        all_of_them.take(each.group)
        if each not in some:
            without.take(each.group)
    assert all_of_them.is_full or not without.is_full


def test_64_captions_one_by_one_are_few_batches_with_one_prefix_each() -> None:
    """64 jobs of 258 + 32 tokens behind and between jobs of other images; a batch holds 1500.

    Each of their batches has one prefix: 258 + 38 * 32 = 1474 tokens, then 258 + 26 * 32 = 1090.
    """
    ours = [job(group(1, 258, [32])) for _ in range(64)]
    plan = plan_batch(ours, 1500, NOW)
    assert len(plan.batch) == 38
    assert len(plan_batch(plan.waiting, 1500, NOW).batch) == 26
    mixed = [each for mine in ours for each in (mine, job(group(2, 258, [32])))]
    batches = []
    while mixed:
        plan = plan_batch(mixed, 1500, NOW)
        batches.append(plan.batch)
        mixed = list(plan.waiting)
    assert len(batches) == 5  # 128 * 32 tokens and two prefixes a batch
    assert all(true_cost(batch) <= 1500 for batch in batches)


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


@given(st.lists(st.integers(1, 30), min_size=1, max_size=30), st.integers(60, 120))
def test_every_piece_keeps_its_own_rows_prefixes(lengths: list[int], budget: int) -> None:
    whole = replace(group(1, 5, lengths), row_prefixes=tuple(range(len(lengths))))
    pieces = split_group(whole, budget)
    assert [(id(row), own) for piece in pieces for row, own in zip(piece.rows, piece.row_prefixes, strict=True)] == [
        (id(row), own) for row, own in zip(whole.rows, whole.row_prefixes, strict=True)
    ]


@given(st.integers(1, 30), st.lists(st.integers(1, 30), min_size=1, max_size=30), st.integers(60, 120))
def test_no_piece_is_smaller_than_it_must_be(num_prefix: int, lengths: list[int], budget: int) -> None:
    pieces = split_group(group(1, num_prefix, lengths), budget)
    for piece, following in itertools.pairwise(pieces):
        assert piece.num_tokens + len(following.rows[0]) - num_prefix > budget


def test_a_caption_that_fits_no_batch_is_refused() -> None:
    assert len(split_group(group(1, 90, [10, 10]), 100)) == 2
    with pytest.raises(ValueError, match="101 tokens, a batch holds 100"):
        split_group(group(1, 90, [10, 11]), 100)
