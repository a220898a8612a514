"""The certificates of a run and of the runs inside its folder, as the report shows them: what is said, and where."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from expunge.certify.issue import CERTIFICATE, PAGE
from expunge.certify.page import LEVELS, WORDS, lead, reason
from expunge.certify.vendored import Unreadable, load, read_envelope, read_statement

DEPTH = 2  # folders below the run in which certificates of its parts are looked for


@dataclass(frozen=True)
class Shown:
    """One certificate. ``problem``: why it cannot be read; then nothing else is known of it.

    ``claims``: (level, its name, word for the verdict, the verdict, the sentence).
    """

    path: Path
    file: str
    page: str | None = None
    method: str = ""
    kind: str = ""
    verdict: str = ""
    lead: str = ""
    claims: Sequence[tuple[str, str, str, str, str]] = ()
    problem: str = ""


def certificates(folder: Path) -> list[Shown]:
    """``certificate.json`` of a run folder, then those of runs inside of it. Signatures are not looked at here."""
    places = [folder / CERTIFICATE]
    for depth in range(1, DEPTH + 1):
        places += sorted(folder.glob("/".join(["*"] * depth + [CERTIFICATE])))
    return [_shown(path, folder) for path in places if path.is_file()]


def _shown(path: Path, folder: Path) -> Shown:
    def link(target: Path) -> str:
        return quote(target.relative_to(folder).as_posix())

    page = path.with_suffix(PAGE)
    href = link(page) if page.is_file() else None
    try:
        predicate: dict[str, Any] = read_statement(read_envelope(load(path)).payload)["predicate"]
    except Unreadable as error:
        return Shown(path, link(path), problem=str(error))
    claims = [
        (c["level"], LEVELS[c["level"]], WORDS[c["verdict"]], c["verdict"], c["claim"]) for c in predicate["claims"]
    ]
    made = predicate["method"]
    return Shown(
        path, link(path), href, made["name"] or "", made["kind"], predicate["verdict"],
        lead(predicate) or reason(predicate), claims,
    )  # fmt: skip
