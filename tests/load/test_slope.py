"""The slope of a series: what is known of it, and how often it cries wolf."""

from __future__ import annotations

import numpy as np
import pytest

from tests.load.slope import Slope, dependence, theil_sen

SERIES, COUNT = 60, 120


def drawn(keeps: float, slope: float, seed: int) -> list[tuple[float, float]]:
    """Points of which each keeps a share of the one before, around a line."""
    noise = np.random.default_rng(seed).normal(size=COUNT)
    value, points = 0.0, []
    for x, each in enumerate(noise):
        value = keeps * value + float(each)
        points.append((float(x), value + slope * x))
    return points


def share_with_zero(keeps: float, slope: float = 0.0) -> float:
    return sum(theil_sen(drawn(keeps, slope, seed)).includes_zero for seed in range(SERIES)) / SERIES


def test_a_line_is_found_exactly() -> None:
    assert theil_sen([(float(x), 3.0 * x) for x in range(20)]) == Slope(3.0, 3.0, 3.0)


def test_what_stays_the_same_does_not_grow() -> None:
    assert theil_sen([(float(x), 7.0) for x in range(20)]) == Slope(0.0, 0.0, 0.0)


def test_outliers_say_nothing() -> None:
    points = [(float(x), 100.0 if x % 10 == 3 else 0.5 * x) for x in range(60)]
    assert theil_sen(points).median == pytest.approx(0.5)


def test_independent_points_are_called_growing_once_in_twenty() -> None:
    assert share_with_zero(0.0) >= 0.88


def test_dependent_points_are_not_called_growing_more_often_than_not() -> None:
    """As they were with the variance of independent ones: 0.4 of them included zero."""
    assert share_with_zero(0.9) >= 0.6
    assert np.median([dependence([y for _, y in drawn(0.9, 0.0, seed)]) for seed in range(SERIES)]) > 3


def test_a_trend_through_dependent_points_is_found() -> None:
    """A rise over the whole of twelve times what a point strays."""
    assert share_with_zero(0.9, slope=12 * 2.3 / COUNT) < 0.1


def test_points_that_alternate_are_no_surer_than_independent_ones() -> None:
    assert dependence([(-1.0) ** x for x in range(50)]) == 1.0


def test_two_points_have_no_interval() -> None:
    with pytest.raises(ValueError, match="three points"):
        theil_sen([(0.0, 1.0), (1.0, 2.0)])
