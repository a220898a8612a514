"""The residual certificate: how far an unlearned convex zone can be from the retrained one, from measured gradients.

L(w) strongly convex with modulus λ gives λ‖w - v‖ ≤ ‖∇L(w) - ∇L(v)‖. With L the objective on the records that stay,
w̃ the unlearned weights (however they were found) and ŵ the retrained ones,

    ‖w̃ - ŵ‖ ≤ (‖∇L(w̃)‖ + ‖∇L(ŵ)‖) / λ

and two norms, which anyone who holds these records can compute again, bound the distance: no Lipschitz constants, no
worst case over data. Publishing w̃ + N(0, σ²I) is then μ-indistinguishable from publishing ŵ + N(0, σ²I), with
μ = (τ₁ + τ₂)/(λσ) for residuals of at most τ₁ and τ₂ (output perturbation, as in Neel, Roth and Sharifi-Malvajerdi
2021, arXiv 2007.02923, and Guo et al. 2020, arXiv 1911.03030; μ as in Dong, Roth and Su 2019, arXiv 1905.02383).

Shape suffixes: N rows, D features, V columns.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from scipy.special import log_softmax

from expunge.errors import UserError
from expunge.privacy_accounting import gaussian_mu
from expunge.zones.linear_algebra import Doubles, one_thread

LARGEST_NOISE = 0.3  # standard deviation of a logit: up to here the zone's probabilities lose at most 0.1 %
ROUNDING_MARGIN = 1e3  # how far a tolerance must stand above the rounding of the gradient that is held against it
ROUNDING = float(np.finfo(np.float64).eps) / 2  # unit roundoff of float64


@dataclass(frozen=True, kw_only=True)
class ResidualCertificate:
    """What two measured residuals support.

    ``distance_bound``: ‖w̃ - ŵ‖ is at most this, from the residuals as measured. ``noise``: standard deviation per
    weight, from the tolerances, which were fixed beforehand and so say nothing about the data. ``logit_noise``: what
    that noise does to a logit. ``refusal``: empty, or one sentence that says why (ε, δ) may not be claimed.
    """

    strong_convexity: float
    residual: float
    reference_residual: float
    tolerance: float
    reference_tolerance: float
    rounding: float
    distance_bound: float
    epsilon: float
    delta: float
    mu: float
    noise: float
    logit_noise: float
    refusal: str = ""

    @property
    def certified(self) -> bool:
        return not self.refusal


def residual_certificate(
    residual: float,
    reference_residual: float,
    strong_convexity: float,
    *,
    epsilon: float,
    delta: float,
    tolerance: float,
    reference_tolerance: float | None = None,
    feature_norm: float = 1.0,
    rounding: float = 0.0,
    largest_noise: float = LARGEST_NOISE,
) -> ResidualCertificate:
    """Judge measured residuals; the certificate refuses rather than raising, so that the refusal can be recorded.

    Args:
        residual: ‖∇L(w̃)‖ over all weights, full batch, on the records that stay, after the removal.
        reference_residual: the same at the reference solve.
        strong_convexity: λ of the same objective: a sum over rows with (λ/2)‖w‖², or a mean with its own λ.
        tolerance: largest residual that this release may have. It must be fixed before the data are seen, for the
            noise follows from it; ``reference_tolerance`` is the same if None.
        feature_norm: largest ‖z(x)‖, so that a logit moves by at most ``feature_norm`` times its column.
        rounding: bound on the error of the measured residuals, e.g. from :func:`ridge_rounding`.

    Raises:
        UserError: a number that no such problem can have.
    """
    if not strong_convexity > 0 or math.isinf(strong_convexity):
        raise UserError(
            f"strong convexity = {strong_convexity} cannot be: without a positive ridge the residual bounds nothing."
        )
    second = tolerance if reference_tolerance is None else reference_tolerance
    given = {
        "residual": residual,
        "reference residual": reference_residual,
        "feature norm": feature_norm,
        "rounding": rounding,
        "largest noise": largest_noise,
    }
    for name, value in given.items():
        if value < 0:
            raise UserError(f"{name} = {value} cannot be: it is a norm, 0 or more.")
    if not (0 < tolerance < math.inf and 0 < second < math.inf):
        raise UserError(f"tolerance = {min(tolerance, second)} cannot be: give a finite number above 0.")
    mu = gaussian_mu(epsilon, delta)
    noise = (tolerance + second) / (strong_convexity * mu)
    logit_noise = noise * feature_norm
    return ResidualCertificate(
        strong_convexity=strong_convexity,
        residual=residual,
        reference_residual=reference_residual,
        tolerance=tolerance,
        reference_tolerance=second,
        rounding=rounding,
        distance_bound=(residual + reference_residual + 2 * rounding) / strong_convexity,
        epsilon=epsilon,
        delta=delta,
        mu=mu,
        noise=noise,
        logit_noise=logit_noise,
        refusal=_refusal(
            ((residual, tolerance, "the unlearned"), (reference_residual, second, "the reference")),
            rounding,
            logit_noise,
            largest_noise,
        ),
    )


def _refusal(
    solves: tuple[tuple[float, float, str], ...], rounding: float, logit_noise: float, largest_noise: float
) -> str:
    for measured, allowed, whose in solves:
        if not measured + rounding <= allowed:  # also when it is no number
            return (
                f"{whose} solve has not converged: its gradient norm is {measured:.3g}, and at most {allowed:.3g} "
                "was promised."
            )
        if allowed < ROUNDING_MARGIN * rounding:
            return (
                f"the tolerance {allowed:.3g} is less than {ROUNDING_MARGIN:.0f} times the rounding error of the "
                f"gradient ({rounding:.3g}), so it cannot be told whether {whose} solve reached it."
            )
    if not logit_noise <= largest_noise:
        return (
            f"hiding the remaining difference takes noise of standard deviation {logit_noise:.3g} per logit, above "
            f"{largest_noise:g}: solve to a smaller tolerance, or use a larger ridge."
        )
    return ""


# -- full-batch gradients, float64 ------------------------------------------------------------------------------------


def ridge_residual(gram_DD: Doubles, cross_DV: Doubles, weights_DV: Doubles, alpha: float) -> float:
    """‖∇L‖ of L(W) = ½‖ZW - T‖² + (α/2)‖W‖² with gram = ZᵀZ and cross = ZᵀT; λ of this objective is α."""
    with one_thread():
        return float(np.linalg.norm(gram_DD @ weights_DV + alpha * weights_DV - cross_DV))


def ridge_rounding(gram_DD: Doubles, cross_DV: Doubles, weights_DV: Doubles, alpha: float) -> float:
    """Bound on the rounding error of :func:`ridge_residual` (Higham 2002, equation 3.13, with norms for entries)."""
    terms = float(np.linalg.norm(gram_DD) + alpha) * float(np.linalg.norm(weights_DV)) + float(np.linalg.norm(cross_DV))
    return (len(gram_DD) + 2) * ROUNDING * terms


def softmax_residual(
    features_ND: Doubles, tokens_N: np.ndarray, weights_DV: Doubles, decay: float, offsets_NV: Doubles | None = None
) -> float:
    """‖∇L‖ of L(W) = mean cross-entropy of softmax(offsets + ZW) + (λ/2)‖W‖²; λ of this objective is ``decay``."""
    with one_thread():
        logits_NV = features_ND @ weights_DV
        if offsets_NV is not None:
            logits_NV = logits_NV + offsets_NV
        errors_NV = np.exp(log_softmax(logits_NV, axis=1))
        errors_NV[np.arange(len(tokens_N)), tokens_N] -= 1
        return float(np.linalg.norm(features_ND.T @ errors_NV / len(tokens_N) + decay * weights_DV))
