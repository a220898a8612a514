"""Write the report of a run folder: results.md, report.html, figures; from its two records alone."""

from __future__ import annotations

import io
import os
import secrets
from pathlib import Path

from expunge.files import SCRATCH, write_text
from expunge.report.drawing import style, to_svg
from expunge.report.markdown import to_markdown
from expunge.report.page import to_html
from expunge.report.samples import load_samples
from expunge.report.schema import load_results
from expunge.report.studies import CHART_NAMES, all_charts
from expunge.report.view import View


def write_report(folder: Path, png: bool = False) -> Path:
    """Read ``results.json`` and ``samples.jsonl`` of ``folder`` and write the report beside them.

    Writes ``results.md``, ``report.html``, ``figures/*.svg`` and, with ``png``, ``figures/*.png``; figures of an
    earlier report that this one no longer has are removed. Returns the path of ``report.html``.

    Raises:
        UserError: ``results.json`` is missing, damaged, or of another schema version.
    """
    folder = Path(folder)
    view = View(load_results(folder), load_samples(folder))
    figures = folder / "figures"
    drawn = []
    with style():
        for chart in all_charts(view):
            svg = to_svg(chart.figure, chart.name)
            drawn.append((chart, svg))
            write_text(figures / f"{chart.name}.svg", _clean(svg))
            if png:
                stream = io.BytesIO()
                chart.figure.savefig(stream, format="png", dpi=160, metadata={"Software": None})
                _write_bytes(figures / f"{chart.name}.png", stream.getvalue())
    kept = {chart.name for chart, _ in drawn}
    for name in CHART_NAMES - kept:
        for ending in ("svg", "png"):
            (figures / f"{name}.{ending}").unlink(missing_ok=True)
    write_text(folder / "results.md", _clean(to_markdown(view)))
    return write_text(folder / "report.html", _clean(to_html(view, drawn)))


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
