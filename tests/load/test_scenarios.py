"""Every scenario in its short version, and the proof that each would notice the defects it looks for.

What depends on the machine's speed is printed by `python -m tests.load` and demanded there, never here; of a planted defect it may be
the limit that fails, since a busy machine makes that only worse.
"""

from __future__ import annotations

import pytest

from tests.load.scenario import Run, Scenario
from tests.load.scenarios import ALL

PLANTED = [pytest.param(scenario, plant, id=f"{scenario.name}-{plant}") for scenario in ALL for plant in scenario.plants]


@pytest.mark.parametrize("scenario", ALL, ids=lambda scenario: scenario.name)
def test_the_short_version_holds(scenario: Scenario) -> None:
    report = scenario.measure(Run())
    assert report.failures(is_timed=False) == [], report.shown


@pytest.mark.parametrize(("scenario", "plant"), PLANTED)
def test_a_planted_defect_is_found(scenario: Scenario, plant: str) -> None:
    report = scenario.measure(Run(plant=plant))
    assert report.failures()
