"""Helpers that every test may use."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

SHARED = Path(os.environ.get("EXPUNGE_SHARED", Path(__file__).resolve().parents[2] / "shared"))


def shared(path: str) -> Path:
    """A file or folder of the shared test data; skips the test when it is not there."""
    found = SHARED / path
    if not found.exists():
        pytest.skip(f"shared data '{path}' is not there: set EXPUNGE_SHARED to its folder")
    return found
