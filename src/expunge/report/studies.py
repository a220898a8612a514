"""Figures of the other studies: sequences of requests, deletion sizes, training curves."""

from __future__ import annotations

from collections.abc import Sequence

from expunge.drawing import SERIES, label_ends, log_axis, new_figure, short
from expunge.report.catalogue import REQUEST, understand
from expunge.report.charts import MAIN_CHARTS, Chart, style_of
from expunge.report.schema import Measure, Summary
from expunge.report.view import View

MAX_CURVES = 12  # lines in one panel; more cannot be read
_STEMS = ("prob", "tv", "loss", "rouge", "accuracy")


def request_stem(view: View) -> str | None:
    """The metric that was measured per request in the sequential study, e.g. ``prob`` of ``prob.request_3``."""
    stems = {m["stem"] for e in view.study("sequential") for name in e.metrics if (m := REQUEST.match(name))}
    return next((stem for stem in (*_STEMS, *sorted(stems)) if stem in stems), None)


def by_method(entries: Sequence[Summary]) -> dict[str, list[Summary]]:
    """Entries with a position, per method, in order of position; methods in order of first appearance."""
    out: dict[str, list[Summary]] = {}
    for entry in entries:
        if entry.position is not None:
            out.setdefault(entry.method, []).append(entry)
    return {method: sorted(found, key=lambda e: e.position or 0) for method, found in out.items()}


def persistence(view: View) -> Chart | None:
    """What each request's samples look like after each later request: one matrix per method."""
    stem = request_stem(view)
    if stem is None:
        return None
    methods = by_method([e for e in view.study("sequential") if any(REQUEST.match(n) for n in e.metrics)])
    cells: dict[str, dict[tuple[int, int], float]] = {}
    for method, entries in methods.items():
        for entry in entries:
            for name, measure in entry.metrics.items():
                match = REQUEST.match(name)
                if match and match["stem"] == stem and measure.value is not None and entry.position is not None:
                    cells.setdefault(method, {})[int(match["number"]), entry.position] = measure.value
    if not cells:
        return None
    requests = sorted({i for found in cells.values() for i, _ in found})
    steps = sorted({k for found in cells.values() for _, k in found})
    columns = 2 if len(cells) > 1 else 1
    rows = (len(cells) + columns - 1) // columns
    figure, panels = new_figure(0.4 + rows * (0.5 + 0.26 * len(requests)), rows, columns, sharex=True, sharey=True)
    top = max(1e-12, *(abs(v) for found in cells.values() for v in found.values()))
    written = len(steps) <= (8 if columns == 2 else 16)
    from matplotlib.patches import Rectangle

    for axes, (method, found) in zip(panels, cells.items(), strict=False):
        for (i, k), value in found.items():
            x, y = steps.index(k), requests.index(i)
            # transparency instead of a colour map: the page's background shows through in light and dark
            shade = 0.04 + 0.5 * abs(value) / top
            axes.add_patch(Rectangle((x - 0.5, y - 0.5), 1, 1, facecolor=SERIES[0], alpha=shade, linewidth=0))
            if written:
                text = f"{value:.2f}".replace("0.", ".", 1) if top <= 1 else f"{value:.2g}"
                axes.text(x, y, text, ha="center", va="center", fontsize=8, fontweight="bold" if i == k else "normal")
        axes.set_xlim(-0.5, len(steps) - 0.5)
        axes.set_ylim(len(requests) - 0.5, -0.5)
        axes.set_xticks(range(len(steps)), [str(k) for k in steps])
        axes.set_yticks(range(len(requests)), [str(i) for i in requests])
        axes.grid(visible=False)
        axes.tick_params(length=0)
        axes.set_title(short(method), loc="left", pad=3)
    for axes in panels[len(cells) :]:
        axes.set_visible(False)
    for axes in panels[max(0, len(cells) - columns) : len(cells)]:
        axes.tick_params(labelbottom=True)
    figure.supxlabel("after request k", fontsize=9)
    figure.supylabel("samples of request i", fontsize=9)
    caption = (
        f"{understand(stem).label.capitalize()} of the samples of request i after request k; bold: just unlearned. "
        "Right of the bold diagonal a row should stay as it is: a rise means that what was erased comes back. Left of "
        "it nothing was asked yet: a fall is collateral damage."
    )
    return Chart("sequential-matrix", "Do earlier requests stay erased?", caption, figure)


def _lines(view: View, entries: Sequence[Summary], names: Sequence[str], xlabel: str, log: bool) -> Chart | None:
    methods = by_method(entries)
    names = [n for n in names if sum(_value(e, n) is not None for found in methods.values() for e in found) > 1][:3]
    if not names:
        return None
    figure, panels = new_figure(0.35 + 1.95 * len(names), len(names), 1, sharex=True)
    for axes, name in zip(panels, names, strict=True):
        ends = []
        for found in methods.values():
            points = [(e.position or 0, e.metrics[name]) for e in found if _value(e, name) is not None]
            if not points:
                continue
            look = style_of(view, found[0].method, found[0].kind)
            xs, ys = [x for x, _ in points], [m.value or 0.0 for _, m in points]
            axes.plot(xs, ys, markersize=4, linewidth=1.5, **look)
            band = [(x, m.low, m.high) for x, m in points if m.low is not None and m.high is not None]
            if len(band) > 1:
                where, lows, highs = zip(*band, strict=True)
                axes.fill_between(where, lows, highs, color=look["color"], alpha=0.12, linewidth=0)
            label = "retrained" if found[0].kind == "reference" else short(found[0].method)
            ends.append((xs[-1], ys[-1], label, str(look["color"])))
        axes.set_ylabel(short(understand(name).label, 32))
        if log:
            log_axis(axes, "x")
        label_ends(axes, ends)
    positions = sorted({e.position for found in methods.values() for e in found if e.position is not None})
    if len(positions) <= 12:
        panels[-1].set_xticks(positions, [str(p) for p in positions])
        panels[-1].set_xticks([], minor=True)
    panels[-1].set_xlabel(xlabel)
    return Chart("", "", "", figure)


def _value(entry: Summary, name: str) -> float | None:
    measure: Measure | None = entry.metrics.get(name)
    return None if measure is None else measure.value


def _curve_names(view: View, entries: Sequence[Summary]) -> list[str]:
    """Forgetting first, then retention: what a reader wants to follow over a study."""
    here = {name for entry in entries for name in entry.metrics if REQUEST.match(name) is None}
    wanted = ["prob.forget", "tv.forget", view.retention or "", "model_utility", "perplexity.utility", "prob.retain"]
    picked = [name for name in dict.fromkeys(wanted) if name in here]
    return picked or sorted(here)


def sequential_curves(view: View) -> Chart | None:
    """Metrics after each request of the sequence."""
    entries = view.study("sequential")
    chart = _lines(view, entries, _curve_names(view, entries), "after request k", log=False)
    if chart is None:
        return None
    chart.name, chart.title = "sequential-curves", "Request after request"
    chart.caption = "Forgetting and utility along the sequence of requests. Bands: 95 % intervals."
    return chart


def deletion_size(view: View) -> Chart | None:
    """Metrics against the number of samples to forget."""
    entries = view.study("size")
    positions = [e.position for e in entries if e.position]
    log = bool(positions) and max(positions) >= 4 * min(positions)
    chart = _lines(view, entries, _curve_names(view, entries), "size of the forget set, samples", log)
    if chart is None:
        return None
    chart.name, chart.title = "deletion-size", "How much can be erased at once"
    chart.caption = "The same methods on forget sets of growing size. Bands: 95 % intervals. Black: retrained."
    return chart


def training_curves(view: View) -> Chart | None:
    """Loss on forget and retain while the method ran; one line per model, the first seed of each method labelled."""
    curves = [c for c in view.results.curves if any(s.forget_loss is not None for s in c.steps)]
    if not curves:
        return None
    rows = {row.model: row for row in view.results.rows}
    first: dict[str, str] = {}
    for curve in curves:
        method = rows[curve.model].method if curve.model in rows else curve.model.split("/")[0]
        first.setdefault(method, curve.model)
    order = [e.method for e in view.methods if e.method in first]
    shown = [*order, *(m for m in first if m not in order)][:MAX_CURVES]
    figure, panels = new_figure(4.2, 2, 1, sharex=True)
    for axes, field in zip(panels, ("forget_loss", "retain_loss"), strict=True):
        ends: list[tuple[float, float, str, str]] = []
        positive: list[float] = []
        for curve in curves:
            method = rows[curve.model].method if curve.model in rows else curve.model.split("/")[0]
            points = [(s.step, v) for s in curve.steps if (v := getattr(s, field)) is not None]
            if method not in shown or not points:
                continue
            look = style_of(view, method)
            xs, ys = zip(*points, strict=True)
            positive += [y for y in ys if y > 0]
            leads = first[method] == curve.model
            axes.plot(
                xs,
                ys,
                color=look["color"],
                linestyle=look["linestyle"],
                linewidth=1.5 if leads else 0.8,
                alpha=1 if leads else 0.45,
            )
            if leads:
                ends.append((xs[-1], ys[-1], short(method), str(look["color"])))
        if positive and max(positive) > 100 * min(positive):
            log_axis(axes, "y")
        axes.set_ylabel(f"{field.split('_')[0]} loss, nats")
        label_ends(axes, ends)
    panels[-1].set_xlabel("training step")
    caption = "Loss while unlearning; every seed is a line, the first one is labelled."
    if len(first) > len(shown):
        caption += f" {len(shown)} of {len(first)} methods are drawn."
    return Chart("training-curves", "Training curves", caption, figure)


STUDY_CHARTS = (persistence, sequential_curves, deletion_size, training_curves)

CHART_NAMES = frozenset(
    (
        *(
            "forgetting-retention",
            "modality-retention",
            "forget-distance",
            "cost-quality",
            "utility",
            "loss-distribution",
        ),
        *("sequential-matrix", "sequential-curves", "deletion-size", "training-curves"),
    )
)


def all_charts(view: View) -> list[Chart]:
    """Every figure for which the run has numbers, in reading order."""
    return [chart for make in (*MAIN_CHARTS, *STUDY_CHARTS) if (chart := make(view)) is not None]
