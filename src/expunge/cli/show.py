"""``expunge show``."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from expunge.cli.catalogue import KINDS, NEEDS, SHOWN, Entry, catalogue
from expunge.cli.common import Json, emit, table
from expunge.errors import unknown


def command(
    name: Annotated[str, typer.Argument(help="A name, or kind/name where several kinds have it.")],
    json: Json = False,
) -> None:
    """Show one method, scope, attack, metric, dataset or model: properties, formula, options, paper.

    Examples:
      expunge show npo
      expunge show datasets/tofu --json
    """
    kind, _, rest = name.rpartition("/")
    if kind and kind not in KINDS:
        raise unknown("kind", kind, KINDS)
    known = {k: catalogue(k) for k in ([kind] if kind else KINDS)}
    found = [entries[rest] for entries in known.values() if rest in entries]
    if not found:
        raise unknown("name", rest, {entry for entries in known.values() for entry in entries})
    emit({"schema": "expunge.show/1", "items": found}, "\n".join(map(describe, found)), json)


def describe(entry: Entry) -> str:
    """One entry as text."""
    head = [("source", entry.source), ("formula", entry.formula)]
    rows = [(label, text) for label, text in head if text]
    properties = dict(entry.properties)
    if entry.kind == "attacks":
        properties["needs"] = [NEEDS[need] for need in properties["needs"]]
    rows += [(SHOWN[key], _words(value)) for key, value in properties.items()]
    text = f"{entry.name} ({entry.kind.removesuffix('s')}): {entry.summary}\n\n{table(rows, indent=2)}"
    if entry.doc:
        text += f"\n{entry.doc}\n"
    if entry.options:
        text += "\nOptions:\n" + table([_option(o) for o in entry.options], indent=2)
    return text


def _option(option: Any) -> tuple[str, str]:
    meaning = option["meaning"]
    if option["choices"]:
        meaning += f" ({', '.join(map(_words, option['choices']))})"
    if option["source"]:
        meaning += f" [{option['source']}]"
    return f"{option['name']} = {_words(option['default'])}", meaning


def _words(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, (set, frozenset, list, tuple)):
        return ", ".join(sorted(map(str, value))) or "nothing"
    return "none" if value is None else str(value)
