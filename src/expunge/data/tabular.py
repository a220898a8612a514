"""``purchase100``, ``texas100``, ``location30``: vectors of yes/no features, as pictures of one row of pixels.

So they go through the classifier seam unchanged; the model for them is the preset ``mlp``, which resizes nothing.

Shape suffixes: N records, D features.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from expunge.data.image_roles import ImageSizes, image_dataset
from expunge.data.npz import npz_pair
from expunge.data.packed import opened
from expunge.data.pool import Pool
from expunge.data.registry import Loader, dataset
from expunge.data.samples import Dataset
from expunge.errors import UserError

ORIGIN = "Shokri et al. 2017 (arXiv 1610.05820), from public records of {}: files in --data-dir"


@dataclass(frozen=True)
class Table:
    """How a dataset's files are first published: ``rows`` alone, label first, or beside ``labels``."""

    name: str
    classes: int
    kind: str
    rows: tuple[str, ...]
    labels: tuple[str, ...] = ()


PURCHASE = Table("purchase100", 100, "shopping style", ("dataset_purchase",))
TEXAS = Table("texas100", 100, "procedure", ("texas/100/feats", "feats"), ("texas/100/labels", "labels"))
LOCATION = Table("location30", 30, "geosocial type", ("bangkok",))


@dataclass(frozen=True, kw_only=True)
class TabularOptions(ImageSizes):
    """Sizes count records."""


def _loader(table: Table) -> Loader:
    def load(options: TabularOptions, *, data_dir: Path | None, seed: int) -> Dataset:
        """Records in roles; ``seed`` is not used, ``split_seed`` chooses the records."""
        return image_dataset(table.name, table_pool(data_dir, table), options)

    load.__qualname__ = f"load_{table.name}"  # the registry tells loaders apart by their names
    return load


for _table, _summary, _origin in (
    (PURCHASE, "197,324 customers: 600 products bought or not, 100 shopping styles", "Kaggle's shoppers challenge"),
    (TEXAS, "67,330 hospital stays: 6,169 yes/no features, 100 procedures", "the Texas Department of State Health"),
    (LOCATION, "5,010 users: 446 places visited or not, 30 types", "Foursquare check-ins in Bangkok"),
):
    dataset(
        name=_table.name,
        options=TabularOptions,
        summary=_summary,
        origin=ORIGIN.format(_origin),
        licence="see github.com/privacytrustlab/datasets",
        modality="classifier",
    )(_loader(_table))


def table_pool(data_dir: Path | None, table: Table) -> Pool:
    """One ``.npz`` (``features``, ``labels``), one ``.csv`` (label first), or the files of the first publication.

    A record is a picture (1, D, 1) with 0 for no and 255 for yes. Labels that count from 1 are counted from 0.

    Raises:
        UserError: none or several of these files, or one that is not as said.
    """
    if data_dir is None:
        raise UserError(
            f"dataset '{table.name}' is read from files: give --data-dir with {table.rows[0]} (from "
            f"github.com/privacytrustlab/datasets), or an .npz with features and labels."
        )
    for number, name in enumerate(table.rows):
        if (data_dir / name).is_file():
            rows = TextRows(data_dir / name, label_first=not table.labels)
            labels_N = rows.labels_N
            if table.labels:
                labels_N = TextRows(data_dir / table.labels[number], label_first=True).labels_N
            return _pool(table, data_dir / name, rows.read, labels_N, rows.number)
    found = sorted(p for end in ("*.npz", "*.csv", "*.csv.gz") for p in data_dir.glob(end))
    if len(found) != 1:
        given = ", ".join(p.name for p in found) or "nothing of the kind"
        raise UserError(
            f"dataset '{table.name}' needs {' or '.join(table.rows)}, or one .npz or .csv in '{data_dir}', and there "
            f"is {given}."
        )
    path = found[0]
    if path.suffix != ".npz":
        rows = TextRows(path, label_first=True)
        return _pool(table, path, rows.read, rows.labels_N, rows.number)
    content, labels_N = npz_pair(path)
    if len(content.shape) != 2 or content.dtype.kind not in "biuf":
        raise UserError(f"'{path}': '{content.name}' is {content.dtype} of shape {content.shape}: give (N, D) numbers.")
    return _pool(table, path, lambda places: list(content.rows(places)), labels_N, content.shape[0])


def _pool(
    table: Table,
    path: Path,
    rows: Callable[[Sequence[int]], list[NDArray[Any]]],
    labels_N: NDArray[np.int64],
    number: int,
) -> Pool:
    if number != len(labels_N):
        raise UserError(f"'{path}' has {number} records and {len(labels_N)} labels: fetch the files again.")
    if labels_N.min(initial=1) == 1 and labels_N.max(initial=0) == table.classes:
        labels_N = labels_N - 1

    def read(places: Sequence[int]) -> list[NDArray[np.uint8]]:
        out = []
        for place, row in zip(places, rows(places), strict=True):
            if not ((row == 0) | (row == 1)).all():
                raise UserError(f"'{path}': record {place} has a feature other than 0 and 1: those alone are allowed.")
            out.append((255 * row.astype(np.uint8)).reshape(1, -1, 1))
        widths = {picture.shape[1] for picture in out}
        if len(widths) > 1:
            raise UserError(f"'{path}' has records of {min(widths)} and of {max(widths)} features: it is cut off.")
        return out

    classes = tuple(f"{table.kind} {n}" for n in range(table.classes))
    return Pool(labels_N=labels_N, classes=classes, read=read, source=str(path))


class TextRows:
    """Lines of numbers with commas, plain or ``.gz``: labels and places of lines are kept, features read when asked.

    A first line that does not begin with a number is a header.
    """

    def __init__(self, path: Path, *, label_first: bool) -> None:
        self.path, self.label_first = path, label_first
        starts, labels = [], []
        with opened(path) as file:
            at = 0
            for number, line in enumerate(file):
                head = _whole(line.split(b",", 1)[0])
                if head is not None:
                    starts.append(at)
                    labels.append(head)
                elif line.strip() and number:
                    raise UserError(
                        f"'{path}' line {number + 1} does not begin with a whole number: fetch it again, or mend it."
                    )
                at += len(line)
        if not starts:
            raise UserError(f"'{path}' has no line of numbers: fetch it again.")
        self.starts, self.labels_N, self.number = starts, np.array(labels, dtype=np.int64), len(starts)

    def read(self, places: Sequence[int]) -> list[NDArray[Any]]:
        """The features at ascending ``places``, (D,) each."""
        out = []
        with opened(self.path) as file:
            for place in places:
                file.seek(self.starts[place])
                line = file.readline().strip()
                out.append(_features(line.partition(b",")[2] if self.label_first else line, self.path, place))
        return out


def _whole(cell: bytes) -> int | None:
    try:
        value = float(cell.strip().strip(b'"'))
    except ValueError:
        return None
    return int(value) if value.is_integer() and abs(value) < 1 << 53 else None


def _features(text: bytes, path: Path, place: int) -> NDArray[np.float64] | NDArray[np.uint8]:
    raw = np.frombuffer(text, dtype=np.uint8)
    if len(raw) % 2 and (raw[1::2] == ord(",")).all():  # cells of one character: no need to parse each
        return raw[::2] - np.uint8(ord("0"))
    try:
        return np.array([float(cell) for cell in text.split(b",")])
    except ValueError as error:
        raise UserError(f"'{path}': record {place} has a cell that is no number: fetch it again.") from error
