"""The figures of an evaluation as PNG bytes. The only module that loads matplotlib; draws without a display."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import matplotlib as mpl
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from training.statistics import Agreement, BestOf, Bucket, ContestOutcomes, Estimate, Histogram

if TYPE_CHECKING:
    from training.report import Reliability

_INK, _SOFT, _ACCENT, _WARM = "#1d2430", "#8a94a3", "#2f5d8a", "#b5552b"
_STYLE: dict[str, Any] = {
    "font.size": 10,
    "text.color": _INK,
    "axes.labelcolor": _INK,
    "axes.edgecolor": _SOFT,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e6e9ed",
    "xtick.color": _INK,
    "ytick.color": _INK,
    "legend.edgecolor": "white",
    "legend.framealpha": 0.9,
}
_WIDTH, _HEIGHT, _DPI = 8.0, 3.6, 110
_MAX_NAMED = 60  # contests with a readable name under their dot


@dataclass
class _Sheet:
    """A plot in the making, and its bytes once it is done."""

    axes: Any
    png: io.BytesIO = field(default_factory=io.BytesIO)


def plot_contests(contests: Sequence[ContestOutcomes], agreement: Agreement) -> bytes:
    """One dot a contest, worst first; line and band are the pooled accuracy and its interval over contests."""
    ordered = sorted(contests, key=lambda each: each.outcomes.accuracy)
    places = np.arange(len(ordered))
    sizes = np.array([each.outcomes.num_pairs for each in ordered])
    with _sheet() as sheet:
        _band(sheet.axes, agreement.pooled)
        sheet.axes.axhline(0.5, color=_SOFT, linestyle=":", label="chance")
        values = [each.outcomes.accuracy for each in ordered]
        sheet.axes.scatter(places, values, s=12 + 48 * sizes / sizes.max(), color=_ACCENT, zorder=3, label="contest (larger: more pairs)")
        named = len(ordered) <= _MAX_NAMED
        sheet.axes.set_xticks(places if named else [], [each.contest[:12] for each in ordered] if named else [], rotation=90, fontsize=7)
        for label in sheet.axes.get_xticklabels():
            label.set_parse_math(False)  # a contest may be called anything, dollars included
        sheet.axes.set_xlabel("contest, worst first")
        _accuracy_axis(sheet.axes, values)
        sheet.axes.legend(loc="lower right", fontsize=8)
    return sheet.png.getvalue()


def plot_buckets(buckets: Sequence[Bucket]) -> bytes:
    places = np.arange(len(buckets))
    estimates = [bucket.agreement.pooled for bucket in buckets]
    values = [estimate.value for estimate in estimates]
    with _sheet() as sheet:
        sheet.axes.axhline(0.5, color=_SOFT, linestyle=":", label="chance")
        sheet.axes.errorbar(places, values, yerr=_reach(estimates), fmt="o", color=_ACCENT, capsize=4, label="accuracy, 95 % over contests")
        names = [f"{bucket.name}\n{bucket.agreement.outcomes.num_pairs:,} pairs" for bucket in buckets]
        sheet.axes.set_xticks(places, names)
        sheet.axes.set_xlim(-0.5, len(buckets) - 0.5)
        sheet.axes.set_xlabel("sigma gap")
        _accuracy_axis(sheet.axes, values)
        sheet.axes.legend(loc="lower right", fontsize=8)
    return sheet.png.getvalue()


def plot_calibration(reliability: Sequence[Reliability]) -> bytes:
    with _sheet(width=5.0, height=4.4) as sheet:
        sheet.axes.plot([0.5, 1], [0.5, 1], color=_SOFT, linestyle=":", label="perfect")
        for each, color, marker in zip(reliability, (_ACCENT, _WARM, _INK), ("o", "s", "^"), strict=False):
            bins = each.calibration.bins
            label = f"{each.name}, T = {each.temperature:.3g}"
            sheet.axes.plot([own.confidence for own in bins], [own.agreement for own in bins], marker=marker, color=color, label=label)
        sheet.axes.set_xlim(0.49, 1.01)
        sheet.axes.set_ylim(min([0.45, *(own.agreement - 0.03 for each in reliability for own in each.calibration.bins)]), 1.02)
        sheet.axes.set_xlabel("probability the model gives to the side it prefers")
        sheet.axes.set_ylabel("share in which the crowd agrees")
        sheet.axes.legend(loc="lower right", fontsize=8)
    return sheet.png.getvalue()


def plot_margins(margins: Histogram) -> bytes:
    edges, counts = np.array(margins.edges), np.array(margins.counts)
    with _sheet() as sheet:
        colors = [_WARM if low < 0 else _ACCENT for low in edges[:-1]]
        sheet.axes.bar(edges[:-1], counts, width=np.diff(edges), align="edge", color=colors, edgecolor="white", linewidth=0.4)
        sheet.axes.axvline(0, color=_INK, linewidth=1)
        sheet.axes.set_xlabel("margin")
        sheet.axes.set_ylabel("pairs")
    return sheet.png.getvalue()


def plot_best_of(found: Sequence[BestOf]) -> bytes:
    places = np.arange(len(found))
    with _sheet() as sheet:
        sheet.axes.axhline(0, color=_SOFT, linestyle=":", label="random caption")
        for name, color, marker, estimates in (
            ("oracle: the ratings themselves", _WARM, "s", [best.oracle_gain for best in found]),
            ("model", _ACCENT, "o", [best.gain for best in found]),
        ):
            values = [estimate.value for estimate in estimates]
            sheet.axes.errorbar(places, values, yerr=_reach(estimates), fmt=f"{marker}-", color=color, capsize=4, label=name)
        sheet.axes.set_xticks(places, [str(best.n) for best in found])
        sheet.axes.set_xlabel("best of n captions")
        sheet.axes.set_ylabel("mean crowd rating gained")
        sheet.axes.legend(loc="upper left", fontsize=8)
    return sheet.png.getvalue()


@contextmanager
def _sheet(width: float = _WIDTH, height: float = _HEIGHT) -> Iterator[_Sheet]:
    """Axes to draw on, in our style; afterwards `png` holds the picture, the same bytes for the same figures."""
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(width, height), layout="constrained")
        FigureCanvasAgg(figure)  # no display, whatever backend the machine is set to
        sheet = _Sheet(figure.add_subplot())
        yield sheet
        figure.savefig(sheet.png, format="png", dpi=_DPI, metadata={"Software": None})


def _band(axes: Any, estimate: Estimate) -> None:
    axes.axhline(estimate.value, color=_ACCENT, label=f"all pairs: {estimate.value:.3f}")
    if estimate.interval is not None:
        axes.axhspan(
            estimate.interval.low, estimate.interval.high, color=_ACCENT, alpha=0.15, linewidth=0, label="95 % interval over contests"
        )


def _reach(estimates: Sequence[Estimate]) -> Any:
    """How far the intervals reach below and above their values: [2, values]; nothing where there is no interval."""
    ends = [(each.interval.low, each.interval.high) if each.interval else (each.value, each.value) for each in estimates]
    return np.array(
        [(max(0.0, each.value - low), max(0.0, high - each.value)) for each, (low, high) in zip(estimates, ends, strict=True)]
    ).T


def _accuracy_axis(axes: Any, values: Sequence[float]) -> None:
    axes.set_ylim(min(0.4, min(values) - 0.05), 1.03)
    axes.set_ylabel("accuracy")
