"""One table of what was promised and what was measured: `python -m tests.reliability`.

Runs the load scenarios (in their long versions unless `--short`), plants wrong models, mutates the code, and puts the figure of
each promise on one line. `--keep FILE` keeps what was measured and adds to what the file holds, so that an hour's work can be done in
pieces: name the parts to run, T1, T4, .., `planted` or `mutants`; all of them if none is named.
"""

from __future__ import annotations

import asyncio
import json
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from tests import mutants
from tests.load.__main__ import _MARKS, _pin
from tests.load.processes import hardware_line
from tests.load.scenario import Report, Run
from tests.load.scenarios import ALL

Kept = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Promise:
    """A line of the table: which figure of which part shows it."""

    promise: str
    part: str
    figure: str
    limit: str


PROMISES = (
    Promise("no score is another's", "T1", "wrong items", "0"),
    Promise("every request and caption is counted once", "T1", "sent minus counted", "0"),
    Promise("an audited cache hit is what is computed now", "T1", "audited cache hits", "0 differ"),
    Promise("goodput at 10 times the capacity, of the peak", "T3", "goodput at 10 x", ">= 0.9"),
    Promise("99th percentile of refusals", "T3", "99th percentile of refusals", "< 50 ms"),
    Promise("lost while a server drains", "T4", "requests lost or not taken in", "0"),
    Promise("signal to exit", "T4", "signal to exit", "< grace"),
    Promise("groups scored by two models in a rolling restart", "T5", "groups of pinning workers", "0"),
    Promise("wrong scores through kills, with retries", "T6", "wrong items", "0"),
    Promise("captions of clients that left, not computed", "T7", "skipped before the device", ">= 95 %"),
    Promise("computed for nobody", "T7", "computed for nobody", "<= 5 %"),
    Promise("p99 beside slow clients", "T8", "healthy p99", "<= 1.5 x baseline"),
    Promise("resets on the keep-alive race", "T9", "resets of requests", "0"),
    Promise("answers to drawn requests against the schema", "T10", "failures of schemathesis", "0"),
    Promise("memory slope with 5 % hostile traffic", "T12", "memory slope", "includes 0"),
    Promise("innocents harmed by faults of the device", "T16", "innocent requests harmed", "0"),
    Promise("numbers after a fault that stays", "T16", "numbers after a fault that stays", "0"),
    Promise("complete groups in a GRPO burst", "T17", "groups without scores", "0 missing"),
    Promise("fairness over workers (Jain)", "T17", "Jain's index", ">= 0.95"),
    Promise("no score is another's through our own client", "client", "wrong items", "0"),
    Promise("our client sends each picture once", "client", "pictures sent", "each once"),
    Promise("wrongly assembled models that became ready", "planted", "reached ready", "0"),
    Promise("wrong versions of planner, admission, caches, decoding found", "mutants", "mutants killed", ">= 90 %"),
)


def main(
    parts: Annotated[
        list[str] | None, typer.Argument(help="T1, T3, .., planted, mutants; all if none is named.", show_default=False)
    ] = None,
    is_short: Annotated[
        bool, typer.Option("--short", help="The short versions: seconds each; they show that it runs, and little else.")
    ] = False,
    keep: Annotated[Path | None, typer.Option(help="A JSON file: what it holds is shown too, what is measured is added.")] = None,
    all_figures: Annotated[bool, typer.Option("--all-figures", help="Below the table every figure of every part.")] = False,
    run_nothing: Annotated[bool, typer.Option("--run-nothing", help="Show what the file holds.")] = False,
) -> None:
    """Measure what was promised, and print one table."""
    known = _parts()
    if unknown := sorted(set(parts or []) - set(known)):
        raise typer.BadParameter(f"no part {', '.join(unknown)}; there are {', '.join(known)}")
    if "mutants" in (parts or known) and not run_nothing and find_spec("mutmut") is None:
        raise typer.BadParameter("mutants needs mutmut: pip install -e '.[mutants]'")
    kept: Kept = json.loads(keep.read_text()) if keep is not None and keep.exists() else {}
    hardware = hardware_line()  # before this process gives up a core
    run = Run(is_long=not is_short, core=_pin())
    for name in [] if run_nothing else parts or list(known):
        print(f"{name} ..", file=sys.stderr, flush=True)
        kept[name] = _measured(known[name], run, hardware)
        if keep is not None:
            keep.write_text(json.dumps(kept, indent=1, ensure_ascii=False) + "\n")
    show(kept)
    for name in kept if all_figures else ():
        print("\n".join([f"\n{name}", *(f"  {figure['name']}: {figure['value']}" for figure in kept[name]["figures"])]))
    raise typer.Exit(0 if holds(kept) else 1)


def _parts() -> dict[str, Callable[[Run], Report]]:
    scenarios = {each.name: each.measure for each in ALL}
    return {**scenarios, "planted": _planted, "mutants": mutants.measure}


def _measured(measure: Callable[[Run], Report], run: Run, hardware: str) -> Kept:
    began = time.monotonic()
    report = measure(run)
    version = "long" if run.is_long else "short"
    when = {"hardware": hardware, "date": time.strftime("%Y-%m-%d", time.gmtime()), "version": version}
    return {**report.as_dict(), **when, "seconds": round(time.monotonic() - began)}


def _planted(run: Run) -> Report:
    from tests.planted import PLANTED, Planted, make_artifact, refusal

    report = Report()
    with tempfile.TemporaryDirectory() as name:
        artifact = make_artifact(Path(name))
        control = asyncio.run(refusal(artifact, Path(name) / "control", Planted("nothing")))
        lines = {
            fault: asyncio.run(refusal(artifact, Path(name) / str(number), each)) for number, (fault, each) in enumerate(PLANTED.items())
        }
    report.add("the untouched model is refused", control or "no", control is None)
    ready = [fault for fault, line in lines.items() if line is None]
    report.add("reached ready", f"{len(ready)} of {len(lines)} planted faults", not ready)
    report.shown += ready
    return report


def holds(kept: Kept) -> bool:
    """Whether something was measured, all of it held, and none of its promises lacks its figure."""
    promised = (promise for promise in PROMISES if promise.part in kept)
    return bool(kept) and all(part["passed"] for part in kept.values()) and all(_figure(promise, kept) for promise in promised)


def _figure(promise: Promise, kept: Kept) -> dict[str, Any] | None:
    part = kept.get(promise.part, {"figures": []})
    return next((figure for figure in part["figures"] if figure["name"].startswith(promise.figure)), None)


def show(kept: Kept) -> None:
    """The table, and where and when each part was measured."""
    table = Table("promise", "measured", "limit", "", "part")
    for promise in PROMISES:
        figure = _figure(promise, kept)
        value = figure["value"] if figure else "no such figure" if promise.part in kept else "not run"
        mark = _MARKS[figure["holds"]] if figure else "FAILS" if promise.part in kept else ""
        table.add_row(promise.promise, value, promise.limit, mark, promise.part)
    Console(width=150).print(table)
    for line, names in _runs(kept).items():
        print(f"{', '.join(names)}: {line}")


def _runs(kept: Kept) -> dict[str, list[str]]:
    """Parts by where, when and how they ran."""
    found: dict[str, list[str]] = {}
    for name, part in kept.items():
        found.setdefault(f"{part['version']}, {part['date']}, {part['hardware']}", []).append(name)
    return found


if __name__ == "__main__":
    typer.run(main)
