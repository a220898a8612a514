"""IDX files (the format of MNIST and its relatives): a header with the shape, then the numbers, big-endian."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import IO

import numpy as np
from numpy.typing import NDArray

from expunge.data.hub import local_file
from expunge.data.packed import opened
from expunge.data.pool import Pool
from expunge.errors import UserError

KIND = 0x08  # unsigned bytes, the only kind that images and labels come in
MOST = 1 << 30  # bytes that one file may unpack to
PARTS = ("train", "t10k")


def read_idx(path: Path, dimensions: int, places: Sequence[int] | None = None) -> NDArray[np.uint8]:
    """The array in an IDX file, plain or ``.gz``; with ascending ``places``, only these along the first dimension.

    Raises:
        UserError: no IDX file of unsigned bytes with that many dimensions, or it is cut off.
    """
    with opened(path) as file:
        shape = _shape(file, path, dimensions)
        start, size, row = file.tell(), math.prod(shape), math.prod(shape[1:])
        if places is None:
            raw = file.read(size)
        else:
            rows = []
            for place in places:
                file.seek(start + place * row)  # in .gz: unpacked and dropped
                rows.append(file.read(row))
            raw, shape = b"".join(rows), (len(places), *shape[1:])
            file.seek(start + max(0, size - 1))  # the end is looked at, so that a file cut off behind is found
            file.read(min(1, size))
        if len(raw) != math.prod(shape) or file.tell() != start + size or file.read(1):
            raise UserError(f"'{path}' does not hold the {size} values that it says: it is cut off, fetch it again.")
    return np.frombuffer(raw, dtype=np.uint8).reshape(shape)


def _shape(file: IO[bytes], path: Path, dimensions: int) -> tuple[int, ...]:
    head = file.read(4 + 4 * dimensions)
    if len(head) < 4 + 4 * dimensions or head[:4] != bytes((0, 0, KIND, dimensions)):
        raise UserError(f"'{path}' is no IDX file of bytes with {dimensions} dimension(s): fetch it again.")
    shape = tuple(int(n) for n in np.frombuffer(head[4:], dtype=">u4"))
    if math.prod(shape) > MOST:
        raise UserError(f"'{path}' says that it holds more than {MOST >> 30} GiB: fetch it again.")
    return shape


def idx_pool(data_dir: Path | None, part: str, dataset: str, classes: Sequence[str], home: str) -> Pool:
    """The pictures of a dataset in MNIST's form: ``train-images-idx3-ubyte`` and so on, plain or ``.gz``.

    Raises:
        UserError: no folder (``home`` says where the files come from), a file that is missing or broken, or images and
            labels of unequal number.
    """
    if data_dir is None:
        raise UserError(
            f"dataset '{dataset}' is read from files: give --data-dir with train-images-idx3-ubyte.gz and its fellows "
            f"from {home}."
        )
    files = []
    for kind, dimensions in (("images", 3), ("labels", 1)):
        name = f"{part}-{kind}-idx{dimensions}-ubyte"
        dotted = f"{part}-{kind}.idx{dimensions}-ubyte"  # as some unpackers call it
        files.append(local_file(data_dir, (f"{name}.gz", name, dotted), dataset))
    images, labels_N = files[0], read_idx(files[1], 1)
    with opened(images) as file:
        number = _shape(file, images, 3)[0]
    if number != len(labels_N):
        raise UserError(f"'{data_dir}' has {number} images and {len(labels_N)} labels: fetch the files again.")
    return Pool(
        labels_N=labels_N.astype(np.int64),
        classes=classes,
        read=lambda places: list(read_idx(images, 3, places)),
        source=str(data_dir),
    )
