"""Figures of a preference model from its margins and scores: agreement, calibration, selection, ranking, with intervals.

Pure NumPy, float64. A margin is score(chosen) - score(rejected), so above zero the model agrees with the crowd. Pairs of one contest
are not independent: every interval resamples contests, never pairs. Knows no model, no table and no report.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]
Booleans = NDArray[np.bool_]

LEVEL = 0.95
SIGMA_EDGES = (3.0, 4.0, 5.0, 8.0)  # buckets [3,4) [4,5) [5,8) [8,inf), and what lies below
NUM_BINS = 10
NUM_STEPS = 48  # of the histogram, were it as wide on both sides
RANK_BANDS = {"1-10": (1, 10), "200-209": (200, 209), "1000-1009": (1000, 1009)}
MEDIAN_BAND, MEDIAN_REACH = "median", 5
MIN_BAND = 5  # captions; fewer say nothing about a band
_MAX_DRAWN = 1 << 20  # numbers held at once while resampling
_LOG_REACH = 14.0  # temperatures searched: the mean size of a margin times e**-14 to e**14


@dataclass(frozen=True, slots=True)
class Interval:
    """Percentile interval of `LEVEL`."""

    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Estimate:
    """A figure, and its interval over contests: None with fewer than two, or where a draw leaves the figure undefined."""

    value: float
    interval: Interval | None
    num_contests: int


@dataclass(frozen=True, slots=True)
class Outcomes:
    """How the model judged some pairs. Standard deviation with divisor n."""

    num_pairs: int
    wins: int
    ties: int
    losses: int
    accuracy: float  # wins / num_pairs: a tie is no win
    margin_mean: float
    margin_std: float
    loss: float  # nats a pair


@dataclass(frozen=True, slots=True)
class Agreement:
    """All pairs together, and the mean over contests."""

    outcomes: Outcomes
    pooled: Estimate  # accuracy over pairs
    macro: Estimate  # mean of the contests' accuracies


@dataclass(frozen=True, slots=True)
class ContestOutcomes:
    contest: str
    outcomes: Outcomes


@dataclass(frozen=True, slots=True)
class Bucket:
    """Pairs whose sigma gap lies in [low, high); both None: the gap is not known. `high` None: no upper end.

    The lowest bucket has no lower end: a gap is below zero where the preferred caption has the lower mean.
    """

    low: float | None
    high: float | None
    agreement: Agreement

    @property
    def name(self) -> str:
        if self.low is None:
            return "unknown"
        if self.low == 0:
            return f"below {self.high:g}"
        return f"{self.low:g} and more" if self.high is None else f"{self.low:g} to {self.high:g}"


@dataclass(frozen=True, slots=True)
class CalibrationBin:
    num_pairs: int
    confidence: float  # mean probability the model gives to the side it prefers
    agreement: float  # share of pairs in which that side is the crowd's; a tie counts one half


@dataclass(frozen=True, slots=True)
class Calibration:
    bins: tuple[CalibrationBin, ...]
    expected_error: float


@dataclass(frozen=True, slots=True)
class Histogram:
    """Counts between consecutive edges, the last edge included."""

    edges: tuple[float, ...]
    counts: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Temperature:
    """The temperature of the smallest loss, or why there is none."""

    value: float | None
    loss: float | None
    refused: str | None = None


@dataclass(frozen=True, slots=True)
class Pool:
    """Captions of one contest with the model's scores, the crowd's mean ratings and the crowd's ranks, row by row."""

    contest: str
    scores: Floats
    ratings: Floats
    ranks: NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class BestOf:
    """Mean crowd rating gained over a random caption by taking the best of n: by the model, and by the ratings themselves."""

    n: int
    gain: Estimate
    oracle_gain: Estimate
    share: Estimate | None  # gain / oracle gain; None where all ratings are equal


@dataclass(frozen=True, slots=True)
class BandComparison:
    """How well scores tell two rank bands apart; `auc` None where no contest has both."""

    better: str
    worse: str
    auc: Estimate | None


@dataclass(frozen=True, slots=True)
class Bootstrap:
    """Intervals by drawing contests with replacement, as many as there are (Field and Welsh, 2007, "Bootstrapping clustered data")."""

    seed: int = 0
    num_draws: int = 2000

    def ratio(self, numerators: ArrayLike, denominators: ArrayLike, contests: Sequence[str]) -> Estimate:
        """sum(numerators) / sum(denominators), one entry a pair or pool, with its percentile interval (Efron, 1979).

        Entries of a contest are summed first and drawn together. Raises ValueError without entries.
        """
        if not len(contests):
            raise ValueError("a figure needs at least one pair")
        _, index = np.unique(np.asarray(contests), return_inverse=True)
        top = np.bincount(index, np.asarray(numerators, dtype=np.float64)).astype(np.float64)  # [contests]
        bottom = np.bincount(index, np.asarray(denominators, dtype=np.float64)).astype(np.float64)
        return Estimate(float(top.sum() / bottom.sum()), self._interval(top, bottom), len(top))

    def mean(self, values: ArrayLike, contests: Sequence[str]) -> Estimate:
        """Mean over entries, one a pair or pool."""
        return self.ratio(values, np.ones(len(contests)), contests)

    def macro(self, values: ArrayLike, contests: Sequence[str]) -> Estimate:
        """Mean over contests of the mean within each."""
        names, index = np.unique(np.asarray(contests), return_inverse=True)
        return self.mean(np.bincount(index, np.asarray(values, dtype=np.float64)) / np.bincount(index), names.tolist())

    def _interval(self, top: Floats, bottom: Floats) -> Interval | None:
        if len(top) < 2:
            return None
        rng = np.random.default_rng(self.seed)
        rows = max(1, _MAX_DRAWN // len(top))
        parts = []
        for start in range(0, self.num_draws, rows):
            drawn = rng.integers(len(top), size=(min(rows, self.num_draws - start), len(top)))  # [draws, contests]
            parts.append((top[drawn].sum(axis=1), bottom[drawn].sum(axis=1)))
        tops, bottoms = (np.concatenate(side) for side in zip(*parts, strict=True))
        if not bottoms.all():
            return None
        low, high = np.quantile(tops / bottoms, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
        return Interval(float(low), float(high))


def bradley_terry_loss(margins: ArrayLike) -> float:
    """Mean of -log sigmoid(m) = log(1 + exp(-m)) (Bradley and Terry, 1952), by `logaddexp`: no margin overflows."""
    return float(np.logaddexp(0.0, -_margins(margins)).mean())


def sigmoid(values: ArrayLike) -> Floats:
    """1 / (1 + exp(-x)) as (1 + tanh(x / 2)) / 2: no value overflows."""
    result: Floats = 0.5 * (1.0 + np.tanh(0.5 * np.asarray(values, dtype=np.float64)))
    return result


def outcomes(margins: ArrayLike) -> Outcomes:
    """Counts and moments of some pairs. A tie is neither a win nor a loss."""
    found = _margins(margins)
    wins, ties = int((found > 0).sum()), int((found == 0).sum())
    return Outcomes(
        num_pairs=len(found),
        wins=wins,
        ties=ties,
        losses=len(found) - wins - ties,
        accuracy=wins / len(found),
        margin_mean=float(found.mean()),
        margin_std=float(found.std()),
        loss=bradley_terry_loss(found),
    )


def agreement(margins: ArrayLike, contests: Sequence[str], bootstrap: Bootstrap) -> Agreement:
    """Accuracy over pairs and over contests, each with its interval."""
    found = _margins(margins)
    wins = found > 0
    return Agreement(outcomes(found), bootstrap.mean(wins, contests), bootstrap.macro(wins, contests))


def credit(margins: ArrayLike) -> Floats:
    """1 for a win, 0 for a loss, one half for a tie: what a judge that guesses at its ties gets on average."""
    result: Floats = (np.sign(_margins(margins)) + 1) / 2
    return result


def difference(margins: ArrayLike, others: ArrayLike, contests: Sequence[str], bootstrap: Bootstrap) -> Estimate:
    """Accuracy by `margins` minus accuracy by `others` on the same pairs: paired, so contests that are hard for both cancel.

    Ties count one half on both sides, so that nobody is ahead of a judge that sees no difference for answering at random.
    """
    return bootstrap.mean(credit(margins) - credit(others), contests)


def by_contest(margins: ArrayLike, contests: Sequence[str]) -> list[ContestOutcomes]:
    """Every contest by itself, in order of name, numbers as numbers."""
    names, index, counts = np.unique(np.asarray(contests), return_inverse=True, return_counts=True)
    parts = np.split(_margins(margins)[np.argsort(index, kind="stable")], np.cumsum(counts)[:-1])
    own = dict(zip(names.tolist(), parts, strict=True))
    return [ContestOutcomes(name, outcomes(own[name])) for name in sorted(own, key=_natural)]


def by_sigma(margins: ArrayLike, gaps: Sequence[float | None], contests: Sequence[str], bootstrap: Bootstrap) -> list[Bucket]:
    """Buckets by sigma gap that hold pairs, lowest first; pairs without a gap last."""
    found, labels = _margins(margins), np.asarray(contests)
    known = np.array([math.nan if gap is None else gap for gap in gaps], dtype=np.float64)
    edges: list[float | None] = [0.0, *SIGMA_EDGES, None]
    buckets = []
    for low, high in [*itertools.pairwise(edges), (None, None)]:
        least = -math.inf if low == 0 else low
        inside = np.isnan(known) if least is None else (known >= least) & (known < (math.inf if high is None else high))
        if inside.any():
            buckets.append(Bucket(low, high, agreement(found[inside], labels[inside].tolist(), bootstrap)))
    return buckets


def histogram(margins: ArrayLike) -> Histogram:
    """Equal steps over the whole range, zero on an edge, so that no bar holds wins and losses."""
    found = _margins(margins)
    reach = max(float(np.abs(found).max()), 1e-9)
    step = 2 * reach / NUM_STEPS
    first, last = math.floor(float(found.min()) / step), max(math.floor(float(found.max()) / step) + 1, 1)
    edges = np.arange(first, last + 1) * step
    counts, _ = np.histogram(np.clip(found, edges[0], edges[-1]), edges)
    return Histogram(tuple(edges.tolist()), tuple(counts.tolist()))


def calibration(margins: ArrayLike, temperature: float = 1.0) -> Calibration:
    """Reliability in deciles of confidence, and the expected calibration error (Naeini et al., 2015; Guo et al., 2017).

    Every pair is folded to the side the model prefers: confidence sigmoid(|m| / T), right where that side is the crowd's, one
    half for a tie. That equals showing every pair in both orders, so nothing depends on which caption is named first. Equal
    confidences share a bin, so there may be fewer than ten. Error: sum over bins of n_bin / n * |agreement - confidence|.
    """
    found = _margins(margins)
    confidence = sigmoid(np.abs(found) / temperature)
    right = credit(found)
    inner = np.unique(np.quantile(confidence, np.linspace(0, 1, NUM_BINS + 1)[1:-1]))
    place = np.searchsorted(inner, confidence, side="left")
    members = [place == number for number in np.unique(place)]
    bins = tuple(CalibrationBin(int(own.sum()), float(confidence[own].mean()), float(right[own].mean())) for own in members)
    error = sum(each.num_pairs * abs(each.agreement - each.confidence) for each in bins) / len(found)
    return Calibration(bins, float(error))


def fit_temperature(margins: ArrayLike) -> Temperature:
    """The T that minimises the mean of log(1 + exp(-m / T)) (temperature scaling; Guo et al., 2017).

    The loss is convex in 1 / T with derivative -mean(m * sigmoid(-m / T)), so its zero is found by bisection in log T. There is
    none when no pair is lost (T would go to 0) or when the margins point the wrong way on average (T would go to infinity).
    """
    found = _margins(margins)
    if not (found < 0).any():
        return Temperature(None, None, "no pair is lost, so a smaller temperature is always better")
    if found.mean() <= 0:
        return Temperature(None, None, "the mean margin is not positive, so a larger temperature is always better")
    centre = math.log(float(np.abs(found).mean()))
    low, high = centre - _LOG_REACH, centre + _LOG_REACH
    if not _wants_hotter(found, low) or _wants_hotter(found, high):
        return Temperature(None, None, "the best temperature lies outside the range that is searched")
    while high - low > 1e-12:
        middle = (low + high) / 2
        low, high = (middle, high) if _wants_hotter(found, middle) else (low, middle)
    value = math.exp((low + high) / 2)
    return Temperature(value, bradley_terry_loss(found / value))


def best_of_n(scores: ArrayLike, ratings: ArrayLike, n: int) -> float:
    """Expected rating of the best-scored of n captions drawn without replacement, exactly, over all draws.

    Of M captions in ascending order the k-th is the best of a draw with probability C(k-1, n-1) / C(M, n): n - 1 of those below
    it came along. Equal scores share their weights, as choosing among them at random would.
    """
    _, place = np.unique(np.asarray(scores, dtype=np.float64), return_inverse=True)
    values = np.asarray(ratings, dtype=np.float64)
    total = len(values)
    if not 1 <= n <= total:
        raise ValueError(f"cannot draw {n} of {total} captions")
    shared = (np.bincount(place, values) / np.bincount(place))[place]  # the mean rating of those with the same score
    ascending = shared[np.argsort(place, kind="stable")]
    ranks = np.arange(1, total)  # w(M) = n / M, then w(k) = w(k + 1) * (k + 1 - n) / k
    steps = np.maximum(ranks + 1 - n, 0) / ranks
    weights = n / total * np.append(np.cumprod(steps[::-1])[::-1], 1.0)
    return float(weights @ ascending)


def best_of(pools: Sequence[Pool], n: int, bootstrap: Bootstrap) -> BestOf | None:
    """Gains over all pools that hold at least n captions; None if there is none."""
    able = [pool for pool in pools if len(pool.scores) >= n]
    if not able:
        return None
    contests = [pool.contest for pool in able]
    gains = [best_of_n(pool.scores, pool.ratings, n) - float(pool.ratings.mean()) for pool in able]
    oracle = [best_of_n(pool.ratings, pool.ratings, n) - float(pool.ratings.mean()) for pool in able]
    share = bootstrap.ratio(gains, oracle, contests) if sum(oracle) > 0 else None
    return BestOf(n, bootstrap.mean(gains, contests), bootstrap.mean(oracle, contests), share)


def auc(better: ArrayLike, worse: ArrayLike) -> float:
    """P(a score of `better` is above one of `worse`), equal ones counting one half (Mann and Whitney, 1947; Hanley and McNeil, 1982)."""
    ordered = np.sort(np.asarray(worse, dtype=np.float64))
    values = np.asarray(better, dtype=np.float64)
    below = np.searchsorted(ordered, values, side="left")
    not_above = np.searchsorted(ordered, values, side="right")
    return float((below + not_above).sum() / (2 * len(ordered) * len(values)))


def rank_bands(ranks: ArrayLike) -> dict[str, Booleans]:
    """Which captions of a whole contest stand in which band; the median's are the middle one and `MEDIAN_REACH` on either side."""
    found = np.asarray(ranks, dtype=np.int64)
    bands = {name: (found >= low) & (found <= high) for name, (low, high) in RANK_BANDS.items()}
    middle = np.zeros(len(found), dtype=np.bool_)
    centre = len(found) // 2
    middle[np.argsort(found, kind="stable")[max(0, centre - MEDIAN_REACH) : centre + MEDIAN_REACH + 1]] = True
    return bands | {MEDIAN_BAND: middle}


def compare_bands(pools: Sequence[Pool], bootstrap: Bootstrap) -> list[BandComparison]:
    """Every two bands: AUC a contest, averaged over the contests that have both.

    Pools hold whole contests; a score that is NaN was not asked for or refused. A contest has a band when `MIN_BAND` captions of it are
    scored, and two bands when all ranks of the better lie before all of the worse: with few captions the median may overlap or lead.
    """
    names = [*RANK_BANDS, MEDIAN_BAND]
    banded = [(pool, _scored_bands(pool)) for pool in pools]
    compared = []
    for place, better in enumerate(names):
        for worse in names[place + 1 :]:
            both = [(pool, own[better], own[worse]) for pool, own in banded if better in own and worse in own]
            apart = [(pool, top, low) for pool, top, low in both if pool.ranks[top].max() < pool.ranks[low].min()]
            values = [auc(pool.scores[top], pool.scores[low]) for pool, top, low in apart]
            compared.append(
                BandComparison(better, worse, bootstrap.macro(values, [pool.contest for pool, _, _ in apart]) if apart else None)
            )
    return compared


def _scored_bands(pool: Pool) -> dict[str, Booleans]:
    scored = np.isfinite(pool.scores)
    bands = {name: inside & scored for name, inside in rank_bands(pool.ranks).items()}
    return {name: inside for name, inside in bands.items() if inside.sum() >= MIN_BAND}


def _wants_hotter(margins: Floats, log_temperature: float) -> bool:
    """Whether the loss falls when T grows: the derivative by 1 / T is positive."""
    return float((margins * sigmoid(-margins * math.exp(-log_temperature))).mean()) < 0


def _margins(margins: ArrayLike) -> Floats:
    found = np.asarray(margins, dtype=np.float64)
    if not found.size:
        raise ValueError("a figure needs at least one pair")
    if not np.isfinite(found).all():
        raise ValueError("a margin is not finite")
    return found


def _natural(name: str) -> tuple[int, int, str]:
    """Numbers first and by value, then words."""
    return (0, int(name), name) if name.isascii() and name.isdecimal() else (1, 0, name)
