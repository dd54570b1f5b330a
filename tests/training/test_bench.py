"""The speed table's arithmetic on small shapes: both ways do the same work and give the same gradients."""

from __future__ import annotations

from dataclasses import replace

import pytest
import typer

from app.geometry import Geometry
from training.bench import Timing, as_dict, build_model, make_groups, measure, pad_groups, read_grid, table_of

SMALL = Geometry(
    *(2, 2),
    hidden=64,
    heads=4,
    kv_heads=2,
    intermediate=96,
    vocabulary=500,
    vision_hidden=48,
    vision_heads=4,
    vision_intermediate=64,
    mrope_section=(2, 3, 3),
)


@pytest.mark.parametrize("pairs_per_image", [1, 2, 4])
def test_both_ways_give_the_same_gradients(pairs_per_image: int) -> None:
    model = build_model(SMALL)
    groups = make_groups(4, pairs_per_image, (4, 6), SMALL.image_token_id)
    reports: list[None] = []
    timing = measure(model, groups, pairs_per_image, 1, lambda: reports.append(None))
    assert timing.gradient_difference < 1e-4
    assert len(reports) == 4
    assert timing.padded_s > 0
    assert timing.shared_s > 0


def test_tokens_by_hand() -> None:
    """Prefix 16 + 24 + 60 = 100; one picture's 4 pairs: 100 and 8 suffixes shared, 8 rows of the longest padded."""
    model = build_model(SMALL)
    (group,) = make_groups(4, 4, (4, 6), SMALL.image_token_id)
    suffixes = [len(row) - 100 for row in group.rows]
    assert group.num_prefix == 100
    assert all(25 <= length <= 45 for length in suffixes)
    timing = measure(model, [group], 4, 1, lambda: None)
    assert timing.num_shared_tokens == 100 + sum(suffixes)
    assert timing.num_padded_tokens == 8 * (100 + max(suffixes))
    batch, num_padded = pad_groups(model, [group])
    assert batch["input_ids"].numel() == num_padded
    assert batch["image_grid_thw"].shape[0] == 8


AGREED = Timing(1, 1000, 500, 3.0, 1.5, 1.8, 1e-6)


def test_no_ratio_is_told_when_gradients_disagree() -> None:
    assert as_dict(AGREED)["ratio"] == 2.0
    assert table_of([AGREED], 4, "here").columns[5]._cells == ["2.00"]
    other = replace(AGREED, gradient_difference=0.1)
    assert (as_dict(other)["ratio"], as_dict(other)["slowest_ratio"]) == (None, None)
    assert table_of([other], 4, "here").columns[5]._cells == ["refused"]


@pytest.mark.parametrize("text", ["11", "11x", "0x4", "11x16x3", "a x b"])
def test_a_grid_is_two_numbers(text: str) -> None:
    assert read_grid("11x16") == (11, 16)
    with pytest.raises(typer.BadParameter):
        read_grid(text)
