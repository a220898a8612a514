"""What stands in the report where there are pictures: forget samples with the models' answers, and CLEAR's table."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from expunge.report.catalogue import understand
from expunge.report.samples import clip
from expunge.report.schema import Summary
from expunge.report.tables import Column, Line, Table, cell_of, line_of, shared_evidence
from expunge.report.view import View

METHODS = 5  # columns of answers beside those of the original and of a retrained model
PNG = re.compile(r"data:image/png;base64,[A-Za-z0-9+/]+=*")
LARGEST = 1 << 16  # characters of one picture; the record may have been written by anybody
ANSWER = 160  # characters of one answer
CLEAR = (
    "clear_real",
    "clear_retain",
    "face_recognition.retain",
    "clear_forget",
    "clear_forget.gap",
    "clear_forget_quality.ks_distance",
    "clear_forget_quality.p_value",
    "clear_js_published",
    "face_recognition.forget",
    "rouge_with_image.forget",
    "rouge_with_image.gain.forget",
)


@dataclass(frozen=True)
class Answer:
    """``words``: each word of an answer, and whether it stands in the true one; ``right``: nothing differs."""

    words: Sequence[tuple[str, bool]]
    right: bool


@dataclass(frozen=True)
class Picture:
    """One forget sample: ``uri`` holds a small PNG; ``answers`` stand in the order of the grid's models."""

    uri: str
    alt: str
    sample: str
    prompt: str
    target: str
    answers: Sequence[Answer | None]


@dataclass(frozen=True)
class Grid:
    """``models``: heading and tag of each column; ``left_out``: methods that have none."""

    models: Sequence[tuple[str, str]]
    pictures: Sequence[Picture]
    left_out: int


def plain(word: str) -> str:
    """A word without punctuation and case, for comparing."""
    return re.sub(r"\W", "", word).casefold()


def compared(said: str, target: str) -> Answer:
    """The words of an answer beside the true one; a class is right or wrong as a whole.

    >>> compared("Ann lives here", "Ann is here.").words
    [('Ann', True), ('lives', False), ('here', True)]
    """
    right = [plain(w) for w in said.split()] == [plain(w) for w in target.split()]
    if re.fullmatch(r"class \d+", target):
        return Answer([(word, right) for word in said.split()], right)
    known = {plain(word) for word in target.split()} - {""}
    words = [(word, plain(word) in known) for word in clip(said, ANSWER).split()]
    return Answer(words, right)


def picture_grid(view: View) -> Grid | None:
    """Forget samples whose picture is in the record: what original, retrained model and the best methods say of them.

    Each column is the first seed of its model. None when the record has no pictures.
    """
    by_sample: dict[str, dict[str, dict[str, Any]]] = {}
    for row in view.samples.rows:
        uri = row.get("image")
        if row.get("role") == "forget" and isinstance(uri, str) and len(uri) <= LARGEST and PNG.fullmatch(uri):
            by_sample.setdefault(str(row["id"]), {})[str(row.get("model"))] = row
    answered = {model for rows in by_sample.values() for model in rows}

    def with_answers(entries: Sequence[Summary | None]) -> list[Summary]:
        return [e for e in entries if e is not None and view.rows(e) and view.rows(e)[0].model in answered]

    methods = with_answers(view.methods)
    entries = [*with_answers([view.original, view.reference]), *methods[:METHODS]]
    models = [view.rows(entry)[0].model for entry in entries]
    pictures = []
    for identity, rows in by_sample.items():
        first = next((rows[m] for m in models if m in rows), None)
        if first is not None:
            pictures.append(_picture(identity, first, [rows.get(m) for m in models]))
    if not pictures:
        return None
    heads = [
        ("retrained" if e.kind == "reference" else e.method, "" if e.kind == "method" else "anchor") for e in entries
    ]
    return Grid(heads, pictures, max(0, len(methods) - METHODS))


def _picture(identity: str, first: dict[str, Any], rows: Sequence[dict[str, Any] | None]) -> Picture:
    number = first.get("target")
    target = f"class {number}" if isinstance(number, int) else clip(number, ANSWER)
    answers = [None if row is None else compared(str(row.get("generated") or ""), target) for row in rows]
    subject = clip(first.get("subject"), ANSWER)
    return Picture(
        str(first["image"]),
        f"Picture of {subject}" if subject else "Picture of a forget sample",
        clip(identity, ANSWER),
        clip(first.get("prompt"), ANSWER),
        target,
        answers,
    )


def clear_table(view: View) -> Table | None:
    """CLEAR's scores: retrained model first, then original, base, and the methods; None where none was measured."""
    entries: list[Summary] = [e for e in view.main if any(name in e.metrics for name in CLEAR)]
    if not any("clear_forget" in e.metrics for e in entries):
        return None
    lines: list[Line] = [line_of(view, entry) for entry in entries]
    columns = []
    for name in CLEAR:
        metric = understand(name)
        cells = [cell_of(view, entry, metric) for entry in entries]
        if any(cell.measure is not None for cell in cells):
            columns.append(Column(name, metric.label, metric.group, metric.ideal, shared_evidence(cells)))
            for line, cell in zip(lines, cells, strict=True):
                line.cells.append(cell)
    return Table("CLEAR", columns, lines)
