"""``.npz`` files of images or feature vectors with labels: rows are streamed, pickled objects are never opened.

Shape suffixes: N rows, H height, W width, C channels.
"""

from __future__ import annotations

import math
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray

from expunge.data.pictures import MOST_PIXELS
from expunge.data.pool import Held, Pool, class_names
from expunge.errors import UserError

CONTENTS = ("images", "features", "data", "x", "X", "arr_0")
LABELS = ("labels", "label", "targets", "y", "Y", "arr_1")


@dataclass(frozen=True)
class NpzArray:
    """One array of an ``.npz``, of which only the header was read."""

    path: Path
    name: str
    shape: tuple[int, ...]
    dtype: np.dtype[Any]

    def rows(self, places: Sequence[int] | None = None) -> Iterator[NDArray[Any]]:
        """Rows at ascending ``places``, or all; those between are unpacked and dropped.

        Raises:
            UserError: the file is damaged or cut off.
        """
        size = math.prod(self.shape[1:]) * self.dtype.itemsize
        with _opened(self.path, self.name) as file:
            _header(file, self.path, self.name)
            start = file.tell()
            for place in range(self.shape[0]) if places is None else places:
                if places is not None:
                    file.seek(start + place * size)
                raw = file.read(size)
                if len(raw) != size:
                    raise UserError(f"'{self.path}': array '{self.name}' is cut off: copy the file again.")
                yield np.frombuffer(raw, dtype=self.dtype).reshape(self.shape[1:])

    def whole(self) -> NDArray[Any]:
        return np.stack(list(self.rows())) if self.shape[0] else np.zeros(self.shape, self.dtype)


def npz_pair(path: Path, part: str = "") -> tuple[NpzArray, NDArray[np.int64]]:
    """The array of images or feature vectors, and the labels as whole numbers (one-hot rows are read as such).

    Arrays are called ``images`` and ``labels``, or ``features``, ``data``, ``x``, ``targets``, ``y``; with ``part``
    also ``x_train`` or ``train_images``.

    Raises:
        UserError: no ``.npz``, no such arrays, objects in them (which only a pickle holds), unequal numbers, or labels
            that are no whole numbers.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            names = [n.removesuffix(".npy") for n in archive.namelist() if n.endswith(".npy")]
    except (OSError, zipfile.BadZipFile) as error:
        raise UserError(f"'{path}' is no readable .npz file: write it with numpy.savez_compressed.") from error
    content, labels = (_array(path, names, kind, part) for kind in (CONTENTS, LABELS))
    if content.shape[:1] != labels.shape[:1]:
        raise UserError(
            f"'{path}': '{content.name}' has {content.shape[0]} rows and '{labels.name}' {labels.shape[0]}: "
            "give one label for each."
        )
    return content, _labels(labels)


def npz_pool(path: Path, part: str = "") -> Pool:
    """Images as uint8 of shape (N, H, W), (N, H, W, C) or (N, C, H, W).

    Raises:
        UserError: see :func:`npz_pair`, or images of another type or shape.
    """
    content, labels_N = npz_pair(path, part)
    shape = content.shape
    first = len(shape) == 4 and shape[1] in (1, 3) and shape[3] not in (1, 3, 4)  # channels before the sides
    if (
        content.dtype != np.uint8
        or len(shape) not in (3, 4)
        or (len(shape) == 4 and not first and shape[3] not in (1, 3, 4))
    ):
        raise UserError(
            f"'{path}': '{content.name}' is {content.dtype} of shape {shape}: allowed is uint8 of shape (N, H, W), or "
            "(N, H, W, C) with 1, 3 or 4 channels."
        )
    if 0 in shape or math.prod(shape[1:3]) > MOST_PIXELS:
        raise UserError(f"'{path}': '{content.name}' has the shape {shape}: no image, or enormous ones.")

    def read(places: Sequence[int]) -> list[NDArray[np.uint8]]:
        held = Held(str(path))
        return [held.keep(row.transpose(1, 2, 0) if first else row) for row in content.rows(places)]

    return Pool(labels_N=labels_N, classes=class_names(labels_N), read=read, source=str(path))


def _array(path: Path, names: Sequence[str], kinds: Sequence[str], part: str) -> NpzArray:
    wanted = [f"{kind}_{part}" for kind in kinds] + [f"{part}_{kind}" for kind in kinds] if part else []
    name = next((n for n in (*wanted, *kinds) if n in names), None)
    if name is None:
        raise UserError(
            f"'{path}' has no array of {kinds[0]}: it has {', '.join(names) or 'none'}; call one "
            f"{' or '.join([*wanted, *kinds])}."
        )
    with _opened(path, name) as file:
        shape, dtype = _header(file, path, name)
    return NpzArray(path, name, shape, dtype)


def _labels(labels: NpzArray) -> NDArray[np.int64]:
    if len(labels.shape) > 2 or math.prod(labels.shape) > MOST_PIXELS:
        raise UserError(f"'{labels.path}': '{labels.name}' has the shape {labels.shape}: give one number per row.")
    wrong = f"'{labels.path}': '{labels.name}' holds {labels.dtype}: labels are whole numbers from 0 on."
    if labels.dtype.kind not in "iufb":
        raise UserError(wrong)
    given = labels.whole()
    if given.ndim == 2 and given.shape[1] > 1:
        if not (np.isin(given, (0, 1)).all() and (given.sum(axis=1) == 1).all()):
            raise UserError(f"'{labels.path}': '{labels.name}' is a table, but not of one 1 per row: give numbers.")
        return np.asarray(given.argmax(axis=1), dtype=np.int64)
    flat = given.reshape(-1)
    if not np.isfinite(flat).all() or (flat != np.round(flat)).any():
        raise UserError(wrong)
    return np.asarray(flat, dtype=np.int64)


@contextmanager
def _opened(path: Path, name: str) -> Iterator[IO[bytes]]:
    try:
        with zipfile.ZipFile(path) as archive, archive.open(f"{name}.npy") as file:
            yield file
    except (OSError, EOFError, RuntimeError, NotImplementedError, zipfile.BadZipFile, zlib.error) as error:
        raise UserError(f"'{path}': array '{name}' cannot be read ({error}): copy the file again.") from error


def _header(file: IO[bytes], path: Path, name: str) -> tuple[tuple[int, ...], np.dtype[Any]]:
    try:
        version = npy.read_magic(file)
        read = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
        shape, by_columns, dtype = read(file)
    except ValueError as error:
        raise UserError(f"'{path}': array '{name}' cannot be read ({error}): copy the file again.") from error
    if dtype.hasobject:
        raise UserError(
            f"'{path}': array '{name}' holds Python objects, which only a pickle can, and a pickle is never opened: "
            "save it as numbers."
        )
    if by_columns and len(shape) > 1:
        raise UserError(f"'{path}': array '{name}' is stored by columns: save numpy.ascontiguousarray of it.")
    if not shape:
        raise UserError(f"'{path}': array '{name}' is a single value: give one row per sample.")
    return tuple(shape), dtype
