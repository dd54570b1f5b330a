"""The sums of a run against a plain twin that keeps every score: equal in any order of merging, exact where nothing differs, bounded."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from app.tallies import NO_SPREAD, Expected, History, Recent, Tally, merged, moments_of, tally_of

EXPECTED = Expected(0.5, 2.0)
SCORES = st.floats(-1e6, 1e6, allow_nan=False, width=32)
GROUP = st.lists(st.tuples(SCORES, st.integers(0, 400)), min_size=1, max_size=12)
GROUPS = st.lists(GROUP, min_size=1, max_size=20)
Pairs = Sequence[tuple[float, int]]


def tally(group: Pairs, now_s: float = 0.0) -> Tally:
    scores, lengths = [score for score, _ in group], [length for _, length in group]
    return tally_of(scores, lengths, now_s, now_s, num_duplicates=1, num_repeats=2, expected=EXPECTED)


class Twin:
    """Keeps everything, and asks NumPy."""

    def __init__(self, groups: Sequence[Pairs]) -> None:
        self.groups = [np.array(group, dtype=np.float64) for group in groups]
        self.all = np.concatenate(self.groups)
        self.centred = np.concatenate([group - group.mean(axis=0) for group in self.groups])
        self.compared = [group for group in self.groups if len(group) > 1]

    def correlation(self, pairs: Any) -> float | None:
        away = pairs - pairs.mean(axis=0)
        squares = (away**2).sum(axis=0)
        return float((away[:, 0] * away[:, 1]).sum() / np.sqrt(squares[0]) / np.sqrt(squares[1])) if squares.all() else None


def agrees(found: Tally, groups: Sequence[Pairs]) -> None:
    twin, scale = Twin(groups), max(1.0, float(np.abs(Twin(groups).all[:, 0]).max()))
    stds = [group[:, 0].std() for group in twin.compared]
    assert (found.num_groups, found.num_captions, found.num_compared) == (len(groups), len(twin.all), len(twin.compared))
    assert found.all.score == pytest.approx(twin.all[:, 0].mean(), abs=1e-12 * scale)
    assert found.all.length == pytest.approx(twin.all[:, 1].mean(), rel=1e-12, abs=1e-12)
    assert found.all.std() == pytest.approx(twin.all[:, 0].std(), rel=1e-9, abs=1e-12 * scale)
    assert (found.lowest, found.highest) == (twin.all[:, 0].min(), twin.all[:, 0].max())
    assert found.spread == (pytest.approx(np.mean(stds), rel=1e-9, abs=1e-12 * scale) if stds else None)
    assert found.drift(EXPECTED) == pytest.approx((twin.all[:, 0].mean() - 0.5) / 2, abs=1e-12 * scale)
    assert found.std_ratio(EXPECTED) == pytest.approx(twin.all[:, 0].std() / 2, rel=1e-9, abs=1e-12 * scale)
    assert found.num_outside == int((np.abs(twin.all[:, 0] - 0.5) > 6).sum())
    assert found.num_flat == sum(std <= NO_SPREAD for std in stds) or any(abs(std - NO_SPREAD) < 1e-9 for std in stds)


@given(GROUPS)
def test_a_tally_is_what_a_twin_that_keeps_everything_computes(groups: list[Pairs]) -> None:
    agrees(merged(map(tally, groups)), groups)


@given(st.lists(st.lists(st.tuples(st.floats(-20, 20, width=16), st.integers(0, 400)), min_size=2, max_size=12), min_size=2, max_size=20))
def test_correlations_are_numpys(groups: list[Pairs]) -> None:
    """On scores whose deviations are none or far above rounding."""
    found, twin = merged(map(tally, groups)), Twin(groups)
    for ours, pairs, sums in (
        (found.all.around.correlation(), twin.all, found.all.around),
        (found.within.correlation(), twin.centred, found.within),
    ):
        if min(sums.scores, sums.lengths) > 1e-6:
            assert ours == pytest.approx(twin.correlation(pairs), abs=1e-6)
            assert -1 <= (ours or 0.0) <= 1


@given(GROUPS, st.randoms(use_true_random=False), st.integers(1, 5))
def test_order_and_grouping_of_merges_do_not_matter(groups: list[Pairs], random: Any, num_parts: int) -> None:
    shuffled = list(groups)
    random.shuffle(shuffled)
    parts = [merged(map(tally, shuffled[start::num_parts])) for start in range(num_parts)]
    agrees(merged(parts), groups)
    agrees(merged(reversed(parts)), groups)


@given(SCORES, st.lists(st.integers(1, 9), min_size=1, max_size=30), st.integers(0, 400))
def test_equal_scores_deviate_by_exactly_nothing(score: float, sizes: list[int], length: int) -> None:
    """Else the correlation of a collapsed run would be that of its rounding."""
    found = merged(tally([(score, length + index) for index in range(size)]) for size in sizes)
    assert (found.all.around.scores, found.within.scores, found.all.around.products) == (0.0, 0.0, 0.0)
    assert found.all.score == score
    assert found.all.around.correlation() is found.within.correlation() is None
    assert found.flat_share == (1.0 if found.num_compared else None)


@pytest.mark.parametrize("score", [0.1, 1 / 3, 1e-30, 1e30, -3.4e38, 49.0 / 47])
@pytest.mark.parametrize("size", [1, 3, 7, 49, 256])
def test_equal_scores_of_awkward_sizes_are_flat(score: float, size: int) -> None:
    found = moments_of([score] * size, [3] * size)
    assert (found.score, found.around.scores, found.std()) == (score, 0.0, 0.0)


def test_scores_as_large_as_float32_has_them_stay_finite() -> None:
    found = merged(tally([(3.4e38, 1), (-3.4e38, 400)]) for _ in range(1000))
    assert found.within.correlation() == pytest.approx(-1)
    assert found.all.std() == pytest.approx(3.4e38)
    assert found.spread == pytest.approx(3.4e38)


def test_a_small_spread_beside_a_large_mean_is_not_lost() -> None:
    """Sums of squares would cancel: 1e8 squared has no room for 0.01."""
    groups = [[(1e8 + 0.25 * (index % 2), index % 2)] * 1 for index in range(1000)]
    found = merged(map(tally, groups))
    assert found.all.std() == pytest.approx(0.125, rel=1e-6)
    assert found.all.around.correlation() == pytest.approx(1)


def test_what_groups_cannot_tell_is_none() -> None:
    nothing, single = Tally(), tally([(1.0, 5)])
    assert [nothing.spread, nothing.flat_share, nothing.duplicate_share, nothing.repeat_share, nothing.all.std()] == [None] * 5
    assert [nothing.drift(EXPECTED), nothing.std_ratio(EXPECTED), nothing.outside_share(EXPECTED)] == [None] * 3
    assert [single.spread, single.flat_share, single.within.correlation(), single.drift(None), single.outside_share(None)] == [None] * 5
    assert single.drift(EXPECTED) == 0.25


def test_a_tally_that_is_merged_is_not_changed() -> None:
    one, two = tally([(1.0, 1), (2.0, 2)]), tally([(5.0, 9), (7.0, 3)])
    before = (repr(one), repr(two))
    total = merged([one, two])
    total.add(one)
    assert (repr(one), repr(two)) == before


@settings(deadline=None)
@given(st.integers(1, 2000), st.sampled_from([2, 8, 16]), st.integers(1, 5))
def test_a_history_of_any_length_is_whole_and_bounded(num: int, max_points: int, num_groups: int) -> None:
    history = History(max_points=max_points, num_groups=num_groups)
    for index in range(num):
        history.add(tally([(float(index), index)], now_s=index))
    points = list(history)
    assert len(points) <= max_points
    assert len(points) >= min(max_points // 2, -(-num // num_groups))
    assert len({point.num_groups for point in points[:-1]}) <= 1
    assert points[-1].num_groups <= points[0].num_groups
    firsts = [point.began_s for point in points]
    assert firsts == sorted(firsts)
    assert all(point.ended_s - point.began_s + 1 == point.num_groups for point in points), "neighbours only"
    assert merged(points).num_groups == num
    whole = history.whole()
    assert merged(whole).num_groups == num
    assert all(2 * point.num_groups >= points[0].num_groups for point in whole)
    assert merged(points).all.score == pytest.approx((num - 1) / 2)


@settings(deadline=None)
@given(st.integers(1, 400), st.integers(1, 4), st.integers(1, 6))
def test_recent_groups_are_the_last_ones(num: int, num_blocks: int, num_groups: int) -> None:
    recent = Recent(num_blocks=num_blocks, num_groups=num_groups)
    for index in range(num):
        recent.add(tally([(float(index), 1)], now_s=index))
        assert recent.tally().ended_s == index
    found = recent.tally()
    assert min(num, num_blocks * num_groups) <= found.num_groups <= (num_blocks + 1) * num_groups
    assert found.began_s == num - found.num_groups
    assert recent.tally() is found, "merged once until there is something new"
    assert math.isfinite(found.all.score)
