"""What a scenario is: how it is asked for, what it reports, and when it has failed."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from app.machine import quiet_collector
from tests.load.processes import Oracle
from tests.load.tally import Samples, Tally, bound, difference, read_samples
from tests.load.wire import Pool


@dataclass(frozen=True, slots=True)
class Run:
    """How to run: `plant` names the defect to be found."""

    is_long: bool = False
    plant: str | None = None
    core: int | None = None  # the server's

    def pick(self, short: Any, long: Any) -> Any:
        return long if self.is_long else short

    def server_plant(self, *names: str) -> tuple[str, ...]:
        """The server's flags for a plant, if it is one of these."""
        return ("--plant", self.plant) if self.plant in names and self.plant else ()


@dataclass(frozen=True, slots=True)
class Figure:
    """One printed value. `holds` is None for information; `is_timed`: it depends on the machine, so that no test may demand it."""

    name: str
    value: str
    holds: bool | None = None
    is_timed: bool = False


@dataclass(slots=True)
class Report:
    """The figures of one run of a scenario."""

    figures: list[Figure] = field(default_factory=list)
    shown: list[str] = field(default_factory=list)  # the first faults

    def add(self, name: str, value: object, holds: bool | None = None, *, is_timed: bool = False) -> None:
        self.figures.append(Figure(name, str(value), holds, is_timed))

    def add_zero(self, name: str, count: int, num_trials: int) -> None:
        """ "0 of N" with its bound."""
        self.add(name, f"{count:,} of {num_trials:,}" + (f" ({bound(num_trials)})" if not count else ""), count == 0 and num_trials > 0)

    def add_tally(self, tally: Tally, *, may_lose: bool = False) -> None:
        """Wrong items, lost requests, and how requests ended."""
        self.add_zero("wrong items", tally.num_wrong, tally.num_right + tally.num_wrong)
        if not may_lose:
            self.add_zero("requests lost", tally.num_lost, tally.num_sent)
        self.add("requests by outcome", dict(sorted(tally.requests.items())))
        self.shown += tally.shown

    def add_conservation(self, before: Samples, after: Samples, tally: Tally) -> None:
        faults = difference(before, after, tally)
        self.add("sent minus counted, requests and items", "; ".join(faults) or 0, not faults)

    def failures(self, *, is_timed: bool = True) -> list[Figure]:
        return [figure for figure in self.figures if figure.holds is False and (is_timed or not figure.is_timed)]

    def as_dict(self) -> dict[str, Any]:
        return {"figures": [asdict(figure) for figure in self.figures], "shown": self.shown, "passed": not self.failures()}


@dataclass(frozen=True, slots=True)
class Scenario:
    """`plants`: defects, and the figure that each must make fail."""

    name: str
    title: str
    plants: Mapping[str, str]
    run: Callable[[Run], Coroutine[Any, Any, Report]]

    def measure(self, run: Run) -> Report:
        """Run it to its end, in a loop of its own; what is measured are not this process's own collections of garbage."""
        undo = quiet_collector()
        try:
            return asyncio.run(self.run(run))
        finally:
            undo()


async def upload(pool: Pool, requests: list[bytes]) -> None:
    """Send pictures ahead."""
    for request in requests:
        answer = await pool.ask(request)
        if answer.status != 200:
            raise RuntimeError(f"a picture was refused: {answer.body!r}")


async def settled(server: Oracle) -> Samples:
    """The server's counts once nothing is in flight."""
    pool = server.pool()
    try:
        for _ in range(400):
            samples = await read_samples(pool)
            active = sum(
                value for name, value in samples.items() if name.startswith("http_server_active_requests") and '"/metrics"' not in name
            )
            if not active and not samples.get("reward_queue_items"):
                break
            await asyncio.sleep(0.025)
        return samples
    finally:
        pool.close()
