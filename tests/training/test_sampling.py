"""Pairs of a contest: which are clear enough, with what probability each is drawn, and the order of the whole table."""

from __future__ import annotations

import math
import random
from collections import Counter
from dataclasses import replace
from itertools import combinations

import pytest

from training.pairs import Pair, RatedCaption
from training.sampling import PairRule, digest, interleave, sample_pairs, split_contests

EXHAUSTIVE, BY_TRIAL = 2_000, 0
SHARES = {"train": 0.8, "validation": 0.1, "test": 0.1}


def rated(text: str, mean: float, error: float = 0.1, *, contest: str = "510", votes: int = 50, rank: int = 0) -> RatedCaption:
    return RatedCaption(contest, f"images/{contest}.png", "Scene: a desk", text, mean, error, votes, rank)


def contest_of(number: int, *, contest: str = "510", seed: int = 1) -> list[RatedCaption]:
    rng = random.Random(seed)
    return [rated(f"caption {i}", rng.uniform(1, 3), rng.uniform(0.05, 0.4), contest=contest, rank=i) for i in range(number)]


def texts(pairs: list[Pair]) -> list[tuple[str, str]]:
    return [(pair.chosen, pair.rejected) for pair in pairs]


@pytest.mark.parametrize("exhaustive", [EXHAUSTIVE, BY_TRIAL])
def test_only_pairs_three_pooled_standard_errors_apart(exhaustive: int) -> None:
    """All errors 0.1, so pooled sqrt(0.02) = 0.1414: gaps 0.5 and 0.6 are 3.54 and 4.24 of it, the gap 0.1 is 0.71."""
    captions = [rated("middle", 1.5), rated("best", 2.0, votes=70), rated("last", 1.4, votes=30)]
    pairs = sample_pairs(captions, PairRule(max_exhaustive_captions=exhaustive), seed=0)
    assert sorted(texts(pairs)) == [("best", "last"), ("best", "middle")]
    last = next(pair for pair in pairs if pair.rejected == "last")
    assert last.sigma_gap == pytest.approx(0.6 / math.sqrt(0.02))
    assert last.mean_gap == pytest.approx(0.6)
    assert (last.chosen_votes, last.rejected_votes) == (70, 30)
    assert (last.contest, last.image, last.prompt) == ("510", "images/510.png", "Scene: a desk")


def test_the_threshold_itself_is_clear() -> None:
    """Errors 3 and 4 pool to 5; a gap of 15 is 3 of them."""
    captions = [rated("a", 20.0, 3.0), rated("b", 5.0, 4.0)]
    assert len(sample_pairs(captions, PairRule(min_sigma=3.0), seed=0)) == 1
    assert sample_pairs(captions, PairRule(min_sigma=3.0001), seed=0) == []


def test_equal_means_are_never_a_pair() -> None:
    assert sample_pairs([rated("a", 1.5), rated("b", 1.5)], PairRule(min_sigma=0.0), seed=0) == []


@pytest.mark.parametrize("number", [0, 1])
def test_too_little_for_a_pair(number: int) -> None:
    assert sample_pairs(contest_of(number), PairRule(), seed=0) == []


def test_a_small_contest_gives_every_clear_pair() -> None:
    captions = contest_of(60)
    expected = {
        (max(a, b, key=lambda each: each.mean).caption, min(a, b, key=lambda each: each.mean).caption)
        for a, b in combinations(captions, 2)
        if abs(a.mean - b.mean) / math.hypot(a.standard_error, b.standard_error) >= 3
    }
    pairs = sample_pairs(captions, PairRule(max_pairs=60 * 60), seed=5)
    assert len(pairs) == len(expected) > 100
    assert set(texts(pairs)) == expected


@pytest.mark.parametrize("exhaustive", [EXHAUSTIVE, BY_TRIAL])
def test_the_cap_holds_and_no_pair_comes_twice(exhaustive: int) -> None:
    captions = contest_of(80)
    means = {caption.caption: caption.mean for caption in captions}
    pairs = sample_pairs(captions, PairRule(max_pairs=300, max_exhaustive_captions=exhaustive), seed=5)
    assert len(pairs) == len(set(texts(pairs))) == len({pair.pair_id for pair in pairs}) == 300
    assert all(means[pair.chosen] > means[pair.rejected] and (pair.sigma_gap or 0) >= 3 for pair in pairs)


@pytest.mark.parametrize("exhaustive", [EXHAUSTIVE, BY_TRIAL])
def test_the_law_of_a_draw_is_the_published_one(exhaustive: int) -> None:
    """Of three captions, all clear: i is 0 or 1 with 1/2 each, then j behind it. P(0,1) = P(0,2) = 1/4, P(1,2) = 1/2.

    Over 2,000 seeds the standard deviation of a share is at most 0.0112; 0.05 is more than four of them.
    """
    captions = [rated("0", 9.0), rated("1", 6.0), rated("2", 3.0)]
    rule = PairRule(max_pairs=1, max_exhaustive_captions=exhaustive)
    drawn = Counter(texts(sample_pairs(captions, rule, seed))[0] for seed in range(2_000))
    for pair, share in {("0", "1"): 0.25, ("0", "2"): 0.25, ("1", "2"): 0.5}.items():
        assert drawn[pair] / 2_000 == pytest.approx(share, abs=0.05)


@pytest.mark.parametrize("exhaustive", [EXHAUSTIVE, BY_TRIAL])
def test_a_seed_gives_the_same_pairs_whatever_the_order_of_the_file(exhaustive: int) -> None:
    captions = contest_of(80)
    rule = PairRule(max_pairs=50, max_exhaustive_captions=exhaustive)
    pairs = sample_pairs(captions, rule, seed=3)
    assert sample_pairs(random.Random(9).sample(captions, 80), rule, seed=3) == pairs
    assert sample_pairs(captions, rule, seed=4) != pairs


def test_the_draw_is_pinned() -> None:
    """A change of these would silently change every prepared table."""
    pairs = sample_pairs(contest_of(30), PairRule(max_pairs=3), seed=42)
    assert [pair.pair_id for pair in pairs] == ["510-997a7a9fe005e0a3", "510-54a4c7369da735af", "510-d24d81d5f2cf05e7"]
    assert digest("a", "b") != digest("ab", "")


def test_contests_draw_from_streams_of_their_own() -> None:
    """The same captions under another contest's name give other pairs."""
    first, second = contest_of(80, contest="510"), contest_of(80, contest="511")
    rule = PairRule(max_pairs=50)
    assert texts(sample_pairs(first, rule, seed=3)) != texts(sample_pairs(second, rule, seed=3))


def made_pairs(contest: str, number: int) -> list[Pair]:
    return [Pair(f"{contest}-{k}", contest, None, None, f"good {k}", f"bad {k}") for k in range(number)]


def test_any_beginning_of_the_table_has_every_contest_equally_often() -> None:
    """Twelve contests of fifty pairs: in any first m pairs the most and the least frequent contest differ by one at most."""
    table = interleave({str(contest): made_pairs(str(contest), 50) for contest in range(12)}, seed=1)
    seen = Counter({str(contest): 0 for contest in range(12)})
    for pair in table:
        seen[pair.contest] += 1
        assert max(seen.values()) - min(seen.values()) <= 1
    assert set(seen.values()) == {50}


def test_a_small_contest_is_spread_over_the_whole_table() -> None:
    """Ten pairs beside a thousand: each tenth of the table, give or take one pair's place, holds one."""
    table = interleave({"small": made_pairs("small", 10), "large": made_pairs("large", 1_000)}, seed=1)
    places = [place for place, pair in enumerate(table) if pair.contest == "small"]
    assert all(abs(place - (k + 0.5) * 101) <= 60 for k, place in enumerate(places))


def test_the_order_is_seeded_and_adding_a_contest_changes_no_other() -> None:
    contests = {name: made_pairs(name, number) for name, number in (("510", 30), ("511", 7), ("512", 100))}
    table = interleave(contests, seed=1)
    assert sorted(pair.pair_id for pair in table) == sorted(pair.pair_id for pairs in contests.values() for pair in pairs)
    assert interleave(contests, seed=2) != table
    more = interleave({"509": made_pairs("509", 40), **contests}, seed=1)
    assert [pair for pair in more if pair.contest != "509"] == table


def test_splits_hold_their_shares_and_stay_when_a_contest_is_added() -> None:
    """1,000 contests at 0.8 / 0.1 / 0.1: standard deviations 13, 9.5 and 9.5."""
    placed = split_contests(map(str, range(1_000)), SHARES, seed=1)
    counts = Counter(placed.values())
    assert abs(counts["train"] - 800) < 60
    assert abs(counts["validation"] - 100) < 45
    assert split_contests(map(str, range(1_100)), SHARES, seed=1).items() >= placed.items()
    assert split_contests(map(str, range(1_000)), SHARES, seed=2) != placed


def test_a_share_of_nothing_gets_nothing() -> None:
    assert set(split_contests(map(str, range(500)), {"train": 0.0, "validation": 0.0, "test": 3.0}, seed=1).values()) == {"test"}
    assert "test" not in split_contests(map(str, range(500)), {"train": 1.0, "validation": 1.0, "test": 0.0}, seed=1).values()


def test_votes_and_rank_do_not_reorder_by_mean() -> None:
    captions = [replace(rated("worse", 1.0), rank=0, votes=9_999), replace(rated("better", 2.0), rank=500, votes=10)]
    assert texts(sample_pairs(captions, PairRule(), seed=0)) == [("better", "worse")]
