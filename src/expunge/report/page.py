"""report.html: one file that opens from disk, asks nobody for anything, and treats every text as untrusted.

A content security policy forbids every request and every script but the page's own (by its digest), so that even a
text that escaped the escaping could not run.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape

from expunge.report.charts import Chart
from expunge.report.checks import warnings
from expunge.report.drawing import to_inline
from expunge.report.samples import pack
from expunge.report.schema import ANCHORS
from expunge.report.tables import Cell, Table, board, definitions, ran, study_table, verdict_table
from expunge.report.view import View
from expunge.report.wording import evidence, headline, hundredths, interval, number, paragraph, percent, signed

HERE = Path(__file__).parent
FIRST_ROWS = 25  # rows of the sample table that stand in the page itself, for readers without JavaScript
SHOWN_NUMBERS = 5  # number columns of the sample table; the others appear when a row is opened


def json_island(content: Any) -> Markup:
    """JSON for a ``<script type="application/json">``: no character in it can end the element.

    >>> str(json_island({"a": "</script>"}))
    '{"a":"\\\\u003c/script\\\\u003e"}'
    """
    text = json.dumps(content, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return Markup(text)


def _show(cell: Cell) -> str:
    assert cell.measure is not None and cell.measure.value is not None
    return f"{hundredths(cell.measure.value)} %" if cell.share else number(cell.measure.value)


def _ends(cell: Cell) -> str:
    measure = cell.measure
    if measure is None or measure.low is None or measure.high is None:
        return ""
    return f"[{hundredths(measure.low)}, {hundredths(measure.high)}]" if cell.share else interval(measure)


def _sort_key(cell: Cell) -> str:
    """Two-sided columns sort by the size of the difference to the retrained model."""
    assert cell.measure is not None and cell.measure.value is not None
    return repr(abs(cell.delta) if cell.delta is not None else cell.measure.value)


def _first_of_group(table: Table) -> Table:
    previous = None
    for column in table.columns:
        column.first = column.group != previous
        previous = column.group
    return table


def _first_rows(packed: dict[str, Any]) -> list[dict[str, Any]]:
    rows = []
    for text, model, verdict, generated, *numbers in packed["rows"][:FIRST_ROWS]:
        identity, subject, role, prompt, target = packed["texts"][text]
        texts = [("Prompt", prompt), ("Target", target), ("Generated", generated)]
        rows.append(
            {
                "id": identity,
                "subject": subject,
                "role": role,
                "method": packed["models"][model][1],
                "seed": packed["models"][model][2],
                "verdict": verdict,
                "texts": [(word, value) for word, value in texts if value],
                "numbers": ["–" if value is None else f"{value:.3g}" for value in numbers],
            }
        )
    return rows


def to_html(view: View, charts: Sequence[tuple[Chart, str]]) -> str:
    """The page; ``charts`` are figures with their SVG text."""
    script = (HERE / "report.js").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    packed = pack(view.samples.rows, [entry.method for entry in (*view.ranked, *view.main)])
    tables = {study: study_table(view, study) for study in ("sequential", "size")}
    lines = {line.name: line for line in board(view).lines}
    names, verdict_lines = verdict_table(view)
    context: dict[str, Any] = {
        "title": view.results.title or "Results",
        "headline": headline(view),
        "warnings": warnings(view),
        "paragraphs": [
            (lines[entry.method], text := paragraph(view, entry), [note for note in entry.notes if note not in text])
            for entry in view.ranked
        ],
        "ran": ran(view),
        "board": _first_of_group(board(view)),
        "full": _first_of_group(board(view, full=True)),
        "anchors": ANCHORS,
        "has_reference": view.reference is not None,
        "verdict_names": names,
        "verdict_lines": verdict_lines,
        "charts": [
            (chart, Markup(to_inline(svg, chart.name, str(escape(f"{chart.title}. {chart.caption}")))))
            for chart, svg in charts
        ],
        "studies": [(study, _first_of_group(table)) for study, table in tables.items() if table],
        "packed": packed,
        "packed_json": json_island(packed),
        "first_rows": _first_rows(packed),
        "shown_numbers": SHOWN_NUMBERS,
        "definitions": definitions(view),
        "css": Markup((HERE / "report.css").read_text(encoding="utf-8")),
        "script": Markup(script),
        "script_hash": f"sha256-{digest}",
        "evidence": evidence,
        "percent": percent,
        "signed": signed,
        "show": _show,
        "ends": _ends,
        "sort_key": _sort_key,
    }
    sections = [
        ("warnings", "Warnings", context["warnings"]),
        ("verdicts", "Method by method", context["paragraphs"]),
        ("ran", "What was run", True),
        ("board", "Leaderboard", True),
        ("counts", "Verdicts", verdict_lines),
        ("figures", "Figures", charts),
        *((study, table.title, True) for study, table in context["studies"]),
        ("samples", "Samples", packed["rows"]),
        ("definitions", "Definitions", context["definitions"]),
    ]
    context["sections"] = [(name, text) for name, text, there in sections if there]
    environment = Environment(loader=FileSystemLoader(HERE), autoescape=True, undefined=StrictUndefined)
    return environment.get_template("report.html").render(context)
