"""The generated part of docs/methods.md: ``python -m expunge.cli.method_page docs/methods.md`` writes it anew."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from expunge.cli.catalogue import Entry, catalogue
from expunge.errors import UserError
from expunge.files import write_text

BEGIN, END = "<!-- generated: begin -->", "<!-- generated: end -->"
COLUMNS = (
    *("method", "what it does", "objective", "works on", "needs", "uses if given"),
    *("changes", "helpers hold the data", "in sequence"),
)
SHORT = {"text": "text", "classifier": "images", "multimodal": "both"}


def generated() -> str:
    """A table of all methods with their declared properties, then each one's source and defaults."""
    entries = catalogue("methods").values()
    lines = [row(COLUMNS), row(["---"] * len(COLUMNS)), *(row(_cells(e)) for e in entries), ""]
    lines += ["Sources and defaults (`expunge show NAME` says what each option means):", ""]
    lines += [f"- **`{e.name}`**: {escaped(e.source)}. {_defaults(e)}" for e in entries]
    flagship = catalogue("methods")["cluster"]
    lines += ["", "Options of `cluster`:", "", row(["option", "default", "meaning"]), row(["---"] * 3)]
    lines += [row([f"`{o['name']}`", value(o["default"]), escaped(_meaning(o))]) for o in flagship.options]
    return "\n".join(lines)


def filled(page: str, text: str | None = None) -> str:
    """``page`` with its generated part written anew: ``text``, or the methods.

    Raises:
        UserError: the page has no place for it.
    """
    if page.count(BEGIN) != 1 or page.count(END) != 1 or page.index(BEGIN) > page.index(END):
        raise UserError(f"the page has no place for the table: put a line '{BEGIN}' and, after it, '{END}' there.")
    return f"{page[: page.index(BEGIN)]}{BEGIN}\n{generated() if text is None else text}\n{page[page.index(END) :]}"


def _cells(entry: Entry) -> list[str]:
    found = entry.properties
    return [
        f"`{entry.name}`",
        escaped(entry.summary),
        escaped(entry.formula) or "",
        "all" if len(found["modalities"]) == len(SHORT) else ", ".join(SHORT[m] for m in sorted(found["modalities"])),
        ", ".join(sorted(found["needs"])),
        ", ".join(sorted(found["wants"])),
        str(found["changes"]),
        "yes" if found["helpers_hold_data"] else "no",
        str(found["sequential"]),
    ]


def _defaults(entry: Entry) -> str:
    own = [o for o in entry.options if o["name"] in ("epochs", "learning_rate", "retain", "gamma", "alpha", "beta")]
    if not own:
        return "No options." if not entry.options else "`expunge show` has its options."
    return "Defaults: " + ", ".join(f"`{o['name']}` {value(o['default'])}" for o in own) + "."


def _meaning(option: object) -> str:
    assert hasattr(option, "__getitem__")
    choices = ", ".join(map(str, option["choices"]))
    return str(option["meaning"]) + (f" ({choices})" if choices else "")


def value(value: object) -> str:
    return "none" if value is None else str(value).lower() if isinstance(value, bool) else f"{value}"


def escaped(text: str) -> str:
    return text.replace("|", "\\|").rstrip(".")


def row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    for name in sys.argv[1:]:
        write_text(Path(name), filled(Path(name).read_text(encoding="utf-8")))
