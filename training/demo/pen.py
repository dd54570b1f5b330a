"""A vector-like pen over Pillow: shapes in logical units, ink outlines, smooth curves, any output scale.

It knows coordinates and colours, never what is being drawn.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from PIL import Image, ImageDraw

Point = tuple[float, float]
Colour = tuple[int, int, int]

INK: Colour = (38, 34, 40)
SUPERSAMPLING = 2  # every picture is drawn this much larger and reduced once: smooth edges without an antialiasing pen


@dataclass(frozen=True)
class Pen:
    """Draws in the frame `origin + size * (x, y)`, mirrored if `flip`; one logical unit is `unit` pixels."""

    draw: ImageDraw.ImageDraw
    unit: float
    origin: Point = (0.0, 0.0)
    size: float = 1.0
    flip: bool = False
    ink: float = 1.3

    def at(self, x: float, y: float, size: float = 1.0, flip: bool = False) -> Pen:
        """The pen moved to a point of this frame, scaled and mirrored on top of what this frame does."""
        return replace(self, origin=self._logical((x, y)), size=self.size * size, flip=self.flip != flip)

    def polygon(self, points: Sequence[Point], fill: Colour | None, ink: float = 1.0) -> None:
        """A closed outline; `ink` multiplies the line width, 0 leaves the outline away."""
        pixels = [self._pixel(point) for point in points]
        if fill is not None:
            self.draw.polygon(pixels, fill=fill)
        if ink > 0:
            self._stroke([*pixels, pixels[0], pixels[1]], self._width(ink), INK)

    def blob(self, points: Sequence[Point], fill: Colour | None, ink: float = 1.0) -> None:
        """A smooth closed shape through the points."""
        self.polygon(_smooth(points, closed=True), fill, ink)

    def ellipse(self, x: float, y: float, rx: float, ry: float, fill: Colour | None, ink: float = 1.0) -> None:
        turns = [2 * math.pi * step / 40 for step in range(40)]
        self.polygon([(x + rx * math.cos(turn), y + ry * math.sin(turn)) for turn in turns], fill, ink)

    def dot(self, x: float, y: float, radius: float, fill: Colour = INK) -> None:
        self.ellipse(x, y, radius, radius, fill, ink=0)

    def box(self, x0: float, y0: float, x1: float, y1: float, fill: Colour | None, ink: float = 1.0) -> None:
        self.polygon([(x0, y0), (x1, y0), (x1, y1), (x0, y1)], fill, ink)

    def line(self, points: Sequence[Point], ink: float = 1.0, fill: Colour = INK) -> None:
        self._stroke([self._pixel(point) for point in points], self._width(ink), fill)

    def curve(self, points: Sequence[Point], ink: float = 1.0, fill: Colour = INK) -> None:
        """A smooth open line through the points."""
        self.line(_smooth(points, closed=False), ink, fill)

    def limb(self, points: Sequence[Point], width: float, fill: Colour) -> None:
        """A smooth tube with an ink outline: arms, tails, tentacles."""
        path = [self._pixel(point) for point in _smooth(points, closed=False)]
        inner = max(1, round(width * self.size * self.unit))
        self._stroke(path, inner + 2 * self._width(1.0), INK)
        self._stroke(path, inner, fill)

    def _logical(self, point: Point) -> Point:
        x = -point[0] if self.flip else point[0]
        return self.origin[0] + self.size * x, self.origin[1] + self.size * point[1]

    def _pixel(self, point: Point) -> Point:
        x, y = self._logical(point)
        return x * self.unit, y * self.unit

    def _width(self, ink: float) -> int:
        return max(1, round(self.ink * ink * self.unit))

    def _stroke(self, path: Sequence[Point], width: int, fill: Colour) -> None:
        self.draw.line(path, fill=fill, width=width, joint="curve")
        if width > 2:
            radius = (width - 1) / 2
            for x, y in path if width > 10 else (path[0], path[-1]):  # Pillow leaves hairlines in the bends of thick lines
                self.draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=fill)


@dataclass(frozen=True)
class Paper:
    """A picture in the making: `width` x `height` logical units at `scale` output pixels a unit."""

    image: Image.Image
    pen: Pen

    @classmethod
    def blank(cls, width: int, height: int, scale: float, fill: Colour) -> Paper:
        unit = scale * SUPERSAMPLING
        image = Image.new("RGB", (round(width * unit), round(height * unit)), fill)
        return cls(image=image, pen=Pen(draw=ImageDraw.Draw(image), unit=unit))

    def finish(self) -> Image.Image:
        return self.image.reduce(SUPERSAMPLING)


def _smooth(points: Sequence[Point], closed: bool, num_steps: int = 8) -> list[Point]:
    """Catmull-Rom spline through the points."""
    count = len(points)
    last = count if closed else count - 1
    path: list[Point] = []
    for index in range(last):
        before, start, end, after = (_neighbour(points, index + shift, closed) for shift in (-1, 0, 1, 2))
        path.extend(_spline(before, start, end, after, step / num_steps) for step in range(num_steps))
    return path if closed else [*path, points[-1]]


def _neighbour(points: Sequence[Point], index: int, closed: bool) -> Point:
    return points[index % len(points)] if closed else points[min(max(index, 0), len(points) - 1)]


def _spline(before: Point, start: Point, end: Point, after: Point, t: float) -> Point:
    def axis(a: float, b: float, c: float, d: float) -> float:
        return 0.5 * (2 * b + (c - a) * t + (2 * a - 5 * b + 4 * c - d) * t**2 + (3 * b - a - 3 * c + d) * t**3)

    return axis(before[0], start[0], end[0], after[0]), axis(before[1], start[1], end[1], after[1])
