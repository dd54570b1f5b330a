"""Captions a second over group size and over clients, as a picture. Needs matplotlib, which only the extra `bench` brings."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from app.bench.report import Report
from app.bench.ways import WAYS
from app.errors import SettingsInvalid

_SUFFIXES = (".png", ".svg")


def check_plot(path: Path) -> None:
    """Before anything is measured. Raises SettingsInvalid for a picture that could not be written."""
    if path.suffix.lower() not in _SUFFIXES:
        raise SettingsInvalid(f"--plot {path}: expected a name that ends in {' or '.join(_SUFFIXES)}")
    if not path.parent.is_dir():
        raise SettingsInvalid(f"--plot {path}: no folder {path.parent}")
    target = path.resolve()  # of a link
    was_there = target.exists()
    try:
        target.open("ab").close()
        if not was_there:
            target.unlink()
    except OSError as error:
        raise SettingsInvalid(f"--plot {path}: cannot be written: {error.strerror or error}") from None
    if importlib.util.find_spec("matplotlib") is None:
        raise SettingsInvalid("--plot needs matplotlib: pip install 'punchline[bench]'")


def write_plot(report: Report, path: Path) -> None:
    """Two panels, or one where no load was measured. Raises SettingsInvalid if it cannot be written after all."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11 if report.levels else 6, 4.5), layout="constrained")
    panels = figure.subplots(1, 2 if report.levels else 1, squeeze=False)[0]
    worded = report.subject.worded
    for way in WAYS:
        rows = sorted((row for row in report.measured.rows if row.way == way), key=lambda row: row.num_captions)
        if rows:
            speeds = [row.num_captions / row.seconds for row in rows]
            panels[0].plot([row.num_captions for row in rows], speeds, marker="o", label=worded(way))
    _axes(panels[0], worded("captions in a group"), worded("captions a second"), sorted({row.num_captions for row in report.measured.rows}))
    panels[0].set_yscale("log")
    panels[0].yaxis.set_major_formatter("{x:g}")  # powers would need mathematical fonts
    panels[0].yaxis.set_minor_formatter("")
    figure.legend(loc="outside lower center", ncols=3, fontsize="small")
    if report.levels:
        panels[1].plot([level.num_clients for level in report.levels], [level.captions_per_s for level in report.levels], marker="o")
        clients = worded("clients, each with groups of 8, known images")
        _axes(panels[1], clients, worded("captions a second"), [level.num_clients for level in report.levels])
        panels[1].set_ylim(0, 1.1 * max(level.captions_per_s for level in report.levels))
    figure.suptitle(f"{report.subject.heading}\n{report.hardware.line}", fontsize="small")
    try:
        figure.savefig(path, dpi=150)
    except OSError as error:
        raise SettingsInvalid(f"--plot {path}: cannot be written: {error.strerror or error}") from None


def _axes(panel: Any, name: str, speed: str, ticks: list[int]) -> None:
    panel.set_xscale("log", base=2)
    panel.set_xticks(ticks, [str(tick) for tick in ticks])
    panel.set_xlabel(name)
    panel.set_ylabel(speed)
    panel.grid(alpha=0.3)
