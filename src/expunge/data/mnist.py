"""``mnist``: 70,000 handwritten digits of 28 x 28 pixels, read from the four IDX files."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from expunge.data.digits import CLASSES
from expunge.data.idx import PARTS, idx_pool
from expunge.data.image_roles import ImageSizes, image_dataset
from expunge.data.registry import dataset
from expunge.data.samples import Dataset
from expunge.options import option


@dataclass(frozen=True, kw_only=True)
class MnistOptions(ImageSizes):
    """Sizes count images."""

    part: str = option("train", "which files: train (60,000 images) or t10k (10,000)", choices=PARTS)


@dataset(
    name="mnist",
    options=MnistOptions,
    summary="70,000 handwritten digits of 28 x 28 grey pixels, 10 classes",
    origin="LeCun et al. 1998 (Proceedings of the IEEE 86): IDX files in --data-dir",
    licence="CC BY-SA 3.0",
    modality="classifier",
)
def load(options: MnistOptions, *, data_dir: Path | None, seed: int) -> Dataset:
    """Digits in roles; ``seed`` is not used, ``split_seed`` chooses the images."""
    pool = idx_pool(data_dir, options.part, "mnist", CLASSES, "yann.lecun.com/exdb/mnist or a copy of it")
    return image_dataset("mnist", pool, options)
