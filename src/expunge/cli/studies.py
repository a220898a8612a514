"""What the verbs that run models say at the end."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from expunge.cli.common import emit

if TYPE_CHECKING:
    from expunge.opening import Result

DTYPES = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}  # torch's names of them


COLUMNS = (
    ("prob.forget", "forget prob"),
    ("retain_ratio", "retain/ref"),
    ("prob.retain", "retain prob"),
    ("tv.gap_closed", "gap closed"),
    ("mia.loss.auc", "MIA AUC"),
    ("relearn.loss_ratio", "relearn/ref"),
)


def headline(results: Mapping[str, Any]) -> list[str]:
    """A small table for the terminal; the report has everything."""
    rows = [s for s in results["summary"] if s["study"] == "main"]
    shown = [(key, title) for key, title in COLUMNS if any(key in s["metrics"] for s in rows)]
    lines = ["  ".join([f"{'':<26}", *(f"{title:>12}" for _, title in shown), f"{'cost':>7}"])]
    for row in rows:
        cells = []
        for key, _ in shown:
            found = row["metrics"].get(key, {}).get("value")
            cells.append(f"{'' if found is None else format(found, '.3f'):>12}")
        share = row["cost"].get("share_of_retraining")
        share = share.get("value") if isinstance(share, dict) else share
        cells.append(f"{'' if share is None else format(share, '.0%'):>7}")
        lines.append("  ".join([f"{row['method'][:26]:<26}", *cells]))
    return lines


NOTICES = 6  # warnings that the terminal shows; the report has all


def notices(results: Mapping[str, Any]) -> list[str]:
    """What the reader must know before believing the table."""
    found = [str(w) for w in results.get("warnings", ()) if not str(w).startswith("not measured: ")]
    more = len(results.get("warnings", ())) - len(found[:NOTICES])
    return [f"Note: {text}" for text in found[:NOTICES]] + ([f"({more} more note(s) in the report.)"] if more else [])


def tell(result: Result, as_json: bool, more: Sequence[str] = ()) -> None:
    """The result on standard output: what was planned, or the headline and where everything is."""
    lines: list[str] = []
    if result.plan is not None:
        import yaml

        lines.append(yaml.safe_dump(dict(result.plan["config"]), sort_keys=False, allow_unicode=True))
        lines += [f"Estimate: {result.plan['estimate']}", "Nothing was run."]
    elif "summary" in result.results:
        lines += [*headline(result.results), "", *notices(result.results), ""]
    lines += more
    if result.report is not None:
        lines.append(f"Report: {result.report}")
    if result.model is not None:
        lines.append(f"Model:  {result.model}")
    emit(result.record(), "\n".join(lines), as_json)


def audit_lines(result: Result) -> list[str]:
    """The vector of an audit, one line per axis, and what its reader must know; the report has the rest."""
    import json

    if result.plan is not None:
        return []
    content = json.loads((result.folder / "audit.json").read_text(encoding="utf-8"))
    lines = [f"{t['axis']:<14} {t['verdict']:<10} {t['sentence']}" for t in content["vector"]]
    counts = (content["completeness"] or {}).get("counts")
    if counts:
        lines.append("completeness   " + ", ".join(f"{n} {name}" for name, n in counts.items()))
        lines += [f"               Note: {text}" for text in content["completeness"]["notes"]]
    if (content["fitness"] or {}).get("unfit"):
        lines.append(f"Note: {content['fitness']['sentence']}")
    lines += [f"Attack {name} failed {reason}" for name, reason in content["failed"].items()]
    reasons: dict[str, list[str]] = {}
    for name, reason in content["skipped"].items():
        reasons.setdefault(reason, []).append(name)
    lines += [f"Skipped, {reason}: {', '.join(names)}" for reason, names in reasons.items()]
    if result.failures:
        lines.append(f"--fail-on: {', '.join(result.failures)}")
    return [*lines, ""]
