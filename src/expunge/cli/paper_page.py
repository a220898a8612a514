"""The generated part of docs/papers.md: ``python -m expunge.cli.paper_page docs/papers.md`` writes it anew.

Per method and scope: the paper, what it defines, the file, and each default with where it comes from.
"""

from __future__ import annotations

import dataclasses
import inspect
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import expunge
from expunge.attacks.registry import Attack, all_attacks
from expunge.cli.catalogue import catalogue
from expunge.cli.method_page import escaped, filled, row, value
from expunge.files import write_text
from expunge.methods.registry import Method, all_methods
from expunge.methods.scope import Selector, all_selectors
from expunge.training.loop import TrainOptions

Entry = TypeVar("Entry", Method, Selector, Attack)
ROOT = Path(inspect.getfile(expunge)).parent
COMMON = {f.name: f.default for f in dataclasses.fields(TrainOptions)}


def generated() -> str:
    """Methods, then scopes, then attacks."""
    lines = ["## Methods", ""]
    for name, found in own(all_methods()):
        lines += [f"### {name}", "", row(("paper", "defines", "file")), row(["---"] * 3)]
        lines += [row((escaped(found.paper), escaped(found.formula) or "–", f"`{file_of(found.run)}`")), ""]
        lines += options_table(found.options)
    lines += ["## Scopes", "", row(("scope", "paper", "file")), row(["---"] * 3)]
    selectors = own(all_selectors())
    lines += [row((f"`{n}`", escaped(s.paper) or "–", f"`{file_of(s.run)}`")) for n, s in selectors]
    lines += ["", "## Attacks", "", row(("attack", "paper", "file")), row(["---"] * 3)]
    sources = catalogue("attacks")
    for name, attack in own(all_attacks()):
        lines.append(row((f"`{name}`", escaped(sources[name].source) or "–", f"`{file_of(attack.run)}`")))
    return "\n".join(lines)


def own(entries: Mapping[str, Entry]) -> list[tuple[str, Entry]]:
    """Those of this package, without what is installed or loaded beside it."""
    return [(n, e) for n, e in entries.items() if getattr(e.run, "func", e.run).__module__.startswith("expunge.")]


def options_table(options: type[Any]) -> list[str]:
    """Options that are the method's own, or whose default is; what all trainings share stands on top of the page."""
    rows = [row((f"`{n}`", value(default), escaped(source) or "–")) for n, default, source in own_options(options)]
    return [row(("option", "default", "where it comes from")), row(["---"] * 3), *rows, ""] if rows else []


def own_options(options: type[Any]) -> Iterator[tuple[str, Any, str]]:
    for f in dataclasses.fields(options):
        metadata: Mapping[str, Any] = f.metadata
        if f.name not in COMMON or f.default != COMMON[f.name]:
            yield f.name, f.default, str(metadata.get("source", ""))


def file_of(run: Any) -> str:
    """The file that defines a function, from the package's folder."""
    place = Path(inspect.getfile(inspect.unwrap(getattr(run, "func", run))))
    return place.relative_to(ROOT.parent).as_posix() if place.is_relative_to(ROOT.parent) else place.name


if __name__ == "__main__":
    for page in sys.argv[1:]:
        write_text(Path(page), filled(Path(page).read_text(encoding="utf-8"), generated()))
