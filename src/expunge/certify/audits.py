"""Lower bounds on the privacy loss that an attack has shown, and the most that the audit could have shown.

A lower bound never certifies privacy: an audit that shows little was perhaps weak. So every bound is given beside its
ceiling, the value that a perfect attack would have reached with the same number of runs or canaries. Losses are in
nats (the epsilon of differential privacy), ``delta`` its additive part.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from scipy import stats as scipy_stats
from scipy.optimize import brentq

from expunge.errors import UserError
from expunge.stats import LEVEL, check_level, clopper_pearson

MOST = 60.0  # no audit shows a loss of e^60


@dataclass(frozen=True, slots=True)
class LossBound:
    """The loss that was shown at least, and the ceiling of the same audit; 0 when nothing was shown."""

    low: float
    ceiling: float
    n: int
    definition: str


def _rates(
    true_positives: int, positives: int, false_positives: int, negatives: int, level: float, thresholds: int
) -> tuple[float, float]:
    """(lower bound of the true-positive rate, upper bound of the false-positive rate), jointly at ``level``."""
    check_level(level)
    if min(positives, negatives) < 1 or thresholds < 1:
        raise UserError("an audit needs at least one run on each side and one threshold.")
    each = 1 - (1 - level) / thresholds
    hit = clopper_pearson(true_positives, positives, level=each)
    alarm = clopper_pearson(false_positives, negatives, level=each)
    return hit.low, alarm.high


def loss_from_rates(
    true_positives: int,
    positives: int,
    false_positives: int,
    negatives: int,
    *,
    delta: float = 0.0,
    level: float = LEVEL,
    thresholds: int = 1,
) -> LossBound:
    """Loss that an attack's error rates show, by Clopper-Pearson (Nasr et al. 2021, arXiv 2101.04535, section 4).

    max(ln((TPR₋ − δ)/FPR₊), ln((TNR₋ − δ)/FNR₊), 0). Runs in both worlds must be independent; ``thresholds`` is the
    number of thresholds (or attacks) among which the best was picked, and is paid for by Bonferroni.
    """
    _check_delta(delta)
    tpr, fpr = _rates(true_positives, positives, false_positives, negatives, level, thresholds)
    ceiling = _loss(*_rates(positives, positives, 0, negatives, level, thresholds), delta)
    name = f"loss-clopper-pearson/1 delta={delta:g} thresholds={thresholds}"
    return LossBound(_loss(tpr, fpr, delta), ceiling, positives + negatives, name)


def _loss(tpr_low: float, fpr_high: float, delta: float) -> float:
    def ratio(above: float, below: float) -> float:
        if above <= delta:
            return 0.0
        return MOST if below <= 0 else math.log((above - delta) / below)

    return max(0.0, ratio(tpr_low, fpr_high), ratio(1 - fpr_high, 1 - tpr_low))


def ceiling(runs: int, *, delta: float = 0.0, level: float = LEVEL) -> float:
    """Loss that a perfect attack with ``runs`` runs per world shows: .81 at 10, 3.28 at 100, 5.60 at 1000 (95 %)."""
    return loss_from_rates(runs, runs, 0, runs, delta=delta, level=level).low


def mu_from_rates(
    true_positives: int,
    positives: int,
    false_positives: int,
    negatives: int,
    *,
    level: float = LEVEL,
    thresholds: int = 1,
) -> LossBound:
    """Lower bound on the parameter of Gaussian privacy: Φ⁻¹(TPR₋) − Φ⁻¹(FPR₊) (Nasr et al. 2023, arXiv 2302.07956).

    Only for mechanisms that are Gaussian in the sense of Dong, Roth and Su 2022; the bound is then much tighter.
    """

    def mu(tpr: float, fpr: float) -> float:
        if tpr <= 0 or fpr >= 1:
            return 0.0
        return max(0.0, float(scipy_stats.norm.ppf(tpr) - scipy_stats.norm.ppf(fpr)))

    found = mu(*_rates(true_positives, positives, false_positives, negatives, level, thresholds))
    most = mu(*_rates(positives, positives, 0, negatives, level, thresholds))
    return LossBound(found, most, positives + negatives, f"mu-clopper-pearson/1 thresholds={thresholds}")


# -- one run, many canaries ----------------------------------------------------------------------------------------


def one_run_p_value(canaries: int, guesses: int, right: int, loss: float, delta: float = 0.0) -> float:
    """Largest probability of ``right`` or more right guesses under an (loss, delta) private training.

    Steinke, Nasr and Jagielski 2023 (arXiv 2305.08846), Theorem 5.2: every canary was put in by a fair coin of its
    own, and a guess may be withheld. f(v) + 2 m δ max_i (f(v − i) − f(v)) / i with f(v) = P[Bin(r, e^ε/(1+e^ε)) ≥ v].
    """
    _check_delta(delta)
    if not 0 <= right <= guesses <= canaries or guesses < 1:
        raise UserError(
            f"{right} right of {guesses} guesses about {canaries} canaries is impossible: give 0 <= right <= guesses "
            "<= canaries, and at least one guess."
        )
    chance = 1 / (1 + math.exp(-loss))
    tail = scipy_stats.binom.sf(np.arange(right + 1) - 1, guesses, chance)  # f(0) ... f(right)
    steps = (tail[:right][::-1] - tail[right]) / np.arange(1, right + 1)  # f(v - i) - f(v) over i
    worst = float(steps.max()) if right else 0.0
    return min(1.0, float(tail[right]) + 2 * canaries * delta * worst)


def one_run_loss(canaries: int, guesses: int, right: int, *, delta: float = 1e-5, level: float = LEVEL) -> LossBound:
    """Loss that guesses about coin-chosen canaries of one training show; the ceiling is that of all guesses right."""
    return _one_run(canaries, guesses, right, delta, level, halved=False)


def one_run_unlearning_loss(
    canaries: int, guesses: int, right: int, *, delta: float = 1e-5, level: float = LEVEL
) -> LossBound:
    """Loss of an *unlearning* that its canaries show: those put in by coins were trained on, then asked to be deleted.

    If unlearning any set leaves a model (ε, δ)-close to the same retrained one, two sets leave models (2ε,
    (1 + e^ε) δ)-close to each other; so at least half of what the canaries show (exactly half at δ = 0).
    """
    return _one_run(canaries, guesses, right, delta, level, halved=True)


def _one_run(canaries: int, guesses: int, right: int, delta: float, level: float, *, halved: bool) -> LossBound:
    check_level(level)
    found, most = (_smallest_loss(canaries, guesses, hits, delta, 1 - level, halved) for hits in (right, guesses))
    kind = "one-run-unlearning/1" if halved else "one-run/1"
    return LossBound(found, most, guesses, f"{kind} canaries={canaries} delta={delta:g}")


def _smallest_loss(canaries: int, guesses: int, right: int, delta: float, alpha: float, halved: bool) -> float:
    """The smallest loss that the guesses do not reject at ``alpha``."""

    def excess(loss: float) -> float:
        if not halved:
            return one_run_p_value(canaries, guesses, right, loss, delta) - alpha
        wider = min(1.0, (1 + math.exp(loss)) * delta)
        return one_run_p_value(canaries, guesses, right, 2 * loss, wider) - alpha

    if excess(0.0) > 0:
        return 0.0
    return MOST if excess(MOST) <= 0 else float(brentq(excess, 0.0, MOST, xtol=1e-10))


def _check_delta(delta: float) -> None:
    if not 0 <= delta <= 1:
        raise UserError(f"delta {delta} is not between 0 and 1: give for example 1e-5.")
