"""The metrics of runs: what is counted is in them, what is unknown is NaN, they go with their run, and a fault fails nobody."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import pytest
from prometheus_client import generate_latest
from prometheus_client.parser import text_string_to_metric_families

from app.artifacts import RewardModelConfig, ScoreDistribution
from app.metrics import Metrics
from app.monitors import RunMonitors, expected_of
from app.tallies import Expected

ABOUT = ("sha256:a", "Write a caption.")


def samples(metrics: Metrics) -> dict[str, dict[str, float]]:
    """By name and run."""
    found: dict[str, dict[str, float]] = {}
    for family in text_string_to_metric_families(generate_latest(metrics.registry).decode()):
        for sample in family.samples:
            if "run" in sample.labels:
                found.setdefault(sample.name + sample.labels.get("le", ""), {})[sample.labels["run"]] = sample.value
    return found


def monitored(
    max_runs: int = 4, expected: Expected | None = None, clock: Callable[[], float] = lambda: 1000.0
) -> tuple[RunMonitors, Metrics]:
    metrics = Metrics()
    return RunMonitors(max_runs, expected, metrics, clock), metrics


def test_what_is_counted_is_in_the_metrics() -> None:
    monitors, metrics = monitored(expected=Expected(0.0, 1.0))
    monitors.observe("a", ["x", "x", "yyy"], [1.0, 1.0, 2.0], ABOUT)
    monitors.observe("a", ["x", "zz"], [5.0, 5.0], ABOUT)
    monitors.observe("a", ["w", "v"], [0.5, None], ABOUT)
    found = {name: value["a"] for name, value in samples(metrics).items()}
    assert found["reward_run_score_count"] == 6
    assert found["reward_run_score_mean"] == pytest.approx(14.5 / 6)
    assert found["reward_run_score_bucket1.0"] == 3
    assert (found["reward_run_group_score_stddev_count"], found["reward_run_group_score_stddev_bucket0.0"]) == (2, 1)
    assert found["reward_run_flat_groups_total"] == 1
    assert found["reward_run_duplicate_captions_total"] == 2
    assert found["reward_run_repeated_captions_total"] == 1
    assert found["reward_run_outside_captions_total"] == 2
    assert math.isnan(found["reward_run_length_correlation"]), "of three groups nothing is said"
    assert found["reward_run_drift_sigmas"] == pytest.approx(14.5 / 6)
    assert found["reward_run_std_ratio"] > 1
    assert metrics.registry.get_sample_value("reward_runs") == 1


def test_what_is_unknown_is_nan_and_never_0() -> None:
    monitors, metrics = monitored()
    monitors.observe("a", ["x"], [1.0], ABOUT)
    found = samples(metrics)
    assert all(
        math.isnan(found[name]["a"]) for name in ("reward_run_length_correlation", "reward_run_drift_sigmas", "reward_run_std_ratio")
    )


def test_the_gauge_of_length_says_what_the_verdict_says() -> None:
    """A pair among captions that have no group correlates perfectly, and means nothing."""
    monitors, metrics = monitored()
    for number in range(70):
        monitors.observe("a", ["x" * (number % 7 + 1)], [number % 5], (f"{number}", None))
    alone = samples(metrics)["reward_run_length_correlation"]["a"]
    assert alone == pytest.approx(monitors.runs.active("a").as_dict()["length_r"])
    monitors.observe("a", ["x", "yyy"], [1.0, 2.0], ABOUT)
    assert math.isnan(samples(metrics)["reward_run_length_correlation"]["a"])
    assert monitors.runs.active("a").as_dict()["length_r"] is None
    for _ in range(20):
        monitors.observe("a", ["x", "yyy"], [1.0, 2.0], ABOUT)
    assert samples(metrics)["reward_run_length_correlation"]["a"] == pytest.approx(1)
    assert [finding.code for finding in monitors.runs.active("a").findings() if finding.code == "length"] == ["length"]


def test_groups_of_captions_that_came_alone_are_counted_when_they_are_whole() -> None:
    now = [1000.0]
    monitors, metrics = monitored(clock=lambda: now[0])
    for text in ("x", "x", "yy"):
        monitors.observe("a", [text], [1.0], ABOUT)
    found = samples(metrics)
    assert (found["reward_run_score_count"]["a"], found["reward_run_group_score_stddev_count"]["a"]) == (3, 0)
    assert found["reward_run_score_mean"]["a"] == 1.0
    now[0] += 60
    samples(metrics)  # whoever reads closes what is over; what was read before it is of the time before
    found = samples(metrics)
    assert found["reward_run_group_score_stddev_count"]["a"] == found["reward_run_flat_groups_total"]["a"] == 1
    assert (found["reward_run_duplicate_captions_total"]["a"], found["reward_run_repeated_captions_total"]["a"]) == (2, 0)


def test_a_picture_with_another_prompt_is_another_group() -> None:
    monitors, _ = monitored()
    for about in (("p", "a"), ("p", "b"), ("q", "a"), ("p", "a"), ("p", None)):
        monitors.observe("a", ["x"], [1.0], about)
    total = monitors.runs.active("a").total
    assert (total.num_groups, total.num_compared) == (4, 1)


def test_scores_beyond_float32_are_counted_apart() -> None:
    monitors, metrics = monitored()
    monitors.observe("a", ["x", "y"], [1e300, 1.0], ABOUT)
    found = samples(metrics)
    assert (found["reward_run_unusable_scores_total"]["a"], found["reward_run_score_count"]["a"]) == (1, 1)


def test_ten_thousand_runs_leave_series_of_those_that_are_kept() -> None:
    monitors, metrics = monitored(max_runs=8)
    for number in range(10_000):
        monitors.observe(f"run-{number}", ["x", "y"], [1.0, 2.0], ABOUT)
    found = samples(metrics)
    kept = {run.run_id for run in monitors.runs.all()}
    assert len(kept) == 8
    assert all(set(by_run) == kept for by_run in found.values())
    assert metrics.registry.get_sample_value("reward_runs_forgotten_total") == 10_000 - 8
    assert metrics.registry.get_sample_value("reward_runs") == 8
    assert len(monitors._series) == 8


def test_a_run_that_comes_back_begins_anew() -> None:
    monitors, metrics = monitored(max_runs=1)
    for name in ("a", "a", "b", "a"):
        monitors.observe(name, ["x", "y"], [1.0, 2.0], ABOUT)
    assert samples(metrics)["reward_run_score_count"] == {"a": 2}


class Treacherous(Sequence[str]):
    """Captions that cannot be read."""

    def __len__(self) -> int:
        return 2

    def __getitem__(self, index: object) -> str:  # type: ignore[override]
        raise RuntimeError("a secret caption")


def test_a_fault_in_the_monitor_is_logged_and_counted_and_fails_nobody(caplog: pytest.LogCaptureFixture) -> None:
    monitors, metrics = monitored()
    monitors.observe("a", Treacherous(), [1.0, 2.0], ABOUT)
    assert metrics.registry.get_sample_value("reward_run_monitor_faults_total") == 1
    assert "a group of 2 captions is missing" in caplog.text


CONFIG = RewardModelConfig(base_model_name="fake", score_head_shape=(1, 8))


@pytest.mark.parametrize(
    ("mean", "std", "is_known"),
    [(0.57, 4.44, True), (0.0, 0.0, False), (1e6, 1e-3, False), (1e300, 1.0, False), (0.0, 1e300, False), (0.0, 1e-5, True)],
)
def test_a_distribution_nothing_can_be_measured_by_is_none(mean: float, std: float, is_known: bool) -> None:
    config = CONFIG.model_copy(update={"score_distribution": ScoreDistribution(mean=mean, std=std)})
    assert expected_of(config) == (Expected(mean, std) if is_known else None)
    assert expected_of(CONFIG) is None
