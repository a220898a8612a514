"""Numbers and verdicts in words: how a value is printed, and one paragraph per method computed from the data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from expunge.report.catalogue import prose, understand
from expunge.report.schema import CONTROLS, Measure, Summary
from expunge.report.view import View

_COST_LABELS = {
    "share_of_retraining": "share of retraining",
    "wall_s": "wall time, s",
    "cpu_s": "CPU time, s",
    "flops": "FLOPs",
    "peak_mib": "peak memory, MiB",
    "parameters_changed": "parameters changed",
}
KIND_NAMES = {
    "original": "original",
    "reference": "retrained",
    "base": "base",
    "identity": "control",
    "random-edit": "control",
    "method": "",
}


def number(value: float | None) -> str:
    """Three significant digits, thousands with a thin grouping, exponents only where needed.

    >>> number(0.61234), number(12345.0), number(0.0), number(1.2e-7), number(None)
    ('0.612', '12 345', '0', '1.2e-07', '–')
    """
    if value is None:
        return "–"
    if value < 0:
        return "−" + number(-value)
    if value == 0:
        return "0"
    size = abs(value)
    if size >= 1e9 or size < 1e-4:
        return f"{value:.3g}"
    if size >= 1000:
        return f"{value:,.0f}".replace(",", " " if size >= 1e4 else "")
    digits = 3 if size < 1 else 2 if size < 10 else 1 if size < 100 else 0
    if size < 0.01:
        digits = 5
    return f"{value:.{digits}f}"


def signed(value: float | None) -> str:
    """A difference with its sign; a typographic minus."""
    return "–" if value is None else ("+" if value > 0 else "−" if value < 0 else "±") + number(abs(value))


def interval(measure: Measure) -> str:
    """``[low, high]`` or nothing."""
    if measure.low is None or measure.high is None:
        return ""
    return f"[{number(measure.low)}, {number(measure.high)}]"


def percent(measure: Measure) -> str:
    """A share as percent with its interval, e.g. ``62 % [55, 69]``."""
    if measure.value is None:
        return "–"
    known = measure.low is not None and measure.high is not None
    ends = f" [{hundredths(measure.low or 0.0)}, {hundredths(measure.high or 0.0)}]" if known else ""
    return f"{hundredths(measure.value)} %{ends}"


def hundredths(share: float) -> str:
    """A share in whole percent, in two digits when it is small, without the sign.

    >>> hundredths(0.624), hundredths(0.0312), hundredths(-1.25), hundredths(-0.00001)
    ('62', '3.1', '−125', '0')
    """
    size = abs(100 * share)
    if size < 0.01:
        return "0"
    return ("−" if share < 0 else "") + (f"{size:.0f}" if size >= 10 else f"{size:.2g}")


def evidence(measure: Measure) -> str:
    """``n = 40, 3 seeds``; what is not known is left out."""
    parts = [] if measure.n is None else [f"n = {measure.n}"]
    if measure.seed_count is not None:
        parts.append(f"{measure.seed_count} seed{'' if measure.seed_count == 1 else 's'}")
    return ", ".join(parts)


def cost_label(name: str) -> str:
    return _COST_LABELS.get(name, name.replace("_", " "))


def flags(properties: Mapping[str, Any]) -> list[str]:
    """Declared properties of a method as short phrases."""
    out = []
    needs = properties.get("needs") or []
    if needs:
        out.append("needs " + ", ".join(map(str, [needs] if isinstance(needs, str) else needs)))
    wants = properties.get("wants") or []
    if wants:
        out.append("uses " + ", ".join(map(str, [wants] if isinstance(wants, str) else wants)))
    removes = properties.get("removes_from_weights")
    if removes is not None:
        out.append("removes from weights" if removes else "data stays in weights")
    if properties.get("helpers_hold_data"):
        out.append("helper models hold the data")
    if properties.get("sequential") == "not-defined":
        out.append("not for sequences of requests")
    return out


def listing(names: Sequence[str]) -> str:
    """``a, b and c``."""
    return names[0] if len(names) == 1 else ", ".join(names[:-1]) + " and " + names[-1] if names else ""


def headline(view: View) -> str:
    """The answer in one sentence: which method is closest to retraining, and how sure that is."""
    methods, primary = view.methods, view.primary
    controls = [entry.method for entry in view.ranked if entry.kind in CONTROLS]
    tail = f" Control row{'s' if len(controls) > 1 else ''}: {listing(controls)}." if controls else ""
    if not methods:
        return "No unlearning method stands in the main study of this run." + tail
    if primary is None:
        why = "no retrained model was measured" if view.reference is None else "the original shows no gap to close"
        return f"Whether a method is close to retraining cannot be said: {why}." + tail
    best, gap = methods[0], view.gap(methods[0], primary)
    if gap is None or gap.value is None:
        return f"No method was measured on {understand(primary).label}." + tail
    label = understand(primary).label.replace(", forget", "")
    opening = "Closest to retraining on the forget set:"
    if gap.value <= 0:
        opening = "No method came closer to retraining on the forget set than the original was; least far:"
    sentence = f"{opening} {best.method} ({label} gap closed {percent(gap)}"
    auc = _membership(view, best)
    sentence += f"; {auc})." if auc else ")."
    rivals = [
        entry.method
        for entry in methods[1:]
        if (other := view.gap(entry, primary)) and other.high is not None and gap.low is not None
        if other.high >= gap.low
    ]
    if rivals:
        sentence += f" By these intervals not told apart from it: {listing(rivals)}."
    return sentence + tail


def _membership(view: View, entry: Summary) -> str:
    """The membership attack that is furthest from its value on the retrained model."""
    found = []
    for name, measure in entry.metrics.items():
        if name.startswith("mia.") and name.endswith(".auc") and measure.value is not None:
            delta = view.delta(entry, name)
            found.append((abs(delta) if delta is not None else abs(measure.value - 0.5), name))
    if not found:
        return ""
    name = max(found)[1]
    text = f"{understand(name).label} {number(entry.metrics[name].value)}"
    target = view.target(name)
    if entry.kind == "reference" or target is None or target.value is None:
        return text
    return f"{text} against {number(target.value)} retrained"


def paragraph(view: View, entry: Summary) -> str:
    """The verdict on one method in plain language; every number in it stands in the tables."""
    parts = [part for part in (_forgot(view, entry), _membership(view, entry), _kept(view, entry)) if part]
    parts += [part for part in (_returns(view, entry), _cost(entry), _per_sample(view, entry)) if part]
    if not parts:
        return "Nothing was measured" + (f": {'; '.join(entry.notes)}." if entry.notes else ".")
    text = ". ".join(part[0].upper() + part[1:] for part in parts) + "."
    if entry.kind in CONTROLS:
        what = "leaves the model as it is" if entry.kind == "identity" else "changes the weights at random"
        text = f"Control row: it {what}; a method must do better than this. " + text
    return text


def _forgot(view: View, entry: Summary) -> str:
    primary = view.primary
    if primary is None:
        raw = next((m.name for m in view.metrics if m.role == "forget" and m.name in entry.metrics), None)
        if raw is None:
            return ""
        value = entry.metrics[raw]
        return f"{prose(raw)} {number(value.value)} {interval(value)} ({evidence(value)})".strip()
    gap = view.gap(entry, primary)
    if gap is None or gap.value is None:
        return ""
    label = understand(primary).label.replace(", forget", "")
    source = f" ({evidence(gap)})" if evidence(gap) else ""
    if gap.value < 0:
        further = "further from" if gap.high is not None and gap.high < 0 else "no closer to"
        return f"{further} retraining than the original was ({label} gap closed {percent(gap)}){source}"
    text = f"closes {percent(gap)} of the {label} gap between original and retrained{source}"
    raw = next((n for n in ("prob.forget", "loss.forget") if view.delta(entry, n) is not None), None)
    if raw is not None and (delta := view.delta(entry, raw)) is not None:
        mine, target = entry.metrics[raw], view.target(raw)
        assert target is not None and target.value is not None
        inside = mine.low is not None and mine.high is not None and mine.low <= target.value <= mine.high
        remembers = (delta > 0) == (raw == "prob.forget")
        side = (
            "not told apart from retrained"
            if inside
            else "remembers more than retrained"
            if remembers
            else "knows less than retrained"
        )
        text += f"; {prose(raw)} {number(mine.value)} against {number(target.value)}: {side}"
    return text


def _kept(view: View, entry: Summary) -> str:
    name = view.retention
    if name is None or name not in entry.metrics or entry.metrics[name].value is None:
        return ""
    text = f"{prose(name)} {number(entry.metrics[name].value)} {interval(entry.metrics[name])}".rstrip()
    before = view.original.metrics.get(name) if view.original else None
    return text if before is None or entry.kind == "original" else f"{text} against {number(before.value)} before"


def _returns(view: View, entry: Summary) -> str:
    """The robustness result that is furthest from the retrained model's under the same treatment."""
    found = []
    for metric in view.metrics:
        delta = view.delta(entry, metric.name)
        if metric.group == "robustness" and metric.ideal == "reference" and delta is not None:
            far = abs(view.delta(view.original, metric.name) or 0.0) if view.original else 0.0
            found.append((abs(delta) / far if far > 0 else 0.0, metric.name))
    if not found:
        return ""
    name = max(found)[1]
    target = view.target(name)
    assert target is not None
    return f"{prose(name)} {number(entry.metrics[name].value)} against {number(target.value)} retrained"


def _cost(entry: Summary) -> str:
    share = entry.cost.get("share_of_retraining")
    return "" if share is None or share.value is None else f"cost {hundredths(share.value)} % of retraining"


def _per_sample(view: View, entry: Summary) -> str:
    counts = view.verdicts.get(entry.method, {})
    total = sum(counts.values())
    if not total:
        return ""
    named = [f"{counts[key]} {key.replace('-', ' ')}" for key in counts if counts[key]]
    return f"of {total} forget samples over all seeds: {', '.join(sorted(named, key=lambda t: -int(t.split()[0])))}"
