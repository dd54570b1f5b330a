"""Ratings to pairs: what is dropped and under which name, where prompts and cartoons come from, which splits there are."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from training.pairs import DataInvalid
from training.sources import cartoons
from training.sources.hub import newyorker_tables
from training.sources.newyorker import EMPTY, NO_ERROR, NOT_FINITE, TWICE, Options, Tables, prepare_newyorker
from training.sources.pictures import PictureFolder
from training.sources.prepared import Advance, Prepared

OPTIONS = Options(seed=1, shares={"train": 1.0, "validation": 0.0, "test": 0.0}, min_captions=2)
LINE = "Write a funny one-line caption for this New Yorker-style cartoon."


@dataclass
class Told:
    """A progress that remembers."""

    steps: list[tuple[str, int | None]] = field(default_factory=list)
    advanced: list[int] = field(default_factory=list)

    def begin(self, what: str, total: int | None) -> Advance:
        self.steps.append((what, total))
        return self.advanced.append


def row(contest: int, caption: str | None, mean: float | None, **changes: Any) -> dict[str, Any]:
    public = {"contest_number": contest, "rank": 0, "caption": caption, "mean": mean, "precision": 0.05, "votes": 50}
    return public | {"not_funny": 10, "somewhat_funny": 20, "funny": 20} | changes


def contest(number: int, num_captions: int = 4) -> list[dict[str, Any]]:
    """Means 2.8, 2.3, 1.8, ..: at errors of 0.05, pooled 0.0707, every two are at least 7 apart."""
    return [row(number, f"caption {k} of {number}", 2.8 - 0.5 * k, rank=k) for k in range(num_captions)]


def write_parquet(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(list(rows)), path)
    return path


def write_csv(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


def write_jsonl(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(each) + "\n" for each in rows))
    return path


def png(size: tuple[int, int] = (40, 30), kind: str = "PNG") -> bytes:
    file = io.BytesIO()
    Image.new("RGB", size, "white").save(file, kind)
    return file.getvalue()


def prepare(tmp_path: Path, *ratings: Path, options: Options = OPTIONS, **places: Any) -> Prepared:
    return prepare_newyorker(Tables(ratings, **places), options, PictureFolder(tmp_path / "out"), Told())


def test_three_captions_give_their_three_pairs(tmp_path: Path) -> None:
    """Gaps 0.5, 0.5 and 1.0 over the pooled error sqrt(2) * 0.05."""
    split = prepare(tmp_path, write_parquet(tmp_path / "train.parquet", contest(510, 3))).splits["train"]
    assert {(pair.chosen[8], pair.rejected[8]): round(pair.sigma_gap or 0, 2) for pair in split.pairs} == {
        ("0", "1"): 7.07,
        ("1", "2"): 7.07,
        ("0", "2"): 14.14,
    }
    assert {(pair.contest, pair.image, pair.prompt) for pair in split.pairs} == {("510", None, None)}
    assert [caption.rank for caption in split.captions] == [0, 1, 2]
    assert (split.num_rows, dict(split.dropped)) == (3, {})


def test_everything_dropped_is_counted_under_its_own_reason(tmp_path: Path) -> None:
    bad = [
        row(510, "", 2.0),
        row(510, " \n", 2.0),
        row(510, None, 2.0),
        row(510, "mean", None),
        row(510, "mean", float("nan")),
        row(510, "error", 2.0, precision=float("inf")),
        row(510, "few", 2.0, votes=9),
        row(510, "exact", 2.0, precision=0.0),
        row(510, "negative", 2.0, precision=-0.1),
        row(510, "no error", 2.0, precision=None),
        row(510, " CAPTION 1 of 510\n", 1.0, votes=49),
        *contest(99, 1),
    ]
    prepared = prepare(tmp_path, write_parquet(tmp_path / "train.parquet", [*contest(510), *bad]))
    split = prepared.splits["train"]
    assert split.dropped == {
        EMPTY: 3,
        NOT_FINITE: 3,
        "fewer than 10 votes": 1,
        NO_ERROR: 3,
        TWICE: 1,
        "contest has fewer than 2 captions left": 1,
    }
    assert split.num_rows == len(split.captions) + sum(split.dropped.values()) == 16
    assert prepared.remarks == ["no caption is left of contests 99"]


def test_of_a_repeated_caption_the_one_with_most_votes_stays(tmp_path: Path) -> None:
    rows = [row(510, "Same", 2.0, votes=11, rank=1), row(510, "same ", 2.5, votes=99, rank=3), row(510, "other", 1.0, rank=2)]
    split = prepare(tmp_path, write_parquet(tmp_path / "train.parquet", rows)).splits["train"]
    assert [(caption.caption, caption.votes) for caption in split.captions] == [("other", 50), ("same ", 99)]


def test_the_vote_floor_and_the_least_number_of_captions_are_inclusive(tmp_path: Path) -> None:
    table = write_parquet(tmp_path / "train.parquet", [row(1, f"{k}", 2.8 - 0.5 * k, votes=30) for k in range(3)])
    exact = replace(OPTIONS, min_votes=30, min_captions=3)
    assert len(prepare(tmp_path, table, options=exact).splits["train"].captions) == 3
    assert prepare(tmp_path, table, options=replace(exact, min_votes=31)).splits["train"].captions == []
    assert prepare(tmp_path, table, options=replace(exact, min_captions=4)).splits["train"].captions == []


def test_std_goes_before_precision(tmp_path: Path) -> None:
    """A null std leaves the word to precision."""
    rows = [row(510, "a", 2.5, std=0.2), row(510, "b", 1.0, std=None)]
    split = prepare(tmp_path, write_parquet(tmp_path / "train.parquet", rows)).splits["train"]
    assert [caption.standard_error for caption in split.captions] == [0.2, 0.05]


def test_std_alone_is_enough(tmp_path: Path) -> None:
    rows = [{name: value for name, value in each.items() if name != "precision"} | {"std": 0.1} for each in contest(510, 2)]
    split = prepare(tmp_path, write_parquet(tmp_path / "train.parquet", rows)).splits["train"]
    assert [caption.standard_error for caption in split.captions] == [0.1, 0.1]


def test_csv_json_lines_and_parquet_give_the_same(tmp_path: Path) -> None:
    """A caption may hold newlines, quotes and commas."""
    rows = [row(510, 'He said:\n"well, well"', 2.9), *contest(510)]
    found = [
        prepare(tmp_path, write_parquet(tmp_path / "train.parquet", rows)),
        prepare(tmp_path, write_csv(tmp_path / "train.csv", rows)),
        prepare(tmp_path, write_jsonl(tmp_path / "train.jsonl", rows)),
    ]
    assert found[0].splits["train"].captions[0].caption == 'He said:\n"well, well"'
    assert all(prepared.splits == found[0].splits for prepared in found)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("mean", "funny", "mean must be a number, found str"),
        ("votes", "many", "votes must be a number, found str"),
        ("votes", 12.5, "votes must be a whole number"),
        ("rank", None, "rank must be a whole number"),
        ("contest_number", "", "contest_number must be a whole number"),
    ],
)
def test_a_row_that_is_no_rating_stops_and_is_named(tmp_path: Path, name: str, value: object, message: str) -> None:
    path = write_csv(tmp_path / "train.csv", [*contest(510, 2), row(510, "multi\nline", 1.0) | {name: value}])
    with pytest.raises(DataInvalid) as caught:
        prepare(tmp_path, path)
    assert str(caught.value) == f"{path}, row 3: {message}"


def test_a_missing_column_is_named(tmp_path: Path) -> None:
    rows = [{name: value for name, value in each.items() if name != "votes"} for each in contest(510)]
    with pytest.raises(DataInvalid, match=r"train.parquet, row 1: column 'votes' is missing"):
        prepare(tmp_path, write_parquet(tmp_path / "train.parquet", rows))
    neither = [{name: value for name, value in each.items() if name != "precision"} for each in contest(510)]
    with pytest.raises(DataInvalid, match=r"train.jsonl:1: column 'precision' is missing"):
        prepare(tmp_path, write_jsonl(tmp_path / "train.jsonl", neither))


def test_a_number_where_a_caption_must_be(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "train.jsonl", [*contest(510), row(510, None, 2.0) | {"caption": 7}])
    with pytest.raises(DataInvalid, match=r"train.jsonl:5: caption must be text, found int"):
        prepare(tmp_path, path)


def test_a_csv_row_with_a_field_too_many(tmp_path: Path) -> None:
    path = write_csv(tmp_path / "train.csv", contest(510))
    path.write_text(path.read_text() + "510,5,unquoted, comma,1.0,0.05,50,1,2,3\n")
    with pytest.raises(DataInvalid, match=r"train.csv, row 5: it has more or fewer fields than the header"):
        prepare(tmp_path, path)


def test_splits_are_those_of_the_files_and_held_out_pairs_have_their_own_cap(tmp_path: Path) -> None:
    write_parquet(tmp_path / "in" / "train-00000-of-00002.parquet", contest(510, 10))
    write_parquet(tmp_path / "in" / "train-00001-of-00002.parquet", contest(511, 10))
    write_parquet(tmp_path / "in" / "val.parquet", contest(512, 10))
    write_parquet(tmp_path / "in" / "test.parquet", contest(513, 10))
    prepared = prepare(tmp_path, tmp_path / "in", options=replace(OPTIONS, max_pairs=7, max_held_out_pairs=5))
    assert {name: len(split.pairs) for name, split in prepared.splits.items()} == {"train": 14, "validation": 5, "test": 5}
    assert {name: {pair.contest for pair in split.pairs} for name, split in prepared.splits.items()} == {
        "train": {"510", "511"},
        "validation": {"512"},
        "test": {"513"},
    }
    assert len(prepared.inputs) == 4


def test_one_table_is_split_by_contest(tmp_path: Path) -> None:
    table = write_parquet(tmp_path / "ratings.parquet", [each for number in range(40) for each in contest(number, 3)])
    options = replace(OPTIONS, shares={"train": 0.5, "validation": 0.25, "test": 0.25})
    splits = prepare(tmp_path, table, options=options).splits
    contests = {name: {caption.contest for caption in split.captions} for name, split in splits.items()}
    assert list(contests) == ["train", "validation", "test"]
    assert sorted(each for some in contests.values() for each in some) == sorted(map(str, range(40)))


def test_adding_a_contest_changes_no_other(tmp_path: Path) -> None:
    few = [each for number in (510, 511, 512) for each in contest(number, 12)]
    more = [*contest(509, 12), *few]
    options = replace(OPTIONS, max_pairs=10)
    small = prepare(tmp_path, write_parquet(tmp_path / "train.parquet", few), options=options).splits["train"].pairs
    large = prepare(tmp_path, write_parquet(tmp_path / "train_more.parquet", more), options=options).splits["train"].pairs
    assert [pair for pair in large if pair.contest != "509"] == small
    assert len({pair.contest for pair in large[:8]}) == 4


def test_a_contest_in_two_splits_stops(tmp_path: Path) -> None:
    train = write_parquet(tmp_path / "train.parquet", contest(510))
    test = write_parquet(tmp_path / "test.parquet", contest(510))
    with pytest.raises(DataInvalid, match="contest 510 is in the train and the test ratings"):
        prepare(tmp_path, train, test)


def test_some_names_with_a_split_and_some_without_stop(tmp_path: Path) -> None:
    train, other = write_parquet(tmp_path / "train.parquet", contest(510)), write_parquet(tmp_path / "more.parquet", contest(511))
    with pytest.raises(DataInvalid, match=r"more.parquet: its name begins with no split"):
        prepare(tmp_path, train, other)


@pytest.mark.parametrize("name", ["nothing", "ratings.xlsx", "empty"])
def test_a_place_without_tables_stops(tmp_path: Path, name: str) -> None:
    (tmp_path / "ratings.xlsx").write_bytes(b"")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataInvalid, match=name):
        prepare(tmp_path, tmp_path / name)


def scenes(tmp_path: Path) -> Path:
    rows: list[dict[str, Any]] = [
        {"contest_number": 510, "canny": "A desk.", "uncanny": "It barks.", "location": "office", "entities": ["Desk", "Dog"]},
        {"contest_number": 511, "canny": "A boat.", "uncanny": "", "location": None, "entities": []},
        {"contest_number": 512, "canny": "", "uncanny": " ", "location": None, "entities": None},
    ]
    return write_jsonl(tmp_path / "descriptions" / "train.jsonl", rows)


def test_prompts_are_worded_as_published_and_empty_fields_are_skipped(tmp_path: Path) -> None:
    table = write_parquet(tmp_path / "train.parquet", [each for number in (510, 511, 512, 513) for each in contest(number)])
    prepared = prepare(tmp_path, table, scenes=[scenes(tmp_path)])
    split = prepared.splits["train"]
    expected = {
        "510": f"{LINE}\nScene: A desk.\nTwist: It barks.\nLocation: office\nEntities: Desk, Dog",
        "511": f"{LINE}\nScene: A boat.",
        "512": None,
        "513": None,
    }
    assert {pair.contest: pair.prompt for pair in split.pairs} == expected
    assert {caption.contest: caption.prompt for caption in split.captions} == expected
    assert prepared.remarks == ["no description, so the model's default prompt: contests 512, 513"]


def test_the_fixed_prompt_uses_no_description(tmp_path: Path) -> None:
    table = write_parquet(tmp_path / "train.parquet", contest(510))
    prepared = prepare(tmp_path, table, options=replace(OPTIONS, use_scenes=False), scenes=[scenes(tmp_path)])
    assert {pair.prompt for pair in prepared.splits["train"].pairs} == {None}
    assert prepared.remarks == []


def test_a_contest_described_twice_stops(tmp_path: Path) -> None:
    path = scenes(tmp_path)
    path.write_text(path.read_text() + path.read_text().splitlines()[0] + "\n")
    with pytest.raises(DataInvalid, match=r"train.jsonl:4: contest 510 was described before, at .*train.jsonl:1"):
        prepare(tmp_path, write_parquet(tmp_path / "train.parquet", contest(510)), scenes=[path])


def test_a_description_that_is_no_text_stops(tmp_path: Path) -> None:
    described = {"contest_number": 510, "canny": "A desk.", "uncanny": "", "location": "", "entities": ["Desk", 7]}
    path = write_jsonl(tmp_path / "descriptions.jsonl", [described])
    with pytest.raises(DataInvalid, match=r"descriptions.jsonl:1: entities must be text, found int"):
        prepare(tmp_path, write_parquet(tmp_path / "train.parquet", contest(510)), scenes=[path])


def drawn(tmp_path: Path, **files: bytes) -> Path:
    folder = tmp_path / "cartoons"
    folder.mkdir()
    for name, data in files.items():
        (folder / name.replace("_", ".")).write_bytes(data)
    return folder


def test_cartoons_of_a_folder_are_copied_and_contests_without_a_good_one_are_counted(tmp_path: Path) -> None:
    """The copy's suffix is what the file is, not what it was called; a cartoon nobody needs is not copied."""
    table = write_parquet(tmp_path / "train.parquet", [each for number in (510, 511, 512, 513) for each in contest(number)])
    folder = drawn(
        tmp_path, **{"510_png": png(), "511_jpg": png(kind="WEBP"), "512_jpg": b"no picture", "999_png": png(), "README_md": b""}
    )
    prepared = prepare(tmp_path, table, cartoons=folder)
    split = prepared.splits["train"]
    assert {pair.contest: pair.image for pair in split.pairs} == {"510": "images/510.png", "511": "images/511.webp"}
    assert {caption.contest: caption.image for caption in split.captions} == {"510": "images/510.png", "511": "images/511.webp"}
    assert split.dropped == {cartoons.REFUSED: 4, cartoons.MISSING: 4}
    assert sorted(path.name for path in (tmp_path / "out" / "images").iterdir()) == ["510.png", "511.webp"]
    assert (tmp_path / "out" / "images" / "510.png").read_bytes() == png()
    assert prepared.remarks[0] == "no caption is left of contests 512, 513"
    assert prepared.remarks[1].startswith(f"refused cartoon: {folder / '512.jpg'}: ")


def test_two_cartoons_of_one_contest_stop(tmp_path: Path) -> None:
    folder = drawn(tmp_path, **{"510_png": png(), "510_jpg": png(kind="JPEG")})
    with pytest.raises(DataInvalid, match=r"510.png: contest 510 has a cartoon already, .*510.jpg"):
        prepare(tmp_path, write_parquet(tmp_path / "train.parquet", contest(510)), cartoons=folder)


@pytest.mark.parametrize(
    "rows",
    [
        [
            {"contest_number": 511, "image": {"bytes": png(), "path": None}},
            {"contest_number": 510, "image": {"bytes": png(), "path": None}},
        ],
        [{"image": {"bytes": png(), "path": "511.png"}}, {"image": {"bytes": png(), "path": "x/510.png"}}],
        [{"image": {"bytes": png(), "path": None}}, {"image": {"bytes": png(), "path": None}}, {"image": {"bytes": png(), "path": None}}],
    ],
    ids=["by number", "by path", "by the order of the descriptions"],
)
def test_cartoons_of_a_parquet_table(tmp_path: Path, rows: list[dict[str, Any]]) -> None:
    table = write_parquet(tmp_path / "train.parquet", [*contest(510), *contest(511)])
    place = write_parquet(tmp_path / "cartoons" / "train-00000-of-00001.parquet", rows)
    split = prepare(tmp_path, table, cartoons=place, scenes=[scenes(tmp_path)]).splits["train"]
    assert {pair.contest: pair.image for pair in split.pairs} == {"510": "images/510.png", "511": "images/511.png"}


def test_cartoons_that_nothing_names_stop(tmp_path: Path) -> None:
    place = write_parquet(tmp_path / "cartoons" / "train.parquet", [{"image": {"bytes": png(), "path": None}}])
    with pytest.raises(DataInvalid, match=r"train.parquet, row 1: nothing says which contest this is"):
        prepare(tmp_path, write_parquet(tmp_path / "train.parquet", contest(510)), cartoons=place)


def published(tmp_path: Path) -> Path:
    """The folders of the public dataset."""
    root = tmp_path / "dataset"
    for name, number in (("train", 510), ("test", 511)):
        write_jsonl(root / "ranking" / f"{name}.jsonl", contest(number))
        described = {"contest_number": number, "canny": f"Scene {number}.", "uncanny": "", "location": "", "entities": ["A"]}
        write_jsonl(root / "gpt4o_description" / f"{name}.jsonl", [described])
        write_parquet(root / "cartoons" / f"{name}-00000-of-00001.parquet", [{"image": {"bytes": png(), "path": None}}])
    (root / "README.md").write_text("the card")
    return root


def test_the_layout_of_the_public_dataset(tmp_path: Path) -> None:
    tables = newyorker_tables([str(published(tmp_path))], None, [], None)
    prepared = prepare_newyorker(tables, OPTIONS, PictureFolder(tmp_path / "out"), Told())
    assert {name: {(pair.image, pair.prompt) for pair in split.pairs} for name, split in prepared.splits.items()} == {
        "train": {("images/510.png", f"{LINE}\nScene: Scene 510.\nEntities: A")},
        "test": {("images/511.png", f"{LINE}\nScene: Scene 511.\nEntities: A")},
    }
    assert len(prepared.inputs) == 6


def test_an_id_is_fetched_from_the_hub_and_read_alike(tmp_path: Path) -> None:
    asked = []

    def fetch(name: str, revision: str | None) -> Path:
        asked.append((name, revision))
        return published(tmp_path)

    tables = newyorker_tables(["owner/captions"], "abc", [], None, fetch)
    assert asked == [("owner/captions", "abc")]
    assert tables == newyorker_tables([str(tmp_path / "dataset")], None, [], None)


def test_what_is_named_goes_before_what_the_dataset_brings(tmp_path: Path) -> None:
    tables = newyorker_tables([str(published(tmp_path))], None, [tmp_path / "mine.csv"], tmp_path / "mine")
    assert (tables.scenes, tables.cartoons) == ([tmp_path / "mine.csv"], tmp_path / "mine")


def test_a_revision_of_local_files_and_a_dataset_of_another_shape_stop(tmp_path: Path) -> None:
    with pytest.raises(DataInvalid, match="a revision needs one dataset id"):
        newyorker_tables([str(tmp_path)], "abc", [], None)
    with pytest.raises(DataInvalid, match="owner/other: the dataset has no folder ranking or 1_rating"):
        newyorker_tables(["owner/other"], None, [], None, lambda name, revision: tmp_path)


def test_progress_is_told_of_files_and_contests(tmp_path: Path) -> None:
    told = Told()
    table = write_parquet(tmp_path / "train.parquet", [*contest(510), *contest(511)])
    prepare_newyorker(Tables([table]), OPTIONS, PictureFolder(tmp_path / "out"), told)
    assert told.steps == [("reading train.parquet", None), ("sampling pairs", 2)]
    assert told.advanced == [8, 1, 1]
