"""Preference pairs and rated captions, and the one table format (parquet) that carries them from preparing to training and evaluating.

A table is checked row by row when it is written and again when it is read. Knows no source, no model, and no picture beyond its path.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, TypeVar

from app.errors import PunchlineError

if TYPE_CHECKING:
    import pyarrow as pa

VERSION = 1
_KEY = b"punchline"


class DataInvalid(PunchlineError):
    """A table, a source file or one of its rows cannot be used; one line that names file and row."""

    exit_code = 3


@dataclass(frozen=True, slots=True)
class Pair:
    """Two captions of one image and prompt, the preferred one first."""

    pair_id: str  # unique in its table
    contest: str  # pairs of one contest are not independent; data without contests uses its own cluster (dialogue, category)
    image: str | None  # relative to the folder of the table: "images/510.jpg"
    prompt: str | None  # None: the model's default prompt
    chosen: str
    rejected: str
    sigma_gap: float | None = None  # gap of the means over the pooled standard error
    mean_gap: float | None = None
    chosen_votes: int | None = None
    rejected_votes: int | None = None


@dataclass(frozen=True, slots=True)
class RatedCaption:
    """A caption with its crowd rating."""

    contest: str
    image: str | None
    prompt: str | None
    caption: str
    mean: float
    standard_error: float
    votes: int
    rank: int


_Row = TypeVar("_Row", Pair, RatedCaption)
_TABLE_OF = {Pair: "pairs", RatedCaption: "captions"}


def write_pairs(path: Path, pairs: Iterable[Pair]) -> None:
    """Write a table of pairs, whole or not at all. Raises DataInvalid for a row that `read_pairs` would refuse."""
    rows = list(pairs)
    _check_pairs(path, rows)
    _write(path, rows, Pair)


def read_pairs(path: Path) -> list[Pair]:
    """The pairs of a table, every image present. Raises DataInvalid."""
    rows = _read(path, Pair)
    _check_pairs(path, rows)
    _check_images(path, [row.image for row in rows])
    return rows


def write_captions(path: Path, captions: Iterable[RatedCaption]) -> None:
    """Write a table of rated captions, whole or not at all. Raises DataInvalid for a row that `read_captions` would refuse."""
    rows = list(captions)
    _check_each(path, rows, _caption_fault)
    _write(path, rows, RatedCaption)


def read_captions(path: Path) -> list[RatedCaption]:
    """The rated captions of a table, every image present. Raises DataInvalid."""
    rows = _read(path, RatedCaption)
    _check_each(path, rows, _caption_fault)
    _check_images(path, [row.image for row in rows])
    return rows


def _write(path: Path, rows: Sequence[Pair] | Sequence[RatedCaption], kind: type[Pair] | type[RatedCaption]) -> None:
    import pyarrow as pa  # the rows themselves are of use without it
    import pyarrow.parquet as pq

    columns = {field.name: [getattr(row, field.name) for row in rows] for field in fields(kind)}
    partial = path.with_name(f".{path.name}.partial")
    try:
        pq.write_table(pa.table(columns, schema=_schema(kind)), partial, compression="zstd")
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def _read(path: Path, kind: type[_Row]) -> list[_Row]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    if not path.is_file():
        raise DataInvalid(f"{path}: no such file")
    try:
        table = pq.ParquetFile(path).read()
    except (pa.ArrowException, OSError) as error:
        raise DataInvalid(f"{path}: not a readable parquet file ({type(error).__name__})") from None
    _check_schema(path, table.schema, kind)
    columns: list[list[Any]] = [column.to_pylist() for column in table.columns]  # no nulls where the schema allows none
    return [kind(*values) for values in zip(*columns, strict=True)]


def _schema(kind: type[Pair] | type[RatedCaption]) -> pa.Schema:
    """The columns of a row's fields: their order, types, and which may be null."""
    import pyarrow as pa

    arrow = {"str": pa.string(), "float": pa.float64(), "int": pa.int64()}
    columns = []
    for field in fields(kind):
        plain, _, optional = str(field.type).partition(" | ")
        columns.append(pa.field(field.name, arrow[plain], nullable=optional == "None"))
    described = json.dumps({"table": _TABLE_OF[kind], "version": VERSION})
    return pa.schema(columns, metadata={_KEY: described.encode()})


def _check_schema(path: Path, found: pa.Schema, kind: type[Pair] | type[RatedCaption]) -> None:
    described = (found.metadata or {}).get(_KEY)
    wanted = _schema(kind)
    if described is None:
        raise DataInvalid(f"{path}: not a table of {_TABLE_OF[kind]} written by `python -m training.prepare`")
    if described != wanted.metadata[_KEY]:
        raise DataInvalid(f"{path}: expected {wanted.metadata[_KEY].decode()}, found {described.decode(errors='replace')[:60]}")
    if not found.equals(wanted, check_metadata=False):
        listed = ", ".join(f"{field.name}: {field.type}" for field in found)
        raise DataInvalid(f"{path}: its columns are not those of version {VERSION}: {listed[:400]}")


def _check_pairs(path: Path, pairs: Sequence[Pair]) -> None:
    _check_each(path, pairs, _pair_fault)
    seen: dict[str, int] = {}
    for row, pair in enumerate(pairs, start=1):
        if (first := seen.setdefault(pair.pair_id, row)) != row:
            raise DataInvalid(f"{path}, row {row}: pair_id is the one of row {first} again")


def _check_each(path: Path, rows: Sequence[_Row], fault_of: Callable[[_Row], str | None]) -> None:
    for number, row in enumerate(rows, start=1):
        if fault := fault_of(row):
            raise DataInvalid(f"{path}, row {number}: {fault}")


def _pair_fault(pair: Pair) -> str | None:
    for name in ("pair_id", "contest", "chosen", "rejected"):
        if not getattr(pair, name).strip():
            return f"{name} is empty"
    if pair.chosen == pair.rejected:
        return "chosen and rejected are the same text"
    for name in ("sigma_gap", "mean_gap"):
        if (value := getattr(pair, name)) is not None and not math.isfinite(value):
            return f"{name} is not finite"
    return _place_fault(pair.image, pair.prompt)


def _caption_fault(caption: RatedCaption) -> str | None:
    for name in ("contest", "caption"):
        if not getattr(caption, name).strip():
            return f"{name} is empty"
    if not math.isfinite(caption.mean):
        return "mean is not finite"
    if not (math.isfinite(caption.standard_error) and caption.standard_error > 0):
        return "standard_error is not a positive number"
    return _place_fault(caption.image, caption.prompt)


def _place_fault(image: str | None, prompt: str | None) -> str | None:
    if prompt is not None and not prompt.strip():
        return "prompt is empty; null stands for the model's default prompt"
    return None if image is None else image_path_fault(image)


def image_path_fault(image: str) -> str | None:
    """Why a relative picture path may not be used, or None. Forward slashes only, never out of its folder."""
    if not image.strip():
        return "image is empty; null stands for no image"
    if "\\" in image or "\0" in image or ":" in image.partition("/")[0]:
        return "image is not a plain relative path"
    path = PurePosixPath(image)
    if path.is_absolute() or ".." in path.parts or not path.parts:
        return "image leaves the folder of the table"
    return None


def _check_images(path: Path, images: Sequence[str | None]) -> None:
    """Every picture is a file inside the folder of the table, links followed."""
    folder = path.parent.resolve()
    rows = {image: row for row, image in reversed(list(enumerate(images, start=1))) if image is not None}
    for image, row in rows.items():
        found = (folder / image).resolve()
        if not found.is_relative_to(folder):
            raise DataInvalid(f"{path}, row {row}: image leaves the folder of the table")
        if not found.is_file():
            raise DataInvalid(f"{path}, row {row}: image {image} does not exist")
