"""The last look before signing: nothing of a sample may stand in a certificate in clear."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from expunge.errors import UserError

ALWAYS = ("id", "subject")
TEXTS = ("prompt", "target", "generated")
SHORTEST = 4  # characters; "7" or "yes" names nobody, and stands in any text
LONG = 20  # characters from which a text is no phrase that our own sentences have by chance
PROSE = ("predicate.claims", "predicate.assumptions", "predicate.not_claimed")  # sentences of ours, with figures


def refuse_personal(statement: Any, rows: Iterable[Mapping[str, Any]]) -> None:
    """Refuse a statement in which an id, subject or text of a sample stands as whole words.

    Keys count like values (a manifest has file names as keys). Compared case by case, so that the answer "Negative"
    is not found in "false negative". Texts of one plain word name nobody; short ones ("in the", as weak models answer)
    are not looked for in our own sentences, which take nothing from a sample.

    Raises:
        UserError: the place where it stands.
    """
    places = list(_texts(statement, ""))
    everything = "\n".join(text for _, text in places)
    data = [(where, text) for where, text in places if not where.startswith(PROSE)]
    seen: set[str] = set()
    for row in rows:
        for term, everywhere in _terms(row):
            if term in seen:
                continue
            seen.add(term)
            if term not in everything:
                continue
            whole = re.compile(rf"(?<!\w){re.escape(term)}(?!\w)")
            place = next((where for where, text in (places if everywhere else data) if whole.search(text)), None)
            if place is not None:
                raise UserError(
                    f"personal data would stand in the certificate, at {place}: rename the file or option "
                    "that it comes from; a certificate never holds an id, a name or a text of a sample."
                )


def _terms(row: Mapping[str, Any]) -> Iterator[tuple[str, bool]]:
    """What to look for, and whether in our own sentences too."""
    for key in ALWAYS:
        name = str(row.get(key, ""))
        if len(name) >= SHORTEST and any(c.isalpha() for c in name):
            yield name, True
    for key in TEXTS:
        text = row.get(key)
        if isinstance(text, str) and len(text) >= SHORTEST and not re.fullmatch(r"[a-z]+|[\d.,]+", text):
            yield text, len(text) >= LONG


def _texts(value: Any, where: str) -> Iterator[tuple[str, str]]:
    if isinstance(value, str):
        yield where or "the top", value
    elif isinstance(value, Mapping):
        for number, (key, item) in enumerate(value.items()):
            yield f"{where or 'the top'}, name {number + 1}", str(key)
            step = key if re.fullmatch(r"[a-z_]+", str(key)) else f"({number + 1})"  # a file name may be personal too
            yield from _texts(item, f"{where}.{step}".lstrip("."))
    elif isinstance(value, (list, tuple)):
        for number, item in enumerate(value):
            yield from _texts(item, f"{where}[{number}]")
