"""From scores to numbers with intervals: cells are (target, group) pairs, resampled together with their subjects.

An interval comes from drawing targets, groups and subjects with replacement, all three at once: a new target, new
shadows and new samples. With one target or one group there is nothing to draw there, and the note says so.
Shape suffix: N samples of a cell.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import rankdata

from expunge.completeness.readings import Floats
from expunge.stats import Estimate, auc, group_codes, percentile_interval

Statistic = Callable[[Floats, Floats], float]  # (score_N, truth_N) -> one number


@dataclass(frozen=True, eq=False)
class Cell:
    """All scores of one target under one group. In ScoreUI the rows of all steps stand one after another."""

    target: int
    group: int
    subjects: Sequence[str]
    truth_N: Floats
    scores: Mapping[str, Floats]


@dataclass(frozen=True)
class Line:
    """One line of a result table."""

    setting: str
    score: str
    metrics: Mapping[str, Estimate]
    note: str = ""

    def record(self) -> dict[str, Any]:
        metrics = {name: value.record() for name, value in self.metrics.items()}
        return {"setting": self.setting, "score": self.score, "metrics": metrics, "note": self.note}


@dataclass
class Outcome:
    """What a protocol found: lines, free facts, and warnings that the reader must know."""

    lines: list[Line] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)


# -- statistics ----------------------------------------------------------------------------------------------------


def member_auc(score_N: Floats, truth_N: Floats) -> float:
    """AUC of still-trained-on (truth 1) against forgotten (truth 0) samples."""
    return auc(score_N[truth_N == 1], score_N[truth_N == 0])


def member_tpr(score_N: Floats, truth_N: Floats) -> float:
    """Share of members found at a false-positive rate of at most 1 %: :func:`expunge.stats.tpr_at_fpr`, no interval.

    Thousands of draws need the bare number; the interval here comes from :func:`crossed`.
    """
    negatives = np.sort(score_N[truth_N == 0])
    if not negatives.size:
        return math.nan
    return float(np.mean(score_N[truth_N == 1] > negatives[-1 - math.floor(0.01 * negatives.size + 1e-9)]))


def rank_correlation(score_N: Floats, truth_N: Floats) -> float:
    """Spearman's; 0 where the score is constant."""
    if np.ptp(score_N) == 0 or np.ptp(truth_N) == 0:
        return 0.0
    return float(np.corrcoef(rankdata(score_N), rankdata(truth_N))[0, 1])


def scaled_error(score_N: Floats, truth_N: Floats) -> float:
    """Mean squared error of the score scaled to [0, 1] by its own extremes, as published."""
    low, width = float(score_N.min()), float(np.ptp(score_N))
    return float(np.mean(((score_N - low) / (width or 1.0) - truth_N) ** 2))


def mean_where(truth: float) -> Statistic:
    """Mean score of the samples of one truth; nan where there are none."""

    def statistic(score_N: Floats, truth_N: Floats) -> float:
        chosen = score_N[truth_N == truth]
        return float(chosen.mean()) if chosen.size else float("nan")

    return statistic


BINARY: Mapping[str, Statistic] = {"auc": member_auc, "tpr@1%": member_tpr}
GRADED: Mapping[str, Statistic] = {"spearman": rank_correlation, "mse": scaled_error}
LEVELS: Mapping[str, Statistic] = {"level.forget": mean_where(0.0), "level.retain": mean_where(1.0)}


# -- intervals -----------------------------------------------------------------------------------------------------


def crossed(
    cells: Sequence[Cell], statistics: Mapping[str, Statistic], *, resamples: int = 200, seed: int = 0
) -> dict[str, dict[str, Estimate]]:
    """Mean of each statistic over the cells, with a crossed bootstrap interval: {score: {statistic: estimate}}.

    Every draw takes targets, groups, and the subjects of each drawn target, with replacement; all scores get the same
    draws. ``n`` counts samples over targets. A score with nan in a cell is measured on the samples that have it.
    """
    values, draws = _drawn(cells, statistics, resamples, seed)
    negatives = min(int(np.sum(c.truth_N == 0)) for c in cells)
    count, note = _size(cells)
    found: dict[str, dict[str, Estimate]] = {}
    for (name, statistic), value in values.items():
        low, high = percentile_interval(np.array(draws[name, statistic]))
        few = statistic == "tpr@1%" and negatives < 100
        more = f"{note}; only {negatives} negatives: a rate of 1 % is not resolved" if few else note
        found.setdefault(name, {})[statistic] = Estimate(value, low, high, count, f"protocol.{statistic}/1", more)
    return found


def margins(
    cells: Sequence[Cell],
    pairs: Sequence[tuple[str, str]],
    label: str,
    statistic: Statistic,
    *,
    resamples: int = 200,
    seed: int = 0,
) -> dict[tuple[str, str], Estimate]:
    """How far the first score of a pair is above the second, both on the same draws of :func:`crossed`."""
    values, draws = _drawn(cells, {label: statistic}, resamples, seed)
    count, note = _size(cells)
    found = {}
    for one, other in pairs:
        if (one, label) in values and (other, label) in values:
            low, high = percentile_interval(np.array(draws[one, label]) - np.array(draws[other, label]))
            value = values[one, label] - values[other, label]
            found[one, other] = Estimate(value, low, high, count, f"protocol.{label}.margin/1", note)
    return found


Key = tuple[str, str]  # score, statistic


def _drawn(
    cells: Sequence[Cell], statistics: Mapping[str, Statistic], resamples: int, seed: int
) -> tuple[dict[Key, float], dict[Key, list[float]]]:
    """(means over the cells, the same means in every draw)."""
    names = [name for name in cells[0].scores if all(name in cell.scores for cell in cells)]
    by_place = {(cell.target, cell.group): cell for cell in cells}
    targets, groups = sorted({c.target for c in cells}), sorted({c.group for c in cells})
    codes = {t: _codes(next(c for c in cells if c.target == t)) for t in targets}
    rng = np.random.default_rng(seed)
    draws: dict[Key, list[float]] = {(n, s): [] for n in names for s in statistics}
    for _ in range(resamples):
        cell_values: dict[Key, list[float]] = {key: [] for key in draws}
        drawn_groups = rng.choice(groups, len(groups))
        for target in rng.choice(targets, len(targets)):
            places = _draw(codes[int(target)], rng)
            for group in drawn_groups:
                for key, value in _measured(by_place[int(target), int(group)], names, statistics, places).items():
                    cell_values[key].append(value)
        for key, values in cell_values.items():
            draws[key].append(_mean(values))
    whole = [_measured(cell, names, statistics, None) for cell in cells]
    return {key: _mean([cell[key] for cell in whole]) for key in draws}, draws


def _size(cells: Sequence[Cell]) -> tuple[int, str]:
    """(samples over targets, what was drawn)."""
    targets = {c.target: len(c.truth_N) for c in cells}
    groups = {c.group for c in cells}
    return sum(targets.values()), f"{len(targets)} target(s), {len(groups)} group(s) of shadows"


def lines(
    setting: str,
    cells: Sequence[Cell],
    statistics: Mapping[str, Statistic],
    notes: Mapping[str, str],
    *,
    resamples: int,
    seed: int,
    suffix: str = "",
) -> list[Line]:
    """One line per score; ``suffix`` is added to the names of the statistics."""
    table = crossed(cells, statistics, resamples=resamples, seed=seed)
    return [
        Line(setting, name, {s + suffix: e for s, e in row.items()}, notes.get(name, "")) for name, row in table.items()
    ]


def _codes(cell: Cell) -> NDArray[np.intp]:
    return group_codes(list(cell.subjects), len(cell.subjects))


def _draw(codes_N: NDArray[np.intp], rng: np.random.Generator) -> NDArray[np.intp]:
    """Places of the samples of subjects drawn with replacement."""
    order = np.argsort(codes_N, kind="stable")
    starts = np.concatenate([[0], np.cumsum(np.bincount(codes_N))])
    chosen = rng.integers(len(starts) - 1, size=len(starts) - 1)
    return np.concatenate([order[starts[g] : starts[g + 1]] for g in chosen])


def _measured(
    cell: Cell, names: Sequence[str], statistics: Mapping[str, Statistic], places: NDArray[np.intp] | None
) -> dict[tuple[str, str], float]:
    found = {}
    for name in names:
        score_N, truth_N = cell.scores[name], cell.truth_N
        if places is not None:
            score_N, truth_N = score_N[places], truth_N[places]
        good = np.isfinite(score_N)
        for label, statistic in statistics.items():
            found[name, label] = statistic(score_N[good], truth_N[good]) if good.any() else math.nan
    return found


def _mean(values: Sequence[float]) -> float:
    finite = [v for v in values if math.isfinite(v)]
    return sum(finite) / len(finite) if finite else math.nan
