"""`python -m tests.load [NAME..] [--long] [--plant DEFECT] [--list] [--json]`: a table each; exit code 1 if a limit fails."""

from __future__ import annotations

import json
import os
import sys
import time
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from tests.load.processes import hardware_line
from tests.load.scenario import Report, Run, Scenario
from tests.load.scenarios import ALL

_MARKS = {True: "holds", False: "FAILS", None: ""}


def main(
    names: Annotated[list[str] | None, typer.Argument(help="Scenarios, T1 and so on; all if none is named.", show_default=False)] = None,
    is_long: Annotated[bool, typer.Option("--long", help="The long versions: minutes each.")] = False,
    plant: Annotated[str | None, typer.Option(help="A defect the scenario must find: then it has to fail.", show_default=False)] = None,
    is_listing: Annotated[bool, typer.Option("--list", help="What there is.")] = False,
    is_json: Annotated[bool, typer.Option("--json", help="One JSON object on standard output.")] = False,
) -> None:
    """Load, faults and restarts against real processes; every limit is printed with what was measured."""
    chosen = _chosen(names or [], plant)
    if is_listing:
        for scenario in chosen:
            print(f"{scenario.name:4} {scenario.title}; plants: {', '.join(scenario.plants)}")
        return
    hardware = hardware_line()
    run = Run(is_long=is_long, plant=plant, core=_pin())
    reports = {scenario.name: _run(scenario, run, None if is_json else hardware) for scenario in chosen}
    if is_json:
        found = {name: report.as_dict() for name, report in reports.items()}
        print(json.dumps({"hardware": hardware, "date": time.strftime("%Y-%m-%d", time.gmtime()), "scenarios": found}))
    raise typer.Exit(1 if any(report.failures() for report in reports.values()) else 0)


def _chosen(names: list[str], plant: str | None) -> list[Scenario]:
    known = {scenario.name: scenario for scenario in ALL}
    if unknown := sorted(set(names) - set(known)):
        raise typer.BadParameter(f"no scenario {', '.join(unknown)}; there are {', '.join(known)}")
    chosen = [known[name] for name in names] or list(ALL)
    if plant is not None and (unfit := [scenario.name for scenario in chosen if plant not in scenario.plants]):
        raise typer.BadParameter(f"{plant} is no plant of {', '.join(unfit)}; see --list")
    return chosen


def _pin() -> int | None:
    """Where there are two cores the last is the load's; returns the server's, the first."""
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < 2:
        return None
    os.sched_setaffinity(0, {cores[-1]})
    return cores[0]


def _run(scenario: Scenario, run: Run, hardware: str | None) -> Report:
    began = time.monotonic()
    report = scenario.measure(run)
    if hardware is not None:
        _show(scenario, run, report, f"{time.monotonic() - began:.0f} s")
        print(f"{hardware}; {time.strftime('%Y-%m-%d', time.gmtime())}\n", flush=True)
    return report


def _show(scenario: Scenario, run: Run, report: Report, took: str) -> None:
    version = ("long" if run.is_long else "short") + (f", planted {run.plant}" if run.plant else "")
    table = Table("figure", "measured", "limit", title=f"{scenario.name} {scenario.title} ({version}, {took})", title_justify="left")
    for figure in report.figures:
        table.add_row(figure.name, figure.value, _MARKS[figure.holds])
    console = Console(width=None if sys.stdout.isatty() else 140)
    console.print(table)
    for line in report.shown if report.failures() else []:
        console.print(f"  {line}", markup=False, highlight=False)


if __name__ == "__main__":
    typer.run(main)
