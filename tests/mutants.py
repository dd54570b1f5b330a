"""Mutants: every operator, number and text of the code that plans, admits, keeps and decodes, made wrong one at a time by mutmut.

A mutant is killed when a test fails of it. What is mutated and which tests run is `[tool.mutmut]` of pyproject.toml; it works on a copy.
Needs the extra `mutants`. A quarter of an hour on two cores; the short version has the planner alone.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

from app.machine import num_processors
from tests.load.scenario import Report, Run

_ROOT = Path(__file__).parent.parent
_COPIED = ("app", "tests", "training", "pyproject.toml", "README.md")
_MIN_SHARE = 0.9
_LINE = re.compile(r"^\s*app\.(\w+)\.(\S+): (.+)$", re.MULTILINE)
_NOTICED = {"killed", "timeout", "caught by type check"}


def measure(run: Run) -> Report:
    """The share that was killed, of each module and of all. Raises RuntimeError when nothing was mutated."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for each in _COPIED:
            source = _ROOT / each
            copy = shutil.copytree if source.is_dir() else shutil.copy
            copy(source, folder / each)
        os.sched_setaffinity(0, range(os.cpu_count() or 1))  # scenarios before may have given up a core
        chosen = [] if run.is_long else ["app.planning.*"]
        output = _mutmut(folder, "run", "--max-children", str(num_processors()), *chosen)
        found = [(module, mutant, how) for module, mutant, how in _LINE.findall(_mutmut(folder, "results", "--all", "true"))]
    if not run.is_long:
        found = [each for each in found if each[0] == "planning"]
    if not found:
        raise RuntimeError(f"mutmut made no mutants: {output[-2000:]}")
    return _report(found)


def _mutmut(folder: Path, *arguments: str) -> str:
    done = subprocess.run([sys.executable, "-m", "mutmut", *arguments], cwd=folder, capture_output=True, text=True, check=False)
    return done.stdout + done.stderr


def _report(found: list[tuple[str, str, str]]) -> Report:
    report, made = Report(), Counter(module for module, _, _ in found)
    killed = Counter(module for module, _, how in found if how in _NOTICED)
    for module, number in made.items():
        share = killed[module] / number
        report.add(f"{module}.py", f"{share:.1%} of {number}", share >= _MIN_SHARE)
    share = killed.total() / made.total()
    report.add("mutants killed", f"{share:.1%} of {made.total():,}", share >= _MIN_SHARE)
    report.shown += [f"{how}: {module} {mutant}" for module, mutant, how in found if how not in _NOTICED]
    return report
