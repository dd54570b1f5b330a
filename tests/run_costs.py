"""What the monitors of runs cost, in memory and time, with as many runs and open groups as there may be: `python -m tests.run_costs`."""

from __future__ import annotations

import random
import time
import tracemalloc

from prometheus_client import generate_latest

from app.metrics import Metrics
from app.monitors import RunMonitors
from app.settings import Settings
from app.tallies import Expected

MAX_RUNS = max(bound.le for bound in Settings.model_fields["max_runs"].metadata if hasattr(bound, "le"))


def main() -> None:
    for way, sent in (("groups of 8", grouped), ("one caption a request, 128 groups open", alone)):
        num_runs, now = 16, [0.0]
        tracemalloc.start()
        metrics = Metrics()
        monitors = RunMonitors(MAX_RUNS, Expected(0.0, 1.0), metrics, clock=lambda now=now: now[0])
        before = tracemalloc.get_traced_memory()[0]
        for number in range(num_runs):
            sent(monitors, f"run-{number}")
        kib = (tracemalloc.get_traced_memory()[0] - before) / num_runs / 1024
        tracemalloc.stop()
        started = time.perf_counter()
        sent(monitors, "timed")
        group_ms = (time.perf_counter() - started) / 1000 * 1000
        print(
            f"{way}: {kib:.0f} KiB a run, {group_ms:.3f} ms a group, {scrape_ms(monitors, metrics) / (num_runs + 1):.2f} ms a scrape of it"
        )


def scrape_ms(monitors: RunMonitors, metrics: Metrics) -> float:
    """Of all runs, each of which got something new before."""
    for run in monitors.runs.all():
        monitors.observe(run.run_id, ["again"], [0.5], ("again", None))
    started = time.perf_counter()
    generate_latest(metrics.registry)
    return (time.perf_counter() - started) * 1000


def grouped(monitors: RunMonitors, run_id: str) -> None:
    source = random.Random(run_id)
    for number in range(1000):
        monitors.observe(run_id, [f"{number} {each}" for each in range(8)], [source.gauss(0, 1) for _ in range(8)], (f"{number}", None))


def alone(monitors: RunMonitors, run_id: str) -> None:
    source = random.Random(run_id)
    for first in range(0, 1000, 125):
        for each in range(8):
            for number in range(first, first + 125):
                monitors.observe(run_id, [f"{number} {each}"], [source.gauss(0, 1)], (f"{number}", None))


if __name__ == "__main__":
    main()
