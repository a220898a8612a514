"""The figures of the main study: each takes the view and gives a chart, or None when its numbers are not there."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np

from expunge.drawing import GRID, INK, MUTED, PAPER, label_points, log_axis, look, new_figure, short
from expunge.report.catalogue import understand
from expunge.report.schema import CONTROLS, Measure, Summary
from expunge.report.view import View, distance
from expunge.report.wording import number

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

RETRAINING_BUDGET = 0.25  # a method that costs more than this share is hard to justify against retraining
MAX_DISTRIBUTIONS = 8
MAX_DOT_METRICS = 5


@dataclass
class Chart:
    """A figure with the words around it. ``caption`` says how to read it and what the marks are."""

    name: str
    title: str
    caption: str
    figure: Figure


def colour_of(view: View, entry: Summary) -> str:
    """A method's colour in every figure; grey for controls, ink for anchors."""
    return str(style_of(view, entry.method, entry.kind)["color"])


def style_of(view: View, method: str, kind: str = "method") -> dict[str, Any]:
    if kind in CONTROLS:
        return {"color": MUTED, "marker": "x", "linestyle": (0, (1, 1.5))}
    if kind == "reference":
        return {"color": INK, "marker": "*", "linestyle": "-"}
    if kind != "method":
        return {"color": MUTED, "marker": "+", "linestyle": (0, (4, 2))}
    names = [entry.method for entry in view.methods]
    return look(names.index(method) if method in names else len(names))


def bar(measure: Measure) -> tuple[float, float] | None:
    """Lengths of the error bar below and above the value."""
    if measure.value is None or measure.low is None or measure.high is None:
        return None
    return max(0.0, measure.value - measure.low), max(0.0, measure.high - measure.value)


def _mark(axes: Axes, x: Measure, y: Measure, look: dict[str, Any]) -> None:
    assert x.value is not None and y.value is not None
    line: dict[str, Any] = {"colors": look["color"], "linewidth": 0.9, "alpha": 0.55}
    if (ends := bar(x)) is not None:
        axes.hlines(y.value, x.value - ends[0], x.value + ends[1], **line)
    if (ends := bar(y)) is not None:
        axes.vlines(x.value, y.value - ends[0], y.value + ends[1], **line)
    thin = look["marker"] in ("x", "+")
    axes.plot(
        x.value,
        y.value,
        look["marker"],
        color=look["color"],
        markersize=11 if look["marker"] == "*" else 6,
        markeredgecolor=look["color"] if thin else PAPER,
        markeredgewidth=1.4 if thin else 0.7,
        zorder=5,
    )


def _label(
    axes: Axes,
    points: list[tuple[float, float]],
    texts: list[str],
    colours: list[str],
    marks: list[tuple[Measure, Measure]],
    lines: list[tuple[float, float, float, float]],
) -> None:
    """Names beside the points, clear of every interval bar and of the guide ``lines``."""
    bars = list(lines)
    for x, y in marks:
        assert x.value is not None and y.value is not None
        for ends, across in ((bar(x), True), (bar(y), False)):
            if ends and across:
                bars.append((x.value - ends[0], y.value, x.value + ends[1], y.value))
            elif ends:
                bars.append((x.value, y.value - ends[0], x.value, y.value + ends[1]))
    label_points(axes, points, texts, colours, bars)


def pareto(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Points that no other beats in both: small first coordinate, large second; in order of the first.

    >>> pareto([(0.1, 0.5), (0.3, 0.9), (0.4, 0.8)])
    [(0.1, 0.5), (0.3, 0.9)]
    """
    front: list[tuple[float, float]] = []
    for x, y in sorted(points, key=lambda p: (p[0], -p[1])):
        if not front or y > front[-1][1]:
            front.append((x, y))
    return front


def _front(axes: Axes, runs: list[tuple[float, float]], turn: float = 1.0) -> list[tuple[float, float, float, float]]:
    """Draw the Pareto front as steps and return its lines; with ``turn`` -1 small second coordinates are good ones."""
    front = pareto([(x, turn * y) for x, y in runs])
    guides = []
    for (x0, y0), (x1, y1) in pairwise(front):
        guides += [(x0, turn * y0, x1, turn * y0), (x1, min(turn * y0, turn * y1), x1, max(turn * y0, turn * y1))]
    if len(front) > 1:
        xs, ys = zip(*front, strict=True)
        axes.step(xs, [turn * y for y in ys], where="post", color=MUTED, linewidth=1, linestyle=(0, (4, 2)))
    return guides


def forgetting_retention(view: View) -> Chart | None:
    """Distance to retraining on forget against what was kept, with the retrained models and the Pareto front."""
    if view.primary is None or view.retention is None:
        return None
    keep = understand(view.retention)
    found = []
    for entry in view.study("main"):
        away, kept = view.distance(entry, view.primary), entry.metrics.get(view.retention)
        if away and kept and away.value is not None and kept.value is not None:
            found.append((entry, away, kept))
    if len(found) < 2:
        return None
    figure, (axes,) = new_figure(4.0)
    turn = -1.0 if keep.ideal == "low" else 1.0
    guides = _front(
        axes, [(d.value or 0.0, k.value or 0.0) for e, d, k in found if e.kind in ("method", *CONTROLS)], turn
    )
    anchor = view.reference
    if anchor is not None and (kept := anchor.metrics.get(view.retention)) and kept.low is not None:
        axes.axhspan(kept.low, kept.high or kept.low, color=GRID, alpha=0.55, linewidth=0)
    for entry, away, kept in found:
        _mark(axes, away, kept, style_of(view, entry.method, entry.kind))
    axes.set_xlabel(f"{understand(view.primary).label}: distance to the retrained model (0 = like retrained)")
    axes.set_ylabel(short(keep.label, 40))
    axes.set_xlim(left=min(0.0, axes.get_xlim()[0]))
    axes.margins(y=0.12)
    if turn < 0:
        axes.invert_yaxis()
    _label(
        axes,
        [(away.value or 0.0, kept.value or 0.0) for _, away, kept in found],
        ["retrained" if entry.kind == "reference" else short(entry.method) for entry, _, _ in found],
        [colour_of(view, entry) for entry, _, _ in found],
        [(away, kept) for _, away, kept in found],
        guides,
    )
    caption = (
        "Left is closer to retraining, up is better kept. Bars: 95 % intervals. Star and band: retrained models. "
        "Dashed: methods that no other one beats on both counts. Crosses are controls and anchors."
    )
    return Chart("forgetting-retention", "Forgetting against retention", caption, figure)


def modality_retention(view: View) -> Chart | None:
    """For questions with a picture and questions in words: distance to retraining against the change of what stays."""
    panels = []
    for asked, title in (("image", "asked with a picture"), ("text", "asked in words")):
        found = []
        for entry in view.study("main"):
            closed, kept = (entry.metrics.get(f"modality.{asked}.{what}") for what in ("closed", "retain"))
            away = distance(understand(f"modality.{asked}.closed"), closed, Measure(value=1.0))
            if away is not None and kept is not None and kept.value is not None and entry.kind != "original":
                found.append((entry, away, kept))
        panels.append((title, found))
    if len({entry.method for _, found in panels for entry, _, _ in found if entry.kind == "method"}) < 2:
        return None
    figure, drawn = new_figure(5.6, 2, 1, sharex=True)
    for axes, (title, found) in zip(drawn, panels, strict=True):
        axes.axhline(0, color=INK, linewidth=0.9)
        runs = [(a.value or 0.0, k.value or 0.0) for e, a, k in found if e.kind in ("method", *CONTROLS)]
        guides = _front(axes, runs)
        for entry, away, kept in found:
            _mark(axes, away, kept, style_of(view, entry.method, entry.kind))
        axes.plot(0, 0, "*", color=INK, markersize=11, zorder=6)
        axes.set_title(title, loc="left", pad=3)
        axes.set_ylabel("change of probability, retain")
        axes.margins(y=0.14)
    drawn[-1].set_xlabel("distance to the retrained model (0 = like retrained, 1 = as far as the original)")
    for axes, (_, found) in zip(drawn, panels, strict=True):
        axes.set_xlim(left=min(-0.03, axes.get_xlim()[0]))
        _label(
            axes,
            [(away.value or 0.0, kept.value or 0.0) for _, away, kept in found],
            [short(entry.method) for entry, _, _ in found],
            [colour_of(view, entry) for entry, _, _ in found],
            [(away, kept) for _, away, kept in found],
            guides,
        )
    caption = (
        "Forget and retain samples of each modality apart. Left is closer to retraining on what is asked in this "
        "modality, up is better kept; the star is where retraining stands, as far as it keeps what the original knew. "
        "Dashed: methods that no other one beats on both counts. Bars: 95 % intervals."
    )
    return Chart("modality-retention", "What is forgotten and kept, by modality", caption, figure)


def distance_dots(view: View) -> Chart | None:
    """Signed distance to the retrained model on each forget metric, in units of the original's distance."""
    if view.reference is None or view.original is None:
        return None
    names = []
    for metric in view.metrics:
        far = view.delta(view.original, metric.name)
        if metric.ideal == "reference" and metric.group in ("forgetting", "privacy") and far and abs(far) > 1e-6:
            names.append(metric.name)
    # a metric on which the original hardly differs from the reference has no scale
    names = [n for n in names if abs(view.delta(view.original, n) or 0) > _half(view.original.metrics[n])]
    names = names[:MAX_DOT_METRICS]
    entries = [e for e in view.ranked if any(view.delta(e, n) is not None for n in names)]
    if not names or not entries:
        return None
    figure, (axes,) = new_figure(1.0 + 0.17 * len(names) * len(entries) / 1.6 + 0.12 * len(entries))
    axes.axvline(0, color=INK, linewidth=1.1)
    axes.axvline(1, color=MUTED, linewidth=0.9, linestyle=(0, (4, 2)))
    step = 0.72 / max(1, len(names))
    for k, name in enumerate(names):
        far = view.delta(view.original, name)
        target = view.target(name)
        assert far is not None and target is not None and target.value is not None
        mark = look(k)
        drawn = False
        for i, entry in enumerate(entries):
            measure = entry.metrics.get(name)
            if measure is None or measure.value is None:
                continue
            y = i + (k - (len(names) - 1) / 2) * step
            if measure.low is not None and measure.high is not None:
                ends = [(end - target.value) / far for end in (measure.low, measure.high)]
                axes.hlines(y, min(ends), max(ends), colors=mark["color"], linewidth=1, alpha=0.6)
            axes.plot(
                (measure.value - target.value) / far,
                y,
                mark["marker"],
                color=mark["color"],
                markersize=4.5,
                label=None if drawn else short(understand(name).label, 40),
            )
            drawn = True
    for i in range(1, len(entries)):
        axes.axhline(i - 0.5, color=GRID, linewidth=0.6)
    axes.set_yticks(range(len(entries)), [short(entry.method) for entry in entries])
    axes.set_ylim(len(entries) - 0.5, -0.5)
    axes.grid(axis="y", visible=False)
    axes.tick_params(axis="y", length=0)
    axes.set_xlabel("← knows less  ·  0 = retrained  ·  1 = original  ·  remembers more →")
    figure.legend(loc="outside upper left", ncols=2, handletextpad=0.2, columnspacing=1.2)
    caption = (
        "Each forget-set metric minus its value on the retrained model, divided by what that difference is for the "
        "original. 0 is like retrained, 1 is untouched, negative is past the retrained model. Bars: 95 % intervals."
    )
    return Chart("forget-distance", "Distance to retraining, metric by metric", caption, figure)


def _half(measure: Measure) -> float:
    ends = bar(measure)
    return max(ends) if ends else 0.0


def cost_quality(view: View) -> Chart | None:
    """Share of the gap closed against cost as a share of retraining, on a logarithmic axis."""
    if view.primary is None:
        return None
    found = []
    for entry in view.ranked:
        cost, gap = entry.cost.get("share_of_retraining"), view.gap(entry, view.primary)
        if cost and gap and cost.value is not None and cost.value > 0 and gap.value is not None:
            found.append((entry, cost, gap))
    if not found:
        return None
    figure, (axes,) = new_figure(3.4)
    axes.set_xscale("log")
    axes.axvline(RETRAINING_BUDGET, color=MUTED, linewidth=0.9, linestyle=(0, (4, 2)))
    axes.axhline(1, color=INK, linewidth=0.9)
    for entry, cost, gap in found:
        _mark(axes, cost, gap, style_of(view, entry.method, entry.kind))
    costs = [cost.value or 0.0 for _, cost, _ in found]
    axes.set_xlim(min(*costs, 0.02) / 1.6, max(*costs, 0.4) * 1.8)
    values = [gap.value or 0.0 for _, _, gap in found]
    axes.set_ylim(min(-0.05, min(values) - 0.12), max(1.12, max(values) + 0.12))
    ticks = [t for t in (1e-4, 3e-4, 1e-3, 3e-3, 0.01, 0.03, 0.1, 0.25, 1, 3, 10) if _inside(t, axes.get_xlim())]
    axes.set_xticks(ticks, [f"{100 * t:g} %" for t in ticks])
    axes.set_xticks([], minor=True)
    axes.set_xlabel("cost, share of retraining (logarithmic; dashed: 25 %)")
    axes.set_ylabel(f"{understand(view.primary).label.replace(', forget', '')} gap closed")
    _label(
        axes,
        list(zip(costs, values, strict=True)),
        [short(entry.method) for entry, _, _ in found],
        [colour_of(view, entry) for entry, _, _ in found],
        [(cost, gap) for _, cost, gap in found],
        [(RETRAINING_BUDGET, axes.get_ylim()[0], RETRAINING_BUDGET, axes.get_ylim()[1])],
    )
    caption = "Up is closer to retraining (1 = like retrained, 0 = untouched), left is cheaper. Bars: 95 % intervals."
    return Chart("cost-quality", "Quality against cost", caption, figure)


def _inside(value: float, limits: tuple[float, float]) -> bool:
    return limits[0] <= value <= limits[1]


def utility_bars(view: View) -> Chart | None:
    """Perplexity on text that has nothing to do with the request."""
    name = next((n for n in ("perplexity.utility", "perplexity.retain", "loss.utility") if _measured(view, n)), None)
    if name is None:
        return None
    entries = [e for e in view.main if (m := e.metrics.get(name)) and m.value is not None]
    values = [entry.metrics[name].value or 0.0 for entry in entries]
    figure, (axes,) = new_figure(0.8 + 0.24 * len(entries))
    smallest = min(v for v in values if v > 0) if any(v > 0 for v in values) else 1.0
    wide = max(values) > 30 * smallest  # a collapsed model would press every other bar to nothing
    if wide:
        log_axis(axes, "x")
        axes.set_xlim(smallest / 2, max(values) * 4)
    else:
        axes.set_xlim(0, max(values) * 1.22)
    for i, entry in enumerate(entries):
        measure = entry.metrics[name]
        colour = colour_of(view, entry)
        axes.barh(i, values[i], height=0.62, color=colour, alpha=0.8 if entry.kind == "method" else 0.45)
        ends = bar(measure)
        right = values[i]
        if ends:
            axes.hlines(i, values[i] - ends[0], values[i] + ends[1], colors=INK, linewidth=1)
            right += ends[1]
        axes.annotate(number(values[i]), (right, i), (4, 0), textcoords="offset points", va="center", fontsize=8.5)
    if view.original is not None and (before := view.original.metrics.get(name)) and before.value is not None:
        axes.axvline(before.value, color=INK, linewidth=0.9, linestyle=(0, (4, 2)))
    axes.set_yticks(range(len(entries)), ["retrained" if e.kind == "reference" else short(e.method) for e in entries])
    axes.set_ylim(len(entries) - 0.4, -0.6)
    axes.grid(axis="y", visible=False)
    axes.tick_params(axis="y", length=0)
    axes.set_xlabel(short(understand(name).label, 40) + (" (logarithmic)" if wide else ""))
    caption = (
        "Lower is better. Dashed: the original before unlearning. Lines: 95 % intervals. Paler: anchors, controls."
    )
    return Chart("utility", "What it costs in general ability", caption, figure)


def _measured(view: View, name: str) -> bool:
    return any((m := e.metrics.get(name)) is not None and m.value is not None for e in view.study("main"))


def loss_distributions(view: View) -> Chart | None:
    """Empirical distribution of the per-sample loss on forget: original, unlearned, retrained."""

    def of(entry: Summary | None) -> list[float]:
        models = [row.model for row in view.rows(entry)] if entry else []
        return [value for model in models for value in view.samples.values(model, "loss")]

    before, after = of(view.original), of(view.reference)
    found = [(entry, values) for entry in view.methods if (values := of(entry))][:MAX_DISTRIBUTIONS]
    if not found:
        return None
    rows = (len(found) + 1) // 2
    figure, panels = new_figure(0.55 + 1.55 * rows, rows, 2 if len(found) > 1 else 1, sharex=True, sharey=True)
    for axes, (entry, values) in zip(panels, found, strict=False):
        for data, colour, dash, width in (
            (before, MUTED, (0, (4, 2)), 1.2),
            (after, INK, "-", 1.2),
            (values, colour_of(view, entry), "-", 1.8),
        ):
            if data:
                ordered = np.sort(np.asarray(data))
                share = np.arange(1, len(ordered) + 1) / len(ordered)
                axes.step(ordered, share, where="post", color=colour, linestyle=dash, linewidth=width)
        axes.set_title(f"{short(entry.method)} (n = {len(values)})", loc="left", color=colour_of(view, entry), pad=3)
        axes.set_ylim(0, 1.02)
    for axes in panels[len(found) :]:
        axes.set_visible(False)
    for axes in panels[max(0, len(found) - 2) : len(found)]:
        axes.tick_params(labelbottom=True)
    everything = [v for data in (before, after, *(values for _, values in found)) for v in data]
    low, high = min(everything), max(everything)
    if low > 0 and high > 30 * low:
        panels[0].set_xscale("log")
        ticks = [t for t in (0.001, 0.01, 0.1, 1, 10, 100) if low / 2 <= t <= high * 2]
        for axes in panels:
            axes.set_xticks(ticks, [f"{t:g}" for t in ticks])
            axes.set_xticks([], minor=True)
    figure.supxlabel("loss per token on a forget sample, nats", fontsize=9)
    figure.supylabel("share of samples below", fontsize=9)
    shown = "" if len(found) == len(view.methods) else f" The {len(found)} best-ranked methods with samples are shown."
    anchors = [text for data, text in ((before, "dashed grey: original"), (after, "black: retrained")) if data]
    caption = f"Coloured: unlearned, all seeds together; {'; '.join(anchors)}. " if anchors else "All seeds together. "
    caption += "The nearer the coloured line to the retrained one, the better, on the whole range." + shown
    return Chart("loss-distribution", "Loss on the forget samples, one by one", caption, figure)


MAIN_CHARTS = (forgetting_retention, modality_retention, distance_dots, cost_quality, utility_bars, loss_distributions)
