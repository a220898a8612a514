"""Exact privacy of Gaussian noise: the curve between (ε, δ) and μ, the ratio of shift to standard deviation.

N(0, 1) against N(μ, 1) is (ε, δ)-indistinguishable exactly when δ is at least
``δ(ε, μ) = Φ(μ/2 - ε/μ) - e^ε Φ(-μ/2 - ε/μ)`` (Balle and Wang 2018, arXiv 1805.06530, theorem 8; Dong, Roth and Su
2019, arXiv 1905.02383, corollary 1). Evaluated through Mills' ratio, because the plain form loses all digits in the
tails and for small μ.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from scipy.optimize import brentq
from scipy.special import erfcx, log_ndtr, ndtri

from expunge.errors import UserError

NODES, WEIGHTS = np.polynomial.legendre.leggauss(20)  # exact to rounding on a smooth function over less than 1
FAR = 1e3
NARROW = 0.5  # below this μ the difference of two Mills' ratios is integrated, above it is subtracted


def gaussian_delta(epsilon: float, mu: float) -> float:
    """Smallest δ for which N(0, 1) and N(μ, 1) are (ε, δ)-indistinguishable.

    Args:
        epsilon: 0 or more, in nats. mu: 0 or more, distance of the means in standard deviations.

    Raises:
        UserError: a number out of its range.
    """
    _check_epsilon(epsilon)
    _check_mu(mu)
    if mu == 0:
        return 0.0
    if math.isinf(mu) or math.isinf(epsilon):
        return 0.0 if math.isinf(epsilon) else 1.0
    return min(1.0, math.exp(_log_delta(epsilon, mu)))


def gaussian_epsilon(mu: float, delta: float) -> float:
    """Smallest ε ≥ 0 for which N(0, 1) and N(μ, 1) are (ε, δ)-indistinguishable; inf for μ = inf.

    >>> round(gaussian_epsilon(1.0, 1e-5), 3)
    4.377

    Raises:
        UserError: μ is negative or not a number, or δ is not strictly between 0 and 1.
    """
    _check_mu(mu)
    _check_delta(delta)
    if mu == 0:
        return 0.0
    if math.isinf(mu):
        return math.inf
    wanted = math.log(delta)
    if _log_delta(0.0, mu) <= wanted:
        return 0.0
    # Φ(μ/2 - ε/μ) alone is δ here, and what is subtracted from it makes the curve smaller: ε lies below.
    enough = mu * (mu / 2 - float(ndtri(delta)))

    def excess(epsilon: float) -> float:
        return _log_delta(epsilon, mu) - wanted

    return enough if excess(enough) >= 0 else _root(excess, 0.0, enough)  # equal to rounding where μ is large


def gaussian_mu(epsilon: float, delta: float) -> float:
    """Largest μ for which N(0, 1) and N(μ, 1) are (ε, δ)-indistinguishable.

    Noise of standard deviation ``shift / gaussian_mu(ε, δ)`` is therefore the least that hides ``shift``.

    >>> round(gaussian_mu(1.0, 1e-5), 5)
    0.26805

    Raises:
        UserError: ε is negative or not finite, or δ is not strictly between 0 and 1.
    """
    _check_epsilon(epsilon)
    _check_delta(delta)
    if math.isinf(epsilon):
        raise UserError("epsilon inf hides nothing: give a finite epsilon, for example 1.")
    wanted = math.log(delta)

    def excess(log_mu: float) -> float:
        return _log_delta(epsilon, math.exp(log_mu)) - wanted

    low = high = 0.0
    while excess(low) > 0:
        low -= 2.0
    while excess(high) < 0:
        high += 1.0
    return math.exp(_root(excess, low, high))


def _root(function: Callable[[float], float], low: float, high: float) -> float:
    found: float = brentq(function, low, high, xtol=1e-300, rtol=8.9e-16, maxiter=500)
    return found


def _log_delta(epsilon: float, mu: float) -> float:
    """log δ(ε, μ) for finite ε ≥ 0 and μ > 0.

    With x = ε/μ - μ/2 and φ the normal density, e^ε φ(x + μ) = φ(x); so δ = φ(x) (M(x) - M(x + μ)) with Mills' ratio
    M = (1 - Φ)/φ, whose derivative is tM(t) - 1.
    """
    x = epsilon / mu - mu / 2
    log_density = -x * x / 2 - math.log(2 * math.pi) / 2
    if mu < NARROW:
        points = x + mu / 2 * (1 + NODES)
        # 1 - tM(t) cancels as t grows; beyond FAR, where δ is below exp(-FAR²/2), its leading term is enough.
        slopes = np.where(points > FAR, 1 / points**2, 1 - points * _mills(points))
        return log_density + math.log(mu / 2 * float(WEIGHTS @ slopes))
    if x > 0:
        return log_density + math.log(float(_mills(np.float64(x)) - _mills(np.float64(x + mu))))
    # On this side M(x) overflows, and nothing cancels: Φ(-x) is at least 1/2.
    log_upper = float(log_ndtr(-x))
    log_lower = log_density + math.log(float(_mills(np.float64(x + mu))))
    return log_upper + math.log1p(-math.exp(log_lower - log_upper))


def _mills(x: np.ndarray | np.float64) -> np.ndarray:
    return np.asarray(math.sqrt(math.pi / 2) * erfcx(x / math.sqrt(2)))


def _check_epsilon(epsilon: float) -> None:
    if not epsilon >= 0:
        raise UserError(f"epsilon = {epsilon} cannot be: give 0 or more, for example 1.")


def _check_mu(mu: float) -> None:
    if not mu >= 0:
        raise UserError(f"mu = {mu} cannot be: give 0 or more.")


def _check_delta(delta: float) -> None:
    if not 0 < delta < 1:
        raise UserError(f"delta = {delta} cannot be: give a number between 0 and 1, for example 1e-5.")
