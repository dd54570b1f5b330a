"""The order of pairs: everything once, those of an image together, decided by the seed alone."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from training.batches import StepPlan, draw, plan_epoch

KEYS = st.lists(st.sampled_from("abcde"), min_size=1, max_size=80).map(lambda names: [(name,) for name in names])


@given(keys=KEYS, pairs_per_image=st.integers(1, 5), num_bundles=st.integers(1, 4), seed=st.text(max_size=3))
def test_every_pair_at_most_once_in_full_batches(keys: list[tuple[str]], pairs_per_image: int, num_bundles: int, seed: str) -> None:
    size = pairs_per_image * num_bundles
    batches = plan_epoch(keys, pairs_per_image=pairs_per_image, batch_size=size, seed=seed)
    seen = [index for batch in batches for index in batch]
    assert all(len(batch) == size for batch in batches)
    assert len(set(seen)) == len(seen)
    assert len(batches) == len(keys) // size
    assert batches == plan_epoch(keys, pairs_per_image=pairs_per_image, batch_size=size, seed=seed)


@given(keys=KEYS, pairs_per_image=st.integers(1, 5))
def test_pairs_of_an_image_come_in_bundles(keys: list[tuple[str]], pairs_per_image: int) -> None:
    """Of n pairs of one image, n // pairs_per_image bundles are whole wherever the batches are cut."""
    batches = plan_epoch(keys, pairs_per_image=pairs_per_image, batch_size=pairs_per_image, seed="s")
    whole = Counter(keys[batch[0]] for batch in batches if len({keys[index] for index in batch}) == 1)
    for key, count in Counter(keys).items():
        assert whole[key] >= count // pairs_per_image


def test_another_seed_is_another_order() -> None:
    keys = [(name,) for name in "aabbccdd" * 8]
    orders = {tuple(plan_epoch(keys, pairs_per_image=2, batch_size=4, seed=str(seed))) for seed in range(5)}
    assert len(orders) == 5


def test_contests_are_mixed() -> None:
    """Not contest by contest: the first quarter of an epoch already meets every one of ten contests of a hundred pairs."""
    keys = [(str(number // 100),) for number in range(1000)]
    batches = plan_epoch(keys, pairs_per_image=1, batch_size=10, seed="s")
    assert {keys[index] for batch in batches[:25] for index in batch} == set(keys)


PLAN = StepPlan([(str(number % 3),) for number in range(50)], 1, 4, 2, 2, 9)


def test_processes_share_a_step_without_overlap() -> None:
    """50 pairs, 16 a step: 3 steps an epoch; two processes take every second batch."""
    assert (PLAN.pairs_per_step, PLAN.steps_per_epoch) == (16, 3)
    own = [list(PLAN.batches(process, 0, 3)) for process in (0, 1)]
    assert [len(batches) for batches in own] == [6, 6]
    seen = [index for batches in own for batch in batches for index in batch]
    assert len(seen) == len(set(seen)) == 48


def test_a_step_holds_the_same_pairs_however_many_processes() -> None:
    alone = StepPlan(PLAN.keys, 1, 4, 4, 1, 9)
    one = list(alone.batches(0, 0, 3))
    two = [list(PLAN.batches(process, 0, 3)) for process in (0, 1)]
    for step in range(3):
        together = {batch for batches in two for batch in batches[step * 2 : step * 2 + 2]}
        assert together == set(one[step * 4 : step * 4 + 4])


@pytest.mark.parametrize("first_step", range(8))
def test_a_resumed_run_sees_what_is_left(first_step: int) -> None:
    whole = list(PLAN.batches(1, 0, 8))
    assert list(PLAN.batches(1, first_step, 8)) == whole[first_step * 2 :]


def test_drawing() -> None:
    assert draw(5, None, "s") == draw(5, 9, "s") == [0, 1, 2, 3, 4]
    some = draw(1000, 10, "s")
    assert some == sorted(set(some))
    assert len(some) == 10
    assert some != draw(1000, 10, "t")
