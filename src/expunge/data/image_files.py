"""``images``: labelled pictures of your own, in class folders, a zip of them, an ``.npz``, JSON lines or Parquet."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from expunge.data.class_folders import folder_pool, zip_pool
from expunge.data.hub_images import jsonl_pool, parquet_pool
from expunge.data.image_roles import ImageSizes, image_dataset
from expunge.data.npz import npz_pool
from expunge.data.pool import Pool
from expunge.data.registry import dataset
from expunge.data.samples import Dataset
from expunge.errors import UserError, unknown
from expunge.options import option

KINDS = (".npz", ".zip", ".jsonl", ".parquet")


@dataclass(frozen=True, kw_only=True)
class ImageFilesOptions(ImageSizes):
    """By default all pictures are used: half are private, 30 % are held out, 20 % are for utility."""

    private: int | float = option(0.5, "images that the original is trained on: a count, or a fraction of all")
    holdout: int | float = option(0.3, "images that the original is never trained on")
    utility: int | float = option(0.2, "other images, for training a base and measuring utility")
    part: str = option("", "sub-folder, arrays or Parquet shards to read, where there are several: train, test, …")
    file: str = option("", "which file of the folder, where there are several")


@dataset(
    name="images",
    options=ImageFilesOptions,
    summary="labelled pictures of your own: class folders, zip, .npz, JSON lines or Parquet",
    origin="files in --data-dir",
    licence="yours",
    modality="classifier",
)
def load(options: ImageFilesOptions, *, data_dir: Path | None, seed: int) -> Dataset:
    """Pictures in roles; ``seed`` is not used, ``split_seed`` chooses the images."""
    if data_dir is None:
        raise UserError("dataset 'images' is read from files: give --data-dir with one folder of pictures per class.")
    return image_dataset("images", find_pool(data_dir, options.part, options.file), options)


def find_pool(folder: Path, part: str, file: str) -> Pool:
    """The pool in a folder: the file that is named, the only one of a kind that is known, or class sub-folders.

    Raises:
        UserError: the named file is not there or of an unknown kind, or several could be meant.
    """
    if file:
        path = folder / file
        if not path.is_file():
            raise UserError(f"option file = {file}: there is no such file in '{folder}'.")
        if path.suffix.lower() not in KINDS:
            raise unknown(f"kind of file for '{path}'", path.suffix or "none", KINDS)
        return _of_file(path, part)
    shards = sorted(p for sub in (folder, folder / "data") for p in sub.glob(f"{part}*.parquet"))
    files = sorted(p for p in folder.iterdir() if p.suffix.lower() in KINDS[:-1])
    parts = sorted({shard.name.split("-")[0] for shard in shards})
    if len(files) + len(parts) > 1:
        shown = ", ".join([*(p.name for p in files), *(f"Parquet of {name}" for name in parts)])
        raise UserError(f"'{folder}' has {shown}: say with option file (or part, for Parquet) which is meant.")
    if shards:
        return parquet_pool(shards)
    return _of_file(files[0], part) if files else folder_pool(folder / part if part else folder)


def _of_file(path: Path, part: str) -> Pool:
    kind = path.suffix.lower()
    if kind == ".npz":
        return npz_pool(path, part)
    if kind == ".zip":
        return zip_pool(path, part)
    return jsonl_pool(path) if kind == ".jsonl" else parquet_pool([path])
