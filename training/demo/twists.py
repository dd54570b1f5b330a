"""The ten odd things a character can be up to. Each draws over (or under) a character, at its anchors."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

from training.demo.pen import Colour, Pen, Point
from training.demo.subjects import WHITE, Anchors

BRIGHT: tuple[Colour, ...] = ((216, 60, 60), (50, 110, 200), (240, 190, 50), (70, 160, 90), (150, 80, 180))


@dataclass(frozen=True)
class Twist:
    """How a twist is drawn, and how far it lifts the character off the ground."""

    draw: Callable[[Pen, Anchors, random.Random], None]
    lift: float = 0.0


def draw_umbrella(pen: Pen, anchors: Anchors, rng: random.Random) -> None:
    hand = _hold(pen, anchors, 12, -2)
    top = min(anchors.top[1], anchors.eyes[1]) - 20
    pen.line([(hand[0], hand[1] + 4), (hand[0], top)], 1.4)
    colour, other = rng.sample(BRIGHT, 2)
    x = hand[0] - 6
    rim = [(x + step, top + 9 + (3 if step % 14 == 0 else 0)) for step in range(28, -29, -7)]
    pen.polygon([(x - 28, top + 12), (x - 22, top), (x - 10, top - 7), (x, top - 9), (x + 10, top - 7), (x + 22, top), *rim], colour)
    pen.polygon([(x, top - 9), (x - 9, top + 9), (x + 9, top + 9)], other, ink=0.7)


def draw_crown(pen: Pen, anchors: Anchors, rng: random.Random) -> None:
    crown = pen.at(*anchors.top)
    crown.polygon([(-11, 3), (-13, -12), (-6, -5), (0, -15), (6, -5), (13, -12), (11, 3)], (250, 204, 50))
    for x, y in ((-13, -12), (0, -15), (13, -12)):
        crown.ellipse(x, y, 2.2, 2.2, rng.choice(BRIGHT), ink=0.7)
    crown.dot(0, -1.5, 2, (210, 50, 70))


def draw_balloons(pen: Pen, anchors: Anchors, rng: random.Random) -> None:
    hand = _hold(pen, anchors, 10, -6)
    colours = rng.sample(BRIGHT, 3)
    for (dx, dy), colour in zip(((-3, -39), (17, -36), (8, -49)), colours, strict=True):
        x, y = hand[0] + dx + 4, hand[1] + dy
        pen.curve([hand, (x - 2, y + 18), (x, y + 9)], 0.6)
        pen.ellipse(x, y, 8, 9.5, colour)
        pen.dot(x - 2.5, y - 3.5, 1.8, WHITE)


def draw_skateboard(pen: Pen, anchors: Anchors, rng: random.Random) -> None:
    deck = rng.choice(BRIGHT)
    for x in (-17, 17):
        pen.ellipse(x, 6, 4, 4, (70, 70, 76))
        pen.dot(x, 6, 1.4, WHITE)
    pen.blob([(-31, -4), (-24, 0), (24, 0), (31, -4), (29, 1), (22, 4), (-22, 4), (-29, 1)], deck)
    for y, length in ((-8, 9), (-15, 13), (-22, 8)):
        pen.line([(-31, y), (-31 - length, y)], 0.9)


def draw_cake(pen: Pen, anchors: Anchors, rng: random.Random) -> None:
    x, y = _hold(pen, anchors, 14, 4)
    icing = rng.choice(((244, 170, 190), (250, 240, 225), (140, 90, 70)))
    pen.ellipse(x + 4, y + 2, 16, 2.6, (226, 226, 232))
    pen.box(x - 8, y - 10, x + 16, y + 1, (226, 180, 120))
    pen.blob(
        [
            (x - 9, y - 13),
            (x + 4, y - 14),
            (x + 17, y - 13),
            (x + 16, y - 7),
            (x + 10, y - 4),
            (x + 4, y - 7),
            (x - 2, y - 4),
            (x - 8, y - 7),
        ],
        icing,
    )
    for dx in (-3, 4, 11):
        pen.line([(x + dx, y - 13), (x + dx, y - 20)], 1.6, rng.choice(BRIGHT))
        pen.ellipse(x + dx, y - 22.5, 1.7, 2.6, (250, 190, 40), ink=0.5)


def draw_guitar(pen: Pen, anchors: Anchors, rng: random.Random) -> None:
    wood = rng.choice(((200, 120, 50), (190, 60, 50), (230, 170, 80)))
    x, y = anchors.shoulder[0] - 8, max(anchors.shoulder[1] + 6, -15)
    pen.limb([(x + 4, y - 2), (x + 30, y - 17)], 2.2, (96, 66, 50))
    pen.box(x + 29, y - 22, x + 36, y - 15, (96, 66, 50))
    pen.blob(
        [
            (x + 7, y - 10),
            (x + 10, y - 3),
            (x + 4, y + 3),
            (x - 4, y + 9),
            (x - 15, y + 8),
            (x - 16, y - 2),
            (x - 7, y - 5),
            (x - 2, y - 10),
        ],
        wood,
    )
    pen.ellipse(x - 3, y - 0.5, 3.4, 3.4, (60, 44, 40), ink=0)
    for shift in (-0.8, 0.8):
        pen.line([(x - 10, y + 4 + shift), (x + 30, y - 17 + shift)], 0.35, (240, 232, 214))


def draw_top_hat(pen: Pen, anchors: Anchors, rng: random.Random) -> None:
    hat = pen.at(*anchors.top)
    hat.polygon([(-10, 0), (-11.5, -19), (11.5, -19), (10, 0)], (58, 54, 66))
    hat.box(-10.3, -6, 10.3, -1.5, rng.choice(BRIGHT), ink=0.5)
    hat.ellipse(0, 1, 18, 2.8, (58, 54, 66))


def draw_juggling(pen: Pen, anchors: Anchors, rng: random.Random) -> None:
    _hold(pen, anchors, 12, -3)
    top = min(anchors.top[1], anchors.eyes[1])
    spots = ((-26, -24), (-19, top - 6), (0, top - 17), (19, top - 6), (27, -24))
    shift = rng.randint(0, len(BRIGHT) - 1)
    for index, (x, y) in enumerate(spots):
        pen.ellipse(x, y, 5, 5, BRIGHT[(index + shift) % len(BRIGHT)])
        pen.dot(x - 1.5, y - 1.7, 1.2, WHITE)


def draw_sunglasses(pen: Pen, anchors: Anchors, rng: random.Random) -> None:
    x, y = anchors.eyes
    gap = max(anchors.gap, 5.4)
    frame = rng.choice(((214, 40, 60), (30, 28, 34), (240, 180, 40)))
    for side in (-1, 1):
        pen.box(x + side * gap - 5.6, y - 4.4, x + side * gap + 5.6, y + 4.6, frame)
        pen.box(x + side * gap - 4, y - 2.9, x + side * gap + 4, y + 3.2, (26, 26, 34), ink=0)
        pen.line([(x + side * gap - 2.6, y + 1.6), (x + side * gap + 0.8, y - 1.8)], 0.9, WHITE)
    pen.line([(x - gap - 11, y - 3), (x + gap + 11, y - 3)], 1.3, frame)


def draw_briefcase(pen: Pen, anchors: Anchors, rng: random.Random) -> None:
    leather = rng.choice(((120, 76, 48), (150, 100, 60), (84, 60, 52)))
    hand = _hold(pen, anchors, 13, 7)
    x, y = hand[0] + 3, min(hand[1] + 2, -16)
    pen.curve([(x - 4, y + 2), (x - 3, y - 2), (x + 3, y - 2), (x + 4, y + 2)], 1.4)
    pen.box(x - 12, y + 2, x + 12, y + 17, leather)
    pen.line([(x - 12, y + 8), (x + 12, y + 8)], 0.8)
    for dx in (-7, 7):
        pen.box(x + dx - 1.6, y + 6, x + dx + 1.6, y + 10, (240, 204, 90), ink=0.5)


TWISTS: dict[str, Twist] = {
    "umbrella": Twist(draw_umbrella),
    "crown": Twist(draw_crown),
    "balloons": Twist(draw_balloons),
    "skateboard": Twist(draw_skateboard, lift=9.0),
    "cake": Twist(draw_cake),
    "guitar": Twist(draw_guitar),
    "top hat": Twist(draw_top_hat),
    "juggling": Twist(draw_juggling),
    "sunglasses": Twist(draw_sunglasses),
    "briefcase": Twist(draw_briefcase),
}


def _hold(pen: Pen, anchors: Anchors, dx: float, dy: float) -> Point:
    """An arm reaching out from the shoulder; returns the hand."""
    x, y = anchors.shoulder
    hand = (x + dx, y + dy)
    pen.limb([(x - 2, y + 1), (x + 0.5 * dx, y + 0.5 * dy + 2.5), hand], 3.0, anchors.coat)
    pen.ellipse(hand[0], hand[1], 2.4, 2.4, anchors.coat, ink=0.8)
    return hand
