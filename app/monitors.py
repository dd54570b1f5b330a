"""The monitors of training runs: every scored group of a run into its statistics and its metrics. A fault here fails no request."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from prometheus_client import Counter, Histogram

from app.contracts import Conversation
from app.metrics import Metrics
from app.runs import MAX_SCORE, Run, Runs, Seen
from app.tallies import Expected, Tally

if TYPE_CHECKING:
    from app.artifacts import RewardModelConfig

log = logging.getLogger("punchline.runs")
_LEAST_STD = 1e-6  # of the mean, or of 1: a narrower distribution is rounding


def expected_of(config: RewardModelConfig) -> Expected | None:
    """The scores the artifact says it gave to its validation data. None where it says nothing that scores can be measured by."""
    given = config.score_distribution
    if given is None or abs(given.mean) > MAX_SCORE or not _LEAST_STD * max(1.0, abs(given.mean)) < given.std <= MAX_SCORE:
        return None
    return Expected(given.mean, given.std)


@dataclass(frozen=True, slots=True)
class _Series:
    """The metrics of one run that are counted; its gauges are computed when they are read."""

    scores: Histogram
    spread: Histogram
    flat_groups: Counter
    duplicates: Counter
    repeats: Counter
    outside: Counter
    unusable: Counter

    def count(self, seen: Seen) -> None:
        for score in seen.scores:
            self.scores.observe(score)
        self.unusable.inc(seen.num_unusable)
        self.count_groups(seen.whole)

    def count_groups(self, whole: Iterable[Tally]) -> None:
        for tally in whole:
            if tally.num_compared:
                self.spread.observe(tally.spreads)
            self.flat_groups.inc(tally.num_flat)
            self.duplicates.inc(tally.num_duplicates)
            self.repeats.inc(tally.num_repeats)
            self.outside.inc(tally.num_outside)


class RunMonitors:
    """The runs that are kept, each with series of its own, which go when it does. For the event loop alone.

    Scores of different models do not compare: a run that asks several is watched as one run a model, `RUN~MODEL` for those that are
    not the first.
    """

    def __init__(
        self,
        max_runs: int,
        expected: Expected | None,
        metrics: Metrics,
        clock: Callable[[], float] = time.time,
        further: Mapping[str, Expected | None] | None = None,
    ) -> None:
        """`expected`: of the first model's scores; `further`: of those of the others, by name."""
        self.runs = Runs(max_runs, on_forgotten=self._forgotten)
        self._expected = expected
        self._further = dict(further or {})
        self._metrics = metrics
        self._clock = clock
        self._series: dict[str, _Series] = {}
        metrics.runs.set_function(self._settled)

    def observe(
        self,
        run_id: str,
        captions: Sequence[str],
        scores: Sequence[float | None],
        about: tuple[str | None, str | Conversation | None] | None,
        model: str = "",
    ) -> None:
        """Some captions about one (picture's id, prompt) that a model scored; None where others of them were left out.

        Whoever waits for the scores gets them whatever happens here.
        """
        try:
            is_first = model not in self._further
            run_id = run_id if is_first else f"{run_id}~{model.replace('/', '~')}"  # no run and no model has a ~ in its name
            run = self.runs.active(run_id, self._expected if is_first else self._further[model])
            series = self._series.get(run_id) or self._begin(run)
            series.count(run.observe(captions, scores, self._clock(), None if about is None else hash(about)))
        except Exception:
            log.exception("a group of %d captions is missing in the monitors of its run", len(captions))
            self._metrics.run_faults.inc()

    def _settled(self) -> int:
        """How many runs there are. Reading the metrics closes the groups whose time has passed: of a run that ended nothing else would."""
        for run in self.runs.all():
            if series := self._series.get(run.run_id):
                series.count_groups(run.close(self._clock()))
        return len(self.runs)

    def _begin(self, run: Run) -> _Series:
        name, metrics = run.run_id, self._metrics
        metrics.run_mean.labels(name).set_function(lambda: run.recent.all.score if run.recent.num_captions else math.nan)
        metrics.run_length_correlation.labels(name).set_function(lambda: _or_nan(run.length_correlation))
        metrics.run_drift.labels(name).set_function(lambda: _or_nan(run.recent.drift(run.expected)))
        metrics.run_std_ratio.labels(name).set_function(lambda: _or_nan(run.recent.std_ratio(run.expected)))
        series = self._series[name] = _Series(
            scores=metrics.run_scores.labels(name),
            spread=metrics.run_spread.labels(name),
            flat_groups=metrics.run_flat_groups.labels(name),
            duplicates=metrics.run_duplicates.labels(name),
            repeats=metrics.run_repeats.labels(name),
            outside=metrics.run_outside.labels(name),
            unusable=metrics.run_unusable.labels(name),
        )
        return series

    def _forgotten(self, run_id: str) -> None:
        metrics = self._metrics
        self._series.pop(run_id, None)
        for metric in metrics.of_runs:
            metric.remove(run_id)
        metrics.runs_forgotten.inc()
        log.info("a training run made room for another; %d are kept", len(self.runs))


def _or_nan(value: float | None) -> float:
    """What a gauge says while something is unknown."""
    return math.nan if value is None else value
