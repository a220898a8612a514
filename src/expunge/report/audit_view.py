"""What an audit says, as plain data and sentences that page and Markdown share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from markupsafe import Markup

from expunge.report.audit_schema import (
    AXES,
    DRILL_FILE,
    Audit,
    AxisVerdict,
    DrillRecord,
    ScoreRow,
    of_kind,
)
from expunge.report.dots import DotAxis, Marks, axis_of, dots, ruler
from expunge.report.samples import VERDICTS
from expunge.report.schema import Measure
from expunge.report.wording import hundredths, interval, listing, number, signed

FAMILIES = {
    "membership": "Membership",
    "extraction": "Extraction",
    "recovery": "Recovery",
    "kept": "What was to be kept",
}
# The order of a reader's concern; within one, the smallest corrected p-value first
ROW_VERDICTS = ("more is left", "less than the reference", "not shown", "no reference", "like the reference")
ICONS = {"passed": "✓", "failed": "✗", "not shown": "?"}
AXIS_QUESTIONS = {
    "effectiveness": "Is the knowledge gone?",
    "privacy": "Can membership be told?",
    "robustness": "Does it stay gone?",
    "utility": "Is the rest still there?",
}
_MEANINGS = {
    "under-unlearned": "more is left than in models that never saw the sample",
    "adequate": "cannot be told from models that never saw it",
    "over-unlearned": "the model knows less than models that never saw it: a trace of the forgetting",
    "not-auditable": "the original hardly knew it better than models that never saw it",
}


@dataclass
class AttackLine:
    """One score: the row of the file with what is drawn and said of it."""

    row: ScoreRow
    marks: Marks
    dots: Markup
    cost: float | None

    @property
    def reference(self) -> Measure | None:
        """Mean of the references; its ends are one reference's interval, or the range over several."""
        found = [m for m in self.marks.references if m.value is not None]
        if not found or self.marks.reference is None:
            return None
        if len(found) == 1:
            return found[0]
        values = [m.value for m in found if m.value is not None]
        return Measure(value=self.marks.reference, low=min(values), high=max(values), n=found[0].n)


@dataclass
class AttackGroup:
    """Scores of one family and one statistic, worst first, on one axis."""

    title: str
    axis: DotAxis
    ruler: Markup
    lines: list[AttackLine]


@dataclass
class Tile:
    entry: AxisVerdict
    icon: str
    question: str
    why: str
    group: AttackGroup | None


@dataclass
class AuditReport:
    """``audit.json`` and ``drill.jsonl`` of a run."""

    audit: Audit
    drill: DrillRecord = field(default_factory=DrillRecord)

    def names(self, kind: str) -> list[str]:
        return [c.name for c in self.audit.checkpoints if c.kind == kind]

    @cached_property
    def subject(self) -> str:
        """What was audited, as the user named it."""
        found = next((c for c in self.audit.checkpoints if c.kind == "audited"), None)
        return "the model" if found is None else found.path or found.name

    def marks(self, row: ScoreRow) -> Marks:
        references = [m for _, m in of_kind(row.models, self.audit, "reference")]
        values = [m.value for m in references if m.value is not None]
        audited = of_kind(row.models, self.audit, "audited")
        original = of_kind(row.models, self.audit, "original")
        return Marks(
            audited[0][1] if audited else None,
            sum(values) / len(values) if values else None,
            references,
            original[0][1] if original else None,
        )

    @cached_property
    def groups(self) -> list[AttackGroup]:
        """Families in order, AUC before means."""
        found: dict[tuple[str, str], list[ScoreRow]] = {}
        for row in self.audit.scores:
            found.setdefault((row.family, row.statistic), []).append(row)
        order = {family: i for i, family in enumerate(FAMILIES)}
        keys = sorted(found, key=lambda k: (order.get(k[0], len(order)), k))
        return [self._group(family, statistic, found[family, statistic]) for family, statistic in keys]

    def _group(self, family: str, statistic: str, rows: Sequence[ScoreRow]) -> AttackGroup:
        marks = [self.marks(row) for row in rows]
        axis = axis_of(statistic, marks)
        lines = [
            AttackLine(row, mark, dots(axis, mark), self.audit.cost.get(row.attack))
            for row, mark in zip(rows, marks, strict=True)
        ]
        what = "AUC, forget against holdout" if statistic == "auc" else f"{statistic} over samples"
        title = f"{FAMILIES.get(family) or family.capitalize() or 'Other'}: {what}"
        return AttackGroup(title, axis, ruler(axis), sorted(lines, key=_concern))

    @cached_property
    def tiles(self) -> list[Tile]:
        """The four axes in order; an axis that the file does not mention was not shown."""
        known = {entry.axis: entry for entry in self.audit.vector}
        found = []
        for axis in AXES:
            entry = known.get(axis) or AxisVerdict(axis=axis, sentence="Nothing was measured on this axis.")
            group = (
                None if entry.worst is None else self._group(entry.worst.family, entry.worst.statistic, [entry.worst])
            )
            found.append(Tile(entry, ICONS[entry.verdict], AXIS_QUESTIONS[axis], self._why(entry), group))
        return found

    def _why(self, entry: AxisVerdict) -> str:
        """Worst case in one line: score, value with interval, reference, corrected p, and of how many tests."""
        row = entry.worst
        if row is None:
            return f"of {plural(entry.tests, 'test')}" if entry.tests else ""
        mark = self.marks(row)
        parts = [f"worst case: {row.score}"]
        if mark.audited is not None:
            word = "AUC " if row.statistic == "auc" else ""
            parts.append(f"{word}{number(mark.audited.value)} {interval(mark.audited)}".rstrip())
        if mark.reference is not None:
            parts.append(f"reference {number(mark.reference)}")
        if row.p_adjusted is not None:
            parts.append(f"corrected p {p_value(row.p_adjusted)}")
        tests = f"; worst of {entry.tests} tests" if entry.tests > 1 else ""
        return parts[0] + " " + ", ".join(parts[1:]) + tests

    @cached_property
    def counts(self) -> list[tuple[str, int, str, str]]:
        """Verdict, number of samples, share in percent, meaning; from the audit, else from the samples."""
        given = self.audit.completeness.counts if self.audit.completeness else {}
        found = {k: v for k, v in (given or self.drill.counts).items() if v}
        names = [*VERDICTS, *sorted(set(found) - set(VERDICTS))]
        total = sum(found.values())
        return [(n, found.get(n, 0), hundredths(found.get(n, 0) / total), _MEANINGS.get(n, "")) for n in names if total]

    @cached_property
    def tests(self) -> int:
        return sum(entry.tests for entry in self.audit.vector)

    def headline(self) -> str:
        """The answer in one sentence."""
        by_verdict: dict[str, list[str]] = {}
        for tile in self.tiles:
            by_verdict.setdefault(tile.entry.verdict, []).append(tile.entry.axis)
        order = [word for word in ("failed", "passed", "not shown") if word in by_verdict]
        return " ".join(f"{word.capitalize()}: {listing(by_verdict[word])}." for word in order)

    def paragraph(self) -> str:
        """What was audited, against what, and what follows for the samples, in plain words."""
        audit = self.audit
        against = ["its original"] if self.names("original") else []
        for kind, words in (("reference", "retrained reference"), ("shadow", "shadow model that never saw the data")):
            if count := len(self.names(kind)):
                against.append(plural(count, words))
        forget = audit.samples.get("forget", self.drill.total)
        others = [f"{count} {role}" for role, count in audit.samples.items() if role != "forget" and count]
        text = (
            f"The {audit.suite} suite examined {plural(forget, 'forget sample')}"
            if audit.suite
            else (f"{plural(forget, 'forget sample')} were examined")
        )
        text += f" (beside them {listing(others)})" if others else ""
        text += f", compared with {listing(against)}." if against else ", with nothing to compare it with."
        counts = {name: count for name, count, _, _ in self.counts}
        judged = sum(counts.get(name, 0) for name in VERDICTS[:3])
        if judged:
            named = ", ".join(f"{counts.get(name, 0)} {name}" for name in VERDICTS[:3])
            text += f" Sample by sample: of {judged} that can be judged, {named}."
            if counts.get("not-auditable"):
                text += f" Of {counts['not-auditable']} nothing can be said."
        if self.tests:
            text += f" The p-values are corrected for {plural(self.tests, 'test')}."
        return text

    def warnings(self) -> list[str]:
        """What a reader must know before believing the verdict; the gravest first."""
        audit, found = self.audit, []
        fit = audit.fitness
        if fit is not None and fit.unfit:
            auc = fit.blind_auc
            numbers = f" (AUC {number(auc.value)} {interval(auc)})" if auc is not None and auc.value is not None else ""
            said = fit.sentence or "A baseline that sees no model tells forget from holdout"
            found.append(f"The split is unfit for membership attacks: {said.rstrip('.')}{numbers}.")
        references, shadows = len(self.names("reference")), len(self.names("shadow"))
        if not references:
            found.append(
                "No retrained reference was given: nothing shows what a model that never saw the data would score, so "
                "no attack can show that the data is gone."
            )
        elif references == 1:
            found.append(
                "One retrained reference only: its own spread between trainings is unknown, so small differences are "
                "no evidence."
            )
        if not shadows and (audit.completeness is None or not audit.completeness.shadows):
            found.append("No shadow model was given: the verdicts on single samples are not calibrated.")
        if not self.names("original"):
            found.append("The original was not given: nothing shows that the forget samples had been learnt.")
        complete = audit.completeness
        if complete and complete.smallest_p and complete.level and complete.smallest_p > complete.level:
            found.append(
                f"The smallest p-value that {plural(complete.shadows, 'shadow')} can give is "
                f"{p_value(complete.smallest_p)}, above the level {complete.level:g}: no sample can be called "
                "under-unlearned."
            )
        if audit.failed:
            found.append(f"Attacks that failed, so that nothing is known of them: {listing(sorted(audit.failed))}.")
        if self.drill.damaged:
            found.append(f"{DRILL_FILE}: {self.drill.damaged} line(s) could not be read and were left out.")
        if self.drill.total > len(self.drill.worst):
            found.append(
                f"The page holds the {len(self.drill.worst)} worst of {self.drill.total} forget samples; {DRILL_FILE} "
                "has all of them."
            )
        return found

    def attacked(self) -> str:
        """How many samples are under-unlearned in the worst view, and in each; "" where only one view was read."""
        found = self.audit.under_attack
        if found is None:
            return ""
        each = ", ".join(f"{name} {view.counts.get('under-unlearned', 0)}" for name, view in found.views.items())
        num = found.counts.get("under-unlearned", 0)
        return (
            f"Under attack: {num} of {found.auditable} auditable samples are under-unlearned in at least one view "
            f"({each}). Every view is compared with the references under the same attack."
        )

    def facts(self) -> list[tuple[str, str]]:
        """How completeness was computed, as pairs of word and value."""
        complete = self.audit.completeness
        if complete is None:
            return []
        calibration = complete.calibration
        pairs: list[tuple[str, Any]] = [
            ("Form", complete.form),
            ("Models that never saw the samples", complete.shadows),
            ("Calibration", calibration if isinstance(calibration, str) else _flat(calibration)),
            ("Level", "" if complete.level is None else f"{complete.level:g}"),
            ("False discovery rate", "" if complete.fdr is None else f"{complete.fdr:g}"),
            ("Samples", complete.n),
            ("Auditable", "" if complete.auditable is None else complete.auditable),
            ("Smallest p-value possible", "" if complete.smallest_p is None else p_value(complete.smallest_p)),
        ]
        return [(word, str(value)) for word, value in pairs if value not in ("", None)]

    @cached_property
    def rates(self) -> list[tuple[str, list[tuple[str, Measure | None, float | None]]]]:
        """Per score with rates: (false-positive rate, audited, mean of the references)."""
        audited = self.names("audited")
        out = []
        for line in (line for group in self.groups for line in group.lines):
            cells = []
            for rate in self.rate_names:
                models = (line.row.tpr or {}).get(rate, {})
                own = next((models[name] for name in ("", *audited) if name in models), None)
                others = [m.value for _, m in of_kind(models, self.audit, "reference") if m.value is not None]
                cells.append((rate, own, sum(others) / len(others) if others else None))
            if any(own is not None for _, own, _ in cells):
                out.append((line.row.score, cells))
        return out

    @cached_property
    def rate_names(self) -> list[str]:
        found = {rate for row in self.audit.scores for rate in row.tpr or {}}
        return sorted(found, key=lambda rate: (_float(rate), rate))


def _concern(line: AttackLine) -> tuple[int, float, float]:
    row = line.row
    place = ROW_VERDICTS.index(row.verdict) if row.verdict in ROW_VERDICTS else len(ROW_VERDICTS)
    p = row.p_adjusted if row.p_adjusted is not None else row.p
    gap = row.gap.value if row.gap is not None and row.gap.value is not None else 0.0
    return place, 1.0 if p is None else p, -abs(gap)


def _float(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return float("inf")


def _flat(value: Any) -> str:
    return (
        ", ".join(f"{k} {v}" for k, v in value.items())
        if isinstance(value, dict)
        else ""
        if value is None
        else str(value)
    )


def plural(count: int, words: str) -> str:
    """``1 shadow``, ``3 shadows``; the first noun of ``words`` that stands before " that" takes the s.

    >>> plural(2, "model that never saw it"), plural(1, "test")
    ('2 models that never saw it', '1 test')
    """
    if count == 1:
        return f"1 {words}"
    head, that, tail = words.partition(" that ")
    return f"{count} {head}s{that}{tail}"


def p_value(value: float | None) -> str:
    """``0.031``, ``<0.001``; a dash when unknown."""
    if value is None:
        return "–"
    return "<0.001" if value < 0.001 else f"{value:.3f}" if value < 0.1 else f"{value:.2f}"


def gap_text(row: ScoreRow) -> str:
    """``+0.26 [0.18, 0.33]``."""
    return "–" if row.gap is None else f"{signed(row.gap.value)} {interval(row.gap)}".rstrip()


def seconds(value: float | None) -> str:
    """``12 s``, ``3.4 min``."""
    if value is None:
        return ""
    return f"{value / 60:.1f} min" if value >= 120 else f"{value:.0f} s" if value >= 10 else f"{value:.1f} s"
