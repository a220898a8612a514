"""What the audit part of the page needs: charts, the worst samples packed and plain, and words for numbers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from markupsafe import Markup

from expunge.report.audit_pack import pack_drill
from expunge.report.audit_schema import Drill
from expunge.report.audit_view import AuditReport, p_value, seconds
from expunge.report.charts import Chart
from expunge.report.samples import VERDICTS, clip

PLAIN_ROWS = 50  # worst samples that stand in the page itself, for readers without JavaScript and for print
LOSS_COLUMNS = 3


def audit_context(report: AuditReport, charts: Sequence[tuple[Chart, Markup]]) -> dict[str, Any]:
    """Names that the template ``audit.html`` uses, beside those of the page."""
    drill = report.drill
    kinds = {checkpoint.name: checkpoint.kind for checkpoint in report.audit.checkpoints}
    models = [(name, kind) for name, kind in kinds.items() if kind != "shadow"]
    losses = [name for name, _ in models if any(name in d.losses for d in drill.worst)][:LOSS_COLUMNS]
    figures = report.audit.figures.values()
    there = {name for by_model in figures for name in by_model}
    order = [VERDICTS[0], VERDICTS[2], VERDICTS[1], VERDICTS[3]]

    def concern(verdict: str | None) -> int:
        return order.index(verdict) if verdict in order else len(order)

    packed = pack_drill(drill.worst, list(kinds.items()), drill.total)
    return {
        "audit": report,
        "audit_charts": charts,
        "subjects": sorted(report.audit.subjects, key=lambda row: (concern(row.verdict), _or_one(row.p_under))),
        "figure_models": [*(n for n in kinds if n in there), *sorted(there - set(kinds))],
        "drill_packed": packed,
        "plain_rows": [_plain(d, losses, models) for d in drill.worst[:PLAIN_ROWS]],
        "loss_models": losses,
        "reference_rates": any(r is not None for _, cells in report.rates for *_, r in cells),
        "p_value": p_value,
        "seconds": seconds,
        "rate_text": rate_text,
    }


def _or_one(value: float | None) -> float:
    return 1.0 if value is None else value


def rate_text(rate: str) -> str:
    """A false-positive rate as percent, e.g. ``0.1 %``."""
    try:
        return f"{100 * float(rate):g} %"
    except ValueError:
        return rate


def _plain(drill: Drill, losses: Sequence[str], models: Sequence[tuple[str, str]]) -> dict[str, Any]:
    texts = [("Prompt", drill.prompt), ("Target", drill.target)]
    texts += [(f"Answer, {name}", drill.answers.get(name)) for name, _ in models]
    return {
        "id": clip(drill.id),
        "subject": clip(drill.subject),
        "verdict": drill.verdict,
        "completeness": drill.completeness,
        "position": drill.position,
        "p_under": drill.p_under,
        "losses": [drill.losses.get(name) for name in losses],
        "texts": [(word, clip(text)) for word, text in texts if text],
    }
