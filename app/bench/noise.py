"""How far a score moves with the company it is computed in, against float32, and what it costs that it does not move.

Every caption is scored alone, in groups of 2 to 16, beside another picture, with its prefix new and known.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from app.bench.ways import timed
from app.bench.workload import Workload, part_of, renamed
from app.contracts import EncodedGroup, Scorer
from app.model import RewardModel
from app.scoring import score_plain

GROUP_SIZE = 16
SIZES = (1, 2, 4, 8, 16)
_TIMED = 8  # captions of the group that the price is measured on


@dataclass(frozen=True, slots=True)
class Noise:
    """Differences to float32 over all companies, and their ratio to the spread of float32's scores within a group."""

    num_scores: int
    num_pairs: int
    largest: float
    p99: float
    flips_per_10_000: float  # pairs of one group that change their order
    spread: float
    num_moved: int  # captions whose score is not the same bits in every company

    def as_dict(self) -> dict[str, Any]:
        return asdict(self) | {"largest_over_spread": self.largest / self.spread, "p99_over_spread": self.p99 / self.spread}


@dataclass(frozen=True, slots=True)
class Price:
    """Seconds with determinism over seconds without, groups of 8, medians."""

    cold: float
    warm: float


@dataclass(frozen=True, slots=True)
class NoiseReport:
    """Both modes."""

    usual: Noise
    deterministic: Noise
    price: Price

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


def subjects_of(model: RewardModel, groups: Sequence[EncodedGroup], report: Callable[[str], None]) -> list[Subject]:
    """The scores of a float32 model, one forward a caption."""
    subjects = []
    for number, (group, stranger) in enumerate(itertools.pairwise(groups), start=1):
        report(f"float32, group {number} of {len(groups) - 1}")
        expected = score_plain(model, [part_of(group, 0, GROUP_SIZE)])[0].values
        subjects.append(Subject(group, stranger, expected))
    return subjects


def measure_noise(scorer: Scorer, subjects: Sequence[Subject], report: Callable[[str], None]) -> Noise:
    """Every subject in every company."""
    found: list[list[tuple[float, ...]]] = []
    for number, subject in enumerate(subjects, start=1):
        report(f"companies, group {number} of {len(subjects)}")
        found.append([_scores(scorer, company, subject) for company in companies()])
    return summarise([subject.expected for subject in subjects], found)


def measure_price(usual: Scorer, deterministic: Scorer, subjects: Sequence[Subject], device: torch.device) -> Price:
    """Both modes in turn on the same groups."""
    seconds: dict[tuple[bool, bool], list[float]] = {}
    for subject in subjects:
        for scorer, warm in itertools.product((usual, deterministic), (False, True)):
            group = _fresh(subject.group)
            if warm:
                _score(scorer, [part_of(group, GROUP_SIZE, GROUP_SIZE + 1)])
            work = part_of(group, 0, _TIMED)
            took, _ = timed(lambda scorer=scorer, work=work: scorer.score(scorer.prepare([work]))[0], device)  # type: ignore[misc]
            seconds.setdefault((scorer is deterministic, warm), []).append(took)
    medians = {key: statistics.median(values) for key, values in seconds.items()}
    return Price(cold=medians[True, False] / medians[False, False], warm=medians[True, True] / medians[False, True])


@dataclass(frozen=True, slots=True)
class Company:
    """How a group's captions go to the device: so many at once, with a stranger before or behind, prefix known or new."""

    size: int
    warm: bool
    stranger: str = ""  # "first", "last" or none


def companies() -> list[Company]:
    """All of them."""
    alone = [Company(size, warm) for size in SIZES for warm in (False, True)]
    return [*alone, *(Company(8, warm, place) for warm in (False, True) for place in ("first", "last"))]


def summarise(expected: Sequence[Sequence[float]], found: Sequence[Sequence[Sequence[float]]]) -> Noise:
    """`found` holds for each group the scores of every company, in the order of `expected`."""
    gaps, flips, num_pairs, num_moved = [], 0, 0, 0
    for wanted, companies_scores in zip(expected, found, strict=True):
        truth, scores = np.array(wanted), np.array(companies_scores)  # [captions], [companies, captions]
        gaps.append(np.abs(scores - truth).ravel())
        first, second = np.triu_indices(len(truth), 1)
        order = np.sign(truth[first] - truth[second])
        flips += int((np.sign(scores[:, first] - scores[:, second]) != order).sum())
        num_pairs += len(scores) * len(first)
        num_moved += int((scores != scores[0]).any(axis=0).sum())
    every = np.concatenate(gaps)
    spread = math.sqrt(statistics.fmean(statistics.variance(scores) for scores in expected))
    largest, p99 = float(every.max()), float(np.percentile(every, 99))
    return Noise(len(every), num_pairs, largest, p99, 10_000 * flips / num_pairs, spread, num_moved)


_serial = itertools.count()


def _fresh(group: EncodedGroup) -> EncodedGroup:
    return renamed(group, f"bench-{next(_serial)}")


def _scores(scorer: Scorer, company: Company, subject: Subject) -> tuple[float, ...]:
    """The subject's scores in its captions' order."""
    return tuple(value for batch, place in _batches(scorer, company, subject) for value in _score(scorer, batch)[place])


def _batches(scorer: Scorer, company: Company, subject: Subject) -> Iterator[tuple[list[EncodedGroup], int]]:
    """Batches, and where in each the subject stands. A new name is a new picture to every cache."""
    group = _fresh(subject.group)
    if company.warm:
        _score(scorer, [part_of(group, GROUP_SIZE, GROUP_SIZE + 1)])
    for start in range(0, GROUP_SIZE, company.size):
        part = part_of(group if company.warm else _fresh(subject.group), start, start + company.size)
        stranger = part_of(_fresh(subject.stranger), 0, company.size)
        yield {"": ([part], 0), "first": ([stranger, part], 1), "last": ([part, stranger], 0)}[company.stranger]


def _score(scorer: Scorer, batch: Sequence[EncodedGroup]) -> list[tuple[float, ...]]:
    return [scores.values for scores in scorer.score(scorer.prepare(batch))]
