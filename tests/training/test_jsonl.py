"""JSON lines of the vision reward benchmarks to pairs with pictures."""

from __future__ import annotations

import hashlib
import io
import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from training.pairs import DataInvalid
from training.sources.jsonl import EQUAL, VIDEO, Lines, prepare_jsonl
from training.sources.pictures import PictureFolder
from training.sources.prepared import Advance, Prepared

SHARES = {"train": 0.0, "validation": 0.0, "test": 1.0}


class Silent:
    def begin(self, what: str, total: int | None) -> Advance:
        return lambda number: None


def png(colour: str = "white", size: tuple[int, int] = (40, 30)) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", size, colour).save(file, "PNG")
    return file.getvalue()


def line(**changes: Any) -> dict[str, Any]:
    return {"id": "a-1", "prompt": "What is shown?", "chosen": "A cat.", "rejected": "A dog."} | changes


def prepare(tmp_path: Path, *rows: dict[str, Any], contest_key: str = "id", name: str = "bench.jsonl", images: bool = True) -> Prepared:
    (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    pictures = tmp_path / "pictures"
    (pictures / "deep").mkdir(parents=True, exist_ok=True)
    (pictures / "deep" / "cat.png").write_bytes(png())
    (pictures / "copy.jpg").write_bytes(png())
    (pictures / "broken.png").write_bytes(b"not a picture")
    (pictures / "tiny.png").write_bytes(png(size=(4, 4)))
    lines = Lines([tmp_path / name], pictures if images else None, contest_key)
    return prepare_jsonl(lines, SHARES, 1, PictureFolder(tmp_path / "out"), Silent())


def test_a_line_becomes_a_pair_with_its_picture_copied(tmp_path: Path) -> None:
    """Named by content: equal pictures are one file, whatever they were called."""
    prepared = prepare(tmp_path, line(image="deep/cat.png"), line(id=7, image="copy.jpg"), line(id="text", prompt=None))
    image = f"images/{hashlib.sha256(png()).hexdigest()[:32]}.png"
    pairs = {pair.pair_id: pair for pair in prepared.splits["test"].pairs}
    assert {name: pair.image for name, pair in pairs.items()} == {"a-1": image, "7": image, "text": None}
    assert {name: pair.contest for name, pair in pairs.items()} == {"a-1": "a-1", "7": "7", "text": "text"}
    assert (pairs["a-1"].prompt, pairs["a-1"].chosen, pairs["a-1"].rejected) == ("What is shown?", "A cat.", "A dog.")
    assert pairs["text"].prompt is None
    assert (tmp_path / "out" / image).read_bytes() == png()
    assert len(list((tmp_path / "out" / "images").iterdir())) == 1


def test_a_category_can_be_the_contest(tmp_path: Path) -> None:
    rows = [line(id=str(k), Category="safety" if k % 2 else "math") for k in range(6)]
    prepared = prepare(tmp_path, *rows, contest_key="Category")
    assert {pair.pair_id: pair.contest for pair in prepared.splits["test"].pairs} == {
        str(k): "safety" if k % 2 else "math" for k in range(6)
    }
    assert prepared.remarks == []


def test_other_keys_are_listed_with_their_number(tmp_path: Path) -> None:
    prepared = prepare(tmp_path, line(chosen_reason="x", Category="y"), line(id="b", chosen_reason="x", rejected_reason="z"))
    assert prepared.remarks == [
        "keys that were not used, with their number of lines: Category (1), chosen_reason (2), rejected_reason (1)",
    ]


def test_videos_and_equal_answers_are_counted(tmp_path: Path) -> None:
    split = prepare(tmp_path, line(), line(id="b", video="v/1"), line(id="c", video=None), line(id="d", rejected="A cat.")).splits["test"]
    assert split.dropped == {VIDEO: 1, EQUAL: 1}
    assert (split.num_rows, sorted(pair.pair_id for pair in split.pairs)) == (4, ["a-1", "c"])


def test_a_repeated_id_is_one_contest_and_different_pairs(tmp_path: Path) -> None:
    prepared = prepare(tmp_path, line(), line(chosen="A lion."), line(chosen="A tiger."))
    pairs = prepared.splits["test"].pairs
    assert sorted(pair.pair_id for pair in pairs) == ["a-1", "a-1#2", "a-1#3"]
    assert {pair.contest for pair in pairs} == {"a-1"}
    assert prepared.remarks == ["ids on more than one line, told apart by #2, #3, ..: 1"]


def test_the_split_is_that_of_the_file_name(tmp_path: Path) -> None:
    assert list(prepare(tmp_path, line(), name="validation.jsonl").splits) == ["validation"]


def test_blank_lines_are_no_rows(tmp_path: Path) -> None:
    (tmp_path / "more.jsonl").write_text(f"\n{json.dumps(line())}\n\n{json.dumps(line(id='b', chosen=''))}\n")
    with pytest.raises(DataInvalid, match=r"more.jsonl:4: chosen is empty"):
        prepare_jsonl(Lines([tmp_path / "more.jsonl"]), SHARES, 1, PictureFolder(tmp_path / "out"), Silent())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"id": ""}, "id is empty"),
        ({"id": None}, "id is empty"),
        ({"id": 1.5}, "id must be text, found float"),
        ({"prompt": " "}, "prompt is empty; null stands for the model's default prompt"),
        ({"prompt": ["a"]}, "prompt must be text, found list"),
        ({"chosen": None}, "chosen is empty"),
        ({"rejected": {"a": 1}}, "rejected must be text, found dict"),
        ({"image": ["deep/cat.png"]}, "image must be text, found list"),
        ({"image": "../bench.jsonl"}, "image leaves the folder of images"),
        ({"image": "/etc/passwd"}, "image leaves the folder of images"),
        ({"image": "data:image/png;base64,AAAA"}, "image is not a plain relative path"),
        ({"image": "broken.png"}, "image broken.png: the image could not be read"),
        ({"image": "tiny.png"}, "image tiny.png: sides must be at least 16 pixels and at most 100:1"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(DataInvalid) as caught:
        prepare(tmp_path, line(id="good"), line(**changes))
    assert str(caught.value) == f"{tmp_path / 'bench.jsonl'}:2: {message}"


def test_a_missing_key_and_a_missing_picture_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataInvalid, match=r"bench.jsonl:1: column 'prompt' is missing"):
        prepare(tmp_path, {"id": "a", "chosen": "b", "rejected": "c"})
    with pytest.raises(DataInvalid, match=r"bench.jsonl:1: column 'Category' is missing"):
        prepare(tmp_path, line(), contest_key="Category")
    with pytest.raises(DataInvalid, match=r"bench.jsonl:1: image no.png does not exist in .*pictures"):
        prepare(tmp_path, line(image="no.png"))
    with pytest.raises(DataInvalid, match=r"bench.jsonl:1: it has an image; say with --images where the pictures lie"):
        prepare(tmp_path, line(image="deep/cat.png"), images=False)


def test_a_link_out_of_the_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "secret.png").write_bytes(png("black"))
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "link.png").symlink_to(tmp_path / "secret.png")
    with pytest.raises(DataInvalid, match=r"bench.jsonl:1: image leaves the folder of images"):
        prepare(tmp_path, line(image="link.png"))
