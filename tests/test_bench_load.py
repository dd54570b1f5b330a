"""How idle the device was, from what is seen at each answer."""

from __future__ import annotations

import pytest
from prometheus_client import CollectorRegistry, Counter

from app.bench.load import BUSY, Watch, busy_seconds


def watch(*moments: tuple[float, float]) -> Watch:
    found = Watch(CollectorRegistry())
    found.moments = list(moments)
    return found


def test_whole_batches_between_the_first_answer_and_the_last() -> None:
    """Batches end at 1, 3 and 6 s after 0.9, 1.8 and 2.7 s of work each; the second answer of the last batch comes late."""
    assert watch((1.0, 0.9), (3.0, 2.7), (6.0, 5.4), (6.5, 5.4)).idle_share == pytest.approx(1 - 4.5 / 5)


def test_one_batch_tells_nothing() -> None:
    assert watch().idle_share is None
    assert watch((1.0, 0.9), (1.1, 0.9)).idle_share is None


def test_clocks_that_disagree_are_no_negative_idleness() -> None:
    assert watch((1.0, 0.0), (2.0, 1.1)).idle_share == 0.0


def test_an_answer_is_noted_with_the_devices_seconds() -> None:
    registry = CollectorRegistry()
    found = Watch(registry)
    found.answered(0.0)
    assert (len(found.seconds), found.moments) == (1, [])  # this server counts nothing
    Counter(BUSY.removesuffix("_total"), "Work.", registry=registry).inc(2.5)
    assert busy_seconds(registry) == 2.5
    found.answered(0.0)
    assert [busy for _, busy in found.moments] == [2.5]
