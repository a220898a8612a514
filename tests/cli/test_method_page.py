"""docs/methods.md says what the code says, and its example is a method."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from expunge.cli.catalogue import catalogue
from expunge.cli.method_page import BEGIN, filled
from expunge.errors import UserError
from expunge.methods import registry

PAGE = Path(__file__).resolve().parents[2] / "docs/methods.md"


def test_the_generated_part_is_up_to_date() -> None:
    page = PAGE.read_text(encoding="utf-8")
    assert filled(page) == page, "run: python -m expunge.cli.method_page docs/methods.md"


def test_every_method_stands_in_it() -> None:
    page = PAGE.read_text(encoding="utf-8")
    for name, entry in catalogue("methods").items():
        assert f"| `{name}` |" in page and f"**`{name}`**" in page
        assert entry.source.rstrip(".").replace("|", "\\|") in page


def test_options_in_the_written_part_exist() -> None:
    written = PAGE.read_text(encoding="utf-8").split("## The flagship")[1].split("## Your own")[0]
    options = {option["name"] for option in catalogue("methods")["cluster"].options}
    named = set(re.findall(r"`([a-z_]+)=?[^`]*`", written))
    known = options | {"cluster", "counterfactual", "blend", "cluster_driven", "names"}
    assert not {n for n in named if n not in known}
    assert len(named & options) > 20


def test_a_page_without_a_place_is_refused() -> None:
    with pytest.raises(UserError, match="no place"):
        filled("# Methods\n")
    with pytest.raises(UserError, match="no place"):
        filled(f"{BEGIN}\n")


def test_the_example_is_a_method(tmp_path: Path) -> None:
    (example,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    (tmp_path / "own.py").write_text(example)
    try:
        found = registry.get_method(f"{tmp_path / 'own.py'}:shrink")
        assert found.summary == "Make all weights smaller." and found.configure({"factor": "0.5"}).factor == 0.5
    finally:
        registry._METHODS.pop("shrink", None)
