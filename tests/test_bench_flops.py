"""The count of floating-point operations against torch's own counter, and each way's by what it leaves out."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import Qwen3VLConfig

from app.attention import GroupSpan, visibility
from app.bench.flops import Shapes, padded_flops, plain_flops, shared_flops, vision_flops, window_pairs
from app.bench.ways import score_padded
from app.bench.workload import part_of
from app.contracts import EncodedGroup
from app.encoding import Encoder
from app.errors import SettingsInvalid
from app.geometry import GEOMETRIES, Limits, base_config, write_artifact
from app.model import LoadedModel
from app.scoring import score_plain
from tests.test_geometry import SPECIAL, TINY, TINY_QWEN3, TINY_TEXT
from tests.tiny import encode, encode_text, load_whole

CAPTIONS = ("the dog said no", "a cat on the moon", "is it the lawyer or the octopus")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> tuple[Encoder, LoadedModel]:
    artifact: Path = write_artifact(TINY, tmp_path_factory.mktemp("flops") / "artifact")
    return load_whole(artifact, device="cpu", dtype="float32")


def shapes_of(loaded: LoadedModel) -> Shapes:
    return Shapes.of(loaded.model.backbone.config)


def counted(work: object) -> int:
    """By torch, which sees attention's two products only where they are made of plain ones."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        work()  # type: ignore[operator]
    return int(counter.get_total_flops())


def unseen(shapes: Shapes, lengths: list[int]) -> int:
    """What torch counts and we do not: pairs above the diagonal."""
    above = sum(length * (length - 1) // 2 for length in lengths)
    return 4 * above * shapes.layers * shapes.heads * shapes.head_dim


@pytest.mark.parametrize("size", [(448, 308), (168, 112)])
def test_the_plain_way_as_torch_counts_it(tiny: tuple[Encoder, LoadedModel], size: tuple[int, int]) -> None:
    encoder, loaded = tiny
    group, shapes = encode(encoder, size, 0, CAPTIONS), shapes_of(loaded)
    found = counted(lambda: score_plain(loaded.model, [group]))
    assert found == plain_flops(shapes, group) + unseen(shapes, [len(row) for row in group.rows])


def test_the_padded_batch_as_torch_counts_it(tiny: tuple[Encoder, LoadedModel]) -> None:
    encoder, loaded = tiny
    group, shapes = encode(encoder, (448, 308), 0, CAPTIONS), shapes_of(loaded)
    longest = max(len(row) for row in group.rows)
    found = counted(lambda: score_padded(loaded.model, [group]))
    assert found == padded_flops(shapes, group) + unseen(shapes, [longest] * 3)


def test_the_shared_prefix_by_hand(tiny: tuple[Encoder, LoadedModel]) -> None:
    """Two layers: the first whole, of the last keys and values, and queries, output and feed-forward of the pooled tokens alone."""
    encoder, loaded = tiny
    group, shapes = encode(encoder, (448, 308), 0, CAPTIONS), shapes_of(loaded)
    own = [len(row) - group.num_prefix for row in group.rows]
    num_tokens = group.num_prefix + sum(own)
    pairs = int(visibility(GroupSpan(0, group.num_prefix, tuple(own)), torch.device("cpu")).sum())
    linear = 64 * (64 + 32 + 32 + 64) + 3 * 64 * 96
    first = 2 * num_tokens * linear + 4 * pairs * 64
    last = 2 * num_tokens * 64 * 64 + 2 * 3 * (linear - 64 * 64) + 4 * sum(map(len, group.rows)) * 64
    assert group.image is not None
    expected = first + last + 2 * 3 * 64 + vision_flops(shapes, group.image.grid_thw)
    assert shared_flops(shapes, group, num_known=0) == expected


def test_what_is_known_is_not_counted(tiny: tuple[Encoder, LoadedModel]) -> None:
    """A warm group costs its captions: groups of one add up to the whole, which cold ones do not."""
    encoder, loaded = tiny
    group, shapes = encode(encoder, (448, 308), 0, CAPTIONS), shapes_of(loaded)
    parts = [part_of(group, index, index + 1) for index in range(3)]
    assert sum(shared_flops(shapes, part, num_known=part.num_prefix) for part in parts) == shared_flops(
        shapes, group, num_known=group.num_prefix
    )
    saved = sum(shared_flops(shapes, part, num_known=0) for part in parts) - shared_flops(shapes, group, num_known=0)
    prefix = shared_flops(shapes, group, num_known=0) - shared_flops(shapes, group, num_known=group.num_prefix)
    assert saved == 2 * prefix


def test_a_known_beginning_is_counted_as_keys_and_values_to_look_at(tiny: tuple[Encoder, LoadedModel]) -> None:
    """17 of the prefix known: 17 tokens less in the first layer and, keys and values alone, in the last; their own pairs are gone."""
    encoder, loaded = tiny
    group, shapes = encode(encoder, (448, 308), 0, CAPTIONS), shapes_of(loaded)
    linear = 64 * (64 + 32 + 32 + 64) + 3 * 64 * 96
    saved = 2 * 17 * (linear + 64 * 64) + 4 * (17 * 18 // 2) * 64
    assert shared_flops(shapes, group, num_known=0) - shared_flops(shapes, group, num_known=17) == saved


@pytest.mark.parametrize("grid", [(1, 22, 32), (1, 16, 16), (1, 6, 10), (1, 34, 18)])
def test_windows_are_those_of_the_vision_tower(tiny: tuple[Encoder, LoadedModel], grid: tuple[int, int, int]) -> None:
    from transformers.vision_utils import get_vision_window_index

    shapes = shapes_of(tiny[1])
    _, bounds = get_vision_window_index(torch.tensor([grid]), spatial_merge_size=2, window_size=112, patch_size=14)
    lengths = np.diff(np.unique(np.asarray(bounds)))
    assert int((lengths**2).sum()) == window_pairs(grid[1] // 2, grid[2] // 2, shapes.window, 4)


def test_the_whole_geometry_in_numbers() -> None:
    """A cold group of 8 at 258 + 24..45 tokens is 3.9 TFLOP on 3B: what the machine's rate is divided into."""
    shapes = Shapes.of(base_config(GEOMETRIES["qwen2.5-vl-3b"], SPECIAL))
    rows = tuple(np.arange(258 + 24 + 3 * number) for number in range(8))
    group = EncodedGroup(("", b""), None, rows, 258)
    assert vision_flops(shapes, (1, 22, 32)) == pytest.approx(0.93e12, rel=0.02)
    assert shared_flops(shapes, group, num_known=0) + vision_flops(shapes, (1, 22, 32)) == pytest.approx(3.9e12, rel=0.02)


def test_text_alone_as_torch_counts_it(tmp_path: Path) -> None:
    encoder, loaded = load_whole(write_artifact(TINY_TEXT, tmp_path / "artifact", limits=Limits(400, 64)), device="cpu", dtype="float32")
    group, shapes = encode_text(encoder, CAPTIONS, "why is the dog on the moon"), shapes_of(loaded)
    lengths = [len(row) for row in group.rows]
    assert counted(lambda: score_plain(loaded.model, [group])) == plain_flops(shapes, group) + unseen(shapes, lengths)
    padded = padded_flops(shapes, group) + unseen(shapes, [max(lengths)] * 3)
    assert counted(lambda: score_padded(loaded.model, [group])) == padded


def test_heads_of_their_own_size_are_counted() -> None:
    """Four heads of 32 on a hidden size of 64: queries and output of 128, keys and values of 64."""
    shapes = Shapes.of(base_config(TINY_QWEN3, {}))
    assert shapes.weights_per_layer == 64 * (128 + 64 + 64 + 128) + 3 * 64 * 96
    assert (shapes.vision_layers, shapes.vision_hidden) == (0, 0)


def test_a_conversation_by_hand() -> None:
    """8 responses of 64 tokens to 400 on Qwen2.5-1.5B, 46.8 million weights a layer: 3,712 tokens by themselves, 912 shared, 512 warm.

    A response sees the conversation and its own beginning. Of the last layer: keys and values of all, the rest of 8 pooled tokens.
    """
    shapes = Shapes.of(base_config(GEOMETRIES["qwen2.5-1.5b"], {}))
    group = EncodedGroup(("", b""), None, (np.arange(464),) * 8, 400)
    keys_values = 2 * 1536 * 256
    layer = 2 * 1536 * 1536 + keys_values + 3 * 1536 * 8960
    head = 2 * 8 * 1536
    assert plain_flops(shapes, group) == 28 * (2 * 3712 * layer + 8 * 4 * (464 * 465 // 2) * 1536) + head
    last = 2 * 8 * (layer - keys_values) + 8 * 4 * 464 * 1536
    own = 8 * (64 * 65 // 2 + 64 * 400)
    cold = 27 * (2 * 912 * layer + 4 * (400 * 401 // 2 + own) * 1536) + 2 * 912 * keys_values + last + head
    warm = 27 * (2 * 512 * layer + 4 * own * 1536) + 2 * 512 * keys_values + last + head
    assert shared_flops(shapes, group, num_known=0) == cold
    assert shared_flops(shapes, group, num_known=400) == warm
    assert plain_flops(shapes, group) / cold == pytest.approx(4.2, abs=0.1)
    assert plain_flops(shapes, group) / warm == pytest.approx(7.5, abs=0.1)


def test_the_work_of_another_family_that_sees_is_not_guessed() -> None:
    with pytest.raises(SettingsInvalid, match=r"counts the work of a Qwen2\.5-VL or of a text-only model, this one's base is 'qwen3_vl'"):
        Shapes.of(Qwen3VLConfig())
