"""How figures are drawn: one style, colours that follow the page's theme, labels that do not cover each other."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.transforms import Bbox

INK, MUTED, GRID, PAPER = "#1b1f24", "#59636e", "#d8dde3", "#ffffff"
SERIES = ("#0b6fa4", "#c2500a", "#1b7f5c", "#a03c8c", "#8a6a00", "#4a55c7", "#b3203a", "#56691f")
MARKERS = ("o", "s", "D", "^", "v", "p", "<", ">")  # crosses and stars are for controls and anchors
DASHES: tuple[Any, ...] = ("-", (0, (5, 2)), (0, (1.5, 1.5)), (0, (6, 2, 1.5, 2)))
# The same colours as custom properties of the page, so that an embedded figure follows light and dark
VARIABLES = {INK: "--ink", MUTED: "--muted", GRID: "--grid", PAPER: "--paper"} | {
    colour: f"--s{i}" for i, colour in enumerate(SERIES)
}
WIDTH = 5.6  # inches; one column of the page
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",  # text stays text: it can be searched, selected and read aloud
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.labelsize": 9,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": INK,
    "axes.facecolor": PAPER,
    "axes.linewidth": 0.7,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "figure.facecolor": PAPER,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "text.color": INK,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "xtick.labelsize": 8.5,
    "ytick.labelsize": 8.5,
    "text.parse_math": False,  # names of methods may contain a dollar sign
}


@contextmanager
def style() -> Iterator[None]:
    """Draw without a display and without touching the caller's matplotlib settings."""
    import matplotlib

    with matplotlib.rc_context(_STYLE):
        yield


def new_figure(height: float, rows: int = 1, columns: int = 1, **grid: Any) -> tuple[Figure, list[Axes]]:
    """A figure of one column's width and ``height`` inches, with its axes in reading order."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    FigureCanvasAgg(figure)
    made = figure.subplots(rows, columns, squeeze=False, **grid)
    return figure, [axes for row in made for axes in row]


def look(index: int) -> dict[str, Any]:
    """Colour, marker and dash of the ``index``-th method: different in shape as well, not by colour alone."""
    turn = index // len(SERIES)
    return {
        "color": SERIES[index % len(SERIES)],
        "marker": MARKERS[(index + turn) % len(MARKERS)],
        "linestyle": DASHES[(index + turn) % len(DASHES)],
    }


def short(name: str, limit: int = 24) -> str:
    """A name that fits into a figure: one line, printable, cut with an ellipsis.

    >>> short("a" * 30, 5), short("two\\nlines")
    ('aaaa…', 'two lines')
    """
    clean = "".join(c if c.isprintable() else " " for c in name)
    return clean if len(clean) <= limit else clean[: limit - 1] + "…"


def to_svg(figure: Figure, name: str) -> str:
    """The figure as SVG text, the same bytes for the same figure."""
    import matplotlib

    stream = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": name}):
        figure.savefig(stream, format="svg", metadata={"Date": None, "Creator": None})
    return stream.getvalue().replace("'DejaVu Sans'", "system-ui, -apple-system, 'Segoe UI', 'DejaVu Sans', sans-serif")


def to_inline(svg: str, name: str, label: str) -> str:
    """The SVG for embedding: no prologue, no namespaces (nothing that looks like an address), own ids, theme colours.

    ``label`` must already be escaped for an HTML attribute.
    """
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'\sxmlns(:\w+)?="[^"]*"', "", svg)
    svg = svg.replace("xlink:href=", "href=")
    svg = re.sub(r'\bid="', f'id="{name}-', svg)
    svg = re.sub(r'href="#', f'href="#{name}-', svg)
    svg = re.sub(r"url\(#", f"url(#{name}-", svg)
    for colour, variable in VARIABLES.items():
        svg = re.sub(colour, f"var({variable})", svg, flags=re.IGNORECASE)
    opening = svg[: svg.index(">")]
    kept = re.search(r'viewBox="[^"]*"', opening)
    assert kept is not None
    return f'<svg role="img" aria-label="{label}" {kept.group()}' + svg[svg.index(">") :]


def log_axis(axes: Axes, which: str) -> None:
    """A logarithmic axis with plain numbers at the powers of ten (names of methods forbid math text)."""
    from matplotlib.ticker import FuncFormatter, NullFormatter

    axis = axes.xaxis if which == "x" else axes.yaxis
    (axes.set_xscale if which == "x" else axes.set_yscale)("log")
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


_ANGLES = [math.radians(a) for a in (45, 315, 135, 225, 0, 180, 90, 270)]
_RADII = (6.0, 9.0, 14.0, 21.0, 31.0, 43.0, 57.0, 75.0)


def _area(one: Bbox, other: Bbox) -> float:
    width: float = min(one.x1, other.x1) - max(one.x0, other.x0)
    height: float = min(one.y1, other.y1) - max(one.y0, other.y0)
    return max(0.0, width) * max(0.0, height)


def label_points(
    axes: Axes,
    points: Sequence[tuple[float, float]],
    texts: Sequence[str],
    colours: Sequence[str],
    bars: Sequence[tuple[float, float, float, float]] = (),
) -> list[Bbox]:
    """Write ``texts`` beside ``points`` (data coordinates) so that none covers another label, a point or a bar.

    ``bars`` are lines ``(x0, y0, x1, y1)`` in data coordinates. Points that fall on one another share one label.
    Greedy, the most crowded first; a label that had to move away gets a thin line to its point. Returns the boxes in
    pixels. Call it when limits and layout are final.
    """
    from matplotlib.transforms import Bbox

    figure: Any = axes.figure
    figure.draw_without_rendering()
    renderer = figure.canvas.get_renderer()
    scale = figure.dpi / 72
    merged = _merge([tuple(axes.transData.transform(p)) for p in points], texts, colours, 4.0 * scale)
    frame = axes.get_window_extent(renderer)
    dots = [Bbox.from_extents(x - 4 * scale, y - 4 * scale, x + 4 * scale, y + 4 * scale) for x, y, _, _ in merged]
    for x0, y0, x1, y1 in bars:
        (left, bottom), (right, top) = axes.transData.transform([(x0, y0), (x1, y1)])
        dots.append(Bbox.from_extents(left - scale, bottom - scale, right + scale, top + scale))

    def crowding(item: tuple[float, float, str, str]) -> float:
        return -sum(1 / (10 + math.dist(item[:2], other[:2])) for other in merged)

    placed: list[Bbox] = []
    for x, y, text, colour in sorted(merged, key=crowding):
        probe = axes.text(0, 0, text, fontsize=8.5)
        size = probe.get_window_extent(renderer)
        probe.remove()
        best: tuple[float, float, float, Bbox] | None = None
        for radius in _RADII:
            for turn, angle in enumerate(_ANGLES):
                cos, sin = math.cos(angle), math.sin(angle)
                cx = x + cos * radius * scale + (size.width / 2 if cos > 0.1 else -size.width / 2 if cos < -0.1 else 0)
                cy = (
                    y + sin * radius * scale + (size.height / 3 if sin > 0.1 else -size.height / 3 if sin < -0.1 else 0)
                )
                half_w, half_h = size.width / 2 + scale, size.height / 2
                box = Bbox.from_extents(cx - half_w, cy - half_h, cx + half_w, cy + half_h)
                covered = sum(_area(box, other) for other in placed) * 4 + sum(_area(box, dot) for dot in dots) * 3
                outside = box.width * box.height - _area(box, frame)
                score = covered * 10 + outside * 10 + radius * 4 + turn * 0.5
                if best is None or score < best[0]:
                    best = (score, cx, cy, box)
        assert best is not None
        _, cx, cy, box = best
        placed.append(box)
        near = math.hypot(max(box.x0 - x, 0, x - box.x1), max(box.y0 - y, 0, y - box.y1)) < 9 * scale
        to_data = axes.transData.inverted()
        arrow = None if near else {"arrowstyle": "-", "color": MUTED, "linewidth": 0.6, "shrinkA": 1, "shrinkB": 3}
        axes.annotate(
            text,
            xy=tuple(to_data.transform((x, y))),
            xytext=tuple(to_data.transform((cx, cy))),
            fontsize=8.5,
            color=colour,
            ha="center",
            va="center",
            arrowprops=arrow,
            annotation_clip=False,
        )
    return placed


def _merge(
    pixels: Sequence[tuple[float, ...]], texts: Sequence[str], colours: Sequence[str], near: float
) -> list[tuple[float, float, str, str]]:
    """Points closer than ``near`` pixels become one, with the names joined."""
    out: list[tuple[float, float, str, str]] = []
    for (x, y), text, colour in zip(pixels, texts, colours, strict=True):
        for i, (ox, oy, names, first) in enumerate(out):
            if math.dist((x, y), (ox, oy)) <= near:
                out[i] = (ox, oy, f"{names}, {text}", first if first == colour else INK)
                break
        else:
            out.append((x, y, text, colour))
    return out


def spread(wanted: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Positions as near as possible to ``wanted``, at least ``gap`` apart, inside [low, high] while they fit.

    Pools neighbours that collide and centres each pool on the mean of its wishes.

    >>> spread([1.0, 1.0, 5.0], 1.0, 0.0, 10.0)
    [0.5, 1.5, 5.0]
    """
    order = sorted(range(len(wanted)), key=lambda i: wanted[i])
    pools: list[list[int]] = []

    def start(pool: list[int]) -> float:
        first = sum(wanted[i] for i in pool) / len(pool) - gap * (len(pool) - 1) / 2
        return max(low, min(first, high - gap * (len(pool) - 1)))

    for i in order:
        pools.append([i])
        while len(pools) > 1 and start(pools[-2]) + gap * len(pools[-2]) > start(pools[-1]) + 1e-12:
            last = pools.pop()
            pools[-1] += last
    out = [0.0] * len(wanted)
    for pool in pools:
        for rank, i in enumerate(pool):
            out[i] = start(pool) + gap * rank
    return out


def label_ends(axes: Axes, ends: Sequence[tuple[float, float, str, str]]) -> None:
    """Names at the right ends of lines, ``(x, y, text, colour)``, moved apart vertically with thin lines to them."""
    if not ends:
        return
    figure: Any = axes.figure
    figure.draw_without_rendering()
    scale = figure.dpi / 72
    box = axes.get_window_extent()
    pixels = [axes.transData.transform((x, y)) for x, y, _, _ in ends]
    heights = spread([float(p[1]) for p in pixels], 10.5 * scale, box.y0 + 5 * scale, box.y1 + 5 * scale)
    edge = max(float(p[0]) for p in pixels)
    to_data = axes.transData.inverted()
    for (x, y, text, colour), height in zip(ends, heights, strict=True):
        axes.annotate(
            text,
            xy=(x, y),
            xytext=tuple(to_data.transform((edge + 12 * scale, height))),
            fontsize=8.5,
            color=colour,
            va="center",
            ha="left",
            arrowprops={
                "arrowstyle": "-",
                "color": MUTED,
                "linewidth": 0.4,
                "shrinkA": 1,
                "shrinkB": 1,
                "relpos": (0, 0.5),
            },
            annotation_clip=False,
        )
