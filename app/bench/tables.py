"""A report as tables of at most `WIDTH` columns. Knows what a reader looks for, not how it was measured."""

from __future__ import annotations

from collections.abc import Iterator

from rich.box import SIMPLE_HEAD
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from app.bench.noise import NoiseReport
from app.bench.report import MEANT, MIN_WEIGHTS_BYTES, Hold, Report
from app.bench.ways import PADDED, PLAIN, Row
from app.hardware import Hardware

WIDTH = 136
_REFUSED = "refused"


def tables_of(report: Report) -> RenderableType:
    """All of it: ways, load, holds, and the lines that say what ran."""
    return Group(Text(_heading(report)), _ways(report), *_load(report), _holds(report), Text("\n".join(_lines(report))))


def noise_tables(report: NoiseReport, hardware: Hardware, heading: str) -> RenderableType:
    """Both modes beside each other."""
    table = Table("", "as usual", "deterministic", box=SIMPLE_HEAD)
    usual, fixed = report.usual.as_dict(), report.deterministic.as_dict()
    for name, title, style in (
        ("num_captions", "captions", "{:,}"),
        ("num_scores", "their scores compared with float32", "{:,}"),
        ("num_pairs", "pairs of scores whose order was compared", "{:,}"),
        ("largest", "largest difference to float32", "{:.2e}"),
        ("p99", "99th percentile", "{:.2e}"),
        ("spread", "spread within a group", "{:.2e}"),
        ("largest_over_spread", "largest, of the spread", "{:.1%}"),
        ("p99_over_spread", "99th percentile, of the spread", "{:.1%}"),
        ("flips_per_10_000", "order flips in 10,000 pairs", "{:.1f}"),
        ("num_moved", "captions whose bits depend on company", "{:,}"),
        ("largest_move", "largest difference of two companies", "{:.2e}"),
        ("largest_move_over_spread", "the same, of the spread", "{:.1%}"),
    ):
        table.add_row(title, style.format(usual[name]), style.format(fixed[name]))
    cost, truth = report.price, report.truth
    price = f"price of determinism, groups of 8: {cost.cold:.2f} x the time cold, {cost.warm:.2f} x warm, medians of {cost.num_batches}"
    proof = f"float32 by one forward a group; {truth.num_proven} captions by one of their own, largest difference {truth.largest:.1e}"
    end = [] if report.holds else ["deterministic scores moved: that is a fault"]
    return Group(Text(heading), table, Text("\n".join([price, proof, *end, hardware.line])))


def _heading(report: Report) -> str:
    subject, tokens = report.subject, report.subject.tokens
    title = f"{subject.heading}\n"
    if subject.takes_images:
        return title + f"{tokens.prefix} tokens shared ({tokens.image} of the image), {tokens.shortest} to {tokens.longest} a caption's own"
    return title + f"responses to a conversation: {tokens.prefix} tokens shared, {tokens.shortest} a response's own"


def _ways(report: Report) -> Table:
    table = Table(box=SIMPLE_HEAD, collapse_padding=True, pad_edge=False)
    names = ("captions", "way", "time", "min..max", "captions/s", "tokens", "saved", "of limit", "x plain", "x padded", "differs by")
    for name in map(report.subject.worded, names):
        table.add_column(name, justify="left" if name == "way" else "right", no_wrap=True)
    size = None
    for row in report.measured.rows:
        if size not in (None, row.num_captions):
            table.add_section()
        size = row.num_captions
        table.add_row(*_cells(report, row))
    return table


def _cells(report: Report, row: Row) -> Iterator[str]:
    last = row.runs[-1]
    yield str(row.num_captions)
    yield report.subject.worded(row.way)
    yield _seconds(row.seconds)
    yield _span(row.fastest_s, row.slowest_s)
    yield f"{row.num_captions / row.seconds:.3g}"
    yield f"{last.num_computed_tokens:,}"
    yield f"{1 - last.num_computed_tokens / last.num_tokens:.0%}"
    share = report.share_of_limit(row)
    yield _REFUSED if share is None else f"{share:.0%}"
    yield _ratio(report, row, PLAIN)
    yield _ratio(report, row, PADDED)
    yield "" if row.difference is None else f"{row.difference:.1e}"


def _ratio(report: Report, row: Row, reference: str) -> str:
    if report.measured.find(reference, row.num_captions) is None:
        return ""
    found = report.ratio(row, reference)
    return _REFUSED if found is None else f"{found:.2f}"


def _load(report: Report) -> list[Table]:
    if not report.levels:
        return []
    worded = report.subject.worded
    table = Table(box=SIMPLE_HEAD, title=worded("over HTTP, groups of 8, known images"), title_justify="left")
    for name in ("clients", "groups", worded("captions/s"), "median", "slowest", "device idle"):
        table.add_column(name, justify="right")
    for level in report.levels:
        idle = "too few batches" if level.idle_share is None else f"{level.idle_share:.1%}"
        speeds = (f"{level.captions_per_s:.3g}", _seconds(level.p50_s), _seconds(level.slowest_s))
        table.add_row(str(level.num_clients), str(level.num_groups), *speeds, idle)
    return [table]


def _holds(report: Report) -> Table:
    table = Table(box=SIMPLE_HEAD, title=_holds_title(report), title_justify="left")
    for name in ("what", "hold", "found", "at the matrix rate", ""):
        table.add_column(name, justify="left" if name in ("what", "") else "right")
    for hold in report.holds():
        found = _REFUSED if hold.found is None else _amount(hold, hold.found)
        ceiling = "" if hold.ceiling is None else _amount(hold, hold.ceiling)
        table.add_row(hold.what, _amount(hold, hold.wanted), found, ceiling, _mark(hold))
    return table


def _holds_title(report: Report) -> str:
    meant = report.subject.is_meant
    return "numbers to hold" if meant else f"numbers to hold; those of speed are for {MEANT} at whole depth in bfloat16"


def _mark(hold: Hold) -> str:
    if hold.passed:
        return "held"
    return "MISSED, beyond this machine" if hold.is_beyond else "MISSED"


def _amount(hold: Hold, value: float) -> str:
    number = f"{value:.1e}" if not hold.unit else f"{value:,.0f}" if abs(value) >= 100 else f"{value:.2f}"
    return f"{number} {hold.unit}".rstrip()


def _lines(report: Report) -> Iterator[str]:
    yield from map(report.subject.worded, _agreement(report))
    yield _limit(report)
    yield from _start(report)
    over = report.overhead
    yield (
        f"HTTP, queue and encoding (8 captions of a known image, a client of its own, {over.num_repeats} pairs on {over.model}, "
        f"scorer {over.scorer_p50_ms:.1f} ms): p50 {over.p50_ms:.2f} ms, p99 {over.p99_ms:.2f} ms"
    )
    yield from report.notes
    yield report.hardware.line


def _agreement(report: Report) -> Iterator[str]:
    for row in report.misnamed:
        found = ", ".join(f"{run.num_computed_tokens:,}" for run in row.runs)
        yield f"not as cold or as warm as its name says, ratios refused: {row.way}, groups of {row.num_captions}: {found} tokens computed"
    if report.difference is None or report.tolerance is None:
        yield "no way was compared with the plain one: no ratio"
        return
    yield (
        f"largest difference to one forward per caption {report.difference:.1e}, tolerance {report.tolerance:.1e}; "
        f"largest root mean square of a way {report.rms:.1e}, tolerance {report.rms_tolerance:.1e}"
    )
    yield f"spread within a group {report.measured.spread:.1e}"
    for row in report.disagreeing:
        name = f"{row.way}, groups of {row.num_captions}"
        yield f"scores disagree, ratios refused: {name}: {row.difference:.1e}, root mean square {row.rms:.1e}"


def _limit(report: Report) -> str:
    rate = report.rate
    packed = "" if rate.prepacked is None else f", {_rate(rate.prepacked)} with weights prepacked"
    found = sorted(run.rate for row in report.measured.rows for run in row.runs)
    between = f"; between the ways {_rate(found[0])} to {_rate(found[-1])}, to which each is held" if found else ""
    return f"limit: matrix products of the text layers' shapes run at best at {_rate(rate.plain)}{packed}{between}"


def _start(report: Report) -> Iterator[str]:
    ready = "" if report.ready_s is None else f", of which {report.ready_s:.1f} s after the weights were in memory"
    yield f"ready in {report.startup.seconds:.1f} s{ready}"
    peak = report.startup.peak
    if peak is not None:
        share = f" ({peak.over_weights:+.1%})" if peak.weights_bytes >= MIN_WEIGHTS_BYTES else ""
        whole = f"{_size(peak.all_bytes)}{share}"
        yield f"peak memory until ready, for {_size(peak.weights_bytes)} of weights: {whole}"


def _size(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.2f} GiB" if num_bytes >= 2**29 else f"{num_bytes / 2**20:.1f} MiB"


def _rate(flops_per_s: float) -> str:
    return f"{flops_per_s / 1e12:.3g} TFLOP/s"


def _span(low: float, high: float) -> str:
    """Both in the unit of the higher."""
    return f"{low:.2f}..{high:.2f} s" if high >= 1 else f"{1000 * low:.1f}..{1000 * high:.1f} ms"


def _seconds(value: float) -> str:
    return f"{value:.2f} s" if value >= 1 else f"{1000 * value:.1f} ms"
