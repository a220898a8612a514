"""Labelled pictures as the Hugging Face hub stores them: Parquet with the bytes inside, or JSON lines beside files."""

from __future__ import annotations

import importlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from expunge.data.pictures import MOST_BYTES, read_picture
from expunge.data.pool import MOST_CLASSES, Held, Pool, class_names
from expunge.errors import UserError

IMAGES = ("image", "img", "file_name", "path")
LABELS = ("label", "fine_label", "labels", "target", "class")


def jsonl_pool(path: Path) -> Pool:
    """One object a line: ``image`` or ``file_name`` (relative to the file) and ``label`` (number or name).

    Raises:
        UserError: not JSON lines, a line without one of the two, a file that is not there, names mixed with numbers.
    """
    files: list[Path] = []
    given: list[Any] = []
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"'{path}' cannot be read as UTF-8 text: save it again.") from error
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        where = f"'{path}' line {number}"
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{where} is not JSON: give one object a line, with image and label.") from error
        if not isinstance(row, dict):
            raise UserError(f"{where} is no object: give image and label.")
        image, label = (_field(row, kinds, where) for kinds in (IMAGES, LABELS))
        if not isinstance(image, str) or not (path.parent / image).is_file():
            raise UserError(f"{where}: the image '{image}' does not exist; paths are relative to the file.")
        files.append(path.parent / image)
        given.append(label)
    classes, labels_N = _classes(given, str(path))
    return Pool(
        labels_N=labels_N, classes=classes, read=lambda places: [files[place] for place in places], source=str(path)
    )


def parquet_pool(paths: Sequence[Path]) -> Pool:
    """Columns ``image`` (bytes, or the hub's struct of bytes and path) and ``label``; only groups asked for are read.

    Names of classes come from the hub's own note in the file, where it is.

    Raises:
        UserError: pyarrow is missing, no readable Parquet, no such columns, a picture without bytes.
    """
    shards = [_Shard.read(path) for path in paths]
    given = [label for shard in shards for label in shard.labels]
    source = str(paths[0] if len(paths) == 1 else paths[0].parent)
    classes, labels_N = _classes(given, source)
    if shards[0].classes and isinstance(given[0], int):  # else the labels are names themselves
        classes = shards[0].classes
    groups = [(shard, group, size) for shard in shards for group, size in enumerate(shard.groups)]
    ends = np.cumsum([size for _, _, size in groups])

    def read(places: Sequence[int]) -> list[NDArray[np.uint8]]:
        held, out = Held(source), []
        wanted: dict[int, list[int]] = {}
        for place in places:
            wanted.setdefault(int(np.searchsorted(ends, place, side="right")), []).append(place)
        for number, inside in wanted.items():
            shard, group, size = groups[number]
            first = int(ends[number]) - size
            for place, cell in zip(inside, shard.cells(group, [p - first for p in inside]), strict=True):
                out.append(held.keep(_decoded(cell, f"picture {place} of '{source}'", shard.path)))
        return out

    return Pool(labels_N=labels_N, classes=classes, read=read, source=source)


@dataclass(frozen=True)
class _Shard:
    path: Path
    file: Any  # pyarrow.parquet.ParquetFile
    image: str
    labels: Sequence[Any]
    groups: Sequence[int]  # rows of each
    classes: Sequence[str]

    @classmethod
    def read(cls, path: Path) -> _Shard:
        try:
            parquet: Any = importlib.import_module("pyarrow.parquet")
        except ImportError:
            raise UserError(
                f"'{path}' needs pyarrow, which is not installed: run pip install 'expunge[parquet]'."
            ) from None
        try:
            file = parquet.ParquetFile(path)
            names = file.schema_arrow.names
            image, label = (next((n for n in kinds if n in names), None) for kinds in (IMAGES, LABELS))
            labels = file.read(columns=[label]).column(0).to_pylist() if image and label else []
            groups = [file.metadata.row_group(n).num_rows for n in range(file.metadata.num_row_groups)]
            note = (file.schema_arrow.metadata or {}).get(b"huggingface", b"{}")
        except Exception as error:  # pyarrow raises its own classes, which need not be importable here
            raise UserError(f"'{path}' is not a readable Parquet file ({type(error).__name__}).") from error
        if not (image and label):
            missing, kinds = ("image", IMAGES) if not image else ("label", LABELS)
            raise UserError(
                f"'{path}' has no column of {missing}s: it has {', '.join(names)}; call one {' or '.join(kinds)}."
            )
        return cls(path, file, image, labels, groups, _noted(note, label))

    def cells(self, group: int, places: Sequence[int]) -> list[Any]:
        try:
            cells: list[Any] = self.file.read_row_group(group, columns=[self.image]).column(0).take(places).to_pylist()
        except Exception as error:  # as above
            raise UserError(f"'{self.path}' is damaged ({type(error).__name__}): copy it again.") from error
        return cells


def _noted(note: bytes, label: str) -> tuple[str, ...]:
    """Names of classes in the hub's note, or none."""
    try:
        names = json.loads(note)["info"]["features"][label]["names"]
    except (ValueError, KeyError, TypeError):
        return ()
    return tuple(map(str, names)) if isinstance(names, list) else ()


def _decoded(cell: Any, called: str, path: Path) -> NDArray[np.uint8]:
    raw, beside = (cell.get("bytes"), cell.get("path")) if isinstance(cell, dict) else (cell, None)
    if raw is None and isinstance(beside, str):
        return read_picture(path.parent / beside, f"'{beside}', {called},")
    if not isinstance(raw, bytes) or len(raw) > MOST_BYTES:
        raise UserError(f"{called} has no bytes of a picture: write the column again.")
    return read_picture(raw, called)


def _field(row: Mapping[str, Any], kinds: Sequence[str], where: str) -> Any:
    name = next((n for n in kinds if row.get(n) is not None), None)
    if name is None:
        raise UserError(f"{where} has no {kinds[0]}: it has {', '.join(row) or 'nothing'}.")
    return row[name]


def _classes(given: Sequence[Any], source: str) -> tuple[Sequence[str], NDArray[np.int64]]:
    """(names, numbers) of labels that are all whole numbers, or all names."""
    if not given:
        raise UserError(f"'{source}' is empty: put at least one picture into it.")
    if all(isinstance(label, int) and not isinstance(label, bool) for label in given):
        if max(map(abs, given)) >= MOST_CLASSES:  # also what no int64 can hold
            raise UserError(f"'{source}': the label {max(given, key=abs)} is no class: number them from 0 on.")
        labels_N = np.array(given, dtype=np.int64)
        return class_names(labels_N), labels_N
    if not all(isinstance(label, str) for label in given):
        wrong = next(label for label in given if not isinstance(label, str))
        raise UserError(f"'{source}' has the label {wrong!r} beside others: give whole numbers throughout, or names.")
    names = sorted(set(given))
    numbers = {name: number for number, name in enumerate(names)}
    return names, np.array([numbers[label] for label in given], dtype=np.int64)
