"""The 21 configurations of the published CLEAR, read from a local copy or the hub, with their fields checked.

Dontsov et al. 2025, arXiv:2410.18057; hub data set ``therem/CLEAR``. Each configuration has one split ``train``. A
local copy holds Parquet files as the hub gives them (``forget10/train-00000-of-00001.parquet``), one file
(``forget10.parquet``, ``.jsonl``, ``.csv``), or a folder with ``metadata.jsonl`` or ``metadata.csv`` beside the images.
"""

from __future__ import annotations

import csv
import importlib
import io
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from expunge.data.hub import hub_rows
from expunge.data.pictures import read_picture
from expunge.data.samples import Image
from expunge.errors import UserError, unknown

HUB = "therem/CLEAR"
Row = Mapping[str, Any]
PORTRAIT = ("image", "caption", "name")
WITH_TEXT = ("image", "caption", "question", "answer")
PERTURBED = (*PORTRAIT, "paraphrased_caption", "perturbed_captions", "perturbed_names")
KINDS = (".parquet", ".jsonl", ".csv")
LISTS = ("perturbed_captions", "perturbed_names", "options")


@dataclass(frozen=True)
class Configuration:
    """What a configuration holds; ``rows`` as published, none where only a rounded figure is known."""

    fields: tuple[str, ...]
    rows: int | None = None


CONFIGURATIONS: dict[str, Configuration] = {
    "default": Configuration(PORTRAIT, 3768),
    "full": Configuration(PORTRAIT, 3768),
    "full+tofu": Configuration(WITH_TEXT, 7768),
    "forget01": Configuration(PORTRAIT, 35),
    "forget05": Configuration(PORTRAIT, 188),
    "forget10": Configuration(PORTRAIT, 379),
    "forget01+tofu": Configuration(WITH_TEXT, 75),
    "forget05+tofu": Configuration(WITH_TEXT, 388),
    "forget10+tofu": Configuration(WITH_TEXT, 779),
    "forget01_perturbed": Configuration(PERTURBED, 35),
    "forget05_perturbed": Configuration(PERTURBED, 188),
    "forget10_perturbed": Configuration(PERTURBED, 378),  # one fewer than forget10
    "retain99": Configuration(PORTRAIT),
    "retain95": Configuration(PORTRAIT),
    "retain90": Configuration(PORTRAIT),
    "retain99+tofu": Configuration(WITH_TEXT),
    "retain95+tofu": Configuration(WITH_TEXT),
    "retain90+tofu": Configuration(WITH_TEXT),
    "retain_perturbed": Configuration(PERTURBED, 395),
    "real_faces": Configuration(("image", "answer", "options"), 151),
    "real_world": Configuration(("image", "question", "answer", "options"), 367),
}


@dataclass(frozen=True)
class Source:
    """Where the rows come from: a local folder, or the hub."""

    folder: Path | None

    def rows(self, name: str) -> list[Row]:
        """All rows of a configuration, with the published fields and no image decoded.

        ``image`` is None or what :func:`picture` reads; ``real_world``'s early form, with ``prompt`` in place of
        ``question``, is read as well.

        Raises:
            UserError: unknown, not there, not readable, or without one of its fields.
        """
        if name not in CONFIGURATIONS:
            raise unknown("configuration of dataset clear", name, CONFIGURATIONS)
        if self.folder is None:
            online = hub_rows(HUB, name, "train")
            return [self._row(name, row, f"hub: {HUB} {name} row {number}") for number, row in enumerate(online, 1)]
        found = self._files(name)
        if not found:
            raise UserError(
                f"dataset 'clear' needs configuration {name} in '{self.folder}', and it is not there: put "
                f"{name}/*.parquet, {name}.parquet, {name}.jsonl, {name}.csv or {name}/metadata.jsonl there."
            )
        rows = [
            self._row(name, {**row, "folder": path.parent}, f"'{path}' row {number}")
            for path in found
            for number, row in enumerate(_read(path), 1)
        ]
        if not rows:
            raise UserError(f"configuration {name} of dataset clear in '{self.folder}' is empty: fetch it again.")
        return rows

    def has(self, name: str) -> bool:
        return self.folder is None or bool(self._files(name))

    def text(self) -> str:
        return f"hub: {HUB}" if self.folder is None else str(self.folder)

    def _files(self, name: str) -> list[Path]:
        """The files of a configuration, all of one kind."""
        assert self.folder is not None
        for base in (self.folder, self.folder / "data"):
            inside = sorted(path for path in (base / name).rglob("*") if path.is_file())
            for kind in KINDS:
                parts = [path for path in inside if path.suffix == kind]
                if kind != ".parquet":
                    parts = [path for path in parts if path.stem in ("metadata", "train")]
                if parts:
                    return parts
                if (base / f"{name}{kind}").is_file():
                    return [base / f"{name}{kind}"]
        return []

    def _row(self, name: str, raw: Row, where: str) -> Row:
        row = {**raw, "where": where}
        for ours, theirs in (
            ("image", "file_name"),
            ("question", "prompt"),
        ):  # as folders of images call it; early form
            if ours not in row and theirs in row:
                row[ours] = row[theirs]
        missing = [field for field in CONFIGURATIONS[name].fields if field not in row]
        # The rows of a person's questions may leave out what only portraits have, and the other way round.
        if missing and not (name.endswith("+tofu") and {"question", "caption"} & set(raw)):
            given = ", ".join(key for key in raw if key != "folder") or "nothing"
            raise UserError(f"{where}: configuration {name} has no {' and no '.join(missing)}; the row has {given}.")
        return {field: row.get(field) for field in (*CONFIGURATIONS[name].fields, "where", "folder")}


# -- files -----------------------------------------------------------------------------------------------------------


def _read(path: Path) -> Iterator[Row]:
    if path.suffix == ".parquet":
        yield from _parquet(path)
        return
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"'{path}' could not be read ({type(error).__name__}): save it as UTF-8 text.") from None
    if path.suffix == ".csv":
        for number, row in enumerate(csv.DictReader(io.StringIO(text, newline="")), 1):
            where = f"'{path}' row {number}"
            if None in row or None in row.values():
                raise UserError(f"{where}: more or fewer cells than the header has.")
            yield {key: _list(cell, where) if key in LISTS else cell or None for key, cell in row.items()}
        return
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            yield _json(line, f"'{path}' line {number}", dict)


def _parquet(path: Path) -> Iterator[Row]:
    try:
        parquet: Any = importlib.import_module("pyarrow.parquet")
    except ImportError:
        raise UserError(
            f"'{path}' needs pyarrow, which is not installed: run pip install 'expunge[parquet]', or give JSONL files."
        ) from None
    try:
        with parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=256):
                yield from batch.to_pylist()
    except Exception as error:  # pyarrow raises its own classes, which need not be importable here
        raise UserError(f"'{path}' is not a readable Parquet file ({type(error).__name__}).") from None


def _json(text: str, where: str, kind: type) -> Any:
    try:
        value = json.loads(text)
    except (json.JSONDecodeError, RecursionError):
        raise UserError(f"{where}: not JSON.") from None
    if not isinstance(value, kind):
        raise UserError(f"{where}: expected a JSON {'object' if kind is dict else 'array'}.")
    return value


def _list(cell: str, where: str) -> list[str]:
    """A list in CSV: a JSON array, or parts separated by ``|``."""
    if cell.lstrip().startswith("["):
        return list(_json(cell, where, list))
    return [part.strip() for part in cell.split("|") if part.strip()]


# -- cells -----------------------------------------------------------------------------------------------------------


def string(row: Row, field: str) -> str:
    """A text that has to be there, with runs of white space made one: the same caption is the same key anywhere.

    Raises:
        UserError: missing, empty, or no text.
    """
    value = row.get(field)
    if not isinstance(value, str) or not value.strip():
        raise UserError(f"{row['where']}: {field} is missing or no text.")
    return " ".join(value.split())


def strings(row: Row, field: str) -> list[str]:
    """A list of texts; a single text is a list of one, nothing an empty one.

    Raises:
        UserError: something else.
    """
    value = row.get(field)
    values = [] if value is None else [value] if isinstance(value, str) else value
    if not isinstance(values, (list, tuple, np.ndarray)) or not all(isinstance(item, str) for item in values):
        raise UserError(f"{row['where']}: {field} is no list of texts.")
    return [" ".join(item.split()) for item in values if item.strip()]


def picture(row: Row, size: int) -> Image:
    """The row's image: a path where it is a file of its own, else decoded, its shorter side at most ``size`` pixels.

    Raises:
        UserError: no image, a file that is not there, or bytes that are no picture.
    """
    cell, where = row["image"], row["where"]
    if isinstance(cell, Mapping):  # how the hub stores images in Parquet
        cell = cell.get("bytes") or cell.get("path")
    if isinstance(cell, str) and cell:
        path = Path(row.get("folder") or ".") / cell
        if not path.is_file():
            raise UserError(f"{where}: the image '{path}' does not exist; paths are relative to the table.")
        return path
    if isinstance(cell, bytes) and cell:
        return _shrunk(read_picture(cell, f"the image of {where}"), size)
    if hasattr(cell, "convert"):  # the hub client decodes
        return _shrunk(np.asarray(cell.convert("RGB")), size)
    raise UserError(f"{where}: image is missing; a row with a caption has one.")


def _shrunk(pixels_HWC: np.ndarray, size: int) -> np.ndarray:
    from PIL import Image as Pillow

    height, width, channels = pixels_HWC.shape
    if min(height, width) <= size:
        return pixels_HWC
    share = size / min(height, width)
    flat = Pillow.fromarray(pixels_HWC[:, :, 0] if channels == 1 else pixels_HWC)
    small = np.asarray(flat.resize((round(width * share), round(height * share)), Pillow.Resampling.BICUBIC))
    return small[:, :, None] if small.ndim == 2 else small
