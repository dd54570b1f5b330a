"""What a source hands over: pairs and rated captions a split, what was dropped and why, the files it read. Plain data."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol, TypeVar

from training.pairs import DataInvalid, Pair, RatedCaption

SPLITS = ("train", "validation", "test")
Advance = Callable[[int], None]
_Item = TypeVar("_Item")
_ADVANCE_ITEMS = 1_000


class Progress(Protocol):
    """Told what is being done and how far it is; a total of None is unknown."""

    def begin(self, what: str, total: int | None) -> Advance: ...


def followed(items: Iterable[_Item], advance: Advance) -> Iterator[_Item]:
    """The items, with a word to `advance` every thousand and at the end: a bar costs more than a row."""
    waiting = 0
    for item in items:
        yield item
        waiting += 1
        if waiting == _ADVANCE_ITEMS:
            advance(waiting)
            waiting = 0
    advance(waiting)


@dataclass(slots=True)
class Split:
    """One split, and the count of everything that did not make it."""

    pairs: list[Pair] = field(default_factory=list)
    captions: list[RatedCaption] = field(default_factory=list)  # only of rated data
    num_rows: int = 0  # rows of the source that belong to this split
    dropped: Counter[str] = field(default_factory=Counter)  # rows, by reason


@dataclass(slots=True)
class Prepared:
    """Everything a source gives."""

    splits: dict[str, Split]
    inputs: list[Path]
    rated: bool = False  # rows are captions with ratings, not pairs
    remarks: list[str] = field(default_factory=list)


def parse_shares(text: str) -> dict[str, float]:
    """`0.8,0.1,0.1` as the shares of train, validation and test. Raises DataInvalid."""
    try:
        shares = [float(part) for part in text.split(",")]
    except ValueError:
        shares = []
    if len(shares) != len(SPLITS) or not all(0 <= share < float("inf") for share in shares) or sum(shares) == 0:
        raise DataInvalid(f"shares {text!r}: expected three numbers such as 0.8,0.1,0.1 for {', '.join(SPLITS)}")
    return dict(zip(SPLITS, shares, strict=True))


def in_order(splits: Mapping[str, Split]) -> dict[str, Split]:
    """Train first, and only the splits that received a row."""
    return {name: splits[name] for name in SPLITS if name in splits and splits[name].num_rows}
