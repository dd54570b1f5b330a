"""Pictures, captions and their tokens: known lengths, nothing seen twice."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from app.artifacts import open_artifact
from app.bench.workload import PROMPT, SIZE, WORDS, Workload, draw_image, part_of, renamed, reopened
from app.encoding import Encoder, load_encoder
from app.errors import ItemRejected
from app.geometry import write_artifact
from tests.test_geometry import TINY
from tests.tiny import LIMITS


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Encoder:
    artifact: Path = write_artifact(TINY, tmp_path_factory.mktemp("workload") / "artifact")
    return load_encoder(open_artifact(str(artifact), offline=True))


def test_tokens_of_the_measured_group(encoder: Encoder) -> None:
    """About those of a described cartoon: 258 shared, 176 of them the image's, and 24 to 45 of a caption's own."""
    group = Workload(encoder, LIMITS).encode(Workload(encoder, LIMITS).request(8))
    assert group.image is not None
    assert group.image.num_tokens == 176
    assert group.num_prefix == pytest.approx(258, abs=3)
    own = [len(row) - group.num_prefix for row in group.rows]
    assert own == [own[0] + 3 * number for number in range(8)]
    assert own[0] == pytest.approx(24, abs=2)


def test_a_word_is_a_token(encoder: Encoder) -> None:
    image = Workload(encoder, LIMITS).encode_image(draw_image(0))
    bare, *filled = Workload(encoder, LIMITS).encode_for(image, ["a", *(f"a {word}" for word in WORDS)]).rows
    assert {len(row) - len(bare) for row in filled} == {1}


def test_nothing_comes_twice_and_everything_again_from_the_same_seed(encoder: Encoder) -> None:
    one, other = Workload(encoder, LIMITS, seed=1), Workload(encoder, LIMITS, seed=1)
    first, second = one.request(8), one.request(8)
    assert first.image != second.image
    assert not set(first.captions) & set(second.captions)
    assert (other.request(8), other.request(8)) == (first, second)
    known = one.request(8, first)
    assert known.image == first.image
    assert not set(known.captions) & set(first.captions)


def test_a_drawing_is_a_picture_of_the_size(tmp_path: Path) -> None:
    (tmp_path / "one.png").write_bytes(draw_image(3))
    with Image.open(tmp_path / "one.png") as picture:
        assert picture.size == SIZE
        assert np.asarray(picture).std() > 5


def test_a_renamed_group_is_the_same_to_the_model_and_new_to_caches(encoder: Encoder) -> None:
    workload = Workload(encoder, LIMITS)
    group = workload.encode(workload.request(2))
    other = renamed(group, "x")
    assert other.key != group.key
    assert other.key[1] == group.key[1]
    assert other.image is not None
    assert group.image is not None
    assert other.image.image_id == other.key[0] != group.image.image_id
    assert other.image.patches is group.image.patches
    assert all(np.array_equal(one, two) for one, two in zip(other.rows, group.rows, strict=True))


def test_a_reopened_group_has_a_new_prefix_and_a_known_picture(encoder: Encoder) -> None:
    workload = Workload(encoder, LIMITS)
    group = workload.encode(workload.request(2))
    other = reopened(group, "x")
    assert other.key != group.key
    assert other.key[1] == group.key[1]
    assert other.image is group.image
    assert other.rows is group.rows


def test_a_part_keeps_captions_with_their_prefixes(encoder: Encoder) -> None:
    workload = Workload(encoder, LIMITS)
    group = workload.encode(workload.request(4))
    part = part_of(group, 1, 3)
    assert [row.tolist() for row in part.rows] == [row.tolist() for row in group.rows[1:3]]
    assert part.row_prefixes == group.row_prefixes[1:3]


def test_what_the_artifact_refuses_is_told(encoder: Encoder) -> None:
    workload = Workload(encoder, LIMITS)
    with pytest.raises(ItemRejected, match="longer than 80 tokens"):
        workload.encode_for(workload.encode_image(draw_image(0)), ["dog " * 100], PROMPT)
