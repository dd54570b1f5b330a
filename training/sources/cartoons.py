"""Cartoons by contest: files named by contest number, or parquet tables that hold their bytes. Checks headers, decodes nothing."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from training.pairs import DataInvalid
from training.sources.pictures import SUFFIXES, PictureFolder, PictureRejected
from training.sources.tables import Row, find_tables, read_rows, split_of

MISSING = "contest has no cartoon"
REFUSED = "the contest's cartoon was refused"
_COLUMNS = ("image", "cartoon", "img", "picture")


@dataclass(frozen=True, slots=True)
class _Found:
    where: str
    data: bytes | Path

    def read(self) -> bytes:
        return self.data.read_bytes() if isinstance(self.data, Path) else self.data


class Cartoons:
    """Pictures by contest; one goes into the output when its contest is used."""

    def __init__(self, pictures: PictureFolder, inputs: Sequence[Path]) -> None:
        self.inputs = inputs
        self.remarks: list[str] = []
        self._pictures = pictures
        self._found: dict[str, _Found] = {}

    def offer(self, contest: str, data: bytes | Path, where: str) -> None:
        """Raises DataInvalid when the contest has one already."""
        if (first := self._found.setdefault(contest, _Found(where, data))).where != where:
            raise DataInvalid(f"{where}: contest {contest} has a cartoon already, {first.where}")

    def place(self, contest: str) -> tuple[str | None, str]:
        """The cartoon's path in the output, or None and the reason."""
        found = self._found.get(contest)
        if found is None:
            return None, MISSING
        try:
            return self._pictures.add(found.read(), contest), ""
        except PictureRejected as error:
            self.remarks.append(f"refused cartoon: {found.where}: {error}")
            return None, REFUSED


def read_cartoons(place: Path, order: Mapping[str | None, Sequence[str]], pictures: PictureFolder) -> Cartoons:
    """The cartoons of a folder of pictures, a parquet file, or a folder of those.

    `order` is that of the descriptions, by split; it names the rows of tables that carry no contest number.
    """
    if named := _named_pictures(place):
        cartoons = Cartoons(pictures, named)
        for path in named:
            cartoons.offer(str(int(path.stem)), path, str(path))
        return cartoons
    cartoons = Cartoons(pictures, find_tables([place], (".parquet",)))
    for path in cartoons.inputs:
        for contest, row, data in _rows_of(path, order.get(split_of(path), ())):
            cartoons.offer(contest, data, row.where)
    return cartoons


def _named_pictures(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES and path.stem.isdecimal())


def _rows_of(path: Path, order: Sequence[str]) -> Iterator[tuple[str, Row, bytes]]:
    rows = list(read_rows(path))
    for number, row in enumerate(rows):
        image = row.value(_column(row))
        if not isinstance(image, dict) or not isinstance(image.get("bytes"), bytes):
            raise row.fault("the image must be a struct with bytes")
        yield _contest_of(row, image, order[number] if len(order) == len(rows) else None), row, image["bytes"]


def _column(row: Row) -> str:
    if found := next((name for name in _COLUMNS if name in row.values), None):
        return found
    raise row.fault(f"no column {' or '.join(_COLUMNS)}")


def _contest_of(row: Row, image: Mapping[str, Any], in_order: str | None) -> str:
    """The contest number of a row: its own, its picture's name, or that of the description at the same place."""
    if "contest_number" in row.values:
        return str(row.whole("contest_number"))
    if (name := Path(image.get("path") or "").stem).isdecimal():
        return str(int(name))
    if in_order is None:
        raise row.fault("nothing says which contest this is: no contest_number, no path, and not as many descriptions as cartoons")
    return in_order
