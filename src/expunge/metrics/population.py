"""Metrics of a whole population: many models that were unlearned against many that were retrained.

One unlearned model cannot be told from one retrained model, only distributions can. Every function takes the margins
of the same samples under both populations, log p(y) - log(1 - p(y)): (M, N) for M unlearned, (K, N) for K retrained.

Shape suffixes: M unlearned models, K retrained models, N samples, B bins, J decision rules, V classes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import norm

from expunge.errors import UserError
from expunge.metrics.registry import metric
from expunge.stats import LEVEL, Estimate, Groups, bootstrap_mean

Floats = NDArray[np.float64]
TINY = 1e-45  # keeps the margin of a probability of exactly 0 or 1 finite, as in the challenge's code
BINS, EMPTY, CLIP = 20, 1e-5, 100.0  # of KLOM: histogram bins, least mass of the oracle in one, range of margins
FEW = 16  # fewer models than this cannot say how widely a single sample spreads
DELTA, CAP, PER_UNIT, BUFFER, BUCKET = 1e-5, 50.0, 100, 2.0, 0.5  # of the challenge score
SPREAD_FLOOR = 1e-6  # smallest deviation; a constant signal has none, and a density needs one


@dataclass(frozen=True, slots=True, eq=False)
class PerSample:
    """A mean over samples with its interval over subjects, and what it is the mean of, (N,)."""

    estimate: Estimate
    values_N: Floats


def margins(log_prob: ArrayLike) -> Floats:
    """log p - log(1 - p) of log-probabilities of the right class, of any shape, finite for every probability."""
    log_p = np.asarray(log_prob, dtype=np.float64)
    with np.errstate(divide="ignore"):
        other = np.log(-np.expm1(np.minimum(log_p, 0.0)))
    low = math.log(TINY)
    return np.asarray(np.maximum(log_p, low) - np.maximum(other, low))


def _populations(unlearned: ArrayLike, retrained: ArrayLike, least: int) -> tuple[Floats, Floats]:
    """Both as finite tables over the same samples.

    Raises:
        UserError: other shapes, too few models, or a number that is not finite.
    """
    first_MN, second_KN = (np.asarray(side, dtype=np.float64) for side in (unlearned, retrained))
    if first_MN.ndim != 2 or second_KN.ndim != 2 or first_MN.shape[1] != second_KN.shape[1]:
        raise UserError(
            f"populations of shape {first_MN.shape} and {second_KN.shape} do not fit: give (models, samples) tables "
            "over the same samples."
        )
    if min(len(first_MN), len(second_KN)) < least:
        raise UserError(
            f"{len(first_MN)} unlearned and {len(second_KN)} retrained models are too few: give at least {least} each."
        )
    if not (np.isfinite(first_MN).all() and np.isfinite(second_KN).all()):
        raise UserError("a margin is not a finite number: a model is broken, leave it out of its population.")
    return first_MN, second_KN


# -- KL divergence of margins ------------------------------------------------------------------------------------------


def binned_kl(unlearned_M: Floats, oracle_K: Floats) -> float:
    """KL(unlearned || oracle) in nats between two samples of margins, over 20 bins of their common range.

    Both are counted on the same edges: edges of each sample's own range would not see a shift. The largest margin
    stands in the last bin. A bin that the oracle leaves empty has mass 1e-5, so that the value is at most 11.5.
    """
    p, q = np.clip(unlearned_M, -CLIP, CLIP), np.clip(oracle_K, -CLIP, CLIP)
    low, high = float(min(p.min(), q.min())), float(max(p.max(), q.max()))
    edges_B = np.linspace(low, high if high > low else low + 1, BINS + 1)
    p_B, q_B = (np.histogram(side, edges_B)[0] / len(side) for side in (p, q))
    there_B = p_B > 0
    return float(np.sum(p_B[there_B] * np.log(p_B[there_B] / np.maximum(q_B[there_B], EMPTY))))


@metric(
    name="klom",
    definition="klom-20/1",
    formula="mean over samples of KL(margins under unlearned models || under retrained models), 20 common bins, nats",
    direction="0 is best; the floor is the same number between two halves of the retrained models",
    source="Georgiev et al. 2024 (arXiv:2410.23232); bins and cut-offs of the authors' code",
)
def klom(unlearned: ArrayLike, oracles: ArrayLike, groups: Groups = None, level: float = LEVEL) -> PerSample:
    """How far the outputs of unlearned models are distributed otherwise than those of retrained ones, per sample.

    Histograms of few models differ by chance alone: 8 models in 20 bins give several nats for one distribution. Read
    it beside :func:`klom_floor` with as many models.
    """
    first_MN, second_KN = _populations(unlearned, oracles, 2)
    values_N = np.array([binned_kl(first_MN[:, n], second_KN[:, n]) for n in range(first_MN.shape[1])])
    return PerSample(bootstrap_mean(values_N, groups, level=level, definition="klom-20/1"), values_N)


def klom_floor(oracles: ArrayLike, groups: Groups = None, level: float = LEVEL) -> PerSample:
    """KLOM between the two halves of the retrained models: what chance alone gives with half as many models."""
    oracle_KN = np.asarray(oracles, dtype=np.float64)
    if oracle_KN.ndim != 2 or len(oracle_KN) < 4:
        raise UserError(f"the floor needs a table of 4 or more retrained models: shape {oracle_KN.shape} was given.")
    found = klom(oracle_KN[::2], oracle_KN[1::2], groups, level)
    return PerSample(found.estimate.named("klom-20-floor/1"), found.values_N)


# -- U-LiRA and U-MIA ----------------------------------------------------------------------------------------------


def _centre_and_spread(values_MN: Floats, pooled: bool) -> tuple[Floats, Floats]:
    """Median and deviation of each sample over models; ``pooled``: one deviation, the root mean variance."""
    centre_N = np.median(values_MN, axis=0)
    if pooled:
        deviation_N = np.full(len(centre_N), math.sqrt(float(values_MN.var(axis=0, ddof=1).mean())))
    else:
        deviation_N = np.median(np.abs(values_MN - centre_N), axis=0) / norm.ppf(0.75)
    return centre_N, np.maximum(deviation_N, SPREAD_FLOOR)


def _share_found(score_MN: Floats, score_KN: Floats) -> Floats:
    """Balanced accuracy per sample of "above 0 is unlearned"; a score of 0 counts half."""
    found_N = (score_MN > 0).mean(axis=0) + 0.5 * (score_MN == 0).mean(axis=0)
    left_N = (score_KN < 0).mean(axis=0) + 0.5 * (score_KN == 0).mean(axis=0)
    return np.asarray((found_N + left_N) / 2)


@metric(
    name="u_lira",
    definition="u_lira-2fold/1",  # with fewer than 32 models of a kind u_lira-2fold-pooled/1
    formula="balanced accuracy of ln N(margin; unlearned) > ln N(margin; retrained), Gaussians per sample",
    direction="0.5 is best: unlearned and retrained models cannot be told apart; 1: always",
    source="Hayes et al. 2024 (arXiv:2403.01218); median and MAD as in CLEAR (Dontsov et al. 2024)",
)
def u_lira(unlearned: ArrayLike, retrained: ArrayLike, groups: Groups = None, level: float = LEVEL) -> PerSample:
    """How often a likelihood-ratio attack on a single sample tells unlearned from retrained models.

    The Gaussians of each sample are fitted on one half of each population and judge the other half, then the halves
    change places. Both kinds of trace count: a margin that is too high and one that is too low. Published runs take
    64 models of each kind. With fewer than 32, all samples share one deviation per population, as LiRA does with few
    models: deviations of single samples would lean the accuracy towards 0.5, and so flatter.
    """
    first_MN, second_KN = _populations(unlearned, retrained, 4)
    pooled = min(len(first_MN), len(second_KN)) < 2 * FEW
    parts = []
    for fit, judge in ((0, 1), (1, 0)):
        inside, outside = (_centre_and_spread(side[fit::2], pooled) for side in (first_MN, second_KN))
        ratios = [
            np.asarray(norm.logpdf(asked, *inside) - norm.logpdf(asked, *outside))
            for asked in (first_MN[judge::2], second_KN[judge::2])
        ]
        parts.append(_share_found(*ratios))
    values_N = np.mean(parts, axis=0)
    name = f"u_lira-2fold{'-pooled' if pooled else ''}/1"
    return PerSample(bootstrap_mean(values_N, groups, level=level, definition=name), values_N)


@metric(
    name="u_mia_population",
    definition="u_mia_population-2fold/1",
    formula="balanced accuracy of a decision tree (entropy, at most 256 leaves) on margins pooled over samples",
    direction="0.5 is best",
    source="U-MIA of CLEAR (Dontsov et al. 2024), after Kurmanji et al. 2023; term of Hayes et al. 2024",
)
def u_mia_population(
    unlearned: ArrayLike, retrained: ArrayLike, groups: Groups = None, level: float = LEVEL, seed: int = 0
) -> PerSample:
    """The weaker attack beside U-LiRA: one rule for all samples, fitted on half of the models.

    What it misses and U-LiRA sees is hidden by the differences between samples: averages over a forget set flatter.
    """
    from sklearn.tree import DecisionTreeClassifier

    first_MN, second_KN = _populations(unlearned, retrained, 4)
    parts = []
    for fit, judge in ((0, 1), (1, 0)):
        pooled = np.concatenate([first_MN[fit::2].ravel(), second_KN[fit::2].ravel()])[:, None]
        labels = np.repeat([1, 0], [first_MN[fit::2].size, second_KN[fit::2].size])
        tree = DecisionTreeClassifier(
            criterion="entropy", max_leaf_nodes=256, class_weight="balanced", random_state=seed
        ).fit(pooled, labels)
        scores = [
            tree.predict_proba(asked.reshape(-1, 1))[:, 1].reshape(asked.shape) - 0.5
            for asked in (first_MN[judge::2], second_KN[judge::2])
        ]
        parts.append(_share_found(*scores))
    values_N = np.mean(parts, axis=0)
    return PerSample(bootstrap_mean(values_N, groups, level=level, definition="u_mia_population-2fold/1"), values_N)


# -- the score of the NeurIPS 2023 challenge ---------------------------------------------------------------------------


def epsilon_of_rates(fpr_J: Floats, fnr_J: Floats, delta: float = DELTA) -> float:
    """The largest privacy loss that decision rules with these error rates give evidence of; nan when none counts.

    max over rules of max(0, ln((1 - delta - FPR) / FNR), ln((1 - delta - FNR) / FPR)). A rule without any error gives
    infinity; one that lacks only one kind of error says too little with finitely many models and is left out.
    """
    if np.any((fpr_J == 0) & (fnr_J == 0)):
        return math.inf
    counts_J = (fpr_J > 0) & (fnr_J > 0)
    if not counts_J.any():
        return math.nan
    fpr, fnr = fpr_J[counts_J], fnr_J[counts_J]
    best = 0.0
    for error, other in ((fpr, fnr), (fnr, fpr)):
        top = 1 - delta - error
        possible = top > 0
        if possible.any():
            best = max(best, float(np.max(np.log(top[possible]) - np.log(other[possible]))))
    return best


def _counts(
    values_M: Floats, start: float, steps: int, step: float, side: Literal["left", "right"]
) -> NDArray[np.intp]:
    """How many values lie below (left), or at or below (right), each of ``steps`` points of a grid, (J,)."""
    grid_J = start + step * np.arange(steps)
    return np.asarray(np.searchsorted(np.sort(values_M), grid_J, side))


def sample_epsilon(unlearned_M: Floats, retrained_K: Floats) -> float:
    """Privacy loss of one sample over the challenge's decision rules, in [0, 50].

    Single thresholds, 100 per unit over the common range: above it stands the population with the larger median.
    Intervals, both ends 100 per unit and 2 around the ends of the narrower population: inside it stands that one.
    A population that is less than a hundredth as wide as the other gives 50 at once.
    """
    widths = [float(np.ptp(side)) for side in (unlearned_M, retrained_K)]
    if max(widths) == 0:  # two constants; the challenge's code divides 0 by 0 here
        return 0.0 if unlearned_M[0] == retrained_K[0] else CAP
    if min(widths) / max(widths) < 0.01:
        return CAP
    high, low = retrained_K, unlearned_M
    if not np.median(high) > np.median(low):
        high, low = low, high
    start, end = float(min(high.min(), low.min())), float(max(high.max(), low.max()))
    steps = math.ceil((end - start) * PER_UNIT)
    step = (end - start) / max(steps - 1, 1)
    missed_J, caught_J = (_counts(side, start, steps, step, "left") for side in (high, low))
    fpr, fnr = [1 - caught_J / len(low)], [missed_J / len(high)]

    narrow, wide = (high, low) if np.ptp(high) < np.ptp(low) else (low, high)
    ends = round(2 * BUFFER * PER_UNIT)
    step = 2 * BUFFER / (ends - 1)
    right_at, left_at = float(narrow.max()) - BUFFER, float(narrow.min()) - 2 * BUFFER
    # Both ends move on one grid step, so the left end of rule (i, j) stands at place i + j of one longer grid.
    place_J = np.arange(ends)[:, None] + np.arange(ends)[None, :]
    seen = np.zeros((len(wide) + 1, len(narrow) + 1), dtype=bool)
    inside = []
    for side in (wide, narrow):
        below_right = _counts(side, right_at, ends, step, "right")[:, None]
        inside.append(np.maximum(below_right - _counts(side, left_at, 2 * ends - 1, step, "left")[place_J], 0))
    seen[inside[0], inside[1]] = True
    in_wide, in_narrow = np.nonzero(seen)  # rules with the same errors count once
    fpr.append(in_wide / len(wide))
    fnr.append(1 - in_narrow / len(narrow))
    return min(epsilon_of_rates(np.concatenate(fpr), np.concatenate(fnr)), CAP)


def points(epsilon_N: Floats, models: int) -> Floats:
    """1 for a privacy loss below 0.5, half for each further 0.5, 0 from ceil(ln(models - 1)) on; nan stays nan."""
    bucket_N = np.floor(epsilon_N / BUCKET)
    last = math.ceil(math.log(models - 1)) / BUCKET
    return np.asarray(np.where(np.isnan(epsilon_N), np.nan, np.where(bucket_N < last, 0.5**bucket_N, 0.0)))


@metric(
    name="neurips_forget",
    definition="neurips-2023-forget/1",
    formula="mean over forget of 2^-floor(2 epsilon), epsilon from FPR and FNR of threshold attacks, delta = 1e-5",
    direction="1 is best; retrained against retrained is the ceiling that so many models can reach",
    source="NeurIPS 2023 machine unlearning challenge (Triantafillou et al. 2024, arXiv:2406.09073)",
)
def neurips_forget(
    unlearned: ArrayLike, retrained: ArrayLike, groups: Groups = None, level: float = LEVEL
) -> PerSample:
    """The forgetting quality F of the challenge: points for how little each sample's privacy loss is.

    The attacker picks the best of some 160 000 rules on the very models that he is judged by, so few models give a
    large loss by chance; the challenge took 512 of each. A sample for which no rule counts is left out.
    """
    first_MN, second_KN = _populations(unlearned, retrained, 3)
    epsilon_N = np.array([sample_epsilon(first_MN[:, n], second_KN[:, n]) for n in range(first_MN.shape[1])])
    score_N = points(epsilon_N, min(len(first_MN), len(second_KN)))
    found = bootstrap_mean(score_N, groups, level=level, definition="neurips-2023-forget/1")
    return PerSample(found, epsilon_N)


@metric(
    name="neurips_score",
    definition="neurips-2023/1",
    formula="F x (retain accuracy / retrained's) x (test accuracy / retrained's)",
    direction="higher is better, 1 is as good as retraining; more accurate than retraining counts for more",
    source="NeurIPS 2023 machine unlearning challenge (Triantafillou et al. 2024)",
)
def neurips_score(
    forget: Estimate, retain_accuracy: float, retain_reference: float, test_accuracy: float, test_reference: float
) -> Estimate:
    """The challenge's final score; the interval is that of F, the accuracies are taken as exact.

    ``test``: holdout. Accuracies are means over the models of each population.

    Raises:
        UserError: the retrained models are right nowhere, so that there is nothing to compare with.
    """
    if min(retain_reference, test_reference) <= 0:
        raise UserError("the retrained models have an accuracy of 0: a ratio to it says nothing.")
    factor = retain_accuracy / retain_reference * test_accuracy / test_reference
    value, low, high = (end * factor for end in (forget.value, forget.low, forget.high))
    return Estimate(value, low, high, forget.n, "neurips-2023/1")
