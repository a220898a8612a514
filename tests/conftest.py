"""What every test may use."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def shared(path: str) -> Path:
    """A file or folder of the shared data (``EXPUNGE_SHARED``, else beside the repository); skips when absent."""
    folder = Path(os.environ.get("EXPUNGE_SHARED", ROOT.parent / "shared"))
    if not (folder / path).exists():
        pytest.skip(f"{folder / path} is not there: set EXPUNGE_SHARED to the folder with the shared data")
    return folder / path
