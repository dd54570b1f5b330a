"""The table format: what is written is read back, and nothing else is read."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from app.errors import PunchlineError
from training.pairs import DataInvalid, Pair, RatedCaption, read_captions, read_pairs, write_captions, write_pairs

FULL = Pair("510-a", "510", "images/510.png", "Scene: a desk", "Good.", "Bad.\nWorse.", 3.5, 0.5, 100, 20)
BARE = Pair("b", "dialogue", None, None, " yes", " no")
CAPTION = RatedCaption("510", "images/510.png", None, "Good “one”.", 2.5, 0.05, 100, 0)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "510.png").write_bytes(b"a picture, as far as a table knows")
    return tmp_path


def rewrite(path: Path, change: Callable[[pa.Table], pa.Table]) -> None:
    pq.write_table(change(pq.read_table(path)), path)


def test_pairs_are_read_as_written(folder: Path) -> None:
    write_pairs(folder / "pairs.parquet", iter([FULL, BARE]))
    assert read_pairs(folder / "pairs.parquet") == [FULL, BARE]
    assert pq.read_schema(folder / "pairs.parquet").metadata[b"punchline"] == b'{"table": "pairs", "version": 1}'


def test_captions_are_read_as_written(folder: Path) -> None:
    captions = [CAPTION, replace(CAPTION, image=None, prompt="Scene: a desk", rank=7)]
    write_captions(folder / "captions.parquet", captions)
    assert read_captions(folder / "captions.parquet") == captions
    assert pq.read_schema(folder / "captions.parquet").metadata[b"punchline"] == b'{"table": "captions", "version": 1}'


def test_an_empty_table_is_a_table(folder: Path) -> None:
    write_pairs(folder / "pairs.parquet", [])
    assert read_pairs(folder / "pairs.parquet") == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"chosen": " \n"}, "chosen is empty"),
        ({"rejected": ""}, "rejected is empty"),
        ({"pair_id": ""}, "pair_id is empty"),
        ({"contest": ""}, "contest is empty"),
        ({"rejected": "Good."}, "chosen and rejected are the same text"),
        ({"prompt": ""}, "prompt is empty; null stands for the model's default prompt"),
        ({"sigma_gap": float("inf")}, "sigma_gap is not finite"),
        ({"mean_gap": float("nan")}, "mean_gap is not finite"),
        ({"image": ""}, "image is empty; null stands for no image"),
        ({"image": "/etc/passwd"}, "image leaves the folder of the table"),
        ({"image": "images/../../a.png"}, "image leaves the folder of the table"),
        ({"image": "images\\a.png"}, "image is not a plain relative path"),
        ({"image": "https://host/a.png"}, "image is not a plain relative path"),
    ],
)
def test_a_bad_pair_is_refused_before_anything_is_written(folder: Path, change: dict[str, object], message: str) -> None:
    path = folder / "pairs.parquet"
    write_pairs(path, [BARE])
    with pytest.raises(DataInvalid) as caught:
        write_pairs(path, [BARE, replace(FULL, **change)])
    assert str(caught.value) == f"{path}, row 2: {message}"
    assert read_pairs(path) == [BARE]
    assert sorted(entry.name for entry in folder.iterdir()) == ["images", "pairs.parquet"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"caption": ""}, "caption is empty"),
        ({"mean": float("nan")}, "mean is not finite"),
        ({"standard_error": 0.0}, "standard_error is not a positive number"),
        ({"standard_error": float("inf")}, "standard_error is not a positive number"),
        ({"image": "../a.png"}, "image leaves the folder of the table"),
    ],
)
def test_a_bad_caption_is_refused(folder: Path, change: dict[str, object], message: str) -> None:
    with pytest.raises(DataInvalid, match=f"row 1: {message}"):
        write_captions(folder / "captions.parquet", [replace(CAPTION, **change)])


def test_a_pair_id_is_unique(folder: Path) -> None:
    with pytest.raises(DataInvalid, match=r"pairs.parquet, row 3: pair_id is the one of row 1 again"):
        write_pairs(folder / "pairs.parquet", [BARE, FULL, replace(BARE, chosen="other")])


def test_the_error_is_of_the_house() -> None:
    assert issubclass(DataInvalid, PunchlineError)
    assert DataInvalid.exit_code == 3


def test_a_missing_and_a_foreign_file(folder: Path) -> None:
    with pytest.raises(DataInvalid, match=r"nothing.parquet: no such file"):
        read_pairs(folder / "nothing.parquet")
    (folder / "text.parquet").write_text("no parquet at all")
    with pytest.raises(DataInvalid, match=r"text.parquet: not a readable parquet file"):
        read_pairs(folder / "text.parquet")
    pq.write_table(pa.table({"chosen": ["a"], "rejected": ["b"]}), folder / "foreign.parquet")
    with pytest.raises(DataInvalid, match=r"foreign.parquet: not a table of pairs written by `python -m training.prepare`"):
        read_pairs(folder / "foreign.parquet")


def test_a_table_of_the_other_kind_and_of_another_version(folder: Path) -> None:
    path = folder / "pairs.parquet"
    write_pairs(path, [BARE])
    with pytest.raises(DataInvalid, match=r'expected {"table": "captions", "version": 1}, found {"table": "pairs", "version": 1}'):
        read_captions(path)
    rewrite(path, lambda table: table.replace_schema_metadata({b"punchline": b'{"table": "pairs", "version": 2}'}))
    with pytest.raises(DataInvalid, match=r'found {"table": "pairs", "version": 2}'):
        read_pairs(path)


def test_other_columns(folder: Path) -> None:
    path = folder / "pairs.parquet"
    write_pairs(path, [BARE])
    rewrite(path, lambda table: table.drop_columns(["rejected"]))
    with pytest.raises(DataInvalid, match="its columns are not those of version 1: pair_id: string, contest: string"):
        read_pairs(path)


def test_a_null_where_none_may_be(folder: Path) -> None:
    """A column declared without nulls cannot hold one, so a table with one says so in its schema."""
    path = folder / "pairs.parquet"
    write_pairs(path, [BARE])
    schema = pq.read_schema(path)
    rows = [asdict(BARE), asdict(BARE) | {"pair_id": "c", "chosen": None}]
    loose = pa.schema([field.with_nullable(True) for field in schema], metadata=schema.metadata)
    pq.write_table(pa.Table.from_pylist(rows, schema=loose), path)
    with pytest.raises(DataInvalid, match="its columns are not those of version 1"):
        read_pairs(path)


def test_a_picture_that_is_not_there(folder: Path) -> None:
    path = folder / "pairs.parquet"
    write_pairs(path, [BARE, FULL])
    (folder / "images" / "510.png").unlink()
    with pytest.raises(DataInvalid, match=r"pairs.parquet, row 2: image images/510.png does not exist"):
        read_pairs(path)


def test_a_picture_that_is_a_link_out_of_the_folder(folder: Path) -> None:
    table = folder / "table"
    (table / "images").mkdir(parents=True)
    (table / "images" / "510.png").symlink_to(folder / "images" / "510.png")
    write_captions(table / "captions.parquet", [CAPTION])
    with pytest.raises(DataInvalid, match=r"captions.parquet, row 1: image leaves the folder of the table"):
        read_captions(table / "captions.parquet")
