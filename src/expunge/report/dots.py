"""A score on one line: audited model, references and original as marks on an axis that the rows of a group share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

from expunge.report.schema import Measure
from expunge.report.wording import interval, number

WIDTH, HEIGHT, PAD = 200, 22, 8  # pixels of the viewBox; the page scales it
FLAT = 1e-9  # original and reference this close make no scale


@dataclass(frozen=True)
class DotAxis:
    """What the rows of a group share: ends of the axis, and the values that get a line and a label.

    ``relative``: values are first mapped so that 0 is the mean reference and 1 the original.
    """

    low: float
    high: float
    marks: tuple[tuple[float, str], ...]
    relative: bool = False
    title: str = ""


UNIT = DotAxis(0.0, 1.0, ((0.0, "0"), (1.0, "1")), title="from 0 to 1")
CHANCE = DotAxis(0.0, 1.0, ((0.0, "0"), (0.5, "chance"), (1.0, "1")), title="from 0 to 1, chance at 0.5")
RELATIVE = DotAxis(
    -1.0, 2.0, ((0.0, "reference"), (1.0, "original")), relative=True, title="0 = reference, 1 = original, ends cut"
)


@dataclass(frozen=True)
class Marks:
    """The models of one row. ``references`` are single models; ``reference`` is their mean."""

    audited: Measure | None
    reference: float | None
    references: Sequence[Measure]
    original: Measure | None


def axis_of(statistic: str, rows: Sequence[Marks]) -> DotAxis:
    """AUC and shares are drawn as they are; other means by where they lie between reference and original."""
    if statistic == "auc":
        return CHANCE
    measures = [m for row in rows for m in (row.audited, row.original, *row.references) if m is not None]
    values = [m.value for m in measures if m.value is not None]
    return UNIT if values and min(values) >= 0 and max(values) <= 1 else RELATIVE


class _Scale:
    def __init__(self, axis: DotAxis, marks: Marks) -> None:
        self.axis, self.zero, self.unit = axis, 0.0, 1.0
        if axis.relative:
            assert marks.reference is not None and marks.original is not None and marks.original.value is not None
            self.zero, self.unit = marks.reference, marks.original.value - marks.reference

    def x(self, value: float) -> float:
        """Pixels; values beyond the ends stay at the ends."""
        axis = self.axis
        inside = min(axis.high, max(axis.low, (value - self.zero) / self.unit))
        return round(PAD + (WIDTH - 2 * PAD) * (inside - axis.low) / (axis.high - axis.low), 1)

    def outside(self, value: float) -> int:
        """-1 or 1 when the value lies beyond an end of the axis."""
        share = (value - self.zero) / self.unit
        return (share > self.axis.high + 1e-6) - (share < self.axis.low - 1e-6)


def drawable(axis: DotAxis, marks: Marks) -> bool:
    if marks.audited is None or marks.audited.value is None:
        return False
    if not axis.relative:
        return True
    original = marks.original.value if marks.original is not None else None
    return marks.reference is not None and original is not None and abs(original - marks.reference) > FLAT


def dots(axis: DotAxis, marks: Marks) -> Markup:
    """The row as SVG, or nothing where it cannot be placed on the axis; its label says all values in words."""
    if not drawable(axis, marks):
        return Markup("")
    scale, middle = _Scale(axis, marks), HEIGHT / 2
    parts = [f'<line class="rule" x1="{PAD}" x2="{WIDTH - PAD}" y1="{middle}" y2="{middle}"/>']
    for place, _ in axis.marks:
        x = round(PAD + (WIDTH - 2 * PAD) * (place - axis.low) / (axis.high - axis.low), 1)
        parts.append(f'<line class="rule" x1="{x}" x2="{x}" y1="3" y2="{HEIGHT - 3}"/>')
    ends = [e for m in marks.references for e in (m.low, m.high, m.value) if e is not None]
    if ends:
        left, right = scale.x(min(ends)), scale.x(max(ends))
        left, right = min(left, right), max(left, right)
        width = max(2.0, right - left)
        parts.append(f'<rect class="band" x="{left}" y="5" width="{width:.1f}" height="{HEIGHT - 10}"/>')
    for measure in marks.references:
        if measure.value is not None:
            x = scale.x(measure.value)
            parts.append(f'<line class="reference" x1="{x}" x2="{x}" y1="5" y2="{HEIGHT - 5}"/>')
    if marks.original is not None and marks.original.value is not None:
        x = scale.x(marks.original.value)
        parts.append(f'<path class="original" d="M{x} {middle - 5}l5 5-5 5-5-5z"/>')
    assert marks.audited is not None and marks.audited.value is not None
    if marks.audited.low is not None and marks.audited.high is not None:
        x0, x1 = scale.x(marks.audited.low), scale.x(marks.audited.high)
        parts.append(f'<line class="audited" x1="{x0}" x2="{x1}" y1="{middle}" y2="{middle}"/>')
    x, beyond = scale.x(marks.audited.value), scale.outside(marks.audited.value)
    if beyond:  # an arrow head: the value lies further out
        parts.append(f'<path class="audited" d="M{x + 6 * beyond} {middle}l{-8 * beyond} -5v10z"/>')
    else:
        parts.append(f'<circle class="audited" cx="{x}" cy="{middle}" r="4"/>')
    return Markup(
        f'<svg class="dots" role="img" aria-label="{escape(said(marks))}" viewBox="0 0 {WIDTH} {HEIGHT}">'
    ) + (Markup("".join(parts) + "</svg>"))


def said(marks: Marks) -> str:
    """``audited 0.812 [0.74, 0.87], reference 0.551, original 0.934``."""
    out = []
    if marks.audited is not None:
        out.append(f"audited {number(marks.audited.value)} {interval(marks.audited)}".rstrip())
    if marks.reference is not None:
        out.append(f"reference {number(marks.reference)}")
    if marks.original is not None and marks.original.value is not None:
        out.append(f"original {number(marks.original.value)}")
    return ", ".join(out)


def ruler(axis: DotAxis) -> Markup:
    """The axis' labels as SVG, to stand above the rows."""
    texts = []
    for place, label in axis.marks:
        x = round(PAD + (WIDTH - 2 * PAD) * (place - axis.low) / (axis.high - axis.low), 1)
        anchor = "start" if place == axis.low else "end" if place == axis.high else "middle"
        shift = -PAD / 2 if anchor == "start" else PAD / 2 if anchor == "end" else 0
        texts.append(f'<text x="{x + shift}" y="11" text-anchor="{anchor}">{escape(label)}</text>')
    label = escape(f"axis: {axis.title}")
    return Markup(f'<svg class="dots ruler" role="img" aria-label="{label}" viewBox="0 0 {WIDTH} 14">') + Markup(
        "".join(texts) + "</svg>"
    )
