"""One module a scenario; `ALL` in the order of the catalogue. T2, exact accounting, is in each that can ask the server afterwards."""

from __future__ import annotations

from tests.load.scenario import Scenario
from tests.load.scenarios.burst import BURST
from tests.load.scenarios.clients import CLIENTS
from tests.load.scenarios.draining import DRAINING
from tests.load.scenarios.faults import FAULTS
from tests.load.scenarios.fuzzing import FUZZING
from tests.load.scenarios.keeping import KEEPING
from tests.load.scenarios.killing import KILLING
from tests.load.scenarios.leaving import LEAVING
from tests.load.scenarios.mixups import MIXUPS
from tests.load.scenarios.overload import OVERLOAD
from tests.load.scenarios.rolling import ROLLING
from tests.load.scenarios.slow import SLOW
from tests.load.scenarios.soak import SOAK

ALL: tuple[Scenario, ...] = (MIXUPS, OVERLOAD, DRAINING, ROLLING, KILLING, LEAVING, SLOW, KEEPING, FUZZING, SOAK, FAULTS, BURST, CLIENTS)
