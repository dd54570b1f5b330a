"""The twelve characters. Each stands on (0, 0), about 50 units tall, facing right, and says where props attach."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

from training.demo.pen import INK, Colour, Pen, Point

WHITE: Colour = (252, 250, 244)
PINK: Colour = (238, 150, 160)
ORANGE: Colour = (240, 150, 50)


@dataclass(frozen=True)
class Anchors:
    """Where a prop meets the character, in the character's own frame."""

    top: Point  # the crown of the head
    eyes: Point  # between the eyes
    gap: float  # from there to each eye
    shoulder: Point
    coat: Colour  # what an arm is drawn in


def draw_cat(pen: Pen, coat: Colour) -> Anchors:
    pen.limb([(-10, -4), (-22, -6), (-24, -18), (-19, -25)], 3.2, coat)
    _pear(pen, coat, width=12)
    for side in (-1, 1):
        pen.polygon([(side * 12, -38), (side * 12.5, -52), (side * 3, -45)], coat)
        pen.polygon([(side * 10, -42), (side * 10.4, -48), (side * 6, -45)], PINK, ink=0)
    pen.ellipse(0, -36, 13.5, 11, coat)
    for side in (-1, 1):
        pen.line([(side * 6, -32), (side * 19, -35)], 0.6)
        pen.line([(side * 6, -31), (side * 19, -30)], 0.6)
    _eyes(pen, (0, -38), 5, 1.8)
    pen.polygon([(-2, -34), (2, -34), (0, -32)], PINK, ink=0.6)
    return Anchors(top=(0, -47), eyes=(0, -38), gap=5, shoulder=(9, -20), coat=coat)


def draw_dog(pen: Pen, coat: Colour) -> Anchors:
    pen.limb([(-10, -6), (-19, -12), (-21, -20)], 3.4, coat)
    _pear(pen, coat, width=12)
    pen.box(-8, -27, 8, -24, (200, 50, 50))
    pen.ellipse(0, -37, 12, 11.5, coat)
    dark = _shade(coat, 0.6)
    for side in (-1, 1):
        pen.blob([(side * 8, -47), (side * 15, -45), (side * 18, -33), (side * 14.5, -27), (side * 11, -35)], dark)
    pen.ellipse(0, -32, 7.5, 5.8, _shade(coat, 1.25))
    pen.ellipse(0, -35, 3, 2.2, INK, ink=0)
    pen.blob([(-1.5, -29), (2.5, -29), (3, -24), (0, -23)], PINK, ink=0.7)
    _eyes(pen, (0, -41), 4.6, 1.7)
    return Anchors(top=(0, -48), eyes=(0, -41), gap=4.6, shoulder=(9, -20), coat=coat)


def draw_robot(pen: Pen, coat: Colour) -> Anchors:
    for side in (-1, 1):
        pen.box(side * 6 - 3, -8, side * 6 + 3, 0, _shade(coat, 0.7))
    pen.box(-12, -27, 12, -7, coat)
    pen.box(-7, -23, 2, -14, (240, 240, 225), ink=0.7)
    pen.dot(7, -21, 1.7, (220, 60, 60))
    pen.dot(7, -15, 1.7, (70, 170, 90))
    pen.limb([(-12, -24), (-18, -19), (-17, -11)], 2.4, coat)
    pen.line([(0, -45), (0, -50)], 1.2)
    pen.dot(0, -51, 2.4, (220, 60, 60))
    pen.box(-11, -46, 11, -29, coat)
    for side in (-1, 1):
        pen.box(side * 5 - 3, -43, side * 5 + 3, -37, (250, 240, 150), ink=0.8)
        pen.dot(side * 5, -40, 1.4)
    pen.line([(-6, -33), (6, -33)], 1.0)
    for x in (-3, 0, 3):
        pen.line([(x, -34.5), (x, -31.5)], 0.6)
    return Anchors(top=(0, -46), eyes=(0, -40), gap=5, shoulder=(12, -24), coat=coat)


def draw_penguin(pen: Pen, coat: Colour) -> Anchors:
    for side in (-1, 1):
        pen.ellipse(side * 6, -1.5, 6, 2.6, ORANGE)
    pen.blob([(0, -50), (9, -46), (11, -34), (15, -16), (10, -2), (-10, -2), (-15, -16), (-11, -34), (-9, -46)], coat)
    pen.blob([(-12, -30), (-20, -18), (-18, -11), (-12, -17)], coat)
    pen.blob([(12, -30), (18, -20), (17, -13), (12, -18)], coat)
    pen.blob([(0, -33), (8, -28), (10, -15), (6, -4), (-6, -4), (-10, -15), (-8, -28)], WHITE, ink=0.6)
    for side in (-1, 1):
        pen.ellipse(side * 4, -41, 4.2, 5, WHITE, ink=0)
    _eyes(pen, (0, -41), 3.4, 1.5)
    pen.polygon([(-3.5, -38), (3.5, -38), (0, -33)], ORANGE, ink=0.8)
    return Anchors(top=(0, -49), eyes=(0, -41), gap=3.4, shoulder=(11, -27), coat=coat)


def draw_octopus(pen: Pen, coat: Colour) -> Anchors:
    for x, reach in ((-9, -24), (-5, -13), (5, 13), (9, 24), (0, 2)):
        pen.limb([(x, -18), (0.7 * reach, -8), (reach, -1.5), (reach * 1.12, -5)], 4.2, coat)
    pen.blob([(0, -52), (13, -46), (16, -33), (11, -20), (0, -15), (-11, -20), (-16, -33), (-13, -46)], coat)
    for side in (-1, 1):
        pen.ellipse(side * 5.5, -31, 4.6, 5.2, WHITE, ink=0.9)
        pen.dot(side * 5.5 + 1, -30, 2.1)
    pen.curve([(-4, -21.5), (0, -19.5), (4, -21.5)], 0.9)
    for x, y, radius in ((-6, -44, 1.8), (5, -46, 1.4), (0, -41, 1.1)):
        pen.dot(x, y, radius, _shade(coat, 0.75))
    return Anchors(top=(0, -51), eyes=(0, -31), gap=5.5, shoulder=(11, -20), coat=coat)


def draw_snail(pen: Pen, coat: Colour) -> Anchors:
    body = (226, 205, 150)
    for x, tip in ((12, 9), (17, 20)):
        pen.limb([(x, -26), (tip, -38)], 1.6, body)
    pen.blob([(-26, 0), (-20, -7), (4, -8), (9, -24), (15, -29), (21, -23), (19, -8), (12, 0)], body)
    for x in (9, 20):
        pen.ellipse(x, -39, 3, 3, WHITE, ink=0.8)
        pen.dot(x + 0.6, -39, 1.4)
    pen.curve([(14, -19), (17, -18), (20, -20)], 0.8)
    pen.ellipse(-7, -20, 15.5, 15.5, coat)
    spiral = [(8, -21), (2, -31), (-10, -32), (-17, -22), (-12, -12), (-2, -12), (1, -20), (-5, -25), (-10, -20), (-6, -17)]
    pen.curve([(float(x), float(y)) for x, y in spiral], 1.3, _shade(coat, 0.5))
    return Anchors(top=(14, -28), eyes=(14.5, -39), gap=5.5, shoulder=(15, -14), coat=body)


def draw_ghost(pen: Pen, coat: Colour) -> Anchors:
    hem = [(17, -3), (12, -8), (7, -2), (0, -7), (-7, -2), (-12, -8), (-17, -3)]
    pen.blob([(0, -51), (11, -46), (15, -32), (17, -14), *hem, (-17, -14), (-15, -32), (-11, -46)], coat)
    pen.blob([(-14, -28), (-21, -24), (-20, -19), (-14, -20)], coat)
    for side in (-1, 1):
        pen.ellipse(side * 5, -36, 2.6, 3.8, INK, ink=0)
        pen.dot(side * 5 + 0.8, -37.5, 0.9, WHITE)
        pen.dot(side * 9, -30, 2, PINK)
    pen.ellipse(0, -27.5, 2.6, 3.2, INK, ink=0)
    return Anchors(top=(0, -50), eyes=(0, -36), gap=5, shoulder=(14, -25), coat=coat)


def draw_dinosaur(pen: Pen, coat: Colour) -> Anchors:
    for x, y in ((-24, -11), (-18, -17), (-12, -24), (-9, -32), (-7, -40)):
        pen.polygon([(x - 4, y + 4), (x - 5, y - 4), (x + 3, y - 1)], ORANGE, ink=0.8)
    for x in (-5, 5):
        pen.blob([(x - 5, -12), (x + 5, -12), (x + 4, -3), (x + 8, 0), (x - 4, 0)], _shade(coat, 0.85))
    spine = [(-31, -5), (-20, -13), (-10, -22), (-7, -36), (-2, -48), (8, -51), (20, -46), (21, -38), (10, -35)]
    pen.blob([*((float(x), float(y)) for x, y in spine), (9, -24), (9, -10), (-4, -6), (-18, -5)], coat)
    pen.blob([(2, -26), (8, -24), (8, -12), (2, -10)], _shade(coat, 1.35), ink=0)
    pen.line([(10, -40), (21, -40)], 0.9)
    for x in (13, 16, 19):
        pen.polygon([(x - 1.4, -40), (x + 1.4, -40), (x, -37.6)], WHITE, ink=0.4)
    pen.limb([(6, -25), (11, -23), (11, -20)], 1.8, coat)
    _eyes(pen, (8, -45), 3, 1.5)
    return Anchors(top=(5, -51), eyes=(8, -45), gap=3, shoulder=(7, -25), coat=coat)


def draw_elephant(pen: Pen, coat: Colour) -> Anchors:
    _pear(pen, coat, width=15)
    for side in (-1, 1):
        ear = [(side * 8, -45), (side * 20, -48), (side * 24, -38), (side * 18, -28), (side * 9, -31)]
        pen.blob(ear, coat)
        pen.blob([(side * 11, -42), (side * 19, -44), (side * 20, -37), (side * 16, -31), (side * 11, -34)], PINK, ink=0)
    pen.ellipse(0, -38, 11.5, 11.5, coat)
    for side in (-1, 1):
        pen.limb([(side * 5, -31), (side * 7, -26)], 1.2, WHITE)
    pen.limb([(0, -36), (0, -26), (2, -18), (7, -16), (10, -19)], 4.8, coat)
    for y in (-31, -27, -23):
        pen.line([(-1.5, y), (2, y)], 0.5)
    _eyes(pen, (0, -41), 5, 1.6)
    return Anchors(top=(0, -49), eyes=(0, -41), gap=5, shoulder=(12, -20), coat=coat)


def draw_frog(pen: Pen, coat: Colour) -> Anchors:
    for side in (-1, 1):
        pen.blob([(side * 6, -12), (side * 20, -18), (side * 22, -6), (side * 12, -1), (side * 5, -2)], coat)
        pen.blob([(side * 8, -3), (side * 22, -3), (side * 24, 0), (side * 8, 0)], coat)
    pen.blob([(0, -30), (11, -24), (12, -10), (6, -2), (-6, -2), (-12, -10), (-11, -24)], coat)
    pen.blob([(0, -24), (7, -20), (7, -8), (0, -4), (-7, -8), (-7, -20)], (236, 236, 190), ink=0)
    for side in (-1, 1):
        pen.ellipse(side * 9, -43, 6, 6, coat)
    pen.ellipse(0, -34, 17, 10, coat)
    for side in (-1, 1):
        pen.ellipse(side * 9, -43.5, 4, 4, WHITE, ink=0.8)
        pen.dot(side * 9 + 0.5, -43, 1.9)
    pen.curve([(-13, -33), (-6, -29.5), (6, -29.5), (13, -33)], 1.1)
    return Anchors(top=(0, -44), eyes=(0, -43), gap=9, shoulder=(10, -20), coat=coat)


def draw_rabbit(pen: Pen, coat: Colour) -> Anchors:
    pen.ellipse(-12, -6, 4.5, 4.5, WHITE)
    _pear(pen, coat, width=11)
    for x, tilt in ((-5, -9), (5, 9)):
        pen.blob([(x - 3, -40), (tilt - 4, -58), (tilt, -63), (tilt + 4, -58), (x + 3, -40)], coat)
        pen.blob([(x - 1, -43), (tilt - 1.6, -56), (tilt, -59), (tilt + 1.6, -56), (x + 1, -43)], PINK, ink=0)
    pen.ellipse(0, -34, 11, 10, coat)
    _eyes(pen, (0, -36), 4.6, 1.7)
    pen.polygon([(-1.8, -32.5), (1.8, -32.5), (0, -30.8)], PINK, ink=0.5)
    pen.box(-2.2, -29.5, 2.2, -25.6, WHITE, ink=0.7)
    pen.line([(0, -29.5), (0, -25.6)], 0.5)
    return Anchors(top=(0, -44), eyes=(0, -36), gap=4.6, shoulder=(8, -20), coat=coat)


def draw_bear(pen: Pen, coat: Colour) -> Anchors:
    _pear(pen, coat, width=16)
    pen.ellipse(0, -13, 8.5, 9, _shade(coat, 1.35), ink=0)
    for side in (-1, 1):
        pen.ellipse(side * 10.5, -47, 5.2, 5.2, coat)
        pen.dot(side * 10.5, -47, 2.6, _shade(coat, 1.35))
    pen.ellipse(0, -37, 14, 12, coat)
    pen.ellipse(0, -32.5, 6.4, 5, _shade(coat, 1.5))
    pen.ellipse(0, -35, 2.6, 1.9, INK, ink=0)
    pen.line([(0, -33), (0, -30)], 0.8)
    _eyes(pen, (0, -40), 5.2, 1.6)
    return Anchors(top=(0, -48), eyes=(0, -40), gap=5.2, shoulder=(13, -21), coat=coat)


SUBJECTS: dict[str, tuple[Callable[[Pen, Colour], Anchors], tuple[Colour, ...]]] = {
    "cat": (draw_cat, ((236, 160, 80), (150, 150, 158), (90, 84, 92))),
    "dog": (draw_dog, ((196, 142, 90), (228, 206, 160), (160, 120, 96))),
    "robot": (draw_robot, ((160, 178, 196), (128, 190, 190), (206, 170, 120))),
    "penguin": (draw_penguin, ((48, 50, 66), (54, 72, 112), (70, 62, 78))),
    "octopus": (draw_octopus, ((200, 100, 160), (150, 100, 190), (226, 110, 90))),
    "snail": (draw_snail, ((180, 110, 80), (200, 140, 170), (120, 150, 110))),
    "ghost": (draw_ghost, ((248, 248, 250), (226, 236, 250), (240, 232, 246))),
    "dinosaur": (draw_dinosaur, ((110, 170, 90), (90, 160, 140), (150, 170, 80))),
    "elephant": (draw_elephant, ((150, 156, 172), (172, 164, 176), (136, 150, 170))),
    "frog": (draw_frog, ((110, 190, 80), (80, 170, 110), (160, 196, 70))),
    "rabbit": (draw_rabbit, ((240, 234, 226), (196, 172, 150), (214, 214, 222))),
    "bear": (draw_bear, ((140, 96, 66), (112, 82, 70), (170, 124, 84))),
}


def draw_subject(name: str, pen: Pen, rng: random.Random) -> Anchors:
    """Draws the character in one of its coats, slightly off."""
    draw, coats = SUBJECTS[name]
    return draw(pen, jitter(rng.choice(coats), rng))


def jitter(colour: Colour, rng: random.Random, spread: int = 10) -> Colour:
    red, green, blue = (min(255, max(0, channel + rng.randint(-spread, spread))) for channel in colour)
    return red, green, blue


def _pear(pen: Pen, coat: Colour, width: float) -> None:
    """A seated body with two feet."""
    pen.blob([(0, -30), (0.7 * width, -22), (width, -8), (0.7 * width, -1), (-0.7 * width, -1), (-width, -8), (-0.7 * width, -22)], coat)
    for side in (-1, 1):
        pen.ellipse(side * 0.5 * width, -2, 5, 2.8, coat)


def _eyes(pen: Pen, centre: Point, gap: float, radius: float) -> None:
    for side in (-1, 1):
        pen.dot(centre[0] + side * gap, centre[1], radius)
        pen.dot(centre[0] + side * gap + 0.5, centre[1] - 0.6, radius * 0.35, WHITE)


def _shade(colour: Colour, factor: float) -> Colour:
    red, green, blue = (min(255, round(channel * factor)) for channel in colour)
    return red, green, blue
