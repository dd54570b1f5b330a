"""Every figure against arithmetic that was worked by hand, or against the slow way of computing it."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from training.statistics import (
    MEDIAN_BAND,
    Bootstrap,
    Interval,
    Pool,
    agreement,
    auc,
    best_of,
    best_of_n,
    bradley_terry_loss,
    by_contest,
    by_sigma,
    calibration,
    compare_bands,
    difference,
    fit_temperature,
    histogram,
    outcomes,
    rank_bands,
    sigmoid,
)

BOOTSTRAP = Bootstrap(seed=0, num_draws=2000)


def pool(contest: str, scores: list[float], ratings: list[float], ranks: list[int] | None = None) -> Pool:
    places = np.array(ranks or list(range(1, len(scores) + 1)))
    return Pool(contest, np.array(scores, dtype=np.float64), np.array(ratings, dtype=np.float64), places)


def test_outcomes_by_hand() -> None:
    """Margins 2, 0, -1, 3: two wins, a tie, a loss; accuracy 2/4 (a tie is no win).

    Mean 4/4 = 1. Deviations 1, -1, -2, 2: squares 1 + 1 + 4 + 4 = 10, variance 10/4, standard deviation sqrt(2.5).
    """
    found = outcomes([2.0, 0.0, -1.0, 3.0])
    assert (found.num_pairs, found.wins, found.ties, found.losses, found.accuracy) == (4, 2, 1, 1, 0.5)
    assert found.margin_mean == 1.0
    assert found.margin_std == pytest.approx(math.sqrt(2.5))


def test_loss_by_hand_and_without_overflow() -> None:
    """-log sigmoid(0) = ln 2; -log sigmoid(ln 3) = -log(3/4). A margin of -1000 costs 1000 nats, one of 1000 nothing."""
    assert bradley_terry_loss([0.0]) == pytest.approx(math.log(2))
    assert bradley_terry_loss([0.0, math.log(3)]) == pytest.approx((math.log(2) - math.log(0.75)) / 2)
    assert bradley_terry_loss([-1000.0, 1000.0]) == pytest.approx(500.0)


def test_sigmoid_by_hand_and_at_the_ends() -> None:
    """1 / (1 + exp(-ln 3)) = 3/4."""
    assert sigmoid([0.0, math.log(3), -1e6, 1e6]) == pytest.approx([0.5, 0.75, 0.0, 1.0])


@pytest.mark.parametrize("margins", [[], [math.nan], [math.inf, 1.0]])
def test_no_figure_of_nothing_or_of_what_is_no_number(margins: list[float]) -> None:
    with pytest.raises(ValueError, match=r"needs at least one pair|not finite"):
        outcomes(margins)


def test_pooled_counts_pairs_and_macro_counts_contests() -> None:
    """Contest a: 1 of 4 right; b: 1 of 1. Pooled 2/5, macro (1/4 + 1)/2 = 0.625."""
    found = agreement([1.0, -1.0, -1.0, -1.0, 1.0], ["a", "a", "a", "a", "b"], BOOTSTRAP)
    assert found.pooled.value == pytest.approx(0.4)
    assert found.macro.value == pytest.approx(0.625)
    assert found.pooled.num_contests == found.macro.num_contests == 2


def test_the_bootstrap_draws_contests_and_not_pairs() -> None:
    """Two contests of 100 pairs, one all right, one all wrong.

    A draw of two contests is right in 0, 1/2 or 1 with probability 1/4, 1/2, 1/4, so the 95 % interval is everything. Drawing pairs
    would give about 0.5 +- 0.07.
    """
    found = agreement([1.0] * 100 + [-1.0] * 100, ["a"] * 100 + ["b"] * 100, BOOTSTRAP)
    assert found.pooled.interval == Interval(0.0, 1.0)


def test_the_interval_is_the_percentiles_of_the_slow_way() -> None:
    """The same draws, contest by contest in a loop."""
    rng = np.random.default_rng(3)
    contests = [f"c{number % 7}" for number in range(50)]
    top, bottom = rng.normal(size=50), rng.uniform(1, 2, size=50)
    names = sorted(set(contests))
    own = {name: [place for place, each in enumerate(contests) if each == name] for name in names}
    draws = np.random.default_rng(0).integers(7, size=(2000, 7))
    values = []
    for draw in draws:
        places = [place for which in draw for place in own[names[which]]]
        values.append(top[places].sum() / bottom[places].sum())
    low, high = np.quantile(values, [0.025, 0.975])
    found = BOOTSTRAP.ratio(top, bottom, contests).interval
    assert found is not None
    assert (found.low, found.high) == pytest.approx((low, high))


def test_intervals_are_the_same_for_the_same_seed_only() -> None:
    values, contests = np.arange(30) % 4, [str(number % 9) for number in range(30)]
    first = Bootstrap(seed=1).mean(values, contests)
    assert first == Bootstrap(seed=1).mean(values, contests)
    assert first.interval != Bootstrap(seed=2).mean(values, contests).interval


def test_many_contests_are_drawn_in_parts_and_agree_with_theory() -> None:
    """1,500 contests (more than one part of draws), one pair each, half right: the normal interval is 0.5 +- 1.96 sqrt(0.25 / 1500)."""
    found = BOOTSTRAP.mean(np.arange(1500) % 2, [str(number) for number in range(1500)]).interval
    assert found is not None
    reach = 1.96 * math.sqrt(0.25 / 1500)
    assert (found.low, found.high) == pytest.approx((0.5 - reach, 0.5 + reach), abs=0.003)


def test_one_contest_has_no_interval_and_none_at_all_no_figure() -> None:
    assert BOOTSTRAP.mean([1.0, 0.0], ["a", "a"]).interval is None
    with pytest.raises(ValueError, match="at least one"):
        BOOTSTRAP.mean([], [])


def test_a_draw_that_leaves_nothing_to_divide_by_leaves_no_interval() -> None:
    """Contest b has denominator 0, and some draws take b only."""
    found = BOOTSTRAP.ratio([1.0, 0.0], [2.0, 0.0], ["a", "b"])
    assert (found.value, found.interval) == (0.5, None)


def test_the_difference_is_paired() -> None:
    """Both judges are right in contest a and wrong in b, but for one pair of b: each accuracy is uncertain, the difference is 1/4 in b.

    Differences by contest: a 0 of 4, b 1 of 4. Two drawn contests give 0, 1/8 or 1/4; either accuracy alone ranges from 0 or 1/4 to 1.
    """
    contests = ["a"] * 4 + ["b"] * 4
    mine, other = [1.0] * 5 + [-1.0] * 3, [1.0] * 4 + [-1.0] * 4
    found = difference(mine, other, contests, BOOTSTRAP)
    assert found.value == pytest.approx(1 / 8)
    assert found.interval == Interval(0.0, 0.25)


def test_a_tie_of_either_judge_counts_one_half_in_the_difference() -> None:
    """A judge that is always right against one that always ties: 1 - 1/2. One that ties against itself: nothing."""
    ahead = difference([1.0, 2.0], [0.0, 0.0], ["a", "b"], BOOTSTRAP)
    assert (ahead.value, ahead.interval) == (0.5, Interval(0.5, 0.5))
    assert difference([0.0, 1.0], [0.0, 1.0], ["a", "b"], BOOTSTRAP).value == 0.0


def test_contests_come_in_the_order_of_their_numbers() -> None:
    found = by_contest([1.0, -1.0, 0.0, 2.0], ["10", "9", "b", "10"])
    assert [each.contest for each in found] == ["9", "10", "b"]
    assert [(each.outcomes.num_pairs, each.outcomes.wins, each.outcomes.ties) for each in found] == [(1, 0, 0), (2, 2, 0), (1, 0, 1)]


def test_sigma_buckets_are_closed_below_and_open_above() -> None:
    """3 and 3.99 are in [3,4), 4 in [4,5), 8 and 1e9 in [8,inf); 2.9 and -2 lie below; no gap is a bucket of its own; [5,8) is empty."""
    gaps = [3.0, 3.99, 4.0, 8.0, 1e9, 2.9, -2.0, None]
    found = by_sigma([1.0] * 8, gaps, list("abcdefgh"), BOOTSTRAP)
    assert [(each.name, each.agreement.outcomes.num_pairs) for each in found] == [
        ("below 3", 2),
        ("3 to 4", 2),
        ("4 to 5", 1),
        ("8 and more", 2),
        ("unknown", 1),
    ]


def test_calibration_by_hand() -> None:
    """Margins ln 3 (x 3), -ln 3, 0: confidences 3/4 four times, of which three are right, and 1/2 once, half right: no error.

    With all four right the bin at 3/4 agrees in 1: error 4/5 * 1/4 = 0.2.
    """
    third = math.log(3)
    exact = calibration([third, third, third, -third, 0.0])
    assert [(each.num_pairs, each.confidence, each.agreement) for each in exact.bins] == [
        (1, 0.5, 0.5),
        (4, pytest.approx(0.75), 0.75),
    ]
    assert exact.expected_error == pytest.approx(0.0)
    assert calibration([third] * 4 + [0.0]).expected_error == pytest.approx(0.2)


def test_calibration_bins_are_deciles_and_scale_with_the_temperature() -> None:
    margins = np.random.default_rng(0).permutation(np.linspace(0.01, 6, 100))
    found = calibration(margins)
    assert [each.num_pairs for each in found.bins] == [10] * 10
    assert [each.confidence for each in found.bins] == sorted(each.confidence for each in found.bins)
    assert calibration(margins * 3, temperature=3.0).expected_error == pytest.approx(found.expected_error)


def test_saturated_confidences_share_a_bin() -> None:
    """sigmoid(1000) = sigmoid(2000) = 1 to the last bit."""
    (only,) = calibration([1000.0] * 30 + [2000.0] * 30 + [-1000.0] * 20).bins
    assert (only.num_pairs, only.confidence, only.agreement) == (80, 1.0, 0.75)


def test_temperature_by_hand() -> None:
    """Three margins of 1 and one of -1: the loss is least where sigmoid(1/T) = 3/4, so 1/T = ln 3."""
    found = fit_temperature([1.0, 1.0, 1.0, -1.0])
    assert found.value == pytest.approx(1 / math.log(3))
    assert found.loss == pytest.approx(-(0.75 * math.log(0.75) + 0.25 * math.log(0.25)))
    assert found.refused is None


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_temperature_finds_what_made_the_pairs(scale: float) -> None:
    """Winners drawn by sigmoid(m / (2 scale)): the fit finds 2 scale, and no other temperature has a smaller loss."""
    rng = np.random.default_rng(0)
    size = rng.exponential(3.0 * scale, 20_000)
    margins = np.where(rng.random(20_000) < sigmoid(size / (2 * scale)), size, -size)
    found = fit_temperature(margins)
    assert found.value == pytest.approx(2 * scale, rel=0.05)
    assert found.value is not None
    assert found.loss is not None
    assert found.loss < min(bradley_terry_loss(margins / (found.value * factor)) for factor in (0.9, 0.99, 1.01, 1.1))


@pytest.mark.parametrize(
    ("margins", "words"),
    [
        ([1.0, 2.0], "no pair is lost"),
        ([1.0, 0.0], "no pair is lost"),
        ([-1.0, -2.0], "mean margin is not positive"),
        ([1.0, -1.0], "mean margin is not positive"),
        ([1.0, 1e-9 - 1], "outside the range"),
    ],
)
def test_a_temperature_that_does_not_exist_is_refused_with_its_reason(margins: list[float], words: str) -> None:
    found = fit_temperature(margins)
    assert (found.value, found.loss) == (None, None)
    assert words in str(found.refused)


def test_the_histogram_loses_no_pair_and_never_mixes_wins_with_losses() -> None:
    margins = np.array([-1.0, -0.001, 0.0, 0.001, 3.0, 3.0])
    found = histogram(margins)
    edges, counts = np.array(found.edges), np.array(found.counts)
    assert counts.sum() == 6
    assert 0.0 in found.edges
    assert counts[edges[:-1] < 0].sum() == 2
    assert edges[0] <= -1.0
    assert edges[-1] >= 3.0


@pytest.mark.parametrize("margins", [[0.0], [-2.0, -1.0], [1.0, 2.0], [1e-300]])
def test_the_histogram_of_one_side_only(margins: list[float]) -> None:
    found = histogram(margins)
    assert sum(found.counts) == len(margins)
    assert all(low < high for low, high in itertools.pairwise(found.edges))


def test_best_of_two_of_three_by_hand() -> None:
    """Scores rank the ratings 1, 2, 4. Draws of two: {1,2} gives 2, {1,4} and {2,4} give 4: (2 + 4 + 4) / 3."""
    assert best_of_n([0.1, 0.2, 0.3], [1.0, 2.0, 4.0], 2) == pytest.approx(10 / 3)
    assert best_of_n([0.1, 0.2, 0.3], [1.0, 2.0, 4.0], 1) == pytest.approx(7 / 3)
    assert best_of_n([0.1, 0.2, 0.3], [1.0, 2.0, 4.0], 3) == 4.0


@pytest.mark.parametrize("n", [1, 2, 3, 5, 8])
def test_best_of_n_is_the_mean_over_all_draws(n: int) -> None:
    """The slow way: every draw, ties broken by their mean."""
    rng = np.random.default_rng(n)
    scores, ratings = rng.integers(0, 4, 8).astype(float), rng.normal(size=8)
    values = []
    for drawn in itertools.combinations(range(8), n):
        top = max(scores[place] for place in drawn)
        values.append(np.mean([ratings[place] for place in drawn if scores[place] == top]))
    assert best_of_n(scores, ratings, n) == pytest.approx(np.mean(values))


@pytest.mark.parametrize("n", [0, 4])
def test_more_captions_than_there_are_cannot_be_drawn(n: int) -> None:
    with pytest.raises(ValueError, match=f"cannot draw {n} of 3"):
        best_of_n([1.0, 2.0, 3.0], [1.0, 2.0, 3.0], n)


def test_gain_and_share_by_hand() -> None:
    """Ratings 1, 2, 4, random 7/3. The model ranks a right: best of two 10/3, gain 1. It ranks b backwards.

    b: draws {1,2} gives 1, {1,4} gives 1, {2,4} gives 2: 4/3, gain -1. The oracle gains 1 in both. Over both: gain 0, share 0.
    """
    right, wrong = pool("a", [1, 2, 3], [1, 2, 4]), pool("b", [3, 2, 1], [1, 2, 4])
    alone = best_of([right], 2, BOOTSTRAP)
    both = best_of([right, wrong], 2, BOOTSTRAP)
    assert alone is not None
    assert both is not None
    assert both.share is not None
    assert (alone.gain.value, alone.oracle_gain.value) == (pytest.approx(1.0), pytest.approx(1.0))
    assert (both.gain.value, both.share.value, both.gain.num_contests) == (pytest.approx(0.0), pytest.approx(0.0), 2)


def test_contests_with_too_few_captions_are_left_out_of_best_of_n() -> None:
    small, large = pool("a", [1, 2], [1, 2]), pool("b", [1, 2, 3, 4], [1, 2, 3, 4])
    found = best_of([small, large], 4, BOOTSTRAP)
    assert found is not None
    assert found.gain.num_contests == 1
    assert best_of([small], 4, BOOTSTRAP) is None


def test_equal_ratings_have_no_share() -> None:
    found = best_of([pool("a", [1, 2, 3], [2, 2, 2])], 2, BOOTSTRAP)
    assert found is not None
    assert (found.gain.value, found.share) == (pytest.approx(0.0), None)


def test_auc_by_hand() -> None:
    """Pairs of {2, 3} against {1, 2, 4}: 2 beats 1, ties 2, loses to 4: 1.5; 3 beats 1 and 2: 2. 3.5 of 6."""
    assert auc([2.0, 3.0], [1.0, 2.0, 4.0]) == pytest.approx(3.5 / 6)
    assert auc([5.0], [1.0]) == 1.0
    assert auc([1.0, 1.0], [1.0]) == 0.5


def test_bands_hold_their_ranks_and_the_median_its_neighbours() -> None:
    """2,001 captions of ranks 1 to 2001 in any order: the middle one has rank 1001, with five on either side."""
    ranks = np.random.default_rng(0).permutation(np.arange(1, 2002))
    found = {name: sorted(ranks[inside].tolist()) for name, inside in rank_bands(ranks).items()}
    assert found == {
        "1-10": list(range(1, 11)),
        "200-209": list(range(200, 210)),
        "1000-1009": list(range(1000, 1010)),
        MEDIAN_BAND: list(range(996, 1007)),
    }


def test_bands_are_compared_where_a_contest_has_both_apart() -> None:
    """5,001 captions scored by rank: every better band wins always. In a contest of 15 the median band (3 to 13) overlaps the first."""
    ranks = list(range(1, 5002))
    large = pool("a", [-float(rank) for rank in ranks], [0.0] * 5001, ranks)
    small = pool("b", [0.0] * 15, [0.0] * 15, list(range(1, 16)))
    found = {(each.better, each.worse): each.auc for each in compare_bands([large, small], BOOTSTRAP)}
    assert len(found) == 6
    assert all(each is not None and (each.value, each.num_contests) == (1.0, 1) for each in found.values())


def test_a_median_before_the_band_is_no_comparison() -> None:
    """1,101 captions: the median is rank 551, better than 1000-1009."""
    ranks = list(range(1, 1102))
    found = compare_bands([pool("a", [0.0] * 1101, [0.0] * 1101, ranks)], BOOTSTRAP)
    assert {(each.better, each.worse) for each in found if each.auc is None} == {("1000-1009", MEDIAN_BAND)}


def test_captions_without_a_score_are_in_no_band() -> None:
    """Six of ten refused leave four, fewer than a band needs; five of ten are enough."""
    ranks = list(range(1, 301))
    for num_refused, has_band in ((6, False), (5, True)):
        scores = [math.nan if rank <= num_refused else -float(rank) for rank in ranks]
        found = {(each.better, each.worse): each.auc for each in compare_bands([pool("a", scores, [0.0] * 300, ranks)], BOOTSTRAP)}
        assert (found["1-10", "200-209"] is not None) == has_band
