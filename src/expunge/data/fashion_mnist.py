"""``fashion-mnist``: 70,000 pictures of clothes of 28 x 28 pixels, read from the four IDX files."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from expunge.data.hub import local_file
from expunge.data.idx import read_idx
from expunge.data.image_roles import ImageSizes, image_dataset
from expunge.data.registry import dataset
from expunge.data.samples import Dataset
from expunge.errors import UserError
from expunge.options import option

CLASSES = (
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
)  # fmt: skip
PARTS = ("train", "t10k")


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
    if data_dir is None:
        raise UserError(
            "dataset 'fashion-mnist' is read from files: give --data-dir with train-images-idx3-ubyte.gz and its "
            "fellows from github.com/zalandoresearch/fashion-mnist."
        )
    names = [f"{options.part}-{kind}-ubyte" for kind in ("images-idx3", "labels-idx1")]
    files = [local_file(data_dir, (f"{name}.gz", name), "fashion-mnist") for name in names]
    images_NHW, labels_N = read_idx(files[0], 3), read_idx(files[1], 1)
    if len(images_NHW) != len(labels_N):
        raise UserError(f"'{data_dir}' has {len(images_NHW)} images and {len(labels_N)} labels: fetch the files again.")
    # A wanted image may be one of few duplicates, so a few more are looked at; all 60,000 would cost seconds.
    order = np.random.default_rng([0, options.split_seed]).permutation(len(images_NHW))
    places = np.sort(order[: options.private + options.holdout + options.utility + 200])
    made = image_dataset("fashion-mnist", images_NHW[places], labels_N[places], CLASSES, options)
    return replace(made, source=str(data_dir))
