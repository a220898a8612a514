"""The generated part of docs/attacks.md: ``python -m expunge.cli.attack_page docs/attacks.md`` writes it anew."""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from expunge.attacks.registry import TIERS
from expunge.cli.catalogue import HIGH, Entry, catalogue
from expunge.cli.method_page import escaped, filled, row, value
from expunge.files import write_text

COLUMNS = ("attack", "what it does", "suite", "passes", "attacker sees", "needs", "works on")


def generated() -> str:
    """Families in turn: a table of their attacks, cheapest suite first, then formula, source and options of each."""
    entries = catalogue("attacks").values()
    lines = []
    for family, high in HIGH.items():
        own = sorted((e for e in entries if e.properties["family"] == family), key=_order)
        lines += [f"## {family.capitalize()}", "", f"A high score: {high}.", ""]
        lines += [row(COLUMNS), row(["---"] * len(COLUMNS)), *(row(_cells(e)) for e in own), ""]
        for entry in own:
            lines += _described(entry)
    return "\n".join(lines).rstrip()


def _order(entry: Entry) -> tuple[int, str]:
    return TIERS.index(entry.properties["tier"]), entry.name


def _cells(entry: Entry) -> list[str]:
    found = entry.properties
    return [
        f"`{entry.name}`",
        escaped(entry.summary),
        str(found["tier"]),
        f"{found['passes']:g}",
        str(found["access"]),
        ", ".join(sorted(found["needs"])),
        ", ".join(sorted(found["modalities"])),
    ]


def _described(entry: Entry) -> list[str]:
    lines = [f"### `{entry.name}`", "", f"    {entry.formula}", "", f"{_sentence(entry.source)}"]
    if entry.doc:
        lines += ["", re.sub(r"(?<!\n)\n(?!\n)", " ", entry.doc)]
    if entry.options:
        lines += ["", *(_option(o) for o in entry.options)]
    return [*lines, ""]


def _option(option: Mapping[str, Any]) -> str:
    choices = f" ({', '.join(map(str, option['choices']))})" if option["choices"] else ""
    source = f" [{option['source']}]" if option["source"] else ""
    given = value(option["default"])
    default = f" = `{given}`" if given else ", empty"
    return f"- `{option['name']}`{default}: {option['meaning']}{choices}{source}"


def _sentence(text: str) -> str:
    return f"{text.rstrip('.')}."


def main(pages: Sequence[str]) -> None:
    """Write the generated part of each page anew."""
    for page in map(Path, pages):
        write_text(page, filled(page.read_text(encoding="utf-8"), generated()))


if __name__ == "__main__":
    main(sys.argv[1:])
