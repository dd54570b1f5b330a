"""Drawn scenes: reproducible, different where they must be, and the same picture at every scale."""

from __future__ import annotations

import random

import numpy as np
import pytest
from numpy.typing import NDArray

from app.images import shrink
from training.demo.drawings import Idea, Scene, all_ideas, render
from training.demo.pen import Paper
from training.demo.places import HEIGHT, PLACES, WIDTH
from training.demo.subjects import SUBJECTS, draw_subject
from training.demo.twists import TWISTS

IDEA = Idea("penguin", "office", "umbrella")


def pixels(scene: Scene, scale: float = 1.0) -> NDArray[np.int16]:
    return np.asarray(render(scene, scale)).astype(np.int16)


def changed(a: NDArray[np.int16], b: NDArray[np.int16]) -> float:
    """The share of pixels that differ visibly."""
    return float((np.abs(a - b).max(-1) > 24).mean())


def test_there_is_an_idea_for_every_combination() -> None:
    ideas = all_ideas()
    assert len(ideas) == len(set(ideas)) == len(SUBJECTS) * len(PLACES) * len(TWISTS) == 960


@pytest.mark.parametrize("scale", [1.0, 1.5, 3.0])
def test_size_follows_scale(scale: float) -> None:
    assert render(Scene(IDEA, 0), scale).size == (round(WIDTH * scale), round(HEIGHT * scale))


def test_a_scene_is_always_the_same_picture() -> None:
    assert np.array_equal(pixels(Scene(IDEA, 3)), pixels(Scene(IDEA, 3)))


def test_seeds_move_and_colour_the_picture() -> None:
    pictures = [pixels(Scene(IDEA, seed)) for seed in range(6)]
    assert all(changed(pictures[0], other) > 0.02 for other in pictures[1:])


@pytest.mark.parametrize("scale", [1.5, 2.0, 3.0])
def test_a_large_drawing_shrinks_to_the_small_one(scale: float) -> None:
    """The model never learns at what size a picture was drawn: shrunk, it is nearly the drawing at scale 1."""
    for idea in all_ideas()[::97]:
        small = pixels(Scene(idea, 1))
        shrunk = np.asarray(shrink(np.asarray(render(Scene(idea, 1), scale)), WIDTH, "lanczos")).astype(np.int16)
        assert shrunk.shape == small.shape
        assert np.abs(shrunk - small).mean() < 8


@pytest.mark.parametrize("twist", TWISTS)
def test_every_twist_shows_on_every_subject(twist: str) -> None:
    """The same character on empty paper, before and after."""
    for subject in SUBJECTS:
        paper = Paper.blank(WIDTH, HEIGHT, 1.0, fill=(250, 248, 242))
        character = paper.pen.at(84, 100 - TWISTS[twist].lift)
        anchors = draw_subject(subject, character, random.Random(0))
        before = np.asarray(paper.finish()).astype(np.int16)
        TWISTS[twist].draw(character, anchors, random.Random(0))
        assert changed(before, np.asarray(paper.finish()).astype(np.int16)) > 0.006, subject


def test_subjects_differ_in_the_middle_of_the_picture() -> None:
    """Mean pictures over seeds: the jitter averages out, what is drawn stays."""
    means = {}
    for subject in SUBJECTS:
        stack = np.stack([pixels(Scene(Idea(subject, "mountain", "crown"), seed)) for seed in range(8)])
        means[subject] = stack.mean(0)[30:100, 44:124]
    names = list(means)
    for index, name in enumerate(names):
        for other in names[index + 1 :]:
            assert np.abs(means[name] - means[other]).mean() > 4, (name, other)


def test_nothing_outgrows_the_paper() -> None:
    """The tallest character in a crown stays below the top edge, which is plain sky."""
    for seed in range(8):
        picture = pixels(Scene(Idea("rabbit", "beach", "crown"), seed))
        assert np.abs(picture[0] - picture[0, 0]).max() < 24, seed
