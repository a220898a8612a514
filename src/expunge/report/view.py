"""What the numbers say: reference, distances, gap closed, ranking. Everything that page, Markdown and figures share.

The distance of a method is two-sided: ``|value − value of the retrained model|``; a metric that is a distance already
is taken as it is. The share of the gap that a method closed is ``(original − method) / (original − floor)`` in
distances, where the floor is the distance at which retrained models stand from one another (0 if unknown): 1 is like
retrained, 0 is untouched, negative is further away than the original was. Its interval carries over the method's
interval only, with original and floor taken as fixed; for total variation the run's own ``tv.gap_closed``, which
resamples all of them together, is used when every row has it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

from expunge.metrics.ranges import cut, possible
from expunge.report.catalogue import PRIMARY, RETENTION, Metric, in_order, understand
from expunge.report.samples import SampleRecord, verdict_counts
from expunge.report.schema import ANCHORS, CONTROLS, Measure, Results, Row, Study, Summary
from expunge.stats import seed_interval

OWN_GAP = "tv.gap_closed"
SIDE = 1e-9  # smaller differences between original and reference are rounding


def distance(metric: Metric, measure: Measure | None, reference: Measure | None) -> Measure | None:
    """Distance to the retrained model, with the interval carried through the absolute value; None if unknown."""
    if measure is None or measure.value is None:
        return None
    if metric.ideal == "zero":
        centre = 0.0
    elif metric.ideal == "reference" and reference is not None and reference.value is not None:
        centre = reference.value
    else:
        return None
    ends = [abs(end - centre) for end in (measure.low, measure.high) if end is not None]
    low = high = None
    if len(ends) == 2 and measure.low is not None and measure.high is not None:
        low = 0.0 if measure.low <= centre <= measure.high else min(ends)
        high = max(ends)
    return measure.model_copy(update={"value": abs(measure.value - centre), "low": low, "high": high})


def gap_closed(far: float | None, now: Measure | None, floor: float = 0.0) -> Measure | None:
    """``(far − now) / (far − floor)`` with its interval; None when the original is no further than the floor."""
    if far is None or far - floor <= SIDE or now is None or now.value is None:
        return None
    low = None if now.high is None else (far - now.high) / (far - floor)
    high = None if now.low is None else (far - now.low) / (far - floor)
    return now.model_copy(update={"value": (far - now.value) / (far - floor), "low": low, "high": high})


def summarise(rows: Sequence[Row]) -> list[Summary]:
    """Mean over seeds for results that carry no summary: Student's t interval, or a lone seed's own interval.

    ``n`` is the smallest of the rows.
    """
    groups: dict[tuple[str, str, Study, int | None], list[Row]] = {}
    for row in rows:
        groups.setdefault((row.method, row.kind, row.study, row.position), []).append(row)
    out = []
    for (method, _, study, position), members in groups.items():
        names = dict.fromkeys(name for row in members for name in row.metrics)
        costs = dict.fromkeys(name for row in members for name in row.cost)
        out.append(
            Summary(
                method=method,
                kind=members[0].kind,
                study=study,
                position=position,
                metrics={name: _mean([r.metrics[name] for r in members if name in r.metrics], name) for name in names},
                cost={name: _mean([r.cost[name] for r in members if name in r.cost]) for name in costs},
                notes=list(dict.fromkeys(note for row in members for note in row.notes)),
            )
        )
    return out


def _mean(measures: Sequence[Measure], metric: str = "") -> Measure:
    there = [m for m in measures if m.value is not None]
    if len(there) < 2:
        return there[0].model_copy(update={"seeds": 1}) if there else Measure()
    mean = seed_interval([m.value for m in there if m.value is not None])
    low, high = cut(mean, *possible(metric))
    counts = [m.n for m in there if m.n is not None]
    return Measure(
        value=mean.value,
        low=low,
        high=high,
        n=min(counts) if counts else None,
        seeds=mean.n,
        definition=there[0].definition,
    )


@dataclass
class View:
    """Results and samples, with what is derived from them (computed once)."""

    results: Results
    samples: SampleRecord = field(default_factory=SampleRecord)

    @cached_property
    def summary(self) -> list[Summary]:
        return self.results.summary or summarise(self.results.rows)

    def study(self, study: Study) -> list[Summary]:
        return [entry for entry in self.summary if entry.study == study]

    @cached_property
    def main(self) -> list[Summary]:
        """Entries of the main study: anchors first, then by rank."""
        entries = self.study("main")
        anchors = sorted((e for e in entries if e.kind in ANCHORS), key=lambda e: ANCHORS.index(e.kind))
        return anchors + self.ranked

    @cached_property
    def metrics(self) -> list[Metric]:
        return in_order({name for entry in self.study("main") for name in entry.metrics})

    def of_kind(self, kind: str, study: Study = "main", position: int | None = None) -> Summary | None:
        """The anchor of this kind in a study; at a position, the one of that position or the one without."""
        found = [e for e in self.study(study) if e.kind == kind]
        exact = [e for e in found if e.position == position]
        return exact[0] if exact else next((e for e in found if e.position is None), None)

    @cached_property
    def reference(self) -> Summary | None:
        return self.of_kind("reference")

    @cached_property
    def original(self) -> Summary | None:
        return self.of_kind("original")

    def target(self, name: str) -> Measure | None:
        """The retrained model's value of a metric."""
        return self.reference.metrics.get(name) if self.reference else None

    def distance(self, entry: Summary, name: str) -> Measure | None:
        return distance(understand(name), entry.metrics.get(name), self.target(name))

    def delta(self, entry: Summary, name: str) -> float | None:
        """Signed difference to the retrained model; None without one."""
        mine, target = entry.metrics.get(name), self.target(name)
        if mine is None or target is None or mine.value is None or target.value is None:
            return None
        return mine.value - target.value

    def gap(self, entry: Summary, name: str) -> Measure | None:
        """Share of the original's distance on this metric that the entry closed."""
        if self.original is None or self.reference is None:
            return None
        if name == "tv.forget" and self._own_gap:
            own = entry.metrics.get(OWN_GAP)
            if own is not None and own.value is not None:
                return own
        far, floor = self.distance(self.original, name), self.distance(self.reference, name)
        base = floor.value if floor is not None and floor.value is not None else 0.0
        return gap_closed(far.value if far else None, self.distance(entry, name), base)

    @cached_property
    def _own_gap(self) -> bool:
        """Every method that has a total variation has the share that the run computed with it."""
        compared = [e for e in self.study("main") if e.kind not in ANCHORS and "tv.forget" in e.metrics]
        return bool(compared) and all((m := e.metrics.get(OWN_GAP)) and m.value is not None for e in compared)

    @cached_property
    def primary(self) -> str | None:
        """The metric to rank by: a distance on the forget set that original and reference tell apart."""
        if self.original is None or self.reference is None:
            return None
        others = [m.name for m in self.metrics if m.role == "forget" and m.group == "forgetting"]
        far = {n: self.distance(self.original, n) for n in dict.fromkeys([*PRIMARY, *others])}
        near = {n: self.distance(self.reference, n) for n in far}

        def apart(name: str) -> bool:
            one, other = far[name], near[name]
            floor = other.value if other is not None and other.value is not None else 0.0
            return one is not None and one.value is not None and one.value - floor > SIDE

        return next((name for name in far if apart(name)), None)

    @cached_property
    def retention(self) -> str | None:
        """The metric that stands for what must be kept."""
        here = {name for e in self.study("main") for name, m in e.metrics.items() if m.value is not None}
        others = [m.name for m in self.metrics if m.group == "retention" and m.ideal in ("high", "low")]
        return next((name for name in [*RETENTION, *others] if name in here), None)

    @cached_property
    def ranked(self) -> list[Summary]:
        """Methods and control rows of the main study, closest to retraining first; unmeasured ones last."""
        entries = [e for e in self.study("main") if e.kind not in ANCHORS]

        def key(entry: Summary) -> tuple[bool, float]:
            gap = self.gap(entry, self.primary) if self.primary else None
            return (True, 0.0) if gap is None or gap.value is None else (False, -gap.value)

        return sorted(entries, key=key)

    @property
    def methods(self) -> list[Summary]:
        return [entry for entry in self.ranked if entry.kind not in CONTROLS]

    def rows(self, entry: Summary) -> list[Row]:
        wanted = (entry.method, entry.kind, entry.study, entry.position)
        return [r for r in self.results.rows if (r.method, r.kind, r.study, r.position) == wanted]

    @cached_property
    def main_models(self) -> set[str]:
        return {row.model for row in self.results.rows if row.study == "main"}

    @cached_property
    def verdicts(self) -> dict[str, dict[str, int]]:
        """Per method of the main study, forget samples by verdict (over its seeds)."""
        rows = self.samples.rows
        known = self.main_models & {str(row.get("model")) for row in rows}
        return {method: dict(counts) for method, counts in verdict_counts(rows, known).items()}
