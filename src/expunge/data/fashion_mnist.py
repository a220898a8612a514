"""``fashion-mnist``: 70,000 pictures of clothes of 28 x 28 pixels, read from the four IDX files."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from expunge.data.idx import PARTS, idx_pool
from expunge.data.image_roles import ImageSizes, image_dataset
from expunge.data.registry import dataset
from expunge.data.samples import Dataset
from expunge.options import option

CLASSES = (
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class FashionOptions(ImageSizes):
    """Sizes count images."""

    part: str = option("train", "which files: train (60,000 images) or t10k (10,000)", choices=PARTS)


@dataset(
    name="fashion-mnist",
    options=FashionOptions,
    summary="70,000 pictures of clothes of 28 x 28 grey pixels, 10 classes",
    origin="Zalando Research (arXiv 1708.07747): IDX files in --data-dir",
    licence="MIT",
    modality="classifier",
)
def load(options: FashionOptions, *, data_dir: Path | None, seed: int) -> Dataset:
    """Pictures in roles; ``seed`` is not used, ``split_seed`` chooses the images."""
    pool = idx_pool(data_dir, options.part, "fashion-mnist", CLASSES, "github.com/zalandoresearch/fashion-mnist")
    return image_dataset("fashion-mnist", pool, options)
