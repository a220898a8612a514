"""Where the parts of a portrait are drawn: points on a face, put on a rounded head that is turned to the view.

Coordinates are those of :mod:`expunge.data.portrait_looks`: half face heights, x to the right, y down, z to the
viewer.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from math import cos, pi, sin, sqrt
from typing import TYPE_CHECKING

from expunge.data.people import Colour
from expunge.data.portrait_looks import Face, View

if TYPE_CHECKING:
    from PIL.ImageDraw import ImageDraw

Point = tuple[float, float]
BLACK: Colour = (20, 16, 16)
WHITE: Colour = (244, 242, 238)
DEEP = 0.62  # how far the middle of the face stands out from the plane of the ears


class Canvas:
    """Draws head coordinates into a picture of ``side`` pixels."""

    def __init__(self, draw: ImageDraw, side: int, face: Face, view: View) -> None:
        self.draw, self.side, self.view = draw, side, view
        self.wide = face.width
        self.unit = 0.31 * side * view.scale
        self.centre = (0.5 + view.shift_x) * side, (0.49 + view.shift_y) * side

    def place(self, x: float, y: float, depth: float) -> Point:
        """Pixels of a point; ``depth`` is 1 on the face's surface, 0 in the plane of the ears, -1 behind the head."""
        round_x, round_y = min(1.0, abs(x) / (1.15 * self.wide)), min(1.0, abs(y) / 1.4)
        z = depth * DEEP * sqrt(max(0.0, 1 - round_x**2)) * sqrt(1 - 0.5 * round_y**2)
        x, y = x * cos(self.view.yaw) + z * sin(self.view.yaw), y * cos(self.view.pitch) + z * sin(self.view.pitch)
        x, y = x * cos(self.view.roll) - y * sin(self.view.roll), x * sin(self.view.roll) + y * cos(self.view.roll)
        return self.centre[0] + self.unit * x, self.centre[1] + self.unit * y

    def fill(self, points: Iterable[Point], colour: Colour, depth: float = 1.0) -> None:
        self.draw.polygon([self.place(x, y, depth) for x, y in points], fill=colour)

    def line(self, points: Sequence[Point], colour: Colour, width: float, depth: float = 1.0) -> None:
        pixels = max(1, round(width * self.unit))
        self.draw.line([self.place(x, y, depth) for x, y in points], fill=colour, width=pixels, joint="curve")

    def body(self, points: Iterable[Point], colour: Colour) -> None:
        """What does not turn with the head."""
        (cx, cy), unit = self.centre, self.unit
        self.draw.polygon([(cx + unit * x, cy + unit * y) for x, y in points], fill=colour)


def oval(
    x: float, y: float, wide: float, high: float, start: float = 0, end: float = 2 * pi, n: int = 24
) -> list[Point]:
    """Points of an ellipse, or of an arc from ``start`` to ``end`` (0 is to the right, pi/2 below)."""
    steps = (start + (end - start) * i / n for i in range(n + 1))
    return [(x + wide * cos(t), y + high * sin(t)) for t in steps]


def outline(face: Face, grow: float = 0.0, lowest: float = 1.0) -> list[Point]:
    """The edge of the face from one temple over the chin to the other, ``grow`` outside of it."""
    points = []
    for i in range(25):
        t = pi * i / 24
        down = sin(t)
        # A square jaw keeps its width for longer on the way to the chin.
        width = face.width * (1 - (0.42 - 0.34 * face.jaw) * down**2)
        points.append(((width + grow) * cos(t) * (1 + 0.25 * face.jaw * down * abs(cos(t))), (lowest + grow) * down))
    return points


def crown(face: Face, grow: float = 0.0) -> list[Point]:
    """The edge of the skull above the temples, from the left to the right one."""
    return oval(0, 0, face.width + grow, 1 + grow, pi, 2 * pi)


def mirrored(half: Sequence[Point]) -> list[Point]:
    """A shape that is the same on both sides, from its right half."""
    return [*half, *((-x, y) for x, y in reversed(half))]
