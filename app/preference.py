"""What scores mean: preference probabilities, comparisons, rankings, a group's spread. Pure arithmetic, float64."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

_MAX_EXPONENT = 700.0  # exp() of more overflows


@dataclass(frozen=True, slots=True)
class Comparison:
    preferred: Literal["a", "b", "tie"]
    probability_a: float
    margin: float  # score_a - score_b


@dataclass(frozen=True, slots=True)
class Place:
    """One caption's place in a ranking; equal scores share a rank."""

    index: int
    rank: int
    score: float
    win_probability: float  # against the best
    tied: bool


def probability(margin: float, temperature: float = 1.0) -> float:
    """P(a preferred to b) by Bradley-Terry: sigmoid(margin / temperature).

    `probability(-m) == 1 - probability(m)` to the last bit, so swapping two captions mirrors the answer exactly: both are
    multiples of 2**-53, which makes the subtraction exact either way.
    """
    better = 1.0 - 1.0 / (1.0 + math.exp(min(abs(margin) / temperature, _MAX_EXPONENT)))
    return 1.0 - better if margin < 0 else better


def compare(score_a: float, score_b: float, temperature: float = 1.0) -> Comparison:
    """The preferred of two scores; `tie` only when they are equal."""
    margin = score_a - score_b
    preferred: Literal["a", "b", "tie"] = "tie" if margin == 0 else "a" if margin > 0 else "b"
    return Comparison(preferred, probability(margin, temperature), margin)


def rank(scores: Sequence[float], temperature: float = 1.0) -> list[Place]:
    """Best first; equal scores keep their order, share the better rank (1, 1, 3) and are marked as tied."""
    order = sorted(range(len(scores)), key=lambda index: -scores[index])
    counts = Counter(scores)
    places: list[Place] = []
    for position, index in enumerate(order, start=1):
        score = scores[index]
        shared = places[-1].rank if places and places[-1].score == score else position
        win = probability(score - scores[order[0]], temperature)
        places.append(Place(index, shared, score, win, tied=counts[score] > 1))
    return places


def spread(scores: Sequence[float]) -> float:
    """The population standard deviation of scores; exactly 0 for equal ones.

    `statistics.pstdev` computes with fractions, far longer.
    """
    if min(scores) == max(scores):
        return 0.0
    mean = math.fsum(score / len(scores) for score in scores)
    return math.hypot(*(score - mean for score in scores)) / math.sqrt(len(scores))
