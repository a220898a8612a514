"""The leaderboard: distance to the retrained model on five axes, and ranks with intervals over the seeds.

Every distance is two-sided. On the first four axes 0 is the retrained model and 1 the original (more than 1: further
away than the original), measured against the original of the same seed:

- behaviour: what it says. Mean of |m − reference| / |original − reference| over ROUGE-L, facts forgotten (KFR), truth
  ratio and extraction strength on the forget set, as far as they were measured.
- distribution: total variation to the retrained model beyond the floor between retrained models.
- membership: |AUC − reference's AUC| of the loss attack, against holdout.
- robustness: probability of the forget answers after relearning and after quantization to 4 bit.
- utility: largest relative difference to the retrained model's probability on retain and utility samples (0 = equal,
  absolute, since original and retrained model do not differ here).

Cost, the sixth column, is the share of retraining's FLOPs; it does not enter the rank.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from scipy.stats import rankdata

from expunge.metrics.ranges import cut
from expunge.report.schema import CONTROLS, Measure, Results, Row
from expunge.report.tables import Cell, Column, Line, Table, shared_evidence
from expunge.stats import seed_interval

AXES = ("behaviour", "distribution", "membership", "robustness", "utility")
BEHAVIOUR = ("rouge_l.forget", "kfr", "truth_ratio.forget", "extraction_strength.forget")
ROBUSTNESS = ("relearn.prob", "quant4.prob.forget")
UTILITY = ("prob.retain", "prob.utility")
LEAST = {"distribution": -math.inf}  # it is counted from the floor, and a model may lie below that; others from 0
SAME = 0.02  # original and reference closer than this on a metric say nothing about it


@dataclass(frozen=True)
class Standing:
    """A method over its seeds. ``axes`` and ``rank`` are means with Student intervals; None where not measured."""

    method: str
    kind: str
    seeds: int
    axes: Mapping[str, Measure]
    rank: Measure
    cost: Measure
    properties: Mapping[str, Any]
    best: bool = False


def value(row: Row, name: str) -> float:
    found = row.metrics.get(name)
    return math.nan if found is None or found.value is None else float(found.value)


def relative(row: Row, original: Row, target: Mapping[str, float], names: Sequence[str]) -> float:
    """Mean of |m − reference| / |original − reference| over the metrics that tell the two apart."""
    found = []
    for name in names:
        far = abs(value(original, name) - target.get(name, math.nan))
        if far > SAME:
            found.append(abs(value(row, name) - target[name]) / far)
    known = [f for f in found if math.isfinite(f)]
    return float(np.mean(known)) if known else math.nan


def axes_of(row: Row, original: Row, target: Mapping[str, float]) -> dict[str, float]:
    """The distances of one row; nan where something is missing."""
    kept = [abs(1 - value(row, n) / target[n]) for n in UTILITY if target.get(n, 0.0) > SAME]
    known = [k for k in kept if math.isfinite(k)]
    return {
        "behaviour": relative(row, original, target, BEHAVIOUR),
        "distribution": 1 - value(row, "tv.gap_closed"),
        "membership": relative(row, original, target, ("mia.loss.auc",)),
        "robustness": relative(row, original, target, ROBUSTNESS),
        "utility": max(known) if known else math.nan,
    }


def leaderboard(results: Results) -> list[Standing]:
    """Methods and controls of the main study, best mean rank first; empty without original and reference.

    Ranks are taken within each seed and axis (ties share their mean; a method without a number comes last), averaged
    over the axes, then over the seeds. ``best``: the interval of the rank reaches that of the first.
    """
    main = [r for r in results.rows if r.study == "main"]
    references = [r for r in main if r.kind == "reference"]
    originals = {r.seed: r for r in main if r.kind == "original"}
    if not references or not originals:
        return []
    names = {n for r in references for n in r.metrics}
    target = {n: float(np.nanmean(v)) for n in names if np.isfinite(v := [value(r, n) for r in references]).any()}
    rows = [r for r in main if (r.kind == "method" or r.kind in CONTROLS) and r.metrics and r.seed in originals]
    found = {(r.method, r.seed): axes_of(r, originals[r.seed], target) for r in rows}
    ranks: dict[str, list[float]] = {}
    for seed in sorted({r.seed for r in rows}, key=str):
        here = [r.method for r in rows if r.seed == seed]
        per_axis = []
        for axis in AXES:
            values = np.array([found[m, seed][axis] for m in here])
            if np.isfinite(values).any():
                per_axis.append(rankdata(np.where(np.isfinite(values), values, np.inf)))
        if per_axis:
            for method, mean in zip(here, np.mean(per_axis, axis=0), strict=True):
                ranks.setdefault(method, []).append(float(mean))
    standings = []
    for method, found_ranks in ranks.items():
        own = [r for r in rows if r.method == method]
        axes = {a: over([found[method, r.seed][a] for r in own], LEAST.get(a, 0.0)) for a in AXES}
        shares = [c.value for r in own if (c := r.cost.get("share_of_retraining")) and c.value is not None]
        rank, cost = over(found_ranks, 1.0, len(ranks)), over([float(share) for share in shares], 0.0)
        standings.append(Standing(method, own[0].kind, len(own), axes, rank, cost, own[0].properties))
    standings.sort(key=lambda s: s.rank.value if s.rank.value is not None else math.inf)
    top = standings[0].rank if standings else Measure()
    reach = top.high if top.high is not None else top.value
    return [
        Standing(**{**vars(s), "best": reach is not None and low is not None and low <= reach})
        for s in standings
        for low in [s.rank.low if s.rank.low is not None else s.rank.value]
    ]


def over(values: Sequence[float], least: float, most: float = math.inf) -> Measure:
    """Mean with Student's interval over the seeds, cut to what is possible; without one for a single seed."""
    known = [v for v in values if math.isfinite(v)]
    if not known:
        return Measure()
    if len(known) == 1:
        return Measure(value=known[0], n=1, seeds=1)
    found = seed_interval(known)
    low, high = cut(found, least, most)
    return Measure(value=found.value, low=low, high=high, n=len(known), seeds=len(known))


# -- as tables ---------------------------------------------------------------------------------------------------------

TURNS = tuple(pairwise(("", *AXES)))
GROUP_OF = dict(zip(AXES, ("forgetting", "forgetting", "privacy", "robustness", "retention"), strict=True))


def rank_table(results: Results) -> Table | None:
    """For the report: mean rank, then the distance on each axis; None where nothing can be compared."""
    standings = leaderboard(results)
    if not standings:
        return None
    columns = [Column("rank", "mean rank", "other", "low", first=True)]
    columns += [
        Column(a, a, GROUP_OF[a], "low", first=GROUP_OF[a] != GROUP_OF.get(b)) for a, b in pairwise((*AXES, ""))
    ]
    lines = []
    for s in standings:
        tag = "best" if s.best and s.kind == "method" else s.kind if s.kind in CONTROLS else ""
        near = [None if (v := s.axes[a].value) is None else max(0.0, min(1.0, 1 - v)) for a in AXES]
        found = [s.axes[a] if s.axes[a].value is not None else None for a in AXES]
        cells = [Cell(s.rank), *(Cell(m, None, n) for m, n in zip(found, near, strict=True))]
        lines.append(Line(s.method, s.kind, tag, s.kind in CONTROLS, cells=cells))
    for i, column in enumerate(columns):
        column.evidence = shared_evidence([line.cells[i] for line in lines])
    return Table("Ranks", columns, lines)
