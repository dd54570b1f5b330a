"""The demo's data folder, laid out as `training.prepare` lays it out: pictures as files, and tables of pairs about them.

Training pairs are about ideas to train on, validation pairs about ideas held out. Knows no model.
"""

from __future__ import annotations

import random
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from training.demo.captions import Fault, make_pairs
from training.demo.drawings import Idea, Scene, all_ideas
from training.demo.pictures import Pictures
from training.demo.seeds import stream
from training.demo.world import World
from training.pairs import Pair, write_pairs
from training.train import TRAIN_TABLE, VALIDATION_TABLE


@dataclass(frozen=True)
class Posed:
    """A pair of a table, and what the table does not say: the scene, and what is wrong with the rejected caption."""

    pair: Pair
    scene: Scene
    fault: Fault


def write_data(folder: Path, world: World, known: Collection[Idea], pictures: Pictures, held_out: Pictures) -> list[Posed]:
    """Write both tables and the pictures they are about; returns the held-out pairs.

    Wrong captions of training describe `known` ideas only, those of the held-out pairs any idea.
    """
    wanted, rng = world.preferences, stream("preferences", world.seed)
    chosen = pictures.batch(sorted(rng.sample(range(len(pictures)), wanted.num_pictures)))
    training = pose(chosen.scenes, wanted.pairs_per_picture, wanted.shares, known, rng)
    rng = stream("examination", world.seed)
    examination = pose(held_out.scenes, world.bounds.pairs_per_picture, wanted.shares, set(all_ideas()), rng)
    for shown in (chosen, held_out):
        write_pictures(folder, shown)
    write_pairs(folder / TRAIN_TABLE, [each.pair for each in training])
    write_pairs(folder / VALIDATION_TABLE, [each.pair for each in examination])
    return examination


def pose(
    scenes: Sequence[Scene], pairs_per_picture: int, shares: dict[Fault, float], known: Collection[Idea], rng: random.Random
) -> list[Posed]:
    """Pairs about every scene; a contest is an idea, however often it is drawn."""
    return [
        Posed(Pair(f"{name_of(scene)}/{number}", slug(scene), image_path(scene), None, pair.chosen, pair.rejected), scene, pair.fault)
        for scene in scenes
        for number, pair in enumerate(make_pairs(scene.idea, pairs_per_picture, shares, known, rng))
    ]


def write_pictures(folder: Path, pictures: Pictures) -> None:
    """At the size the model sees, so that shrinking leaves them as they are."""
    (folder / "images").mkdir(parents=True, exist_ok=True)
    for scene, pixels in zip(pictures.scenes, pictures.pixels.permute(0, 2, 3, 1).contiguous().numpy(), strict=True):
        Image.fromarray(pixels).save(folder / image_path(scene))


def image_path(scene: Scene) -> str:
    """Relative to the tables."""
    return f"images/{name_of(scene)}.png"


def name_of(scene: Scene) -> str:
    return f"{slug(scene)}-{scene.seed}"


def slug(scene: Scene) -> str:
    return "-".join((scene.idea.subject, scene.idea.place, scene.idea.twist)).replace(" ", "-")
