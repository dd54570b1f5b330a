"""The report's three forms: the JSON holds every figure, the page loads nothing and shows hostile names as text, the table fits."""

from __future__ import annotations

import base64
import io
import json
import math
import re
from collections.abc import Mapping
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from training.controls import LENGTH, SHUFFLED, compared, skipped
from training.plots import plot_contests
from training.report import (
    AS_SERVED,
    CaptionFigures,
    Coverage,
    Evaluation,
    Input,
    PairFigures,
    Reliability,
    as_html,
    as_json,
    as_table,
    write_report,
)
from training.scorers import Target
from training.statistics import (
    Bootstrap,
    Pool,
    agreement,
    best_of,
    bradley_terry_loss,
    by_contest,
    by_sigma,
    calibration,
    compare_bands,
    fit_temperature,
    histogram,
)

HOSTILE = "<script>alert('x')</script>&\""
BOOTSTRAP = Bootstrap(seed=0, num_draws=100)
VOID = {"meta", "img", "br"}


def evaluation(num_contests: int = 12, *, margins: np.ndarray | None = None, name: str = "demo", with_captions: bool = True) -> Evaluation:
    """Figures of ten drawn pairs a contest."""
    rng = np.random.default_rng(0)
    contests = [f"{500 + number}" for number in range(num_contests) for _ in range(10)]
    found = rng.normal(1.0, 2.0, len(contests)) if margins is None else margins
    gaps = rng.uniform(3, 10, len(contests)).tolist()
    target = Target(name, "artifact", "0123456789abcdef" * 4, "float32", "cpu", "Say it.", False, 1.0, True)
    pairs = PairFigures(
        coverage=Coverage(len(contests) + 1, len(contests), 240, {"caption_too_long": 1}, (HOSTILE,)),
        agreement=agreement(found, contests, BOOTSTRAP),
        contests=tuple(by_contest(found, contests)),
        buckets=tuple(by_sigma(found, gaps, contests, BOOTSTRAP)),
        margins=histogram(found),
        reliability=(Reliability("raw margins", 1.0, calibration(found), bradley_terry_loss(found)),),
        temperature=fit_temperature(found),
        controls=(compared(LENGTH, found, rng.permutation(found), contests, BOOTSTRAP), skipped(SHUFFLED, HOSTILE)),
    )
    inputs = {"pairs": Input("tables/pairs_test.parquet", "e" * 64, len(contests) + 1, num_contests)}
    captions = chosen(num_contests) if with_captions else None
    return Evaluation(target, inputs, {"seed": 0, "pairs": HOSTILE}, {"python": "3.11"}, "2026-11-01T12:00:00+00:00", 1.5, pairs, captions)


def chosen(num_contests: int) -> CaptionFigures:
    rng = np.random.default_rng(1)
    pools = [Pool(str(number), rng.normal(size=40), rng.normal(size=40), np.arange(1, 41)) for number in range(num_contests)]
    best = tuple(found for n in (2, 4) if (found := best_of(pools, n, BOOTSTRAP)))
    return CaptionFigures(40 * num_contests, 40 * num_contests, {}, 200, best, tuple(compare_bands(pools, BOOTSTRAP)))


class Page(HTMLParser):
    """Checks that tags close in order; keeps attributes, text and pictures."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.text = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data

    @property
    def pictures(self) -> list[Image.Image]:
        sources = [value for name, value in self.attributes if name == "src" and value]
        return [Image.open(io.BytesIO(base64.b64decode(source.removeprefix("data:image/png;base64,")))) for source in sources]


def test_the_json_holds_every_figure_and_says_its_version() -> None:
    found = evaluation()
    report = json.loads(as_json(found))
    assert (report["report"], report["schema_version"]) == ("punchline evaluation", 1)
    assert report["target"]["fingerprint"] == found.target.fingerprint
    assert report["inputs"]["pairs"]["sha256"] == "e" * 64
    assert report["arguments"] == {"seed": 0, "pairs": HOSTILE}
    interval = found.pairs.agreement.pooled.interval
    assert interval is not None
    assert report["pairs"]["agreement"]["pooled"]["interval"] == {"low": interval.low, "high": interval.high}
    assert len(report["pairs"]["contests"]) == 12
    assert {control["name"]: control["skipped"] for control in report["pairs"]["controls"]} == {LENGTH: None, SHUFFLED: HOSTILE}
    assert [best["n"] for best in report["captions"]["best_of"]] == [2, 4]
    assert len(report["captions"]["bands"]) == 6


def test_a_figure_that_is_no_number_never_leaves() -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        as_json(replace(evaluation(), seconds=math.nan))


def test_the_page_is_whole_and_loads_nothing() -> None:
    """Tags close in order; pictures are inside; no script, no link, no address, not even in the style."""
    text = as_html(evaluation())
    page = Page(text)
    assert page.open == []
    assert not {"script", "link", "iframe", "object", "base", "a"} & set(page.tags)
    assert {name for name, _ in page.attributes} <= {"lang", "charset", "name", "content", "class", "alt", "src"}
    assert not re.search(r"url\(|@import|https?:", text)
    assert [picture.format for picture in page.pictures] == ["PNG"] * 5
    assert all(picture.width > 400 for picture in page.pictures)


def test_what_others_wrote_is_text_on_the_page() -> None:
    """As target with all it says of itself, as pair id, as a reason and as an argument."""
    found = evaluation(name=HOSTILE)
    target = replace(found.target, kind="server", dtype=HOSTILE, device=HOSTILE, fingerprint=HOSTILE)
    text = as_html(replace(found, target=target))
    assert "<script" not in text
    assert Page(text).text.count("<script>alert('x')</script>&\"") >= 7


def test_a_contest_may_be_called_anything() -> None:
    """Dollars would begin a formula."""
    contests = by_contest([1.0, -1.0], ["$\\bad$", "5$ $_"])
    assert plot_contests(contests, agreement([1.0, -1.0], ["a", "b"], BOOTSTRAP)).startswith(b"\x89PNG")


def test_what_was_ignored_stands_at_the_top() -> None:
    found = evaluation()
    assert "ignored" not in Page(as_html(found)).text
    ignoring = replace(found, arguments={"ignore_images": True, "ignore_prompts": True})
    assert "12 contests, images and prompts ignored" in Page(as_html(ignoring)).text


def test_the_first_calibration_error_is_the_one_that_is_served() -> None:
    found = evaluation()
    reliability = found.pairs.reliability
    served = Reliability(AS_SERVED, 2.5, replace(reliability[0].calibration, expected_error=0.125), 0.5)
    rows = rows_of(replace(found, pairs=replace(found.pairs, reliability=(*reliability, served))))
    assert rows["expected calibration error, T = 2.5"][0] == "0.1250"
    assert "expected calibration error, T = 1" in rows_of(found)


def test_the_page_names_what_was_measured() -> None:
    found = evaluation()
    text = Page(as_html(found)).text
    for words in ("120 of 121 pairs", "12 contests", "model minus control", "1 caption_too_long", "1-10 against median", "left out: "):
        assert words in text
    assert f"{found.pairs.agreement.pooled.value:.4f}" in text
    assert "so few contests" not in text


def test_one_contest_has_no_interval_and_the_page_says_so() -> None:
    found = evaluation(1)
    text = Page(as_html(found)).text
    assert "none: one contest" in text
    assert "so few contests" in text
    assert json.loads(as_json(found))["pairs"]["agreement"]["pooled"]["interval"] is None


@pytest.mark.parametrize("margins", [np.full(20, 3.0), np.full(20, -3.0), np.zeros(20), np.linspace(-1e6, 1e7, 20)])
def test_extreme_margins_are_drawn_as_well(margins: np.ndarray) -> None:
    """All right, all wrong, all tied, far apart; where no temperature exists the page says why."""
    found = evaluation(2, margins=margins)
    page = Page(as_html(found))
    assert len(page.pictures) == 5
    assert ("No temperature was fitted" in page.text) == (found.pairs.temperature.value is None)


def test_a_hundred_contests_fit_on_the_plot() -> None:
    assert len(Page(as_html(evaluation(100))).pictures) == 5


def test_without_captions_the_page_says_nothing_of_them() -> None:
    found = evaluation(with_captions=False)
    page = Page(as_html(found))
    assert "best of n" not in page.text
    assert len(page.pictures) == 4
    assert json.loads(as_json(found))["captions"] is None


def test_too_few_rated_captions_are_said_and_not_drawn() -> None:
    found = evaluation()
    assert found.captions is not None
    page = Page(as_html(replace(found, captions=replace(found.captions, best_of=()))))
    assert "No contest has enough rated captions" in page.text
    assert len(page.pictures) == 4


def test_the_same_figures_make_the_same_page() -> None:
    assert as_html(evaluation()) == as_html(evaluation())


def rows_of(found: Evaluation) -> dict[str, list[str]]:
    """The terminal's table by its first column."""
    console = Console(width=100, file=io.StringIO(), record=True)
    console.print(as_table(found))
    lines = console.export_text().splitlines()
    return {parts[0].strip(): [part.strip() for part in parts[1:]] for line in lines if len(parts := line.strip("│┃").split("│")) > 1}


def test_the_terminal_table_shows_the_first_figures() -> None:
    rows = rows_of(evaluation())
    assert rows["pairs scored"][0] == "120 of 121"
    assert rows["accuracy, all pairs"][1].count("to") == 1
    assert rows[SHUFFLED][0] == "left out"
    assert "best of 4: rating gained" in rows


def test_both_files_are_written_and_nothing_else(tmp_path: Path) -> None:
    found = evaluation()
    write_report(tmp_path / "new" / "report", found)
    written: Mapping[str, str] = {path.name: path.read_text(encoding="utf-8") for path in (tmp_path / "new" / "report").iterdir()}
    assert written == {"report.json": as_json(found), "report.html": as_html(found)}
