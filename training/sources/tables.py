"""Rows of parquet, CSV and JSON lines files, with the place each came from. Knows no column by name."""

from __future__ import annotations

import csv
import gzip
import hashlib
import json
import re
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

from training.pairs import DataInvalid

SUFFIXES = (".parquet", ".csv", ".jsonl", ".jsonl.gz")
_SPLIT_WORDS = {"train": "train", "training": "train", "validation": "validation", "valid": "validation", "val": "validation"} | {
    "dev": "validation",
    "test": "test",
}
_BATCH_ROWS = 1024


@dataclass(frozen=True, slots=True)
class Row:
    """One row, and the questions whose wrong answers name the file and the row."""

    path: Path
    number: int  # from 1; a line of a JSON lines file, a row after the header elsewhere
    values: Mapping[str, Any]
    is_text: bool = False  # CSV: numbers arrive as text

    @property
    def where(self) -> str:
        return f"{self.path}:{self.number}" if ".jsonl" in self.path.suffixes else f"{self.path}, row {self.number}"

    def fault(self, what: str) -> DataInvalid:
        return DataInvalid(f"{self.where}: {what}")

    def value(self, name: str) -> Any:
        """Raises DataInvalid when the column is missing; its value may be null."""
        if name not in self.values:
            raise self.fault(f"column {name!r} is missing")
        return self.values[name]

    def text(self, name: str) -> str | None:
        value = self.value(name)
        return None if value is None else self._checked(name, value)

    def texts(self, name: str) -> list[str]:
        """A list of texts, nulls left out; a text by itself is a list of one."""
        value = self.value(name)
        several = value if isinstance(value, list) else [value]
        return [self._checked(name, each) for each in several if each is not None]

    def _checked(self, name: str, value: Any) -> str:
        if not isinstance(value, str):
            raise self.fault(f"{name} must be text, found {type(value).__name__}")
        if not _is_encodable(value):
            raise self.fault(f"{name} holds half a surrogate pair")
        return value

    def real(self, name: str) -> float | None:
        """A number that may be infinite or NaN; None for null and for an empty CSV field."""
        value = self.value(name)
        if self.is_text and isinstance(value, str):
            value = _parsed(value)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self.fault(f"{name} must be a number, found {type(value).__name__}")
        return float(value)

    def whole(self, name: str) -> int:
        number = self.real(name)
        if number is None or not number.is_integer():
            raise self.fault(f"{name} must be a whole number")
        return int(number)


def _parsed(text: str) -> float | str | None:
    if not text.strip():
        return None
    try:
        return float(text)
    except ValueError:
        return text


def _is_encodable(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def find_tables(places: Sequence[Path], suffixes: Sequence[str] = SUFFIXES) -> list[Path]:
    """The files named, and those with a known ending in the folders named, each once. Raises DataInvalid for a place without any."""
    found: dict[Path, None] = {}
    for place in places:
        if place.is_file() and not place.name.endswith(tuple(suffixes)):
            raise DataInvalid(f"{place}: expected a file that ends in {', '.join(suffixes)}")
        here = [place] if place.is_file() else _inside(place, suffixes)
        if not here:
            raise DataInvalid(f"{place}: no {', '.join(suffixes)} file")
        found |= dict.fromkeys(here)
    return list(found)


def _inside(folder: Path, suffixes: Sequence[str]) -> list[Path]:
    if not folder.is_dir():
        raise DataInvalid(f"{folder}: no such file or folder")
    paths = (path for path in folder.rglob("*") if path.is_file() and path.name.endswith(tuple(suffixes)))
    return sorted(path for path in paths if not any(part.startswith(".") for part in path.relative_to(folder).parts))


def split_of(path: Path) -> str | None:
    """The split a file's name begins with: `train.jsonl.gz`, `test-00000-of-00001.parquet`."""
    return _SPLIT_WORDS.get(re.split(r"[-_.]", path.name.lower(), maxsplit=1)[0])


def splits_of(paths: Sequence[Path]) -> dict[Path, str] | None:
    """The split of each file, or None when no name says one. Raises DataInvalid when only some do."""
    found = {path: split for path in paths if (split := split_of(path))}
    if found and len(found) < len(paths):
        other = next(path for path in paths if path not in found)
        raise DataInvalid(f"{other}: its name begins with no split (train, validation, test) while another file's does")
    return found or None


def read_rows(path: Path) -> Iterator[Row]:
    """The rows of a file in order. Raises DataInvalid."""
    if path.suffix == ".parquet":
        return _parquet_rows(path)
    return _csv_rows(path) if path.suffix == ".csv" else _json_rows(path)


def _parquet_rows(path: Path) -> Iterator[Row]:
    import pyarrow as pa  # JSON lines and CSV are read without it
    import pyarrow.parquet as pq

    number = 0
    try:
        for batch in pq.ParquetFile(path).iter_batches(batch_size=_BATCH_ROWS):
            for values in batch.to_pylist():
                number += 1
                yield Row(path, number, values)
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise DataInvalid(f"{path}: not a readable parquet file ({type(error).__name__})") from None


def _csv_rows(path: Path) -> Iterator[Row]:
    """Fields may hold newlines, so rows are counted, not lines."""
    number = 0
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            for values in csv.DictReader(file, strict=True):
                number += 1
                row = Row(path, number, values, is_text=True)
                if None in values or None in values.values():
                    raise row.fault("it has more or fewer fields than the header")
                yield row
    except (csv.Error, UnicodeDecodeError, OSError) as error:
        raise DataInvalid(f"{path}, row {number + 1}: not readable as CSV ({type(error).__name__})") from None


def _json_rows(path: Path) -> Iterator[Row]:
    number = 0
    try:
        with _open_lines(path) as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield Row(path, number, _json_object(path, number, line))
    except (OSError, EOFError, zlib.error) as error:  # a truncated or foreign .gz
        raise DataInvalid(f"{path}:{number + 1}: cannot be read ({type(error).__name__})") from None


def _open_lines(path: Path) -> IO[bytes]:
    return cast("IO[bytes]", gzip.open(path)) if path.suffix == ".gz" else path.open("rb")


def _json_object(path: Path, number: int, line: bytes) -> dict[str, Any]:
    try:
        values = json.loads(line)
    except (ValueError, RecursionError):
        raise DataInvalid(f"{path}:{number}: not a line of JSON") from None
    if not isinstance(values, dict):
        raise DataInvalid(f"{path}:{number}: expected a JSON object")
    return values


def sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
