"""Read a picture that somebody else made: its size is known before a pixel is decoded, and every mode ends as uint8.

Shape suffixes: H height, W width, C channels.
"""

from __future__ import annotations

import io
import warnings
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from expunge.errors import UserError

MOST_PIXELS = 1 << 26  # 67 million, more than cameras give and less than Pillow itself warns of (89 million)
MOST_BYTES = 1 << 28  # of one encoded picture
# What Pillow can open is more, among it PostScript, which starts another program.
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
ENDINGS = frozenset({".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"})
GREY = ("1", "L", "LA", "La")


def read_picture(source: Path | bytes, called: str) -> NDArray[np.uint8]:
    """(H, W, 1) for a grey picture, (H, W, 3) for any other; the name's ending does not matter, the content does.

    Turned as its EXIF tag says. Transparent parts are laid on white, as a viewer shows them. 16 bits are scaled to 8.
    Of several frames the first is taken. ``called`` is how messages name the picture.

    Raises:
        UserError: no such file, no picture, cut off, more than 67 million pixels, or floating-point pixels.
    """
    from PIL import Image, UnidentifiedImageError

    if isinstance(source, Path) and not source.is_file():  # also a pipe, which would be waited for
        raise UserError(f"the image {called} does not exist: check the path.")
    too_large = (
        f"{called} has more than {MOST_PIXELS / 1e6:.0f} million pixels, the most that is read: make it smaller."
    )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            file = io.BytesIO(source) if isinstance(source, bytes) else source
            with Image.open(file, formats=FORMATS) as opened:  # reads the header alone
                if opened.width * opened.height > MOST_PIXELS:
                    raise UserError(too_large)
                return _array(opened, called)
    except UserError:
        raise
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        raise UserError(too_large) from error
    except UnidentifiedImageError as error:
        raise UserError(
            f"{called} is no readable image: give a picture of one of the kinds {', '.join(FORMATS)}."
        ) from error
    except Exception as error:  # a damaged file makes Pillow's readers raise a dozen classes, SyntaxError among them
        raise UserError(f"{called} is no readable image, it is cut off or damaged: copy it again.") from error


def on_white(array_HWC: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """(H, W, 3) from (H, W, 4) whose last channel is how opaque a pixel is."""
    from PIL import Image

    return np.asarray(_on_white(Image.fromarray(np.ascontiguousarray(array_HWC))).convert("RGB"))


def _on_white(image: Any) -> Any:
    from PIL import Image

    clear = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", clear.size, "white"), clear)


def _array(opened: Any, called: str) -> NDArray[np.uint8]:
    from PIL import ImageOps

    image = ImageOps.exif_transpose(opened)
    if image.mode == "I" or image.mode.startswith("I;16"):
        deep = np.asarray(image).astype(np.int64)  # convert() would cut everything above 255
        if deep.min() < 0 or deep.max() > 65535:
            raise UserError(f"{called} has pixels of 32 bits: save it with 8 or 16 bits.")
        return np.round(deep / 257).astype(np.uint8)[:, :, None]
    if image.mode == "F":
        raise UserError(f"{called} has floating-point pixels, whose range is not known: save it with 8 or 16 bits.")
    grey = image.mode in GREY
    if image.has_transparency_data:
        image = _on_white(image)
    array = np.asarray(image.convert("L" if grey else "RGB"))
    return array[:, :, None] if grey else array
