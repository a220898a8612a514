"""Write the report of a run folder: results.md, report.html, figures; from its records alone."""

from __future__ import annotations

import io
import os
import secrets
from pathlib import Path

from expunge.drawing import style, to_svg
from expunge.files import SCRATCH, write_text
from expunge.report.audit_charts import AUDIT_CHARTS, audit_charts
from expunge.report.audit_schema import AUDIT_FILE, DRILL_FILE, load_audit, load_drill
from expunge.report.audit_view import AuditReport
from expunge.report.certificates import certificates
from expunge.report.charts import Chart
from expunge.report.markdown import to_markdown
from expunge.report.page import to_html
from expunge.report.samples import load_samples
from expunge.report.schema import SCHEMA, load_results, parse_results
from expunge.report.studies import CHART_NAMES, all_charts
from expunge.report.view import View


def write_report(folder: Path, png: bool = False) -> Path:
    """Read the records of ``folder`` and write the report beside them.

    Records are ``results.json`` with ``samples.jsonl`` (a study), ``audit.json`` with ``drill.jsonl`` (an audit), or
    both. Writes ``results.md``, ``report.html``, ``figures/*.svg`` and, with ``png``, ``figures/*.png``; figures of an
    earlier report that this one no longer has are removed. Returns the path of ``report.html``.

    Raises:
        UserError: there is neither ``results.json`` nor ``audit.json``, or one is damaged or of another version.
    """
    folder = Path(folder)
    audit = load_audit(folder)
    report = None if audit is None else AuditReport(audit, load_drill(folder, audit))
    measured = report is None or (folder / "results.json").is_file()
    view = View(load_results(folder), load_samples(folder)) if measured else View(parse_results({"schema": SCHEMA}))
    figures = folder / "figures"
    with style():
        examined = [] if report is None else [_draw(chart, figures, png) for chart in audit_charts(report)]
        drawn = [_draw(chart, figures, png) for chart in all_charts(view)]
    kept = {chart.name for chart, _ in (*examined, *drawn)}
    for name in (CHART_NAMES | AUDIT_CHARTS) - kept:
        for ending in ("svg", "png"):
            (figures / f"{name}.{ending}").unlink(missing_ok=True)
    records = ["results.json", "samples.jsonl"] if measured else []
    records += [AUDIT_FILE, DRILL_FILE] if report is not None else []
    write_text(folder / "results.md", _clean(to_markdown(view, report)))
    return write_text(
        folder / "report.html", _clean(to_html(view, drawn, records, report, examined, certificates(folder)))
    )


def _draw(chart: Chart, folder: Path, png: bool) -> tuple[Chart, str]:
    """Write the figure; returns it with its SVG text."""
    svg = to_svg(chart.figure, chart.name)
    write_text(folder / f"{chart.name}.svg", _clean(svg))
    if png:
        stream = io.BytesIO()
        chart.figure.savefig(stream, format="png", dpi=160, metadata={"Software": None})
        _write_bytes(folder / f"{chart.name}.png", stream.getvalue())
    return chart, svg


def _clean(text: str) -> str:
    """Half a surrogate pair, which broken generations contain, has no UTF-8 form: it becomes a question mark."""
    return text.encode("utf-8", "replace").decode("utf-8")


def _write_bytes(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.parent / f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}{SCRATCH}"
    try:
        scratch.write_bytes(content)
        os.replace(scratch, path)
    finally:
        scratch.unlink(missing_ok=True)
