"""IDX files (the format of MNIST and its relatives): a header with the shape, then the numbers, big-endian."""

from __future__ import annotations

import gzip
import zlib
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from expunge.errors import UserError

KIND = 0x08  # unsigned bytes, the only kind that images and labels come in
MOST = 1 << 30  # bytes that one file may unpack to


def read_idx(path: Path, dimensions: int) -> NDArray[np.uint8]:
    """The array in an IDX file, plain or ``.gz``.

    Raises:
        UserError: no IDX file of unsigned bytes with that many dimensions, or it is cut off.
    """
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            raw = file.read(MOST + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"'{path}' cannot be read ({error}): fetch it again.") from error
    start = 4 + 4 * dimensions
    if len(raw) < start or raw[:4] != bytes((0, 0, KIND, dimensions)):
        raise UserError(f"'{path}' is no IDX file of bytes with {dimensions} dimension(s): fetch it again.")
    shape = tuple(int(n) for n in np.frombuffer(raw[4:start], dtype=">u4"))
    values = np.frombuffer(raw[start:], dtype=np.uint8)
    if len(values) != int(np.prod(shape)):
        raise UserError(f"'{path}' says {shape} but holds {len(values)} values: it is cut off, fetch it again.")
    return values.reshape(shape)
