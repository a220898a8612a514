"""Finite-sample bounds on a mean divergence in [0, 1] (total variation, Hellinger², Jensen-Shannon in bits).

The unit is a group (a subject or a document), never a token: tokens of one text depend on each other. All intervals
hold at every n, for every distribution on [0, 1]. They speak of the population the groups were drawn from.

Shape suffixes: N values, G groups.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike

from expunge.errors import UserError
from expunge.stats import LEVEL, Estimate, Floats, Groups, check_level, group_codes, group_sums, hoeffding_mean


def group_means(values: ArrayLike, groups: Groups = None) -> Floats:
    """Mean of each group's measured values, (G,); nan means not measured.

    Raises:
        UserError: a value outside [0, 1], for which none of the bounds here holds.
    """
    array = np.asarray(values, dtype=np.float64).ravel()
    codes = group_codes(groups, len(array))
    kept = ~np.isnan(array)
    if kept.any() and (array[kept].min() < 0 or array[kept].max() > 1):
        raise UserError("a bounded divergence lies between 0 and 1: use total variation, not KL, or clip and say so.")
    sums_G, counts_G = (
        x[:, 0] for x in group_sums(array[kept, None], group_codes(codes[kept].tolist(), int(kept.sum())))
    )
    means_G: Floats = sums_G / counts_G
    return means_G


def empirical_bernstein(
    values: ArrayLike, groups: Groups = None, *, level: float = LEVEL, definition: str = ""
) -> Estimate:
    """Mean over groups with the two-sided bound of Maurer and Pontil (2009, arXiv 0907.3740), Theorem 4.

    Half-width √(2 V ln(4/α) / n) + 7 ln(4/α) / (3 (n − 1)) with the sample variance V and α = 1 − level; shorter than
    Hoeffding's where the spread is small and there are many groups. ``n`` counts groups; one group has no interval.
    """
    check_level(level)
    means_G = group_means(values, groups)
    if means_G.size == 0:
        return Estimate(math.nan, definition=definition)
    value, num = float(means_G.mean()), int(means_G.size)
    if num == 1:
        return Estimate(value, 0.0, 1.0, 1, definition)
    log = math.log(4 / (1 - level))
    half = math.sqrt(2 * float(means_G.var(ddof=1)) * log / num) + 7 * log / (3 * (num - 1))
    return Estimate(value, max(0.0, value - half), min(1.0, value + half), num, definition)


def bounded_mean(values: ArrayLike, groups: Groups = None, *, level: float = LEVEL, definition: str = "") -> Estimate:
    """The intersection of Hoeffding's and the empirical Bernstein interval, each at half the error probability.

    So nobody chooses the bound after seeing the data: at few groups Hoeffding's decides, at many the other one.
    """
    check_level(level)
    half_level = 1 - (1 - level) / 2
    one = hoeffding_mean(group_means(values, groups), level=half_level)
    other = empirical_bernstein(values, groups, level=half_level)
    low, high = max(one.low, other.low), min(one.high, other.high)
    return Estimate(one.value, low, high, one.n, definition)


def groups_needed(half_width: float, *, level: float = LEVEL) -> int:
    """Groups for which Hoeffding's two-sided interval is at most ± ``half_width``: 18,445 for ± .01 at 95 %."""
    check_level(level)
    if not 0 < half_width < 1:
        raise UserError(f"half-width {half_width} is not between 0 and 1: give for example 0.05.")
    return math.ceil(math.log(2 / (1 - level)) / (2 * half_width**2))
