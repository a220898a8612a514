"""Tables of readings from anywhere: ``id,unlearned,original,shadow[,shadow_2...][,subject][,label]``.

CSV (comma, semicolon or tab; with a byte order mark or without; decimal point or decimal comma), TSV, JSON lines, a
JSON array, or Parquet. What is wrong is refused in one sentence; what is odd becomes a note. An empty cell, or "nan",
means "not measured": that sample will be not auditable.
"""

from __future__ import annotations

import csv
import difflib
import importlib
import io
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from expunge.completeness.readings import Floats, Form, Readings
from expunge.errors import UserError, unknown
from expunge.files import atomic, to_json

KINDS = {
    ".csv": "csv",
    ".tsv": "csv",
    ".txt": "csv",
    ".jsonl": "json",
    ".ndjson": "json",
    ".json": "json",
    ".parquet": "parquet",
}
MODELS = ("unlearned", "original", "shadow")
SHADOW = re.compile(r"shadow(?:_(\d+))?")
EMPTY = frozenset({"", "nan", "na", "n/a", "null", "none"})
FORMS: tuple[Form, ...] = ("text", "classifier")
MEANING = {
    "text": "the text form takes mean negative log-likelihoods in nats per token, which are 0 or more",
    "classifier": "the classifier form takes probabilities of the true label, which lie between 0 and 1",
}


@dataclass(frozen=True, eq=False)
class Table:
    """Readings from a file, and what the reader should know about them."""

    readings: Readings
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Columns:
    """Cells by column name; ``lines`` says where each row stands in the file, ``decimal`` its decimal sign."""

    path: Path
    cells: Mapping[str, Sequence[Any]]
    lines: Sequence[int]
    comma: bool = False

    def place(self, row: int, column: str) -> str:
        return f"'{self.path}' line {self.lines[row]}, column '{column}'"


def read_table(path: Path | str, form: Form, *, original: bool = True) -> Table:
    """Read one table.

    Args:
        original: whether the column ``original`` must be there; without it, IAM works offline, from an anchor.

    Raises:
        UserError: no such file or form, missing or doubled columns, an empty table, ids that are empty or doubled,
            cells that are no numbers, numbers that the form cannot have, labels other than 0 and 1, or a shadow that
            is the unlearned model, the original or another shadow.
    """
    if form not in FORMS:
        raise unknown("form", form, FORMS)
    columns = _decimal_sign(_columns(Path(path)))
    shadows = _shadows(columns, original)
    ids = _ids(columns)
    names = [name for name in ("unlearned", "original") if name in columns.cells] + shadows
    values = {name: _readings(columns, name, form) for name in names}
    notes = _oddities(columns, values, shadows, form)
    _distinct(columns, values, shadows)
    label_N = None
    if "label" in columns.cells:
        label_N = _labels(columns)
        classes = set(label_N[np.isfinite(label_N)].tolist())
        if len(classes) < 2:
            said = "there is no label" if not classes else f"all labels are {classes.pop():g}"
            notes.append(f"{said}: no AUC can be given.")
    subjects = None
    if "subject" in columns.cells:
        given = columns.cells["subject"]
        subjects = [str(s).strip() or i if s is not None else i for s, i in zip(given, ids, strict=True)]
    readings = Readings(
        form,
        ids,
        values["unlearned"],
        np.stack([values[s] for s in shadows]),
        values.get("original"),
        subjects,
        label_N,
    )
    return Table(readings, tuple(notes))


def write_table(path: Path | str, columns: Mapping[str, Sequence[Any] | Floats]) -> Path:
    """Write columns of equal length as CSV, TSV, JSON lines or Parquet, by the file's ending; nan becomes empty.

    Raises:
        UserError: an ending that is none of these, or Parquet without pyarrow.
    """
    path = Path(path)
    if path.suffix not in (".csv", ".tsv", ".jsonl", ".parquet"):
        raise UserError(f"cannot write a table to '{path}': let the name end in .csv, .tsv, .jsonl or .parquet.")
    lists = {name: _plain(values) for name, values in columns.items()}
    if path.suffix == ".parquet":
        arrow, parquet = _arrow(path, ""), _arrow(path, ".parquet")
        path.parent.mkdir(parents=True, exist_ok=True)
        parquet.write_table(arrow.table(lists), path)
        return path
    with atomic(path) as file:
        if path.suffix == ".jsonl":
            for row in zip(*lists.values(), strict=True):
                file.write(to_json(dict(zip(lists, row, strict=True))) + "\n")
        else:
            writer = csv.writer(file, delimiter="\t" if path.suffix == ".tsv" else ",", lineterminator="\n")
            writer.writerow(lists)
            writer.writerows(zip(*lists.values(), strict=True))
    return path


def columns_of(readings: Readings) -> dict[str, Sequence[Any] | Floats]:
    """The columns that :func:`read_table` reads back."""
    columns: dict[str, Sequence[Any] | Floats] = {"id": readings.ids, "unlearned": readings.unlearned_N}
    if readings.original_N is not None:
        columns["original"] = readings.original_N
    for number, shadow_N in enumerate(readings.shadow_KN, 1):
        columns["shadow" if number == 1 else f"shadow_{number}"] = shadow_N
    if readings.subjects is not None:
        columns["subject"] = readings.subjects
    if readings.label_N is not None:
        columns["label"] = [None if math.isnan(x) else int(x) for x in readings.label_N.tolist()]
    return columns


def _plain(values: Sequence[Any] | Floats) -> list[Any]:
    listed = values.tolist() if isinstance(values, np.ndarray) else list(values)
    return [None if isinstance(x, float) and math.isnan(x) else x for x in listed]


# -- from a file to columns ----------------------------------------------------------------------------------------


def _columns(path: Path) -> Columns:
    kind = KINDS.get(path.suffix.lower())
    if not path.is_file():
        raise UserError(f"the table '{path}' does not exist: give a file with id, unlearned, original and shadow.")
    if kind is None:
        raise UserError(f"the table '{path}' ends in '{path.suffix}': allowed are {', '.join(KINDS)}.")
    if kind == "parquet":
        columns = _from_rows(path, _parquet(path))
    else:
        try:
            text = path.read_bytes().decode("utf-8-sig")  # a byte order mark, as spreadsheets write it, is no data
        except UnicodeDecodeError:
            raise UserError(f"the table '{path}' is not UTF-8 text: save it as CSV in UTF-8.") from None
        except OSError as error:
            raise UserError(f"the table '{path}' cannot be read ({error.strerror}): check the file.") from None
        columns = _separated(path, text) if kind == "csv" else _from_rows(path, _json_rows(path, text))
    if not columns.lines:
        raise UserError(f"the table '{path}' is empty: give a header and one row per sample.")
    return columns


def _separated(path: Path, text: str) -> Columns:
    header = text.lstrip("\r\n").split("\n", 1)[0]
    separator = max("\t;,", key=header.count) if path.suffix != ".tsv" else "\t"
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True)
    names: list[str] = []
    rows: list[list[str]] = []
    lines: list[int] = []
    try:
        for cells in reader:
            if not any(map(str.strip, cells)):
                continue
            if not names:
                names = [cell.strip().lower() for cell in cells]
                continue
            if len(cells) != len(names):
                hint = "; write numbers with a decimal point" if separator == "," and len(cells) > len(names) else ""
                raise UserError(
                    f"'{path}' line {reader.line_num} has {len(cells)} cells, but the header has {len(names)}{hint}."
                )
            rows.append(cells)
            lines.append(reader.line_num)
    except csv.Error as error:
        raise UserError(f"'{path}' line {reader.line_num} is no valid row ({error}): check its quotes.") from None
    doubled = sorted({name for name in names if names.count(name) > 1})
    if doubled:
        raise UserError(f"'{path}' has the column '{doubled[0]}' twice: give each column its own name.")
    return Columns(path, dict(zip(names, zip(*rows, strict=True), strict=True)) if rows else {}, lines)


def _json_rows(path: Path, text: str) -> Iterator[tuple[int, Any]]:
    whole = text.lstrip().startswith("[")
    parts = [(1, text)] if whole else [(n, line) for n, line in enumerate(text.split("\n"), 1) if line.strip()]
    for number, part in parts:
        try:
            value = json.loads(part)
        except (json.JSONDecodeError, RecursionError):
            raise UserError(f"'{path}' line {number} is not JSON: give one object per line.") from None
        yield from enumerate(value, 1) if whole else [(number, value)]


def _parquet(path: Path) -> Iterator[tuple[int, Any]]:
    parquet = _arrow(path, ".parquet")
    try:
        rows = parquet.read_table(path).to_pylist()
    except Exception as error:  # pyarrow raises its own classes, which need not be importable here
        raise UserError(f"'{path}' is not a readable Parquet file ({type(error).__name__}).") from None
    yield from enumerate(rows, 1)


def _arrow(path: Path, part: str) -> Any:
    try:
        return importlib.import_module(f"pyarrow{part}")
    except ImportError:
        raise UserError(f"'{path}' needs pyarrow: run pip install 'expunge[parquet]', or use CSV.") from None


def _from_rows(path: Path, numbered: Iterator[tuple[int, Any]]) -> Columns:
    lines, rows, names = [], [], dict[str, None]()
    for number, row in numbered:
        if not isinstance(row, dict):
            raise UserError(f'\'{path}\' line {number} is no object: give names and values, e.g. {{"id": "a", ...}}.')
        lowered = {str(key).strip().lower(): value for key, value in row.items()}
        names |= dict.fromkeys(lowered)
        lines.append(number)
        rows.append(lowered)
    return Columns(path, {name: [row.get(name) for row in rows] for name in names}, lines)


# -- columns, ids, numbers -----------------------------------------------------------------------------------------


def _shadows(columns: Columns, original: bool) -> list[str]:
    """Names of the shadow columns by their number.

    Raises:
        UserError: a needed column is missing, or a shadow has two columns.
    """
    found = {name: int(m[1] or 1) for name in columns.cells if (m := SHADOW.fullmatch(name))}
    needed = ["id", "unlearned", *(["original"] if original else [])]
    missing = [name for name in needed if name not in columns.cells] + ([] if found else ["shadow"])
    if missing:
        near = difflib.get_close_matches(missing[0], columns.cells, n=1, cutoff=0.5)
        hint = f" (is it '{near[0]}'?)" if near else ""
        offline = ", or give an anchor" if missing == ["original"] else ""
        raise UserError(
            f"'{columns.path}' has no column '{missing[0]}'{hint}: it has {', '.join(columns.cells)[:200]}; name "
            f"the columns in its first line id, unlearned, original, shadow (more as shadow_2, ...){offline}."
        )
    if len(set(found.values())) < len(found):
        raise UserError(f"'{columns.path}' has both 'shadow' and 'shadow_1': give each shadow one column.")
    return sorted(found, key=lambda name: found[name])


def _ids(columns: Columns) -> list[str]:
    seen: dict[str, int] = {}
    for row, given in enumerate(columns.cells["id"]):
        name = "" if given is None else str(given).strip()
        if not name:
            raise UserError(f"{columns.place(row, 'id')} is empty: give every sample an id.")
        if name in seen:
            raise UserError(
                f"'{columns.path}' has the id '{name}' twice (lines {columns.lines[seen[name]]} and "
                f"{columns.lines[row]}): ids must be unique."
            )
        seen[name] = row
    return list(seen)


def _decimal_sign(columns: Columns) -> Columns:
    """Whether numbers are written with a decimal comma: some have one comma, and none has a point."""
    names = [name for name in columns.cells if name in MODELS or SHADOW.fullmatch(name)]
    texts = [c for name in names for c in columns.cells[name] if isinstance(c, str)]
    comma = any("," in c for c in texts) and not any("." in c for c in texts)
    return Columns(columns.path, columns.cells, columns.lines, comma)


def _number(columns: Columns, name: str, row: int, cell: Any) -> float:
    """One cell; nan where nothing was measured."""
    if cell is None:
        return math.nan
    if isinstance(cell, (int, float)) and not isinstance(cell, bool):
        return float(cell)
    if isinstance(cell, str):
        text = cell.strip()
        if text.lower() in EMPTY:
            return math.nan
        try:
            return float(text.replace(",", ".", 1) if columns.comma else text)
        except ValueError:
            pass
    hint = "with a decimal point and no other sign" if isinstance(cell, str) and "," in cell else "or leave it empty"
    raise UserError(f"{columns.place(row, name)} is {str(cell)[:40]!r}, not a number: write it as 0.35, {hint}.")


def _numbers(columns: Columns, name: str) -> Floats:
    return np.array([_number(columns, name, row, cell) for row, cell in enumerate(columns.cells[name])])


def _readings(columns: Columns, name: str, form: Form) -> Floats:
    """One model's column, checked for what the form can have; infinite counts as not measured."""
    values_N = _numbers(columns, name)
    wrong_N = (values_N < 0) if form == "text" else (values_N < 0) | (values_N > 1)
    if wrong_N.any():
        row = int(np.argmax(wrong_N))
        others = int(wrong_N.sum()) - 1
        more = f" (and {others} more)" if others else ""
        mend = "negate log-likelihoods" if form == "text" else "losses need --form text"
        raise UserError(f"{columns.place(row, name)} is {values_N[row]:g}{more}: {MEANING[form]}; {mend}.")
    if not np.isfinite(values_N).any():
        raise UserError(f"'{columns.path}' column '{name}' holds no number: fill it in.")
    return np.where(np.isfinite(values_N), values_N, np.nan)


def _labels(columns: Columns) -> Floats:
    labels_N = _numbers(columns, "label")
    wrong_N = np.isfinite(labels_N) & (labels_N != 0) & (labels_N != 1) | np.isinf(labels_N)
    if wrong_N.any():
        row = int(np.argmax(wrong_N))
        raise UserError(
            f"{columns.place(row, 'label')} is {labels_N[row]:g}: labels are 1 (still a member) or 0 (not a member)."
        )
    return labels_N


# -- what is odd ---------------------------------------------------------------------------------------------------


def _same(first_N: Floats, second_N: Floats) -> bool:
    """Whether two columns are one model's: equal wherever both were measured, in at least two rows."""
    both_N = np.isfinite(first_N) & np.isfinite(second_N)
    return int(both_N.sum()) >= 2 and bool(np.array_equal(first_N[both_N], second_N[both_N]))


def _distinct(columns: Columns, values: Mapping[str, Floats], shadows: Sequence[str]) -> None:
    for place, shadow in enumerate(shadows):
        for other in ("unlearned", "original", *shadows[:place]):
            if other in values and _same(values[shadow], values[other]):
                raise UserError(
                    f"'{columns.path}' columns '{shadow}' and '{other}' are identical: a shadow must be a model of its "
                    "own that never saw these samples."
                )


def _oddities(columns: Columns, values: Mapping[str, Floats], shadows: Sequence[str], form: Form) -> list[str]:
    notes = []
    known = {"id", "unlearned", "original", "subject", "label", *shadows}
    if ignored := [name for name in columns.cells if name not in known]:
        notes.append(f"columns that have no meaning here were left out: {', '.join(ignored)[:200]}.")
    if columns.comma:
        notes.append("numbers were read with a decimal comma ('0,35' as 0.35).")
    if len(columns.lines) == 1:
        notes.append("one row only: for a verdict, give a holdout table as well.")
        return notes
    for name, values_N in values.items():
        if np.isfinite(values_N).sum() > 1 and np.nanmin(values_N) == np.nanmax(values_N):
            notes.append(f"column '{name}' has the same number in every row: was it measured sample by sample?")
    if "original" in values and _same(values["unlearned"], values["original"]):
        notes.append("columns 'unlearned' and 'original' are identical: nothing was unlearned, or a file was mixed up.")
    if "original" in values:
        better = 1 if form == "classifier" else -1
        gap_N = better * (values["original"] - np.mean([values[s] for s in shadows], axis=0))
        if np.isfinite(gap_N).any() and np.nanmedian(gap_N) <= 0:
            notes.append(
                f"the original knows these samples no better than the shadows do: is '{form}' the right form, and was "
                "the original trained on them?"
            )
    return notes
