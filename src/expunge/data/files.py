"""Your own data: one file per role, in JSON lines, a JSON array, CSV, TSV or Parquet, gzipped or not.

A row has ``prompt`` and ``target`` (``question`` and ``answer`` mean the same), or ``text`` for a document. It may
have ``id``, ``subject``, ``names``, ``image`` (a path relative to the file), and measuring views of itself:
``paraphrases``, ``restated`` and ``perturbed``. In CSV and TSV a list is written as a JSON array or with ``|``.
"""

from __future__ import annotations

import csv
import gzip
import importlib
import io
import json
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from expunge.data.samples import Dataset, Modality, Probe, ProbeKind, Role, Sample
from expunge.errors import UserError, unknown

KINDS = {".jsonl": "json", ".ndjson": "json", ".json": "json", ".csv": "csv", ".tsv": "tsv", ".parquet": "parquet"}
ALIASES = {"question": "prompt", "answer": "target"}
LISTS = ("names", "paraphrases", "restated", "perturbed")
FIELDS = ("prompt", "target", "text", "id", "subject", "image", *LISTS)
Line = tuple[int, Mapping[str, Any]]  # its number in the file, as an editor shows it; its fields


def load_files(
    *,
    forget: Path | str,
    retain: Path | str | None = None,
    holdout: Path | str | None = None,
    utility: Path | str | None = None,
    name: str = "files",
) -> Dataset:
    """A dataset from one file per role. Rows without an id are called after their role and number.

    Raises:
        UserError: a file that cannot be read (see :func:`read_samples`), or forget and retain share a sample.
    """
    given: dict[Role, Path | str | None] = {
        "forget": forget, "retain": retain, "holdout": holdout, "utility": utility,
    }  # fmt: skip
    roles = {role: read_samples(path, prefix=role) for role, path in given.items() if path is not None}
    return Dataset(
        name=name,
        roles=roles,
        modality=modality_of([sample for samples in roles.values() for sample in samples]),
        source=", ".join(f"{role}: {path}" for role, path in given.items() if path is not None),
        notes=tuple(f"No {role} file was given." for role in ("retain", "holdout") if given[role] is None),
    ).check()


def modality_of(samples: Sequence[Sample]) -> Modality:
    """classifier: images with a class number; multimodal: images with a text; text: no image.

    Raises:
        UserError: class numbers and texts are mixed.
    """
    numbers = [sample for sample in samples if isinstance(sample.target, int)]
    if numbers and len(numbers) < len(samples):
        other = next(sample for sample in samples if not isinstance(sample.target, int))
        raise UserError(
            f"'{numbers[0].id}' has a class number for target and '{other.id}' a text: use one of the two throughout."
        )
    if numbers:
        return "classifier"
    return "multimodal" if any(sample.image is not None for sample in samples) else "text"


def read_samples(path: Path | str, prefix: str | None = None) -> tuple[Sample, ...]:
    """All samples of one file. A row without ``id`` is called prefix-number; the prefix is by default the file's name.

    Raises:
        UserError: the file is missing, empty, not UTF-8 or of an unknown kind; a row is malformed, has neither text
            nor target, has a value of the wrong type, or repeats an id. The message says which line and why.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"the data file '{path}' does not exist: give a JSONL, JSON, CSV, TSV or Parquet file.")
    plain = path.with_suffix("") if path.suffix == ".gz" else path
    kind = KINDS.get(plain.suffix.lower())
    if kind is None:
        raise unknown(f"kind of file for '{path}'", plain.suffix or "none", KINDS)
    lines = _parquet(path) if kind == "parquet" else _rows(path, kind)
    samples: list[Sample] = []
    seen: dict[str, int] = {}
    for place, (number, row) in enumerate(lines, 1):
        where = f"'{path}' line {number}"
        sample = _sample(row, where, f"{prefix or plain.stem}-{place}", path.parent)
        if sample.id in seen:
            raise UserError(f"'{path}' line {number}: the id '{sample.id}' already stands in line {seen[sample.id]}; "
                            "ids must be unique.")  # fmt: skip
        seen[sample.id] = number
        samples.append(sample)
    if not samples:
        raise UserError(f"the data file '{path}' is empty: put at least one row into it.")
    return tuple(samples)


# -- from a file to rows ---------------------------------------------------------------------------------------------


def _text(path: Path) -> str:
    try:
        raw = path.read_bytes()
        if path.suffix == ".gz":
            raw = gzip.decompress(raw)
        return raw.decode("utf-8-sig")  # a byte order mark, as spreadsheets write it, is no part of the data
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise UserError(f"'{path}' line {line}: not UTF-8 text; save the file as UTF-8.") from None
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"'{path}' could not be read ({error}): check the file, and .gz files with gzip -t.") from None


def _rows(path: Path, kind: str) -> Iterator[Line]:
    text = _text(path)
    if kind in ("csv", "tsv"):
        yield from _table(path, text, "\t" if kind == "tsv" else ",")
    elif text.lstrip().startswith("["):
        yield from _array(path, text)
    else:
        # splitlines would also cut at Unicode separators, which JSON allows inside strings.
        for number, line in enumerate(text.split("\n"), 1):
            if line.strip():
                yield number, _object(_json(line, path, number), f"'{path}' line {number}")


def _json(text: str, path: Path, first_line: int) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        line = first_line + error.lineno - 1
        raise UserError(f"'{path}' line {line}: not JSON ({error.msg}, column {error.colno}).") from None
    except RecursionError:
        raise UserError(f"'{path}' line {first_line}: JSON nested too deeply.") from None


def _object(value: Any, where: str) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise UserError(f"{where}: expected a JSON object with prompt and target, or text; found {_kind(value)}.")
    return value


def _array(path: Path, text: str) -> Iterator[Line]:
    """Elements of a JSON array with the line on which each begins."""
    _json(text, path, 1)  # the whole first: a broken array is reported where it breaks
    decoder, at = json.JSONDecoder(), text.index("[") + 1
    while True:
        while text[at] in " \t\r\n,":
            at += 1
        if text[at] == "]":
            return
        number = text.count("\n", 0, at) + 1
        value, at = decoder.raw_decode(text, at)
        yield number, _object(value, f"'{path}' line {number}")


def _table(path: Path, text: str, delimiter: str) -> Iterator[Line]:
    csv.field_size_limit(1 << 27)  # documents are longer than the default of 128 KiB
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    try:
        header = next(reader, None)
        if header is None:
            return
        names = [name.strip() for name in header]
        if not {"prompt", "question", "text", "target", "answer"} & set(names):
            raise UserError(f"'{path}' line 1: the header has no column prompt, target or text; it has "
                            f"{', '.join(names)}.")  # fmt: skip
        before = reader.line_num
        for cells in reader:
            number, before = before + 1, reader.line_num  # a quoted cell may span lines
            if not any(cells):
                continue
            if len(cells) != len(names):
                raise UserError(f"'{path}' line {number}: {len(cells)} cells, but the header has {len(names)}.")
            row: dict[str, Any] = {name: cell for name, cell in zip(names, cells, strict=True) if cell}
            for key in LISTS:
                if key in row:
                    row[key] = _cell_list(row[key], path, number)
            yield number, row
    except csv.Error as error:
        raise UserError(f"'{path}' line {reader.line_num}: not a valid table ({error}).") from None


def _cell_list(cell: str, path: Path, number: int) -> Any:
    if cell.lstrip().startswith("["):
        return _json(cell, path, number)
    return [part.strip() for part in cell.split("|") if part.strip()]


def _parquet(path: Path) -> Iterator[Line]:
    try:
        parquet: Any = importlib.import_module("pyarrow.parquet")
    except ImportError:
        raise UserError(
            f"'{path}' needs pyarrow, which is not installed: run pip install 'expunge[parquet]'."
        ) from None
    try:
        rows = parquet.read_table(path).to_pylist()
    except Exception as error:  # pyarrow raises its own classes, which need not be importable here
        raise UserError(f"'{path}' is not a readable Parquet file ({type(error).__name__}).") from None
    for number, row in enumerate(rows, 1):
        yield number, {key: value for key, value in row.items() if value is not None}


# -- from a row to a sample ------------------------------------------------------------------------------------------


def _kind(value: Any) -> str:
    names = {
        str: "a text",
        bool: "true or false",
        int: "a number",
        float: "a number",
        list: "a list",
        dict: "an object",
    }
    return names.get(type(value), "nothing" if value is None else type(value).__name__)


def _string(row: Mapping[str, Any], key: str, where: str) -> str:
    value = row.get(key)
    if value is None:
        return ""
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        raise UserError(f"{where}: {key} is {_kind(value)}; give a text.")
    return str(value)


def _strings(row: Mapping[str, Any], key: str, where: str) -> tuple[str, ...]:
    value = row.get(key)
    if value is None:
        return ()
    if isinstance(value, str):
        return (value,)
    if not isinstance(value, list):
        raise UserError(f"{where}: {key} is {_kind(value)}; give a list of texts.")
    for item in value:
        if not isinstance(item, str):
            raise UserError(f"{where}: {key} holds {_kind(item)}; give a list of texts.")
    return tuple(value)


def _sample(raw: Mapping[str, Any], where: str, default_id: str, folder: Path) -> Sample:
    row: dict[str, Any] = {}
    for key, value in raw.items():
        name = ALIASES.get(key, key)
        if name in row and value is not None:
            raise UserError(f"{where}: both {key} and {name} are given; keep one of the two.")
        if value is not None:
            row[name] = value
    has_text = "text" in row
    if has_text and ("target" in row or "prompt" in row):
        raise UserError(f"{where}: text stands for a whole document, so it cannot stand beside prompt or target.")
    if not has_text and "target" not in row:
        known = ", ".join(raw) or "nothing"
        raise UserError(f"{where}: neither text nor target (or answer); the row has {known}.")
    prompt = _string(row, "prompt", where)
    target: str | int = _string(row, "text" if has_text else "target", where)
    if not str(target).strip():
        raise UserError(f"{where}: {'text' if has_text else 'target'} is empty; there is nothing to learn or forget.")
    image = _string(row, "image", where)
    picture = folder / image if image else None
    if picture is not None:
        if not picture.is_file():
            raise UserError(f"{where}: the image '{picture}' does not exist; paths are relative to the data file.")
        if not prompt and str(target).isdecimal():
            target = int(target)  # a class, as nothing is asked about the picture
    identity = _string(row, "id", where) or default_id
    names = _strings(row, "names", where)
    answer = str(target)
    views: tuple[tuple[ProbeKind, str], ...] = (("restated", "restated"), ("perturbed", "perturbed"))
    probes = [Probe(kind="paraphrase", prompt=text, target=answer) for text in _strings(row, "paraphrases", where)]
    probes += [
        Probe(kind=kind, prompt=prompt, target=text) for kind, key in views for text in _strings(row, key, where)
    ]
    return Sample(
        id=identity,
        subject=_string(row, "subject", where) or (names[0] if names else identity),
        prompt=prompt,
        target=target,
        image=picture,
        names=names,
        probes=tuple(probes),
    )
