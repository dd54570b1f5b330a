"""The ways to score a group, timed in turns so that a noisy machine hits all alike, and held against the plain way.

Knows neither how the table looks nor what the numbers should be.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from app.bench.flops import Shapes, padded_flops, plain_flops, shared_flops
from app.bench.loopback import Client
from app.bench.workload import Workload, part_of
from app.contracts import EncodedGroup, Scorer, Scores
from app.geometry import pad_rows
from app.model import RewardModel
from app.scoring import score_plain

PLAIN, PADDED = "one forward per caption", "one padded batch"
COLD, WARM = "shared prefix, cold", "shared prefix, warm"
HTTP_COLD, HTTP_WARM = "server over HTTP, cold", "server over HTTP, warm"
WAYS = (PLAIN, PADDED, COLD, WARM, HTTP_COLD, HTTP_WARM)


@dataclass(frozen=True, slots=True)
class Run:
    """One way once. `difference` is the largest to the plain way's scores; None where there was no plain way to ask."""

    seconds: float
    num_tokens: int
    num_computed_tokens: int
    num_cached_tokens: int
    flops: int
    difference: float | None


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
    def flops_per_s(self) -> float:
        return statistics.median(run.flops / run.seconds for run in self.runs)

    @property
    def difference(self) -> float | None:
        found = [run.difference for run in self.runs if run.difference is not None]
        return max(found) if found else None


@dataclass(frozen=True, slots=True)
class Measured:
    """All rows, and the spread of the plain way's scores that differences are held against."""

    rows: tuple[Row, ...]
    spread: float | None  # standard deviation within a group; None without a plain way

    def find(self, way: str, num_captions: int) -> Row | None:
        return next((row for row in self.rows if (row.way, row.num_captions) == (way, num_captions)), None)


@dataclass(frozen=True, slots=True)
class Contestants:
    """Who takes part. Without `baseline` (memory for a second model was missing) the plain and the padded way stay away."""

    baseline: RewardModel | None
    scorer: Scorer
    client: Client
    workload: Workload
    shapes: Shapes
    device: torch.device


def measure_ways(who: Contestants, sizes: Sequence[int], rounds: int, report: Callable[[str], None]) -> Measured:
    """Every way at every size, round by round; `report` hears what comes next."""
    warm_up(who, sizes, report)
    runs: dict[tuple[str, int], list[Run]] = {}
    references: list[Sequence[float]] = []
    for number in range(rounds):
        for size in sizes:
            turn = _Turn(who, size, number, report)
            for way, run in turn.run():
                runs.setdefault((way, size), []).append(run)
            references.extend(turn.references)
    rows = tuple(Row(way, size, tuple(runs[way, size])) for size in sizes for way in WAYS if (way, size) in runs)
    return Measured(rows, spread_of(references))


def warm_up(who: Contestants, sizes: Sequence[int], report: Callable[[str], None]) -> None:
    """Once before the clock: kernels are chosen and buffers made at first use, for each size anew."""
    for size in sizes:
        report(f"warming up, groups of {size}")
        request = who.workload.request(size)
        score_direct(who, who.workload.encode(request))
        _, image_id = who.client.send_bytes(request)
        who.client.send_id(image_id, who.workload.request(size, request.image))
    if who.baseline is not None:
        report(f"warming up, {PLAIN}")
        group = who.workload.encode(who.workload.request(2))
        score_plain(who.baseline, [part_of(group, 0, 1)])
        score_padded(who.baseline, [group])


class _Turn:
    """Every way once at one size: the direct ways and the server each on a picture nobody has seen, then again on that picture."""

    def __init__(self, who: Contestants, size: int, number: int, report: Callable[[str], None]) -> None:
        self._who = who
        self._report = report
        self._sampled = number % size  # which caption of a group that the plain way does not run whole
        self._where = f"round {number + 1}, groups of {size}: "
        direct, served = who.workload.request(size), who.workload.request(size)
        self._groups = {COLD: who.workload.encode(direct), HTTP_COLD: who.workload.encode(served)}
        self._served = {HTTP_COLD: served, HTTP_WARM: who.workload.request(size, served.image)}
        image = self._groups[COLD].image
        if image is None:
            raise ValueError("the workload has pictures")
        self._groups[WARM] = who.workload.encode_for(image, who.workload.captions(size))
        self._groups[HTTP_WARM] = who.workload.encode(self._served[HTTP_WARM])
        self._image_id = ""
        self.references: list[Sequence[float]] = []

    def run(self) -> list[tuple[str, Run]]:
        """In the order of `WAYS`."""
        runs, expected = [], self._plain_and_padded()
        plain = [(way, run) for way, (run, _) in expected.items()]
        whole = expected[PLAIN][1].values if PLAIN in expected else None
        for way, work, warm in (
            (COLD, self._direct(COLD), False),
            (WARM, self._direct(WARM), True),
            (HTTP_COLD, self._by_bytes, False),
            (HTTP_WARM, self._by_id, True),
        ):
            self._report(self._where + way)
            seconds, scores = timed(work, self._who.device)
            difference = largest(whole, scores.values) if way == COLD and whole else self._sampled_difference(way, scores)
            flops = shared_flops(self._who.shapes, self._groups[way], warm=warm)
            runs.append((way, _run(seconds, scores, flops, difference)))
        return plain + runs

    def _plain_and_padded(self) -> dict[str, tuple[Run, Scores]]:
        model, group, shapes = self._who.baseline, self._groups[COLD], self._who.shapes
        if model is None:
            return {}
        self._report(self._where + PLAIN)
        seconds, plain = timed(lambda: score_plain(model, [group])[0], self._who.device)
        self.references.append(plain.values)
        self._report(self._where + PADDED)
        padded_s, padded = timed(lambda: score_padded(model, [group])[0], self._who.device)
        return {
            PLAIN: (_run(seconds, plain, plain_flops(shapes, group), 0.0), plain),
            PADDED: (_run(padded_s, padded, padded_flops(shapes, group), largest(plain.values, padded.values)), padded),
        }

    def _direct(self, way: str) -> Callable[[], Scores]:
        return lambda: score_direct(self._who, self._groups[way])

    def _by_bytes(self) -> Scores:
        scores, self._image_id = self._who.client.send_bytes(self._served[HTTP_COLD])
        return scores

    def _by_id(self) -> Scores:
        return self._who.client.send_id(self._image_id, self._served[HTTP_WARM])

    def _sampled_difference(self, way: str, scores: Scores) -> float | None:
        """Of one caption: the plain way on every group would take longer than the measurement. Not timed."""
        if self._who.baseline is None:
            return None
        expected = score_plain(self._who.baseline, [part_of(self._groups[way], self._sampled, self._sampled + 1)])[0].values
        self.references.append(expected)
        return largest(expected, scores.values[self._sampled : self._sampled + 1])


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
    gaps = [abs(one - other) for one, other in zip(expected, found, strict=True)]
    return max(gap if gap == gap else float("inf") for gap in gaps)  # noqa: PLR0124 (NaN)


def spread_of(references: Sequence[Sequence[float]]) -> float | None:
    """Pooled standard deviation within groups; over all scores where every group has but one caption."""
    groups = [scores for scores in references if len(scores) > 1] or [[score for scores in references for score in scores]]
    if len(groups[0]) < 2:
        return None
    return math.sqrt(statistics.fmean(statistics.variance(scores) for scores in groups))


def _run(seconds: float, scores: Scores, flops: int, difference: float | None) -> Run:
    return Run(seconds, scores.num_tokens, scores.num_computed_tokens, scores.num_cached_tokens, flops, difference)
