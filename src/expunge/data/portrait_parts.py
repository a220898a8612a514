"""The parts of a portrait below the hair: background, clothes, ears, skull, eyes, nose, mouth, beard."""

from __future__ import annotations

from collections.abc import Iterable
from math import sqrt
from typing import TYPE_CHECKING

import numpy as np

from expunge.data.portrait_canvas import BLACK, WHITE, Canvas, Point, crown, mirrored, outline, oval
from expunge.data.portrait_looks import PLACES, VIVID, Face, View, mix

if TYPE_CHECKING:
    from PIL.ImageDraw import ImageDraw


def background(draw: ImageDraw, side: int, view: View) -> None:
    setting, first, second = PLACES[view.place]
    draw.rectangle((0, 0, side, side), fill=first)
    if setting == "plain":
        draw.polygon([(0, side), (side, 0), (side, side)], fill=second)
    elif setting == "horizon":
        level = side * (0.45 + view.pitch)
        draw.polygon([(0, level), (side, level + side * view.roll / 2), (side, side), (0, side)], fill=second)
    elif setting == "stripes":
        step = side // 6
        for left in range(-step + view.grain % step, side, step):
            draw.rectangle((left, 0, left + step // 2, side), fill=second)
    else:
        chance = np.random.Generator(np.random.PCG64(view.grain + 1))
        for x, y, r in chance.integers(0, side, (14, 3)).tolist():
            radius = side // 40 + r // 20
            draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=mix(first, second, 0.35 + r / side / 2))


def shoulders(canvas: Canvas, face: Face, view: View) -> None:
    colour = VIVID[view.clothes]
    dark, shade = mix(colour, BLACK, 0.3), mix(face.skin, BLACK, 0.22)
    neck = 0.62 * face.width
    canvas.body([(-2.6, 3), (-1.7, 1.45), (-0.6, 1.2), (0.6, 1.2), (1.7, 1.45), (2.6, 3)], colour)
    canvas.body([(-neck, 0.4), (neck, 0.4), (neck * 1.1, 1.3), (-neck * 1.1, 1.3)], shade)
    if view.collar == 0:
        canvas.body(oval(0, 1.22, neck * 1.15, 0.22), shade)
    elif view.collar == 1:
        canvas.body([(-neck * 1.1, 1.2), (neck * 1.1, 1.2), (0, 1.75)], shade)
        canvas.body([(-neck * 1.2, 1.1), (-neck * 0.5, 1.45), (-neck * 1.6, 1.5)], dark)
        canvas.body([(neck * 1.2, 1.1), (neck * 0.5, 1.45), (neck * 1.6, 1.5)], dark)
    else:
        canvas.body([(-neck * 1.2, 1.08), (neck * 1.2, 1.08), (neck * 1.3, 1.5), (-neck * 1.3, 1.5)], dark)


def ears(canvas: Canvas, face: Face, view: View) -> None:
    for sign in (-1, 1):
        canvas.fill(
            oval(sign * (face.width + 0.02), 0.05, face.ears * 0.8, face.ears * 1.4), mix(face.skin, BLACK, 0.12), 0
        )


# -- the face --------------------------------------------------------------------------------------------------------


def skull(canvas: Canvas, face: Face, view: View) -> None:
    canvas.fill([*crown(face), *outline(face)], face.skin, 0.25)


def cheeks(canvas: Canvas, face: Face, view: View) -> None:
    shade = mix(face.skin, BLACK, 0.16 + 0.14 * face.wrinkles)
    for sign in (-1, 1):
        canvas.fill(oval(sign * face.width * 0.58, 0.32, 0.17, 0.12), mix(face.skin, face.lips, 0.22))
        if face.wrinkles > 0.25:
            canvas.line(
                [(sign * (face.nose_width + 0.06), 0.3), (sign * (face.mouth_width + 0.06), 0.56)], shade, 0.045
            )
        if face.freckles:
            for i in range(5):
                x, y = sign * face.width * (0.32 + 0.11 * (i % 3)), 0.17 + 0.11 * (i % 2) + 0.04 * i
                canvas.fill(oval(x, y, 0.036, 0.036, n=8), mix(face.skin, (120, 50, 10), 0.6))
    if face.wrinkles > 0.5:
        for y in (-0.52, -0.62):
            canvas.line([(-0.4, y), (0, y - 0.03), (0.4, y)], shade, 0.04)
    if face.mole:
        canvas.fill(oval(face.side * face.width * 0.6, face.mole, 0.06, 0.06, n=10), (54, 28, 22))
    if face.scar:
        x = -face.side * face.width * 0.55
        canvas.line([(x - 0.06, 0.12), (x + 0.08, 0.5)], mix(face.skin, (196, 60, 70), 0.7), 0.05)


def eyes(canvas: Canvas, face: Face, view: View) -> None:
    narrow = {"calm": 1.0, "smiling": 0.85, "laughing": 0.55, "serious": 0.8}[view.mood]
    wide, high = face.eye_size, face.eye_size * face.eye_open * narrow
    lift = -0.06 if view.mood == "serious" else 0.0
    for sign in (-1, 1):
        x, y = sign * face.eye_x, face.eye_y

        def at(points: Iterable[Point], x: float = x, y: float = y, tilt: float = sign * face.eye_tilt) -> list[Point]:
            return [(x + dx, y + dy - tilt * dx) for dx, dy in points]

        canvas.fill(at(oval(0, 0, wide * 1.12, high * 1.25 + 0.02)), mix(face.skin, BLACK, 0.35))
        canvas.fill(at(oval(0, 0.015, wide, high)), WHITE)
        canvas.fill(at(oval(0, 0.01, high * 0.95, high * 0.95, n=16)), face.eyes)
        canvas.fill(at(oval(0, 0.01, high * 0.45, high * 0.45, n=12)), BLACK)
        canvas.line(at([(-wide, 0), (-wide * 0.5, -high * 0.9), (wide * 0.5, -high * 0.9), (wide, 0)]), BLACK, 0.035)
        top, tilt = y - face.brow_gap - lift - high * 0.4, sign * (face.brow_tilt - 2 * lift)
        inner, outer = (-1.2 * wide, 1.2 * wide) if sign > 0 else (1.2 * wide, -1.2 * wide)
        arch = [
            (x + inner, top - tilt * inner),
            (x + outer * 0.2, top - 0.06 - tilt * outer * 0.2),
            (x + outer, top - tilt * outer),
        ]
        canvas.line(arch, mix(face.hair, BLACK, 0.35), face.brow)


def nose(canvas: Canvas, face: Face, view: View) -> None:
    top, end, wide = face.eye_y + 0.02, face.eye_y + 0.12 + face.nose_length, face.nose_width
    shade, bright = mix(face.skin, BLACK, 0.24), mix(face.skin, WHITE, 0.22)
    turn = -1 if view.yaw > 0 else 1
    canvas.fill(
        [(0, top), (turn * wide * 0.35, top + 0.1), (turn * wide, end), (0, end + 0.05)],
        mix(face.skin, BLACK, 0.13),
        1.1,
    )
    canvas.line([(0, top + 0.08), (0, end - 0.08)], bright, 0.06, 1.25)
    canvas.fill(oval(0, end - 0.02, wide * 0.95, 0.085), mix(face.skin, face.lips, 0.16), 1.2)
    for sign in (-1, 1):
        canvas.fill(oval(sign * wide * 0.55, end + 0.035, wide * 0.32, 0.032, n=10), shade, 1.15)


def mouth(canvas: Canvas, face: Face, view: View) -> None:
    wide = face.mouth_width * {"calm": 1.0, "smiling": 1.2, "laughing": 1.2, "serious": 0.95}[view.mood]
    curve = {"calm": 0.01, "smiling": 0.10, "laughing": 0.10, "serious": -0.06}[view.mood]
    y, lip = face.mouth_y, face.lip
    xs = [wide * (i / 8 - 1) for i in range(17)]
    bow = [curve * (1 - 2 * (x / wide) ** 2) for x in xs]  # lower in the middle when smiling
    full = [sqrt(max(0.0, 1 - (x / wide) ** 2)) for x in xs]
    opened = 0.15 if view.mood == "laughing" else 0.0
    upper = [(x, y + b - lip * f) for x, b, f in zip(xs, bow, full, strict=True)]
    lower = [(x, y + b + (opened + lip * 1.2) * f) for x, b, f in zip(xs, bow, full, strict=True)]
    canvas.fill([*upper, *reversed(lower)], face.lips)
    middle = [(x, y + b) for x, b in zip(xs, bow, strict=True)]
    if opened:
        inside = [(x, y + b + opened * f) for x, b, f in zip(xs, bow, full, strict=True)]
        canvas.fill([*middle, *reversed(inside)], (92, 24, 30))
        teeth = [(x, y + b + 0.5 * opened * f) for x, b, f in zip(xs, bow, full, strict=True)]
        canvas.fill([*middle[2:-2], *reversed(teeth[2:-2])], WHITE)
    else:
        canvas.line(middle, mix(face.lips, BLACK, 0.55), 0.035)


def beard(canvas: Canvas, face: Face, view: View) -> None:
    if face.beard == "none":
        return
    wide, y = face.mouth_width, face.mouth_y
    low = y + face.lip * 1.2 + 0.05 + (0.15 if view.mood == "laughing" else 0.0)  # below the lips
    colour = mix(face.hair, BLACK, 0.15)
    if face.beard == "stubble":
        colour = mix(face.skin, colour, 0.38)
    edge = [(x, at) for x, at in outline(face, 0.02, 1.28 if face.beard == "full" else 1.03) if at > 0.22]
    if face.beard == "chin strap":
        canvas.fill([*edge, *((0.9 * x, 0.9 * at) for x, at in reversed(edge))], colour, 0.4)
    elif face.beard in ("full", "stubble"):
        cheek = [(-face.width * 0.74, 0.42), (-wide * 1.1, y + 0.04), (-wide * 0.7, low)]
        canvas.fill([*edge, *mirrored(cheek)], colour, 0.5)
    elif face.beard == "goatee":
        canvas.fill(mirrored([(wide * 0.75, low), (wide * 0.6, 0.98), (0, 1.16)]), colour)
    if face.beard != "chin strap":
        upper = [(0.0, y - 0.13), (wide * 0.5, y - 0.17), (wide * 1.15, y + 0.02)]
        canvas.fill(mirrored([*upper, (wide * 0.5, y - 0.07), (0, y - face.lip * 0.8)]), colour, 1.1)
