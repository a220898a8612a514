"""Rows from the Hugging Face hub: only when a hub name is asked for, and only with the extra ``hub``."""

from __future__ import annotations

import importlib
import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from expunge.errors import UserError

Row = Mapping[str, Any]
CONVERTED = "refs/convert/parquet"  # where the hub puts the Parquet files that it makes of script datasets


def hub_rows(name: str, config: str | None, split: str, limit: int | None = None) -> list[Row]:
    """At most ``limit`` rows of one split of a hub dataset; with a limit they are streamed, never all downloaded.

    Raises:
        UserError: the extra is missing, there is no network, or the hub has no such dataset.
    """
    try:
        datasets: Any = importlib.import_module("datasets")
    except ImportError:
        raise UserError(
            f"the hub dataset '{name}' needs the package 'datasets', which is not installed: "
            "run pip install 'expunge[hub]', or give --data-dir with a local copy."
        ) from None
    wanted = {"split": split, "streaming": limit is not None}
    try:
        try:
            rows = datasets.load_dataset(name, config, **wanted)
        except RuntimeError as error:  # a loading script, which is never run; the hub keeps a converted copy
            if "script" not in str(error).lower():
                raise
            rows = datasets.load_dataset(name, config, revision=CONVERTED, **wanted)
        return [dict(row) for row in itertools.islice(rows, limit)]
    except Exception as error:  # the hub client has no common error class: offline, missing, gated, renamed
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"the hub dataset '{name}' ({config or 'default'}, {split}) could not be read ({type(error).__name__}: "
            f"{reason}): check the network and the name, or give --data-dir with a local copy."
        ) from error


def local_file(data_dir: Path, names: tuple[str, ...], dataset: str) -> Path:
    """The first of ``names`` that stands in ``data_dir``.

    Raises:
        UserError: none does.
    """
    for name in names:
        if (data_dir / name).is_file():
            return data_dir / name
    raise UserError(f"dataset '{dataset}' needs {' or '.join(names)} in '{data_dir}', and it is not there.")
