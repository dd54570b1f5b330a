"""What an evaluation found, as `report.json`, as one self-contained `report.html`, and as a table for the terminal.

Every number is one of `training.statistics`; nothing is computed here.
"""

from __future__ import annotations

import base64
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from html import escape
from pathlib import Path
from typing import Any

from rich.table import Table

from training.controls import Control
from training.plots import plot_best_of, plot_buckets, plot_calibration, plot_contests, plot_margins
from training.scorers import Target
from training.statistics import (
    MIN_BAND,
    Agreement,
    BandComparison,
    BestOf,
    Bucket,
    Calibration,
    ContestOutcomes,
    Estimate,
    Histogram,
    Temperature,
)

SCHEMA_VERSION = 1
JSON_NAME, HTML_NAME = "report.json", "report.html"
AS_SERVED = "as served"  # the reliability with the artifact's own temperature
_NOTHING = "-"
_STYLE = """
:root { --ink: #1d2430; --soft: #5b6675; --line: #dfe3e8; --accent: #2f5d8a; }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 62rem; padding: 2rem 1.25rem 4rem; color: var(--ink); background: #fff;
       font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
h1 { font-size: 1.6rem; margin: 0 0 .25rem; overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; margin: 2.5rem 0 .5rem; padding-bottom: .25rem; border-bottom: 1px solid var(--line); }
p { margin: .5rem 0; max-width: 46rem; }
.soft { color: var(--soft); font-size: .9rem; }
code { font-size: .85em; overflow-wrap: anywhere; }
.cards { display: flex; flex-wrap: wrap; gap: .75rem; margin: 1.25rem 0; }
.card { flex: 1 1 12rem; border: 1px solid var(--line); border-radius: .5rem; padding: .75rem 1rem; }
.card b { display: block; font-size: 1.6rem; font-variant-numeric: tabular-nums; color: var(--accent); }
.table { overflow-x: auto; }
table { border-collapse: collapse; margin: .75rem 0; font-size: .92rem; font-variant-numeric: tabular-nums; }
th, td { text-align: right; padding: .3rem .75rem; border-bottom: 1px solid var(--line); white-space: nowrap; }
th { color: var(--soft); font-weight: 600; }
th:first-child, td:first-child { text-align: left; padding-left: 0; }
td.words { white-space: normal; text-align: left; overflow-wrap: anywhere; }
figure { margin: 1rem 0; } img { max-width: 100%; height: auto; }
details { margin: .75rem 0; } summary { cursor: pointer; color: var(--accent); }
"""


@dataclass(frozen=True, slots=True)
class Input:
    """A table that was read."""

    path: str
    sha256: str
    num_rows: int
    num_contests: int


@dataclass(frozen=True, slots=True)
class Coverage:
    """What could be scored. `refused` counts captions by the code of the refusal; every pair without a margin is named."""

    num_pairs: int
    num_scored: int
    num_captions: int
    refused: Mapping[str, int]
    unscored: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Reliability:
    """Calibration of sigmoid(margin / temperature)."""

    name: str
    temperature: float
    calibration: Calibration
    loss: float


@dataclass(frozen=True, slots=True)
class PairFigures:
    coverage: Coverage
    agreement: Agreement
    contests: tuple[ContestOutcomes, ...]
    buckets: tuple[Bucket, ...]
    margins: Histogram
    reliability: tuple[Reliability, ...]
    temperature: Temperature
    controls: tuple[Control, ...]

    @property
    def served(self) -> Reliability:
        """The calibration of what a server answers: with the artifact's own temperature where it has one."""
        return next((each for each in self.reliability if each.name == AS_SERVED), self.reliability[0])


@dataclass(frozen=True, slots=True)
class CaptionFigures:
    """Choosing among rated captions. Best-of-n is over a drawn sample of each contest, the rank bands over whole bands."""

    num_rated: int
    num_scored: int
    refused: Mapping[str, int]
    max_sampled: int
    best_of: tuple[BestOf, ...]
    bands: tuple[BandComparison, ...]


@dataclass(frozen=True, slots=True)
class Evaluation:
    target: Target
    inputs: Mapping[str, Input]
    arguments: Mapping[str, Any]
    versions: Mapping[str, str]
    finished: str
    seconds: float
    pairs: PairFigures
    captions: CaptionFigures | None

    @property
    def ignored(self) -> list[str]:
        """What the tables have and the model was not shown."""
        return [what for what in ("images", "prompts") if self.arguments.get(f"ignore_{what}")]


def write_report(folder: Path, evaluation: Evaluation) -> None:
    """Both files whole, or neither touched. Raises OSError."""
    folder.mkdir(parents=True, exist_ok=True)
    texts = {folder / HTML_NAME: as_html(evaluation), folder / JSON_NAME: as_json(evaluation)}
    partials = {path: path.with_name(f".{path.name}.{os.getpid()}.partial") for path in texts}
    try:
        for path, text in texts.items():
            partials[path].write_text(text, encoding="utf-8")
        for path, partial in partials.items():
            os.replace(partial, path)
    finally:
        for partial in partials.values():
            partial.unlink(missing_ok=True)


def as_json(evaluation: Evaluation) -> str:
    """Every figure; a number that is not finite raises ValueError instead of leaving."""
    values = {"report": "punchline evaluation", "schema_version": SCHEMA_VERSION} | asdict(evaluation)
    return json.dumps(values, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def as_html(evaluation: Evaluation) -> str:
    """One page that loads nothing from outside."""
    title = f"Evaluation of {evaluation.target.name}"
    sections = [
        _head(title, evaluation),
        _agreement_section(evaluation.pairs),
        _control_section(evaluation.pairs),
        _bucket_section(evaluation.pairs),
        _margin_section(evaluation.pairs),
        _calibration_section(evaluation.pairs),
        _caption_section(evaluation.captions) if evaluation.captions else "",
        _coverage_section(evaluation),
        _origin_section(evaluation),
    ]
    head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{escape(title)}</title><style>{_STYLE}</style>'
    return f'<!doctype html>\n<html lang="en"><head>{head}</head><body>\n{"".join(sections)}\n</body></html>\n'


def as_table(evaluation: Evaluation) -> Table:
    """The figures one looks at first."""
    table = Table("figure", "value", "95 % interval", title="evaluation")
    for name, value, interval in _headlines(evaluation):
        table.add_row(name, value, interval)
    return table


def _headlines(evaluation: Evaluation) -> list[tuple[str, str, str]]:
    pairs = evaluation.pairs
    outcomes, served = pairs.agreement.outcomes, pairs.served
    rows = [
        ("pairs scored", f"{pairs.coverage.num_scored:,} of {pairs.coverage.num_pairs:,}", ""),
        ("accuracy, all pairs", *_parts(pairs.agreement.pooled)),
        (f"accuracy, mean of {pairs.agreement.macro.num_contests} contests", *_parts(pairs.agreement.macro)),
        ("ties (no wins)", f"{outcomes.ties:,}", ""),
        ("margin, mean and deviation", f"{outcomes.margin_mean:.3f}, {outcomes.margin_std:.3f}", ""),
        ("Bradley-Terry loss", f"{outcomes.loss:.4f}", ""),
        (f"expected calibration error, T = {served.temperature:.4g}", f"{served.calibration.expected_error:.4f}", ""),
        ("fitted temperature", _optional(pairs.temperature.value), ""),
    ]
    for control in pairs.controls:
        if control.agreement is None:
            rows.append((control.name, "left out", ""))
        else:
            rows.append((f"{control.name}: accuracy", *_parts(control.agreement.pooled)))
            rows.append(("  a tie one half", *_parts(control.guessing)))
            rows.append(("  model minus control, so counted", *_parts(control.difference, signed=True)))
    best_of = evaluation.captions.best_of if evaluation.captions else ()
    return rows + [(f"best of {best.n}: rating gained", *_parts(best.gain, signed=True)) for best in best_of]


def _head(title: str, evaluation: Evaluation) -> str:
    pairs, target = evaluation.pairs, evaluation.target
    ahead = [(f"ahead of {control.name}", control.difference) for control in pairs.controls if control.difference is not None]
    cards = [_card("accuracy, all pairs", pairs.agreement.pooled), _card("accuracy, mean of contests", pairs.agreement.macro)]
    cards += [_card(name, value, signed=True) for name, value in ahead]
    where = f"{target.kind}, {escape(target.dtype)} on {escape(target.device)}, fingerprint <code>{escape(target.fingerprint[:12])}</code>"
    counts = f"{pairs.coverage.num_scored:,} of {pairs.coverage.num_pairs:,} pairs of {pairs.agreement.macro.num_contests} contests"
    if evaluation.ignored:
        counts += f", <b>{' and '.join(evaluation.ignored)} ignored</b>"
    return f'<h1>{escape(title)}</h1><p class="soft">{where} &middot; {counts} &middot; {escape(evaluation.finished)}</p>' + _div(
        "cards", cards
    )


def _agreement_section(pairs: PairFigures) -> str:
    outcomes = pairs.agreement.outcomes
    few = " <b>With so few contests the interval is itself uncertain.</b>" if pairs.agreement.macro.num_contests < 10 else ""
    words = (
        "Share of pairs in which the caption the crowd preferred scores higher; a tie is no win. Pairs of one contest are not independent, "
        f"so intervals resample contests: {pairs.agreement.macro.num_contests} of them.{few}"
    )
    total = _table(
        ("", "value", "95 % interval"),
        [
            ("accuracy over pairs", *_parts(pairs.agreement.pooled)),
            ("accuracy, mean over contests", *_parts(pairs.agreement.macro)),
            ("wins / ties / losses", f"{outcomes.wins:,} / {outcomes.ties:,} / {outcomes.losses:,}", ""),
            ("margin, mean and standard deviation", f"{outcomes.margin_mean:.4f} and {outcomes.margin_std:.4f}", ""),
            ("Bradley-Terry loss (ln 2 = 0.6931 knows nothing)", f"{outcomes.loss:.4f}", ""),
        ],
    )
    plot = _image(plot_contests(pairs.contests, pairs.agreement), "accuracy by contest")
    return _section("Agreement with the crowd", words, total + plot + _fold("every contest", _contest_table(pairs.contests)))


def _contest_table(contests: Iterable[ContestOutcomes]) -> str:
    rows = [
        (
            each.contest,
            own.num_pairs,
            own.wins,
            own.ties,
            own.losses,
            f"{own.accuracy:.3f}",
            *_moments(own.margin_mean, own.margin_std, own.loss),
        )
        for each in contests
        for own in [each.outcomes]
    ]
    return _table(("contest", "pairs", "wins", "ties", "losses", "accuracy", "margin mean", "deviation", "loss"), rows)


def _control_section(pairs: PairFigures) -> str:
    words = (
        "What a judge that cannot know the answer makes of the same pairs. Strictly a tie is no win; in the difference a tie of either "
        "side counts one half, as guessing would. The difference is paired: the same contests are drawn for both."
    )
    rows = []
    for control in pairs.controls:
        ties = f"{control.agreement.outcomes.ties:,}" if control.agreement else ""
        number = f"{control.agreement.outcomes.num_pairs:,}" if control.agreement else ""
        accuracy = _parts(control.agreement.pooled) if control.agreement else (f"left out: {control.skipped}", "")
        difference = _parts(control.difference, signed=True)
        rows.append((f"{control.name}: {control.meaning}", number, ties, *accuracy, *_parts(control.guessing), *difference))
    head = (
        "control",
        "pairs",
        "ties",
        "accuracy",
        "95 % interval",
        "a tie one half",
        "95 % interval",
        "model minus control",
        "95 % interval",
    )
    return _section("Controls", words, _table(head, rows, words=1)) if rows else ""


def _bucket_section(pairs: PairFigures) -> str:
    words = "By how sure the crowd is: the gap of the two mean ratings over its pooled standard error."
    rows = [
        (
            bucket.name,
            f"{own.outcomes.num_pairs:,}",
            own.pooled.num_contests,
            *_parts(own.pooled),
            own.outcomes.ties,
            f"{own.outcomes.loss:.4f}",
        )
        for bucket in pairs.buckets
        for own in [bucket.agreement]
    ]
    table = _table(("sigma gap", "pairs", "contests", "accuracy", "95 % interval", "ties", "loss"), rows)
    return _section("By the crowd's certainty", words, table + _image(plot_buckets(pairs.buckets), "accuracy by sigma gap"))


def _margin_section(pairs: PairFigures) -> str:
    words = "Score of the preferred caption minus score of the other. Right of zero the model agrees with the crowd."
    return _section("Margins", words, _image(plot_margins(pairs.margins), "histogram of margins"))


def _calibration_section(pairs: PairFigures) -> str:
    words = (
        "Does sigmoid(margin / temperature) say how often the model is right? Every pair is folded to the side the model prefers, "
        "which equals showing it in both orders; a tie counts one half. Bins are deciles of that confidence. The fitted temperature "
        "minimises the loss on these very pairs, so its own row flatters it."
    )
    rows = [
        (each.name, f"{each.temperature:.4g}", f"{each.calibration.expected_error:.4f}", f"{each.loss:.4f}") for each in pairs.reliability
    ]
    refused = f"<p>No temperature was fitted: {escape(pairs.temperature.refused)}.</p>" if pairs.temperature.refused else ""
    table = _table(("", "temperature", "expected calibration error", "loss"), rows)
    return _section("Calibration", words, table + refused + _image(plot_calibration(pairs.reliability), "calibration curve"))


def _caption_section(captions: CaptionFigures) -> str:
    words = (
        "Of n captions of a contest drawn without replacement the model's best is taken: crowd rating gained over a random one, and share "
        f"of what the ratings themselves could gain. Exact over all draws from at most {captions.max_sampled} sampled captions a contest. "
        "Ratings are measured, so the oracle also picks lucky ones and the share errs on the low side."
    )
    rows = [
        (best.n, best.gain.num_contests, *_parts(best.gain, signed=True), *_parts(best.oracle_gain, signed=True), *_parts(best.share))
        for best in captions.best_of
    ]
    head = ("n", "contests", "rating gained", "95 % interval", "oracle's gain", "95 % interval", "share", "95 % interval")
    best = (
        _table(head, rows) + _image(plot_best_of(captions.best_of), "best of n") if rows else "<p>No contest has enough rated captions.</p>"
    )
    return _section("Choosing the best of n", words, best) + _band_section(captions.bands)


def _band_section(bands: Sequence[BandComparison]) -> str:
    words = (
        "Probability that a caption of the better rank band scores above one of the worse (area under the curve; 0.5 is chance), "
        f"averaged over the contests that have at least {MIN_BAND} scored captions in both bands, and all of the better band ranked before "
        "the other."
    )
    rows = [(f"{each.better} against {each.worse}", each.auc.num_contests if each.auc else 0, *_parts(each.auc)) for each in bands]
    return _section("Telling rank bands apart", words, _table(("ranks", "contests", "AUC", "95 % interval"), rows))


def _coverage_section(evaluation: Evaluation) -> str:
    coverage, captions = evaluation.pairs.coverage, evaluation.captions
    rows: list[tuple[object, ...]] = [
        ("pairs scored", f"{coverage.num_scored:,} of {coverage.num_pairs:,}"),
        ("distinct captions of the pairs", f"{coverage.num_captions:,}"),
        ("  refused", _refusals(coverage.refused)),
    ]
    if captions:
        rows += [
            ("rated captions scored", f"{captions.num_scored:,} of {captions.num_rated:,}"),
            ("  refused", _refusals(captions.refused)),
        ]
    listed = _fold(f"{len(coverage.unscored):,} pairs without a margin", f"<p><code>{escape(', '.join(coverage.unscored))}</code></p>")
    words = "A caption the model refuses has no score, and its pairs are in no figure."
    return _section("What was scored", words, _table((), rows) + (listed if coverage.unscored else ""))


def _origin_section(evaluation: Evaluation) -> str:
    target = evaluation.target
    rows: list[tuple[object, ...]] = [("fingerprint", target.fingerprint), ("calibration temperature", f"{target.temperature:g}")]
    rows += [("sha256 of the weights", target.weights_sha256)] if target.weights_sha256 else []
    for name, table in evaluation.inputs.items():
        rows.append((name, f"{table.path}: {table.num_rows:,} rows, {table.num_contests} contests, sha256 {table.sha256}"))
    rows += [(f"--{name.replace('_', '-')}", value) for name, value in evaluation.arguments.items()]
    rows += [("versions", ", ".join(f"{name} {value}" for name, value in evaluation.versions.items()))]
    rows += [("seconds", f"{evaluation.seconds:.1f}")]
    return _section("Where this comes from", "", _table((), rows, words=2))


def _section(title: str, words: str, content: str) -> str:
    return (
        f"<section><h2>{escape(title)}</h2><p>{words}</p>{content}</section>\n"
        if words
        else f"<section><h2>{escape(title)}</h2>{content}</section>\n"
    )


def _table(head: Sequence[str], rows: Iterable[Sequence[object]], words: int = 0) -> str:
    """Numbers right, the first column left; the first `words` columns may wrap."""
    top = f"<tr>{''.join(f'<th>{escape(name)}</th>' for name in head)}</tr>" if head else ""
    lines = ["".join(_cell(value, is_words=place < words) for place, value in enumerate(row)) for row in rows]
    return f'<div class="table"><table>{top}{"".join(f"<tr>{line}</tr>" for line in lines)}</table></div>'


def _cell(value: object, *, is_words: bool) -> str:
    return f'<td class="words">{escape(str(value))}</td>' if is_words else f"<td>{escape(str(value))}</td>"


def _card(name: str, estimate: Estimate, *, signed: bool = False) -> str:
    value, interval = _parts(estimate, signed=signed)
    return f'<div class="card"><b>{value}</b>{escape(name)}<div class="soft">{interval}</div></div>'


def _div(kind: str, parts: Iterable[str]) -> str:
    return f'<div class="{kind}">{"".join(parts)}</div>'


def _fold(title: str, content: str) -> str:
    return f"<details><summary>{escape(title)}</summary>{content}</details>"


def _image(png: bytes, title: str) -> str:
    return f'<figure><img alt="{escape(title)}" src="data:image/png;base64,{base64.b64encode(png).decode()}"></figure>'


def _parts(estimate: Estimate | None, *, signed: bool = False) -> tuple[str, str]:
    """Value and interval; an interval that does not exist says so."""
    if estimate is None:
        return _NOTHING, ""
    form = "+.4f" if signed else ".4f"
    if estimate.interval is None:
        return format(estimate.value, form), "none: one contest" if estimate.num_contests < 2 else "none"
    return format(estimate.value, form), f"{estimate.interval.low:{form}} to {estimate.interval.high:{form}}"


def _moments(*values: float) -> tuple[str, ...]:
    return tuple(f"{value:.4f}" for value in values)


def _optional(value: float | None) -> str:
    return _NOTHING if value is None else f"{value:.4f}"


def _refusals(refused: Mapping[str, int]) -> str:
    return ", ".join(f"{number:,} {code}" for code, number in refused.items()) or "none"
