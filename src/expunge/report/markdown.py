"""results.md: the report's tables as Markdown; every number with its interval, n and seeds."""

from __future__ import annotations

from expunge.report.audit_view import AuditReport, gap_text, p_value, seconds
from expunge.report.checks import warnings
from expunge.report.leaderboard import AXES, leaderboard
from expunge.report.pictures import clear_table
from expunge.report.schema import Measure, Results
from expunge.report.tables import GROUP_TITLES, Table, board, definitions, ran, study_table, verdict_table
from expunge.report.view import View
from expunge.report.wording import evidence, headline, number, paragraph

WORST_ROWS = 20  # forget samples that results.md lists


def plain(value: float) -> str:
    """Four significant digits, readable by ``float``.

    >>> plain(0.123456), plain(101776.0)
    ('0.1235', '1.018e+05')
    """
    return f"{value:.4g}"


def cell(measure: Measure | None) -> str:
    """``0.123 [0.11, 0.14] (n = 40, 3 seeds)``; a dash when missing."""
    if measure is None or measure.value is None:
        return "–"
    text = plain(measure.value)
    if measure.low is not None and measure.high is not None:
        text += f" [{plain(measure.low)}, {plain(measure.high)}]"
    said = evidence(measure)
    return f"{text} ({said})" if said else text


_SPECIAL = str.maketrans({c: f"\\{c}" for c in "\\`*_[]<>|#~"})


def escape(text: object) -> str:
    """Text as it is: nothing in it can become markup, a cell border or a new line.

    >>> escape("a|b<i>")
    'a\\\\|b\\\\<i\\\\>'
    """
    return " ".join(str(text).split()).translate(_SPECIAL)


def code(text: str) -> str:
    """A name in code style; a grave accent in it would end that."""
    return "`" + " ".join(text.replace("`", "'").replace("|", "\\|").split()) + "`"


def grid(header: list[str], rows: list[list[str]]) -> list[str]:
    return [
        "| " + " | ".join(header) + " |",
        "|" + "---|" * len(header),
        *("| " + " | ".join(row) + " |" for row in rows),
        "",
    ]


def _table(table: Table, group: str | None = None) -> list[str]:
    picked = [i for i, column in enumerate(table.columns) if group is None or column.group == group]
    if not picked:
        return []
    header = ["method", *(f"{escape(table.columns[i].label)}<br>{code(table.columns[i].key)}" for i in picked)]
    rows = []
    for line in table.lines:
        name = escape(line.name) + (f" ({escape(line.tag)})" if line.tag and line.tag != line.name else "")
        rows.append([name, *(cell(line.cells[i].measure) for i in picked)])
    return grid(header, rows)


def to_markdown(view: View, report: AuditReport | None = None) -> str:
    """The whole of results.md; the audit, where there is one, stands first, and alone when nothing else was read."""
    if report is not None:
        out = [f"# {escape(view.results.title or f'Audit of {report.subject}')}", "", *audit_lines(report)]
        if not view.summary:
            return "\n".join(out)
    else:
        out = [f"# {escape(view.results.title or 'Results')}", "", escape(headline(view)), ""]
    found = warnings(view)
    if found:
        out += ["## Warnings", "", *(f"- {escape(text)}" for text in found), ""]
    out += ["## What was run", "", *grid(["", ""], [[word, escape(value)] for word, value in ran(view)])]
    if view.ranked:
        out += ["## Method by method", ""]
        out += [f"- **{escape(entry.method)}**: {escape(paragraph(view, entry))}" for entry in view.ranked]
        out.append("")
    table = board(view, full=True)
    if table.columns:
        out += ["## Results", "", _HOW, ""]
        for group, title in GROUP_TITLES.items():
            part = _table(table, group)
            out += [f"### {title}", "", *part] if part else []
        declared = [[escape(line.name), escape("; ".join(line.flags))] for line in table.lines if line.flags]
        out += ["### Declared properties", "", *grid(["method", "declared"], declared)] if declared else []
    if asked := clear_table(view):
        out += ["## CLEAR: pictures and texts of the same people", "", *_table(asked)]
    if ranks := rank_lines(view.results):
        out += ["## Ranks", "", _RANKS, "", *ranks, ""]
    names, lines = verdict_table(view)
    if lines:
        rows = [[escape(line.method), *map(str, line.counts), str(line.total), cell(line.adequate)] for line in lines]
        out += ["## Verdicts on the forget samples", ""]
        out += grid(["method", *map(escape, names), "all", "share adequate"], rows)
    for study in ("matched", "sequential", "size"):
        other = study_table(view, study)
        out += [f"## {other.title}", "", *_table(other)] if other else []
    formulas = definitions(view)
    if formulas:
        out += ["## Definitions", ""]
        out += [
            f"- {code(key)} ({', '.join(code(name) for name in names.split(', '))}): "
            + (escape(formula) if formula else "defined by the method or extension that wrote it.")
            for key, names, formula in formulas
        ]
        out.append("")
    return "\n".join(out)


def rank_lines(results: Results) -> list[str]:
    """The leaderboard with ranks; nothing when there is nothing to compare with."""
    standings = leaderboard(results)
    if not standings:
        return []
    rows = []
    for s in standings:
        name = f"**{escape(s.method)}**" if s.best and s.kind == "method" else escape(s.method)
        tag = "" if s.kind == "method" else " (control)"
        weights = "yes" if s.properties.get("removes_from_weights", True) else "no"
        cells = [short(s.rank, 1), *(short(s.axes[a], 2) for a in AXES), short(s.cost, 2)]
        rows.append([name + tag, *cells, weights])
    seeds = sorted({s.seeds for s in standings})
    said = f"{seeds[0]} seeds" if len(seeds) == 1 else f"{seeds[0]} to {seeds[-1]} seeds"
    note = f"Mean \\[95 % interval over the seeds\\]; {said}, {results.references} references."
    header = ["method", "rank", *AXES, "cost", "in the weights"]
    return [*grid(header, rows), f"{note} Bold: the interval of the rank reaches that of the first."]


def short(measure: Measure, digits: int) -> str:
    """``0.12 [0.10, 0.14]``; a dash when missing."""
    if measure.value is None:
        return "–"
    text = f"{measure.value:.{digits}f}"
    if measure.low is None or measure.high is None:
        return text
    return f"{text} [{measure.low:.{digits}f}, {measure.high:.{digits}f}]"


def audit_lines(report: AuditReport) -> list[str]:
    """Verdict, completeness, attacks and the worst samples of an audit; texts of samples are left out."""
    audit = report.audit
    out = [escape(report.headline()), "", escape(report.paragraph()), ""]
    if found := report.warnings():
        out += ["## Before you believe the verdict", "", *(f"- {escape(text)}" for text in found), ""]
    rows = [[t.entry.axis, t.entry.verdict, escape(t.entry.sentence), escape(t.why)] for t in report.tiles]
    out += ["## Verdict of the audit", "", *grid(["axis", "verdict", "", "why"], rows)]
    if report.counts:
        out += ["## Completeness", ""]
        out += grid(["verdict", "samples", "share"], [[escape(n), str(c), f"{s} %"] for n, c, s, _ in report.counts])
        if attacked := report.attacked():
            out += [escape(attacked), ""]
        if facts := report.facts():
            out += [escape("; ".join(f"{word}: {value}" for word, value in facts)), ""]
    if audit.subjects:
        rows = [
            [
                escape(row.subject),
                escape(row.verdict or "–"),
                str(row.n),
                cell(row.completeness),
                p_value(row.p_under),
                p_value(row.dataset_inference_p),
            ]
            for row in audit.subjects
        ]
        out += ["### By subject", ""]
        out += grid(["subject", "verdict", "samples", "completeness", "p, under", "p, all texts together"], rows)
    if report.groups:
        out += ["## Attacks", ""]
    for group in report.groups:
        rows = [
            [
                escape(line.row.score),
                escape(line.row.verdict),
                cell(line.marks.audited),
                cell(line.reference),
                escape(gap_text(line.row)),
                p_value(line.row.p_adjusted),
                cell(line.marks.original),
                escape(", ".join(filter(None, (line.row.tier, line.row.access, seconds(line.cost))))),
            ]
            for line in group.lines
        ]
        header = [
            "score",
            "verdict",
            "audited",
            "reference",
            "difference",
            "corrected p",
            "original",
            "tier, access, cost",
        ]
        out += [f"### {escape(group.title)}", "", *grid(header, rows)]
    for word, reasons in (("Failed", audit.failed), ("Skipped", audit.skipped)):
        if reasons:
            out += [f"### {word} attacks", ""]
            out += [*(f"- {escape(name)}: {escape(reason)}" for name, reason in reasons.items()), ""]
    if audit.notes:
        out += ["### Notes", "", *(f"- {escape(note)}" for note in audit.notes), ""]
    worst = report.drill.worst[:WORST_ROWS]
    if worst:
        rows = [
            [
                escape(drill.id),
                escape(drill.subject),
                escape(drill.verdict or "–"),
                number(drill.completeness),
                number(drill.position),
                p_value(drill.p_under),
            ]
            for drill in worst
        ]
        out += [f"## The {len(worst)} worst of {report.drill.total} forget samples", ""]
        out += grid(["sample", "subject", "verdict", "completeness", "position", "p, under"], rows)
    return out


_RANKS = (
    "Distance to the retrained model on five axes, without regard to its direction: 0 is the retrained model, 1 the "
    "original of the same seed (utility: the largest relative difference in probability, retain and utility). The rank "
    "is taken within each seed and axis, then averaged; cost does not enter."
)
_HOW = (
    "Value \\[95 % interval\\] (n samples, seeds). Forgetting and privacy are two-sided: the retrained model is the "
    "target, not the smallest number. Gap closed = (original − method) ÷ (original − floor), in distances to the "
    "retrained model; the floor is the distance between retrained models. Unless the run resampled them together "
    "(`tv.gap_closed`), its interval is that of the method, with original and floor taken as fixed."
)
