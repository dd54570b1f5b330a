"""Cartoon scenes: who, where, and what is odd about it. The same scene is the same picture, at any scale.

Knows nothing of captions or models.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

from PIL import Image

from training.demo.pen import Paper
from training.demo.places import HEIGHT, PLACES, WIDTH
from training.demo.seeds import stream
from training.demo.subjects import SUBJECTS, draw_subject
from training.demo.twists import TWISTS


@dataclass(frozen=True, order=True)
class Idea:
    """What a cartoon shows, without how it is drawn."""

    subject: str
    place: str
    twist: str


@dataclass(frozen=True)
class Scene:
    """One drawing of an idea; the seed decides colours, position, size and direction."""

    idea: Idea
    seed: int


def all_ideas() -> list[Idea]:
    return [Idea(*names) for names in itertools.product(SUBJECTS, PLACES, TWISTS)]


def render(scene: Scene, scale: float = 1.0) -> Image.Image:
    """RGB, 168 x 112 times `scale`."""
    rng = stream("scene", scene)
    paper = Paper.blank(WIDTH, HEIGHT, scale, fill=(250, 248, 242))
    PLACES[scene.idea.place](paper.pen, rng)
    twist = TWISTS[scene.idea.twist]
    size = rng.uniform(1.08, 1.28)
    character = paper.pen.at(rng.uniform(70, 98), rng.uniform(99, 107), size, flip=rng.random() < 0.5)
    anchors = draw_subject(scene.idea.subject, character.at(0, -twist.lift), rng)
    twist.draw(character.at(0, -twist.lift), anchors, rng)
    return paper.finish()
