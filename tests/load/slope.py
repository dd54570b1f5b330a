"""Theil and Sen's slope with its confidence interval: how a noisy series grows, whatever a few outliers say."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

_Z = 1.96  # 95 %


@dataclass(frozen=True, slots=True)
class Slope:
    """Median of the slopes of all pairs, and its 95 % interval from Kendall's statistic."""

    median: float
    low: float
    high: float

    @property
    def includes_zero(self) -> bool:
        return self.low <= 0 <= self.high


def theil_sen(points: Sequence[tuple[float, float]]) -> Slope:
    """Of at least two points with distinct x. Ties are not corrected for, which widens the interval."""
    slopes = sorted((y2 - y1) / (x2 - x1) for (x1, y1), (x2, y2) in combinations(points, 2) if x1 != x2)
    if not slopes:
        raise ValueError("a slope needs two points apart")
    count = len(points)
    spread = _Z * math.sqrt(count * (count - 1) * (2 * count + 5) / 18)
    low = max(0, math.floor((len(slopes) - spread) / 2))
    high = min(len(slopes) - 1, math.ceil((len(slopes) + spread) / 2))
    middle = (slopes[(len(slopes) - 1) // 2] + slopes[len(slopes) // 2]) / 2
    return Slope(middle, slopes[low], slopes[high])
