"""What scores mean: probabilities mirror exactly, nothing overflows, ties are ties."""

from __future__ import annotations

import math
import statistics

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from app.preference import Comparison, compare, probability, rank, spread

MARGINS = st.floats(allow_nan=False)
SCORES = st.floats(-1e6, 1e6)
TEMPERATURES = st.floats(1e-6, 1e6)


@given(MARGINS, TEMPERATURES)
@example(0.0, 1.0)
@example(-0.0, 1.0)
@example(40.0, 1.0)
@example(1e-17, 1.0)
def test_probabilities_mirror_to_the_last_bit(margin: float, temperature: float) -> None:
    assert probability(-margin, temperature) == 1 - probability(margin, temperature)
    assert probability(-margin, temperature) + probability(margin, temperature) == 1


@given(MARGINS, st.floats(min_value=0, exclude_min=True, allow_infinity=False))
def test_any_margin_gives_a_probability_on_its_own_side(margin: float, temperature: float) -> None:
    found = probability(margin, temperature)
    assert 0 <= found <= 1
    assert found >= 0.5 if margin >= 0 else found <= 0.5


@given(st.floats(-30, 30), st.floats(0.1, 10))
def test_it_is_the_sigmoid(margin: float, temperature: float) -> None:
    assert probability(margin, temperature) == pytest.approx(1 / (1 + math.exp(-margin / temperature)), abs=1e-15)


@given(SCORES, SCORES)
def test_a_larger_margin_is_never_less_probable(one: float, other: float) -> None:
    low, high = sorted((one, other))
    assert probability(low) <= probability(high)


def test_known_values() -> None:
    """sigmoid(ln 3) = 3/4, and a temperature of 2 halves the margin."""
    assert probability(0.0) == 0.5
    assert probability(math.log(3)) == pytest.approx(0.75)
    assert probability(2 * math.log(3), temperature=2) == pytest.approx(0.75)
    assert (probability(math.inf), probability(-math.inf)) == (1.0, 0.0)


@given(SCORES, SCORES, TEMPERATURES)
def test_swapping_two_captions_mirrors_the_comparison(score_a: float, score_b: float, temperature: float) -> None:
    one, other = compare(score_a, score_b, temperature), compare(score_b, score_a, temperature)
    assert one.margin == -other.margin
    assert one.probability_a == 1 - other.probability_a
    assert {"a": "b", "b": "a", "tie": "tie"}[one.preferred] == other.preferred


def test_only_equal_scores_tie() -> None:
    assert compare(0.5, 0.5) == Comparison("tie", 0.5, 0.0)
    assert compare(0.0, -0.0).preferred == "tie"
    assert compare(math.nextafter(0.5, 1), 0.5).preferred == "a"


@given(st.lists(SCORES | st.sampled_from([0.0, -0.0, 1.0]), max_size=20))
def test_a_ranking_is_best_first_and_complete(scores: list[float]) -> None:
    places = rank(scores)
    assert sorted(place.index for place in places) == list(range(len(scores)))
    assert [place.score for place in places] == sorted(scores, reverse=True)
    assert all(place.score == scores[place.index] for place in places)
    assert all(place.rank == 1 + sum(score > place.score for score in scores) for place in places)
    assert all(place.tied == (scores.count(place.score) > 1) for place in places)


def test_ties_share_the_better_rank_and_keep_their_order() -> None:
    places = rank([1.0, 2.0, 0.5, 2.0, 1.0])
    assert [(place.index, place.rank, place.tied) for place in places] == [
        (1, 1, True),
        (3, 1, True),
        (0, 3, True),
        (4, 3, True),
        (2, 5, False),
    ]


def test_the_best_wins_half_against_itself() -> None:
    best, worst = rank([0.0, math.log(3)])
    assert best.win_probability == 0.5
    assert worst.win_probability == pytest.approx(0.25)
    assert rank([0.0, 2 * math.log(3)], temperature=2)[1].win_probability == pytest.approx(0.25)


def test_nothing_to_rank() -> None:
    assert rank([]) == []


@given(st.lists(st.floats(-3.4e38, 3.4e38, allow_subnormal=False), min_size=1, max_size=64))
@example([3.4e38, -3.4e38])
@example([1e8, 1e8 + 1.0, 1e8 + 3.0])
def test_spread_is_the_standard_deviation(scores: list[float]) -> None:
    assert spread(scores) == pytest.approx(statistics.pstdev(scores), rel=1e-6, abs=1e-12 * max(map(abs, scores)) + 1e-300)


@given(st.floats(-1e38, 1e38), st.integers(1, 64))
def test_equal_scores_have_no_spread(score: float, number: int) -> None:
    assert spread([score] * number) == 0.0
