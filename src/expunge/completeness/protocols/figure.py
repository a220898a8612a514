"""The one figure of a protocol: every score with its interval, one panel per setting."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

PANELS = 6  # settings that one figure shows
CHANCE = {"auc": 0.5, "tpr@1%": 0.01}


def draw(results: Mapping[str, Any], order: str, path: Path) -> Path:
    """Write the figure of results.json to ``path`` (PNG)."""
    from matplotlib.figure import Figure

    settings = list(dict.fromkeys(line["setting"] for line in results["lines"]))[:PANELS]
    rows = {s: [x for x in results["lines"] if x["setting"] == s and _value(x, order) is not None] for s in settings}
    tallest = max((len(own) for own in rows.values()), default=1)
    figure = Figure(figsize=(4.2 * max(1, len(settings)), 0.8 + 0.24 * max(1, tallest)), layout="constrained")
    axes = None
    for place, (setting, own) in enumerate(rows.items()):
        axes = figure.add_subplot(1, len(settings), place + 1, sharex=axes)  # panels are compared
        values = [float(x["metrics"][order]["value"]) for x in own]
        spans = [(x["metrics"][order]["low"], x["metrics"][order]["high"]) for x in own]
        heights = list(range(len(own), 0, -1))
        for value, (low, high), height in zip(values, spans, heights, strict=True):
            axes.plot([value], [height], "o", color="#1f4e79", markersize=4)
            if low is not None:
                axes.plot([low, high], [height, height], color="#1f4e79", linewidth=1)
        if order in CHANCE:
            axes.axvline(CHANCE[order], color="#999999", linewidth=1, linestyle=":")
        axes.set_yticks(heights, [x["score"] for x in own], fontsize=7)
        axes.set_xlabel(order)
        axes.set_title(setting, fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    return path


def _value(line: Mapping[str, Any], order: str) -> float | None:
    metric = line["metrics"].get(order)
    return None if metric is None else metric["value"]
