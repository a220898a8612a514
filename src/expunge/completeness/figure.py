"""The figure of a completeness table: how the answers are spread, and where each sample stands.

The house style is the report's; it is imported when a figure is drawn, so that a table without one needs no matplotlib.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from expunge.completeness.readings import Floats, Readings
from expunge.files import write_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes

VERDICTS = ("under-unlearned", "adequate", "over-unlearned", "not-auditable")
COLOURS = dict(zip(VERDICTS, (6, 2, 5), strict=False))  # places in the report's series; not-auditable is grey
DRAWN = 4000  # points of the scatter; more only make the file large
BINS = 25


def draw(folder: Path, readings: Readings, value_N: Floats, label: str, verdicts: Sequence[str] | None) -> list[Path]:
    """Write ``completeness.svg`` and ``.png`` into ``folder`` and give their paths.

    Left: histogram of ``value_N`` (``label`` says what it is), stacked by verdict. Right: reading under the unlearned
    model against the mean over shadows; on the diagonal it is that of a model that never saw the sample.
    """
    from expunge.drawing import new_figure, style, to_svg

    folder.mkdir(parents=True, exist_ok=True)
    kinds = np.array(verdicts if verdicts is not None else ["samples"] * len(readings))
    groups = {name: kinds == name for name in (VERDICTS if verdicts is not None else ("samples",))}
    groups = {name: mask for name, mask in groups.items() if mask.any()}
    with style():
        figure, (left, right) = new_figure(2.7, 1, 2)
        _histogram(left, value_N, label, groups)
        _scatter(right, readings, groups)
        left.legend(loc="upper center", fontsize=7)
        svg = write_text(folder / "completeness.svg", to_svg(figure, "completeness"))
        png = folder / "completeness.png"
        figure.savefig(png, dpi=200, metadata={"Software": None})
    return [svg, png]


def _look(name: str) -> str:
    from expunge.drawing import MUTED, SERIES

    return SERIES[COLOURS[name]] if name in COLOURS else SERIES[0] if name == "samples" else MUTED


def _histogram(axes: Axes, value_N: Floats, label: str, groups: Mapping[str, Any]) -> None:
    known_N = np.isfinite(value_N)
    axes.hist(
        [value_N[mask & known_N] for mask in groups.values()],
        bins=np.linspace(0, 1, BINS + 1).tolist(),
        stacked=True,
        color=[_look(name) for name in groups],
        label=[f"{name} ({int(mask.sum())})" for name, mask in groups.items()],
    )
    axes.set_xlabel(label)
    axes.set_ylabel("samples")


def _scatter(axes: Axes, readings: Readings, groups: Mapping[str, Any]) -> None:
    shadow_N = readings.shadow_KN.mean(axis=0)
    kept_N = readings.complete()
    places = np.flatnonzero(kept_N)
    shown_N = np.zeros(len(readings), dtype=bool)
    shown_N[places[:: max(1, -(-len(places) // DRAWN))]] = True
    for name, mask in groups.items():
        at = mask & shown_N
        axes.scatter(
            shadow_N[at], readings.unlearned_N[at], s=6, color=_look(name), alpha=0.6, linewidths=0, rasterized=True
        )
    if places.size:
        ends = np.array([shadow_N[kept_N], readings.unlearned_N[kept_N]])
        axes.plot([ends.min(), ends.max()], [ends.min(), ends.max()], color=_look("not-auditable"), linewidth=0.8)
    what = "loss, nats per token" if readings.form == "text" else "probability of the true label"
    axes.set_xlabel(f"never saw it: {what}")
    axes.set_ylabel("unlearned model")
