"""A pool of labelled pictures, somewhere: what stands in it is known, pixels are read only for the places asked for.

Shape suffixes: N pictures, H height, W width, C channels.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from expunge.data.pictures import read_picture
from expunge.data.samples import Image
from expunge.errors import UserError

MOST_HELD = 1 << 31  # bytes of decoded pictures that are kept in memory
MOST_CLASSES = 1 << 20
MARGIN = 64  # looked at beyond what is wanted, as some may be duplicates


@dataclass(frozen=True, kw_only=True)
class Pool:
    """``read(places)`` gives the pictures at ascending ``places`` and reads no other: arrays, or files as paths.

    ``labels_N`` are positions in ``classes``; ``notes`` go into the dataset's.
    """

    labels_N: NDArray[np.int64]
    classes: Sequence[str]
    read: Callable[[Sequence[int]], Sequence[Image]]
    source: str
    notes: tuple[str, ...] = ()

    def check(self) -> Pool:
        """The pool itself, if every label is a class.

        Raises:
            UserError: a label is not.
        """
        wrong = np.flatnonzero((self.labels_N < 0) | (self.labels_N >= len(self.classes)))
        if len(wrong):
            raise UserError(
                f"'{self.source}': picture {wrong[0]} has the label {self.labels_N[wrong[0]]}, outside of the "
                f"{len(self.classes)} classes: allowed are 0 to {len(self.classes) - 1}."
            )
        return self

    def different(self, order: Sequence[int], wanted: int) -> dict[int, Image]:
        """The first ``wanted`` pictures of ``order`` whose pixels did not occur before in it; fewer if there are fewer.

        Every file among them is decoded once here, so that a damaged one is found before anything is trained.

        Raises:
            UserError: a picture that cannot be read.
        """
        found: dict[int, Image] = {}
        seen: set[bytes] = set()
        at = 0
        while len(found) < wanted and at < len(order):
            part = order[at : at + wanted - len(found) + MARGIN]
            at += len(part)
            ascending = sorted(part)
            images = dict(zip(ascending, self.read(ascending), strict=True))
            for place in part:
                mark = _mark(images[place])
                if mark not in seen and len(found) < wanted:
                    seen.add(mark)
                    found[place] = images[place]
        return found


def pool_of(images_N: Sequence[Image], labels_N: NDArray[np.integer], classes: Sequence[str], source: str) -> Pool:
    """A pool of pictures that are in memory already."""
    return Pool(
        labels_N=np.asarray(labels_N, dtype=np.int64),
        classes=classes,
        read=lambda places: [images_N[place] for place in places],
        source=source,
    )


def class_names(labels_N: NDArray[np.int64]) -> tuple[str, ...]:
    """Names for classes that have none: one for each number up to the highest label.

    Raises:
        UserError: a label of a million or more, which numbers no class.
    """
    if labels_N.max(initial=0) >= MOST_CLASSES:
        raise UserError(f"the label {labels_N.max()} is no class: number the classes from 0 on.")
    return tuple(f"class {number}" for number in range(1 + int(labels_N.max(initial=0))))


class Held:
    """Counts the bytes of pictures that are kept in memory."""

    def __init__(self, source: str) -> None:
        self.source, self.bytes = source, 0

    def keep(self, array: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """The array itself.

        Raises:
            UserError: more than 2 GiB are kept now.
        """
        self.bytes += array.nbytes
        if self.bytes > MOST_HELD:
            raise UserError(
                f"the pictures asked for from '{self.source}' take more than {MOST_HELD >> 30} GiB in memory: ask for "
                "fewer, or unpack them into class folders, from which they are read when they are needed."
            )
        return array


def _mark(image: Image) -> bytes:
    array = image if isinstance(image, np.ndarray) else read_picture(Path(image), f"'{image}'")
    return hashlib.sha256(repr(array.shape).encode() + np.ascontiguousarray(array).tobytes()).digest()
