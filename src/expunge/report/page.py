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

from expunge.drawing import to_inline
from expunge.report.audit_page import audit_context
from expunge.report.audit_view import AuditReport
from expunge.report.certificates import Shown
from expunge.report.charts import Chart
from expunge.report.checks import warnings
from expunge.report.leaderboard import rank_table
from expunge.report.pictures import clear_table, picture_grid
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


def _inline(charts: Sequence[tuple[Chart, str]]) -> list[tuple[Chart, Markup]]:
    return [
        (chart, Markup(to_inline(svg, chart.name, str(escape(f"{chart.title}. {chart.caption}")))))
        for chart, svg in charts
    ]


def _read(*names: str) -> str:
    return "".join((HERE / name).read_text(encoding="utf-8") for name in names)


def to_html(
    view: View,
    charts: Sequence[tuple[Chart, str]],
    records: Sequence[str] = ("results.json", "samples.jsonl"),
    report: AuditReport | None = None,
    audit_charts: Sequence[tuple[Chart, str]] = (),
    certificates: Sequence[Shown] = (),
) -> str:
    """The page; charts are figures with their SVG text, ``records`` the files that it was made from.

    The audit, where there is one, stands first; the study's parts appear when its results were read.
    """
    script = _read("page.js", "report.js", "audit.js")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    measured = "results.json" in records
    packed = pack(view.samples.rows, [entry.method for entry in (*view.ranked, *view.main)])
    tables = {study: study_table(view, study) for study in ("matched", "sequential", "size")}
    lines = {line.name: line for line in board(view).lines}
    names, verdict_lines = verdict_table(view)
    asked, pictures = clear_table(view), picture_grid(view)
    audited: dict[str, Any] = {"audit": None}
    if report is not None:
        audited = audit_context(report, _inline(audit_charts))
        audited |= {"audit_warnings": report.warnings(), "drill_json": json_island(audited.pop("drill_packed"))}
    context: dict[str, Any] = {
        **audited,
        "certificates": certificates,
        "title": view.results.title or ("Results" if report is None else f"Audit of {report.subject}"),
        "headline": headline(view) if report is None else report.headline(),
        "has_results": measured,
        "sources": records,
        "warnings": warnings(view) if measured else [],
        "paragraphs": [
            (lines[entry.method], text := paragraph(view, entry), [note for note in entry.notes if note not in text])
            for entry in view.ranked
        ],
        "ran": ran(view),
        "board": _first_of_group(board(view)),
        "full": _first_of_group(board(view, full=True)),
        "ranks": rank_table(view.results),
        "clear": _first_of_group(asked) if asked else None,
        "pictures": pictures,
        "anchors": ANCHORS,
        "has_reference": view.reference is not None,
        "verdict_names": names,
        "verdict_lines": verdict_lines,
        "charts": _inline(charts),
        "studies": [(study, _first_of_group(table)) for study, table in tables.items() if table],
        "packed": packed,
        "packed_json": json_island(packed),
        "first_rows": _first_rows(packed),
        "shown_numbers": SHOWN_NUMBERS,
        "definitions": definitions(view),
        "css": Markup(_read("report.css", *(["audit.css"] if report is not None or certificates else []))),
        "script": Markup(script),
        "script_hash": f"sha256-{digest}",
        "evidence": evidence,
        "interval": interval,
        "number": number,
        "percent": percent,
        "signed": signed,
        "show": _show,
        "ends": _ends,
        "sort_key": _sort_key,
    }
    sections: list[tuple[str, str, Any]] = [] if report is not None else [("certificate", "Certificate", certificates)]
    if report is not None:
        subjects = report.counts or report.audit.subjects or audit_charts
        attacked = report.groups or report.audit.skipped or report.audit.failed
        sections = [
            ("limits", "Limits", context["audit_warnings"]),
            ("audit", "Verdict", True),
            ("certificate", "Certificate", True),
            ("completeness", "Completeness", subjects),
            ("attacks", "Attacks", attacked),
            ("drill", "Forget samples", context["plain_rows"]),
        ]
    sections += [
        ("warnings", "Warnings", context["warnings"]),
        ("verdicts", "Method by method", context["paragraphs"]),
        ("ran", "What was run", measured),
        ("board", "Leaderboard", measured),
        ("clear", "CLEAR", asked),
        ("pictures", "Pictures", pictures),
        ("counts", "Verdicts", verdict_lines),
        ("figures", "Figures", charts),
        *((study, table.title, True) for study, table in context["studies"]),
        ("samples", "Samples", packed["rows"]),
        ("definitions", "Definitions", context["definitions"]),
    ]
    context["sections"] = [(name, text) for name, text, there in sections if there]
    environment = Environment(loader=FileSystemLoader(HERE), autoescape=True, undefined=StrictUndefined)
    return environment.get_template("report.html").render(context)
