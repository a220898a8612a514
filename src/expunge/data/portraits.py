"""Portraits of fictitious people, drawn by a fixed rule: who it is decides the face, the view everything else.

The same person, view and size give the same bytes in any process. The parts are filled polygons, drawn four times
larger than asked, so that edges come out smooth.

Shape suffixes: H height, W width, C colour channels, both sides being ``size``.
"""

from __future__ import annotations

from math import cos, sin

import numpy as np
from numpy.typing import NDArray

from expunge.data.people import Appearance
from expunge.data.portrait_canvas import Canvas
from expunge.data.portrait_hair import back_hair, earrings, glasses, hair, headwear
from expunge.data.portrait_looks import Face, View, face_of, view_of
from expunge.data.portrait_parts import background, beard, cheeks, ears, eyes, mouth, nose, shoulders, skull
from expunge.errors import UserError

SMALLEST, LARGEST = 16, 512
FINER = 4  # drawn so many times larger
PARTS = (back_hair, shoulders, ears, skull, cheeks, eyes, nose, mouth, beard, hair, headwear, glasses, earrings)


def portrait(who: Appearance, number: int, size: int = 32) -> NDArray[np.uint8]:
    """View ``number`` of a person: (H, W, C) uint8, RGB.

    Raises:
        UserError: a size below 16 or above 512, or a negative number.
    """
    if not SMALLEST <= size <= LARGEST or number < 0:
        raise UserError(
            f"portrait number {number} of {size} pixels was asked for: give a number from 0 on and {SMALLEST} to "
            f"{LARGEST} pixels."
        )
    face, view = face_of(who), view_of(who, number)
    return lit(paint(face, view, size), view)


def paint(face: Face, view: View, size: int) -> NDArray[np.uint8]:
    """The picture before light falls on it: (H, W, C) uint8."""
    from PIL import Image, ImageDraw

    side = size * FINER
    image = Image.new("RGB", (side, side))
    draw = ImageDraw.Draw(image)
    background(draw, side, view)
    canvas = Canvas(draw, side, face, view)
    for part in PARTS:
        part(canvas, face, view)
    return np.asarray(image.reduce(FINER))


def lit(image_HWC: NDArray[np.uint8], view: View) -> NDArray[np.uint8]:
    """The picture in the view's light: a ramp from its direction, brightness, warmth and a little sensor noise."""
    size = len(image_HWC)
    # Integers throughout: floating sums may be reordered by another build of NumPy, and a byte would differ.
    steps = np.arange(size, dtype=np.int64) * 2 - (size - 1)
    across, down = (round(1000 * view.contrast * f(view.light)) for f in (cos, sin))
    ramp_HW = (across * steps[None, :] + down * steps[:, None]) // size
    gain = round(1000 * view.brightness)
    warm = round(1000 * view.warmth)
    gain_HWC = gain + ramp_HW[:, :, None] + np.array([warm, 0, -warm])
    noise_HWC = np.random.Generator(np.random.PCG64(view.grain)).integers(-4, 5, image_HWC.shape)
    out_HWC = image_HWC.astype(np.int64) * gain_HWC // 1000 + noise_HWC
    final_HWC: NDArray[np.uint8] = np.clip(out_HWC, 0, 255).astype(np.uint8)
    return final_HWC
