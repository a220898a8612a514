"""Equivalence of two sets of training runs: two one-sided tests, and how many runs they need.

The unit is a training run (a seed), never a prompt: many prompts of one run say nothing of the next run. A test that
fails to reject "they differ" is no evidence that they agree; here "they differ by the margin or more" is what must be
rejected (Schuirmann 1987), so too few runs can only lead to no claim.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats as scipy_stats

from expunge.errors import UserError
from expunge.stats import Estimate, Floats

ALPHA = 0.05
MOST_RUNS = 100_000


@dataclass(frozen=True, slots=True)
class Equivalence:
    """Mean of the first arm minus that of the second, with the 1 − 2·alpha interval that decides.

    ``p_value``: the larger of the two one-sided tests'. ``equivalent``: the interval lies inside (−margin, margin).
    ``different``: it lies outside. Neither: the runs do not decide.
    """

    difference: Estimate
    margin: float
    p_value: float
    runs: tuple[int, int]

    @property
    def equivalent(self) -> bool:
        return -self.margin < self.difference.low and self.difference.high < self.margin

    @property
    def different(self) -> bool:
        return self.difference.low >= self.margin or self.difference.high <= -self.margin


def equivalence(first: ArrayLike, second: ArrayLike, margin: float, *, alpha: float = ALPHA) -> Equivalence:
    """TOST of two arms of runs, one number per run, by Welch's t (1947) with unequal variances.

    ``margin`` is in the unit of the numbers and must have been fixed before the runs were seen. Where the means differ
    by the margin or more, "equivalent" comes out with probability at most ``alpha``.

    Raises:
        UserError: fewer than two runs in an arm, a number that is not finite, or a margin that is not positive.
    """
    _check(margin, alpha)
    a, b = (_runs(values, name) for values, name in ((first, "first"), (second, "second")))
    parts = np.array([a.var(ddof=1) / a.size, b.var(ddof=1) / b.size])
    error, gap = math.sqrt(float(parts.sum())), float(a.mean() - b.mean())
    name = f"tost-welch/1 alpha={alpha:g}"
    if error == 0:  # every run of each arm gave the same number
        return Equivalence(
            Estimate(gap, gap, gap, a.size + b.size, name), margin, float(abs(gap) >= margin), (a.size, b.size)
        )
    degrees = float(parts.sum() ** 2 / (parts**2 / np.array([a.size - 1, b.size - 1])).sum())
    half = float(scipy_stats.t.ppf(1 - alpha, degrees)) * error
    p = float(scipy_stats.t.sf((margin - abs(gap)) / error, degrees))
    return Equivalence(Estimate(gap, gap - half, gap + half, a.size + b.size, name), margin, p, (a.size, b.size))


def power(runs: int, margin: float, *, difference: float = 0.0, alpha: float = ALPHA) -> float:
    """Probability that two arms of ``runs`` normal runs each are called equivalent.

    ``margin`` and ``difference`` (of the true means) are in standard deviations between runs. Exact for the pooled t
    test: given the variance estimate the mean is normal, and the estimate is integrated over its chi-square law.
    """
    _check(margin, alpha)
    if runs < 2:
        return 0.0
    degrees, error = 2 * (runs - 1), math.sqrt(2 / runs)
    quantile = float(scipy_stats.t.ppf(1 - alpha, degrees))
    # Gauss-Legendre over the probability of the variance estimate: smooth, and 400 nodes give 1e-5.
    nodes, weights = np.polynomial.legendre.leggauss(400)
    spread = np.sqrt(scipy_stats.chi2.ppf((nodes + 1) / 2, degrees) / degrees)
    room = np.maximum(margin - quantile * spread * error, 0.0)
    inside = scipy_stats.norm.cdf((room - difference) / error) - scipy_stats.norm.cdf((-room - difference) / error)
    return float(weights @ np.where(room > 0, inside, 0.0) / 2)


def runs_needed(
    margin: float, *, wanted: float = 0.9, difference: float = 0.0, alpha: float = ALPHA, exact: bool = True
) -> int:
    """Fewest runs per arm that give the wanted power; margin and difference in standard deviations between runs.

    ``exact=False`` is the textbook normal approximation at difference 0, 2 (z_{1−α} + z_{(1+power)/2})² / margin²
    (Chow, Shao and Wang 2008, section 3.2), one run too few at large margins.

    Raises:
        UserError: the difference is not smaller than the margin, so that no number of runs would do.
    """
    _check(margin, alpha)
    if not 0 < wanted < 1:
        raise UserError(f"power {wanted} is not between 0 and 1: give for example 0.9.")
    if abs(difference) >= margin:
        raise UserError(
            f"a true difference of {difference:g} is not within the margin {margin:g}: no number of runs helps."
        )
    if not exact:
        sum_of_z = scipy_stats.norm.ppf(1 - alpha) + scipy_stats.norm.ppf((1 + wanted) / 2)
        return max(2, math.ceil(2 * float(sum_of_z) ** 2 / margin**2))
    low, high = 1, 2
    while power(high, margin, difference=difference, alpha=alpha) < wanted:
        low, high = high, 2 * high
        if high > MOST_RUNS:
            raise UserError(
                f"a margin of {margin:g} standard deviations needs over {MOST_RUNS} runs: widen the margin."
            )
    while high - low > 1:
        middle = (low + high) // 2
        enough = power(middle, margin, difference=difference, alpha=alpha) >= wanted
        low, high = (low, middle) if enough else (middle, high)
    return high


def _runs(values: ArrayLike, name: str) -> Floats:
    array = np.asarray(values, dtype=np.float64).ravel()
    if array.size < 2:
        raise UserError(f"the {name} arm has {array.size} run(s): the spread between runs needs at least 2.")
    if not np.isfinite(array).all():
        raise UserError(f"the {name} arm holds a number that is not finite: leave out no run, mend the statistic.")
    return array


def _check(margin: float, alpha: float) -> None:
    if not (margin > 0 and math.isfinite(margin)):
        raise UserError(f"margin {margin} is not a positive number: fix one before the runs are seen.")
    if not 0 < alpha < 0.5:
        raise UserError(f"alpha {alpha} is not between 0 and 0.5: give for example 0.05.")
