"""The controls: what they judge by, which pairs they are compared on, and that shuffled images never stay at home."""

from __future__ import annotations

import math

import numpy as np
import pytest

from training.controls import LENGTH, SHUFFLED, NoDerangement, compared, length_margins, shuffle_images, skipped
from training.statistics import Bootstrap, Interval

BOOTSTRAP = Bootstrap(seed=0, num_draws=500)


def one_contest_each(num: int) -> dict[str, frozenset[str]]:
    return {f"{number}.png": frozenset({str(number)}) for number in range(num)}


def test_the_shorter_caption_wins_by_characters_and_equal_lengths_tie() -> None:
    """ "Ein Bär" has 7 characters in 8 bytes, as many as "Ein Bar"."""
    assert length_margins([("ab", "abcd"), ("abc", "a"), ("Ein Bär", "Ein Bar")]).tolist() == [2.0, -2.0, 0.0]


def test_a_control_is_compared_on_the_pairs_both_can_judge() -> None:
    """Pairs 1 and 4 fall out (one side each). Left, in contests a and b: the model is right in both, the control in a only."""
    nan = math.nan
    found = compared(SHUFFLED, np.array([nan, 1.0, 1.0, 1.0]), np.array([1.0, 1.0, -1.0, nan]), ["a", "a", "b", "b"], BOOTSTRAP)
    assert found.agreement is not None
    assert found.difference is not None
    assert (found.agreement.outcomes.num_pairs, found.agreement.pooled.value, found.difference.value) == (2, 0.5, 0.5)
    assert found.difference.interval == Interval(0.0, 1.0)
    assert found.skipped is None


def test_ties_of_a_control_are_no_wins_strictly_and_half_ones_in_the_comparison() -> None:
    """The model wins both pairs, the control wins one and ties one: strictly 1/2, guessing 3/4, so the model is 1/4 ahead."""
    found = compared(SHUFFLED, np.array([1.0, 1.0]), np.array([1.0, 0.0]), ["a", "b"], BOOTSTRAP)
    assert found.agreement is not None
    assert found.guessing is not None
    assert found.difference is not None
    assert (found.agreement.pooled.value, found.guessing.value, found.difference.value) == (0.5, 0.75, 0.25)


def test_a_control_that_judges_nothing_says_so() -> None:
    found = compared(LENGTH, np.array([math.nan]), np.array([1.0]), ["a"], BOOTSTRAP)
    assert (found.skipped, found.agreement) == ("no pair can be judged both ways", None)
    assert skipped(LENGTH, "because").skipped == "because"


@pytest.mark.parametrize("num", [2, 3, 47])
@pytest.mark.parametrize("seed", range(5))
def test_shuffled_images_are_a_derangement(num: int, seed: int) -> None:
    images = one_contest_each(num)
    others = shuffle_images(images, seed)
    assert sorted(others) == sorted(others.values()) == sorted(images)
    assert all(image != other for image, other in others.items())


def test_no_image_stays_in_its_contest_where_contests_have_many() -> None:
    """Sizes 5, 4, 1: the largest has half of the images, so each of its five goes to one of the other five."""
    sizes = {"a": 5, "b": 4, "c": 1}
    images = {f"{name}{number}": frozenset({name}) for name, size in sizes.items() for number in range(size)}
    for seed in range(20):
        others = shuffle_images(images, seed)
        assert len(set(others.values())) == 10
        assert all(images[image].isdisjoint(images[other]) for image, other in others.items())


def test_an_image_of_two_contests_comes_to_neither() -> None:
    """As where two contests show the same cartoon."""
    images = one_contest_each(12) | {"shared.png": frozenset({"3", "7"})}
    for seed in range(20):
        others = shuffle_images(images, seed)
        assert others["3.png"] != "shared.png" != others["7.png"]
        assert others["shared.png"] not in ("shared.png", "3.png", "7.png")


def test_the_seed_decides_the_shuffle() -> None:
    images = one_contest_each(30)
    assert shuffle_images(images, 1) == shuffle_images(images, 1)
    assert shuffle_images(images, 1) != shuffle_images(images, 2)


def test_contests_that_share_images_in_a_ring_are_shuffled_across_it() -> None:
    """Neighbours share a contest, so each image may take only the opposite one."""
    images = {"w": frozenset({"a", "b"}), "x": frozenset({"b", "c"}), "y": frozenset({"c", "d"}), "z": frozenset({"d", "a"})}
    assert shuffle_images(images, 0) == {"w": "y", "y": "w", "x": "z", "z": "x"}


@pytest.mark.parametrize("images", [{}, one_contest_each(1), {"x": frozenset({"a"}), "y": frozenset({"a"}), "z": frozenset({"b"})}])
def test_a_contest_with_more_than_half_of_the_images_cannot_be_shuffled(images: dict[str, frozenset[str]]) -> None:
    with pytest.raises(NoDerangement, match="more than half"):
        shuffle_images(images, 0)


def test_contests_that_share_all_their_images_are_refused() -> None:
    """Any two of the three images have a contest in common."""
    images = {"x": frozenset({"a", "b"}), "y": frozenset({"b", "c"}), "z": frozenset({"a", "c"}), "u": frozenset({"d"})}
    with pytest.raises(NoDerangement, match="contests share their images"):
        shuffle_images(images, 0)
