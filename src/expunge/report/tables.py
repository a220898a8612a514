"""The tables that page and Markdown share, as plain data."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from expunge.metrics.registry import all_metrics
from expunge.report.catalogue import GROUPS, REQUEST, Metric, understand
from expunge.report.samples import VERDICTS
from expunge.report.schema import CONTROLS, Measure, Summary
from expunge.report.view import OWN_GAP, View
from expunge.report.wording import KIND_NAMES, cost_label, evidence, flags
from expunge.stats import wilson

GROUP_TITLES = {
    "forgetting": "Forgetting",
    "retention": "Retention",
    "privacy": "Privacy",
    "robustness": "Robustness",
    "other": "Other",
    "cost": "Cost",
}
LEADING = {"forgetting": 3, "retention": 2, "privacy": 1, "robustness": 1, "other": 1, "cost": 2}
STUDY_WORDS = {  # what a position is, and the title
    "matched": ("at % of the original on retain", "At matched utility"),
    "sequential": ("after request", "Sequence of requests"),
    "size": ("size", "Size of the forget set"),
}
COSTS = ("share_of_retraining", "wall_s", "peak_mib", "cpu_s", "flops", "parameters_changed")


@dataclass
class Cell:
    """A measured value. ``delta`` is signed to the retrained model; ``nearness`` 1 = there, 0 = as far as original."""

    measure: Measure | None = None
    delta: float | None = None
    nearness: float | None = None
    share: bool = False  # print as percent


@dataclass
class Column:
    key: str
    label: str
    group: str
    ideal: str | None = None
    evidence: str = ""  # n and seeds of most cells
    first: bool = False  # begins a group: gets a line before it


@dataclass
class Line:
    name: str
    kind: str
    tag: str
    control: bool
    flags: list[str] = field(default_factory=list)
    cells: list[Cell] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


@dataclass
class Table:
    title: str
    columns: list[Column]
    lines: list[Line]

    def groups(self) -> list[tuple[str, int]]:
        """Runs of columns with the same group: title and width."""
        out: list[tuple[str, int]] = []
        for column in self.columns:
            title = GROUP_TITLES[column.group]
            out = [*out[:-1], (title, out[-1][1] + 1)] if out and out[-1][0] == title else [*out, (title, 1)]
        return out


def _properties(view: View, entry: Summary) -> dict[str, Any]:
    for row in view.results.rows:
        if row.method == entry.method and row.properties:
            return row.properties
    return {}


def line_of(view: View, entry: Summary) -> Line:
    """The head of an entry's row: name, tag, declared properties; cells are to come."""
    tag = KIND_NAMES.get(entry.kind, entry.kind)
    if not any(m.value is not None for m in entry.metrics.values()):
        tag = "failed"
    shown = flags(_properties(view, entry)) if entry.kind == "method" else []
    return Line(entry.method, entry.kind, tag, entry.kind in CONTROLS, shown, [], entry.notes)


def cell_of(view: View, entry: Summary, metric: Metric) -> Cell:
    """What an entry has on a metric, beside the retrained model; empty where it was not measured."""
    measure = entry.metrics.get(metric.name)
    if measure is None or measure.value is None:
        return Cell()
    gap = view.gap(entry, metric.name)
    nearness = None if gap is None or gap.value is None else max(0.0, min(1.0, gap.value))
    delta = view.delta(entry, metric.name) if metric.ideal == "reference" else None
    return Cell(measure, delta, nearness)


def shared_evidence(cells: Sequence[Cell]) -> str:
    """The commonest n and seeds of a column stand in its head; cells that differ say so themselves."""
    found = Counter(evidence(cell.measure) for cell in cells if cell.measure is not None)
    return found.most_common(1)[0][0] if found else ""


def board(view: View, full: bool = False) -> Table:
    """The leaderboard: anchors, then methods and controls, closest to retraining first.

    ``full`` takes every metric; otherwise the leading ones of each group, and the share of the gap closed.
    """
    entries = view.main
    lines = [line_of(view, entry) for entry in entries]
    columns: list[Column] = []

    def add(column: Column, cells: list[Cell]) -> None:
        if any(cell.measure is not None for cell in cells):
            column.evidence = shared_evidence(cells)
            columns.append(column)
            for line, cell in zip(lines, cells, strict=True):
                line.cells.append(cell)

    if view.primary is not None:
        gaps = [view.gap(entry, view.primary) for entry in entries]
        label = f"gap closed ({understand(view.primary).label.replace(', forget', '')})"
        near = [None if g is None or g.value is None else max(0.0, min(1.0, g.value)) for g in gaps]
        cells = [Cell(g, None, n, share=True) for g, n in zip(gaps, near, strict=True)]
        add(Column("gap", label, "forgetting", "high"), cells)
    for group in GROUPS:
        of_group = [metric for metric in view.metrics if metric.group == group]
        if not full:  # the share of the gap already says what the metric behind it says
            of_group = [metric for metric in of_group if metric.name not in (view.primary, OWN_GAP)]
        for metric in of_group if full else of_group[: LEADING[group]]:
            label = metric.label
            add(Column(metric.name, label, group, metric.ideal), [cell_of(view, entry, metric) for entry in entries])
    here = {name for entry in entries for name in entry.cost}
    costs = [name for name in COSTS if name in here] + sorted(here - set(COSTS))
    for name in costs if full else costs[: LEADING["cost"]]:
        cells = [
            Cell(m if (m := e.cost.get(name)) and m.value is not None else None, share=name.startswith("share"))
            for e in entries
        ]
        add(Column(f"cost.{name}", cost_label(name), "cost", "low"), cells)
    return Table("Leaderboard", columns, lines)


def study_table(view: View, study: str) -> Table | None:
    """One line per method and position of the matched, the sequential or the size study, every metric."""
    entries = [e for e in view.summary if e.study == study]
    if not entries:
        return None
    names = {name for entry in entries for name in entry.metrics}
    plain = sorted(name for name in names if not REQUEST.match(name))
    numbered = sorted(
        (name for name in names if REQUEST.match(name)), key=lambda n: (n.rpartition("_")[0], int(n.rpartition("_")[2]))
    )
    word, title = STUDY_WORDS[study]
    order = {entry.method: i for i, entry in reversed(list(enumerate(view.main)))}
    lines = []
    for entry in sorted(entries, key=lambda e: (order.get(e.method, len(order)), e.method, e.position or 0)):
        line = line_of(view, entry)
        line.flags, line.tag = [], f"{word} {entry.position}" if entry.position is not None else line.tag
        line.cells = [
            Cell(m if (m := entry.metrics.get(n)) and m.value is not None else None) for n in plain + numbered
        ]
        lines.append(line)
    columns = [Column(n, _request_label(n), understand(n).group) for n in plain + numbered]
    for i, column in enumerate(columns):
        column.evidence = shared_evidence([line.cells[i] for line in lines])
    return Table(title, columns, lines)


def _request_label(name: str) -> str:
    match = REQUEST.match(name)
    return f"{understand(match['stem']).label}, request {match['number']}" if match else understand(name).label


@dataclass
class VerdictLine:
    """Per-sample verdicts of one method: counts per verdict, and the share judged adequate."""

    method: str
    control: bool
    counts: list[int]
    total: int
    adequate: Measure


def verdict_table(view: View) -> tuple[list[str], list[VerdictLine]]:
    """Verdict names in order, and one line per method; empty when nothing was judged."""
    others = {verdict for counts in view.verdicts.values() for verdict in counts} - set(VERDICTS)
    names = [*VERDICTS, *sorted(others)]
    lines = []
    known = [entry.method for entry in view.main]
    controls = {entry.method for entry in view.ranked if entry.kind in CONTROLS}
    for method in [*(m for m in known if m in view.verdicts), *sorted(set(view.verdicts) - set(known))]:
        counts = view.verdicts[method]
        total = sum(counts.values())
        share = wilson(counts.get("adequate", 0), total)
        measure = Measure(value=share.value, low=share.low, high=share.high, n=total)
        lines.append(VerdictLine(method, method in controls, [counts.get(n, 0) for n in names], total, measure))
    return names, lines


def formula_of(definition: str, known: str) -> str:
    """The registered formula of this very definition, else what the name tells, else that of a sibling definition."""
    registered = {metric.definition: metric for metric in all_metrics().values()}
    family = re.split(r"[-+/]", definition)[0]
    siblings = [m for key, m in registered.items() if re.split(r"[-+/]", key)[0] == family]
    found = registered.get(definition) or (None if known or not siblings else siblings[0])
    return f"{found.formula}; {found.source}" if found else known


def definitions(view: View) -> list[tuple[str, str, str]]:
    """Every definition in use: name, the metrics that follow it, formula; unknown formulas are left empty."""
    used: dict[str, tuple[list[str], str]] = {}
    for entry in view.summary:
        for name, measure in entry.metrics.items():
            match = REQUEST.match(name)
            stem = match["stem"] if match else name
            key = measure.definition or understand(stem).stem
            names, _ = used.setdefault(key, ([], formula_of(key, understand(stem).formula)))
            shown = f"{stem}.request_i" if match else name
            if shown not in names:
                names.append(shown)
    return [(key, ", ".join(sorted(names)), formula) for key, (names, formula) in sorted(used.items())]


def ran(view: View) -> list[tuple[str, str]]:
    """What was run, as pairs of word and value; only what is known."""
    r = view.results
    samples = ", ".join(f"{role} {count}" for role, count in r.dataset.samples.items())
    command = r.command if isinstance(r.command, str) else " ".join(r.command)
    parameters = "" if r.model.parameters is None else f" ({r.model.parameters:,} parameters)".replace(",", " ")
    pairs = [
        ("Dataset", f"{r.dataset.name}{f' ({r.dataset.source})' if r.dataset.source else ''}"),
        ("Samples", samples),
        ("Modality", r.dataset.modality),
        ("Data digest", r.dataset.digest),
        ("Model", f"{r.model.name}{parameters}".strip()),
        ("Seeds", ", ".join(map(str, r.seeds))),
        ("Retrained models", str(r.references or len(view.rows(view.reference)) if view.reference else 0)),
        ("Methods", ", ".join(entry.method for entry in view.methods)),
        ("Command", command),
        ("Created", r.created),
    ]
    return [(word, value) for word, value in pairs if value]
