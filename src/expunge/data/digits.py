"""``digits``: 1,797 handwritten digits of 8 x 8 pixels that come with scikit-learn; nothing is fetched."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from expunge.data.image_roles import ImageSizes, image_dataset
from expunge.data.pool import pool_of
from expunge.data.registry import dataset
from expunge.data.samples import Dataset

CLASSES = tuple(f"digit {n}" for n in range(10))


@dataclass(frozen=True, kw_only=True)
class DigitsOptions(ImageSizes):
    """Sizes count images; there are 1,797."""


@dataset(
    name="digits",
    options=DigitsOptions,
    summary="1,797 handwritten digits of 8 x 8 grey pixels, 10 classes",
    origin="scikit-learn's copy of UCI Optical Recognition of Handwritten Digits (Alpaydin and Kaynak 1998)",
    licence="CC BY 4.0",
    modality="classifier",
)
def load(options: DigitsOptions, *, data_dir: Path | None, seed: int) -> Dataset:
    """Digits in roles; ``data_dir`` and ``seed`` are not used, ``split_seed`` chooses the images."""
    from sklearn.datasets import load_digits

    found = load_digits()
    images_NHW = np.round(found.images * (255 / 16)).astype(np.uint8)  # ink is counted from 0 to 16
    return image_dataset("digits", pool_of(images_NHW, found.target, CLASSES, "scikit-learn"), options)
