"""Pairs to groups: what shares a prefix is together, in the order that splits again."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from app.encoding import Encoder
from tests.training.tiny_run import TinyRun
from training.collation import Collator, leave_out_unfit
from training.pairs import DataInvalid, Pair, read_pairs
from training.trainee import make_trainee


@pytest.fixture(scope="module")
def encoder_of_run(tiny: TinyRun, tmp_path_factory: pytest.TempPathFactory) -> Encoder:
    return make_trainee(tiny.recipe(), tmp_path_factory.mktemp("run")).encoder


def pair(number: int, image: str | None, prompt: str | None = None, gap: float | None = None) -> Pair:
    return Pair(str(number), "a", image, prompt, f"chosen {number}", f"rejected {number}", mean_gap=gap)


def texts(encoder: Encoder, rows: tuple[np.ndarray, ...]) -> list[str]:
    return [encoder._plain.decode(row.tolist()) for row in rows]


def test_pairs_of_one_image_and_prompt_are_one_group(tiny: TinyRun, encoder_of_run: Encoder) -> None:
    pairs = [pair(0, "images/0.png", gap=0.1), pair(1, "images/1.png", gap=0.2), pair(2, "images/0.png"), pair(3, "images/0.png", "Why?")]
    batch = Collator(encoder_of_run, pairs, tiny.data).collate([0, 1, 2, 3])
    assert [len(group.rows) for group in batch.groups] == [4, 2, 2]
    first = texts(encoder_of_run, batch.groups[0].rows)
    assert [
        text.count(f"{kind} {number}")
        for text, kind, number in zip(first, ("chosen", "chosen", "rejected", "rejected"), (0, 2, 0, 2), strict=True)
    ] == [1] * 4
    assert batch.gaps == (0.1, None, 0.2, None)
    assert batch.groups[0].key != batch.groups[2].key


def test_batches_come_ahead_and_in_order(tiny: TinyRun, encoder_of_run: Encoder) -> None:
    pairs = [pair(number, None, gap=float(number)) for number in range(20)]
    batches = [[number, number + 1] for number in range(0, 20, 2)]
    found = list(Collator(encoder_of_run, pairs, tiny.data).ahead(batches))
    assert [batch.gaps for batch in found] == [(float(number), float(number + 1)) for number in range(0, 20, 2)]


def test_a_cache_too_small_for_a_picture_changes_nothing(tiny: TinyRun, encoder_of_run: Encoder) -> None:
    pairs = read_pairs(tiny.data / "pairs_train.parquet")
    small = Collator(encoder_of_run, pairs, tiny.data, max_cached_bytes=1).collate(range(8))
    large = Collator(encoder_of_run, pairs, tiny.data).collate(range(8))
    for one, other in zip(small.groups, large.groups, strict=True):
        assert one.image is not None
        assert other.image is not None
        assert np.array_equal(one.image.patches, other.image.patches)


def test_a_pair_that_cannot_be_encoded_is_named(tiny: TinyRun, encoder_of_run: Encoder) -> None:
    bad = Pair("number seven", "a", None, None, "fine", "long " * 200)
    with pytest.raises(DataInvalid, match="number seven"):
        Collator(encoder_of_run, [bad], tiny.data).collate([0])


@pytest.mark.parametrize("content", [None, b"no picture"])
def test_a_picture_that_cannot_be_read_is_named(tmp_path: Path, encoder_of_run: Encoder, content: bytes | None) -> None:
    (tmp_path / "images").mkdir()
    if content is not None:
        (tmp_path / "images" / "0.png").write_bytes(content)
    with pytest.raises(DataInvalid, match=r"images/0\.png"):
        Collator(encoder_of_run, [pair(0, "images/0.png")], tmp_path).collate([0])
    with pytest.raises(DataInvalid, match=r"images/0\.png"):
        leave_out_unfit(encoder_of_run, [pair(0, "images/0.png")], tmp_path, None)


def test_cut_prompts_are_counted(tiny: TinyRun, encoder_of_run: Encoder) -> None:
    pairs = [pair(0, None, "word " * 400), pair(1, None, "word " * 400), pair(2, None)]
    assert leave_out_unfit(encoder_of_run, pairs, tiny.data, None).num_cut_prompts == 2
