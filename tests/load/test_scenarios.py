"""Every scenario in its short version, and the proof that each would notice the defects it looks for.

What depends on the machine's speed is printed by `python -m tests.load` and demanded there, never here; of a planted defect it may be
the limit that fails, since a busy machine makes that only worse.
"""

from __future__ import annotations

from typing import Any

import pytest

from tests.load.scenario import Run, Scenario
from tests.load.scenarios import ALL
from tests.reliability import PROMISES, holds

PLANTED = [pytest.param(scenario, plant, id=f"{scenario.name}-{plant}") for scenario in ALL for plant in scenario.plants]


@pytest.mark.parametrize("scenario", ALL, ids=lambda scenario: scenario.name)
def test_the_short_version_holds(scenario: Scenario) -> None:
    report = scenario.measure(Run())
    assert report.failures(is_timed=False) == [], report.shown
    names = [figure.name for figure in report.figures]
    promised = [promise.figure for promise in PROMISES if promise.part == scenario.name]
    assert promised
    assert [figure for figure in promised if not any(name.startswith(figure) for name in names)] == []


@pytest.mark.parametrize(("scenario", "plant"), PLANTED)
def test_a_planted_defect_is_found(scenario: Scenario, plant: str) -> None:
    report = scenario.measure(Run(plant=plant))
    failed = [figure.name for figure in report.failures()]
    assert any(name.startswith(scenario.plants[plant]) for name in failed), failed


def kept(name: str, *, passed: bool = True) -> dict[str, Any]:
    figures = [{"name": promise.figure, "value": "0", "holds": True} for promise in PROMISES if promise.part == name]
    return {"figures": figures, "passed": passed}


def test_the_table_holds_only_if_all_that_ran_held_and_has_its_figures() -> None:
    assert holds({"T3": kept("T3"), "T9": kept("T9")})
    assert not holds({})
    assert not holds({"T3": kept("T3", passed=False), "T9": kept("T9")})
    assert not holds({"T3": {"figures": kept("T3")["figures"][1:], "passed": True}, "T9": kept("T9")})
