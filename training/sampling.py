"""Rated captions of a contest to preference pairs, pairs of many contests to one order, contests to splits. Pure and seeded.

Every contest draws from its own stream of random numbers, so that adding or removing a contest changes no other. The streams are
raw PCG64 bits, which numpy promises never to change. Knows no file and no picture.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
from numpy.typing import NDArray

from training.pairs import Pair, RatedCaption

Indices = NDArray[np.int64]
Floats = NDArray[np.float64]
_TRIES_A_PAIR = 200
_TRIES_A_CAPTION = 20
_MAX_TRIES = 10_000_000  # a gigabyte of drawn numbers


@dataclass(frozen=True, slots=True)
class PairRule:
    """Which pairs of a contest are clear enough, and how many of them are taken."""

    min_sigma: float = 3.0  # gap of the means over the pooled standard error
    max_pairs: int = 1_000
    max_exhaustive_captions: int = 2_000  # of this many captions all two million pairs are looked at, in about 200 MB


@dataclass(frozen=True, slots=True)
class _Candidates:
    """Pairs of places in the list of captions sorted by mean, the better place first, and how clear each is."""

    better: Indices
    worse: Indices
    gap: Floats
    sigma: Floats

    def take(self, places: NDArray[np.int64] | NDArray[np.bool_]) -> _Candidates:
        return _Candidates(self.better[places], self.worse[places], self.gap[places], self.sigma[places])


def sample_pairs(captions: Sequence[RatedCaption], rule: PairRule, seed: int) -> list[Pair]:
    """At most `rule.max_pairs` different pairs of one contest, in random order.

    The law is the published recipe's: on the list sorted by mean draw i, then j behind it, keep what is clear enough and new.
    A contest of at most `rule.max_exhaustive_captions` is drawn from all its clear pairs at once, so that none is missed by bad luck;
    a larger one by up to 200 draws a wanted pair.
    """
    ordered = sorted(captions, key=lambda caption: (-caption.mean, caption.rank, caption.caption))
    if len(ordered) < 2 or rule.max_pairs < 1:
        return []
    bits = _stream(seed, "pairs", ordered[0].contest)
    draw = _draw_from_all if len(ordered) <= rule.max_exhaustive_captions else _draw_by_trial
    drawn = draw(ordered, rule, bits)
    places = zip(drawn.better.tolist(), drawn.worse.tolist(), drawn.gap.tolist(), drawn.sigma.tolist(), strict=True)
    return [_pair(ordered[better], ordered[worse], gap, sigma) for better, worse, gap, sigma in places]


def _draw_from_all(ordered: Sequence[RatedCaption], rule: PairRule, bits: np.random.PCG64) -> _Candidates:
    """Draw without replacement from every clear pair, each with the weight that drawing i, then j behind it, gives it.

    The keys log(u) / weight, largest first, are such a draw (Efraimidis and Spirakis 2006).
    """
    better, worse = np.triu_indices(len(ordered), k=1)
    clear = _clear(ordered, better, worse, rule)
    weights = 1.0 / (len(ordered) - 1 - clear.better)
    keys = np.log1p(-_uniform(bits, len(weights))) / weights
    return clear.take(np.argsort(-keys, kind="stable")[: rule.max_pairs])


def _draw_by_trial(ordered: Sequence[RatedCaption], rule: PairRule, bits: np.random.PCG64) -> _Candidates:
    """Draw i, then j behind it, many times; keep the first clear and different ones."""
    num = len(ordered)
    num_tries = min(max(rule.max_pairs * _TRIES_A_PAIR, num * _TRIES_A_CAPTION), _MAX_TRIES)
    better = (_uniform(bits, num_tries) * (num - 1)).astype(np.int64)
    worse = better + 1 + (_uniform(bits, num_tries) * (num - 1 - better)).astype(np.int64)
    clear = _clear(ordered, better, worse, rule)
    _, first = np.unique(clear.better * num + clear.worse, return_index=True)
    return clear.take(np.sort(first)[: rule.max_pairs])


def _clear(ordered: Sequence[RatedCaption], better: Indices, worse: Indices, rule: PairRule) -> _Candidates:
    """The pairs with gap > 0 and gap / sqrt(se_i^2 + se_j^2) >= min_sigma."""
    means = np.array([caption.mean for caption in ordered])
    squares = np.array([caption.standard_error for caption in ordered]) ** 2
    gap = means[better] - means[worse]
    sigma = gap / np.sqrt(squares[better] + squares[worse])
    return _Candidates(better, worse, gap, sigma).take((gap > 0) & (sigma >= rule.min_sigma))


def _pair(chosen: RatedCaption, rejected: RatedCaption, gap: float, sigma: float) -> Pair:
    return Pair(
        pair_id=f"{chosen.contest}-{digest(chosen.caption, rejected.caption)}",
        contest=chosen.contest,
        image=chosen.image,
        prompt=chosen.prompt,
        chosen=chosen.caption,
        rejected=rejected.caption,
        sigma_gap=sigma,
        mean_gap=gap,
        chosen_votes=chosen.votes,
        rejected_votes=rejected.votes,
    )


def interleave(pairs: Mapping[str, Sequence[Pair]], seed: int) -> list[Pair]:
    """The pairs of all contests in one order, in which any stretch looks like the whole.

    Pair k of a contest's n stands at (k + u) / n with its own random u. So of the first share t of the table every contest gives
    its own share t, one pair more or less; and adding a contest leaves the others in their order.
    """
    placed = [
        ((k + u) / len(of_contest), contest, pair)
        for contest, of_contest in pairs.items()
        for k, (u, pair) in enumerate(zip(_uniform(_stream(seed, "order", contest), len(of_contest)).tolist(), of_contest, strict=True))
    ]
    return [pair for _, _, pair in sorted(placed, key=lambda entry: entry[:2])]


def split_contests(contests: Iterable[str], shares: Mapping[str, float], seed: int) -> dict[str, str]:
    """Every contest's split. A contest is placed by a number of its own, so the shares hold on average and adding one moves no other."""
    total = sum(shares.values())
    bounds = list(zip(accumulate(share / total for share in shares.values()), shares, strict=True))
    last = max((bound, name) for bound, name in bounds if shares[name] > 0)[1]

    def place(contest: str) -> str:
        u = float(_uniform(_stream(seed, "split", contest), 1)[0])
        return next((name for bound, name in bounds if u < bound), last)

    return {contest: place(contest) for contest in contests}


def digest(*texts: str) -> str:
    """A short name for texts: 16 hexadecimal digits, the same on every machine."""
    whole = hashlib.sha256()
    for text in texts:
        data = text.encode("utf-8", errors="surrogatepass")
        whole.update(len(data).to_bytes(8, "big") + data)
    return whole.hexdigest()[:16]


def _stream(seed: int, purpose: str, contest: str) -> np.random.PCG64:
    return np.random.PCG64(int(digest(str(seed), purpose, contest), 16))


def _uniform(bits: np.random.PCG64, number: int) -> Floats:
    """Numbers in [0, 1) with 53 random bits each."""
    raw = np.asarray(bits.random_raw(number), dtype=np.uint64).reshape(number)
    return (raw >> np.uint64(11)).astype(np.float64) * 2.0**-53
