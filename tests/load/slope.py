"""Theil and Sen's slope with its confidence interval: how a noisy series grows, whatever a few outliers say."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np

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
    """Of at least three points with distinct x, in order. Ties are not corrected for, which widens the interval.

    What a process holds now is nearly what it held five seconds ago: the variance is that of dependent points, after Hamed and Rao,
    "A modified Mann-Kendall trend test for autocorrelated data", Journal of Hydrology 204 (1998). Without a trend points that keep 0.9
    of the one before would otherwise be called growing or shrinking more often than not.
    """
    slopes = sorted((y2 - y1) / (x2 - x1) for (x1, y1), (x2, y2) in combinations(points, 2) if x1 != x2)
    count = len(points)
    if not slopes or count < 3:
        raise ValueError("a slope needs three points apart")
    middle = (slopes[(len(slopes) - 1) // 2] + slopes[len(slopes) // 2]) / 2
    variance = count * (count - 1) * (2 * count + 5) / 18 * dependence([y - middle * x for x, y in points])
    spread = _Z * math.sqrt(variance)
    low = max(0, math.floor((len(slopes) - spread) / 2))
    high = min(len(slopes) - 1, math.ceil((len(slopes) + spread) / 2))
    return Slope(middle, slopes[low], slopes[high])


def dependence(residuals: Sequence[float]) -> float:
    """How many times the variance of Kendall's statistic is that of independent points, at least 1 (formula 15 of the paper).

    Ranks of what is left without the trend; of their correlations those count that points without any would exceed once in twenty.
    """
    count = len(residuals)
    values = np.asarray(residuals)
    _, places, times = np.unique(values, return_inverse=True, return_counts=True)
    ranks = (np.cumsum(times) - (times - 1) / 2)[places]  # equal values share a rank
    apart = ranks - ranks.mean()
    if not apart.any():
        return 1.0
    correlations = np.correlate(apart, apart, "full")[count - 1 :] / (apart @ apart)
    lags = np.arange(1, count)
    found = correlations[1:]
    counted = np.where(np.abs(found) > _Z / math.sqrt(count), found, 0.0)
    weights = (count - lags) * (count - lags - 1) * (count - lags - 2)
    return max(1.0, float(1 + 2 * (weights @ counted) / (count * (count - 1) * (count - 2))))
