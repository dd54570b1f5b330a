"""Sums over scored groups that merge in any order and stay of one size, exact where all scores are equal. Knows numbers, no captions.

Squares and products of deviations are merged as by Chan, Golub and LeVeque (1979): nothing large is subtracted from anything large.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

NO_SPREAD = 1e-4  # what GRPO trainers add to a group's standard deviation before they divide by it; scores of one caption differ by less
OUTSIDE = 3.0  # standard deviations of the artifact's scores


@dataclass(frozen=True, slots=True)
class Expected:
    """The scores an artifact gave to its validation data. `std` is above 0."""

    mean: float
    std: float

    def holds(self, score: float) -> bool:
        """Whether a score lies within three standard deviations."""
        return abs(score - self.mean) <= OUTSIDE * self.std


@dataclass(slots=True)
class Deviations:
    """Sums over pairs (score, length) of squared deviations from their means, and of the products of both deviations."""

    scores: float = 0.0
    lengths: float = 0.0
    products: float = 0.0

    def add(self, other: Deviations) -> None:
        self.scores += other.scores
        self.lengths += other.lengths
        self.products += other.products

    def correlation(self) -> float | None:
        """Pearson's: sum of products / sqrt(sum of squares * sum of squares). None where either is constant."""
        scale = math.sqrt(self.scores) * math.sqrt(self.lengths)
        return max(-1.0, min(1.0, self.products / scale)) if scale > 0 else None


@dataclass(slots=True)
class Moments:
    """Number, means and deviations of pairs (score, length)."""

    num: int = 0
    score: float = 0.0  # the mean
    length: float = 0.0
    around: Deviations = field(default_factory=Deviations)

    def add(self, other: Moments) -> None:
        """Chan's update: deviations add, plus d**2 * n * m / (n + m) for means that lie d apart."""
        if not other.num:
            return
        total = self.num + other.num
        score, length = other.score - self.score, other.length - self.length
        weight = self.num * (other.num / total)
        self.around.add(other.around)
        self.around.add(Deviations(score * score * weight, length * length * weight, score * length * weight))
        self.score += score * (other.num / total)
        self.length += length * (other.num / total)
        self.num = total

    def std(self) -> float | None:
        """Of the scores, over all of them (divided by n). None without any."""
        return math.sqrt(self.around.scores / self.num) if self.num else None


def moments_of(scores: Sequence[float], lengths: Sequence[int]) -> Moments:
    """In two passes, counted from the first pair, so that equal scores have a deviation of exactly 0."""
    num, first, shortest = len(scores), scores[0], lengths[0]
    moved = [score - first for score in scores]
    longer = [length - shortest for length in lengths]
    mean, middle = sum(moved) / num, sum(longer) / num
    away = [score - mean for score in moved]
    apart = [length - middle for length in longer]
    around = Deviations(
        sum([score * score for score in away]),
        sum([length * length for length in apart]),
        sum([score * length for score, length in zip(away, apart, strict=True)]),
    )
    return Moments(num, first + mean, shortest + middle, around)


@dataclass(slots=True)
class Tally:
    """All that is counted of some groups. `compared`: of at least two scores, of which alone a spread can be told."""

    num_groups: int = 0
    num_compared: int = 0
    num_flat: int = 0  # compared, and their scores have no spread
    spreads: float = 0.0  # sum of the standard deviations of compared groups
    num_duplicates: int = 0  # captions whose text another caption of the group has as well
    num_repeats: int = 0  # captions whose text an earlier group had
    num_outside: int = 0  # scores more than three standard deviations from the mean of the artifact's distribution
    lowest: float = math.inf
    highest: float = -math.inf
    began_s: float = math.inf
    ended_s: float = -math.inf
    all: Moments = field(default_factory=Moments)
    within: Deviations = field(default_factory=Deviations)  # from the means of each group by itself

    def add(self, other: Tally) -> None:
        """The tally of both: the same in whatever order, but for rounding."""
        self.num_groups += other.num_groups
        self.num_compared += other.num_compared
        self.num_flat += other.num_flat
        self.spreads += other.spreads
        self.num_duplicates += other.num_duplicates
        self.num_repeats += other.num_repeats
        self.num_outside += other.num_outside
        self.lowest = min(self.lowest, other.lowest)
        self.highest = max(self.highest, other.highest)
        self.began_s = min(self.began_s, other.began_s)
        self.ended_s = max(self.ended_s, other.ended_s)
        self.all.add(other.all)
        self.within.add(other.within)

    @property
    def num_captions(self) -> int:
        return self.all.num

    @property
    def spread(self) -> float | None:
        """Mean standard deviation within a group."""
        return self.spreads / self.num_compared if self.num_compared else None

    @property
    def flat_share(self) -> float | None:
        return self.num_flat / self.num_compared if self.num_compared else None

    @property
    def duplicate_share(self) -> float | None:
        return self.num_duplicates / self.num_captions if self.num_captions else None

    @property
    def repeat_share(self) -> float | None:
        return self.num_repeats / self.num_captions if self.num_captions else None

    def drift(self, expected: Expected | None) -> float | None:
        """(mean - expected mean) / expected standard deviation."""
        return (self.all.score - expected.mean) / expected.std if expected and self.num_captions else None

    def std_ratio(self, expected: Expected | None) -> float | None:
        """Standard deviation / expected standard deviation."""
        std = self.all.std()
        return std / expected.std if expected and std is not None else None

    def outside_share(self, expected: Expected | None) -> float | None:
        return self.num_outside / self.num_captions if expected and self.num_captions else None


def tally_of(
    scores: Sequence[float],
    lengths: Sequence[int],
    began_s: float,
    ended_s: float,
    *,
    num_duplicates: int,
    num_repeats: int,
    expected: Expected | None,
) -> Tally:
    """Of one group with at least one score."""
    moments = moments_of(scores, lengths)
    is_compared = moments.num > 1
    spread = math.sqrt(moments.around.scores / moments.num)
    around = moments.around
    return Tally(
        num_groups=1,
        num_compared=int(is_compared),
        num_flat=int(is_compared and spread <= NO_SPREAD),
        spreads=spread,
        num_duplicates=num_duplicates,
        num_repeats=num_repeats,
        num_outside=sum([not expected.holds(score) for score in scores]) if expected else 0,
        lowest=min(scores),
        highest=max(scores),
        began_s=began_s,
        ended_s=ended_s,
        all=moments,
        within=Deviations(around.scores, around.lengths, around.products),
    )


def merged(tallies: Iterable[Tally]) -> Tally:
    """The tally of all; none of them is changed."""
    found = Tally()
    for tally in tallies:
        found.add(tally)
    return found


class History:
    """A whole run as at most `max_points` tallies, each of as many consecutive groups as the others but for the last.

    When it is full, neighbours are merged by twos: a run of any length has between half of `max_points` and all of them.
    """

    def __init__(self, *, max_points: int = 128, num_groups: int = 4) -> None:
        """`max_points` is even; `num_groups`: of a point, to begin with."""
        self._max_points = max_points
        self._num_groups = num_groups
        self._points: list[Tally] = []

    def add(self, tally: Tally) -> None:
        if not self._points or self._points[-1].num_groups >= self._num_groups:
            if len(self._points) == self._max_points:
                self._points = [merged(pair) for pair in zip(self._points[::2], self._points[1::2], strict=True)]
                self._num_groups *= 2
            self._points.append(Tally())
        self._points[-1].add(tally)

    def whole(self, still: Tally | None = None) -> list[Tally]:
        """To be drawn, `still` (of groups that are not added yet) at its end: at most a point more than there are.

        A last point of less than half as many groups as the others is merged into the one before.
        """
        points = [*self._points, still] if still and still.num_groups else list(self._points)
        if len(points) < 2 or 2 * points[-1].num_groups >= self._num_groups:
            return points
        return [*points[:-2], merged(points[-2:])]

    def __iter__(self) -> Iterator[Tally]:
        return iter(self._points)

    def __len__(self) -> int:
        return len(self._points)


class Recent:
    """The last groups: `num_blocks` whole blocks of `num_groups`, and the one that fills."""

    def __init__(self, *, num_blocks: int = 8, num_groups: int = 16) -> None:
        self._num_groups = num_groups
        self._blocks: deque[Tally] = deque(maxlen=num_blocks + 1)
        self._tally: Tally | None = None

    def add(self, tally: Tally) -> None:
        self._tally = None
        if not self._blocks or self._blocks[-1].num_groups == self._num_groups:
            self._blocks.append(Tally())
        self._blocks[-1].add(tally)

    def tally(self) -> Tally:
        """Of all of them; kept until the next group, so it is not to be changed."""
        if self._tally is None:
            self._tally = merged(self._blocks)
        return self._tally
