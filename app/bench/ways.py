"""The ways to score a group, timed in turns so that a noisy machine hits all alike, and held against the plain way.

Knows neither how the table looks nor what the numbers should be.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import torch

from app.bench.flops import Shapes, padded_flops, plain_flops, shared_flops
from app.bench.loopback import Client
from app.bench.workload import Source, part_of
from app.contracts import EncodedGroup, Scorer, Scores
from app.geometry import pad_rows
from app.model import RewardModel
from app.scoring import score_plain

PLAIN, PADDED = "one forward per caption", "one padded batch"
COLD, WARM = "shared prefix, cold", "shared prefix, warm"
HTTP_COLD, HTTP_WARM = "server over HTTP, cold", "server over HTTP, warm"
WAYS = (PLAIN, PADDED, COLD, WARM, HTTP_COLD, HTTP_WARM)
_NUM_SAMPLED_WAYS = 3  # of which the plain way scores some captions only
_WANTED_DIFFERENCES = 8  # of each way: the root mean square of fewer is large by chance

_Found = TypeVar("_Found")


@dataclass(frozen=True, slots=True)
class Run:
    """One way once. `rate`: floating-point operations a second of the machine's matrix products, before and after, their mean.

    `gaps`: how far scores are from the plain way's; None where there was no plain way to ask.
    """

    seconds: float
    rate: float
    num_tokens: int
    num_computed_tokens: int
    num_cached_tokens: int
    flops: int
    gaps: tuple[float, ...] | None
    is_as_named: bool = True  # whether cold computed picture or conversation and captions, and warm the captions and nothing else


@dataclass(frozen=True, slots=True)
class Row:
    """A way at one group size, over all rounds."""

    way: str
    num_captions: int
    runs: tuple[Run, ...]

    @property
    def seconds(self) -> float:
        return statistics.median(run.seconds for run in self.runs)

    @property
    def fastest_s(self) -> float:
        return min(run.seconds for run in self.runs)

    @property
    def slowest_s(self) -> float:
        return max(run.seconds for run in self.runs)

    @property
    def share_of_rate(self) -> float:
        """Of the rate at which the machine multiplied at the time."""
        return statistics.median(run.flops / run.seconds / run.rate for run in self.runs)

    @property
    def rate(self) -> float:
        return statistics.median(run.rate for run in self.runs)

    @property
    def gaps(self) -> list[float]:
        """Of all rounds."""
        return [gap for run in self.runs for gap in run.gaps or ()]

    @property
    def difference(self) -> float | None:
        """The largest."""
        return max(self.gaps) if self.gaps else None

    @property
    def rms(self) -> float | None:
        """The root of the mean square of them."""
        return math.sqrt(statistics.fmean(gap**2 for gap in self.gaps)) if self.gaps else None

    @property
    def is_as_named(self) -> bool:
        return all(run.is_as_named for run in self.runs)


@dataclass(frozen=True, slots=True)
class Measured:
    """All rows, and the spread of the plain way's scores that differences are held against."""

    rows: tuple[Row, ...]
    spread: float | None  # standard deviation within a group; None without a plain way

    def find(self, way: str, num_captions: int) -> Row | None:
        return next((row for row in self.rows if (row.way, row.num_captions) == (way, num_captions)), None)


@dataclass(frozen=True, slots=True)
class Contestants:
    """Who takes part. Without `baseline` (memory for a second model was missing) the plain and the padded way stay away.

    `rate_now`: how fast the machine multiplies matrices at this moment, floating-point operations a second.
    """

    baseline: RewardModel | None
    scorer: Scorer
    client: Client
    workload: Source
    shapes: Shapes
    device: torch.device
    rate_now: Callable[[], float]


Tell = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Estimate:
    """Seconds of one round, from what the warm-up took."""

    all_s: float
    plain_s: float  # of the ways that share nothing, checks included

    def told(self, rounds: int, sizes: Sequence[int]) -> str:
        """One line for whoever waits."""
        whole, plain = (duration(rounds * seconds) for seconds in (self.all_s, self.plain_s))
        groups = ", ".join(map(str, sizes))
        share = f" ({plain} of it for the ways that share nothing)" if self.plain_s else ""
        return f"about {whole} for {rounds} {'round' if rounds == 1 else 'rounds'} of groups of {groups}{share}"


def duration(seconds: float) -> str:
    return f"{seconds / 60:.0f} minutes" if seconds >= 90 else f"{max(1.0, seconds):.0f} s"


def measure_ways(who: Contestants, sizes: Sequence[int], rounds: int, report: Tell, announce: Tell = lambda _: None) -> Measured:
    """Every way at every size, round by round; `report` hears what comes next, `announce` before all of it how long that takes."""
    num_sampled = -(-_WANTED_DIFFERENCES // rounds)
    announce(warm_up(who, sizes, num_sampled, report).told(rounds, sizes))
    runs: dict[tuple[str, int], list[Run]] = {}
    references: list[Sequence[float]] = []
    for number in range(rounds):
        for size in sizes:
            turn = _Turn(who, size, number, num_sampled, report)
            for way, run in turn.run():
                runs.setdefault((way, size), []).append(run)
            references.extend(turn.references)
    rows = tuple(Row(way, size, tuple(runs[way, size])) for size in sizes for way in WAYS if (way, size) in runs)
    return Measured(rows, spread_of(references))


def warm_up(who: Contestants, sizes: Sequence[int], num_sampled: int, report: Tell) -> Estimate:
    """Once before the clock: kernels are chosen and buffers made at first use, for each size anew."""
    shared_s = 0.0
    for size in sizes:
        report(f"warming up, groups of {size}")
        request = who.workload.request(size)
        for asked in (request, who.workload.request(size, request)):
            score_direct(who, who.workload.encode(asked))
        cold = who.workload.request(size)
        cold_s, (_, image_id) = _seconds(lambda cold=cold: who.client.send_bytes(cold))  # type: ignore[misc]
        warm = who.workload.request(size, cold)
        warm_s, _ = _seconds(lambda image_id=image_id, warm=warm: who.client.send_id(image_id, warm))  # type: ignore[misc]
        shared_s += 2 * (cold_s + warm_s)  # over HTTP and directly
    one_s, padded_s = _warm_up_plain(who, report)
    plain_s = sum(size * (one_s + padded_s) + _NUM_SAMPLED_WAYS * min(num_sampled, size) * one_s for size in sizes)
    return Estimate(shared_s + plain_s, plain_s)


def _warm_up_plain(who: Contestants, report: Tell) -> tuple[float, float]:
    """Seconds a caption, by itself and in a padded batch."""
    model = who.baseline
    if model is None:
        return 0.0, 0.0
    report(f"warming up, {PLAIN}")
    group = who.workload.encode(who.workload.request(3))
    score_plain(model, [part_of(group, 0, 1)])
    one_s, _ = _seconds(lambda: score_plain(model, [part_of(group, 1, 2)]))
    padded_s, _ = _seconds(lambda: score_padded(model, [part_of(group, 1, 3)]))
    return one_s, padded_s / 2


def _seconds(work: Callable[[], _Found]) -> tuple[float, _Found]:
    """Of something that waits for the device by itself."""
    began = time.perf_counter()
    found = work()
    return time.perf_counter() - began, found


@dataclass(frozen=True, slots=True)
class _Clock:
    seconds: float
    rate: float  # the machine's around them


class _Turn:
    """Every way once at one size: the direct ways and the server each on a picture or conversation nobody has seen, then again on it.

    The ways that share nothing go first in even rounds and last in odd ones.
    """

    def __init__(self, who: Contestants, size: int, number: int, num_sampled: int, report: Tell) -> None:
        self._who = who
        self._report = report
        self._plain_first = number % 2 == 0
        self._sampled = sampled(size, number, num_sampled)
        self._where = f"round {number + 1}, groups of {size}: "
        direct, served = who.workload.request(size), who.workload.request(size)
        self._served = {HTTP_COLD: served, HTTP_WARM: who.workload.request(size, served)}
        asked = {COLD: direct, WARM: who.workload.request(size, direct), **self._served}
        self._groups = {way: who.workload.encode(request) for way, request in asked.items()}
        self._image_id: str | None = None
        self.references: list[Sequence[float]] = []

    def run(self) -> list[tuple[str, Run]]:
        """In the order of `WAYS`."""
        plain = self._plain_and_padded() if self._plain_first else {}
        shared = [(way, *self._timed(way, work)) for way, work in self._shared()]
        plain = plain or self._plain_and_padded()
        whole = plain[PLAIN][1].values if plain else None
        runs = [(way, run) for way, (run, _) in plain.items()]
        for way, clock, scores in shared:
            gaps = gaps_of(whole, scores.values) if way == COLD and whole else self._sampled_gaps(way, scores)
            runs.append((way, self._shared_run(way, clock, scores, gaps)))
        return runs

    def _shared(self) -> list[tuple[str, Callable[[], Scores]]]:
        return [(COLD, self._direct(COLD)), (WARM, self._direct(WARM)), (HTTP_COLD, self._by_bytes), (HTTP_WARM, self._by_id)]

    def _timed(self, way: str, work: Callable[[], Scores]) -> tuple[_Clock, Scores]:
        self._report(self._where + way)
        before = self._who.rate_now()
        seconds, scores = timed(work, self._who.device)
        return _Clock(seconds, (before + self._who.rate_now()) / 2), scores

    def _shared_run(self, way: str, clock: _Clock, scores: Scores, gaps: tuple[float, ...] | None) -> Run:
        """Only what was computed counts as work: the beginning of all groups may be known to a cold one."""
        group = self._groups[way]
        num_new = scores.num_computed_tokens - sum(len(row) - group.num_prefix for row in group.rows)  # of the prefix
        is_as_named = num_new == 0 if way in (WARM, HTTP_WARM) else num_new >= self._who.workload.num_unknown(group)
        flops = shared_flops(self._who.shapes, group, num_known=min(max(group.num_prefix - num_new, 0), group.num_prefix))
        return replace(_run(clock, scores, flops, gaps), is_as_named=is_as_named)

    def _plain_and_padded(self) -> dict[str, tuple[Run, Scores]]:
        model, group, shapes = self._who.baseline, self._groups[COLD], self._who.shapes
        if model is None:
            return {}
        clock, plain = self._timed(PLAIN, lambda: score_plain(model, [group])[0])
        self.references.append(plain.values)
        padded_clock, padded = self._timed(PADDED, lambda: score_padded(model, [group])[0])
        return {
            PLAIN: (_run(clock, plain, plain_flops(shapes, group), (0.0,) * len(plain.values)), plain),
            PADDED: (_run(padded_clock, padded, padded_flops(shapes, group), gaps_of(plain.values, padded.values)), padded),
        }

    def _direct(self, way: str) -> Callable[[], Scores]:
        return lambda: score_direct(self._who, self._groups[way])

    def _by_bytes(self) -> Scores:
        scores, self._image_id = self._who.client.send_bytes(self._served[HTTP_COLD])
        return scores

    def _by_id(self) -> Scores:
        return self._who.client.send_id(self._image_id, self._served[HTTP_WARM])

    def _sampled_gaps(self, way: str, scores: Scores) -> tuple[float, ...] | None:
        """Of some captions: the plain way on every group would take longer than the measurement. Not timed."""
        if self._who.baseline is None:
            return None
        alone = [part_of(self._groups[way], place, place + 1) for place in self._sampled]
        expected = [found.values[0] for found in score_plain(self._who.baseline, alone)]
        self.references.append(expected)
        return gaps_of(expected, [scores.values[place] for place in self._sampled])


def sampled(size: int, number: int, num_sampled: int) -> list[int]:
    """Which captions of a group that the plain way does not run whole: in round `number`, far apart, others in the next round."""
    num_sampled = min(num_sampled, size)
    return sorted((number + each * size // num_sampled) % size for each in range(num_sampled))


def score_direct(who: Contestants, group: EncodedGroup) -> Scores:
    """The server's own scorer without the server."""
    return who.scorer.score(who.scorer.prepare([group]))[0]


@torch.inference_mode()
def score_padded(model: RewardModel, groups: Sequence[EncodedGroup]) -> list[Scores]:
    """One forward for all rows of all groups, each with its own picture and padded to the longest: the published batch recipe."""
    rows = [row for group in groups for row in group.rows]
    images = [group.image for group in groups for _ in group.rows]
    batch = {name: value.to(model.device) for name, value in pad_rows(rows, images, model.image_token_id).items()}
    hidden = model.backbone(**batch, use_cache=False).last_hidden_state  # [rows, longest, hidden]
    if model.takes_images:
        model.backbone.rope_deltas = None  # transformers leaves it on the module
    last = batch["attention_mask"].sum(1) - 1
    values = iter(model.head(hidden[torch.arange(len(rows), device=hidden.device), last]).tolist())
    longest = int(batch["input_ids"].shape[1])
    return [Scores(tuple(next(values) for _ in group.rows), sum(map(len, group.rows)), longest * len(group.rows)) for group in groups]


def timed(work: Callable[[], Scores], device: torch.device) -> tuple[float, Scores]:
    """Wall seconds, the device's work included."""
    began = time.perf_counter()
    scores = work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - began, scores


def largest(expected: Sequence[float], found: Sequence[float]) -> float:
    """The largest difference; what is no number is infinitely far away."""
    return max(gaps_of(expected, found))


def gaps_of(expected: Sequence[float], found: Sequence[float]) -> tuple[float, ...]:
    """All differences; what is no number is infinitely far away."""
    gaps = (abs(one - other) for one, other in zip(expected, found, strict=True))
    return tuple(gap if gap == gap else math.inf for gap in gaps)  # noqa: PLR0124 (NaN)


def spread_of(references: Sequence[Sequence[float]]) -> float | None:
    """Pooled standard deviation within groups, or within what is known of them; over all scores where nowhere two are of one group."""
    groups = [scores for scores in references if len(scores) > 1] or [[score for scores in references for score in scores]]
    if len(groups[0]) < 2:
        return None
    degrees = [len(scores) - 1 for scores in groups]
    return math.sqrt(statistics.fmean((statistics.variance(scores) for scores in groups), degrees))


def _run(clock: _Clock, scores: Scores, flops: int, gaps: tuple[float, ...] | None) -> Run:
    return Run(clock.seconds, clock.rate, scores.num_tokens, scores.num_computed_tokens, scores.num_cached_tokens, flops, gaps)
