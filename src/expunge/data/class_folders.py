"""Pictures in class sub-folders, on disk or in a zip: the folder's name is the class."""

from __future__ import annotations

import os
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from expunge.data.pictures import ENDINGS, MOST_BYTES, read_picture
from expunge.data.pool import Held, Pool
from expunge.errors import UserError

File = TypeVar("File", Path, str)
SHOWN = ", ".join(sorted(ENDINGS))


def folder_pool(root: Path, classes: Sequence[str] | None = None) -> Pool:
    """``root/class/picture.png``; files stay on disk and are read when they are needed.

    Classes are the sub-folders in order of their names (of their numbers, where all are numbers), or those given.

    Raises:
        UserError: no such folder, no sub-folders with pictures, a class without one, or other classes than those given.
    """
    if not root.is_dir():
        raise UserError(f"the folder '{root}' does not exist: give one with a sub-folder of pictures for each class.")
    found: dict[str, list[Path]] = {}
    other = 0
    with os.scandir(root) as entries:
        folders = [Path(e.path) for e in entries if e.is_dir() and not _hidden(e.name)]
    for folder in folders:
        with os.scandir(folder) as entries:
            files = sorted(e.name for e in entries if e.is_file() and not _hidden(e.name))
        pictures = [folder / name for name in files if _picture(name)]
        other += len(files) - len(pictures)
        found[folder.name] = pictures
    if not any(found.values()):
        raise UserError(
            f"'{root}' has no sub-folders with pictures ({SHOWN}): put them into one folder per class, "
            "or name the part that holds these folders."
        )
    names, paths, labels_N = _in_order(found, classes, str(root))
    return Pool(
        labels_N=labels_N,
        classes=names,
        read=lambda places: [paths[place] for place in places],
        source=str(root),
        notes=_left_out(other, str(root)),
    )


def zip_pool(path: Path, part: str = "") -> Pool:
    """The same inside a zip, under any common folder, or under the one called ``part``; nothing is unpacked to disk.

    Raises:
        UserError: no zip, class folders at different places, or what :func:`folder_pool` finds wrong.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            members = [m.filename for m in archive.infolist() if not m.is_dir()]
    except (OSError, zipfile.BadZipFile) as error:
        raise UserError(f"'{path}' is no readable zip file: copy it again.") from error
    found: dict[str, list[str]] = {}
    above: set[tuple[str, ...]] = set()
    other = 0
    for member in sorted(members):
        parts = PurePosixPath(member).parts
        if len(parts) < 2 or any(_hidden(name) for name in parts) or (part and part not in parts[:-2]):
            continue
        if _picture(member):
            found.setdefault(parts[-2], []).append(member)
            above.add(parts[:-2])
        else:
            other += 1
    if not found:
        raise UserError(
            f"'{path}' has no class folders with pictures ({SHOWN}){f' under {part!r}' if part else ''}: "
            "put one folder per class into it."
        )
    if len(above) > 1:
        places = ", ".join(sorted("/".join(p) or "(top)" for p in above)[:5])
        raise UserError(f"'{path}' has class folders in {places}: say with option part which of them is meant.")
    names, inside, labels_N = _in_order(found, None, str(path))

    def read(places: Sequence[int]) -> list[NDArray[np.uint8]]:
        held = Held(str(path))
        with zipfile.ZipFile(path) as archive:
            return [held.keep(_member(archive, inside[place], path)) for place in places]

    return Pool(labels_N=labels_N, classes=names, read=read, source=str(path), notes=_left_out(other, str(path)))


def _member(archive: zipfile.ZipFile, name: str, path: Path) -> NDArray[np.uint8]:
    called = f"'{name}' in '{path}'"
    try:
        with archive.open(name) as file:
            raw = file.read(MOST_BYTES + 1)
    except (OSError, EOFError, RuntimeError, NotImplementedError, zipfile.BadZipFile, zlib.error) as error:
        raise UserError(f"{called} cannot be read ({error}): pack the zip again, without a password.") from error
    if len(raw) > MOST_BYTES:
        raise UserError(f"{called} is larger than {MOST_BYTES >> 20} MiB, the most for one picture: leave it out.")
    return read_picture(raw, called)


def _in_order(
    found: Mapping[str, list[File]], classes: Sequence[str] | None, source: str
) -> tuple[Sequence[str], list[File], NDArray[np.int64]]:
    numbers = all(name.isdecimal() for name in found)  # 10 comes after 9
    names = classes or tuple(sorted(found, key=(lambda name: (int(name), name)) if numbers else None))
    if classes is not None and set(found) != set(classes):
        wrong = sorted(set(found) ^ set(classes))
        raise UserError(f"'{source}' should have the class folders {', '.join(classes)}: look at '{wrong[0]}'.")
    empty = next((name for name in names if not found[name]), None)
    if empty is not None:
        raise UserError(f"'{source}': the class folder '{empty}' has no picture ({SHOWN}): fill it or take it away.")
    files = [file for name in names for file in found[name]]
    return names, files, np.repeat(np.arange(len(names)), [len(found[name]) for name in names]).astype(np.int64)


def _picture(name: str) -> bool:
    return PurePosixPath(name).suffix.lower() in ENDINGS


def _hidden(name: str) -> bool:
    return name.startswith((".", "__MACOSX")) or name == "Thumbs.db"


def _left_out(other: int, source: str) -> tuple[str, ...]:
    return (f"{other} file(s) in '{source}' are no pictures by their ending and were left out.",) if other else ()
