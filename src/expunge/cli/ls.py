"""``expunge ls``."""

from __future__ import annotations

from typing import Annotated

import typer

from expunge.cli.catalogue import KINDS, SHOWN, catalogue
from expunge.cli.common import Json, emit, table
from expunge.errors import unknown

COLUMNS = {"attacks": ("family", "tier", "passes")}  # properties that stand beside the name


def command(
    kind: Annotated[str, typer.Argument(help=f"What to list: {', '.join(KINDS)}.")],
    json: Json = False,
) -> None:
    """List the methods, scopes, attacks, metrics, datasets or models that can be named.

    Those of installed extensions are listed with the others.

    Examples:
      expunge ls methods
      expunge ls attacks
      expunge ls datasets --json
    """
    if kind not in KINDS:
        raise unknown("kind", kind, KINDS)
    entries = catalogue(kind)
    shown = COLUMNS.get(kind, ())
    rows = [(e.name, *(str(e.properties[key]) for key in shown), e.summary) for e in entries.values()]
    header = ("name", *(SHOWN[key] for key in shown), "what it is") if shown else ()
    text = table(rows, header) + f"\n{len(entries)} {kind}; "
    emit(
        {"schema": "expunge.ls/1", "kind": kind, "items": list(entries.values())},
        text + "'expunge show NAME' tells more.",
        json,
    )
