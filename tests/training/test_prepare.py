"""The command: its output folder, its report, and what it refuses."""

from __future__ import annotations

import hashlib
import io
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from typer.testing import CliRunner, Result

from training.pairs import DataInvalid, Pair, read_captions, read_pairs
from training.prepare import _put_back, app, prepare, refuse_unless_free
from training.sources.pictures import PictureFolder
from training.sources.prepared import Advance, Prepared, Progress, Split, parse_shares
from training.sources.report import report_of


class Silent:
    def begin(self, what: str, total: int | None) -> Advance:
        return lambda number: None


def rating(contest: int, k: int) -> dict[str, Any]:
    """Means 2.9, 2.6, 2.3, .. with errors 0.05, pooled 0.0707: neighbours are 4.24 apart, the next but one 8.49."""
    caption = "x" * (10 + k) + f" {contest}"
    return {"contest_number": contest, "rank": k, "caption": caption, "mean": 2.9 - 0.3 * k, "precision": 0.05, "votes": 50}


def write_lines(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def ratings(tmp_path: Path) -> Path:
    """Two contests of four captions for training, one of three to test, and a caption with too few votes."""
    few = rating(511, 0) | {"caption": "few", "votes": 3}
    write_lines(tmp_path / "in" / "train.jsonl", [*(rating(contest, k) for contest in (510, 511) for k in range(4)), few])
    write_lines(tmp_path / "in" / "test.jsonl", [rating(600, k) for k in range(3)])
    return tmp_path / "in"


@pytest.fixture
def cartoons(tmp_path: Path) -> Path:
    folder = tmp_path / "cartoons"
    folder.mkdir()
    for contest in (510, 511, 600):
        file = io.BytesIO()
        Image.new("RGB", (40, 30), (contest % 256, 0, 0)).save(file, "PNG")
        (folder / f"{contest}.png").write_bytes(file.getvalue())
    return folder


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def newyorker(ratings: Path, out: Path, *more: object) -> Result:
    return run("newyorker", ratings, "--out", out, "--min-captions", "3", *more)


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_the_folder_of_the_contract(tmp_path: Path, ratings: Path, cartoons: Path) -> None:
    out = tmp_path / "deep" / "out"
    result = newyorker(ratings, out, "--cartoons", cartoons)
    assert result.exit_code == 0, result.output
    assert sorted(tree(out)) == [
        *("captions_test.parquet", "captions_train.parquet"),
        *("images/510.png", "images/511.png", "images/600.png"),
        *("pairs_test.parquet", "pairs_train.parquet", "report.json", "report.md"),
    ]
    pairs = read_pairs(out / "pairs_train.parquet")
    assert {(pair.contest, pair.image) for pair in pairs} == {("510", "images/510.png"), ("511", "images/511.png")}
    assert len(read_captions(out / "captions_test.parquet")) == 3
    assert [path.name for path in out.parent.iterdir()] == ["out"]
    assert "written to" in result.output


def test_the_report_counts_what_the_tables_hold(tmp_path: Path, ratings: Path) -> None:
    """Four captions a contest: 3 neighbours at 4.24 sigma, 2 next but one at 8.49, 1 at 12.73; the shorter one always wins.

    Three captions: 2 neighbours and 1 pair at 8.49.
    """
    newyorker(ratings, tmp_path / "out", "--seed", "7")
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    train, test = report["splits"]["train"], report["splits"]["test"]
    assert (train["pairs"], train["contests"], train["pairs_per_contest"]) == (12, 2, {"min": 6, "median": 6, "max": 6})
    assert (train["captions_read"], train["captions_kept"], train["dropped"]) == (9, 8, {"fewer than 10 votes": 1})
    assert train["sigma_gap"] == {"3-4": 0, "4-5": 6, "5-8": 0, "8+": 6}
    assert train["shorter_wins"] == {"pairs": 12, "share": 1.0, "equally_long": 0}
    assert (test["pairs"], test["sigma_gap"]["4-5"], test["sigma_gap"]["8+"]) == (3, 2, 1)
    assert (report["command"], report["seed"], report["arguments"]["min_captions"]) == ("newyorker", 7, 3)
    assert report["inputs"] == {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in ratings.iterdir()}
    assert report["contests_in_two_splits"] == {"train and test": 0}


def test_the_report_reads_as_markdown(tmp_path: Path, ratings: Path) -> None:
    newyorker(ratings, tmp_path / "out")
    text = (tmp_path / "out" / "report.md").read_text()
    assert "|  | train | test |\n" in text
    assert "| pairs | 12 | 3 |\n" in text
    assert "| pairs a contest: min / median / max | 6 / 6 / 6 | 3 / 3 / 3 |\n" in text
    assert "| the shorter caption wins | 12 (100.0%) | 3 (100.0%) |\n" in text
    assert "| dropped: fewer than 10 votes | 1 | 0 |\n" in text
    assert f"- ratings: `['{ratings}']`\n" in text


def test_the_edges_of_the_histogram() -> None:
    """A gap on an edge belongs to the class that begins there; below 3 has a class only when there is one."""
    gaps = [3.0, 3.999, 4.0, 5.0, 7.999, 8.0, 1e9]
    pairs = [Pair(str(k), "510", None, None, "aa", "b", sigma_gap=gap) for k, gap in enumerate(gaps)]
    report = report_of(Prepared({"train": Split(pairs, num_rows=2)}, [], rated=True), "newyorker", {}, 1, {})
    assert report["splits"]["train"]["sigma_gap"] == {"3-4": 2, "4-5": 1, "5-8": 2, "8+": 2}
    below = Prepared({"train": Split([Pair("a", "510", None, None, "a", "b", sigma_gap=2.0)], num_rows=2)}, [], rated=True)
    assert report_of(below, "newyorker", {}, 1, {})["splits"]["train"]["sigma_gap"]["<3"] == 1


def test_the_same_arguments_give_the_same_bytes(tmp_path: Path, ratings: Path) -> None:
    for name in ("one", "two"):
        newyorker(ratings, tmp_path / name, "--max-pairs", "4")
    one, two = tree(tmp_path / "one"), tree(tmp_path / "two")
    tables = [name for name in one if name.endswith(".parquet")]
    assert len(tables) == 4
    assert all(one[name] == two[name] for name in tables)


def test_a_full_folder_is_refused_and_stays(tmp_path: Path, ratings: Path) -> None:
    newyorker(ratings, tmp_path / "out")
    before = tree(tmp_path / "out")
    result = newyorker(ratings, tmp_path / "out")
    assert isinstance(result.exception, DataInvalid)
    assert str(result.exception) == f"{tmp_path / 'out'}: it is not empty; --overwrite replaces it"
    assert tree(tmp_path / "out") == before


def test_overwrite_replaces_all_of_it(tmp_path: Path, ratings: Path, cartoons: Path) -> None:
    newyorker(ratings, tmp_path / "out", "--cartoons", cartoons)
    assert newyorker(ratings, tmp_path / "out", "--overwrite").exit_code == 0
    assert "images/510.png" not in tree(tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cartoons", "in", "out"]


def test_an_empty_folder_is_used(tmp_path: Path, ratings: Path) -> None:
    (tmp_path / "out").mkdir()
    assert newyorker(ratings, tmp_path / "out").exit_code == 0


@pytest.mark.parametrize("report", [None, "{}", "[]", "not json"])
def test_overwrite_spares_a_folder_that_is_not_ours(tmp_path: Path, report: str | None) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.txt").write_text("years of work")
    if report is not None:
        (out / "report.json").write_text(report)
    with pytest.raises(DataInvalid, match=r"--overwrite replaces only a folder that `python -m training.prepare` wrote"):
        refuse_unless_free(out, overwrite=True)


def test_overwrite_spares_its_own_inputs(tmp_path: Path, ratings: Path) -> None:
    newyorker(ratings, tmp_path / "out")
    source = write_lines(tmp_path / "out" / "train.jsonl", [rating(510, k) for k in range(3)])
    result = newyorker(source, tmp_path / "out", "--overwrite")
    assert str(result.exception) == f"{source}: an input lies in the output folder, which would be replaced"
    assert source.exists()


def test_a_failure_leaves_the_old_folder_and_nothing_else(tmp_path: Path, ratings: Path) -> None:
    newyorker(ratings, tmp_path / "out")
    before = tree(tmp_path / "out")

    def build(pictures: PictureFolder, progress: Progress) -> Prepared:
        raise DataInvalid("in.jsonl:3: broken")

    with pytest.raises(DataInvalid, match=r"in.jsonl:3: broken"):
        prepare(build, tmp_path / "out", command="jsonl", arguments={}, seed=1, overwrite=True, progress=Silent())
    assert tree(tmp_path / "out") == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "out"]


def test_no_pair_at_all_is_an_error_that_says_where_they_went(tmp_path: Path, ratings: Path) -> None:
    result = run("newyorker", ratings, "--out", tmp_path / "out")
    assert str(result.exception) == ("no pair is left; rows read: 12; contest has fewer than 20 captions left: 11; fewer than 10 votes: 1")
    assert not (tmp_path / "out").exists()


def test_dialogues(tmp_path: Path) -> None:
    asked = "\n\nHuman: Why?\n\nAssistant:"
    source = write_lines(tmp_path / "in" / "test.jsonl", [{"chosen": f"{asked} Because.", "rejected": f"{asked} No."}])
    result = run("hh-rlhf", source, "--out", tmp_path / "out")
    assert result.exit_code == 0, result.output
    (pair,) = read_pairs(tmp_path / "out" / "pairs_test.parquet")
    assert (pair.prompt, pair.chosen, pair.rejected) == (asked, " Because.", " No.")
    assert sorted(tree(tmp_path / "out")) == ["pairs_test.parquet", "report.json", "report.md"]
    assert "captions_kept" not in json.loads((tmp_path / "out" / "report.json").read_text())["splits"]["test"]


def test_lines_with_pictures(tmp_path: Path, cartoons: Path) -> None:
    row = {"id": "a", "prompt": "What is it?", "chosen": "Red.", "rejected": "Blue.", "image": "510.png", "Category": "colour"}
    source = write_lines(tmp_path / "in" / "bench.jsonl", [row])
    result = run("jsonl", source, "--out", tmp_path / "out", "--images", cartoons, "--contest-key", "Category", "--shares", "0,0,1")
    assert result.exit_code == 0, result.output
    (pair,) = read_pairs(tmp_path / "out" / "pairs_test.parquet")
    assert (pair.contest, pair.pair_id) == ("colour", "a")
    assert pair.image is not None
    assert (tmp_path / "out" / pair.image).read_bytes() == (cartoons / "510.png").read_bytes()


def test_a_prompt_in_two_splits_is_reported(tmp_path: Path) -> None:
    asked = "\n\nHuman: Why?\n\nAssistant:"
    for split, answer in (("train", "Because."), ("test", "Who knows.")):
        write_lines(tmp_path / "in" / f"{split}.jsonl", [{"chosen": f"{asked} {answer}", "rejected": f"{asked} No."}])
    run("hh-rlhf", tmp_path / "in", "--out", tmp_path / "out")
    assert json.loads((tmp_path / "out" / "report.json").read_text())["contests_in_two_splits"] == {"train and test": 1}
    assert "Contests in train and test: 1." in (tmp_path / "out" / "report.md").read_text()


@pytest.mark.parametrize("text", ["0.8", "0.8,0.1,x", "0,0,0", "1,-1,1", "inf,0,0", "nan,1,1"])
def test_shares_that_are_none(text: str) -> None:
    with pytest.raises(DataInvalid, match=f"shares '{text}': expected three numbers"):
        parse_shares(text)


def test_shares_need_not_add_up_to_one() -> None:
    assert parse_shares("8, 1,1") == {"train": 8.0, "validation": 1.0, "test": 1.0}


@pytest.mark.parametrize("option", [["--max-pairs", "0"], ["--min-captions", "1"], ["--min-sigma", "-1"], ["--typo", "1"]])
def test_an_option_out_of_range_or_unknown_is_a_usage_error(tmp_path: Path, ratings: Path, option: list[str]) -> None:
    assert run("newyorker", ratings, "--out", tmp_path / "out", *option).exit_code == 2


def test_unusable_data_is_one_line_and_exit_code_3(tmp_path: Path, ratings: Path) -> None:
    """The command itself, in a process of its own."""
    (ratings / "train.jsonl").write_text(json.dumps(rating(510, 0) | {"mean": "high"}) + "\n")
    command = [sys.executable, "-m", "training.prepare", "newyorker", str(ratings), "--out", str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (3, "")
    last = done.stderr.strip().splitlines()[-1]
    assert last == f"training.prepare: {ratings / 'train.jsonl'}:1: mean must be a number, found str"
    assert "Traceback" not in done.stderr


def test_a_run_killed_between_the_renames_loses_nothing(tmp_path: Path) -> None:
    out, old = tmp_path / "data", tmp_path / ".data.old"
    old.mkdir()
    (old / "report.json").write_text("{}")
    _put_back(out)
    assert (out / "report.json").exists()
    assert not old.exists()
    old.mkdir()
    _put_back(out)
    assert not old.exists()
    assert (out / "report.json").exists()
