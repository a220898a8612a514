"""Figures of an audit: p-values against what chance gives, completeness, and position against how much was learnt."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy import stats as scipy_stats

from expunge.drawing import GRID, INK, MUTED, PAPER, SERIES, new_figure
from expunge.report.audit_schema import DrillRecord, Point
from expunge.report.audit_view import AuditReport
from expunge.report.charts import Chart
from expunge.report.samples import VERDICTS

AUDIT_CHARTS = frozenset({"audit-p-values", "audit-completeness", "audit-position"})
MAX_POINTS = 2000  # of a scatter; more would only make the page heavy
LOOK = {
    "under-unlearned": (SERIES[6], "^"),
    "adequate": (SERIES[2], "o"),
    "over-unlearned": (SERIES[4], "v"),
    "not-auditable": (MUTED, "x"),
}
_CLIP = (-2.0, 3.0)  # positions beyond are drawn at the edge; the caption says so


def bins_of(count: int) -> int:
    """Few samples, few bins: about five samples a bin, 5 to 20 bins."""
    return int(np.clip(count // 5, 5, 20))


def uniform_band(count: int, bins: int, level: float = 0.95) -> tuple[float, float]:
    """Where the count of one bin lies with probability ``level`` when the p-values are uniform (binomial)."""
    low, high = scipy_stats.binom.interval(level, count, 1 / bins)
    return float(low), float(high)


def _values(points: Sequence[Point], name: str) -> list[float]:
    found = [getattr(p, name) for p in points if p.verdict != "not-auditable"]
    return [v for v in found if v is not None and 0 <= v <= 1]


def p_values(record: DrillRecord) -> Chart | None:
    """Histograms of the p-values of both sides; after an exact retrain they are uniform."""
    sides = [("p_under", "that no more is left"), ("p_over", "that the model knows no less")]
    found = [(name, words, values) for name, words in sides if (values := _values(record.points, name))]
    if not found:
        return None
    figure, panels = new_figure(2.5, 1, len(found), sharey=True)
    for axes, (name, words, values) in zip(panels, found, strict=True):
        bins = bins_of(len(values))
        low, high = uniform_band(len(values), bins)
        axes.axhspan(low, high, color=GRID, alpha=0.7, linewidth=0)
        colour = LOOK["under-unlearned" if name == "p_under" else "over-unlearned"][0]
        axes.hist(values, bins=np.linspace(0, 1, bins + 1).tolist(), color=colour, alpha=0.75, rwidth=0.9)
        axes.axhline(len(values) / bins, color=INK, linewidth=1)
        axes.set_xlim(0, 1)
        axes.set_xlabel(f"p-value {words}")
        axes.set_title(f"n = {len(values)}", loc="left", pad=3)
    panels[0].set_ylabel("samples")
    caption = (
        "For a model that never saw the data the bars would follow the line, 95 % of them within the band. A heap at 0 "
        "on the left: samples of which more is left than in such models. A heap at 0 on the right: samples that it "
        "knows less than they do."
    )
    return Chart("audit-p-values", "P-values against chance", caption, figure)


def completeness(record: DrillRecord) -> Chart | None:
    """Histogram of completeness, stacked by verdict."""
    points = [p for p in record.points if p.completeness is not None]
    if not points:
        return None
    values = [p.completeness for p in points if p.completeness is not None]
    low, high = min(0.0, *values), max(1.0, *values)
    edges = np.linspace(low, high, bins_of(len(points)) + 1).tolist()
    figure, (axes,) = new_figure(2.5)
    kinds = [v for v in VERDICTS if any(p.verdict == v for p in points)]
    stacks = [[p.completeness for p in points if p.verdict == v and p.completeness is not None] for v in kinds]
    if others := [p.completeness for p in points if p.verdict not in VERDICTS and p.completeness is not None]:
        kinds, stacks = [*kinds, "not judged"], [*stacks, others]
    axes.hist(
        stacks,
        bins=edges,
        stacked=True,
        color=[LOOK.get(v, (MUTED, "x"))[0] for v in kinds],
        alpha=0.8,
        rwidth=0.9,
        label=kinds,
    )
    axes.set_xlabel("completeness (0 = as before, 1 = gone)")
    axes.set_ylabel("samples")
    figure.legend(loc="outside upper left", ncols=len(kinds), handlelength=1, columnspacing=1.2)
    caption = "How completely each forget sample is gone, coloured by its verdict."
    return Chart("audit-completeness", "Completeness, sample by sample", caption, figure)


def position(record: DrillRecord) -> Chart | None:
    """Where each sample stands between original and reference, against how far these two are apart."""
    points = [p for p in record.points if p.position is not None and p.gap is not None]
    if not points:
        return None
    step = -(-len(points) // MAX_POINTS)
    figure, (axes,) = new_figure(3.2)
    axes.axhspan(-0.5, 0.5, color=GRID, alpha=0.5, linewidth=0)
    axes.axhline(0, color=INK, linewidth=1)
    axes.axhline(1, color=MUTED, linewidth=0.9, linestyle=(0, (4, 2)))
    drawn = points[::step]
    for verdict in (*VERDICTS, None):
        own = [p for p in drawn if p.verdict == verdict or (verdict is None and p.verdict not in VERDICTS)]
        if not own:
            continue
        colour, marker = LOOK.get(verdict or "", (MUTED, "+"))
        axes.plot(
            [p.gap or 0.0 for p in own],
            np.clip([p.position or 0.0 for p in own], *_CLIP),
            marker,
            color=colour,
            markersize=5,
            markeredgecolor=colour if marker in "x+" else PAPER,
            markeredgewidth=1.2 if marker in "x+" else 0.6,
            label=verdict or "not judged",
        )
    axes.set_xlabel("loss where never seen − loss of the original, nats per token")
    axes.set_ylabel("position (0 = never saw it, 1 = original)")
    figure.legend(loc="outside upper left", ncols=4, handletextpad=0.2, columnspacing=1.2)
    caption = (
        "Each mark is a forget sample. Far left the original hardly knew more than a model that never saw the sample, "
        "so little can be said. Grey band: nearer to models that never saw it than half way. Marks beyond −2 and 3 "
        "stand at the edge."
    )
    if step > 1:
        caption += f" {len(drawn)} of {len(points)} samples are drawn."
    return Chart("audit-position", "What is left, against what was learnt", caption, figure)


def audit_charts(report: AuditReport) -> list[Chart]:
    """Every figure for which the audit has numbers, in reading order."""
    made = (make(report.drill) for make in (p_values, completeness, position))
    return [chart for chart in made if chart is not None]
