"""Extensions: modules of a package, entry points, and single files of the user's; each registers what it brings."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import pkgutil
import sys
from collections.abc import Collection
from importlib.metadata import entry_points
from pathlib import Path

from expunge.errors import UserError


def import_all(package: str, group: str, *, leave_out: Collection[str] = ()) -> None:
    """Import every module of ``package`` but those left out, then what is installed under an entry-point group."""
    found = importlib.import_module(package)
    for module in pkgutil.iter_modules(found.__path__):
        if module.name not in leave_out:
            importlib.import_module(f"{package}.{module.name}")
    for entry in entry_points(group=group):
        entry.load()


def import_file(path: str, kind: str) -> str:
    """Run a Python file as a module of its own; its name, ``expunge_KIND_`` and a digest of where it stands.

    Raises:
        UserError: there is no such file.
    """
    if not Path(path).is_file():
        raise UserError(f"{kind} file '{path}' does not exist: give path/to/file.py:name.")
    place = hashlib.sha256(str(Path(path).resolve()).encode()).hexdigest()[:16]
    spec = importlib.util.spec_from_file_location(f"{prefix(kind)}{place}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses of the file look themselves up there
    spec.loader.exec_module(module)
    return spec.name


def prefix(kind: str) -> str:
    """How the module names of such files begin."""
    return f"expunge_{kind}_"
