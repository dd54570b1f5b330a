"""What the page of a run shows, read back from what is drawn, against the numbers it was drawn from. Formats and scales on its own."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from playwright.sync_api import Page

READ = """() => Object.fromEntries([...document.querySelectorAll('figure')].map((figure) => {
  const all = (query, found) => [...figure.querySelectorAll(query)].map(found);
  const numbers = (...names) => (node) => names.map((name) => Number(node.getAttribute(name)));
  return [figure.querySelector('figcaption').firstChild.textContent, {
    said: figure.querySelector('figcaption span').textContent,
    xs: all('text.x', (node) => [node.textContent, Number(node.getAttribute('x'))]),
    ys: all('text.y', (node) => [node.textContent, Number(node.getAttribute('y')) - 4]),
    lines: all('path.line', (node) => node.getAttribute('d').slice(1).split('L').map((pair) => pair.split(' ').map(Number))),
    bars: all('.bar', numbers('x', 'y', 'width', 'height')).filter((bar) => bar[3]),
    limits: all('line.limit', numbers('y1')).flat(),
    expected: all('line.expected', numbers('y1')).flat(),
  }];
}))"""


def plain(value: float | None) -> str:
    return "unknown" if value is None else f"{float(f'{value:.3g}'):g}".replace("-", "−")


def share(value: float | None) -> str:
    if value is None:
        return "unknown"
    num_tens = 10 if 0 < value < 0.1 else 1
    return f"{math.floor(100 * num_tens * value + 0.5) / num_tens:.{1 if num_tens == 10 else 0}f} %"


def signed(value: float | None) -> str:
    return "unknown" if value is None else f"{value:+.2f}".replace("-", "−")


def tiles(run: dict[str, Any]) -> dict[str, str]:
    """As the figures above the plots must read."""
    last = run["recent"]
    return {
        "mean score": plain(last["mean"]),
        "spread within groups": plain(last["group_spread"]),
        "groups without spread": share(last["flat_share"]),
        "score against length, r": signed(run["length_r"]),
        "twins in their group": share(last["duplicate_share"]),
        "met in earlier groups": share(last["repeat_share"]),
        "drift": "unknown" if last["drift"] is None else f"{signed(last['drift'])} σ",
        "spread, of validation's": "unknown" if last["std_ratio"] is None else f"{plain(last['std_ratio'])} ×",
        "beyond ± 3 σ": share(last["outside_share"]),
        "characters a caption": plain(last["mean_length"]),
    }


@dataclass(frozen=True)
class Axis:
    """From places in the drawing to values, by the labels of its marks."""

    places: Sequence[float]
    values: Sequence[float]

    @classmethod
    def of(cls, marks: list[tuple[str, float]]) -> Axis:
        found = cls([place for _, place in marks], [_value(text) for text, _ in marks])
        assert [found.value(place) for place in found.places] == pytest.approx(found.values, abs=1e-9), "marks lie where they say"
        return found

    @property
    def scale(self) -> float:
        return (self.values[-1] - self.values[0]) / (self.places[-1] - self.places[0])

    def value(self, place: float) -> float:
        return self.values[0] + (place - self.places[0]) * self.scale


def _value(text: str) -> float:
    number = float(text.replace("−", "-").removesuffix(" %"))
    return number / 100 if text.endswith("%") else number


def check(page: Page, run: dict[str, Any]) -> None:
    """Every figure, every bar and every point of every line."""
    assert dict(zip(page.locator("dt").all_inner_texts(), page.locator("dd").all_inner_texts(), strict=True)) == tiles(run)
    drawn, last, limits = page.evaluate(READ), run["recent"], run["limits"]
    check_bars(drawn["Scores"], run)
    check_lines(drawn["Mean score"], run, ["mean"], [])
    assert drawn["Mean score"]["said"] == f"lately {plain(last['mean'])}, within a group ± {plain(last['group_spread'])}"
    check_lines(drawn["Groups without spread"], run, ["flat_share"], [limits["flat_share"]])
    assert drawn["Groups without spread"]["said"].startswith(f"lately {share(last['flat_share'])}")
    bounds = [limits["length_correlation"], -limits["length_correlation"]]
    check_lines(drawn["Score against length"], run, ["length_correlation"], bounds)
    assert drawn["Score against length"]["said"].startswith(f"lately r = {signed(run['length_r'])} within groups")
    check_lines(drawn["Captions word for word again"], run, ["duplicate_share", "repeat_share"], [limits["duplicate_share"]])
    check_lines(drawn["Drift from validation"], run, ["drift"], [limits["drift"], -limits["drift"]])
    assert (
        drawn["Drift from validation"]["said"] == f"lately {signed(last['drift'])} σ; {share(last['outside_share'])} of scores beyond ± 3 σ"
    )
    (level,) = drawn["Mean score"]["expected"]
    assert Axis.of(drawn["Mean score"]["ys"]).value(level) == pytest.approx(run["expected"]["mean"])


def check_lines(drawn: dict[str, Any], run: dict[str, Any], fields: list[str], limits: list[float]) -> None:
    """Coordinates are written to a tenth of a pixel."""
    x, y = Axis.of(drawn["xs"]), Axis.of(drawn["ys"])
    captions = [point["captions"] for point in run["history"]]
    ends = [sum(captions[: place + 1]) for place in range(len(captions))]
    assert len(drawn["lines"]) == len(fields)
    for field, line in zip(fields, drawn["lines"], strict=True):
        assert [x.value(place) for place, _ in line] == pytest.approx(ends, abs=0.06 * abs(x.scale))
        assert [y.value(place) for _, place in line] == pytest.approx([point[field] for point in run["history"]], abs=0.06 * abs(y.scale))
    assert [y.value(place) for place in drawn["limits"]] == pytest.approx(limits)


def check_bars(drawn: dict[str, Any], run: dict[str, Any]) -> None:
    """A bar's area is its share of all scores, and between two bars is the edge. Bars leave half a pixel free on each side."""
    x, y = Axis.of(drawn["xs"]), Axis.of(drawn["ys"])
    edges, counts, total = run["histogram"]["edges"], run["histogram"]["counts"], run["total"]["captions"]
    filled = [place for place, count in enumerate(counts) if count]
    assert len(drawn["bars"]) == len(filled) > 4
    for place, (left, top, width, height) in zip(filled, drawn["bars"], strict=True):
        low, high = x.value(left - 0.5), x.value(left + width + 0.5)
        assert y.value(top + height) == pytest.approx(0, abs=1e-9)
        assert y.value(top) == pytest.approx(counts[place] / total / (high - low))
        if place != filled[0]:
            assert low == pytest.approx(edges[place - 1])
        if place != filled[-1]:
            assert high == pytest.approx(edges[place])
    said = f"mean {plain(run['total']['mean'])}, {plain(run['total']['min'])} to {plain(run['total']['max'])}"
    assert drawn["said"].startswith(said)
