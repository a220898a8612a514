"""The parts of a portrait on and behind the head: hair, headwear, glasses, earrings."""

from __future__ import annotations

from functools import partial
from math import cos, pi, sin

from expunge.data.portrait_canvas import BLACK, WHITE, Canvas, crown, mirrored, outline, oval
from expunge.data.portrait_looks import Face, View, mix

ON_TOP, BEHIND = 0.15, -0.5  # depths: on the skull, behind the head


def back_hair(canvas: Canvas, face: Face, view: View) -> None:
    """What hangs or stands behind the head; under a scarf nothing does."""
    if face.headwear == "scarf":
        return
    wide, dark = face.width + face.volume, mix(face.hair, BLACK, 0.25)
    behind = partial(canvas.fill, depth=BEHIND)
    if face.hair_style in ("long", "fringe"):
        low, out = (1.5, 0.12) if face.hair_style == "long" else (0.75, 0.14)
        top = oval(0, -0.1, wide + out - 0.04, 1 + face.volume, pi, 2 * pi)
        behind([*top, (wide + out, low), (-wide - out, low)], dark)
    elif face.hair_style == "curly":
        for i in range(15):
            t = pi * (0.9 + 1.2 * i / 14)
            behind(oval((wide + 0.06) * cos(t), -0.12 + (1.0 + face.volume) * sin(t), 0.3, 0.3, n=10), dark)
    elif face.hair_style == "bun":
        behind(oval(0, -1.2 - face.volume, 0.36, 0.34), dark)
    elif face.hair_style == "braids":
        for sign in (-1, 1):
            for i in range(6):
                knot = oval(sign * (face.width + 0.12), 0.05 + 0.28 * i, 0.2, 0.19, n=10)
                behind(knot, face.hair if i % 2 else dark)


def hair(canvas: Canvas, face: Face, view: View) -> None:
    """What lies on the skull and frames the face."""
    style = {"bald": _bald, "curly": _curly, "long": _parted, "parted": _parted}.get(face.hair_style, _combed)
    style(canvas, face)


def _bald(canvas: Canvas, face: Face) -> None:
    if face.wrinkles > 0.3:  # a wreath is left
        for sign in (-1, 1):
            wreath = [(sign * (face.width + out), y) for out, y in ((0.06, -0.5), (0.1, 0.05), (-0.08, -0.1))]
            canvas.fill(wreath, face.hair, ON_TOP)
    canvas.fill(oval(-0.25 * face.side, -0.72, 0.2, 0.1), mix(face.skin, WHITE, 0.35))


def _curly(canvas: Canvas, face: Face) -> None:
    light = mix(face.hair, WHITE, 0.14)
    for i in range(9):
        t = pi * (1.02 + 0.96 * i / 8)
        lock = oval(face.width * 0.9 * cos(t), 0.02 + 0.86 * sin(t), 0.26, 0.24, n=10)
        canvas.fill(lock, light if i % 2 else face.hair, ON_TOP)
    for i in range(5):
        lock = oval(face.width * (0.3 * i - 0.6), -0.84, 0.24, 0.22, n=10)
        canvas.fill(lock, face.hair if i % 2 else light, ON_TOP)


def _parted(canvas: Canvas, face: Face) -> None:
    """To both sides of a parting; the long form falls in front of the ears."""
    wide, line, part = face.width, face.hair_line, face.side * face.width * 0.4
    right = [*crown(face, face.volume), (wide + 0.02, 0.02), (wide - 0.06, -0.2), (wide * 0.86, line + 0.35)]
    left = [(part, line - 0.16), (-wide * 0.86, line + 0.35), (-wide + 0.06, -0.2), (-wide - 0.02, 0.02)]
    canvas.fill([*right, *left], face.hair, ON_TOP)
    canvas.line([(part, line - 0.12), (part * 0.9, -0.98)], mix(face.hair, WHITE, 0.14), 0.05, 0.5)
    if face.hair_style == "long" and face.headwear != "scarf":
        out = wide + face.volume
        for sign in (-1, 1):
            fall = ((out, -0.2), (out + 0.06, 1.4), (wide - 0.02, 1.35), (wide - 0.10, -0.25))
            canvas.fill([(sign * x, y) for x, y in fall], face.hair, ON_TOP)


def _combed(canvas: Canvas, face: Face) -> None:
    """Short hair, a fringe, a bun or braids: the same on both sides."""
    wide, line, brow = face.width, face.hair_line, face.eye_y - face.brow_gap + 0.02
    grow, half = {
        "short": (face.volume, [(wide + 0.02, 0.02), (wide - 0.06, -0.2), (wide * 0.72, line)]),
        "fringe": (face.volume, [(wide + face.volume * 0.8, 0.6), (wide - 0.08, 0.55), (wide - 0.1, brow)]),
        "bun": (0.06, [(wide - 0.06, -0.15), (wide * 0.5, line), (0, line - 0.06)]),
        "braids": (0.08, [(wide, 0.0), (wide * 0.6, line + 0.14), (0, -0.95)]),
    }[face.hair_style]
    canvas.fill([*crown(face, grow), *mirrored(half)], face.hair, ON_TOP)
    if face.hair_style == "fringe":
        for i in range(4):
            strand = [(wide * (0.36 * i - 0.54), brow), (wide * (0.3 * i - 0.45), -0.8)]
            canvas.line(strand, mix(face.hair, WHITE, 0.14), 0.03, 0.6)
    elif face.hair_style == "braids":
        canvas.line([(0, -0.92), (0, -1.06)], mix(face.skin, BLACK, 0.1), 0.05, 0.2)


def headwear(canvas: Canvas, face: Face, view: View) -> None:
    grow = face.volume + 0.05
    if face.headwear == "headband":
        wide = face.width + (0.06 if face.hair_style in ("bun", "braids", "bald") else face.volume)
        lower = [(-wide - 0.02, -0.42), (0.0, -0.74), (wide + 0.02, -0.42)]
        canvas.fill([*lower, (wide - 0.02, -0.62), (0, -0.96), (-wide + 0.02, -0.62)], face.cloth, 0.5)
    elif face.headwear == "cap":
        canvas.fill([*crown(face, grow), (face.width, -0.46), (-face.width, -0.46)], face.cloth, ON_TOP)
        canvas.fill(oval(face.side * 0.1, -0.5, face.width * 1.05, 0.16), mix(face.cloth, BLACK, 0.3), 1.25)
    elif face.headwear == "scarf":
        # Over the hair and around the chin; the face looks out of it.
        ring = [*crown(face, grow), *outline(face, grow + 0.02, 1.12)]
        hole = [*oval(0, -0.1, face.width * 0.9, 0.52, pi, 2 * pi)]
        hole += [(x * 0.9, -0.1 + y * 0.98) for x, y in outline(face)]
        canvas.fill([*ring, ring[0], hole[0], *reversed(hole)], face.cloth, 0.2)


def glasses(canvas: Canvas, face: Face, view: View) -> None:
    if face.glasses == "none":
        return
    reach, y = max(face.eye_size * 1.35, 0.22), face.eye_y
    for sign in (-1, 1):
        x = sign * max(face.eye_x, reach + 0.04)
        if face.glasses == "round":
            shape = oval(x, y, reach, reach)
        elif face.glasses == "square":
            corners = ((-1, -0.2), (1, -0.2), (1, 0.2), (-1, 0.2), (-1, -0.2))
            shape = [(x + reach * across, y + down) for across, down in corners]
        else:  # half-moon
            shape = [*oval(x, y, reach, reach, 0, pi), (x + reach, y)]
        canvas.line(shape, face.frame, 0.07, 1.1)
        canvas.line([(x + sign * reach, y - 0.04), (sign * (face.width + 0.02), y - 0.05)], face.frame, 0.06, 0.8)
    canvas.line([(-0.1, y), (0, y - 0.05), (0.1, y)], face.frame, 0.06, 1.25)


def earrings(canvas: Canvas, face: Face, view: View) -> None:
    if face.earrings and face.headwear != "scarf":
        for sign in (-1, 1):
            canvas.fill(oval(sign * (face.width + 0.06), 0.2 + face.ears, 0.09, 0.11, n=12), (246, 202, 66), 0)
