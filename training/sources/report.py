"""What was prepared, in numbers: as plain data for `report.json`, as Markdown, and as a table for the terminal."""

from __future__ import annotations

import bisect
import math
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

from rich.table import Table

from training.pairs import Pair
from training.sources.prepared import Prepared, Split
from training.sources.tables import sha256_of

TOOL = "training.prepare"
_SIGMA_EDGES = (3.0, 4.0, 5.0, 8.0)
_SIGMA_NAMES = ("<3", "3-4", "4-5", "5-8", "8+")


def report_of(prepared: Prepared, command: str, arguments: Mapping[str, Any], seed: int, pictures: Mapping[str, int]) -> dict[str, Any]:
    """Everything that says what the tables hold and how to make them again."""
    return {
        "tool": TOOL,
        "version": 1,
        "command": command,
        "arguments": dict(arguments),
        "seed": seed,
        "inputs": {str(path): sha256_of(path) for path in prepared.inputs},
        "images": {"number": len(pictures), "bytes": sum(pictures.values())},
        "splits": {name: _split(split, rated=prepared.rated) for name, split in prepared.splits.items()},
        "contests_in_two_splits": _shared_contests(prepared.splits),
        "remarks": list(prepared.remarks),
    }


def _split(split: Split, *, rated: bool) -> dict[str, Any]:
    by_contest = Counter(pair.contest for pair in split.pairs)
    contests = set(by_contest) | {caption.contest for caption in split.captions}
    counts = sorted(by_contest[contest] for contest in contests)
    numbers: dict[str, Any] = {
        "pairs": len(split.pairs),
        "contests": len(contests),
        "pairs_per_contest": {"min": counts[0], "median": statistics.median(counts), "max": counts[-1]} if counts else None,
        "rows_read": split.num_rows,
        "dropped": dict(sorted(split.dropped.items())),
        "pairs_with_image": sum(pair.image is not None for pair in split.pairs),
        "pairs_with_prompt": sum(pair.prompt is not None for pair in split.pairs),
        "shorter_wins": _shorter(split.pairs),
    }
    if rated:
        numbers |= {"captions_read": split.num_rows, "captions_kept": len(split.captions), "sigma_gap": _histogram(split.pairs)}
    return numbers


def _shorter(pairs: Sequence[Pair]) -> dict[str, Any]:
    """How far one gets by always preferring the shorter caption, counted in characters."""
    shorter = sum(len(pair.chosen) < len(pair.rejected) for pair in pairs)
    equal = sum(len(pair.chosen) == len(pair.rejected) for pair in pairs)
    return {"pairs": shorter, "share": round(shorter / len(pairs), 4) if pairs else None, "equally_long": equal}


def _histogram(pairs: Sequence[Pair]) -> dict[str, int]:
    places = Counter(bisect.bisect_right(_SIGMA_EDGES, pair.sigma_gap) for pair in pairs if pair.sigma_gap is not None)
    return {name: places[place] for place, name in enumerate(_SIGMA_NAMES) if place or places[place]}


def _shared_contests(splits: Mapping[str, Split]) -> dict[str, int]:
    """Contests that two splits share: a model trained on one has seen the other's."""
    contests = {name: {pair.contest for pair in split.pairs} for name, split in splits.items()}
    return {f"{one} and {other}": len(contests[one] & contests[other]) for one, other in combinations(contests, 2)}


def table_of(report: Mapping[str, Any]) -> Table:
    table = Table("", *report["splits"], title=f"prepared: {report['command']}")
    for row in _rows(report):
        table.add_row(*row)
    return table


def markdown_of(report: Mapping[str, Any]) -> str:
    """The same numbers, then how to make them again."""
    head = ["", *report["splits"]]
    lines = ["# Prepared preference pairs", "", _line(head), _line(["---", *["---:"] * len(report["splits"])])]
    lines += [_line(row) for row in _rows(report)]
    lines += ["", f"Made by `python -m {TOOL} {report['command']}` with seed {report['seed']} and:", ""]
    lines += [f"- {name}: `{value}`" for name, value in report["arguments"].items()]
    lines += ["", f"Images: {report['images']['number']:,} ({report['images']['bytes']:,} bytes)."]
    shared = {names: number for names, number in report["contests_in_two_splits"].items() if number}
    lines += [f"Contests in {names}: {number:,}." for names, number in shared.items()]
    if report["remarks"]:
        lines += ["", "Remarks:", "", *(f"- {remark}" for remark in report["remarks"])]
    lines += ["", "Inputs:", "", "| file | sha256 |", "| --- | --- |"]
    lines += [_line([Path(path).name, digest]) for path, digest in report["inputs"].items()]
    return "\n".join(lines) + "\n"


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", r"\|") for cell in cells) + " |"


def _rows(report: Mapping[str, Any]) -> list[list[str]]:
    """The table's lines: a name, then a cell a split."""
    splits = list(report["splits"].values())
    rows = [["pairs", *(f"{split['pairs']:,}" for split in splits)], ["contests", *(f"{split['contests']:,}" for split in splits)]]
    rows.append(["pairs a contest: min / median / max", *(_spread(split["pairs_per_contest"]) for split in splits)])
    rows.append(["rows read", *(f"{split['rows_read']:,}" for split in splits)])
    if any("captions_kept" in split for split in splits):
        rows.append(["captions kept", *(f"{split['captions_kept']:,}" for split in splits)])
        names = [name for name in _SIGMA_NAMES if any(name in split["sigma_gap"] for split in splits)]
        rows += [[f"pairs of {name} sigma", *(f"{split['sigma_gap'].get(name, 0):,}" for split in splits)] for name in names]
    rows.append(["pairs with an image", *(f"{split['pairs_with_image']:,}" for split in splits)])
    rows.append(["the shorter caption wins", *(_share(split["shorter_wins"]) for split in splits)])
    reasons = sorted({reason for split in splits for reason in split["dropped"]})
    return rows + [[f"dropped: {reason}", *(f"{split['dropped'].get(reason, 0):,}" for split in splits)] for reason in reasons]


def _spread(spread: Mapping[str, float] | None) -> str:
    return f"{spread['min']:,} / {math.floor(spread['median'] * 10) / 10:,g} / {spread['max']:,}" if spread else "-"


def _share(shorter: Mapping[str, Any]) -> str:
    return "-" if shorter["share"] is None else f"{shorter['pairs']:,} ({shorter['share']:.1%})"
