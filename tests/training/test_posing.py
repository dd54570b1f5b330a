"""The demo's data folder: the product's own tables, held-out ideas apart, pictures as the model sees them."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from training.demo.captions import split_ideas
from training.demo.drawings import Scene, all_ideas
from training.demo.pictures import Pictures, draw_small, gather
from training.demo.posing import Posed, image_path, write_data
from training.demo.world import World, load_world
from training.pairs import read_pairs
from training.recipe import load_recipe

IMAGE = load_recipe("demo").model.image
SEEN, HELD_OUT = split_ideas(all_ideas(), 120, seed=7)


def small_world() -> World:
    world = load_world()
    return world.model_copy(update={"preferences": world.preferences.model_copy(update={"num_pictures": 5})})


def draw(scenes: list[Scene]) -> Pictures:
    return gather(scenes, [draw_small(scene, (1.0, 2.0), IMAGE) for scene in scenes])


@pytest.fixture(scope="module")
def seen() -> Pictures:
    return draw([Scene(idea, 0) for idea in SEEN[::120]])


@pytest.fixture(scope="module")
def held_out() -> Pictures:
    return draw([Scene(idea, 1_000_000 + copy) for idea in HELD_OUT[::60] for copy in range(2)])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("data")


@pytest.fixture(scope="module")
def posed(folder: Path, seen: Pictures, held_out: Pictures) -> list[Posed]:
    return write_data(folder, small_world(), set(SEEN), seen, held_out)


def test_every_chosen_picture_has_its_pairs_together(folder: Path, posed: list[Posed]) -> None:
    """5 of the 7 pictures, 8 pairs each, none with a prompt of its own."""
    pairs = read_pairs(folder / "pairs_train.parquet")
    assert sorted(Counter(pair.image for pair in pairs).values()) == [8] * 5
    assert {pair.prompt for pair in pairs} == {None}
    assert not {pair.contest for pair in pairs} & {each.pair.contest for each in posed}


def test_drawings_of_one_idea_are_one_contest(folder: Path, posed: list[Posed]) -> None:
    """2 held-out ideas, 2 drawings each, 5 pairs a drawing; what is returned is what is written."""
    pairs = read_pairs(folder / "pairs_validation.parquet")
    assert pairs == [each.pair for each in posed]
    assert sorted(Counter(pair.contest for pair in pairs).values()) == [10, 10]
    assert sorted(Counter(pair.image for pair in pairs).values()) == [5] * 4


def test_files_hold_the_pixels_that_the_base_was_schooled_on(folder: Path, posed: list[Posed], held_out: Pictures) -> None:
    for scene, pixels in zip(held_out.scenes, held_out.pixels, strict=True):
        with Image.open(folder / image_path(scene)) as image:
            assert max(image.size) == IMAGE.long_edge
            assert np.array_equal(np.asarray(image), pixels.permute(1, 2, 0).numpy())


def test_the_same_world_poses_the_same_pairs(tmp_path: Path, posed: list[Posed], seen: Pictures, held_out: Pictures) -> None:
    assert write_data(tmp_path, small_world(), set(SEEN), seen, held_out) == posed


def test_a_fault_belongs_to_its_pair(posed: list[Posed]) -> None:
    """Only the bland templates say nothing but who and where, and only bland pairs use them."""
    for each in posed:
        assert (each.pair.rejected.startswith(("There is", "Here we have", "This is a picture", "Nothing much"))) <= (each.fault == "bland")
