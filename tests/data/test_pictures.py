"""Pictures of every mode and every kind of damage: the pixels that a viewer shows, or one sentence."""

from __future__ import annotations

import io
import os
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from expunge.data.pictures import MOST_PIXELS, read_picture
from expunge.data.samples import Sample
from expunge.errors import UserError
from expunge.models.images import Preprocess

RNG = np.random.default_rng(0)
COLOUR = RNG.integers(0, 256, (6, 5, 3), dtype=np.uint8)
GREY = COLOUR[:, :, 0]


def saved(image: Image.Image, kind: str = "PNG", **more: Any) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **more)
    return out.getvalue()


def png(width: int, height: int, *, colour: int = 0) -> bytes:
    """A PNG whose header says a size, with a few bytes of data: a decompression bomb in small."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    head = struct.pack(">IIBBBBB", width, height, 8, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(bytes(100))) + chunk(b"IEND", b"")


def test_grey_and_colour_come_back_bit_for_bit(tmp_path: Path) -> None:
    assert (read_picture(saved(Image.fromarray(COLOUR)), "x") == COLOUR).all()
    assert (read_picture(saved(Image.fromarray(GREY)), "x")[:, :, 0] == GREY).all()
    (tmp_path / "a.jpg").write_bytes(saved(Image.fromarray(COLOUR)))  # a PNG by its content
    assert (read_picture(tmp_path / "a.jpg", "x") == COLOUR).all()
    two = saved(Image.fromarray(GREY > 99))
    assert (read_picture(two, "x")[:, :, 0] == np.where(GREY > 99, 255, 0)).all()


def test_transparent_parts_are_white() -> None:
    clear = np.dstack([COLOUR, np.full((6, 5), 255, np.uint8)])
    clear[0, 0, 3], clear[1, 1, 3] = 0, 51
    got = read_picture(saved(Image.fromarray(clear)), "x")
    assert got[0, 0].tolist() == [255] * 3 and (got[2:] == COLOUR[2:]).all()
    mixed = np.round(0.2 * COLOUR[1, 1] + 0.8 * 255)
    assert np.abs(got[1, 1] - mixed).max() <= 1
    array = Sample(id="x", subject="x", target=0, image=clear)
    assert (Preprocess(height=6, width=5).pixels(array) == got).all()
    pair = saved(Image.fromarray(np.dstack([GREY, clear[:, :, 3]]), "LA"))
    got = read_picture(pair, "x")
    assert got.shape == (6, 5, 1) and got[0, 0, 0] == 255 and (got[2:, :, 0] == GREY[2:]).all()


def test_palettes_with_and_without_a_transparent_entry() -> None:
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 40, 50, 60])
    image.putdata([0, 1])
    assert read_picture(saved(image), "x").tolist() == [[[10, 20, 30], [40, 50, 60]]]
    assert read_picture(saved(image, transparency=1), "x").tolist() == [[[10, 20, 30], [255] * 3]]
    assert read_picture(saved(image, "GIF"), "x").tolist() == [[[10, 20, 30], [40, 50, 60]]]


def test_print_colours_and_sixteen_bits() -> None:
    ink = Image.new("CMYK", (3, 2), (0, 255, 255, 0))  # no cyan, all magenta and yellow: red
    red = read_picture(saved(ink, "TIFF"), "x")
    assert red.shape == (2, 3, 3) and red[0, 0, 0] > 200 and red[0, 0, 1:].max() < 60
    deep = np.array([[0, 257, 32896, 65535]], np.uint16)
    for kind in ("PNG", "TIFF"):
        assert read_picture(saved(Image.fromarray(deep), kind), "x")[:, :, 0].tolist() == [[0, 1, 128, 255]]


@pytest.mark.parametrize("turn", range(1, 9))
def test_exif_rotation(turn: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = turn
    # What the tag says has to be done to the stored pixels (EXIF 2.3, table 6).
    undo = {
        1: lambda a: a, 2: lambda a: a[:, ::-1], 3: lambda a: a[::-1, ::-1], 4: lambda a: a[::-1],
        5: lambda a: a.swapaxes(0, 1), 6: lambda a: np.rot90(a, -1), 7: lambda a: a[::-1, ::-1].swapaxes(0, 1),
        8: np.rot90,
    }  # fmt: skip
    assert (read_picture(saved(Image.fromarray(COLOUR), exif=exif), "x") == undo[turn](COLOUR)).all()


def test_bombs_are_refused_before_a_pixel_is_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    from PIL import ImageFile

    def decoded(*_: Any) -> None:
        raise AssertionError("a pixel was decoded")

    monkeypatch.setattr(ImageFile.ImageFile, "load", decoded)
    side = 1 << 13
    assert side * side == MOST_PIXELS
    for width, height in ((side, side + 1), (10_000, 9_000), (20_000, 20_000), (1 << 30, 1)):
        with pytest.raises(UserError, match=r"'b\.png' has more than 67 million pixels"):
            read_picture(png(width, height), "'b.png'")


def damaged() -> dict[str, bytes]:
    whole = {k: saved(Image.fromarray(RNG.integers(0, 256, (64, 64, 3), dtype=np.uint8)), k)
             for k in ("PNG", "JPEG", "BMP", "TIFF", "WEBP")}  # fmt: skip
    out = {f"half {k}": raw[: len(raw) // 2] for k, raw in whole.items()}
    out |= {"little data": png(50, 50), "nothing": b"", "text": b"hello", "no colour": png(8, 8, colour=9)}
    out["script"] = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"
    flipped = bytearray(whole["PNG"])
    flipped[60] ^= 255
    out["one byte"] = bytes(flipped)
    return out


@pytest.mark.parametrize(("what", "raw"), damaged().items())
def test_damaged_files(what: str, raw: bytes, tmp_path: Path) -> None:
    path = tmp_path / "face.png"
    path.write_bytes(raw)
    for source in (path, raw):
        with pytest.raises(UserError, match=r"^'face' is no readable image[:,] .*\.$"):
            read_picture(source, "'face'")


def test_every_cut_and_every_byte_changed_is_read_or_refused() -> None:
    whole = saved(Image.fromarray(COLOUR))
    for place in range(len(whole)):
        changed = bytearray(whole)
        changed[place] ^= 0x55
        for raw in (whole[:place], bytes(changed)):
            try:
                got = read_picture(raw, "x")
            except UserError:
                continue
            assert got.dtype == np.uint8 and got.ndim == 3


def test_what_is_no_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")  # would be waited for without end
    for path in (tmp_path / "none.png", tmp_path, tmp_path / "pipe.png"):
        with pytest.raises(UserError, match="does not exist"):
            read_picture(path, f"'{path}'")


def test_numbers_without_a_range() -> None:
    with pytest.raises(UserError, match="floating-point"):
        read_picture(saved(Image.fromarray(np.ones((2, 2), np.float32)), "TIFF"), "x")
    with pytest.raises(UserError, match="32 bits"):
        read_picture(saved(Image.fromarray(np.full((2, 2), 70000, np.int32)), "TIFF"), "x")


def test_a_strip_is_not_blown_up() -> None:
    strip = Sample(id="s", subject="s", target=0, image=np.zeros((1, 1 << 19, 3), np.uint8))
    with pytest.raises(UserError, match="a strip of 524288 x 1, which would grow to 117440512 x 224"):
        Preprocess(height=224, width=224, edge=224).pixels(strip)


def test_a_size_that_may_not_be_changed() -> None:
    exact = Preprocess(height=6, width=5, channels=1, resize=False)
    assert (exact.pixels(Sample(id="s", subject="s", target=0, image=GREY))[:, :, 0] == GREY).all()
    assert exact.pixels(Sample(id="s", subject="s", target=0, image=COLOUR)).shape == (6, 5, 1)
    with pytest.raises(UserError, match="'s' is 5 x 6, and this model reads 6 x 5 without resizing"):
        exact.pixels(Sample(id="s", subject="s", target=0, image=GREY.T))
    assert Preprocess.read(exact.config(), size=9, channels=1) == exact
