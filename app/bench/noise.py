"""How far a score moves with the company it is computed in, against float32, and what it costs that it does not move.

Captions are scored alone, in groups of 2 to 16, beside another picture, with their prefix new and known, by the usual scorer and by
the deterministic one in turn. Scorers must keep no scores: a known prefix is asked about again and again.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch

from app.bench.ways import largest, timed
from app.bench.workload import Workload, part_of, renamed, reopened
from app.contracts import EncodedGroup, Scorer, Scores
from app.errors import ScoringFailed
from app.model import RewardModel
from app.scoring import score_plain, score_shared

GROUP_SIZE = 16
SIZES = (1, 2, 4, 8, 16)
MAX_TRUTH_DIFFERENCE = 1e-4  # of a float32 score to that of one forward a caption, for scores of about one
_TIMED = 8  # captions of the batches that the price is the ratio of
_PROVEN = (0, GROUP_SIZE - 1)  # captions of a group whose float32 scores are held against one forward a caption

Seen = tuple[float | None, ...]  # a group's scores in one company; None: not asked


@dataclass(frozen=True, slots=True)
class Noise:
    """Differences to float32 over all companies, and their ratio to the spread of float32's scores within a group."""

    num_captions: int
    num_scores: int
    num_pairs: int
    largest: float
    p99: float
    flips_per_10_000: float  # pairs of one group that change their order
    spread: float
    num_moved: int  # captions whose score is not the same bits in every company
    largest_move: float  # of one caption's score from one company to another

    def as_dict(self) -> dict[str, Any]:
        shares = {"largest": self.largest, "p99": self.p99, "largest_move": self.largest_move}
        return asdict(self) | {f"{name}_over_spread": value / self.spread for name, value in shares.items()}


@dataclass(frozen=True, slots=True)
class Price:
    """Seconds with determinism over seconds without, groups of 8, medians; cold is a new picture."""

    cold: float
    warm: float
    num_batches: int  # of each kind that the medians are of


@dataclass(frozen=True, slots=True)
class Truth:
    """How the float32 scores came about: one forward a group, some captions also by a forward of their own."""

    num_proven: int
    largest: float  # difference of those


@dataclass(frozen=True, slots=True)
class NoiseReport:
    """Both modes."""

    usual: Noise
    deterministic: Noise
    price: Price
    truth: Truth

    @property
    def holds(self) -> bool:
        """Whether determinism is what it says."""
        return self.deterministic.num_moved == 0


@dataclass(frozen=True, slots=True)
class Subject:
    """A group under test, a stranger beside it, and the float32 scores of the group."""

    group: EncodedGroup
    stranger: EncodedGroup
    expected: tuple[float, ...]


def make_groups(workload: Workload, count: int) -> list[EncodedGroup]:
    """One more than is tested, the last a stranger to the first; each has one caption more, to make its prefix known."""
    return [workload.encode(workload.request(GROUP_SIZE + 1)) for _ in range(count + 1)]


def subjects_of(model: RewardModel, groups: Sequence[EncodedGroup], report: Callable[[str], None]) -> tuple[list[Subject], Truth]:
    """The scores of a float32 model, one forward a group through transformers. Raises ScoringFailed if that is not the plain way's."""
    subjects, gaps = [], []
    for number, (group, stranger) in enumerate(itertools.pairwise(groups), start=1):
        report(f"float32, group {number} of {len(groups) - 1}")
        expected = score_shared(model, [part_of(group, 0, GROUP_SIZE)])[0].values
        subjects.append(Subject(group, stranger, expected))
        for place in _PROVEN:
            report(f"float32, group {number} of {len(groups) - 1}: caption {place + 1} by a forward of its own")
            plain = score_plain(model, [part_of(group, place, place + 1)])[0].values
            gaps.append(largest(plain, expected[place : place + 1]) / max(1.0, abs(plain[0])))
    return subjects, proven(gaps)


def proven(gaps: Sequence[float]) -> Truth:
    """Raises ScoringFailed where the shared forward does not give the plain way's scores: it is no truth then."""
    if max(gaps) > MAX_TRUTH_DIFFERENCE:
        raise ScoringFailed(f"float32: one forward a group differs from one a caption by {max(gaps):.1e}, nothing can be held against it")
    return Truth(len(gaps), max(gaps))


@dataclass(frozen=True, slots=True)
class Company:
    """How a group's captions go to the device: so many at once, with a stranger before or behind, prefix known or new."""

    size: int
    warm: bool
    stranger: str = ""  # "first", "last" or none

    @property
    def starts(self) -> tuple[int, ...]:
        """Where its batches begin. All captions behind a known prefix; else the first and the last, as every batch costs a prefix."""
        every = range(0, GROUP_SIZE, self.size)
        if self.stranger:
            return (every[0] if self.stranger == "first" else every[-1],)
        return tuple(every) if self.warm else tuple(sorted({every[0], every[-1]}))

    @property
    def is_priced(self) -> bool:
        return self.size == _TIMED and not self.stranger


def companies() -> list[Company]:
    """All of them."""
    alone = [Company(size, warm) for size in SIZES for warm in (False, True)]
    return [*alone, *(Company(8, warm, place) for warm in (False, True) for place in ("first", "last"))]


class Trial:
    """One scorer's way through all subjects and companies."""

    def __init__(self, scorer: Scorer, device: torch.device) -> None:
        self._scorer = scorer
        self._device = device
        self.found: list[list[Seen]] = []  # of each subject, of each company
        self.seconds: dict[bool, list[float]] = {False: [], True: []}  # of priced batches, by whether the prefix was known

    def begin(self, subject: Subject) -> None:
        """Make its prefix known by a caption that is not tested."""
        self._subject, self._known = subject, renamed(subject.group, f"bench-{next(_serial)}")
        self._score([part_of(self._known, GROUP_SIZE, GROUP_SIZE + 1)])
        self.found.append([])

    def ask(self, company: Company) -> None:
        """Every batch of a company."""
        seen: list[float | None] = [None] * GROUP_SIZE
        for start in company.starts:
            part = part_of(self._group(company), start, start + company.size)
            batch, place = self._batch(company, part)
            took, scores = self._score(batch)
            if company.is_priced:
                self.seconds[company.warm].append(took)
            seen[start : start + company.size] = scores[place].values
        self.found[-1].append(tuple(seen))

    def _group(self, company: Company) -> EncodedGroup:
        """The known one; or a new prefix, whose picture is new as well where time is taken.

        Elsewhere its features are kept: a picture goes through the vision tower by itself, whatever the company.
        """
        if company.warm:
            return self._known
        tag = f"bench-{next(_serial)}"
        return renamed(self._subject.group, tag) if company.is_priced else reopened(self._known, tag)

    def _batch(self, company: Company, part: EncodedGroup) -> tuple[list[EncodedGroup], int]:
        """What goes to the device, and where in it the subject stands."""
        if not company.stranger:
            return [part], 0
        stranger = part_of(reopened(self._subject.stranger, f"bench-{next(_serial)}"), 0, company.size)
        return ([stranger, part], 1) if company.stranger == "first" else ([part, stranger], 0)

    def _score(self, batch: list[EncodedGroup]) -> tuple[float, list[Scores]]:
        """Raises ScoringFailed for what is no number."""
        found: list[Scores] = []

        def work() -> Scores:
            found.extend(self._scorer.score(self._scorer.prepare(batch)))
            return found[0]

        took, _ = timed(work, self._device)
        if not all(math.isfinite(value) for scores in found for value in scores.values):
            raise ScoringFailed("a score is no finite number")
        return took, found


def measure_noise(
    usual: Scorer, deterministic: Scorer, subjects: Sequence[Subject], truth: Truth, device: torch.device, report: Callable[[str], None]
) -> NoiseReport:
    """Every subject in every company, both scorers in turn."""
    trials = Trial(usual, device), Trial(deterministic, device)
    every = companies()
    for number, subject in enumerate(subjects, start=1):
        for trial in trials:
            trial.begin(subject)
        for place, company in enumerate(every, start=1):
            report(f"group {number} of {len(subjects)}, company {place} of {len(every)}")
            for trial in trials if (number + place) % 2 else trials[::-1]:  # nobody is always the first
                trial.ask(company)
    expected = [subject.expected for subject in subjects]
    moving, still = (summarise(expected, trial.found) for trial in trials)
    return NoiseReport(moving, still, price_of(trials[0].seconds, trials[1].seconds), truth)


def price_of(usual: dict[bool, list[float]], deterministic: dict[bool, list[float]]) -> Price:
    """From the seconds of priced batches, by whether the prefix was known."""
    cold, warm = (statistics.median(deterministic[known]) / statistics.median(usual[known]) for known in (False, True))
    return Price(cold, warm, len(usual[False]))


def summarise(expected: Sequence[Sequence[float]], found: Sequence[Sequence[Seen]]) -> Noise:
    """`found` holds for each group the scores of every company, in the order of `expected`."""
    sums = _Sums()
    for wanted, companies_scores in zip(expected, found, strict=True):
        sums.add(np.array(wanted), np.array(companies_scores, dtype=np.float64))  # None becomes NaN; scores are finite
    every = np.concatenate(sums.gaps)
    spread = math.sqrt(statistics.fmean(statistics.variance(scores) for scores in expected))
    return Noise(
        num_captions=sums.num_captions,
        num_scores=len(every),
        num_pairs=sums.num_pairs,
        largest=float(every.max()),
        p99=float(np.percentile(every, 99)),
        flips_per_10_000=10_000 * sums.num_flips / max(1, sums.num_pairs),
        spread=spread,
        num_moved=sums.num_moved,
        largest_move=sums.largest_move,
    )


@dataclass(slots=True)
class _Sums:
    """What groups add up to."""

    gaps: list[Any] = field(default_factory=list)
    num_captions: int = 0
    num_pairs: int = 0
    num_flips: int = 0
    num_moved: int = 0
    largest_move: float = 0.0

    def add(self, truth: Any, scores: Any) -> None:
        """truth [captions], scores [companies, captions], NaN where a company was not asked."""
        asked = ~np.isnan(scores)
        self.gaps.append(np.abs(scores - truth)[asked])
        first, second = np.triu_indices(len(truth), 1)
        both = asked[:, first] & asked[:, second]
        flipped = np.sign(scores[:, first] - scores[:, second]) != np.sign(truth[first] - truth[second])
        self.num_captions += len(truth)
        self.num_pairs += int(both.sum())
        self.num_flips += int((flipped & both).sum())
        lowest, highest = np.where(asked, scores, np.inf).min(axis=0), np.where(asked, scores, -np.inf).max(axis=0)
        self.num_moved += int((highest > lowest).sum())
        self.largest_move = max(self.largest_move, float((highest - lowest).max()))


_serial = itertools.count()
