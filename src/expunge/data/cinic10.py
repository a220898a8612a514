"""``cinic10``: 270,000 photographs of 32 x 32 pixels in CIFAR-10's classes, from CIFAR and ImageNet, as PNG folders."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from expunge.data.class_folders import folder_pool
from expunge.data.image_roles import ImageSizes, image_dataset
from expunge.data.registry import dataset
from expunge.data.samples import Dataset
from expunge.errors import UserError
from expunge.options import option

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
PARTS = ("train", "valid", "test")


@dataclass(frozen=True, kw_only=True)
class CinicOptions(ImageSizes):
    """Sizes count images."""

    part: str = option("train", "which folder: train, valid or test (90,000 images each)", choices=PARTS)


@dataset(
    name="cinic10",
    options=CinicOptions,
    summary="270,000 colour photographs of 32 x 32 pixels, 10 classes",
    origin="Darlow et al. 2018 (arXiv 1810.03505): folders train, valid and test in --data-dir",
    licence="MIT; the photographs have their owners' terms",
    modality="classifier",
)
def load(options: CinicOptions, *, data_dir: Path | None, seed: int) -> Dataset:
    """Photographs in roles; ``seed`` is not used, ``split_seed`` chooses the images."""
    if data_dir is None:
        raise UserError("dataset 'cinic10' is read from files: give --data-dir with the folders of CINIC-10.tar.gz.")
    return image_dataset("cinic10", folder_pool(data_dir / options.part, CLASSES), options)
