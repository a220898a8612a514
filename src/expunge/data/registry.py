"""Datasets by name: one file per source, found by scanning this package and the entry points of installed ones.

A dataset is a typed function ``(options, *, data_dir, seed) -> Dataset`` in one file of this package (or an entry
point of group ``expunge.datasets``, or ``path/to/file.py:name``), registered by :func:`dataset`. Nothing else has
to be edited to add one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from expunge.data.samples import Dataset, Modality
from expunge.errors import UserError, unknown
from expunge.extensions import import_all, import_file
from expunge.options import configure

GROUP = "expunge.datasets"
NOT_SOURCES = frozenset({"samples", "registry", "chance"})  # modules of this package that can register nothing


class Loader(Protocol):
    """What :func:`dataset` decorates; ``options`` is an instance of the declared dataclass."""

    def __call__(self, options: Any, *, data_dir: Path | None, seed: int) -> Dataset: ...


@dataclass(frozen=True)
class Source:
    """A registered dataset and what ``expunge ls datasets`` says about it."""

    name: str
    load: Loader
    options: type[Any]
    summary: str
    origin: str
    licence: str
    modality: Modality = "text"

    def configure(self, values: Mapping[str, Any]) -> Any:
        """The dataset's options with ``values`` set; strings are read as the field's type."""
        return configure(self.options, values, f"option of dataset {self.name}")


_SOURCES: dict[str, Source] = {}


def register(entry: Source) -> Source:
    known = _SOURCES.get(entry.name)
    if known is not None and _place(known.load) != _place(entry.load):
        raise AssertionError(f"two datasets are called {entry.name}")
    _SOURCES[entry.name] = entry
    return entry


def _place(load: Any) -> tuple[str, str]:
    return load.__module__, load.__qualname__


def dataset(
    *, name: str, options: type[Any], summary: str, origin: str, licence: str, modality: Modality = "text"
) -> Callable[[Loader], Loader]:
    """Decorator that registers a dataset; ``options`` is a frozen dataclass whose fields all have defaults."""

    def wrap(load: Loader) -> Loader:
        register(Source(name, load, options, summary, origin, licence, modality))
        return load

    return wrap


def all_datasets() -> dict[str, Source]:
    """Every dataset by name: the modules of this package, then entry points of group ``expunge.datasets``."""
    import_all("expunge.data", GROUP, leave_out=NOT_SOURCES)
    return dict(sorted(_SOURCES.items()))


def get_dataset(name: str) -> Source:
    """By name, or ``path/to/file.py:name``.

    Raises:
        UserError: no such dataset or file; the nearest name is suggested.
    """
    if ".py:" in name:
        path, _, wanted = name.rpartition(":")
        import_file(path, "dataset")
        if wanted not in _SOURCES:
            raise UserError(f"'{path}' registers no dataset called '{wanted}'.")
        return _SOURCES[wanted]
    sources = all_datasets()
    if name not in sources:
        raise unknown("dataset", name, sources)
    return sources[name]


def load_dataset(
    name: str, *, data_dir: Path | str | None = None, seed: int = 0, options: Mapping[str, Any] | None = None
) -> Dataset:
    """The dataset ``name`` with its ``options``, checked.

    Args:
        name: see :func:`all_datasets`; or ``path/to/file.py:name``.
        data_dir: a local copy; without one, embedded datasets are generated and public ones come from the hub.
        seed: of the generation, or of the choice of subjects.
        options: fields of the dataset's options; strings (from a command line) are read as the field's type.

    Raises:
        UserError: unknown name or option, a folder or file that is missing, or a dataset that cannot be unlearned
            from (see :meth:`Dataset.check`).
    """
    source = get_dataset(name)
    folder = None if data_dir is None else Path(data_dir)
    if folder is not None and folder.is_file():
        raise UserError(f"'{folder}' is a file, and --data-dir a folder: give the one that the file lies in.")
    if folder is not None and not folder.is_dir():
        raise UserError(f"the data folder '{folder}' does not exist: give a folder with a local copy of '{name}'.")
    if seed < 0:
        raise UserError(f"seed = {seed}: give 0 or more.")
    return source.load(source.configure(options or {}), data_dir=folder, seed=seed).check()
