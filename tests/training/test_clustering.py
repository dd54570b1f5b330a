"""The study of clustering: its pairs are the same for every setting, its tokens are counted, its figures are those of the run."""

from __future__ import annotations

import io
import json
from collections import Counter
from pathlib import Path

import pytest
from rich.console import Console

from tests.tiny import picture
from training.demo.clustering import Setting, Trial, as_table, copy_pairs, read_trial
from training.pairs import DataInvalid, Pair, read_pairs, write_pairs


def pair_of(image: int, number: int) -> Pair:
    return Pair(f"{image}/{number}", f"idea {image}", f"images/{image}.png", None, f"good {number}", f"bad {number}")


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Six pictures with 4 pairs each and one with 3; one held-out pair."""
    folder = tmp_path / "data"
    (folder / "images").mkdir(parents=True)
    for image in range(8):
        (folder / f"images/{image}.png").write_bytes(picture(56, 56, seed=image))
    pairs = [pair_of(image, number) for image in range(7) for number in range(3 if image == 6 else 4)]
    write_pairs(folder / "pairs_train.parquet", pairs)
    write_pairs(folder / "pairs_validation.parquet", [pair_of(7, 0)])
    return folder


def test_a_copy_has_so_many_pairs_of_every_picture(source: Path, tmp_path: Path) -> None:
    """16 pairs, 4 a picture: 4 of the 6 pictures that have them, each with its file."""
    copy_pairs(source, tmp_path / "copy", 16, pairs_per_picture=4)
    pairs = read_pairs(tmp_path / "copy" / "pairs_train.parquet")
    assert sorted(Counter(pair.image for pair in pairs).values()) == [4] * 4
    assert set(pairs) <= set(read_pairs(source / "pairs_train.parquet"))
    assert read_pairs(tmp_path / "copy" / "pairs_validation.parquet") == [pair_of(7, 0)]


def test_more_pairs_than_there_are_is_refused(source: Path, tmp_path: Path) -> None:
    with pytest.raises(DataInvalid, match=r"6 pictures with 4 pairs, and 28 pairs need 7"):
        copy_pairs(source, tmp_path / "copy", 28, pairs_per_picture=4)


def test_a_trial_is_the_last_validation_and_the_median_speed_after_the_warm_up(tmp_path: Path) -> None:
    """Steps 1 to 5 are left out; the median of 10, 20, 90 is 20."""
    speeds = [1.0, 1.0, 1.0, 1.0, 1.0, 90.0, 10.0, 20.0]
    lines = [{"step": step, "loss": 0.5, "pairs_per_s": speed} for step, speed in enumerate(speeds, start=1)]
    lines += [{"step": 4, "validation_accuracy": 0.5}, {"step": 8, "validation_accuracy": 0.75}]
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert read_trial(path) == Trial(accuracy=0.75, pairs_per_s=20.0)


def test_the_table_shows_mean_and_spread() -> None:
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(as_table([Setting(4, 72.04, [Trial(0.9, 50.0), Trial(0.96, 70.0)])], 480))
    row = next(line for line in console.export_text().splitlines() if "72.0" in line)
    assert [cell.strip() for cell in row.split("│")[1:-1]] == ["4", "72.0", "60.0", "0.930", "0.900 .. 0.960"]
