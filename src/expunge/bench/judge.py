"""From what the attacks found to statements: audited model against references, two-sided, corrected for all tests.

Shape suffixes: N samples, M holdout samples, R references.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from scipy import stats as scipy_stats

from expunge.attacks.registry import Access, Family, Tier
from expunge.data.samples import Role
from expunge.stats import Estimate, auc, auc_estimate, bootstrap_auc, bootstrap_mean, percentile_interval, tpr_at_fpr

Floats = NDArray[np.float64]
Axis = Literal["effectiveness", "privacy", "robustness", "utility"]
AXES: tuple[Axis, ...] = ("effectiveness", "privacy", "robustness", "utility")
AXIS_OF: dict[str, Axis] = {
    "extraction": "effectiveness",
    "membership": "privacy",
    "recovery": "robustness",
    "kept": "utility",
}
RATES = (0.001, 0.01, 0.1)
ROUNDING = 1e-12
MARGINS = {"auc": 0.05, "kept": 0.02}  # differences below these are not held against a model, however certain
LEFT, LESS, LIKE, NO_REFERENCE = "more is left", "less than the reference", "like the reference", "no reference"
NOT_SHOWN = "not shown"

Values = Mapping[Role, Sequence[float]]  # of one score under one model


@dataclass(frozen=True)
class Panel:
    """One score of one attack under every model. ``references``: those of them that are retrained models.

    ``two_sided``: see :class:`~expunge.attacks.registry.Attack`.
    """

    attack: str
    score: str
    family: Family | Literal["kept"]
    tier: Tier
    access: Access
    models: Mapping[str, Values]  # by checkpoint
    audited: str
    references: Sequence[str]
    two_sided: bool = True

    @property
    def ranks(self) -> bool:
        """Whether the question is how well forget is told from holdout."""
        return self.family == "membership" and all("holdout" in v for v in self.models.values())


@dataclass
class Judged:
    """One row of the audit's table of scores."""

    panel: Panel
    models: dict[str, Estimate]
    gap: Estimate
    p: float = math.nan
    p_adjusted: float = math.nan
    verdict: str = NO_REFERENCE
    tpr: dict[str, Estimate] = field(default_factory=dict)

    @property
    def axis(self) -> Axis:
        return AXIS_OF[self.panel.family]

    @property
    def differs(self) -> bool:
        """More is left than in the references; for membership and extraction also when less is. Kept: only less."""
        if self.axis == "utility":
            return self.verdict == LESS
        if self.axis == "robustness" or not self.panel.two_sided:
            return self.verdict == LEFT
        return self.verdict in (LEFT, LESS)

    def record(self) -> dict[str, Any]:
        own = self.panel
        number = {n: None if math.isnan(x) else x for n, x in (("p", self.p), ("p_adjusted", self.p_adjusted))}
        return {
            "attack": own.attack,
            "score": own.score,
            "family": own.family,
            "tier": own.tier,
            "access": own.access,
            "axis": self.axis,
            "statistic": "auc" if own.ranks else "mean",
            "models": {name: found.record() for name, found in self.models.items()},
            "gap": self.gap.record(),
            **number,
            "verdict": self.verdict,
            **({"tpr": {rate: found.record() for rate, found in self.tpr.items()}} if self.tpr else {}),
        }


def judge(
    panel: Panel, subjects: Mapping[Role, Sequence[str]], *, level: float = 0.95, resamples: int = 1000, seed: int = 0
) -> Judged:
    """Values, intervals and the difference from the references' mean, subjects as the unit of resampling.

    The standard error of the difference has two parts: the spread over subjects, and, from two references on, that
    between references, since the audited model is one more training. With one reference the latter is not known, and
    false alarms are more frequent than they should be; the row's note says so. The p-value is Student's, with the
    degrees of freedom of Welch and Satterthwaite. That holds its level where models differ less than subjects; where
    two references agree by luck although models differ much, it alarms too often: then give more references.
    """
    name = f"{panel.score}-{'auc' if panel.ranks else 'mean'}/1"
    if panel.ranks:
        return _ranked(panel, subjects, name, level, resamples, seed)
    own_roles = panel.models[panel.audited]
    role: Role = "forget" if "forget" in own_roles else next(iter(own_roles))
    values = {m: np.asarray(v[role], dtype=np.float64) for m, v in panel.models.items()}
    groups = list(subjects[role])
    models = {
        m: bootstrap_mean(v, groups, level=level, resamples=resamples, seed=seed, definition=name)
        for m, v in values.items()
    }
    if not panel.references:
        return Judged(panel, models, Estimate(math.nan, definition=name))
    theirs_RN = np.stack([values[r] for r in panel.references])
    apart_N = values[panel.audited] - theirs_RN.mean(axis=0)
    # The mean of equal numbers is off by a rounding error, which must not be tested for a difference.
    apart_N[np.abs(apart_N) <= ROUNDING * np.abs(values[panel.audited])] = 0.0
    kept = np.isfinite(apart_N)
    if not kept.any():
        return Judged(panel, models, Estimate(math.nan, definition=name), verdict=NOT_SHOWN)
    apart_G = _by_group(apart_N[kept], [g for g, keep in zip(groups, kept, strict=True) if keep])
    gap = float(apart_N[kept].mean())
    spread = float(apart_G.std(ddof=1) / math.sqrt(len(apart_G))) if len(apart_G) > 1 else math.nan
    between = theirs_RN[:, kept].mean(axis=1)
    by_chance = 2.0 ** (1 - len(apart_G))  # two-sided sign test
    return _tested(panel, models, gap, spread, len(apart_G) - 1, between, by_chance, int(kept.sum()), name, level)


def _ranked(
    panel: Panel, subjects: Mapping[Role, Sequence[str]], name: str, level: float, resamples: int, seed: int
) -> Judged:
    order = list(panel.models)
    roles: tuple[Role, Role] = ("forget", "holdout")
    tables = [np.array([panel.models[m][role] for m in order], dtype=np.float64) for role in roles]
    # Models are compared on the same samples: what is missing under one is left out for all.
    kept = [np.flatnonzero(np.isfinite(table).all(axis=0)) for table in tables]
    if not all(len(k) for k in kept):
        return Judged(panel, {}, Estimate(math.nan, definition=name), verdict=NOT_SHOWN)
    both = [[subjects[role][i] for i in places.tolist()] for role, places in zip(roles, kept, strict=True)]
    pairs = [(tables[0][i, kept[0]], tables[1][i, kept[1]]) for i in range(len(order))]
    models = {m: auc_estimate(*pair, *both, level=level, definition=name) for m, pair in zip(order, pairs, strict=True)}
    own = order.index(panel.audited)
    tpr = {
        f"{rate:g}": tpr_at_fpr(*pairs[own], rate, *both, level=level, seed=seed, definition=f"{name}-tpr@{rate:g}")
        for rate in RATES
    }
    if not panel.references:
        return Judged(panel, models, Estimate(math.nan, definition=name), tpr=tpr)
    theirs = [order.index(r) for r in panel.references]
    draws = bootstrap_auc(pairs, *both, resamples=resamples, seed=seed)
    gap_draws = draws[own] - draws[theirs].mean(axis=0)
    between = np.array([auc(*pairs[i]) for i in theirs])
    gap = auc(*pairs[own]) - float(between.mean())
    sizes = [len(set(side)) for side in both]
    few = min(sizes)
    spread = float(gap_draws.std(ddof=1)) if few > 1 else math.nan
    by_chance = min(1.0, 2 / math.comb(sum(sizes), few))  # two-sided permutation of who is forget and who holdout
    count = sum(len(side) for side in both)
    found = _tested(panel, models, gap, spread, sum(sizes) - 2, between, by_chance, count, name, level)
    found.tpr = tpr
    if len(panel.references) == 1 and few > 1:
        low, high = percentile_interval(gap_draws, level)
        found.gap = Estimate(gap, low, high, found.gap.n, found.gap.definition, found.gap.note)
    return found


def _tested(
    panel: Panel,
    models: dict[str, Estimate],
    gap: float,
    spread: float,
    degrees: int,
    between_R: Floats,
    by_chance: float,
    count: int,
    name: str,
    level: float,
) -> Judged:
    num = len(between_R)
    parts = [(spread**2, degrees)]  # variance, degrees of freedom
    note = "one reference: the spread between retrained models is not known"
    if num > 1:
        parts.append((float(between_R.var(ddof=1)) * (1 + 1 / num), num - 1))
        note = ""
    variance = sum(own for own, _ in parts)
    if not math.isfinite(variance) or degrees < 1:
        reason = "one subject: nothing is known of the spread over subjects"
        return Judged(panel, models, Estimate(gap, n=count, definition=name, note=reason), verdict=NOT_SHOWN)
    half, p = 0.0, 1.0 if gap == 0 else by_chance  # without any spread: how seldom the labels would fall like this
    if variance > 0:
        error, freedom = math.sqrt(variance), variance**2 / sum(own**2 / count for own, count in parts)
        half = float(scipy_stats.t.ppf((1 + level) / 2, freedom)) * error
        p = float(2 * scipy_stats.t.sf(abs(gap) / error, freedom))
    return Judged(panel, models, Estimate(gap, gap - half, gap + half, count, name, note), p)


def _by_group(values: Floats, groups: Sequence[str]) -> Floats:
    names = list(dict.fromkeys(groups))
    labels = np.array(groups)
    return np.array([values[labels == g].mean() for g in names])


def holm(p_values: Sequence[float]) -> Floats:
    """Adjusted p-values of Holm's step-down rule (1979), which controls the chance of a single wrong rejection.

    nan stays nan and does not count as a test.
    """
    given = np.asarray(p_values, dtype=np.float64)
    out = np.full(len(given), np.nan)
    places = np.flatnonzero(np.isfinite(given))
    order = places[np.argsort(given[places], kind="stable")]
    highest = 0.0
    for step, place in enumerate(order):
        highest = max(highest, min(1.0, float(given[place]) * (len(order) - step)))
        out[place] = highest
    return out


def settle(rows: Sequence[Judged], level: float = 0.95) -> None:
    """Adjust the p-values of all rows together and fill in the verdicts."""
    for row, p in zip(rows, holm([r.p for r in rows]), strict=True):
        row.p_adjusted = float(p)
        if math.isnan(p):
            continue
        margin = MARGINS["auc"] if row.panel.ranks else MARGINS.get(row.panel.family, 0.0)
        sure = p <= 1 - level and abs(row.gap.value) > margin
        row.verdict = LIKE if not sure else LEFT if row.gap.value > 0 else LESS


def worst(rows: Sequence[Judged]) -> Judged | None:
    """The row that speaks most against the model: one that differs if there is any, by its p-value, then its size."""
    tested = [r for r in rows if math.isfinite(r.p)]
    if not tested:
        return None

    def key(row: Judged) -> tuple[bool, float, float]:
        half, away = (row.gap.high - row.gap.low) / 2, abs(row.gap.value)
        size = away / half if half > 0 else math.inf if away > 0 else 0.0
        return not row.differs, row.p_adjusted, -size

    return min(tested, key=key)


def tile(
    axis: Axis,
    rows: Sequence[Judged],
    completeness: Mapping[str, Any] | None,
    control: Sequence[Judged] | None = None,
    attacked: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """One component of the audit's vector: verdict, the row that decides it, and a sentence.

    ``control``: the same rows for the original in the audited model's place. Where even the original passes, nothing
    could have been shown, and the audited model has passed no test. ``attacked``: completeness in the worst view; what
    it finds beyond the completeness as served speaks against robustness.
    """
    own = [r for r in rows if r.axis == axis]
    found = worst(own)
    tests = sum(math.isfinite(r.p) for r in own)
    against = [r for r in own if r.differs]
    under = over = judged = 0
    parts = []
    if axis == "effectiveness":
        parts.append(_of_completeness(completeness))
        if completeness is not None:
            judged = completeness["auditable"]
            under, over = (completeness["counts"].get(f"{word}-unlearned", 0) for word in ("under", "over"))
    hides, hidden = _hidden(axis, completeness, attacked)
    parts += hidden
    if against and found is not None:
        parts.append(_sentence(found, len(against), tests))
    elif tests:
        parts.append(f"none of {tests} scores speaks against the model after correction for all tests")
    if tests and any(len(r.panel.references) == 1 for r in own):
        parts.append("there is one reference only, so how far retrained models differ by chance is not known")
    blunt = axis != "utility" and control is not None and not any(r.differs for r in control if r.axis == axis)
    if against or under or over or hides > 0:
        verdict = "failed"
    elif tests and blunt and not judged:
        verdict = NOT_SHOWN
        parts.append("but the original would pass as well: give more samples or references")
    elif tests or judged:
        verdict = "passed"
    else:
        verdict = NOT_SHOWN
        if not own:
            parts.append("no attack measured it")
        elif any(r.panel.references for r in own):
            parts.append("too few samples to compare with the references")
        else:
            parts.append("no retrained model to compare with")
    text = "; ".join(parts)
    return {
        "axis": axis,
        "verdict": verdict,
        "sentence": f"{text[:1].upper()}{text[1:]}.",
        "worst": found.record() if found is not None else None,
        "tests": tests,
    }


def _hidden(
    axis: Axis, completeness: Mapping[str, Any] | None, attacked: Mapping[str, Any] | None
) -> tuple[int, list[str]]:
    """(samples that come back only under attack, the clause that says so)."""
    if axis != "robustness" or attacked is None or completeness is None:
        return 0, []
    shown, total = (c["counts"].get("under-unlearned", 0) for c in (completeness, attacked))
    return total - shown, [f"of {attacked['auditable']} auditable samples {total - shown} come back only under attack"]


def _of_completeness(found: Mapping[str, Any] | None) -> str:
    if found is None:
        return "completeness was not judged, since no model that never saw the samples was given"
    if not found["auditable"]:
        return f"none of {found['n']} samples is auditable"
    under, over = (found["counts"].get(f"{word}-unlearned", 0) for word in ("under", "over"))
    return f"of {found['auditable']} auditable samples {under} are under-unlearned and {over} over-unlearned"


def _sentence(row: Judged, count: int, tests: int) -> str:
    own = row.models[row.panel.audited].value
    theirs = float(np.mean([row.models[r].value for r in row.panel.references]))
    what = "AUC" if row.panel.ranks else "mean"
    speak = "speaks" if count == 1 else "speak"
    return (
        f"{count} of {tests} scores {speak} against the model, most clearly {row.panel.score} "
        f"({what} {own:.3g} against {theirs:.3g}: {row.verdict})"
    )
