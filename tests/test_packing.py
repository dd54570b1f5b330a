"""Packing: bookkeeping of rows and costs, merging of equal work, and sequences without a picture."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from app.contracts import EncodedGroup, EncodedImage
from app.encoding import Encoder, positions
from app.model import LoadedModel
from app.packing import Packed, pack
from app.scoring import score_plain, score_shared
from tests.tiny import encode

PAD = 5
CPU = torch.device("cpu")
Rows = tuple[tuple[int, ...], ...]


def text_group(rows: Rows, prompt: bytes = b"p") -> EncodedGroup:
    return EncodedGroup(("", prompt), None, tuple(np.asarray(row, dtype=np.int64) for row in rows), 0)


def packed(groups: list[EncodedGroup]) -> Packed:
    return pack(groups, image_token_id=PAD, merge_size=2, device=CPU)


def unpacked(packed: Packed, index: int) -> tuple[list[int], list[list[int]]]:
    """Ids and positions of one row, read back out of the packed sequence."""
    number, end = 0, int(packed.pooled_index[index])
    for span in packed.layout.spans:
        at = span.start + span.num_prefix
        for length in span.suffix_lengths:
            if number == index:
                assert end == at + length - 1
                where = [*range(span.start, span.start + span.num_prefix), *range(at, at + length)]
                return packed.input_ids[where].tolist(), packed.position_ids[:, 0, where].tolist()
            number, at = number + 1, at + length
    raise IndexError(index)


tokens = st.integers(10, 12)
rows = st.lists(st.lists(tokens, min_size=1, max_size=7).map(tuple), min_size=1, max_size=5).map(tuple)


@settings(max_examples=80, deadline=None, derandomize=True)
@given(st.lists(st.tuples(rows, st.sampled_from([b"p", b"q"])), min_size=1, max_size=5))
def test_every_row_can_be_read_back(groups: list[tuple[Rows, bytes]]) -> None:
    result = packed([text_group(*group) for group in groups])
    for group, numbers in zip(groups, result.rows_of, strict=True):
        for row, number in zip(group[0], numbers, strict=True):
            ids, places = unpacked(result, number)
            assert ids == list(row)
            assert places == positions(np.asarray(row), None, PAD, 2).tolist()
    distinct = {(prompt, row) for found, prompt in groups for row in found}
    assert len(result.pooled_index) == len(distinct)
    assert sum(result.num_computed) == result.num_tokens
    assert len(result.layout.spans) == len({prompt for _, prompt in groups})


def test_costs_fall_to_whoever_came_first() -> None:
    groups = [
        text_group(((7, 8, 9), (7, 8, 6, 6))),
        text_group(((7, 8, 9),)),
        text_group(((7, 8, 4), (7, 8, 9))),
        text_group(((7, 8),), b"q"),
    ]
    result = packed(groups)
    # shared (7, 8); rows in the order of their bytes: 4 | 6 6 | 9, and in the other prompt 7 | 8
    assert result.input_ids.tolist() == [7, 8, 4, 6, 6, 9, 7, 8]
    assert result.rows_of == ((2, 1), (2,), (0, 2), (3,))
    assert result.num_computed == (5, 0, 1, 2)
    assert result.pooled_index.tolist() == [2, 4, 5, 7]


def test_a_row_that_begins_another_keeps_a_token_of_its_own() -> None:
    result = packed([text_group(((7, 8), (7, 8, 9)))])
    assert result.layout.spans[0].num_prefix == 1
    assert result.input_ids.tolist() == [7, 8, 8, 9]


def test_groups_without_pictures_score_as_alone(encoder: Encoder, loaded: LoadedModel) -> None:
    """A text-only reward model hands the scorer groups without an image."""
    one, two, three = (np.asarray(row, dtype=np.int64) for row in ([40, 41, 42, 50], [40, 41, 43], [60, 61]))
    groups = [EncodedGroup(("", b"a"), None, (one, two), 2), EncodedGroup(("", b"b"), None, (three,), 1)]
    groups.append(encode(encoder, (120, 80), 0, ["beside a picture"]))
    shared, alone = score_shared(loaded.model, groups), score_plain(loaded.model, groups)
    found, expected = (np.concatenate([scores.values for scores in each]) for each in (shared, alone))
    assert np.abs(found - expected).max() <= 1e-5
    assert len(set(found.tolist())) == 4


def count_pixels(loaded: LoadedModel, groups: list[EncodedGroup]) -> tuple[int, int]:
    """Patches and pictures that the vision tower really sees for these groups."""
    seen: list[tuple[int, int]] = []
    handle = loaded.model.backbone.visual.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append((len(args[0]), len(kwargs["grid_thw"]))), with_kwargs=True
    )
    score_shared(loaded.model, groups)
    handle.remove()
    (only,) = seen
    return only


def test_an_equal_picture_is_seen_once(encoder: Encoder, loaded: LoadedModel) -> None:
    one, same, other = (encode(encoder, (120, 80), seed, ["a"], prompt) for seed, prompt in ((0, "x"), (0, "y"), (1, "x")))
    assert one.image is not None
    assert one.image is not same.image
    patches = len(one.image.patches)
    assert count_pixels(loaded, [one]) == (patches, 1)
    assert count_pixels(loaded, [one, same]) == (patches, 1)
    assert count_pixels(loaded, [one, other, same, one]) == (2 * patches, 2)


def test_pictures_reach_their_own_groups(encoder: Encoder, loaded: LoadedModel) -> None:
    sizes = [(120, 80), (60, 200), (120, 80), (300, 300)]
    groups = [
        encode(encoder, size, seed % 3, ["a", "b"], prompt) for seed, (size, prompt) in enumerate(zip(sizes * 2, "xxyyzzxx", strict=True))
    ]
    mixed = score_shared(loaded.model, groups)
    for group, scores in zip(groups, mixed, strict=True):
        (alone,) = score_shared(loaded.model, [group])
        assert np.abs(np.subtract(scores.values, alone.values)).max() <= 1e-5


def test_image_tokens_outside_the_prefix_are_refused() -> None:
    image = EncodedImage("sha256:0", np.zeros((4, 8), np.float32), (1, 2, 2), 1)
    group = EncodedGroup((image.image_id, b"p"), image, (np.asarray([7, 8]), np.asarray([7, PAD])), 1)
    with pytest.raises(ValueError, match="shared prefix"):
        packed([group])
