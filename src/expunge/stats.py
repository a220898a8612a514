"""Estimates with intervals: bootstrap over subjects, proportions, AUC, TPR at FPR, Kolmogorov-Smirnov, seeds.

Every function returns an :class:`Estimate` and takes plain NumPy arrays. NaN means "not measured": such items are
left out and ``n`` says how many remain. Nothing left gives ``value = nan`` and ``n = 0``, never an exception.

Shape suffixes: N items, K columns, G groups (subjects), R resamples, P positives, M negatives.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats as scipy_stats

from expunge.errors import UserError

Floats = NDArray[np.float64]
Groups = Sequence[Hashable] | NDArray[Any] | None
LEVEL = 0.95
RESAMPLES = 2000
BLOCK = 1 << 22  # elements of the largest temporary of a bootstrap or a pairwise comparison
NAN = math.nan


@dataclass(frozen=True, slots=True)
class Estimate:
    """A number with its interval. ``n`` counts the units it was computed from; nan bounds mean: no interval known."""

    value: float
    low: float = NAN
    high: float = NAN
    n: int = 0
    definition: str = ""
    note: str = ""

    def record(self) -> dict[str, Any]:
        """As JSON for results.json: nan becomes null, an empty note is left out."""

        def plain(number: float) -> float | None:
            return float(number) if math.isfinite(number) else None

        fields: dict[str, Any] = {"value": plain(self.value), "low": plain(self.low), "high": plain(self.high)}
        fields |= {"n": int(self.n), "definition": self.definition}
        return fields | ({"note": self.note} if self.note else {})

    def named(self, definition: str, note: str = "") -> Estimate:
        """The same numbers under a definition, with a note added."""
        return replace(self, definition=definition, note="; ".join(filter(None, (self.note, note))))

    def distance_from(self, target: float = 0.0) -> Estimate:
        """|value - target| with the interval that the signed one implies (its low is 0 when target lies inside)."""
        ends = sorted((abs(self.low - target), abs(self.high - target)))
        low = 0.0 if self.low <= target <= self.high else ends[0]
        return replace(self, value=abs(self.value - target), low=low if math.isfinite(ends[0]) else NAN, high=ends[1])


def check_level(level: float) -> None:
    if not 0 < level < 1:
        raise UserError(f"confidence level {level} is not between 0 and 1: give for example 0.95.")


# -- bootstrap over subjects ---------------------------------------------------------------------------------------


def group_codes(groups: Groups, count: int) -> NDArray[np.intp]:
    """Group number of each of ``count`` items in order of first appearance; each item its own group when None."""
    if groups is None:
        return np.arange(count)
    if len(groups) != count:
        raise UserError(f"{count} values but {len(groups)} groups were given: each value needs one group.")
    numbers: dict[Hashable, int] = {}
    return np.array([numbers.setdefault(g, len(numbers)) for g in groups], dtype=np.intp)


def resampled_weights(num_groups: int, resamples: int, rng: np.random.Generator) -> Floats:
    """How often each group is drawn in each resample, (R, G); every row sums to G."""
    return rng.multinomial(num_groups, np.full(num_groups, 1 / num_groups), size=resamples).astype(np.float64)


def group_sums(values_NK: Floats, codes_N: NDArray[np.intp]) -> tuple[Floats, Floats]:
    """Sums and counts of the measured values of each group and column, (G, K) each."""
    num_groups = int(codes_N.max()) + 1 if len(codes_N) else 0
    sums_GK, counts_GK = np.zeros((2, num_groups, values_NK.shape[1]))
    measured_NK = ~np.isnan(values_NK)
    np.add.at(sums_GK, codes_N, np.where(measured_NK, values_NK, 0.0))
    np.add.at(counts_GK, codes_N, measured_NK.astype(np.float64))
    return sums_GK, counts_GK


def bootstrap_means(values: ArrayLike, groups: Groups = None, resamples: int = RESAMPLES, seed: int = 0) -> Floats:
    """Bootstrap means of (N,) or (N, K) values, whole groups drawn together: (R,) or (R, K), deterministic in seed.

    The K columns of an item stay together, so that functions of several means keep their correlation.
    """
    array = np.asarray(values, dtype=np.float64)
    values_NK = array[:, None] if array.ndim == 1 else array
    sums_GK, counts_GK = group_sums(values_NK, group_codes(groups, len(values_NK)))
    if len(sums_GK) == 0:
        return np.full((resamples, *array.shape[1:]), NAN)
    rng, step = np.random.default_rng(seed), max(1, BLOCK // len(sums_GK))
    parts = []
    for start in range(0, resamples, step):
        weights_RG = resampled_weights(len(sums_GK), min(step, resamples - start), rng)
        with np.errstate(invalid="ignore"):  # a column that was measured in no drawn group has no mean: nan
            parts.append(weights_RG @ sums_GK / (weights_RG @ counts_GK))
    means_RK = np.concatenate(parts)
    return means_RK[:, 0] if array.ndim == 1 else means_RK


def percentile_interval(draws_R: Floats, level: float = LEVEL) -> tuple[float, float]:
    """Equal-tailed percentiles of the finite draws; nan when there are none."""
    finite = draws_R[np.isfinite(draws_R)]
    if finite.size == 0:
        return NAN, NAN
    low, high = np.quantile(finite, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def bootstrap_mean(
    values: ArrayLike,
    groups: Groups = None,
    *,
    level: float = LEVEL,
    resamples: int = RESAMPLES,
    seed: int = 0,
    method: Literal["percentile", "bca"] = "percentile",
    definition: str = "",
) -> Estimate:
    """Mean of (N,) values with a bootstrap interval; ``groups`` (usually the subject) are drawn as a whole.

    "bca" corrects bias and skewness (Efron 1987), with the acceleration from leaving out one group at a time.
    A single group says nothing about the spread: the bounds are then nan. Where all values are equal and 0 or 1,
    the bootstrap would claim certainty; the bounds are then Clopper-Pearson on the number of groups.
    """
    check_level(level)
    array = np.asarray(values, dtype=np.float64).ravel()
    codes = group_codes(groups, len(array))
    kept = ~np.isnan(array)
    array, codes = array[kept], group_codes(codes[kept].tolist(), int(kept.sum()))
    if array.size == 0:
        return Estimate(NAN, definition=definition)
    value, num_groups = float(array.mean()), int(codes.max()) + 1
    if num_groups == 1 or not math.isfinite(value):
        return Estimate(value, n=array.size, definition=definition)
    if np.all(array == array[0]) and array[0] in (0.0, 1.0):
        exact = clopper_pearson(int(array[0]) * num_groups, num_groups, level=level)
        return Estimate(value, exact.low, exact.high, array.size, definition)
    means_R = bootstrap_means(array, codes.tolist(), resamples, seed)
    if method == "percentile":
        low, high = percentile_interval(means_R, level)
    else:
        sums_G, counts_G = (x[:, 0] for x in group_sums(array[:, None], codes))
        left_out_G = (sums_G.sum() - sums_G) / (counts_G.sum() - counts_G)
        low, high = _bca_interval(means_R, value, left_out_G, level)
    return Estimate(value, low, high, array.size, definition)


def bootstrap_difference(
    apart: ArrayLike,
    groups: Groups = None,
    *,
    level: float = LEVEL,
    resamples: int = RESAMPLES,
    seed: int = 0,
    definition: str = "",
) -> Estimate:
    """Mean of (N,) differences of shares, in [-1, 1], with a bootstrap interval as :func:`bootstrap_mean`.

    Where all are equal and 0, 1 or -1, the bounds are Clopper-Pearson on the number of groups, on both sides of 0. A
    mean below 1e-12 is the rounding of a mean of 0.
    """
    array = np.asarray(apart, dtype=np.float64).ravel()
    found = bootstrap_mean(array, groups, level=level, resamples=resamples, seed=seed, definition=definition)
    there = array[~np.isnan(array)]
    if there.size and np.all(there == -1.0):
        other = bootstrap_mean(-array, groups, level=level, definition=definition)
        return replace(found, low=-other.high, high=-other.low)
    if there.size and np.all(there == 0.0):
        return replace(found, low=-found.high)
    return replace(found, value=0.0) if abs(found.value) < 1e-12 else found


def _bca_interval(draws_R: Floats, value: float, left_out_G: Floats, level: float) -> tuple[float, float]:
    below = (np.sum(draws_R < value) + 0.5 * np.sum(draws_R == value)) / len(draws_R)
    bias = scipy_stats.norm.ppf(np.clip(below, 0.5 / len(draws_R), 1 - 0.5 / len(draws_R)))
    apart_G = left_out_G.mean() - left_out_G
    spread = np.sum(apart_G**2)
    skew = float(np.sum(apart_G**3) / (6 * spread**1.5)) if spread > 0 else 0.0
    shifted = bias + scipy_stats.norm.ppf([(1 - level) / 2, (1 + level) / 2])
    low, high = np.quantile(draws_R, scipy_stats.norm.cdf(bias + shifted / (1 - skew * shifted)))
    return float(low), float(high)


def seed_interval(values: ArrayLike, *, level: float = LEVEL, definition: str = "") -> Estimate:
    """Mean over training seeds with Student's t interval; one seed has no interval."""
    check_level(level)
    array = np.asarray(values, dtype=np.float64).ravel()
    array = array[np.isfinite(array)]
    if array.size == 0:
        return Estimate(NAN, definition=definition)
    value = float(array.mean())
    if array.size == 1:
        return Estimate(value, n=1, definition=definition)
    half = float(scipy_stats.t.ppf((1 + level) / 2, array.size - 1) * array.std(ddof=1) / math.sqrt(array.size))
    return Estimate(value, value - half, value + half, array.size, definition)


# -- proportions ---------------------------------------------------------------------------------------------------


def _check_counts(successes: int, trials: int) -> None:
    if not 0 <= successes <= trials:
        raise UserError(f"{successes} successes in {trials} trials is impossible: give 0 <= successes <= trials.")


def wilson(successes: int, trials: int, *, level: float = LEVEL, definition: str = "") -> Estimate:
    """Share of successes with the Wilson score interval (1927): good coverage on average."""
    check_level(level)
    _check_counts(successes, trials)
    if trials == 0:
        return Estimate(NAN, definition=definition)
    z = float(scipy_stats.norm.ppf((1 + level) / 2))
    share = successes / trials
    centre = (share + z * z / (2 * trials)) / (1 + z * z / trials)
    half = z / (1 + z * z / trials) * math.sqrt(share * (1 - share) / trials + z * z / (4 * trials * trials))
    low = 0.0 if successes == 0 else centre - half  # the formula gives exactly 0 and 1 there, up to rounding
    high = 1.0 if successes == trials else centre + half
    return Estimate(share, low, high, trials, definition)


def clopper_pearson(successes: int, trials: int, *, level: float = LEVEL, definition: str = "") -> Estimate:
    """Share of successes with the Clopper-Pearson interval (1934): never covers less than ``level``."""
    check_level(level)
    _check_counts(successes, trials)
    if trials == 0:
        return Estimate(NAN, definition=definition)
    tail = (1 - level) / 2
    low = float(scipy_stats.beta.ppf(tail, successes, trials - successes + 1)) if successes else 0.0
    high = float(scipy_stats.beta.ppf(1 - tail, successes + 1, trials - successes)) if successes < trials else 1.0
    return Estimate(successes / trials, low, high, trials, definition)


def hoeffding_mean(values: ArrayLike, groups: Groups = None, *, level: float = LEVEL, definition: str = "") -> Estimate:
    """Mean over groups of group means of values in [0, 1], with Hoeffding's two-sided bound: valid at every n.

    Unlike the bootstrap this is a finite-sample statement, at the price of a wider interval; n = number of groups.
    """
    check_level(level)
    array = np.asarray(values, dtype=np.float64).ravel()
    kept = np.isfinite(array)
    codes = group_codes(group_codes(groups, len(array))[kept].tolist(), int(kept.sum()))
    array = array[kept]
    if array.size == 0:
        return Estimate(NAN, definition=definition)
    if array.min() < 0 or array.max() > 1:
        raise UserError("Hoeffding's bound needs values between 0 and 1: scale them first.")
    sums_G, counts_G = (x[:, 0] for x in group_sums(array[:, None], codes))
    value, num = float((sums_G / counts_G).mean()), len(counts_G)
    half = math.sqrt(math.log(2 / (1 - level)) / (2 * num))
    return Estimate(value, max(0.0, value - half), min(1.0, value + half), num, definition)


# -- two samples: Kolmogorov-Smirnov -------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class TwoSample:
    """KS distance with its DKW interval, and the p-value of the two-sided test of equal distributions."""

    distance: Estimate
    p_value: float


def dkw_slack(num: int, other: int, level: float = LEVEL) -> float:
    """Half-width of the two-sample DKW interval: sqrt(ln(4/a)/2n) + sqrt(ln(4/a)/2m), each sample at a/2."""
    return sum(math.sqrt(math.log(4 / (1 - level)) / (2 * n)) for n in (num, other))


def kolmogorov_smirnov(first: ArrayLike, second: ArrayLike, *, level: float = LEVEL, definition: str = "") -> TwoSample:
    """Two-sample KS: distance sup|F1 - F2|, exact p-value where feasible, distribution-free bounds on the distance.

    The upper bound is what may be claimed: with ``level`` confidence the two populations differ by no more. A high
    p-value alone is a test that failed to reject. Items are taken as independent. ``n`` is the smaller sample.
    """
    check_level(level)
    a, b = (np.asarray(x, dtype=np.float64).ravel() for x in (first, second))
    a, b = a[~np.isnan(a)], b[~np.isnan(b)]
    if a.size == 0 or b.size == 0:
        return TwoSample(Estimate(NAN, definition=definition), NAN)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # where the exact p-value fails, SciPy takes the asymptotic one
        found: Any = scipy_stats.ks_2samp(a, b)
    distance, slack = float(found.statistic), dkw_slack(a.size, b.size, level)
    low, high = max(0.0, distance - slack), min(1.0, distance + slack)
    return TwoSample(Estimate(distance, low, high, min(a.size, b.size), definition), float(found.pvalue))


# -- many tests -------------------------------------------------------------------------------------------------------


def discoveries(p_values: Floats, fdr: float) -> NDArray[np.bool_]:
    """(N,) which hypotheses the step-up rule of Benjamini and Hochberg rejects."""
    num = len(p_values)
    if not num:
        return np.zeros(0, dtype=bool)
    ordered = np.sort(p_values)
    passed = np.flatnonzero(ordered <= fdr * np.arange(1, num + 1) / num)
    return np.asarray(p_values <= ordered[passed[-1]]) if passed.size else np.zeros(num, dtype=bool)


# -- two samples: ranking ------------------------------------------------------------------------------------------


def auc(positives: ArrayLike, negatives: ArrayLike) -> float:
    """P(positive > negative) + P(tie)/2, exactly, by mid-ranks; nan when a side is empty."""
    pos, neg = _finite(positives), _finite(negatives)
    if pos.size == 0 or neg.size == 0:
        return NAN
    ranks = scipy_stats.rankdata(np.concatenate([pos, neg]))
    return float((ranks[: pos.size].sum() - pos.size * (pos.size + 1) / 2) / (pos.size * neg.size))


def auc_estimate(
    positives: ArrayLike,
    negatives: ArrayLike,
    positive_groups: Groups = None,
    negative_groups: Groups = None,
    *,
    level: float = LEVEL,
    definition: str = "auc/1",
) -> Estimate:
    """AUC with a DeLong interval (1988) on the logit scale; with groups, Obuchowski's clustered variance (1997).

    When the AUC is 0 or 1 its estimated variance is 0; the interval is then Clopper-Pearson on min(m, n) disjoint
    pairs, each of which is a coin with the AUC as its bias. ``n`` counts positives and negatives.
    """
    check_level(level)
    pos, neg, pos_codes, neg_codes = _two_sides(positives, negatives, positive_groups, negative_groups)
    if pos.size == 0 or neg.size == 0:
        return Estimate(NAN, n=pos.size + neg.size, definition=definition)
    value, total = auc(pos, neg), pos.size + neg.size
    pos_groups, neg_groups = len(set(pos_codes)), len(set(neg_codes))
    if value in (0.0, 1.0):
        pairs = min(pos_groups, neg_groups)
        exact = clopper_pearson(int(value) * pairs, pairs, level=level)
        return Estimate(value, exact.low, exact.high, total, definition)
    if min(pos_groups, neg_groups) < 2:
        return Estimate(value, n=total, definition=definition)
    deviation = math.sqrt(_auc_variance(pos, neg, pos_codes, neg_codes, value))
    half = float(scipy_stats.norm.ppf((1 + level) / 2)) * deviation / (value * (1 - value))
    centre = math.log(value / (1 - value))
    low, high = (1 / (1 + math.exp(-(centre + sign * half))) for sign in (-1, 1))
    return Estimate(value, low, high, total, definition)


def tpr_at_fpr(
    positives: ArrayLike,
    negatives: ArrayLike,
    fpr: float,
    positive_groups: Groups = None,
    negative_groups: Groups = None,
    *,
    level: float = LEVEL,
    resamples: int = 1000,
    seed: int = 0,
    definition: str = "",
) -> Estimate:
    """Largest true-positive rate over thresholds "score >= t" whose false-positive rate is at most ``fpr``.

    No interpolation: with ties or few negatives the rate that is really reached is lower, never higher, than asked.
    The interval is the union of a bootstrap of both sides and of Clopper-Pearson at the chosen threshold, since
    either alone is too short at the edge. Fewer than 1/fpr negatives cannot resolve the rate; the note says so.
    """
    check_level(level)
    if not 0 <= fpr <= 1:
        raise UserError(f"false-positive rate {fpr} is not between 0 and 1: give for example 0.01.")
    name = definition or f"tpr@fpr={fpr:g}/1"
    pos, neg, pos_codes, neg_codes = _two_sides(positives, negatives, positive_groups, negative_groups)
    if pos.size == 0 or neg.size == 0:
        return Estimate(NAN, n=pos.size + neg.size, definition=name)
    value = _tpr(pos, neg, fpr)
    exact = clopper_pearson(round(value * pos.size), pos.size, level=level)
    draws_R = _bootstrap_tpr(pos, neg, pos_codes, neg_codes, fpr, resamples, seed)
    low, high = percentile_interval(draws_R, level)
    note = f"only {neg.size} negatives: a rate of {fpr:g} is not resolved" if neg.size * fpr < 1 else ""
    return Estimate(value, min(low, exact.low), max(high, exact.high), pos.size + neg.size, name, note)


def bootstrap_auc(
    pairs: Sequence[tuple[ArrayLike, ArrayLike]],
    positive_groups: Groups = None,
    negative_groups: Groups = None,
    *,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Floats:
    """Bootstrap AUCs of several scores of the *same* items, with the same draws for all: (len(pairs), R).

    Groups of positives and of negatives are drawn independently. Used for paired differences between two models.
    """
    rng = np.random.default_rng(seed)
    first_positives, first_negatives = (np.asarray(side) for side in pairs[0])
    codes = [group_codes(positive_groups, first_positives.size), group_codes(negative_groups, first_negatives.size)]
    counts = [np.bincount(c).astype(np.float64) for c in codes]
    kernels = [_group_kernel(_all_finite(p), _all_finite(n), *codes) for p, n in pairs]
    drawn = [resampled_weights(len(c), resamples, rng) for c in counts]
    below_R = (drawn[0] @ counts[0]) * (drawn[1] @ counts[1])
    return np.stack([np.einsum("rg,rg->r", drawn[0] @ kernel, drawn[1]) / below_R for kernel in kernels])


def _finite(values: ArrayLike) -> Floats:
    array = np.asarray(values, dtype=np.float64).ravel()
    return array[~np.isnan(array)]


def _all_finite(values: ArrayLike) -> Floats:
    array = np.asarray(values, dtype=np.float64).ravel()
    if np.isnan(array).any():
        raise UserError("a paired comparison needs a score for every item: leave items without a score out first.")
    return array


def _two_sides(
    positives: ArrayLike, negatives: ArrayLike, positive_groups: Groups, negative_groups: Groups
) -> tuple[Floats, Floats, NDArray[np.intp], NDArray[np.intp]]:
    sides: list[Floats] = []
    codes: list[NDArray[np.intp]] = []
    for values, groups in ((positives, positive_groups), (negatives, negative_groups)):
        array = np.asarray(values, dtype=np.float64).ravel()
        kept = ~np.isnan(array)
        sides.append(array[kept])
        codes.append(group_codes(group_codes(groups, len(array))[kept].tolist(), int(kept.sum())))
    return sides[0], sides[1], codes[0], codes[1]


def _auc_variance(
    pos: Floats, neg: Floats, pos_codes: NDArray[np.intp], neg_codes: NDArray[np.intp], value: float
) -> float:
    """Obuchowski's variance with no group on both sides; with one item per group it is DeLong's."""
    ranks = scipy_stats.rankdata(np.concatenate([pos, neg]))
    wins_of_pos = (ranks[: pos.size] - scipy_stats.rankdata(pos)) / neg.size
    wins_of_neg = 1 - (ranks[pos.size :] - scipy_stats.rankdata(neg)) / pos.size
    variance = 0.0
    for placements, codes in ((wins_of_pos, pos_codes), (wins_of_neg, neg_codes)):
        apart_G = np.bincount(codes, weights=placements - value)
        variance += len(apart_G) / (len(apart_G) - 1) * float(apart_G @ apart_G) / placements.size**2
    return variance


def _group_kernel(pos: Floats, neg: Floats, pos_codes: NDArray[np.intp], neg_codes: NDArray[np.intp]) -> Floats:
    """Sum of [p > n] + [p = n]/2 over the pairs of each positive group and negative group, (Gp, Gn)."""
    kernel = np.zeros((int(pos_codes.max()) + 1, int(neg_codes.max()) + 1))
    step = max(1, BLOCK // neg.size)
    one_hot_MG = np.zeros((neg.size, kernel.shape[1]))
    one_hot_MG[np.arange(neg.size), neg_codes] = 1
    for start in range(0, pos.size, step):
        block = pos[start : start + step, None]
        np.add.at(kernel, pos_codes[start : start + step], ((block > neg) + 0.5 * (block == neg)) @ one_hot_MG)
    return kernel


def _tpr(pos: Floats, neg: Floats, fpr: float) -> float:
    """Positives above the highest negative that may not be flagged."""
    allowed = math.floor(fpr * neg.size + 1e-9)  # how many negatives may be flagged; 0.1 * 30 must be 3
    if allowed >= neg.size:
        return 1.0
    barrier = np.partition(neg, neg.size - allowed - 1)[neg.size - allowed - 1]
    return float(np.mean(pos > barrier))


def _bootstrap_tpr(
    pos: Floats,
    neg: Floats,
    pos_codes: NDArray[np.intp],
    neg_codes: NDArray[np.intp],
    fpr: float,
    resamples: int,
    seed: int,
) -> Floats:
    """:func:`_tpr` of every resample, (R,): groups carry integer weights, and ranks become sums of weights."""
    rng = np.random.default_rng(seed)
    pos_order, neg_order = np.argsort(-pos, kind="stable"), np.argsort(-neg, kind="stable")
    falling_neg, rising_pos = neg[neg_order], -pos[pos_order]
    step = max(1, BLOCK // (pos.size + neg.size))
    parts = []
    for start in range(0, resamples, step):
        count = min(step, resamples - start)
        neg_RM = resampled_weights(int(neg_codes.max()) + 1, count, rng)[:, neg_codes[neg_order]].cumsum(1)
        pos_RP = resampled_weights(int(pos_codes.max()) + 1, count, rng)[:, pos_codes[pos_order]].cumsum(1)
        allowed_R = np.floor(fpr * neg_RM[:, -1] + 1e-9)
        barrier_R = (neg_RM <= allowed_R[:, None]).sum(1)  # the first negative that may not be flagged
        everyone = barrier_R >= neg.size
        barrier = falling_neg[np.minimum(barrier_R, neg.size - 1)]
        above_R = np.searchsorted(rising_pos, -barrier, side="left")  # positives strictly above the barrier
        won_R = np.where(above_R > 0, pos_RP[np.arange(count), np.maximum(above_R - 1, 0)], 0.0)
        parts.append(np.where(everyone, 1.0, won_R / pos_RP[:, -1]))
    return np.concatenate(parts)
