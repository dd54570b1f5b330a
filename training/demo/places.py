"""The eight places. Each fills the whole picture behind the character, furniture at the sides."""

from __future__ import annotations

import random
from collections.abc import Callable

from training.demo.pen import Colour, Pen
from training.demo.subjects import WHITE, jitter

WIDTH, HEIGHT = 168, 112  # logical units of a picture

GREY: Colour = (150, 152, 160)
WOOD: Colour = (176, 128, 84)


def draw_office(pen: Pen, rng: random.Random) -> None:
    _room(pen, jitter((214, 222, 228), rng), jitter((150, 160, 172), rng), floor=84)
    pen.box(12, 10, 52, 48, (190, 220, 244))
    for x, top in ((18, 30), (27, 22), (38, 34)):
        pen.box(x, top, x + 8, 48, (120, 136, 160), ink=0.4)
    for y in range(14, 46, 6):
        pen.line([(12, y), (52, y)], 0.45)
    x = rng.randint(112, 122)
    pen.box(x - 6, 8, x + 30, 34, WHITE)
    pen.line([(x, 14), (x + 7, 20), (x + 13, 17), (x + 24, 29)], 1.3, (210, 60, 60))
    pen.box(118, 74, 166, 79, WOOD)
    for leg in (122, 160):
        pen.box(leg, 79, leg + 4, 100, WOOD)
    pen.box(132, 52, 156, 69, (70, 76, 88))
    pen.box(134, 54, 154, 67, (140, 210, 220), ink=0)
    pen.box(142, 69, 147, 74, (70, 76, 88))
    _plant(pen, 10, 96)


def draw_beach(pen: Pen, rng: random.Random) -> None:
    pen.box(0, 0, WIDTH, 60, jitter((176, 222, 242), rng), ink=0)
    pen.dot(rng.randint(118, 146), 18, 11, (252, 214, 80))
    pen.box(0, 52, WIDTH, 76, jitter((60, 150, 196), rng), ink=0)
    for y in (58, 66):
        start = rng.randint(0, 14)
        for x in range(start, WIDTH, 26):
            pen.curve([(x, y), (x + 5, y - 2), (x + 10, y)], 0.8, WHITE)
    pen.blob([(-10, 82), (40, 73), (90, 77), (180, 71), (180, 120), (-10, 120)], jitter((244, 220, 160), rng), ink=0.8)
    pen.limb([(16, 104), (20, 72), (28, 44)], 5, (168, 118, 74))
    for dx, dy in ((-24, 2), (-18, -13), (3, -15), (20, -12), (24, 4)):
        pen.blob([(26, 43), (27 + 0.4 * dx, 36 + dy), (28 + dx, 44 + dy), (30 + 0.5 * dx, 43 + 0.7 * dy)], (80, 160, 80))
    pen.polygon([(134, 104), (136, 90), (141, 90), (141, 94), (147, 94), (147, 90), (152, 90), (155, 104)], (226, 190, 120))
    pen.line([(144, 94), (144, 82)], 0.9)
    pen.polygon([(144, 82), (152, 85), (144, 88)], (210, 60, 60), ink=0.6)


def draw_moon(pen: Pen, rng: random.Random) -> None:
    pen.box(0, 0, WIDTH, HEIGHT, jitter((30, 32, 64), rng), ink=0)
    for _ in range(34):
        pen.dot(rng.uniform(2, 166), rng.uniform(2, 76), rng.choice((0.6, 0.8, 1.2)), (250, 246, 214))
    x = rng.randint(22, 38)
    pen.ellipse(x, 24, 15, 15, (70, 140, 210))
    pen.blob([(x - 9, 18), (x, 14), (x + 4, 21), (x - 3, 29), (x - 8, 25)], (100, 180, 100), ink=0)
    pen.blob([(x + 5, 28), (x + 11, 25), (x + 9, 33)], (100, 180, 100), ink=0)
    pen.blob([(-10, 86), (40, 78), (90, 84), (140, 77), (180, 84), (180, 124), (-10, 124)], jitter((198, 196, 204), rng))
    for cx, cy, rx in ((22, 98, 12), (146, 100, 14), (120, 88, 6), (62, 90, 6), (94, 107, 9)):
        pen.ellipse(cx, cy, rx, rx * 0.32, (160, 158, 170), ink=0.7)
    pen.line([(150, 96), (150, 52)], 1.3, (230, 230, 236))
    pen.polygon([(150, 52), (166, 55), (166, 64), (150, 66)], (214, 80, 80))


def draw_kitchen(pen: Pen, rng: random.Random) -> None:
    wall = jitter((250, 236, 200), rng)
    _room(pen, wall, (206, 176, 150), floor=88)
    for x in range(0, WIDTH, 12):
        pen.line([(x, 40), (x, 88)], 0.35, (206, 196, 170))
    for y in range(40, 88, 12):
        pen.line([(0, y), (WIDTH, y)], 0.35, (206, 196, 170))
    for x in range(0, WIDTH, 24):
        pen.box(x, 88, x + 12, 100, (238, 226, 214), ink=0)
        pen.box(x + 12, 100, x + 24, 112, (238, 226, 214), ink=0)
    pen.box(4, 26, 36, 98, jitter((200, 224, 226), rng))
    pen.line([(4, 50), (36, 50)])
    for y0, y1 in ((38, 46), (56, 68)):
        pen.line([(31, y0), (31, y1)], 1.6)
    pen.box(124, 66, 166, 100, (236, 236, 240))
    pen.box(130, 76, 160, 95, (84, 84, 94))
    for x in (132, 140, 148, 156):
        pen.dot(x, 71, 1.7)
    pen.box(132, 54, 154, 66, (200, 84, 70))
    pen.line([(128, 57), (158, 57)], 1.2)
    steam = rng.randint(-2, 2)
    for x in (138, 147):
        pen.curve([(x, 51), (x + 3 + steam, 46), (x - 2, 41), (x + 2, 36)], 0.8, GREY)
    pen.line([(104, 14), (160, 14)], 1.2)
    for x, radius in ((112, 5), (128, 6), (146, 5)):
        pen.line([(x, 14), (x, 22)], 1.0)
        pen.ellipse(x, 22 + radius, radius, radius, (120, 120, 132))


def draw_library(pen: Pen, rng: random.Random) -> None:
    pen.box(0, 0, WIDTH, HEIGHT, (124, 82, 54), ink=0)
    pen.box(0, 92, WIDTH, HEIGHT, jitter((150, 50, 56), rng), ink=0)
    for shelf in (24, 48, 72, 92):
        _books(pen, shelf, rng)
        pen.box(-2, shelf, WIDTH + 2, shelf + 3.5, (160, 110, 72))
    for x in (0, 54, 110, 164):
        pen.box(x, -2, x + 4, 94, (160, 110, 72))
    ladder = rng.choice((8, 134))
    for x in (ladder, ladder + 16):
        pen.line([(x, 100), (x + 4, 4)], 1.9, (236, 200, 130))
    for step in range(12, 96, 12):
        pen.line([(ladder + 4, step), (ladder + 19, step)], 1.5, (236, 200, 130))


def draw_forest(pen: Pen, rng: random.Random) -> None:
    pen.box(0, 0, WIDTH, HEIGHT, jitter((206, 232, 200), rng), ink=0)
    for x in _about((6, 38, 70, 104, 134, 160), rng):
        pen.box(x - 2, 20, x + 2, 86, (168, 190, 150), ink=0)
    pen.box(0, 82, WIDTH, HEIGHT, jitter((116, 170, 84), rng), ink=0)
    for x in _about((16, 150), rng):
        pen.blob([(x - 6, 30), (x + 6, 30), (x + 6, 80), (x + 11, 98), (x - 11, 98), (x - 6, 80)], (134, 94, 66))
        pen.ellipse(x, 62, 2.4, 3.6, (84, 58, 46), ink=0.5)
        pen.blob(
            [(x - 30, 30), (x - 22, 12), (x - 6, 2), (x + 12, 4), (x + 26, 16), (x + 28, 32), (x + 8, 38), (x - 12, 38)],
            jitter((66, 140, 70), rng),
        )
    for x, y in ((44, 102), (122, 100), (34, 95)):
        pen.box(x - 1.6, y - 5, x + 1.6, y, WHITE, ink=0.6)
        pen.blob([(x - 6, y - 4), (x - 4, y - 9), (x, y - 11), (x + 4, y - 9), (x + 6, y - 4)], (210, 66, 60), ink=0.8)
        pen.dot(x - 1, y - 8, 1.0, WHITE)


def draw_stage(pen: Pen, rng: random.Random) -> None:
    pen.box(0, 0, WIDTH, HEIGHT, (56, 40, 62), ink=0)
    x = rng.randint(76, 92)
    pen.polygon([(x - 6, 0), (x + 6, 0), (x + 42, 96), (x - 42, 96)], (110, 92, 96), ink=0)
    pen.box(0, 84, WIDTH, HEIGHT, jitter((196, 146, 92), rng), ink=0)
    for y in (84, 92, 101):
        pen.line([(0, y), (WIDTH, y)], 0.6, (140, 98, 62))
    pen.ellipse(x, 98, 46, 9, (244, 218, 150), ink=0)
    red = jitter((190, 36, 50), rng)
    for side in (0, 1):
        curtain = pen.at(WIDTH * side, 0, flip=bool(side))
        curtain.blob([(-8, -8), (36, -8), (32, 30), (22, 62), (30, 96), (-8, 98)], red)
        for fold in (6, 14, 22):
            curtain.curve([(fold, 12), (fold - 1, 50), (fold, 94)], 0.8, (130, 20, 36))
    for swag in range(0, WIDTH, 28):
        pen.blob([(swag, -6), (swag + 28, -6), (swag + 25, 8), (swag + 14, 13), (swag + 3, 8)], red)


def draw_mountain(pen: Pen, rng: random.Random) -> None:
    pen.box(0, 0, WIDTH, HEIGHT, jitter((150, 186, 224), rng), ink=0)
    for x, top, half in zip(_about((36, 134, 84), rng), (14, 8, 30), (46, 54, 40), strict=True):
        pen.polygon([(x - half, 86), (x, top), (x + half, 86)], (120, 132, 158))
        cap = 0.36 * half
        pen.polygon(
            [(x, top), (x + cap, top + 26), (x + 5, top + 20), (x, top + 29), (x - 6, top + 20), (x - cap, top + 26)], WHITE, ink=0.7
        )
    pen.blob([(-10, 86), (40, 78), (100, 84), (180, 77), (180, 124), (-10, 124)], (246, 249, 253))
    for x, y in ((14, 98), (152, 96), (134, 88)):
        for level in range(3):
            width, base = 12 - 3 * level, y - 9 * level
            pen.polygon([(x - width, base), (x, base - 15), (x + width, base)], (50, 112, 92))
    for _ in range(26):
        pen.dot(rng.uniform(0, WIDTH), rng.uniform(0, HEIGHT), rng.choice((0.9, 1.2, 1.6)), (255, 255, 255))


PLACES: dict[str, Callable[[Pen, random.Random], None]] = {
    "office": draw_office,
    "beach": draw_beach,
    "moon": draw_moon,
    "kitchen": draw_kitchen,
    "library": draw_library,
    "forest": draw_forest,
    "stage": draw_stage,
    "mountain": draw_mountain,
}


def _room(pen: Pen, wall: Colour, ground: Colour, floor: float) -> None:
    pen.box(0, 0, WIDTH, HEIGHT, wall, ink=0)
    pen.box(-2, floor, WIDTH + 2, HEIGHT + 2, ground, ink=0.7)


def _plant(pen: Pen, x: float, y: float) -> None:
    for dx, dy in ((-9, -24), (0, -30), (9, -24)):
        pen.blob([(x, y - 10), (x + dx * 0.3 - 3, y - 18), (x + dx, y + dy), (x + dx * 0.5 + 3, y - 16)], (84, 160, 96))
    pen.polygon([(x - 6, y - 11), (x + 6, y - 11), (x + 4.5, y), (x - 4.5, y)], (200, 110, 74))


def _about(places: tuple[int, ...], rng: random.Random) -> list[int]:
    return [x + rng.randint(-4, 4) for x in places]


def _books(pen: Pen, shelf: float, rng: random.Random) -> None:
    colours: tuple[Colour, ...] = ((178, 70, 60), (70, 100, 140), (90, 130, 90), (208, 170, 90), (120, 84, 130), (214, 204, 184))
    x = 2.0
    while x < WIDTH:
        width, height = rng.uniform(4, 7.5), rng.uniform(13, 19)
        pen.box(x, shelf - height, x + width, shelf, rng.choice(colours), ink=0.5)
        x += width + (rng.uniform(4, 9) if rng.random() < 0.06 else 0)
