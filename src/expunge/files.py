"""Files that are either whole or not there: atomic writing, JSON of numerical objects, content digests."""

from __future__ import annotations

import dataclasses
import enum
import hashlib
import json
import math
import os
import secrets
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import date
from fnmatch import fnmatch
from pathlib import Path, PurePath
from typing import IO, Any

MODEL_FILES = ("*.safetensors", "*.json", "*.jinja", "merges.txt", "vocab.txt", "tokenizer.model", "*.spm")
SCRATCH = ".tmp"  # how the names of half-written files end
BLOCK = 1 << 20


def plain(obj: Any) -> Any:
    """``obj`` as JSON values: numbers of numpy and torch, arrays, paths, dataclasses, sets, enums, pydantic models.

    NaN and infinities become None, for JSON has no word for them. Sets are sorted, so that files are stable.

    Raises:
        TypeError: something has no JSON form.
    """
    if obj is None or (isinstance(obj, (bool, int, str)) and not isinstance(obj, enum.Enum)):
        return obj
    if isinstance(obj, float):
        return float(obj) if math.isfinite(obj) else None
    if isinstance(obj, Mapping):
        return {_key(key): plain(value) for key, value in obj.items()}
    if isinstance(obj, (set, frozenset)):
        return sorted((plain(value) for value in obj), key=repr)
    if isinstance(obj, (Sequence, Iterator)) and not isinstance(obj, (bytes, bytearray)):
        return [plain(value) for value in obj]
    return _plain_object(obj)


def _plain_object(obj: Any) -> Any:
    if isinstance(obj, enum.Enum):
        return plain(obj.value)
    if isinstance(obj, PurePath):
        return str(obj)
    if isinstance(obj, date):
        return obj.isoformat()
    if dataclasses.is_dataclass(obj) and not isinstance(obj, type):
        return {f.name: plain(getattr(obj, f.name)) for f in dataclasses.fields(obj)}
    for convert in ("model_dump", "tolist"):  # pydantic; numpy and torch, neither of which is imported for this
        if callable(getattr(obj, convert, None)) and not isinstance(obj, type):
            return plain(getattr(obj, convert)())
    raise TypeError(f"a {type(obj).__name__} has no JSON form")


def _key(key: Any) -> str:
    if isinstance(key, bool) or key is None:
        return json.dumps(key)
    return str(key.value) if isinstance(key, enum.Enum) else str(key)


def to_json(obj: Any, indent: int | None = None) -> str:
    """JSON text of :func:`plain`; one line unless ``indent`` is given."""
    return json.dumps(plain(obj), ensure_ascii=False, allow_nan=False, indent=indent)


@contextmanager
def atomic(path: Path) -> Iterator[IO[str]]:
    """A text file to write which takes the name ``path`` only once it is whole and on the disk.

    Whatever happens before that (an exception, a kill, a power cut) leaves an older file of that name as it was.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.parent / f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}{SCRATCH}"
    try:
        with scratch.open("x", encoding="utf-8", newline="\n") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(scratch, path)
    except BaseException:
        scratch.unlink(missing_ok=True)
        raise
    _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    """The rename itself reaches the disk; some file systems and Windows do not offer this."""
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(handle)
    except OSError:
        pass
    finally:
        os.close(handle)


def write_text(path: Path, text: str) -> Path:
    with atomic(path) as file:
        file.write(text)
    return path


def write_json(path: Path, obj: Any) -> Path:
    return write_text(path, to_json(obj, indent=2) + "\n")


def write_jsonl(path: Path, rows: Iterable[Any]) -> Path:
    """One JSON value per line, streamed, so that ``rows`` may be a generator of any length."""
    with atomic(path) as file:
        for row in rows:
            file.write(to_json(row) + "\n")
    return path


def read_jsonl(path: Path) -> Iterator[Any]:
    """The values of a JSONL file; empty lines are skipped, as is a last line that a kill cut off.

    Raises:
        json.JSONDecodeError: any other line is not JSON.
    """
    with path.open(encoding="utf-8") as file:
        for line in file:
            if not line.strip():
                continue
            try:
                yield json.loads(line)
            except json.JSONDecodeError:
                if line.endswith("\n"):
                    raise


def digest_file(path: Path) -> str:
    """SHA-256 of the content, in hexadecimal."""
    state = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(BLOCK):
            state.update(block)
    return state.hexdigest()


def digest_folder(folder: Path, patterns: Sequence[str] = MODEL_FILES) -> str:
    """SHA-256 over the sorted relative names and contents of the files whose name matches one of ``patterns``.

    The default takes the weights, configuration and tokenizer of a saved model, and leaves out what a save writes
    beside them (optimizer states, model cards). Times, owners, and hidden files or folders do not count.

    Raises:
        FileNotFoundError: no such folder, or no file matches: the digest of nothing would equal any other.
    """
    names = sorted(
        path.relative_to(folder).as_posix()
        for path in folder.rglob("*")
        if path.is_file()
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
        and any(fnmatch(path.name, pattern) for pattern in patterns)
    )
    if not names:
        raise FileNotFoundError(f"no file to digest in {folder} ({', '.join(patterns)})")
    # Name and content go in as one JSON list: no name can be chosen so that two folders run into each other.
    content = [[name, digest_file(folder / name)] for name in names]
    return hashlib.sha256(json.dumps(content, ensure_ascii=False).encode()).hexdigest()
