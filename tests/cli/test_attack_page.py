"""docs/attacks.md says what the code says, and the example in docs/developing.md is an attack."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest

import attack_cases
from expunge.attacks import registry
from expunge.attacks.forms import FORMS
from expunge.cli.attack_page import generated, main
from expunge.cli.catalogue import catalogue, readable
from expunge.cli.method_page import filled

DOCS = Path(__file__).resolve().parents[2] / "docs"
PAGE = DOCS / "attacks.md"


def test_the_generated_part_is_up_to_date() -> None:
    page = PAGE.read_text(encoding="utf-8")
    assert filled(page, generated()) == page, "run: python -m expunge.cli.attack_page docs/attacks.md"


def test_a_page_that_is_not_up_to_date_is_mended(tmp_path: Path) -> None:
    page = PAGE.read_text(encoding="utf-8")
    (tmp_path / "attacks.md").write_text(page.replace("| `loss` |", "| `lost` |"), encoding="utf-8")
    main([str(tmp_path / "attacks.md")])
    assert (tmp_path / "attacks.md").read_text(encoding="utf-8") == page


def test_every_attack_stands_in_it_with_formula_source_and_options() -> None:
    page = PAGE.read_text(encoding="utf-8")
    sections = dict(re.findall(r"^### `(.+?)`\n(.*?)(?=^##|\Z)", page, re.MULTILINE | re.DOTALL))
    entries = catalogue("attacks")
    assert sections.keys() == entries.keys()
    for name, entry in entries.items():
        row = next(line for line in page.splitlines() if line.startswith(f"| `{name}` |"))
        assert f"| {entry.properties['tier']} | {entry.properties['passes']:g} |" in row
        assert f"    {entry.formula}\n" in sections[name] and entry.source.rstrip(".") in sections[name]
        for option in entry.options:
            assert re.search(rf"^- `{option['name']}`.*{re.escape(option['meaning'])}", sections[name], re.MULTILINE)


def test_every_attack_says_what_a_reader_needs() -> None:
    for name, entry in catalogue("attacks").items():
        assert entry.formula and entry.doc, f"{name} needs a formula and more than one line"
        assert re.search(r"\b(arXiv|19|20)", entry.source), f"{name} names a source without a year"
        assert all(option["meaning"] for option in entry.options), name


def test_the_audit_page_tells_the_cost_of_each_suite() -> None:
    page = (DOCS / "audit.md").read_text(encoding="utf-8")
    for tier in registry.TIERS:
        (told,) = re.findall(rf"^\| `{tier}` \|.*\| about ([\d,]+) \|$", page, re.MULTILINE)
        passes = 1 + sum(attack.passes for attack in registry.suite(tier))
        assert int(told.replace(",", "")) == pytest.approx(passes, rel=0.15), f"{tier} costs {passes:.0f} passes now"


def test_docstrings_are_made_readable() -> None:
    assert readable("Adds one.\n\nSee :func:`add`, ``--x``.\n\nRaises:\n    E: no.", "Adds one.") == "See `add`, `--x`."
    assert not any(re.search(r"``|:\w+:`|Raises:", entry.doc) for entry in catalogue("attacks").values())


def test_the_forms_of_prompting_are_those_of_the_table() -> None:
    table = PAGE.read_text(encoding="utf-8").split("| form | what the model is asked |")[1].split("<!--")[0]
    named = [name for line in table.splitlines() if line for name in re.findall(r"`(\w+)`", line.split("|")[1])]
    assert sorted(named) == sorted(FORMS)


def test_the_example_is_an_attack(tmp_path: Path) -> None:
    page = (DOCS / "developing.md").read_text(encoding="utf-8")
    (example,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    (tmp_path / "own.py").write_text(example)
    try:
        found = registry.get_attack(f"{tmp_path / 'own.py'}:first_token")
        exam = attack_cases.exam()
        original = found.run(exam, exam.audited, found.configure({})).scores["first_token"]
        retrained = found.run(exam, attack_cases.retrain(), found.configure({})).scores["first_token"]
    finally:
        registry._ATTACKS.pop("first_token", None)
    assert found.missing(exam) is None and all(len(v) == len(exam.samples[r]) for r, v in original.items())
    assert math.fsum(original["forget"]) > 0.5 + math.fsum(retrained["forget"])
    with pytest.raises(KeyError):
        registry._ATTACKS["first_token"]
