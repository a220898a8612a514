"""``cifar10`` and ``cifar100``: 60,000 photographs of 32 x 32 pixels, from the binary files, folders or an ``.npz``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from expunge.data.class_folders import folder_pool
from expunge.data.image_roles import ImageSizes, image_dataset
from expunge.data.npz import npz_pool
from expunge.data.pool import Pool, class_names
from expunge.data.registry import dataset
from expunge.data.samples import Dataset
from expunge.errors import UserError
from expunge.options import option

PARTS = ("train", "test")
PIXELS = 3 * 32 * 32
ORIGIN = "Krizhevsky 2009, Learning Multiple Layers of Features from Tiny Images: files in --data-dir"


@dataclass(frozen=True)
class Binary:
    """The binary form: records of label bytes, of which ``label`` is the one that counts, then three planes."""

    folder: str
    files: dict[str, tuple[str, ...]]
    names: str  # the file with the names of the classes, one a line
    bytes: int
    label: int
    classes: int
    pickled: tuple[str, ...]  # what the python version is called
    archive: str


TEN = Binary(
    folder="cifar-10-batches-bin",
    files={"train": tuple(f"data_batch_{n}.bin" for n in range(1, 6)), "test": ("test_batch.bin",)},
    names="batches.meta.txt",
    bytes=1,
    label=0,
    classes=10,
    pickled=("data_batch_1", "test_batch", "cifar-10-batches-py", "cifar-10-python.tar.gz"),
    archive="cifar-10-binary.tar.gz",
)
HUNDRED = Binary(
    folder="cifar-100-binary",
    files={"train": ("train.bin",), "test": ("test.bin",)},
    names="fine_label_names.txt",
    bytes=2,  # coarse, then fine
    label=1,
    classes=100,
    pickled=("train", "test", "cifar-100-python", "cifar-100-python.tar.gz"),
    archive="cifar-100-binary.tar.gz",
)


@dataclass(frozen=True, kw_only=True)
class CifarOptions(ImageSizes):
    """Sizes count images."""

    part: str = option("train", "which files: train (50,000 images) or test (10,000)", choices=PARTS)


@dataset(
    name="cifar10",
    options=CifarOptions,
    summary="60,000 colour photographs of 32 x 32 pixels, 10 classes",
    origin=ORIGIN,
    licence="none stated",
    modality="classifier",
)
def load_10(options: CifarOptions, *, data_dir: Path | None, seed: int) -> Dataset:
    """Photographs in roles; ``seed`` is not used, ``split_seed`` chooses the images."""
    return image_dataset("cifar10", cifar_pool(data_dir, options.part, "cifar10", TEN), options)


@dataset(
    name="cifar100",
    options=CifarOptions,
    summary="60,000 colour photographs of 32 x 32 pixels, 100 classes",
    origin=ORIGIN,
    licence="none stated",
    modality="classifier",
)
def load_100(options: CifarOptions, *, data_dir: Path | None, seed: int) -> Dataset:
    """Photographs in roles, with the 100 fine classes; ``seed`` is not used, ``split_seed`` chooses the images."""
    return image_dataset("cifar100", cifar_pool(data_dir, options.part, "cifar100", HUNDRED), options)


def cifar_pool(data_dir: Path | None, part: str, name: str, form: Binary) -> Pool:
    """The binary files, ``train/class/*.png``, or one ``.npz`` with ``x_train`` and ``y_train`` or images and labels.

    Raises:
        UserError: none of these is there, only the pickled version is, or a file is not what it should be.
    """
    if data_dir is None:
        raise UserError(f"dataset '{name}' is read from files: give --data-dir with {form.folder} from {form.archive}.")
    for folder in (data_dir, data_dir / form.folder):
        if (folder / form.files[part][0]).is_file():
            return _binary(folder, part, form)
    if (data_dir / part).is_dir():
        pool = folder_pool(data_dir / part)
        if len(pool.classes) != form.classes:
            raise UserError(f"'{data_dir / part}' has {len(pool.classes)} class folders: {name} has {form.classes}.")
        return pool
    npz = sorted(data_dir.glob("*.npz"))
    if len(npz) == 1:
        return replace(npz_pool(npz[0], part), classes=_names(data_dir, form))
    pickled = next((n for n in form.pickled if (data_dir / n).exists()), None)
    if pickled is not None:
        raise UserError(
            f"'{data_dir / pickled}' is the python version of {name}, a pickle, which can run code and is never "
            f"opened: take {form.archive} from the same page."
        )
    raise UserError(
        f"dataset '{name}' needs {form.files[part][0]} (from {form.archive}), class folders under {part}, or one .npz "
        f"in '{data_dir}', and it is not there."
    )


def _binary(folder: Path, part: str, form: Binary) -> Pool:
    record = form.bytes + PIXELS
    files: list[NDArray[np.uint8]] = []
    for name in form.files[part]:
        path = folder / name
        size = path.stat().st_size if path.is_file() else 0
        if not size or size % record:
            raise UserError(f"'{path}' is missing or cut off ({size} bytes, no multiple of {record}): fetch it again.")
        files.append(np.memmap(path, dtype=np.uint8, mode="r", shape=(size // record, record)))
    labels_N = np.concatenate([file[:, form.label] for file in files]).astype(np.int64)
    ends = np.cumsum([len(file) for file in files])

    def read(places: Sequence[int]) -> list[NDArray[np.uint8]]:
        out = []
        for place in places:
            number = int(np.searchsorted(ends, place, side="right"))
            row = files[number][place - ends[number]]  # counted from the end of its file
            out.append(row[form.bytes :].reshape(3, 32, 32).transpose(1, 2, 0).copy())
        return out

    return Pool(labels_N=labels_N, classes=_names(folder, form), read=read, source=str(folder))


def _names(folder: Path, form: Binary) -> Sequence[str]:
    path = folder / form.names
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n") if path.is_file() else []
    names = tuple(line.strip() for line in lines if line.strip())
    return names if len(names) == form.classes else class_names(np.array([form.classes - 1]))
