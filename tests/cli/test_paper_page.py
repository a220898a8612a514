"""docs/papers.md says what the code says; the leaderboard's command line is the run's."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import pytest

from expunge.cli.leaderboard_page import command_line
from expunge.cli.method_page import filled
from expunge.cli.paper_page import COMMON, generated
from expunge.methods.registry import all_methods
from expunge.methods.scope import all_selectors

PAGE = Path(__file__).resolve().parents[2] / "docs/papers.md"


def test_the_page_is_up_to_date() -> None:
    page = PAGE.read_text(encoding="utf-8")
    assert filled(page, generated()) == page, "run: python -m expunge.cli.paper_page docs/papers.md"


@pytest.mark.parametrize("name", all_methods())
def test_every_default_says_where_it_comes_from(name: str) -> None:
    found = all_methods()[name]
    missing = [
        f.name
        for f in fields(found.options)
        if not f.metadata.get("source") and (f.name not in COMMON or f.default != COMMON[f.name]) and f.default
    ]  # none, false and 0 switch something off or leave it to the method
    assert not missing, f"{name}: options without a source"
    assert found.paper


def test_every_scope_is_listed() -> None:
    page = PAGE.read_text(encoding="utf-8")
    assert all(f"| `{name}` |" in page for name in all_selectors())


def test_the_command_of_a_study() -> None:
    config = {
        "model": None, "init": "tiny", "methods": ["npo", "cluster"], "seeds": 3, "blind": True, "tune": 0,
        "data": "people", "data_options": {"people": "20"}, "device": "auto", "evaluate": {"suite": "quick"},
    }  # fmt: skip
    assert command_line(config) == (
        "expunge bench --init tiny --methods npo,cluster --seeds 3 --blind --data people --data-option people=20 "
        "--suite quick"
    )
