"""Several models behind one batch loop: whose group it is decides who scores it, and nothing is shared between two models."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.contracts import EncodedGroup
from app.errors import OutOfMemory, ScoringFailed
from app.lanes import Lane, LanesScorer
from app.planning import Filling
from tests.fakes import oracle_score
from tests.loop_fakes import batching, group_of
from tests.several import Salted

MODELS = ("first", "second", "third")


def scorers() -> dict[str, Salted]:
    return {name: Salted(salt=10.0 * number) for number, name in enumerate(MODELS)}


def wanted(group: EncodedGroup) -> tuple[float, ...]:
    return tuple(oracle_score(group, row) + 10.0 * MODELS.index(group.model) for row in group.rows)


groups = st.lists(
    st.tuples(
        st.sampled_from(MODELS), st.sampled_from(["cat", "dog"]), st.lists(st.sampled_from(["x", "y", "zz"]), min_size=1, max_size=3)
    ),
    max_size=8,
)


@given(groups)
def test_every_group_is_scored_by_its_own_model_and_each_model_is_asked_once(asked: list[tuple[str, str, list[str]]]) -> None:
    batch = [replace(group_of(key, *captions), model=model) for model, key, captions in asked]
    own = scorers()
    lanes = LanesScorer(own)
    assert [scores.values for scores in lanes.score(lanes.prepare(batch))] == [wanted(group) for group in batch]
    for name, scorer in own.items():
        mine = tuple(group for group in batch if group.model == name)
        assert scorer.batches == ([mine] if mine else [])


def test_memory_that_one_lacks_every_model_gives_up() -> None:
    own = scorers()
    own["second"].fails = OutOfMemory
    lanes = LanesScorer(own)
    with pytest.raises(OutOfMemory):
        lanes.score(lanes.prepare([replace(group_of("cat", "x"), model=model) for model in MODELS]))
    assert [scorer.num_cleared for scorer in own.values()] == [1, 1, 1]


def test_a_group_of_no_lane_is_nobodys() -> None:
    with pytest.raises(KeyError):
        LanesScorer(scorers()).prepare([group_of("cat", "x")])


def test_equal_prefixes_of_two_models_cost_twice() -> None:
    def cost(*models: str) -> int:
        filling = Filling(1000)
        for model in models:
            assert filling.take(replace(group_of("cat", "x", num_prefix=50), model=model))
        return filling.num_tokens

    assert cost("first", "first") == 54
    assert cost("first", "second") == 2 * cost("first") == 104


@given(groups)
def test_a_batch_of_several_models_stays_within_its_budget(asked: list[tuple[str, str, list[str]]]) -> None:
    """What each model is given, its own prefixes counted once, is together no more than the plan says."""
    filling, taken = Filling(40), list[EncodedGroup]()
    for model, key, captions in asked:
        group = replace(group_of(key, *captions), model=model)
        taken += [group] if filling.take(group) else []
    own = {(group.model, group.key): group.num_prefix for group in taken}
    rows = sum(len(row) - group.num_prefix for group in taken for row in group.rows)
    assert filling.num_tokens == sum(own.values()) + rows
    assert len(taken) <= 1 or filling.num_tokens <= 40


async def scored_in(lane: Lane, own: Sequence[EncodedGroup]) -> list[Any]:
    jobs = [lane.submit(group, time.monotonic() + 30) for group in own]
    return await asyncio.gather(*(job.future for job in jobs), return_exceptions=True)


@pytest.mark.anyio
async def test_a_model_that_fails_takes_no_other_with_it() -> None:
    own = scorers()
    own["second"].fails = RuntimeError
    async with batching(LanesScorer(own)) as bench:
        lanes = {name: Lane(bench.batcher, name) for name in MODELS}
        group = group_of("cat", "x", "y")
        found = dict(zip(MODELS, await asyncio.gather(*(scored_in(lanes[name], [group] * 3) for name in MODELS)), strict=True))
        for name in ("first", "third"):
            assert [scores.values for scores in found[name]] == [wanted(replace(group, model=name))] * 3
        assert all(isinstance(error, ScoringFailed) for error in found["second"])
        assert bench.sample("reward_tokens_total", kind="computed", model="second") == 0
        assert bench.sample("reward_tokens_total", kind="computed", model="first") > 0


@pytest.mark.anyio
async def test_scores_that_are_no_number_are_counted_to_their_model() -> None:
    own = scorers()
    own["second"].answer = lambda group, row: float("nan")
    async with batching(LanesScorer(own)) as bench:
        lanes = [Lane(bench.batcher, name) for name in MODELS]
        await asyncio.gather(*(scored_in(lane, [group_of("cat", "x")]) for lane in lanes))
        assert [bench.sample("reward_nonfinite_total", model=name) for name in MODELS] == [0, 1, 0]


@pytest.mark.anyio
async def test_a_lane_lives_and_dies_with_the_batch_loop() -> None:
    async with batching(LanesScorer(scorers())) as bench:
        lane = Lane(bench.batcher, "first")
        assert lane.alive
        await lane.idle()
    assert not lane.alive
