"""What a reader must know before believing the numbers: warnings computed from the results themselves."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

from expunge.report.samples import EMBED_LIMIT
from expunge.report.schema import ANCHORS, CONTROLS, Measure, Row
from expunge.report.view import View

MIN_SHARED = 3  # two rows that agree on fewer metrics may agree by chance
# Rows that are the original by construction: equal numbers are what is expected of them
_SAME_BY_DESIGN = {"original", "identity"}


def warnings(view: View) -> list[str]:
    """The run's own warnings first, then what can be seen in its numbers; each says what follows from it."""
    found = [
        *view.results.warnings,
        *_failed(view),
        *_identical(view.results.rows),
        *_anchors(view),
        *_controls(view),
        *_seeds(view),
        *_samples(view),
    ]
    return list(dict.fromkeys(found))


def _name(row: Row) -> str:
    return row.method + ("" if row.seed is None else f" (seed {row.seed})")


def _failed(view: View) -> list[str]:
    """Rows without any number, and rows that lack some, those together that lack the same."""
    found: list[str] = []
    lacking: dict[str, list[str]] = {}
    for row in view.results.rows:
        if not any(m.value is not None for m in row.metrics.values()):
            where = "" if row.study == "main" else f" in the {row.study} study at {row.position}"
            why = f": {'; '.join(row.notes)}" if row.notes else ": nothing was measured"
            found.append(f"{_name(row)} failed{where}{why}")
        elif missing := sorted(name for name, m in row.metrics.items() if m.value is None):
            lacking.setdefault(", ".join(missing), []).append(_name(row))
    return found + [f"{', '.join(who)}: no value for {what} (could not be computed)" for what, who in lacking.items()]


def fingerprint(row: Row) -> tuple[tuple[str, float], ...]:
    return tuple(sorted((name, m.value) for name, m in row.metrics.items() if m.value is not None))


def _identical(rows: Sequence[Row]) -> list[str]:
    """Different methods with the same numbers to the last digit were, most likely, the same weights."""
    groups: dict[tuple[object, ...], list[Row]] = defaultdict(list)
    for row in rows:
        numbers = fingerprint(row)
        if len(numbers) >= MIN_SHARED:
            groups[row.study, row.position, numbers].append(row)
    found = []
    for group in groups.values():
        if len({row.method for row in group}) < 2 or {row.kind for row in group} <= _SAME_BY_DESIGN:
            continue
        if all(row.kind in ANCHORS for row in group):
            consequence = "the anchors of this study are one and the same model, so distances between them mean nothing"
        elif any(row.kind in _SAME_BY_DESIGN for row in group):
            consequence = "the method changed nothing that was measured"
        else:
            consequence = "they probably hold the same weights: do not read them as two results"
        names = " and ".join(dict.fromkeys(_name(row) for row in group))
        found.append(f"identical rows: {names} agree in all {len(fingerprint(group[0]))} metrics; {consequence}")
    return found


def _anchors(view: View) -> list[str]:
    if not view.study("main"):
        return []
    found = []
    if view.reference is None:
        found.append(
            "no retrained model was available: how far a method is from having forgotten cannot be said; "
            "values on the forget set are shown as they are, without a target"
        )
    elif len(view.rows(view.reference)) == 1:
        found.append("one retrained model only: its own spread between trainings is unknown, so small distances are")
        found[-1] += " not evidence of a difference"
    if view.original is None:
        found.append("the original model was not measured: shares of the gap that a method closed cannot be given")
    elif view.reference is not None and view.primary is None:
        found.append(
            "original and retrained model do not differ on any forgetting metric: "
            "nothing shows that the forget set had been learnt, so nothing can show that it was forgotten"
        )
    if view.of_kind("base") is None:
        found.append("the base was not measured: the report cannot say what the original knew before the private data")
    return found


def _overlap(one: Measure, other: Measure) -> bool:
    if one.low is None or one.high is None or other.low is None or other.high is None:
        return one.value == other.value
    return one.low <= other.high and other.low <= one.high


def _controls(view: View) -> list[str]:
    """A control row that does as well as the methods says that the measure, or the methods, are weak."""
    if view.primary is None or not view.methods:
        return []
    found = []
    best = view.methods[0]
    mine = view.gap(best, view.primary)
    for entry in view.ranked:
        theirs = view.gap(entry, view.primary)
        if entry.kind in CONTROLS and mine and theirs and mine.value is not None and theirs.value is not None:
            if theirs.value >= mine.value:
                found.append(f"the control row {entry.method} is as close to retraining as the best method")
            elif _overlap(mine, theirs) and mine.low is not None:
                found.append(f"{best.method} and the control row {entry.method} cannot be told apart (95 % intervals)")
    return found


def _seeds(view: View) -> list[str]:
    seeds = {row.seed for row in view.results.rows if row.study == "main" and row.kind not in ANCHORS}
    if not seeds:
        return []
    found = []
    if len(seeds) == 1:
        found.append("one seed only: the intervals do not contain the spread between trainings")
    for entry in view.ranked:
        have = {row.seed for row in view.rows(entry)}
        if have and entry.kind not in CONTROLS and len(have) < len(seeds):
            found.append(f"{entry.method} has {len(have)} of {len(seeds)} seeds")
    return found


def _samples(view: View) -> list[str]:
    record, found = view.samples, []
    if not record.present:
        found.append("samples.jsonl is missing: there is no per-sample answer in this report")
    if record.damaged:
        found.append(f"samples.jsonl: {record.damaged} line(s) could not be read and were left out")
    if len(record.rows) > EMBED_LIMIT:
        found.append(
            f"truncated samples: the page holds {EMBED_LIMIT} of {len(record.rows)} lines (forget set first); "
            "samples.jsonl has all of them"
        )
    if record.rows:
        with_samples = {str(row.get("model")) for row in record.rows}
        lacking = sorted(view.main_models - with_samples)
        failed = {row.model for row in view.results.rows if not fingerprint(row)}
        if lacking := [model for model in lacking if model not in failed]:
            found.append(f"no per-sample record for {', '.join(lacking)}")
    return found
