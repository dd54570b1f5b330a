"""The vision tower on one picture against transformers' `get_image_features`, and the geometry ours keeps."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import get_vision_position_ids, get_vision_window_index

from app.artifacts import Artifact, open_artifact
from app.bases import load_backbone
from app.layers import prepack
from app.model import RewardModel, load_model
from app.vision import PlainTower, VisionTower, patch_positions, tower_of, windows_of
from tests.tiny import VISION_FAMILIES, VisionFamily

VALUES = 3 * 2 * 14 * 14
HEAD_DIM = 12
GridThw = tuple[int, int, int]
quick = settings(max_examples=30, deadline=None, derandomize=True)
sides = st.integers(1, 7).map(lambda tokens: 2 * tokens)
grids = st.tuples(st.just(1), sides, sides)


@pytest.fixture(scope="module")
def models(artifact: Artifact) -> dict[str, RewardModel]:
    """One untouched, one with prepacked layers, in float32."""
    found = {"plain": load_model(artifact, dtype="float32").model, "prepacked": load_model(artifact, dtype="float32").model}
    prepack(found["prepacked"].backbone)
    return found


def patches_of(grid: GridThw, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(grid[0] * grid[1] * grid[2], VALUES, generator=generator)


def expected(model: RewardModel, patches: Tensor, grid: GridThw) -> Tensor:
    with torch.inference_mode():
        return torch.cat(list(model.backbone.get_image_features(patches, torch.tensor([grid])).pooler_output))


def found(model: RewardModel, patches: Tensor, grid: GridThw) -> Tensor:
    with torch.inference_mode():
        return VisionTower(model.backbone.visual).features(patches, grid)


@quick
@given(grid=grids, seed=st.integers(0, 9), kind=st.sampled_from(["plain", "prepacked"]))
@example(grid=(1, 2, 2), seed=0, kind="plain")  # one merged token
@example(grid=(1, 2, 14), seed=1, kind="prepacked")  # one row, wider than the window
@example(grid=(1, 14, 2), seed=2, kind="prepacked")
@example(grid=(1, 4, 4), seed=3, kind="plain")  # exactly one window
@example(grid=(1, 8, 12), seed=4, kind="prepacked")  # whole windows only
@example(grid=(1, 6, 10), seed=5, kind="prepacked")  # windows cut at both edges
def test_features_are_those_of_transformers(models: dict[str, RewardModel], grid: GridThw, seed: int, kind: str) -> None:
    """A window of the tiny tower is two merged tokens wide: 56 pixels, patches of 14, two of them merged."""
    patches = patches_of(grid, seed)
    wanted, got = expected(models["plain"], patches, grid), found(models[kind], patches, grid)
    assert got.shape == (len(patches) // 4, 64)
    assert float((got - wanted).abs().max()) <= 1e-5 * max(1.0, float(wanted.abs().max()))
    assert len(got) < 2 or float(wanted.std(0).max()) > 1e-3  # tokens differ, so that their order is seen


def test_features_in_bfloat16_are_as_near_as_those_of_transformers(artifact: Artifact, models: dict[str, RewardModel]) -> None:
    """Both differ from float32 by rounding; ours by no more than half as much again."""
    model = load_model(artifact, dtype="bfloat16").model
    for grid in [(1, 6, 10), (1, 2, 14), (1, 12, 8)]:
        patches = patches_of(grid)
        exact, theirs = expected(models["plain"], patches, grid), expected(model, patches, grid).float()
        ours = found(model, patches, grid)
        assert ours.dtype == torch.bfloat16
        assert float((ours.float() - exact).norm()) <= 1.5 * float((theirs - exact).norm())
        assert float((ours.float() - exact).norm()) <= 0.03 * float(exact.norm())


def test_features_do_not_depend_on_what_was_computed_before(models: dict[str, RewardModel]) -> None:
    """Bit for bit: one tower in any order, and a new one for each picture."""
    chosen: list[GridThw] = [(1, 2, 2), (1, 6, 10), (1, 10, 6), (1, 4, 4)]
    pictures = {(grid, seed): patches_of(grid, seed) for grid in chosen for seed in (0, 1)}
    alone = {key: found(models["prepacked"], patches, key[0]) for key, patches in pictures.items()}
    tower = VisionTower(models["prepacked"].backbone.visual)
    for order in (list(pictures), list(pictures)[::-1], list(pictures) * 2):
        for key in order:
            with torch.inference_mode():
                assert torch.equal(tower.features(pictures[key], key[0]), alone[key])
    assert not torch.equal(alone[chosen[1], 0], alone[chosen[1], 1])


def test_pictures_of_equal_size_but_other_shape_are_told_apart(models: dict[str, RewardModel]) -> None:
    patches = patches_of((1, 4, 12))
    features = [found(models["plain"], patches, grid) for grid in [(1, 4, 12), (1, 12, 4), (1, 6, 8)]]
    assert all(float((one - other).abs().max()) > 1e-3 for one, other in itertools.combinations(features, 2))


def test_patches_are_not_written_to(models: dict[str, RewardModel]) -> None:
    patches = patches_of((1, 6, 6))
    kept = patches.clone()
    found(models["prepacked"], patches, (1, 6, 6))
    assert torch.equal(patches, kept)


def test_a_shortened_tower_runs_one_block_of_each_kind(models: dict[str, RewardModel]) -> None:
    visual = models["plain"].backbone.visual
    tower, short = VisionTower(visual), VisionTower(visual).shortened()
    assert 0 < len(visual.fullatt_block_indexes) < len(visual.blocks)
    assert sorted(is_whole for _, is_whole in short._blocks) == [False, True]
    assert all(block in [each for each, _ in tower._blocks] for block, _ in short._blocks)
    with torch.inference_mode():
        assert short.features(patches_of((1, 6, 6)), (1, 6, 6)).shape == (9, 64)


# Geometry


def test_the_geometry_that_is_kept_is_bounded_by_bytes(models: dict[str, RewardModel]) -> None:
    """Small ones stay, a large one pushes them out, one larger than all of it is used and not kept; the features are the same."""
    visual = models["plain"].backbone.visual
    small: list[GridThw] = [(1, 2, 2), (1, 2, 4), (1, 4, 2)]
    sizes = {grid: VisionTower(visual)._grid(grid).num_bytes for grid in [*small, (1, 12, 12), (1, 40, 40)]}
    assert 200 * sizes[1, 2, 2] < sizes[1, 40, 40]
    tower = VisionTower(visual, max_grid_bytes=sizes[1, 12, 12])
    for grid in [*small, (1, 40, 40)]:
        with torch.inference_mode():
            assert torch.equal(tower.features(patches_of(grid), grid), found(models["plain"], patches_of(grid), grid))
    assert list(tower._grids) == small
    assert tower._grid(small[0]) is tower._grid(small[0])
    tower._grid((1, 12, 12))
    assert list(tower._grids) == [(1, 12, 12)]
    assert tower._grids.currsize <= sizes[1, 12, 12]


def test_the_bytes_of_a_grid_by_hand(models: dict[str, RewardModel]) -> None:
    """One merged token of four patches: two indices, cosine and sine of half a head for each patch, two times two pairs of bounds."""
    grid = VisionTower(models["plain"].backbone.visual)._grid((1, 2, 2))
    assert grid.cos.shape == (4, 1, HEAD_DIM // 2)
    assert grid.num_bytes == 2 * 8 + 2 * 4 * (HEAD_DIM // 2) * 4 + 2 * 2 * 2 * 4


@quick
@given(grid=grids, side=st.integers(1, 5))
def test_every_token_stands_in_exactly_one_window_and_windows_are_those_of_transformers(grid: GridThw, side: int) -> None:
    windows = windows_of(grid, 2, side)
    assert sorted(torch.cat(windows).tolist()) == list(range(grid[0] * grid[1] * grid[2] // 4))
    assert [len(window) for window in windows] == sorted((len(window) for window in windows), reverse=True)
    order, bounds = get_vision_window_index(torch.tensor([grid]), 2, side * 28, 14)
    theirs = order.split([length // 4 for length in bounds.diff().tolist()])
    assert sorted(window.tolist() for window in windows) == sorted(window.tolist() for window in theirs)


def test_windows_by_hand() -> None:
    """Three rows and three columns of tokens in windows of two: one whole, two halves, one corner."""
    assert [window.tolist() for window in windows_of((1, 6, 6), 2, 2)] == [[0, 1, 3, 4], [2, 5], [6, 7], [8]]


@quick
@given(grid=grids)
def test_positions_are_those_of_transformers(grid: GridThw) -> None:
    assert torch.equal(patch_positions(grid, 2), get_vision_position_ids(torch.tensor([grid]), 2))


def test_positions_by_hand() -> None:
    """The four patches of a merged token follow each other."""
    found = patch_positions((1, 2, 4), 2).tolist()
    assert found == [[0, 0], [0, 1], [1, 0], [1, 1], [0, 2], [0, 3], [1, 2], [1, 3]]


@pytest.mark.parametrize("grid", [(2, 6, 10), (1, 4, 4)])
@pytest.mark.parametrize("family", VISION_FAMILIES)
def test_films_and_patches_of_another_grid_are_refused(
    published_of: Callable[[VisionFamily], Path], family: VisionFamily, grid: tuple[int, int, int]
) -> None:
    tower = tower_of(load_backbone(open_artifact(str(published_of(family))), torch.float32))
    with pytest.raises(ValueError, match="one picture"):
        tower.features(torch.zeros(36, tower.num_patch_values), grid)


# Towers that we have no forward of


PICTURES: list[GridThw] = [(1, 6, 10), (1, 2, 2), (1, 10, 6)]


@pytest.mark.parametrize(("family", "num_layers", "side"), [("qwen2_vl", 0, 14), ("qwen3_vl", 2, 16)])
def test_a_plain_tower_computes_one_picture_as_transformers_computes_several(
    published_of: Callable[[VisionFamily], Path], family: VisionFamily, num_layers: int, side: int
) -> None:
    """With DeepStack the features of its layers stand beside those of the end, in the order of the layers."""
    backbone = load_backbone(open_artifact(str(published_of(family))), torch.float32).eval()
    tower = tower_of(backbone)
    assert isinstance(tower, PlainTower)
    assert (tower.num_patch_values, tower.merge_size, tower.shortened()) == (3 * 2 * side * side, 2, tower)
    generator = torch.Generator().manual_seed(0)
    pictures = [torch.randn(math.prod(grid), tower.num_patch_values, generator=generator) for grid in PICTURES]
    with torch.inference_mode():
        together = backbone.get_image_features(torch.cat(pictures), torch.tensor(PICTURES))
        layers = [together.pooler_output, *(together.deepstack_features if num_layers else ())]
        assert len(layers) == 1 + num_layers
        for number, (patches, grid) in enumerate(zip(pictures, PICTURES, strict=True)):
            expected = torch.cat([features[number] for features in layers], dim=1)
            got = tower.features(patches, grid)
            assert got.shape == (len(patches) // 4, 64 * (1 + num_layers))
            assert float((got - expected).abs().max()) <= 1e-5 * float(expected.abs().max())
            assert len(got) < 2 or float(expected.std(0).min()) > 1e-3  # tokens differ, in every layer


def test_the_tower_we_know_is_computed_by_ours(models: dict[str, RewardModel]) -> None:
    assert isinstance(tower_of(models["plain"].backbone), VisionTower)
